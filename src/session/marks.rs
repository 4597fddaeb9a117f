//! Places in a sequence to come back to.

use super::Session;
use crate::capture::Captured;
use crate::llama::Pos;

/// Places that are remembered: a chat comes back to where a turn began, or to where its answer did, and to those of the turn
/// before when it gives one up.
const MARKS: usize = 4;
/// Those of one turn are saved.
pub(super) const SAVED_MARKS: usize = 2;

/// A place, and what else a session was there.
pub(super) struct Mark {
    pub pos: Pos,
    /// `[n_vocab]`, or empty.
    pub logits: Vec<f32>,
    /// Absent under the policy `full`.
    pub captured: Option<Captured>,
}

impl Session {
    /// Remembers this place: [`Session::truncate`] comes back to it with the next-token logits and the statistics that there
    /// are now, as if what follows had never been. The four places that were marked last are remembered, and the last two of them
    /// saved.
    pub fn mark(&mut self) {
        let pos = self.n_past();
        self.marks.retain(|mark| mark.pos != pos);
        if self.marks.len() == MARKS {
            self.marks.remove(0);
        }
        let captured = self.captured();
        self.marks.push(Mark { pos, logits: self.logits.clone(), captured });
    }

    /// After everything from `pos` on is gone: brings back what else was there, if that was marked.
    pub(super) fn back_to_mark(&mut self, pos: Pos) {
        self.marks.retain(|mark| mark.pos <= pos);
        let Some(mark) = self.marks.last().filter(|mark| mark.pos == pos) else { return };
        self.logits.clone_from(&mark.logits);
        let captured = mark.captured.clone();
        self.set_back(captured);
    }
}
