//! Records of the sequences in an attached context, and their comparison with the cells.
//!
//! Not every token is observed, so the cells decide. They can be interpreted because of an invariant of compaction: in
//! every head, a cell holds a position no larger than the cell's own, and larger than the own position of the cell
//! before. So where cells have all positions from 0 on, each holds exactly its own position, whatever happened before.
//! The same is true of cells that follow the recorded ones without a gap. Cells that equal those of another sequence,
//! one by one, are a copy and hold the same rows.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::AttachError;
use crate::cache::Cell;
use crate::llama::{Pos, SeqId, Token};
use crate::vote::{Sequence, Voter};

/// Identifies a cell and its content: another token in the same cell is another mark.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mark {
    index: u32,
    pos: Pos,
    token: Token,
}

/// Record of a sequence.
pub(super) struct Known {
    pub sequence: Sequence,
    /// Expected cells, by position: first those that `sequence` describes, then cells that were observed since.
    marks: Vec<Mark>,
    /// Number of marks that `sequence` describes. Smaller than the number of its cells once tokens were observed at
    /// positions that it already has.
    n_bound: usize,
    /// Whether the sequence had cells before gvote was attached, and has not begun anew since. Its contents are
    /// unknown.
    is_unheard: bool,
}

fn mark(cell: &Cell) -> Mark {
    Mark { index: cell.index, pos: cell.pos, token: cell.token }
}

/// Whether the positions are complete from 0 on.
fn is_whole(cells: &[Cell]) -> bool {
    cells.iter().zip(0..).all(|(cell, pos)| cell.pos == pos)
}

/// Whether the cells look as if loaded from a state: for most models llama.cpp saves no tokens, and loads them as 0.
fn is_loaded(cells: &[Cell]) -> bool {
    cells.len() > 1 && cells[..2].iter().all(|cell| cell.token == 0)
}

impl Known {
    /// Returns the record of a sequence that was decoded before gvote was attached. Nothing is known of it until it
    /// begins anew.
    pub fn unheard(sequence: Sequence) -> Self {
        Self { is_unheard: true, ..Self::of(sequence, &[]) }
    }

    /// Returns a record of a sequence with these cells.
    pub fn of(sequence: Sequence, cells: &[Cell]) -> Self {
        let mut known = Self { sequence, marks: Vec::new(), n_bound: 0, is_unheard: false };
        known.bind(cells);
        known
    }

    /// Takes the present cells as the expected ones.
    pub fn bind(&mut self, cells: &[Cell]) {
        self.marks = cells.iter().map(mark).collect();
        self.n_bound = cells.len();
    }

    /// Returns the record of the sequence `seq`, updated to its cells, if these can be interpreted.
    ///
    /// # Errors
    /// [`AttachError::NotSeen`], [`AttachError::Changed`].
    pub fn up_to_date<'a>(
        known: &'a mut BTreeMap<SeqId, Self>,
        voter: &mut Voter,
        seq: SeqId,
        cells: &[Cell],
    ) -> Result<&'a mut Self, AttachError> {
        if cells.is_empty() {
            known.remove(&seq);
            voter.capture.forget(seq);
            return Err(AttachError::NotSeen { seq, reason: "it is empty" });
        }
        let begins = |known: &Self| known.n_bound > 0 && known.marks[0] == mark(&cells[0]);
        let is_known = known.get(&seq).is_some_and(|known| known.is_unheard || begins(known));
        if !is_known
            && !is_whole(cells)
            && let Some((from, copy)) = Self::copied(known, seq, cells)
        {
            if !voter.capture.has_statistics(seq) {
                let captured = voter.capture.captured(from);
                voter.capture.set_back(seq, captured);
                voter.capture.forget_from(seq, copy.sequence.n_past());
            }
            // discards tokens observed under this id: older ones are of another sequence, newer ones are in the cells
            voter.capture.take_seen(seq);
            known.insert(seq, copy);
        }
        let entry = known.entry(seq).or_insert_with(|| Self::of(voter.sequence(seq), &[]));
        let n_cells = i64::from(voter.layout.info.n_cells);
        let heard = voter.capture.take_seen(seq).into_iter();
        entry.hear(heard.map(|seen| Mark { index: (seen.cell % n_cells) as u32, pos: seen.pos, token: seen.token }));
        entry.follow(voter, cells)?;
        Ok(entry)
    }

    /// Finds the sequence that these cells were copied from (`llama_memory_seq_cp()`). Returns its id and a record for
    /// the copy, up to the last cell that both share. None where the shared part does not reach beyond the compressed
    /// part.
    fn copied(known: &BTreeMap<SeqId, Self>, seq: SeqId, cells: &[Cell]) -> Option<(SeqId, Self)> {
        if is_loaded(cells) {
            // without tokens, unrelated cells may look the same
            return None;
        }
        let same = |known: &Self| {
            let bound = &known.marks[..known.n_bound];
            bound.iter().zip(cells).take_while(|(known, cell)| **known == mark(cell)).count()
        };
        let copy = |(&from, known): (&SeqId, &Self)| {
            let same = same(known);
            let (end, exact_from) = (cells[..same].last()?.pos + 1, known.sequence.exact_from());
            if from == seq || exact_from == 0 || exact_from > end {
                return None;
            }
            let mut sequence = known.sequence.copied_to(seq);
            sequence.truncate(end, same);
            Some((from, Self::of(sequence, &cells[..same])))
        };
        let copies: Vec<_> = known.iter().filter_map(copy).collect();
        let n_bound = |(_, copy): &&(SeqId, Self)| copy.n_bound;
        let &(from, ref longest) = copies.iter().max_by_key(n_bound)?;
        // two candidates may have equal marks and hold different rows
        let begins_as = |(_, other): &(SeqId, Self)| {
            let mut begin = longest.sequence.copied_to(seq);
            begin.truncate(other.sequence.n_past(), other.n_bound);
            begin.holds_as(&other.sequence)
        };
        let is_sure = copies.iter().all(begins_as);
        is_sure.then(|| copies.into_iter().find(|&(id, _)| id == from)).flatten()
    }

    /// Adds observed tokens, by position. They replace all marks from the first of them on.
    fn hear(&mut self, heard: impl Iterator<Item = Mark>) {
        let mut heard = heard.peekable();
        let Some(first) = heard.peek().map(|mark| mark.pos) else { return };
        if first == 0 {
            *self = Self::of(self.sequence.emptied(), &[]);
        }
        self.marks.truncate(self.marks.partition_point(|mark| mark.pos < first));
        self.n_bound = self.n_bound.min(self.marks.len());
        self.marks.extend(heard);
    }

    /// Whether a cell equals its mark.
    fn expects(&self, cell: &Cell) -> bool {
        let at = self.marks.binary_search_by_key(&cell.pos, |mark| mark.pos);
        at.is_ok_and(|at| self.marks[at] == mark(cell))
    }

    /// Whether a cell has moved to another position.
    fn has_moved(&self, cell: &Cell) -> bool {
        let is_same = |mark: &Mark| mark.index == cell.index && mark.token == cell.token && mark.pos != cell.pos;
        self.marks.iter().any(is_same)
    }

    /// Compares the record with the present cells, and takes over added or removed tokens.
    fn follow(&mut self, voter: &mut Voter, cells: &[Cell]) -> Result<(), AttachError> {
        let seq = self.sequence.id();
        if self.is_unheard {
            return Err(AttachError::NotSeen { seq, reason: "it was decoded before gvote_attach" });
        }
        let bound = &self.marks[..self.n_bound];
        let same = bound.iter().zip(cells).take_while(|(known, cell)| **known == mark(cell)).count();
        let (end, new) = (cells[..same].last().map_or(0, |cell| cell.pos + 1), &cells[same..]);
        if new.is_empty() && end == self.sequence.n_past() {
            self.marks.truncate(same);
            return Ok(());
        }
        let refused = |reason| {
            // known sequences have a beginning that was observed, or loaded by gvote
            let is_known = self.marks.first().is_some_and(|mark| mark.pos == 0);
            Err(if is_known { AttachError::Changed { seq, reason } } else { AttachError::NotSeen { seq, reason } })
        };
        let is_exact = end >= self.sequence.exact_from();
        if !is_exact && !is_whole(cells) {
            return refused(match new {
                [] => "its end was removed inside the compressed part",
                _ => "its cells are not those that were decoded (removed, moved, or loaded)",
            });
        }
        if new.iter().zip(end..).any(|(cell, pos)| cell.pos != pos) {
            return refused("positions are missing, or its cells were moved");
        }
        // of tokens that are decoded anew, one may by chance land in the same cell at another position
        let n_looked_at = if is_exact { 2 } else { 1 };
        let mut others = new.iter().filter(|cell| !self.expects(cell)).take(n_looked_at).peekable();
        if others.peek().is_some() && others.all(|cell| self.has_moved(cell)) {
            return refused("its cells were moved");
        }
        if (is_loaded(cells) && !cells[..2].iter().all(|cell| self.expects(cell)))
            || new.iter().any(|cell| cell.token < 0 && !self.expects(cell))
        {
            return refused("its cells were loaded without gvote_state_set");
        }
        self.forget_others(voter, cells);
        self.sequence.truncate(end, same);
        self.sequence.extend(&new.iter().map(|cell| cell.token).collect::<Vec<_>>());
        self.bind(cells);
        Ok(())
    }

    /// Discards data captured from tokens that are no longer there.
    fn forget_others(&self, voter: &mut Voter, cells: &[Cell]) {
        let seq = self.sequence.id();
        let is_gone = |known: &&Mark| {
            let at = cells.binary_search_by_key(&known.pos, |cell| cell.pos);
            at.map_or(true, |at| **known != mark(&cells[at]))
        };
        if self.marks.iter().find(is_gone).is_some_and(|first| first.pos <= voter.policy.sinks as Pos) {
            // drops the statistics, since nothing that they describe is left
            voter.capture.forget(seq);
        }
        let sure: Vec<Pos> = cells.iter().filter(|cell| self.expects(cell)).map(|cell| cell.pos).collect();
        voter.capture.forget_at(seq, |pos| sure.binary_search(&pos).is_err());
        voter.capture.follow(seq);
    }
}
