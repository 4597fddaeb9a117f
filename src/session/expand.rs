//! Rows that left the cache come back: see [`crate::archive`].

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{SEQ, Session, SessionError, Squeezes};
use crate::archive::{Archive, Bring, Recall, RecallType};
use crate::cache;
use crate::llama::Pos;
use crate::vote::VoteError;

/// What came back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExpandReport {
    /// Cells of the sequence before and after.
    pub cells_before: usize,
    pub cells_after: usize,
    #[serde(serialize_with = "super::report::seconds")]
    pub time: Duration,
}

impl Session {
    /// What becomes of rows that leave the cache.
    pub fn recall(&self) -> Recall {
        self.sequence.archive.as_ref().map_or(Recall::Off, Archive::recall)
    }

    /// How they are set aside; [`RecallType::Cache`] where they are lost.
    pub fn recall_type(&self) -> RecallType {
        self.sequence.archive.as_ref().map_or(RecallType::Cache, Archive::form)
    }

    /// Bytes that rows take which left the cache and can come back, in memory or in a file as [`Self::recall`] says.
    pub fn bytes_aside(&self) -> usize {
        self.sequence.archive.as_ref().map_or(0, Archive::bytes)
    }

    /// Tokens of which some heads have no row in the cache, but one that can come back.
    pub fn rows_aside(&self) -> usize {
        self.sequence.n_aside()
    }

    /// Brings back what left the cache, as far as there are cells for it: all of it where there are, else the newest rows of each
    /// head. The cache grows for it where it may. Next-token logits stay.
    ///
    /// Where everything comes back that was ever read, every cell holds one token again, with the keys and values that it had: those
    /// that were set aside as q8_0 are rounded.
    ///
    /// # Errors
    /// [`SessionError::Vote`] where memory runs out; the session is then as before.
    pub fn expand(&mut self) -> Result<ExpandReport, SessionError> {
        self.check_unmasked()?;
        self.expand_beside(0)
    }

    /// The same as far as `needed` cells stay free. Behind a mask all rows are in the cache.
    pub(super) fn expand_beside(&mut self, needed: usize) -> Result<ExpandReport, SessionError> {
        let aside = self.rows_aside();
        if aside == 0 || self.mask.is_some() {
            return Ok(ExpandReport::default());
        }
        let clock = Instant::now();
        let before = self.cells_used();
        self.grow_until(before.saturating_add(aside).saturating_add(needed));
        let after = (before + aside).min(self.limit.saturating_sub(needed)).max(before);
        if after > before {
            self.arrange(self.n_past(), Bring::Newest(after))?;
        }
        Ok(ExpandReport { cells_before: before, cells_after: after, time: clock.elapsed() })
    }

    /// Where not everything has room that was read: chooses what the cache holds among all of it, for the tokens that were read last.
    /// What is set aside comes back a page at a time, and each time the policy votes on the pages before and what won against them.
    /// Does nothing where all rows are in the cache.
    ///
    /// # Errors
    /// Those of [`Session::compress`]. No row is lost, but the cache may hold other ones then.
    pub fn reconsider(&mut self) -> Result<Squeezes, SessionError> {
        let mut squeezes = Squeezes::default();
        if self.rows_aside() == 0 || self.mask.is_some() {
            return Ok(squeezes);
        }
        let (captured, limit) = (self.captured(), self.limit);
        let Some(mut vote) = self.vote() else { return Ok(squeezes) };
        let done = vote.reconsider(limit, |report| squeezes.add(report));
        drop(vote);
        done.inspect_err(|_| self.set_back(captured))?;
        Ok(squeezes)
    }

    /// Cuts at a position inside the compressed part, of which every row is in the cache or set aside: what came before is back as
    /// far as there are cells for it.
    pub(super) fn cut_inside(&mut self, pos: Pos) -> Result<(), SessionError> {
        self.grow_until(pos as usize);
        let most = self.limit.max(self.cells_used());
        self.arrange(pos, Bring::Newest(most.min(pos as usize)))?;
        // of a window cache
        self.remove_from(pos);
        Ok(())
    }

    fn arrange(&mut self, end: Pos, bring: Bring) -> Result<(), SessionError> {
        let Self { ctx, voter: Some(voter), sequence, .. } = self else { return Ok(()) };
        let cells = cache::cells(ctx, SEQ);
        let arranged = sequence.arrange(ctx, &cells, end, bring, voter.devices());
        voter.release();
        Ok(arranged.map_err(VoteError::from)?)
    }
}
