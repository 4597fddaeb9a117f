//! Restores a session when an operation fails midway.

use super::{SEQ, Session};
use crate::cache;
use crate::capture::Captured;
use crate::llama::{LlamaError, Pos};

/// State of a session outside its cells.
pub(super) struct Before {
    n_past: Pos,
    captured: Option<Captured>,
    /// State that cutting cannot restore: in a sliding-window cache, a long batch overwrites the cells that its last
    /// token does not see, and recurrent layers have moved on.
    uncut: Vec<u8>,
}

impl Session {
    /// Records the present state for [`Self::undo`].
    ///
    /// # Errors
    /// [`LlamaError::Memory`].
    pub(super) fn before(&mut self) -> Result<Before, LlamaError> {
        let captured = self.captured();
        self.before_with(captured)
    }

    /// Records the present state like [`Self::before`], ahead of `n` tokens of a prompt that `left` more tokens follow.
    /// Copies the captured data only if these `n` tokens add to it.
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

    /// Removes the tokens decoded since `before`, which the sequence has not counted yet. Where memory runs out, the
    /// session is empty afterwards.
    pub(super) fn undo(&mut self, before: Before) {
        let is_cut = before.n_past == 0 || cache::cut_from(&self.ctx, SEQ) <= before.n_past;
        let is_back = is_cut || self.ctx.load_uncut(SEQ, &before.uncut).is_ok();
        if is_back && self.ctx.remove(SEQ, before.n_past, -1) {
            self.set_back(before.captured);
        } else {
            self.clear();
        }
    }

    /// Returns a copy of the data captured so far; None under the policy `full`.
    pub(super) fn captured(&mut self) -> Option<Captured> {
        Some(self.voter.as_mut()?.capture.captured(SEQ))
    }

    /// Restores captured data, dropping whatever was captured since.
    pub(super) fn set_back(&mut self, captured: Option<Captured>) {
        if let (Some(voter), Some(captured)) = (&mut self.voter, captured) {
            voter.capture.set_back(SEQ, captured);
        }
    }
}
