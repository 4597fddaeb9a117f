//! State of a sequence that llama.cpp's cache does not record.

use std::io::Read;
use std::ops::Range;
use std::time::Duration;

use super::VoteError;
use crate::archive::{Archive, Bring, ReadError};
use crate::backend::Devices;
use crate::bytes::{Reader, put_numbers, put_part};
use crate::cache::{Cell, Layout};
use crate::capture::{Capture, Restored};
use crate::compact::{self, Arranged, Aside, CompactError, share};
use crate::llama::{Context, Model, Pos, SeqId, Token};
use crate::policy::threads;
use crate::policy::{Kept, Selection};

/// Marks an embedding in a list of tokens.
const EMBEDDING: Token = -1;

/// First bytes of a saved sequence, with the version of the format.
const MAGIC: [u8; 8] = *b"gvote\0\0\x02";

/// A sequence: the tokens that were read, and the rows that its cells hold.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    pub(crate) id: SeqId,
    /// Position of the next token.
    pub(crate) n_past: Pos,
    /// Tokens so far, by position; -1 for embeddings.
    pub(crate) tokens: Vec<Token>,
    /// From this position on every cell holds one token, the same in all heads.
    pub(crate) exact_from: Pos,
    /// `[position]` whether the caller asked for this token to stay; positions beyond the end are not protected.
    protected: Vec<bool>,
    held: Held,
    /// Rows that left the cache; None if dropped rows are lost.
    pub(crate) archive: Option<Archive>,
}

/// True positions of the rows in composite cells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Held {
    /// Number of leading cells of the sequence that `pos` describes. Later cells hold the position of their label.
    n_cells: usize,
    /// `[head][n_cells]`; empty if every cell holds the position of its label.
    pos: Vec<u32>,
}

impl Sequence {
    /// Returns an empty sequence with this id.
    pub fn new(id: SeqId) -> Self {
        Self { id, ..Self::default() }
    }

    /// Returns an empty sequence with the same id and the same kind of archive.
    pub(crate) fn emptied(&self) -> Self {
        Self { archive: self.archive.as_ref().map(Archive::emptied), ..Self::new(self.id) }
    }

    /// Returns a copy with another id, which shares the archived rows.
    pub(crate) fn copied_to(&self, id: SeqId) -> Self {
        Self { id, ..self.clone() }
    }

    /// Whether the cells of both sequences hold the same tokens, given that the cells look the same.
    pub(crate) fn holds_as(&self, other: &Self) -> bool {
        self.tokens == other.tokens && self.held == other.held
    }

    /// The sequence's id in the context.
    pub fn id(&self) -> SeqId {
        self.id
    }

    /// Position of the next token.
    pub fn n_past(&self) -> Pos {
        self.n_past
    }

    /// Tokens so far, by position; -1 for embeddings.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// From this position on every cell holds one token, the same in all heads. The sequence may be truncated at this position or later. If
    /// the cache holds nothing of the position before it, this is the next position instead.
    pub fn exact_from(&self) -> Pos {
        self.exact_from
    }

    /// Returns the true position of the row that one KV head holds in each of the sequence's cells, in the order of `cells`. `head` counts
    /// over all layers.
    pub fn positions(&self, cells: &[Cell], head: usize) -> Vec<Pos> {
        (0..cells.len()).map(|c| self.held.at(cells, head, c) as Pos).collect()
    }

    /// Returns the true positions for all heads in one list: `[n_heads][cells]`.
    pub(crate) fn held(&self, cells: &[Cell], n_heads: usize) -> Vec<u32> {
        (0..n_heads).flat_map(|head| (0..cells.len()).map(move |place| self.held.at(cells, head, place))).collect()
    }

    /// Protects the tokens at these positions from every later vote, or removes the protection. Ignores positions without a token.
    pub(crate) fn protect(&mut self, positions: Range<Pos>, stays: bool) {
        let place = |pos: Pos| pos.clamp(0, self.n_past) as usize;
        let (start, end) = (place(positions.start), place(positions.end));
        if start < end {
            self.protected.resize(self.protected.len().max(end), false);
            self.protected[start..end].fill(stays);
        }
    }

    /// Whether each position was protected with [`Self::protect`]; later positions are not.
    pub(super) fn protected(&self) -> &[bool] {
        &self.protected
    }

    /// Whether the heads hold different tokens.
    pub(super) fn is_composite(&self) -> bool {
        !self.held.pos.is_empty()
    }

    /// Rows per head in the archive.
    pub(crate) fn n_aside(&self) -> usize {
        self.archive.as_ref().map_or(0, Archive::len)
    }

    /// Whether every row is in one of the sequence's `n_cells` cells or in the archive.
    pub(crate) fn is_whole(&self, n_cells: usize) -> bool {
        n_cells + self.n_aside() == self.n_past as usize
    }

    /// Returns the first position at which a sequence of `n_cells` cells can be truncated: 0 if every row is in a cell or in the
    /// archive, otherwise `exact_from`.
    pub(crate) fn can_be_cut_from(&self, n_cells: usize) -> Pos {
        if self.archive.is_some() && self.is_whole(n_cells) { 0 } else { self.exact_from }
    }

    /// Runs `work`, which drops rows of `cells`, with the archive that receives them. Stores the time of archiving, if there is any, in `time`.
    pub(super) fn setting_aside<T>(
        &mut self,
        cells: &[Cell],
        time: &mut Duration,
        work: impl FnOnce(Option<Aside>) -> T,
    ) -> T {
        let Self { held, archive, .. } = self;
        let pos = |head, place| held.at(cells, head, place);
        work(archive.as_mut().map(|archive| Aside { archive, pos: &pos, time }))
    }

    /// Rearranges the cells so that they hold only rows at positions before `end`, with the archived rows that `bring` selects: see
    /// [`compact::arrange`]. The sequence ends at `end` afterwards. `cells`: its present cells.
    ///
    /// # Errors
    /// [`CompactError`]; nothing has changed then.
    pub(crate) fn arrange(
        &mut self,
        ctx: &mut Context,
        cells: &[Cell],
        end: Pos,
        bring: Bring,
        devices: &mut [Devices],
    ) -> Result<(), CompactError> {
        let Some(archive) = &self.archive else { return Ok(()) };
        let was_whole = self.is_whole(cells.len());
        let pos = |head, place| self.held.at(cells, head, place);
        let held = compact::Held { cells, pos: &pos, archive, tokens: &self.tokens };
        let Arranged { cells, pos, archive } = compact::arrange(ctx, self.id, &held, end, bring, devices)?;
        let m = cells.len();
        self.truncate(end, usize::MAX);
        let says_all = |list: &[u32]| list.iter().zip(&cells).all(|(&pos, cell)| pos == cell.pos as u32);
        let are_labels = m == 0 || pos.chunks(m).all(says_all);
        self.held = if are_labels { Held::default() } else { Held { n_cells: m, pos } };
        if was_whole {
            self.exact_from = archive.end();
            self.bound(&cells);
        }
        self.archive = Some(archive);
        Ok(())
    }

    /// Appends tokens that were decoded at the next positions.
    pub(crate) fn extend(&mut self, tokens: &[Token]) {
        self.tokens.extend_from_slice(tokens);
        self.n_past += tokens.len() as Pos;
    }

    /// Removes the tokens at `pos` and later; `n_left` cells are left.
    pub(crate) fn truncate(&mut self, pos: Pos, n_left: usize) {
        self.n_past = self.n_past.min(pos.max(0));
        if self.n_past < self.exact_from {
            // the cells hold all rows that are left
            self.archive = self.archive.as_ref().map(Archive::emptied);
        }
        self.tokens.truncate(self.n_past as usize);
        self.protected.truncate(self.n_past as usize);
        self.exact_from = self.exact_from.min(self.n_past);
        self.held.truncate(n_left);
    }

    /// Records that `selection` of `cells` stays.
    pub(super) fn compacted(&mut self, cells: &[Cell], selection: Selection, recent: usize, n_threads: usize) {
        if selection.kept != Kept::All {
            self.held.keep(cells, selection, n_threads);
            self.exact_from = self.exact_from.max(self.n_past - recent as Pos);
        }
    }

    /// Raises `exact_from` after a compaction to `cells` if the position before it is gone: llama.cpp requires the next position to follow
    /// the last one.
    pub(super) fn bound(&mut self, cells: &[Cell]) {
        let before = self.exact_from - 1;
        if before >= 0 && cells.binary_search_by_key(&before, |cell| cell.pos).is_err() {
            self.exact_from += 1;
        }
    }

    /// Serializes the sequence with its captured queries and statistics. `cells`: those of the sequence.
    pub(crate) fn save(&self, capture: &mut Capture, cells: &[Cell]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&self.n_past.to_le_bytes());
        out.extend_from_slice(&self.exact_from.to_le_bytes());
        put_numbers(&mut out, cells.iter().map(|cell| cell.pos.to_le_bytes()));
        put_numbers(&mut out, self.tokens.iter().map(|token| token.to_le_bytes()));
        out.extend_from_slice(&(self.held.n_cells as u64).to_le_bytes());
        put_numbers(&mut out, self.held.pos.iter().map(|pos| pos.to_le_bytes()));
        let protected: Vec<Pos> = (0..).zip(&self.protected).filter(|&(_, &stays)| stays).map(|(pos, _)| pos).collect();
        put_numbers(&mut out, protected.iter().map(|pos| pos.to_le_bytes()));
        put_part(&mut out, &capture.save(self.id));
        out
    }
}

impl Held {
    fn at(&self, cells: &[Cell], head: usize, c: usize) -> u32 {
        if c < self.n_cells && !self.pos.is_empty() { self.pos[head * self.n_cells + c] } else { cells[c].pos as u32 }
    }

    /// Records that `selection` of `cells` stays. Reuses the selection's memory.
    fn keep(&mut self, cells: &[Cell], selection: Selection, n_threads: usize) {
        let n_cells = selection.n_cells();
        let mut pos = match selection.kept {
            Kept::Heads { index, .. } => index,
            // the heads held different tokens before
            Kept::Tokens(index) if !self.pos.is_empty() => index.repeat(self.pos.len() / self.n_cells),
            Kept::All | Kept::Tokens(_) | Kept::Ragged { .. } => return,
        };
        let n_lists = pos.len() / n_cells.max(1);
        let share = share(n_lists, n_cells, n_threads);
        let look_up = |(first, lists): (usize, &mut [u32])| {
            for (head, places) in (first..).zip(lists.chunks_mut(n_cells)) {
                places.iter_mut().for_each(|place| *place = self.at(cells, head, *place as usize));
            }
        };
        let parts = (0..).step_by(share).zip(pos.chunks_mut((share * n_cells).max(1)));
        // the cache is compacted already, so this cannot be cancelled
        threads::share_out(n_lists.div_ceil(share), parts, look_up, || ());
        *self = Self { n_cells, pos };
    }

    fn truncate(&mut self, n_left: usize) {
        if n_left >= self.n_cells {
            return;
        }
        let lists = self.pos.chunks(self.n_cells.max(1));
        self.pos = lists.flat_map(|list| &list[..n_left]).copied().collect();
        self.n_cells = n_left;
    }
}

/// A saved sequence that was read and validated. Whether it matches the cells in the cache is checked when it is restored.
pub(crate) struct Saved {
    sequence: Sequence,
    labels: Vec<Pos>,
    captured: Restored,
}

impl Saved {
    /// Reads the output of [`Sequence::save`], and returns the bytes that follow. The input is untrusted: afterwards every token, position,
    /// count and length is within its bounds.
    ///
    /// # Errors
    /// [`VoteError::Saved`] with the reason.
    pub fn read<'a>(
        data: &'a [u8],
        model: &Model,
        layout: &Layout,
        capture: &Capture,
    ) -> Result<(Self, &'a [u8]), VoteError> {
        const CUT_OFF: VoteError = VoteError::Saved("it is cut off");
        const NONSENSE: VoteError = VoteError::Saved("its numbers contradict each other");
        const OTHER_MODEL: VoteError = VoteError::Saved("it was made with another model");
        let mut rest = Reader(data);
        if rest.take() != Some(MAGIC) {
            return Err(VoteError::Saved("these bytes were not written by this version of gvote"));
        }
        let n_past = Pos::from_le_bytes(rest.take().ok_or(CUT_OFF)?);
        let exact_from = Pos::from_le_bytes(rest.take().ok_or(CUT_OFF)?);
        let labels: Vec<Pos> = rest.numbers().ok_or(CUT_OFF)?.map(Pos::from_le_bytes).collect();
        let tokens: Vec<Token> = rest.numbers().ok_or(CUT_OFF)?.map(Token::from_le_bytes).collect();
        let n_cells = usize::try_from(u64::from_le_bytes(rest.take().ok_or(CUT_OFF)?)).map_err(|_| NONSENSE)?;
        let pos: Vec<u32> = rest.numbers().ok_or(CUT_OFF)?.map(u32::from_le_bytes).collect();
        let protected: Vec<Pos> = rest.numbers().ok_or(CUT_OFF)?.map(Pos::from_le_bytes).collect();
        let captured = rest.part().ok_or(CUT_OFF)?;

        let n_heads: usize = layout.n_head_kv().sum();
        let ascending = labels.windows(2).all(|w| w[0] < w[1]) && labels.first().is_none_or(|&first| first >= 0);
        let consistent = ascending
            && tokens.len() == usize::try_from(n_past).unwrap_or(usize::MAX)
            && labels.last().is_none_or(|&last| last == n_past - 1)
            && labels.is_empty() == (n_past == 0)
            && (0..=n_past).contains(&exact_from)
            && pos.iter().all(|&pos| i64::from(pos) < i64::from(n_past))
            && protected.is_sorted_by(|a, b| a < b)
            && protected.iter().all(|pos| (0..n_past).contains(pos));
        if !consistent {
            return Err(NONSENSE);
        }
        let is_known = |&token: &Token| token == EMBEDDING || model.has_token(token);
        if !tokens.iter().all(is_known) || model.n_positions().is_some_and(|n| tokens.len() > n) {
            return Err(OTHER_MODEL);
        }
        if !pos.is_empty() && (n_cells > labels.len() || n_cells.checked_mul(n_heads) != Some(pos.len())) {
            return Err(OTHER_MODEL);
        }
        // a cell's label is the largest position that any of its heads holds
        let sound = |held: &[u32]| {
            held.is_sorted_by(|a, b| a < b) && held.iter().zip(&labels).all(|(&pos, &label)| pos <= label as u32)
        };
        if !pos.chunks(n_cells.max(1)).all(sound) {
            return Err(NONSENSE);
        }
        let captured =
            capture.read(captured).ok_or(VoteError::Saved("it was made with another model, `window` or `policy`"))?;
        let held = if pos.is_empty() { Held::default() } else { Held { n_cells, pos } };
        let mut sequence = Sequence { id: 0, n_past, tokens, exact_from, held, protected: Vec::new(), archive: None };
        protected.into_iter().for_each(|pos| sequence.protect(pos..pos + 1, true));
        Ok((Self { sequence, labels, captured }, rest.0))
    }

    /// Tokens of the saved sequence.
    pub fn n_past(&self) -> usize {
        self.sequence.tokens.len()
    }

    /// Cells of the saved sequence.
    pub fn n_cells(&self) -> usize {
        self.labels.len()
    }

    /// Whether these are the cells of the saved sequence.
    pub fn fits(&self, cells: &[Cell]) -> bool {
        cells.iter().map(|cell| cell.pos).eq(self.labels.iter().copied())
    }

    /// Whether a head, counted over all layers, can have archived rows at these positions: positions that are not in its cells, of tokens
    /// that not every head holds there.
    fn can_be_aside(&self, head: usize, positions: &[u32]) -> bool {
        let Sequence { held, exact_from, .. } = &self.sequence;
        let n = if held.pos.is_empty() { 0 } else { held.n_cells };
        let (composite, labels) = (&held.pos[head * n..][..n], &self.labels[n..]);
        let is_aside = |&pos: &u32| {
            let is_cached = composite.binary_search(&pos).is_ok() || labels.binary_search(&(pos as Pos)).is_ok();
            i64::from(pos) < i64::from(*exact_from) && !is_cached
        };
        positions.is_sorted_by(|a, b| a < b) && positions.iter().all(is_aside)
    }

    /// Reads the archived rows of this sequence that [`Archive::write`] wrote. `empty`: an archive for the same heads.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_archive(&self, empty: &Archive, from: &mut dyn Read) -> Result<Archive, ReadError> {
        let most = self.n_past().saturating_sub(self.n_cells());
        empty.read(from, most, |head, positions| self.can_be_aside(head, positions))
    }

    /// Restores the saved state as the sequence `id`.
    pub fn restore(self, id: SeqId, capture: &mut Capture) -> Sequence {
        capture.restore(id, self.captured);
        Sequence { id, ..self.sequence }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Bound;

    #[test]
    fn many_threads_look_positions_up_as_one_does() {
        const N_HEADS: u32 = 5;
        const N: u32 = 180_000;
        let cells: Vec<Cell> = (0..N).map(|i| Cell { index: i, pos: 2 * i as Pos, token: 0, shared: false }).collect();
        let after = |n_threads: usize| {
            let mut held = Held::default();
            // the second time, heads no longer hold the positions of the labels
            for (n, n_cells) in [(N, 120_000), (120_000, 80_000)] {
                // each head drops other entries
                let skipped = |head, c| if c > 5_000 * head { n - n_cells } else { 0 };
                let index = (0..N_HEADS).flat_map(|head| (0..n_cells).map(move |c| c + skipped(head, c)));
                let kept = Kept::Heads { n_cells: n_cells as usize, index: index.collect() };
                let selection = Selection { kept, bound: Bound::Ratio, ..Selection::all(n as usize) };
                held.keep(&cells, selection, n_threads);
            }
            held
        };
        assert!([2, 3, 4, 100].into_iter().all(|n_threads| after(n_threads) == after(1)));
    }
}
