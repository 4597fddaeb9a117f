//! More cells when a text needs them: a session moves into a larger context, cell by cell.

use std::io::{self, BufReader, BufWriter, Write};
use std::thread;

use super::{SEQ, Session, SessionError, SessionParams};
use crate::cache;
use crate::llama::{Context, ContextParams, LlamaError, Pos};
use crate::machine;

/// Each move takes the time of copying all cells: the next one should be far away.
const FACTOR: usize = 2;
/// Cells beside those of the text at hand, for what follows it.
const AHEAD: usize = 512;

/// Why a session's cache stays smaller than [`SessionParams::grow_to`] allows. Cells are freed then where there are too few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// Cells that the context keeps.
    pub n_ctx: usize,
    /// Bytes that a larger one would take, and those that are available, where that is the reason.
    pub memory: Option<(usize, usize)>,
}

impl Session {
    /// Cells that the cache may have, now or later.
    pub fn n_ctx_most(&self) -> usize {
        self.n_ctx.max(self.grow_to)
    }

    /// Sets what [`SessionParams::grow_to`] says.
    pub fn set_grow_to(&mut self, n: usize) {
        self.grow_to = n;
    }

    /// Why the cache does not grow any more, if so; told once.
    pub fn take_stuck(&mut self) -> Option<Stuck> {
        self.stuck.take()
    }

    /// Moves into a larger context where `needed` more cells do not fit into this one, and that is allowed. Where it fails, the
    /// session is as before, and does not try again.
    pub(super) fn grow_for(&mut self, needed: usize) {
        self.grow_until(self.cells_used().saturating_add(needed));
    }

    /// The same for `cells` of them altogether.
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

    /// Bytes of this machine's memory that a context of so many cells takes, about: buffers grow with the cells, or less. None
    /// where the cache lies elsewhere.
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
        // its pointers into the old context go first
        self.voter = voter;
        self.ctx = ctx;
        (self.n_ctx, self.limit, self.chunk) = (n_ctx, n_ctx, context.n_ubatch as usize);
        Ok(())
    }

    /// Copies the cells without a copy of all of them in between.
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
            // a closed pipe would be a signal to whoever writes into it
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
