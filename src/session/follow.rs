//! A continuation that is known already, read at the speed of a prompt.

use std::ops::ControlFlow;

use super::{SEQ, Session, SessionError};
use crate::llama::{Batch, Pos, SeqId, Token};

impl Session {
    /// What the model expects after each of `tokens`, as if they came next: `each(i, logits)` gets the next-token logits
    /// after `tokens[i]`, `[n_vocab]`. They are decoded in ubatches, which is many times faster than [`Session::decode`] one
    /// by one and gives the same up to rounding: a matrix product of many rows adds up in another order than that of one.
    /// Compare the result with another `follow` of the same tokens, not with single steps.
    ///
    /// The session is afterwards as it was. With sliding-window layers it is so only in name: what has left the window
    /// meanwhile is gone, and a saved session must be loaded before the next step.
    ///
    /// # Errors
    /// [`SessionError::PromptTooLong`] and whatever decoding fails with; the session is then as before.
    pub fn follow(&mut self, tokens: &[Token], mut each: impl FnMut(usize, &[f32])) -> Result<(), SessionError> {
        self.check_room(tokens.len())?;
        let result = self.follow_in(SEQ, tokens, self.chunk, |i, logits| {
            each(i, logits);
            ControlFlow::Continue(())
        });
        self.ctx.remove(SEQ, self.n_past, -1);
        result
    }

    /// The same in any sequence that holds as many positions, `at_once` tokens a batch, until `each` breaks; the new cells
    /// stay.
    pub(super) fn follow_in(
        &mut self,
        seq: SeqId,
        tokens: &[Token],
        at_once: usize,
        mut each: impl FnMut(usize, &[f32]) -> ControlFlow<()>,
    ) -> Result<(), SessionError> {
        let mut batch = Batch::new(at_once);
        for (start, chunk) in (0..).step_by(at_once).zip(tokens.chunks(at_once)) {
            batch.clear();
            for (i, &token) in chunk.iter().enumerate() {
                batch.add(token, self.n_past + (start + i) as Pos, seq, true)?;
            }
            self.decode_batch(&batch, false)?;
            for i in 0..chunk.len() {
                if each(start + i, self.ctx.logits_at(i as i32)?).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
