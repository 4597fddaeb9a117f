//! Chooses among all rows that were ever read when they do not all fit in the cache.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{CompressReport, Stage, Vote, VoteError, Voter, room};
use crate::archive::Bring;
use crate::cache;
use crate::compact::CompactError;
use crate::policy::Kind;

impl Vote<'_> {
    /// Chooses which of a sequence's rows the cache holds, among those in the cache and those in the archive, for the tokens that were read
    /// last. Archived rows come back one page at a time. When the next page does not fit, the policy first votes on the rows in the cache:
    /// the earlier pages and the rows that won against them. A row that was dropped long ago can thus return when a question needs it. The
    /// newest tokens are decoded again before each vote because their attention depends on the rows in the cache.
    ///
    /// `limit`: cells that the sequence may use. `each` receives the report of every vote. Returns the rows per head that came back: 0 if
    /// all rows are in the cache already, or if the protected rows leave no room for others.
    ///
    /// # Errors
    /// [`VoteError`]. No row is lost, but the cache may hold different rows than before.
    pub fn reconsider(&mut self, limit: usize, mut each: impl FnMut(&CompressReport)) -> Result<usize, VoteError> {
        let voter = &*self.voter;
        let always = room::least_cells(&voter.policy) + voter.protected_with(self.ctx.model(), self.sequence, &[]);
        let page = room::freed_at_once(limit).max(1);
        let Some(most) = room::most_cells(always, limit, page).filter(|_| voter.policy.policy != Kind::Full) else {
            return Ok(0);
        };
        if self.sequence.n_aside() == 0 {
            return Ok(0);
        }
        // a caller who has cancelled already gets the cache unchanged
        self.enter(Stage::Probe)?;
        let Some(archive) = &mut self.sequence.archive else { return Ok(0) };
        *archive = archive.paged(page).map_err(CompactError::from)?;
        let mut came = 0;
        for page in archive.batches().to_vec() {
            if self.room(limit) < page.len() {
                each(&self.keep_most(most)?);
            }
            let batches = self.sequence.archive.as_ref().map_or(&[][..], |archive| archive.batches());
            // rows that lost against others are archived again, in a batch of their own
            if let Some(number) = batches.iter().position(|batch| Arc::ptr_eq(batch, &page)) {
                let cells = cache::cells(self.ctx, self.sequence.id);
                let end = self.sequence.n_past;
                self.sequence.arrange(self.ctx, &cells, end, Bring::Batch(number), self.voter.scorer.devices())?;
                came += page.len();
                if let Some(way) = &mut self.voter.way {
                    way.came_back(&page, self.voter.layout.n_head_kv().sum());
                }
            }
        }
        // no more rows come back: only the cells that the next vote needs have to be free
        let spare = Voter::spare_cells(&self.voter.policy).min(page);
        if self.sequence.n_aside() > 0 && self.room(limit) < spare {
            each(&self.keep_most(limit - spare)?);
        }
        Ok(came)
    }

    fn room(&self, limit: usize) -> usize {
        limit.saturating_sub(cache::cells(self.ctx, self.sequence.id).len())
    }

    fn keep_most(&mut self, most: usize) -> Result<CompressReport, VoteError> {
        self.observe_again()?;
        let cells = cache::cells(self.ctx, self.sequence.id);
        let (selection, mut report) = self.choose_most(&cells, most, &[])?;
        self.compact(&cells, selection, &mut report)?;
        Ok(report)
    }
}
