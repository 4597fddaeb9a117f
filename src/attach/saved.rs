//! Serialises the record of a sequence, and its rows that are set aside.

#![forbid(unsafe_code)]

use std::ptr::NonNull;

use super::{AttachError, Attached, Attachment, Known};
use crate::archive::{Archive, ReadError};
use crate::cache::{self, Layout};
use crate::llama::{LlamaError, SeqId};
use crate::sys;
use crate::vote::{Saved, VoteError};

impl Attachment {
    /// Serialises the record of a sequence and its rows that are set aside.
    ///
    /// # Errors
    /// Errors of [`Self::sequence`].
    pub fn save(&mut self, ctx: NonNull<sys::llama_context>, seq: SeqId) -> Result<Vec<u8>, AttachError> {
        let (cells, sequence) = self.sequence(ctx, seq)?;
        let sequence = sequence.clone();
        let mut bytes = sequence.save(&mut self.attached_in(ctx)?.voter.capture, &cells);
        if let Some(archive) = &sequence.archive {
            bytes.try_reserve_exact(archive.written()).map_err(|_| LlamaError::Memory)?;
            archive.write(&mut bytes).expect("a vector takes all");
        }
        Ok(bytes)
    }

    /// Number of bytes that [`Self::save`] returns.
    ///
    /// # Errors
    /// Errors of [`Self::sequence`].
    pub fn saved_bytes(&mut self, ctx: NonNull<sys::llama_context>, seq: SeqId) -> Result<usize, AttachError> {
        let (cells, sequence) = self.sequence(ctx, seq)?;
        let sequence = sequence.clone();
        let aside = sequence.archive.as_ref().map_or(0, Archive::written);
        Ok(sequence.save(&mut self.attached_in(ctx)?.voter.capture, &cells).len() + aside)
    }

    /// Restores the output of [`Self::save`] for a sequence whose cells llama.cpp has already loaded.
    ///
    /// # Errors
    /// [`VoteError::Saved`] where the bytes are cut off, do not belong to these cells, or contain rows although the
    /// settings set none aside. The record is then as before.
    pub fn load(&mut self, ctx: NonNull<sys::llama_context>, seq: SeqId, data: &[u8]) -> Result<(), AttachError> {
        let attached = self.attached_in(ctx)?;
        attached.check_sequence(seq)?;
        let Attached { ctx, voter, known, .. } = attached;
        let layout = Layout::of(ctx, seq)?;
        let (saved, mut rest) = Saved::read(data, ctx.model(), &layout, &voter.capture)?;
        let cells = cache::cells(ctx, seq);
        if !saved.fits(&cells) {
            return Err(VoteError::Saved("the cells of the sequence are others: load llama.cpp's state first").into());
        }
        let mut archive = voter.sequence(seq).archive;
        if !rest.is_empty() {
            let Some(empty) = &archive else {
                return Err(VoteError::Saved("a part of it is set aside, and this handle sets nothing aside").into());
            };
            archive = Some(saved.read_archive(empty, &mut rest).map_err(VoteError::from)?);
            if !rest.is_empty() {
                return Err(VoteError::from(ReadError::Nonsense).into());
            }
        }
        let mut sequence = saved.restore(seq, &mut voter.capture);
        sequence.archive = archive;
        known.insert(seq, Known::of(sequence, &cells));
        Ok(())
    }
}
