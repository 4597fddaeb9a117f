//! Unequal budgets: from such a compression on, everything is decoded behind a mask.

use super::{SEQ, Session, SessionError, Voter};
use crate::compact::{Mask, MaskError};
use crate::llama::Batch;
use crate::policy::Selection;

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
    pub(super) fn decode_batch(&mut self, batch: &Batch, captures: bool) -> Result<(), SessionError> {
        match &mut self.voter {
            Some(Voter { mask: Some(mask), .. }) => Ok(mask.decode(&mut self.ctx, batch)?),
            Some(voter) if captures => Ok(voter.capture.decode(&mut self.ctx, SEQ, batch)?),
            _ => Ok(self.ctx.decode(batch)?),
        }
    }

    /// Whether a vote may follow.
    pub(super) fn check_unmasked(&self) -> Result<(), SessionError> {
        match &self.voter {
            Some(Voter { mask: Some(_), .. }) => Err(MaskError::Masked.into()),
            _ => Ok(()),
        }
    }

    /// Lays a mask over what the heads dropped.
    pub(super) fn mask(&mut self, selection: &Selection) -> Result<(), SessionError> {
        if let Some(voter) = &mut self.voter {
            voter.mask = Some(Mask::new(&self.ctx, SEQ, selection)?);
        }
        Ok(())
    }
}
