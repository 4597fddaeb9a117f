//! Brings back rows that left the cache; see [`crate::archive`].

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{SEQ, Session, SessionError, Squeezes};
use crate::archive::{Archive, Bring, Recall, RecallType};
use crate::cache;
use crate::llama::Pos;
use crate::vote::VoteError;

/// Result of bringing rows back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExpandReport {
    /// Cells of the sequence before and after.
    pub cells_before: usize,
    pub cells_after: usize,
    #[serde(serialize_with = "super::report::seconds")]
    pub time: Duration,
}

impl Session {
    /// Returns what happens to rows that leave the cache.
    pub fn recall(&self) -> Recall {
        self.sequence.archive.as_ref().map_or(Recall::Off, Archive::recall)
    }

    /// Storage type of rows that are set aside; [`RecallType::Cache`] where rows are lost.
    pub fn recall_type(&self) -> RecallType {
        self.sequence.archive.as_ref().map_or(RecallType::Cache, Archive::form)
    }

    /// Bytes of the rows that are set aside, in memory or in a file, as [`Self::recall`] says.
    pub fn bytes_aside(&self) -> usize {
        self.sequence.archive.as_ref().map_or(0, Archive::bytes)
    }

    /// Number of rows of each head that are set aside.
    pub fn rows_aside(&self) -> usize {
        self.sequence.n_aside()
    }

    /// Brings rows back into the cache: all of them if cells suffice, else the newest rows of each head. Grows the
    /// cache where that is allowed. The next-token logits stay.
    ///
    /// Once every row ever read is back, each cell holds one token again, with its original keys and values; rows that
    /// were set aside as q8_0 are rounded.
    ///
    /// # Errors
    /// [`SessionError::Vote`] where memory runs out; the session is then as before.
    pub fn expand(&mut self) -> Result<ExpandReport, SessionError> {
        self.check_unmasked()?;
        self.expand_beside(0)
    }

    /// Brings rows back like [`Self::expand`], leaving `needed` cells free. Does nothing behind a mask, where all rows
    /// are in the cache.
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

    /// Chooses what the cache holds among all rows ever read, for the newest tokens. Rows that are set aside come back
    /// page by page, and for each page the policy votes among that page and the winners so far. Does nothing where all
    /// rows are in the cache.
    ///
    /// # Errors
    /// Errors of [`Session::compress`]. No row is lost, but the cache may then hold other rows than before.
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

    /// Truncates at a position inside the compressed part, where every row is in the cache or set aside. Brings back
    /// the rows before `pos`, as far as cells are free.
    pub(super) fn cut_inside(&mut self, pos: Pos) -> Result<(), SessionError> {
        self.grow_until(pos as usize);
        let most = self.limit.max(self.cells_used());
        self.arrange(pos, Bring::Newest(most.min(pos as usize)))?;
        // removes them from a sliding-window cache
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
