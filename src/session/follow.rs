//! Reads a known continuation at the speed of a prompt.

use std::ops::ControlFlow;

use super::{SEQ, Session, SessionError};
use crate::llama::{Batch, Context, Token};
use crate::vote::follow;

impl Session {
    /// Calls `each(i, logits)` with the next-token logits after `tokens[i]`, `[n_vocab]`, as if `tokens` came next.
    /// Decodes in ubatches, which is many times faster than one [`Session::decode`] a token. The logits agree with
    /// those of single steps up to rounding, because a matrix product of many rows adds up in another order than that
    /// of one row. Compare the result with another `follow` of the same tokens, not with single steps.
    ///
    /// The session is unchanged afterwards. With sliding-window layers only its bookkeeping is: cells that left the
    /// window meanwhile are lost, and a saved session must be loaded before the next step.
    ///
    /// # Errors
    /// [`SessionError::PromptTooLong`], and any error of decoding; the session is then as before.
    pub fn follow(&mut self, tokens: &[Token], mut each: impl FnMut(usize, &[f32])) -> Result<(), SessionError> {
        self.check_room(tokens.len())?;
        let Self { ctx, mask, sequence, chunk, .. } = self;
        let n_past = sequence.n_past();
        let decode = |ctx: &mut Context, batch: &Batch| -> Result<(), SessionError> {
            match mask {
                Some(mask) => Ok(mask.decode(ctx, batch)?),
                None => Ok(ctx.decode(batch)?),
            }
        };
        let result = follow(ctx, SEQ, n_past, tokens, *chunk, decode, |start, logits| {
            (start..).zip(logits).for_each(|(i, logits)| each(i, logits));
            ControlFlow::Continue(())
        });
        self.ctx.remove(SEQ, n_past, -1);
        result
    }
}
