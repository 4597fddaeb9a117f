//! Brings back rows that left the cache; see [`crate::archive`].

use std::ptr::NonNull;

use super::{AttachError, Attached, Attachment, Known};
use crate::archive::{Archive, Bring};
use crate::cache;
#[cfg(doc)]
use crate::compact::CompactError;
use crate::llama::{Pos, SeqId, Visit};
use crate::sys;
#[cfg(doc)]
use crate::vote::Sequence;
use crate::vote::Voter;

impl Attachment {
    /// Brings back rows that votes removed from the cache of a sequence: all of them if cells suffice, else the newest
    /// rows of each head. Leaves `needed` cells free, besides the spare cells of a later vote. Returns the number of
    /// cells of the sequence afterwards.
    ///
    /// # Errors
    /// [`CompactError`], and errors of [`Self::sequence`]; the context is then as before.
    pub fn expand(
        &mut self,
        ctx: NonNull<sys::llama_context>,
        seq: SeqId,
        needed: usize,
    ) -> Result<usize, AttachError> {
        let attached = self.attached_in(ctx)?;
        attached.check_sequence(seq)?;
        let (n, n_past) = {
            let Attached { ctx, voter, known, .. } = attached;
            let cells = cache::cells(ctx, seq);
            let known = Known::up_to_date(known, voter, seq, &cells)?;
            let free = cache::cells_free(ctx, seq).saturating_sub(Voter::spare_cells(&voter.policy));
            let n = cells.len() + known.sequence.n_aside().min(free.saturating_sub(needed));
            if n == cells.len() {
                return Ok(n);
            }
            (n, known.sequence.n_past())
        };
        attached.arrange(seq, n_past, Bring::Newest(n))?;
        Ok(n)
    }

    /// Bytes of the rows of a sequence that are set aside, in memory or in a file.
    ///
    /// # Errors
    /// Errors of [`Self::sequence`].
    pub fn bytes_aside(&mut self, ctx: NonNull<sys::llama_context>, seq: SeqId) -> Result<usize, AttachError> {
        Ok(self.sequence(ctx, seq)?.1.archive.as_ref().map_or(0, Archive::bytes))
    }
}

impl Attached {
    /// Changes which rows the cells of a sequence hold; see [`Sequence::arrange`]. The record of the sequence must be
    /// up to date.
    pub(super) fn arrange(&mut self, seq: SeqId, end: Pos, bring: Bring) -> Result<(), AttachError> {
        let Self { ctx, voter, known, .. } = self;
        let mut visit = Visit::new(ctx)?;
        // SAFETY: valid context, with our callbacks installed.
        unsafe { sys::gvote_shim_update(visit.as_ptr()) };
        let cells = cache::cells(&visit, seq);
        let known = Known::up_to_date(known, voter, seq, &cells)?;
        let arranged = known.sequence.arrange(&mut visit, &cells, end, bring, voter.devices());
        voter.release();
        arranged?;
        known.bind(&cache::cells(&visit, seq));
        Ok(())
    }
}
