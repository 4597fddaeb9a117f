//! Votes of a session.

use std::ops::ControlFlow;
use std::time::Instant;

use super::{SEQ, Session, SessionError};
use crate::compact::{self, Mask};
use crate::policy::{Kept, Kind};
use crate::vote::{CompressReport, Stage, Vote};
use crate::{cache, memory};

/// Progress callback that never cancels; a session is cancelled with its flag.
const QUIET: &dyn Fn(Stage) -> ControlFlow<()> = &|_| ControlFlow::Continue(());

impl Session {
    /// Lets the policy vote and compacts the cache. The next-token logits stay. Where the cache lies in main memory,
    /// pages that held only freed cells go back to the system (on Linux).
    ///
    /// # Errors
    /// [`SessionError`]; the cache is then as before.
    pub fn compress(&mut self) -> Result<CompressReport, SessionError> {
        self.check_unmasked()?;
        // the vote may decode the newest tokens once more and capture them
        let captured = self.captured();
        let mut report = self.compress_now().inspect_err(|_| self.set_back(captured))?;
        if report.cells_after < report.cells_before && self.mask.is_none() {
            let clock = Instant::now();
            compact::give_back(&mut self.ctx, SEQ);
            if let Some(voter) = &mut self.voter {
                voter.capture.release(&voter.layout);
            }
            memory::trim();
            report.compact_time += clock.elapsed();
        }
        self.known.has_voted(&report);
        Ok(report)
    }

    fn compress_now(&mut self) -> Result<CompressReport, SessionError> {
        let Some(mut vote) = self.vote() else {
            let bytes_per_cell = self.bytes_per_cell().unwrap_or(0);
            return Ok(CompressReport::untouched(Kind::Full, self.cells_used(), bytes_per_cell));
        };
        let clock = Instant::now();
        vote.observe_newest(&[])?;
        let observed = clock.elapsed();
        let cells = cache::cells(vote.ctx, SEQ);
        let (selection, mut report) = vote.choose(&cells)?;
        report.probe_time += observed;
        if let Kept::Ragged { .. } = selection.kept {
            drop(vote);
            let clock = Instant::now();
            self.mask = Some(Mask::new(&self.ctx, SEQ, &selection)?);
            report.compact_time = clock.elapsed();
        } else {
            vote.compact(&cells, selection, &mut report)?;
        }
        Ok(report)
    }

    /// Prepares a vote on this session; None under the policy `full`.
    pub(crate) fn vote(&mut self) -> Option<Vote<'_>> {
        let Self { ctx, voter, sequence, .. } = self;
        Some(Vote { ctx, voter: voter.as_mut()?, sequence, progress: QUIET })
    }
}
