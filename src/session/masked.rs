//! Unequal budgets: from such a compression on, everything is decoded behind a mask.

use super::{Session, SessionError, When};
use crate::compact::MaskError;
use crate::llama::Batch;
use crate::vote::VoteError;

impl From<MaskError> for SessionError {
    fn from(error: MaskError) -> Self {
        match error {
            // a caller who cancels should not need to know where it was noticed
            MaskError::Llama(error) => Self::Llama(error),
            error => Self::Mask(error),
        }
    }
}

impl Session {
    /// Decodes a batch, with the capture on where `captures`. Behind a mask nothing is captured: it is the last vote's.
    pub(super) fn decode_batch(&mut self, batch: &Batch, left: Option<usize>) -> Result<(), SessionError> {
        match (&mut self.mask, &mut self.voter) {
            (Some(mask), _) => Ok(mask.decode(&mut self.ctx, batch)?),
            (None, Some(voter)) if let Some(left) = left => {
                // a vote within an answer asks the answer's own queries
                let is_observed = left < self.policy.window && self.when == When::Prompt;
                Ok(voter.capture.decode(&mut self.ctx, batch, is_observed).map_err(VoteError::from)?)
            }
            _ => Ok(self.ctx.decode(batch)?),
        }
    }

    /// Whether a vote may follow.
    pub(super) fn check_unmasked(&self) -> Result<(), SessionError> {
        if self.mask.is_some() { Err(MaskError::Masked.into()) } else { Ok(()) }
    }
}
