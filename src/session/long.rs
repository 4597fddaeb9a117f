//! Prompts that are longer than the cache: whenever the next tokens have no room, the policy votes and frees cells.
//!
//! The end of the prompt, where a question stands, is known while the prompt is read. So its last tokens are read
//! ahead, and their queries vote in place of those of the newest text read so far. During an answer, the newest tokens
//! vote, as after a prompt.

use std::ops::ControlFlow;
use std::time::Instant;

use super::{PrefillReport, SEQ, Session, SessionError, Squeezes};
use crate::cache;
use crate::llama::{Batch, LlamaError, Pos, Token};
use crate::vote::{CompressReport, room};

impl Session {
    /// Reads a prompt of any length, like [`Session::prefill`]. When cells run out, frees cells before the next ubatch;
    /// positions continue to count. A prompt that fits is read as by `prefill`. Where rows are set aside, the cells
    /// finally hold the rows that the prompt's own end needs, among all rows ever read; see [`Session::reconsider`].
    ///
    /// # Errors
    /// Errors of `prefill`, and [`SessionError::CacheTooSmall`] where the cells that always stay leave no others. The
    /// session is then as before, unless cells were freed: then it holds the tokens read so far, and the next call must
    /// be another prefill, or [`Session::clear`].
    pub fn prefill_long(
        &mut self,
        tokens: &[Token],
        progress: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<PrefillReport, SessionError> {
        let start = Instant::now();
        let mut report = self.read_long(tokens, progress)?;
        if self.rows_aside() > 0 {
            let chosen = self.choose_among_all(tokens.len()).inspect_err(|_| self.logits.clear())?;
            report.squeezes.append(&chosen);
        }
        report.time = start.elapsed();
        Ok(report)
    }

    fn read_long(
        &mut self,
        tokens: &[Token],
        mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<PrefillReport, SessionError> {
        if tokens.is_empty() {
            return Err(SessionError::Empty);
        }
        self.ctx.check_positions(self.n_past(), tokens.len())?;
        let start = Instant::now();
        let expanded = self.expand_beside(tokens.len())?;
        self.grow_for(tokens.len());
        if tokens.len() <= self.room() || self.voter.is_none() {
            let report = self.prefill(tokens, progress)?;
            return Ok(PrefillReport { expanded, ..report });
        }
        self.check_unmasked()?;
        self.most_cells(1, self.protected_after(tokens))?;
        let window = self.policy.window;
        let (first, before, mut squeezes) = (self.n_past(), self.before()?, Squeezes::default());
        let mut done = 0;
        while done < tokens.len() {
            let part = &tokens[done..];
            let part = &part[..part.len().min(self.step())];
            let ahead = &tokens[done..][(tokens.len() - done).saturating_sub(window)..];
            let read = self.read_part(part, tokens.len() - done - part.len(), ahead, &mut squeezes);
            let read = read.and_then(|()| match progress(done + part.len(), tokens.len()) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(LlamaError::Cancelled.into()),
            });
            if let Err(error) = read {
                if squeezes.count == 0 {
                    self.undo(before);
                    self.sequence.truncate(first, self.cells_used());
                } else {
                    // the freed cells are lost: keep what was read
                    self.logits.clear();
                }
                return Err(error);
            }
            done += part.len();
        }
        self.keep_logits()?;
        Ok(PrefillReport { tokens: tokens.len(), time: start.elapsed(), expanded, squeezes })
    }

    /// Chooses rows for a prompt of `n` tokens that was just read, as [`Session::reconsider`] does. Then reads the end
    /// of the prompt once more, as far as all heads hold it, because it was first read with other cells.
    fn choose_among_all(&mut self, n: usize) -> Result<Squeezes, SessionError> {
        let mut squeezes = self.reconsider()?;
        let exact_from = cache::cut_from(&self.ctx, SEQ).max(self.sequence.exact_from);
        let n = n.min(self.policy.recent).min((self.n_past() - exact_from).max(0) as usize);
        if n == 0 {
            return Ok(squeezes);
        }
        let end = self.sequence.tokens.split_off(self.sequence.tokens.len() - n);
        let first = self.n_past() - n as Pos;
        self.remove_from(first);
        self.sequence.truncate(first, self.cells_used());
        for (start, part) in (0..).step_by(self.step()).zip(end.chunks(self.step())) {
            self.read_part(part, n - start - part.len(), &[], &mut squeezes)?;
        }
        self.keep_logits()?;
        Ok(squeezes)
    }

    /// Reads a part of a prompt, freeing cells first if needed. `left`: tokens of the prompt that follow this part.
    fn read_part(
        &mut self,
        part: &[Token],
        left: usize,
        ahead: &[Token],
        squeezes: &mut Squeezes,
    ) -> Result<(), SessionError> {
        if self.room() < part.len() {
            squeezes.add(&self.make_room(part.len(), ahead)?);
        }
        let mut batch = Batch::new(part.len());
        for (i, &token) in part.iter().enumerate() {
            batch.add(token, self.n_past() + i as Pos, SEQ, left == 0 && i + 1 == part.len())?;
        }
        let before = self.before_part(part.len(), left)?;
        if let Err(error) = self.decode_batch(&batch, Some(left)) {
            self.undo(before);
            return Err(error);
        }
        self.sequence.extend(part);
        Ok(())
    }

    /// Frees cells until at least `needed` are free. `ahead`: the end of the text that is being read, or empty.
    ///
    /// # Errors
    /// [`SessionError::CacheTooSmall`], [`SessionError::Full`], and errors of a vote; the cache is then as before.
    pub(super) fn make_room(&mut self, needed: usize, ahead: &[Token]) -> Result<CompressReport, SessionError> {
        self.check_unmasked()?;
        let most = self.most_cells(needed, self.protected_after(&[]))?;
        let captured = self.captured();
        self.keep_most(most, ahead).inspect_err(|_| self.set_back(captured))
    }

    fn keep_most(&mut self, most: usize, ahead: &[Token]) -> Result<CompressReport, SessionError> {
        let Some(mut vote) = self.vote() else { return Err(SessionError::Full) };
        vote.observe_newest(ahead)?;
        let cells = cache::cells(vote.ctx, SEQ);
        let (selection, mut report) = vote.choose_most(&cells, most, ahead)?;
        vote.compact(&cells, selection, &mut report)?;
        Ok(report)
    }

    /// Number of tokens read at once when the prompt does not fit.
    fn step(&self) -> usize {
        self.chunk.min(room::freed_at_once(self.limit)).max(1)
    }

    /// Number of tokens that `protect` keeps besides the sinks and recent tokens, once `tokens` are read.
    fn protected_after(&self, tokens: &[Token]) -> usize {
        self.voter.as_ref().map_or(0, |voter| voter.protected_with(self.model(), &self.sequence, tokens))
    }

    /// Number of cells that may stay when `needed` cells have to be freed and `protected` ones must stay.
    fn most_cells(&self, needed: usize, protected: usize) -> Result<usize, SessionError> {
        let always = room::least_cells(&self.policy) + protected;
        let too_small =
            || SessionError::CacheTooSmall { n_ctx: self.limit, least: room::least_limit(always), protected };
        room::most_cells(always, self.limit, needed).ok_or_else(too_small)
    }
}
