//! The contexts that are looked after, and what their sequences need before llama.cpp does something to them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::batch::Parts;
use super::ffi::gvote::*;
use super::ffi::llama::{llama_context, llama_memory_t};
use super::ffi::next;
use super::handle::{Failure, Handle, Loaded};
use super::report;
use super::sequence::{Next, Sequence};
use super::state::Remembered;

/// A context that is looked after.
pub struct Home {
    pub handle: Handle,
    loaded: &'static Loaded,
    pub sequences: BTreeMap<i32, Sequence>,
    pub remembered: Remembered,
}

struct Entry {
    ctx: usize,
    memory: usize,
    home: Arc<Mutex<Home>>,
}

static HOMES: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

/// A lock that a failure elsewhere does not spoil: what it guards is bookkeeping, and checked by the library.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The context, if it is looked after.
pub fn of_context(ctx: *const llama_context) -> Option<Arc<Mutex<Home>>> {
    find(|entry| entry.ctx == ctx.addr())
}

/// The context that has this memory, if it is looked after.
pub fn of_memory(memory: llama_memory_t) -> Option<Arc<Mutex<Home>>> {
    find(|entry| entry.memory == memory.addr())
}

fn find(is_it: impl Fn(&Entry) -> bool) -> Option<Arc<Mutex<Home>>> {
    lock(&HOMES).iter().find(|entry| is_it(entry)).map(|entry| entry.home.clone())
}

/// Looks after a context from now on.
///
/// # Safety
/// A living context, which nobody else uses yet.
pub unsafe fn add(loaded: &'static Loaded, ctx: *mut llama_context) -> Result<(), Failure> {
    // SAFETY: passed on.
    let handle = unsafe { Handle::attach(loaded, ctx)? };
    // SAFETY: a living context.
    let memory = unsafe { next().llama_get_memory(ctx) };
    let home = Home { handle, loaded, sequences: BTreeMap::new(), remembered: Remembered::default() };
    lock(&HOMES).push(Entry { ctx: ctx.addr(), memory: memory.addr(), home: Arc::new(Mutex::new(home)) });
    Ok(())
}

/// Looks after a context no longer; it still lives.
pub fn remove(ctx: *const llama_context) {
    let mut homes = lock(&HOMES);
    let entry = homes.iter().position(|entry| entry.ctx == ctx.addr()).map(|at| homes.swap_remove(at));
    drop(homes);
    drop(entry);
}

impl Home {
    pub fn sequence(&mut self, seq: i32) -> &mut Sequence {
        self.sequences.entry(seq).or_default()
    }

    /// The sequences of which votes have taken something, of all or of one.
    pub fn voted(&self, seq: i32) -> Vec<i32> {
        let voted = self.sequences.iter().filter(|(id, sequence)| (seq < 0 || seq == **id) && sequence.is_voted);
        voted.map(|(&id, _)| id).collect()
    }

    fn complain(&self, seq: i32, what: &str, failure: &Failure) {
        report::line(&format!("sequence {seq}: {what}: {}", failure.text));
    }

    /// Before a batch is decoded: brings back what a new text may ask for, and votes on answers where it is time to.
    pub fn before_decode(&mut self, parts: &Parts) {
        for (&seq, part) in &parts.of {
            let sequence = *self.sequence(seq);
            match sequence.meets(part) {
                Next::Begins if sequence.is_voted => {
                    self.expand(seq, parts.n_rows);
                }
                Next::Answers(start) => self.vote_if_due(seq, start),
                _ => {}
            }
        }
    }

    pub fn after_decode(&mut self, parts: &Parts) {
        for (&seq, part) in &parts.of {
            self.sequence(seq).was_decoded(part);
        }
    }

    fn vote_if_due(&mut self, seq: i32, start: i32) {
        let clock = Instant::now();
        let mut has_voted = false;
        let mut vote = gvote_report { size: size_of::<gvote_report>(), ..Default::default() };
        // SAFETY: the handle's own context, which is between two calls of llama_decode(); room for both answers.
        let called = self
            .handle
            .call(|lib, g, ctx| unsafe { lib.gvote_vote_if_due(g, ctx, seq, start, &mut has_voted, &mut vote) });
        if let Err(failure) = called {
            return self.complain(seq, "no vote", &failure);
        }
        if has_voted {
            let tokens = self.handle.end(seq);
            self.sequence(seq).is_voted |= vote.cells_after < vote.cells_before;
            report::vote(
                seq,
                start,
                tokens,
                clock.elapsed().as_secs_f64(),
                &vote,
                self.loaded.settings.stats.as_deref(),
            );
        }
    }

    /// Brings back what votes took out of a sequence, as far as `needed` cells stay free. Whether it is whole then.
    pub fn expand(&mut self, seq: i32, needed: usize) -> bool {
        let mut n_cells = 0;
        let needed = u32::try_from(needed).unwrap_or(u32::MAX);
        // SAFETY: the handle's own context, which nobody else uses meanwhile; room for the answer.
        let called = self.handle.call(|lib, g, ctx| unsafe { lib.gvote_expand(g, ctx, seq, needed, &mut n_cells) });
        if let Err(failure) = called {
            self.complain(seq, "what a vote set aside stays aside", &failure);
            return false;
        }
        let is_whole = i64::from(n_cells) == i64::from(self.handle.end(seq));
        if is_whole {
            self.sequence(seq).is_voted = false;
        }
        is_whole
    }

    /// Sees to it that cells hold one token each, as far as that can be had: for what llama.cpp does to positions in the middle.
    pub fn make_whole(&mut self, seq: i32, what: &str) {
        for seq in self.voted(seq) {
            if !self.expand(seq, 0) {
                report::line(&format!("sequence {seq}: {what} works on compressed cells"));
            }
        }
    }

    /// The position from which on a sequence can be cut; 0 where that is known to nobody.
    pub fn exact_from(&self, seq: i32) -> i32 {
        let mut pos = 0;
        // SAFETY: as above.
        let called = self.handle.call(|lib, g, ctx| unsafe { lib.gvote_seq_exact_from(g, ctx, seq, &mut pos) });
        if called.is_ok() { pos } else { 0 }
    }

    /// Cuts off the end of a compressed sequence; `None`: llama.cpp can do so itself.
    pub fn cut(&mut self, seq: i32, pos: i32) -> Option<bool> {
        if !self.sequence(seq).is_voted {
            return None;
        }
        // SAFETY: as above.
        match self.handle.call(|lib, g, ctx| unsafe { lib.gvote_seq_truncate(g, ctx, seq, pos) }) {
            Ok(()) => Some(true),
            Err(failure) if failure.status == GVOTE_ERROR_COMPRESSED => {
                self.complain(seq, "not cut", &failure);
                Some(false)
            }
            Err(failure) => {
                self.complain(seq, "cut without gvote", &failure);
                None
            }
        }
    }
}
