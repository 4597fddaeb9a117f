//! What a guest knows of a sequence, and whether the cells still say so.

use std::collections::BTreeMap;

use super::GuestError;
use crate::cache::{Cell, Layout};
use crate::capture::Seen;
use crate::llama::{Pos, SeqId, Token};
use crate::vote::{Sequence, Voter};

/// Tells cells apart: another token at the same place is another cell.
type Mark = (u32, Pos, Token);

/// What is known of a sequence.
pub(super) struct Known {
    pub sequence: Sequence,
    /// Its cells, as they should be.
    marks: Vec<Mark>,
    /// Why it is not known any more, until it begins anew.
    lost: Option<&'static str>,
}

fn mark(cell: &Cell) -> Mark {
    (cell.index, cell.pos, cell.token)
}

impl Known {
    fn new(seq: SeqId) -> Self {
        Self::of(Sequence::new(seq), &[])
    }

    /// What is known of a sequence that has these cells.
    pub fn of(sequence: Sequence, cells: &[Cell]) -> Self {
        Self { sequence, marks: cells.iter().map(mark).collect(), lost: None }
    }

    /// Takes the cells for the right ones.
    pub fn bind(&mut self, cells: &[Cell]) {
        self.marks = cells.iter().map(mark).collect();
    }

    /// The sequence `seq`, after all that was heard, if its cells agree.
    ///
    /// # Errors
    /// [`GuestError::NotSeen`], [`GuestError::Changed`].
    pub fn up_to_date<'a>(
        known: &'a mut BTreeMap<SeqId, Self>,
        voter: &mut Voter,
        seq: SeqId,
        cells: &[Cell],
    ) -> Result<&'a mut Self, GuestError> {
        for (seq, seen) in voter.capture.take_seen() {
            let entry = known.entry(seq).or_insert_with(|| Self::new(seq));
            for token in seen {
                entry.hear(&token, &voter.layout);
            }
        }
        if cells.is_empty() {
            known.remove(&seq);
            voter.capture.forget(seq);
            return Err(GuestError::NotSeen { seq, reason: "it is empty" });
        }
        let not_seen = GuestError::NotSeen { seq, reason: "it was decoded before gvote_attach, copied, or loaded" };
        let entry = known.get_mut(&seq).ok_or(not_seen)?;
        entry.compare(voter, cells)?;
        Ok(entry)
    }

    /// Notes a token that was decoded.
    fn hear(&mut self, seen: &Seen, layout: &Layout) {
        if seen.pos == 0 {
            *self = Self::new(self.sequence.id());
        }
        if self.lost.is_some() {
            return;
        }
        if seen.pos < self.sequence.n_past() {
            // the app went back without telling us
            if seen.pos < self.sequence.exact_from() {
                self.lost = Some("tokens were decoded inside its compressed part");
            }
            self.truncate(seen.pos);
        }
        if seen.pos > self.sequence.n_past() {
            self.lost = Some(match self.sequence.n_past() {
                0 => "its beginning was not decoded while gvote was attached",
                _ => "positions were left out",
            });
        }
        if self.lost.is_none() {
            let index = (seen.cell % i64::from(layout.info.n_cells)) as u32;
            self.marks.push((index, seen.pos, seen.token));
            self.sequence.extend(&[seen.token]);
        }
    }

    fn truncate(&mut self, pos: Pos) {
        self.marks.retain(|mark| mark.1 < pos);
        self.sequence.truncate(pos, self.marks.len());
    }

    /// Compares with the cells that are there, and follows where the app removed the last ones.
    fn compare(&mut self, voter: &mut Voter, cells: &[Cell]) -> Result<(), GuestError> {
        let seq = self.sequence.id();
        if let Some(reason) = self.lost {
            return Err(GuestError::NotSeen { seq, reason });
        }
        let changed = |reason| Err(GuestError::Changed { seq, reason });
        let common = self.marks.iter().zip(cells).take_while(|(known, cell)| **known == mark(cell)).count();
        if common < cells.len() {
            return if common == self.marks.len() {
                Err(GuestError::NotSeen { seq, reason: "its last tokens were decoded while gvote was not attached" })
            } else {
                changed("its cells are not those that were decoded (removed, moved, or loaded)")
            };
        }
        if common < self.marks.len() {
            let pos = cells[common - 1].pos + 1;
            if pos < self.sequence.exact_from() {
                return changed("its end was removed inside the compressed part");
            }
            self.truncate(pos);
            voter.capture.forget_from(seq, pos);
        }
        Ok(())
    }
}
