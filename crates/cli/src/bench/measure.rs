//! Timed runs of one policy in its own session.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use gvote::llama::{ContextParams, LlamaError, Model, Token};
use gvote::policy::Kind;
use gvote::session::CompressReport;
use gvote::{Session, SessionError, SessionParams};

use super::memory;
use super::plan::Work;
use super::together::{Cells, Together};

/// A policy and its session.
pub struct Arm {
    pub kind: Kind,
    session: Session,
    /// Parameters for additional contexts.
    params: ContextParams,
    /// The context as read, before any vote.
    read: Option<Read>,
}

struct Read {
    state: Vec<u8>,
    time: Duration,
}

/// Results of the repetitions of a test.
#[derive(Default)]
pub struct Runs {
    pub times: Vec<Duration>,
    /// None at depth 0; under `full` they give the size of the cache.
    pub votes: Vec<Vote>,
    /// Reason why there are no results: the memory is too small for this many sequences.
    pub too_large: Option<LlamaError>,
}

/// A vote and the compaction after it.
pub struct Vote {
    pub report: CompressReport,
    /// Bytes by which the resident set grew at its peak, if the kernel reports them.
    pub growth: Option<usize>,
}

impl Arm {
    pub fn new(model: &Model, kind: Kind, params: &SessionParams) -> Result<Self, SessionError> {
        Ok(Self { kind, session: Session::new(model, params)?, params: params.context.clone(), read: None })
    }

    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.session.cancel_flag()
    }

    /// Returns the bytes of K and V per cell.
    pub fn bytes_per_cell(&self) -> Option<usize> {
        self.session.bytes_per_cell()
    }

    /// Returns the time it took to read the context, if it has been read.
    pub fn context_time(&self) -> Option<Duration> {
        self.read.as_ref().map(|read| read.time)
    }

    /// Does an untimed run, as llama-bench does; of a single token where the test generates tokens.
    pub fn warm_up(&mut self, work: Work, tokens: &[Token]) -> Result<(), SessionError> {
        self.session.clear();
        let once = match work {
            Work::Read(n) => Work::Read(n),
            Work::Generate(_) => Work::Generate(1),
            // this test warms up by itself
            Work::Together { .. } => return Ok(()),
        };
        self.run(once, tokens).map(drop)
    }

    /// Brings the session to the start of a test: the context is read, voted on and compacted.
    pub fn rewind(&mut self, context: &[Token]) -> Result<Option<Vote>, SessionError> {
        self.session.clear();
        if context.is_empty() {
            return Ok(None);
        }
        if let Some(read) = &self.read {
            self.session.load(&read.state)?;
        } else {
            let time = self.session.prefill(context, |_, _| ControlFlow::Continue(()))?.time;
            self.read = Some(Read { state: self.session.save(), time });
        }
        let before = memory::start();
        let report = self.session.compress()?;
        let growth = before.zip(memory::peak()).map(|(before, peak)| peak.saturating_sub(before));
        Ok(Some(Vote { report, growth }))
    }

    /// Does the work of a test from the session's current state. Returns the time it took.
    pub fn run(&mut self, work: Work, tokens: &[Token]) -> Result<Duration, SessionError> {
        match work {
            Work::Read(n) => Ok(self.session.prefill(&tokens[..n], |_, _| ControlFlow::Continue(()))?.time),
            Work::Generate(n) => {
                let start = Instant::now();
                for &token in &tokens[..n] {
                    self.session.decode(token)?;
                }
                Ok(start.elapsed())
            }
            Work::Together { tokens: n, sequences } => {
                let count = self.session.cells_used();
                let state = if count > 0 { self.session.copy_cells()? } else { Vec::new() };
                let cells = Cells { state: &state, count, n_past: self.session.n_past() };
                let mut together = Together::new(self.session.model(), &self.params, sequences, &cells, n)?;
                Ok(together.decode(tokens, n, &self.session.cancel_flag())?)
            }
        }
    }
}
