//! The vote on one sequence of a context: from what was captured to fewer cells.
//!
//! [`Voter`] is what a context needs for it, [`Sequence`] what is known of a sequence, and a vote in work brings both
//! together with the context. A [`crate::Session`] has a context of its own; behind the C interface it is one of an app.

#![forbid(unsafe_code)]

mod choose;
mod notes;
mod protect;
mod recall;
pub(crate) mod replay;
mod report;
pub(crate) use crate::policy::room;
mod sequence;
mod trial;
mod way;
mod when;

use std::ops::ControlFlow;
use std::sync::Arc;

pub(crate) use self::notes::Notes;
pub use self::report::CompressReport;
pub(crate) use self::sequence::Saved;
pub use self::sequence::Sequence;
pub(crate) use self::way::Way;
pub use self::when::When;
pub(crate) use self::when::{Known, Meter, Work};
use crate::archive::{Archive, NoRoom, ReadError, Recall, RecallType};
use crate::backend::{ComputeError, Devices};
use crate::cache::{CacheError, Layout};
use crate::capture::{Capture, CaptureError};
use crate::compact::{self, CompactError};
use crate::llama::{Batch, Context, LlamaError, Pos, SeqId, Token};
use crate::policy::threads;
use crate::policy::{self, PolicyError, Shape};
use crate::score::Scorer;

/// Why there was no vote. The cache is as it was.
#[derive(Debug, thiserror::Error)]
pub enum VoteError {
    #[error(transparent)]
    Llama(LlamaError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Capture(CaptureError),
    #[error(transparent)]
    Compute(#[from] ComputeError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Compact(#[from] CompactError),
    #[error(
        "the layers of this model differ in their number of heads, which is not supported yet; `policy` full runs it as it is"
    )]
    UnevenHeads,
    #[error(
        "a replay needs the whole context in the cache, and a part of it was dropped before: vote without `replay`"
    )]
    ReplayCompressed,
    #[error(
        "`recall_type` {name} stores blocks of 32 numbers, and heads of this model have {d}: take the cache's own type"
    )]
    RecallType { name: &'static str, d: usize },
    #[error("the saved session does not fit: {0}")]
    Saved(&'static str),
}

impl From<CaptureError> for VoteError {
    fn from(error: CaptureError) -> Self {
        match error {
            // a caller who cancels should not need to know where it was noticed
            CaptureError::Llama(error) => error.into(),
            CaptureError::Compute(error) => Self::Compute(error),
            error => Self::Capture(error),
        }
    }
}

impl From<ReadError> for VoteError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::CutOff => Self::Saved("it is cut off"),
            ReadError::Nonsense => Self::Saved("its numbers contradict each other"),
            ReadError::NoRoom(NoRoom::Memory { .. }) => LlamaError::Memory.into(),
            ReadError::NoRoom(error) => CompactError::from(error).into(),
        }
    }
}

impl From<LlamaError> for VoteError {
    fn from(error: LlamaError) -> Self {
        Self::Llama(error)
    }
}

/// The steps of a vote, in order; not every vote has all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Parts of the context are read again.
    Replay,
    /// Synthetic queries are made.
    Probe,
    /// Keys are scored.
    Score,
    /// The full cache drafts a continuation.
    Draft,
    /// A number of cells is tried.
    Try,
    /// Rows are moved and cells freed.
    Compact,
}

/// What the votes of one context share.
pub struct Voter {
    pub(crate) layout: Layout,
    pub(crate) capture: Capture,
    scorer: Scorer,
    pub(crate) policy: policy::Params,
    pub(crate) account_error: bool,
    /// What becomes of rows that leave the cache, and how they are set aside.
    pub(crate) recall: Recall,
    recall_type: RecallType,
    /// See [`crate::SessionParams::more_questions`].
    pub(crate) more_questions: bool,
    /// Where the answer begins that is voted on: no question follows within it, and it stays, with the newest tokens before it.
    pub(crate) answer: Option<Pos>,
    /// Where the system message ends, which the setting `protect` keeps.
    pub(crate) system_end: Pos,
    /// Where the next vote is to be explained.
    pub(crate) notes: Option<Notes>,
    /// Where what comes before that vote is to be told, too.
    pub(crate) way: Option<Way>,
    /// What a vote on a device has to do is not worth the start of a thread.
    _threads: Option<Arc<threads::Pool>>,
}

impl Voter {
    /// # Errors
    /// [`VoteError::Cache`], [`VoteError::UnevenHeads`] for caches that cannot be compacted; [`VoteError::Compute`] where a device
    /// cannot be worked on.
    pub fn new(ctx: &Context, policy: &policy::Params, account_error: bool) -> Result<Self, VoteError> {
        let layout = Layout::of(ctx, 0)?;
        uniform_shape(&layout, 0)?;
        let (window, skip) = (policy.window, policy.sinks);
        let mut scorer = Scorer::new(ctx.n_threads_batch(), window + policy.samples + 1);
        scorer.start(&layout)?;
        let mut capture = Capture::new(ctx, &layout, window, skip);
        capture.start(&layout)?;
        let _threads = if layout.is_host() { None } else { threads::Pool::keep() };
        Ok(Self {
            _threads,
            capture,
            scorer,
            policy: policy.clone(),
            account_error,
            recall: Recall::Off,
            more_questions: false,
            answer: None,
            recall_type: RecallType::Cache,
            system_end: 0,
            notes: None,
            way: None,
            layout,
        })
    }

    /// The same for another context that its sequence moves to.
    ///
    /// # Errors
    /// As [`Self::new`], and [`VoteError::Capture`].
    pub(crate) fn moved_to(&mut self, ctx: &Context, seq: SeqId) -> Result<Self, VoteError> {
        let mut moved = Self::new(ctx, &self.policy, self.account_error)?;
        let captured = self.capture.save(seq);
        if let Some(error) = self.capture.failure() {
            return Err(error.into());
        }
        let captured = moved.capture.read(&captured).ok_or(VoteError::Capture(CaptureError::Empty))?;
        moved.capture.restore(seq, captured);
        (moved.system_end, moved.recall) = (self.system_end, self.recall.clone());
        moved.recall_type = self.recall_type;
        moved.more_questions = self.more_questions;
        (moved.notes, moved.way) = (self.notes.take(), self.way.take());
        Ok(moved)
    }

    /// Says how rows are set aside of sequences that begin.
    ///
    /// # Errors
    /// [`VoteError::RecallType`] for heads that are no whole blocks of the type.
    pub(crate) fn set_recall_type(&mut self, form: RecallType) -> Result<(), VoteError> {
        if let Some(d) = compact::unfit(&self.layout, form) {
            return Err(VoteError::RecallType { name: form.name(), d });
        }
        self.recall_type = form;
        Ok(())
    }

    /// An empty sequence with this id.
    pub fn sequence(&self, id: SeqId) -> Sequence {
        let mut sequence = Sequence::new(id);
        sequence.archive = Archive::new(&self.layout, &self.recall, self.recall_type);
        sequence
    }

    /// Back ends that move rows between votes.
    pub(crate) fn devices(&mut self) -> &mut [Devices] {
        self.scorer.devices()
    }

    /// Gives back what they took.
    pub(crate) fn release(&mut self) {
        self.scorer.release();
    }

    /// Cells that a vote needs beside those of the sequence.
    pub fn spare_cells(policy: &policy::Params) -> usize {
        let replay = if policy.replay { replay::CELLS } else { 0 };
        policy.samples.max(trial::most_tokens(policy)).max(policy.window).max(replay)
    }
}

/// A vote in work.
pub(crate) struct Vote<'a> {
    pub ctx: &'a mut Context,
    pub voter: &'a mut Voter,
    pub sequence: &'a mut Sequence,
    /// Told what comes next; breaking cancels.
    pub progress: &'a dyn Fn(Stage) -> ControlFlow<()>,
}

impl Drop for Vote<'_> {
    fn drop(&mut self) {
        self.voter.scorer.release();
    }
}

impl Vote<'_> {
    fn enter(&self, stage: Stage) -> Result<(), VoteError> {
        enter(self.ctx, self.progress, stage)
    }
}

/// Says what comes next, and hears whether it shall.
fn enter(ctx: &Context, progress: &dyn Fn(Stage) -> ControlFlow<()>, stage: Stage) -> Result<(), VoteError> {
    match progress(stage) {
        ControlFlow::Continue(()) if !ctx.is_cancelled() => Ok(()),
        _ => Err(LlamaError::Cancelled.into()),
    }
}

/// Tokens computed at once.
fn chunk(ctx: &Context) -> usize {
    ctx.n_ubatch().min(ctx.n_batch())
}

/// Decodes `tokens` at the positions from `first` on, `at_once` in a batch, and gives `each(i, logits)` the next-token logits
/// after `tokens[i]` and those that follow in its batch, `[n][n_vocab]`, until it breaks.
pub(crate) fn follow<E: From<LlamaError>>(
    ctx: &mut Context,
    seq: SeqId,
    first: Pos,
    tokens: &[Token],
    at_once: usize,
    mut decode: impl FnMut(&mut Context, &Batch) -> Result<(), E>,
    mut each: impl FnMut(usize, &[&[f32]]) -> ControlFlow<()>,
) -> Result<(), E> {
    let mut batch = Batch::new(at_once);
    for (start, chunk) in (0..).step_by(at_once).zip(tokens.chunks(at_once)) {
        batch.clear();
        for (i, &token) in chunk.iter().enumerate() {
            batch.add(token, first + (start + i) as Pos, seq, true)?;
        }
        decode(ctx, &batch)?;
        if each(start, &ctx.logits_of(chunk.len())?).is_break() {
            return Ok(());
        }
    }
    Ok(())
}

/// The shape of a request of `n` cells; every layer must have the same heads.
pub(crate) fn uniform_shape(layout: &Layout, n: usize) -> Result<Shape, VoteError> {
    let first = &layout.layers[0];
    if layout.layers.iter().any(|l| (l.n_head, l.n_head_kv) != (first.n_head, first.n_head_kv)) {
        return Err(VoteError::UnevenHeads);
    }
    Ok(Shape {
        n,
        n_layer: layout.n_layer(),
        n_head_kv: first.n_head_kv as usize,
        group: (first.n_head / first.n_head_kv) as usize,
    })
}
