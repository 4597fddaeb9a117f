//! What gvote knows of a sequence beside what llama.cpp's cache says.

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

/// Stands for an embedding among tokens.
const EMBEDDING: Token = -1;

/// What the bytes of a saved sequence begin with, and the version of what follows.
const MAGIC: [u8; 8] = *b"gvote\0\0\x02";

/// A sequence: what was read, and what its cells hold.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    pub(crate) id: SeqId,
    /// The position of the next token.
    pub(crate) n_past: Pos,
    /// The tokens so far, by position; -1 where embeddings came in.
    pub(crate) tokens: Vec<Token>,
    /// From this position on every cell holds one token, the same in all heads.
    pub(crate) exact_from: Pos,
    /// `[position]`, as far as it reaches: whether the caller asked for it to stay.
    protected: Vec<bool>,
    held: Held,
    /// The rows that left the cache; None where they are lost.
    pub(crate) archive: Option<Archive>,
}

/// The true positions behind composite cells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Held {
    /// Cells it speaks of: the first ones of the sequence. Later ones hold what their label says.
    n_cells: usize,
    /// `[head][n_cells]`; empty where labels say it all.
    pos: Vec<u32>,
}

impl Sequence {
    /// An empty sequence with this id.
    pub fn new(id: SeqId) -> Self {
        Self { id, ..Self::default() }
    }

    /// An empty one in its place, whose rows are set aside as those of this one are.
    pub(crate) fn emptied(&self) -> Self {
        Self { archive: self.archive.as_ref().map(Archive::emptied), ..Self::new(self.id) }
    }

    /// A copy with another id, which shares what is set aside.
    pub(crate) fn copied_to(&self, id: SeqId) -> Self {
        Self { id, ..self.clone() }
    }

    /// Whether its cells hold the same tokens as those of another one whose cells look the same.
    pub(crate) fn holds_as(&self, other: &Self) -> bool {
        self.tokens == other.tokens && self.held == other.held
    }

    /// Its id in the context.
    pub fn id(&self) -> SeqId {
        self.id
    }

    /// The position of the next token.
    pub fn n_past(&self) -> Pos {
        self.n_past
    }

    /// The tokens so far, by position; -1 where embeddings came in.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// From this position on every cell holds one token, the same in all heads: up to here it may be truncated. Or the next
    /// position, where nothing is left of the one before this.
    pub fn exact_from(&self) -> Pos {
        self.exact_from
    }

    /// The true position of what a KV head of a layer holds in each of the sequence's cells, in the order of `cells`; `head`
    /// counts over all layers.
    pub fn positions(&self, cells: &[Cell], head: usize) -> Vec<Pos> {
        (0..cells.len()).map(|c| self.held.at(cells, head, c) as Pos).collect()
    }

    /// The same of all heads, in one piece: `[n_heads][cells]`.
    pub(crate) fn held(&self, cells: &[Cell], n_heads: usize) -> Vec<u32> {
        (0..n_heads).flat_map(|head| (0..cells.len()).map(move |place| self.held.at(cells, head, place))).collect()
    }

    /// Sees to it that the tokens at these positions stay at every later vote, or no longer. A position without a token is
    /// left out.
    pub(crate) fn protect(&mut self, positions: Range<Pos>, stays: bool) {
        let place = |pos: Pos| pos.clamp(0, self.n_past) as usize;
        let (start, end) = (place(positions.start), place(positions.end));
        if start < end {
            self.protected.resize(self.protected.len().max(end), false);
            self.protected[start..end].fill(stays);
        }
    }

    /// Whether [`Self::protect`] was asked for, by position, as far as that reaches.
    pub(super) fn protected(&self) -> &[bool] {
        &self.protected
    }

    /// Whether its heads hold different tokens.
    pub(super) fn is_composite(&self) -> bool {
        !self.held.pos.is_empty()
    }

    /// Rows of each head that are set aside.
    pub(crate) fn n_aside(&self) -> usize {
        self.archive.as_ref().map_or(0, Archive::len)
    }

    /// Whether every row is in one of its `n_cells` cells or set aside.
    pub(crate) fn is_whole(&self, n_cells: usize) -> bool {
        n_cells + self.n_aside() == self.n_past as usize
    }

    /// From this position on a sequence of `n_cells` cells can be cut: at any where every row is in a cell or set aside.
    pub(crate) fn can_be_cut_from(&self, n_cells: usize) -> Pos {
        if self.archive.is_some() && self.is_whole(n_cells) { 0 } else { self.exact_from }
    }

    /// Does `work`, which drops rows of `cells`, with where they go. How long setting them aside takes is added to `time`.
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

    /// Lets its cells hold rows at positions before `end`, after which it has no more, with those that `bring` says: see
    /// [`compact::arrange`]. `cells`: those that it has now.
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

    /// Forgets what lies at `pos` and later; `n_left` cells are left.
    pub(crate) fn truncate(&mut self, pos: Pos, n_left: usize) {
        self.n_past = self.n_past.min(pos.max(0));
        if self.n_past < self.exact_from {
            // the cells hold all that is left
            self.archive = self.archive.as_ref().map(Archive::emptied);
        }
        self.tokens.truncate(self.n_past as usize);
        self.protected.truncate(self.n_past as usize);
        self.exact_from = self.exact_from.min(self.n_past);
        self.held.truncate(n_left);
    }

    /// Notes that `selection` of `cells` stays.
    pub(super) fn compacted(&mut self, cells: &[Cell], selection: Selection, recent: usize, n_threads: usize) {
        if selection.kept != Kept::All {
            self.held.keep(cells, selection, n_threads);
            self.exact_from = self.exact_from.max(self.n_past - recent as Pos);
        }
    }

    /// After a compaction to `cells`: where it is cut, the position before must be there, because llama.cpp wants the next one
    /// to follow upon the last.
    pub(super) fn bound(&mut self, cells: &[Cell]) {
        let before = self.exact_from - 1;
        if before >= 0 && cells.binary_search_by_key(&before, |cell| cell.pos).is_err() {
            self.exact_from += 1;
        }
    }

    /// All of it as bytes, with what was captured. `cells`: those of the sequence.
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

    /// `selection` of `cells` stays; its memory becomes ours.
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
        // the cache is compacted, so this comes to its end
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

/// A saved sequence that was read and found to be sound; whether it is that of the cells in the cache is seen when it is
/// put in force.
pub(crate) struct Saved {
    sequence: Sequence,
    labels: Vec<Pos>,
    captured: Restored,
}

impl Saved {
    /// Reads what [`Sequence::save`] wrote, and what follows upon it. This is the border for bytes that may come from anybody: every
    /// token, position, count and length is within its bounds afterwards.
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
        // a cell is labelled with the last position of those that its heads hold
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

    /// Tokens that it speaks of.
    pub fn n_past(&self) -> usize {
        self.sequence.tokens.len()
    }

    /// Cells that it speaks of.
    pub fn n_cells(&self) -> usize {
        self.labels.len()
    }

    /// Whether these are the cells that it speaks of.
    pub fn fits(&self, cells: &[Cell]) -> bool {
        cells.iter().map(|cell| cell.pos).eq(self.labels.iter().copied())
    }

    /// Whether a head, counted over all layers, can have rows at these positions that are set aside: others than in its cells, of
    /// tokens that not every head has there.
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

    /// What [`Archive::write`] wrote of rows that are set aside of it, for the heads of `empty`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_archive(&self, empty: &Archive, from: &mut dyn Read) -> Result<Archive, ReadError> {
        let most = self.n_past().saturating_sub(self.n_cells());
        empty.read(from, most, |head, positions| self.can_be_aside(head, positions))
    }

    /// Puts it in force for the sequence `id`.
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
            // the second time, what heads hold is no longer what labels say
            for (n, n_cells) in [(N, 120_000), (120_000, 80_000)] {
                // each head does without other ones
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
