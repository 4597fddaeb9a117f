//! Chooses the cells anew during a long answer, for its newest tokens.

#![forbid(unsafe_code)]

use std::time::Instant;

use super::{SEQ, Session, SessionError};
use crate::cache;
use crate::compact;
use crate::policy::Kind;
use crate::vote::CompressReport;

/// Synthetic queries of such a choice. Few are enough: the choice is soon repeated, and the answer's own tokens supply
/// real queries.
const SAMPLES: usize = 8;

impl Session {
    /// Chooses anew what the cache holds in `cells` cells, among all rows ever read, for the newest tokens. A vote becomes
    /// outdated because a long answer needs other parts of its source later. The choice runs without a trial and with
    /// few synthetic queries. Does nothing where no rows are set aside.
    ///
    /// # Errors
    /// Errors of [`Session::compress`]. No row is lost, but the cache may then hold more rows than before.
    pub fn renew(&mut self, cells: usize) -> Result<CompressReport, SessionError> {
        self.check_unmasked()?;
        let (before, bytes) = (self.cells_used(), self.bytes_per_cell().unwrap_or(0));
        if self.rows_aside() == 0 || self.policy.policy == Kind::Full {
            return Ok(CompressReport::untouched(self.policy.policy, before, bytes));
        }
        let (clock, n_before) = (Instant::now(), self.rows_aside());
        self.expand_beside(0)?;
        let squeezes = self.reconsider()?;
        let back = if squeezes.count == 0 { n_before - self.rows_aside() } else { n_before };
        let recall_time = clock.elapsed();
        let captured = self.captured();
        let mut report = self.choose_newest(cells).inspect_err(|_| self.set_back(captured))?;
        report.note_recall(before, back, recall_time);
        let clock = Instant::now();
        compact::give_back(&mut self.ctx, SEQ);
        report.compact_time += clock.elapsed();
        Ok(report)
    }

    fn choose_newest(&mut self, cells: usize) -> Result<CompressReport, SessionError> {
        let Some(mut vote) = self.vote() else { return Err(SessionError::Full) };
        vote.observe_newest(&[])?;
        let present = cache::cells(vote.ctx, SEQ);
        let samples = vote.voter.policy.samples;
        vote.voter.policy.samples = samples.min(SAMPLES);
        let chosen = vote.choose_most(&present, cells.min(present.len()), &[]);
        vote.voter.policy.samples = samples;
        let (selection, mut report) = chosen?;
        vote.compact(&present, selection, &mut report)?;
        Ok(report)
    }
}
