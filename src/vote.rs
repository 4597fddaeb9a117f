//! Votes on one sequence of a context: turns captured queries into a choice of cells, and compacts the cache.
//!
//! [`Voter`] holds the state of a context, [`Sequence`] the state of one sequence, and a vote in progress borrows both together with the
//! context. A [`crate::Session`] owns its context; the C interface attaches to a context that the app owns.

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

/// Reasons why a vote did not take place. The cache is unchanged.
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
            // the caller sees the same error wherever a cancellation is noticed
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
    /// Reads parts of the context again.
    Replay,
    /// Makes synthetic queries.
    Probe,
    /// Scores the keys.
    Score,
    /// Drafts a continuation with the full cache.
    Draft,
    /// Tests one number of cells.
    Try,
    /// Moves rows and frees cells.
    Compact,
}

/// State that the votes of one context share.
pub struct Voter {
    pub(crate) layout: Layout,
    pub(crate) capture: Capture,
    scorer: Scorer,
    pub(crate) policy: policy::Params,
    pub(crate) account_error: bool,
    /// Whether rows that leave the cache are kept, where, and in which type.
    pub(crate) recall: Recall,
    recall_type: RecallType,
    /// See [`crate::SessionParams::more_questions`].
    pub(crate) more_questions: bool,
    /// Position of the first token of the answer that is voted on. No question follows within it; the answer and the newest tokens before
    /// it stay.
    pub(crate) answer: Option<Pos>,
    /// Position after the system message, which the setting `protect` keeps.
    pub(crate) system_end: Pos,
    /// Notes that explain the next vote; None when no explanation is wanted.
    pub(crate) notes: Option<Notes>,
    /// Record of the votes and recalls before that vote; None when it is not wanted.
    pub(crate) way: Option<Way>,
    /// Keeps the process's threads waiting if the cache lies on a device: the CPU's part of a vote is too short there to amortise starting
    /// threads. None for a cache in host memory.
    _threads: Option<Arc<threads::Pool>>,
}

impl Voter {
    /// Makes a voter for this context.
    ///
    /// # Errors
    /// [`VoteError::Cache`], [`VoteError::UnevenHeads`] for caches that cannot be compacted; [`VoteError::Compute`] if a device cannot be
    /// used.
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

    /// A copy of this voter for another context that its sequence moves to.
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

    /// Sets the type in which new sequences archive their rows.
    ///
    /// # Errors
    /// [`VoteError::RecallType`] if a head's dimension is not a multiple of the type's block size.
    pub(crate) fn set_recall_type(&mut self, form: RecallType) -> Result<(), VoteError> {
        if let Some(d) = compact::unfit(&self.layout, form) {
            return Err(VoteError::RecallType { name: form.name(), d });
        }
        self.recall_type = form;
        Ok(())
    }

    /// Returns an empty sequence with this id.
    pub fn sequence(&self, id: SeqId) -> Sequence {
        let mut sequence = Sequence::new(id);
        sequence.archive = Archive::new(&self.layout, &self.recall, self.recall_type);
        sequence
    }

    /// Back ends that move rows between votes.
    pub(crate) fn devices(&mut self) -> &mut [Devices] {
        self.scorer.devices()
    }

    /// Frees the memory that the back ends took.
    pub(crate) fn release(&mut self) {
        self.scorer.release();
    }

    /// Cells that a vote needs in addition to those of the sequence.
    pub fn spare_cells(policy: &policy::Params) -> usize {
        let replay = if policy.replay { replay::CELLS } else { 0 };
        policy.samples.max(trial::most_tokens(policy)).max(policy.window).max(replay)
    }
}

/// A vote in progress.
pub(crate) struct Vote<'a> {
    pub ctx: &'a mut Context,
    pub voter: &'a mut Voter,
    pub sequence: &'a mut Sequence,
    /// Called before each stage; returning `Break` cancels the vote.
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

/// Reports the next stage.
///
/// # Errors
/// [`LlamaError::Cancelled`] if the callback breaks or the context is cancelled.
fn enter(ctx: &Context, progress: &dyn Fn(Stage) -> ControlFlow<()>, stage: Stage) -> Result<(), VoteError> {
    match progress(stage) {
        ControlFlow::Continue(()) if !ctx.is_cancelled() => Ok(()),
        _ => Err(LlamaError::Cancelled.into()),
    }
}

/// Tokens that are decoded in one batch.
fn chunk(ctx: &Context) -> usize {
    ctx.n_ubatch().min(ctx.n_batch())
}

/// Decodes `tokens` at the positions from `first` on, `at_once` per batch, until `each` breaks. After each batch calls `each(i, logits)`:
/// `i` is the index of the batch's first token, `logits` the next-token logits after each of its tokens, `[n][n_vocab]`.
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

/// Shape of a policy request over `n` cells. Every layer must have the same numbers of heads.
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
