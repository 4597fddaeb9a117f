//! Rows that left the cache come back: see [`crate::archive`].

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{SEQ, Session, SessionError};
use crate::archive::Archive;
use crate::cache;
use crate::llama::Pos;
use crate::vote::{Sequence, VoteError};

/// What becomes of rows that a vote, or a lack of cells, takes out of the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recall {
    /// They are lost.
    #[default]
    Off,
    /// They are set aside in this machine's memory, and come back before the next prompt is read.
    Auto,
}

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
        if self.sequence.archive.is_some() { Recall::Auto } else { Recall::Off }
    }

    /// Bytes of memory that rows take which left the cache and can come back.
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
    /// Where everything comes back that was ever read, every cell holds one token again, with the keys and values that it had.
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
            self.arrange(self.n_past(), after)?;
        }
        Ok(ExpandReport { cells_before: before, cells_after: after, time: clock.elapsed() })
    }

    /// Cuts at a position inside the compressed part, of which every row is in the cache or set aside: what came before is back as
    /// far as there are cells for it.
    pub(super) fn cut_inside(&mut self, pos: Pos) -> Result<(), SessionError> {
        self.grow_until(pos as usize);
        let most = self.limit.max(self.cells_used());
        self.arrange(pos, most.min(pos as usize))?;
        // of a window cache
        self.remove_from(pos);
        Ok(())
    }

    fn arrange(&mut self, end: Pos, m: usize) -> Result<(), SessionError> {
        let Self { ctx, voter: Some(voter), sequence, .. } = self else { return Ok(()) };
        let cells = cache::cells(ctx, SEQ);
        let arranged = sequence.arrange(ctx, &cells, end, m, voter.devices());
        voter.release();
        Ok(arranged.map_err(VoteError::from)?)
    }

    /// An empty sequence in place of this one, whose rows are set aside as those of this one are.
    pub(super) fn empty_sequence(&self) -> Sequence {
        let mut sequence = Sequence::new(SEQ);
        sequence.archive = self.sequence.archive.as_ref().map(Archive::emptied);
        sequence
    }

    /// Whether every row is in the cache or set aside.
    pub(super) fn is_whole(&self) -> bool {
        self.mask.is_none() && self.sequence.archive.is_some() && self.sequence.is_whole(self.cells_used())
    }
}
