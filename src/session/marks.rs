//! Marks: places in a sequence to return to.

use super::Session;
use crate::capture::Captured;
use crate::llama::Pos;

/// Number of marks that are remembered. A chat returns to the start of a turn or of its answer, and to those of the previous
/// turn when it discards one.
const MARKS: usize = 4;
/// Number of marks that are saved: those of one turn.
pub(super) const SAVED_MARKS: usize = 2;

/// A marked position, with the session's state there.
pub(super) struct Mark {
    pub pos: Pos,
    /// Next-token logits, `[n_vocab]` or empty.
    pub logits: Vec<f32>,
    /// Captured data; None under the policy `full`.
    pub captured: Option<Captured>,
}

impl Session {
    /// Marks the present position. [`Session::truncate`] to a mark restores the next-token logits and the statistics of
    /// that time, as if later tokens had never been read. The newest four marks are remembered, and the newest two of
    /// them saved.
    pub fn mark(&mut self) {
        let pos = self.n_past();
        self.marks.retain(|mark| mark.pos != pos);
        if self.marks.len() == MARKS {
            self.marks.remove(0);
        }
        let captured = self.captured();
        self.marks.push(Mark { pos, logits: self.logits.clone(), captured });
    }

    /// Restores the logits and captured data if `pos` is marked. Call this once everything from `pos` on is removed.
    pub(super) fn back_to_mark(&mut self, pos: Pos) {
        self.marks.retain(|mark| mark.pos <= pos);
        let Some(mark) = self.marks.last().filter(|mark| mark.pos == pos) else { return };
        self.logits.clone_from(&mark.logits);
        let captured = mark.captured.clone();
        self.set_back(captured);
    }
}
