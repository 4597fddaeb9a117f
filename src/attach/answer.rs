//! Votes within an answer of an app, as a session votes on its own; see [`crate::vote::When`].
//!
//! Before each of its steps, the app says where the answer began. Only counters are read until a vote is due.

#![forbid(unsafe_code)]

use std::ops::ControlFlow;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use super::{AttachError, Attached, Attachment};
use crate::cache;
use crate::llama::{Context, Pos, SeqId};
use crate::policy::Kind;
use crate::sys::llama_context;
use crate::vote::{CompressReport, Meter, Stage, When, Work};

/// An answer in work.
pub(super) struct Answer {
    start: Pos,
    /// End of the sequence at the last call; `clock` is the time of that call.
    end: Pos,
    clock: Clock,
    /// Duration of the quickest step so far. A single measurement may include work that the app did between two steps.
    step: Option<Duration>,
    meter: Meter,
}

/// A point in time.
#[derive(Clone, Copy)]
struct Clock {
    at: Instant,
    /// Time spent in graphs until then, as counted by llama.cpp.
    in_graphs: Duration,
}

impl Clock {
    fn now(ctx: &Context) -> Self {
        Self { at: Instant::now(), in_graphs: ctx.decode_time() }
    }

    /// Time spent decoding since `earlier`; where llama.cpp does not count that, the wall-clock time.
    fn since(&self, earlier: &Self) -> Duration {
        let counted = self.in_graphs.checked_sub(earlier.in_graphs).filter(|time| !time.is_zero());
        counted.unwrap_or(self.at - earlier.at)
    }
}

impl Answer {
    /// Prevents a further vote on this answer.
    pub fn was_voted_on(&mut self) {
        self.meter.stop();
    }

    /// Records the present end of the sequence, with `n` cells.
    fn go_on(&mut self, end: Pos, n: usize, clock: Clock) {
        if end > self.end {
            let step = clock.since(&self.clock);
            if let Some(quickest) = self.step {
                self.meter.step(n, step.min(quickest));
            }
            self.step = Some(self.step.map_or(step, |quickest| step.min(quickest)));
        }
        (self.end, self.clock) = (end, clock);
    }
}

impl Attachment {
    /// Votes on an answer that began at position `start`, if a vote is due. The app calls this before each step of the
    /// answer. An answer gets at most one vote, even if the vote fails.
    ///
    /// # Errors
    /// [`AttachError`]; the context is then as before.
    pub fn vote_if_due(
        &mut self,
        ctx: NonNull<llama_context>,
        seq: SeqId,
        start: Pos,
        progress: &dyn Fn(Stage) -> ControlFlow<()>,
    ) -> Result<Option<CompressReport>, AttachError> {
        let when = if self.settings.policy.policy == Kind::Full { When::Prompt } else { self.settings.when };
        let attached = self.attached_in(ctx)?;
        attached.check_sequence(seq)?;
        let last = attached.ctx.pos_max(seq).ok_or(AttachError::NotSeen { seq, reason: "it is empty" })?;
        let (start, end) = (start.max(0), last + 1);
        if start > end {
            return Err(AttachError::NotThere { seq, end: start, n_past: end });
        }
        let (n, clock) = (cache::n_cells(&attached.ctx, seq), Clock::now(&attached.ctx));
        let is_same = |answer: &Answer| answer.start == start && start < end && answer.end <= end;
        let answer = match attached.answers.remove(&seq).filter(is_same) {
            Some(answer) => answer,
            None => Answer { start, end, clock, step: None, meter: attached.meter(when, seq) },
        };
        let answer = attached.answers.entry(seq).or_insert(answer);
        answer.go_on(end, n, clock);
        attached.costs.has_answered(&answer.meter);
        if !answer.meter.is_due((end - start) as usize, n, false) || attached.voter.policy.leaves_alone(n) {
            return Ok(None);
        }
        answer.meter.stop();
        attached.voter.answer = Some(start);
        let report = attached.vote(seq, false, false, progress);
        attached.voter.answer = None;
        let report = report?;
        if let Some(answer) = attached.answers.get_mut(&seq) {
            answer.meter.has_voted(report.cells_before, report.cells_after);
        }
        Ok(Some(report))
    }
}

impl Attached {
    /// Creates a meter for an answer that begins in a sequence. Each step reads the cells of the other sequences, as it
    /// reads the weights, so their bytes count as weights.
    fn meter(&mut self, when: When, seq: SeqId) -> Meter {
        let (tokens, time) = self.voter.capture.take_read();
        self.costs.has_read(tokens, time);
        let others = (0..self.ctx.n_seq_max() as SeqId).filter(|&other| other != seq);
        let cell = self.voter.layout.bytes_per_cell();
        let beside = others.map(|other| cache::n_cells(&self.ctx, other) * cell).sum::<usize>();
        Meter::new(
            when,
            self.costs,
            Work::of(&self.voter.policy, cache::n_cells(&self.ctx, seq)),
            cell,
            self.ctx.model().size() + beside as u64,
        )
    }
}
