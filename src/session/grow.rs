//! Grows the cache when a text needs more cells: moves the session into a larger context.

use std::io::{self, BufReader, BufWriter, Write};
use std::thread;

use super::{SEQ, Session, SessionError, SessionParams};
use crate::cache;
use crate::llama::{Context, ContextParams, LlamaError, Pos};
use crate::machine;

/// Least growth factor. Each move copies all cells, so that moves should be rare.
const FACTOR: usize = 2;
/// Cells added beyond the text at hand, for what follows.
const AHEAD: usize = 512;

/// Reason why a session's cache stays smaller than [`SessionParams::grow_to`] allows. From then on, cells are freed
/// when they run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// Cells of the present context.
    pub n_ctx: usize,
    /// Bytes that a larger context would take, and bytes available; None where memory is not the reason.
    pub memory: Option<(usize, usize)>,
}

impl Session {
    /// Largest number of cells that the cache may have, now or later.
    pub fn n_ctx_most(&self) -> usize {
        self.n_ctx.max(self.grow_to)
    }

    /// Changes [`SessionParams::grow_to`].
    pub fn set_grow_to(&mut self, n: usize) {
        self.grow_to = n;
    }

    /// Returns, once, the reason why the cache no longer grows; None while it can grow.
    pub fn take_stuck(&mut self) -> Option<Stuck> {
        self.stuck.take()
    }

    /// Moves into a larger context if `needed` more cells do not fit and growth is allowed. If the move fails, the
    /// session is as before and makes no further attempt.
    pub(super) fn grow_for(&mut self, needed: usize) {
        self.grow_until(self.cells_used().saturating_add(needed));
    }

    /// Grows like [`Self::grow_for`], to at least `cells` cells in total.
    pub(super) fn grow_until(&mut self, cells: usize) {
        let is_limited = self.limit < self.n_ctx || self.mask.is_some();
        if cells <= self.n_ctx || self.n_ctx >= self.grow_to || is_limited {
            return;
        }
        let n_ctx = cells.saturating_add(AHEAD).max(FACTOR * self.n_ctx).min(self.grow_to);
        let memory = self.memory_of(n_ctx).zip(machine::available());
        let memory = memory.filter(|(needed, available)| needed > available);
        if memory.is_some() || self.grow(n_ctx).is_err() {
            self.grow_to = self.n_ctx;
            self.stuck = Some(Stuck { n_ctx: self.n_ctx, memory });
        }
    }

    /// Estimates the bytes of main memory that a context of `n_ctx` cells takes, scaling the present buffers, which
    /// grow at most in proportion to the cells. None where the cache lies on a device.
    fn memory_of(&self, n_ctx: usize) -> Option<usize> {
        let now = self.ctx.buffers();
        let share = n_ctx as f64 / self.n_ctx as f64;
        (now.device.cache == 0).then_some(((now.host.cache + now.host.compute) as f64 * share) as usize)
    }

    fn grow(&mut self, n_ctx: usize) -> Result<(), SessionError> {
        let context = ContextParams { n_ctx: n_ctx as u32, ..self.context.clone() };
        let params = SessionParams { context, policy: self.policy.clone(), ..SessionParams::default() };
        let context = params.with_spare_cells(n_ctx);
        let mut ctx = Context::new(self.model(), &context)?;
        ctx.is_cancelled_with(&self.ctx);
        let voter = self.voter.as_mut().map(|voter| voter.moved_to(&ctx, SEQ)).transpose()?;
        if self.n_past() > 0 {
            self.copy_cells_to(&mut ctx)?;
        }
        // drop the old voter first: it points into the old context
        self.voter = voter;
        self.ctx = ctx;
        (self.n_ctx, self.limit, self.chunk) = (n_ctx, n_ctx, context.n_ubatch as usize);
        Ok(())
    }

    /// Copies the cells through a pipe, without a full copy in between.
    fn copy_cells_to(&mut self, to: &mut Context) -> Result<(), SessionError> {
        let (from, into) = io::pipe().map_err(|_| LlamaError::Memory)?;
        let old = &mut self.ctx;
        let copied = thread::scope(|scope| {
            let write = || {
                let mut into = BufWriter::new(into);
                old.write_sequence(SEQ, &mut into)?;
                into.flush()
            };
            let writer = thread::Builder::new().spawn_scoped(scope, write).map_err(|_| LlamaError::Memory)?;
            let mut from = BufReader::new(from);
            let read = to.read_sequence(SEQ, &mut from);
            // drain the pipe: closing it early would raise a signal in the writer
            let _ = io::copy(&mut from, &mut io::sink());
            match writer.join() {
                Ok(Ok(())) => read,
                _ => Err(LlamaError::Memory),
            }
        });
        copied?;
        let positions = |ctx: &Context| cache::cells(ctx, SEQ).iter().map(|cell| cell.pos).collect::<Vec<Pos>>();
        if self.voter.is_some() && positions(&self.ctx) != positions(to) {
            return Err(SessionError::Saved("its cells came over in another order"));
        }
        Ok(())
    }
}
