//! The choice among all that was ever read, where not all of it has room.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{CompressReport, Stage, Vote, VoteError, Voter, room};
use crate::archive::Bring;
use crate::cache;
use crate::compact::CompactError;
use crate::policy::Kind;

impl Vote<'_> {
    /// Chooses what the cache holds of a sequence among all its rows, in the cache or set aside, for the tokens that were read last.
    /// What is set aside comes back a page at a time, and each time the policy votes on the pages before and what won against them.
    /// So a row that was dropped long since is there again when it is asked for. The newest tokens are computed once more for each page,
    /// because what they look for depends on what they see.
    ///
    /// `limit`: cells that the sequence may have. `each` hears of every vote. Rows of each head that came back: 0 where all are in the
    /// cache, and where those that always stay leave no room for others.
    ///
    /// # Errors
    /// [`VoteError`]. No row is lost, but the cache may hold other ones then.
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
        // who has cancelled already gets back what there was
        self.enter(Stage::Probe)?;
        let Some(archive) = &mut self.sequence.archive else { return Ok(0) };
        *archive = archive.paged(page).map_err(CompactError::from)?;
        let mut came = 0;
        for page in archive.batches().to_vec() {
            if self.room(limit) < page.len() {
                each(&self.keep_most(most)?);
            }
            let batches = self.sequence.archive.as_ref().map_or(&[][..], |archive| archive.batches());
            // what lost against others is set aside again, in a batch of its own
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
        // nothing else comes back: no more has to be free than what follows needs
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
