//! Decodes behind an attention mask once a vote has kept unequal numbers of rows in the heads.

use super::{Session, SessionError, When};
use crate::compact::MaskError;
use crate::llama::Batch;
use crate::vote::VoteError;

impl From<MaskError> for SessionError {
    fn from(error: MaskError) -> Self {
        match error {
            // report cancellation as the same variant, wherever it was noticed
            MaskError::Llama(error) => Self::Llama(error),
            error => Self::Mask(error),
        }
    }
}

impl Session {
    /// Decodes a batch. `left`: tokens of the prompt that follow this batch; None for a token of an answer, which is
    /// not captured. Nothing is captured behind a mask, because no vote can follow.
    pub(super) fn decode_batch(&mut self, batch: &Batch, left: Option<usize>) -> Result<(), SessionError> {
        match (&mut self.mask, &mut self.voter) {
            (Some(mask), _) => Ok(mask.decode(&mut self.ctx, batch)?),
            (None, Some(voter)) if let Some(left) = left => {
                // a vote within an answer uses the answer's own queries
                let is_observed = left < self.policy.window && self.when == When::Prompt;
                Ok(voter.capture.decode(&mut self.ctx, batch, is_observed).map_err(VoteError::from)?)
            }
            _ => Ok(self.ctx.decode(batch)?),
        }
    }

    /// Returns an error where a mask is in force, which no vote can follow.
    pub(super) fn check_unmasked(&self) -> Result<(), SessionError> {
        if self.mask.is_some() { Err(MaskError::Masked.into()) } else { Ok(()) }
    }
}
