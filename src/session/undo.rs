//! Back to where a session was, if what was begun fails.

use super::{SEQ, Session};
use crate::cache;
use crate::capture::Captured;
use crate::llama::Pos;

/// What a session was, beside its cells.
pub(super) struct Before {
    n_past: Pos,
    captured: Option<Captured>,
    /// The cells of a window cache: a long batch overwrites those that its last token does not see.
    window: Option<Vec<u8>>,
}

impl Session {
    /// What there is now, for [`Self::undo`].
    pub(super) fn before(&mut self) -> Before {
        let has_window = self.voter.as_ref().is_some_and(|voter| voter.layout.info.has_window);
        let window = (has_window && self.n_past() > 0).then(|| self.ctx.save_window(SEQ));
        Before { n_past: self.n_past(), captured: self.captured(), window }
    }

    /// Takes out what was decoded since, of which the sequence does not know yet.
    pub(super) fn undo(&mut self, before: Before) {
        self.ctx.remove(SEQ, before.n_past, -1);
        if let Some(window) = before.window
            && cache::cut_from(&self.ctx, SEQ) > before.n_past
        {
            let back = self.ctx.load_window(SEQ, &window);
            debug_assert!(back.is_ok(), "these cells were there before: {back:?}");
        }
        self.set_back(before.captured);
    }

    /// What was captured so far.
    pub(super) fn captured(&self) -> Option<Captured> {
        Some(self.voter.as_ref()?.capture.captured(SEQ))
    }

    /// Nothing was captured since.
    pub(super) fn set_back(&mut self, captured: Option<Captured>) {
        if let (Some(voter), Some(captured)) = (&mut self.voter, captured) {
            voter.capture.set_back(SEQ, captured);
        }
    }
}
