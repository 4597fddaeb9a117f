//! Back to where a session was, if what was begun fails.

use super::{SEQ, Session};
use crate::cache;
use crate::capture::Captured;
use crate::llama::{LlamaError, Pos};

/// What a session was, beside its cells.
pub(super) struct Before {
    n_past: Pos,
    captured: Option<Captured>,
    /// What does not come back by cutting: of a window cache a long batch overwrites the cells that its last token does not
    /// see, and the state of recurrent layers goes on.
    uncut: Vec<u8>,
}

impl Session {
    /// What there is now, for [`Self::undo`].
    ///
    /// # Errors
    /// [`LlamaError::Memory`].
    pub(super) fn before(&mut self) -> Result<Before, LlamaError> {
        let captured = self.captured();
        self.before_with(captured)
    }

    /// The same before `n` tokens of a prompt of which `left` come after them; what was captured is copied only where they
    /// add to it.
    ///
    /// # Errors
    /// [`LlamaError::Memory`].
    pub(super) fn before_part(&mut self, n: usize, left: usize) -> Result<Before, LlamaError> {
        let adds = self.voter.as_ref().is_some_and(|voter| voter.capture.reads(n, left < self.policy.window));
        let captured = if adds { self.captured() } else { None };
        self.before_with(captured)
    }

    fn before_with(&mut self, captured: Option<Captured>) -> Result<Before, LlamaError> {
        let uncut = if self.n_past() > 0 { self.ctx.copy_uncut(SEQ)? } else { Vec::new() };
        Ok(Before { n_past: self.n_past(), captured, uncut })
    }

    /// Takes out what was decoded since, of which the sequence does not know yet. Where memory runs out for that, nothing is
    /// left.
    pub(super) fn undo(&mut self, before: Before) {
        let is_cut = before.n_past == 0 || cache::cut_from(&self.ctx, SEQ) <= before.n_past;
        let is_back = is_cut || self.ctx.load_uncut(SEQ, &before.uncut).is_ok();
        if is_back && self.ctx.remove(SEQ, before.n_past, -1) {
            self.set_back(before.captured);
        } else {
            self.clear();
        }
    }

    /// What was captured so far.
    pub(super) fn captured(&mut self) -> Option<Captured> {
        Some(self.voter.as_mut()?.capture.captured(SEQ))
    }

    /// Nothing was captured since.
    pub(super) fn set_back(&mut self, captured: Option<Captured>) {
        if let (Some(voter), Some(captured)) = (&mut self.voter, captured) {
            voter.capture.set_back(SEQ, captured);
        }
    }
}
