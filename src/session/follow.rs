//! A continuation that is known already, read at the speed of a prompt.

use std::ops::ControlFlow;

use super::{SEQ, Session, SessionError};
use crate::llama::{Batch, Context, Token};
use crate::vote::follow;

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
