//! One sequence from prompt to answer: prefill, vote, compact, generate. All front ends share this loop.

#![forbid(unsafe_code)]

mod compress;
mod expand;
mod explain;
mod file;
mod follow;
mod grow;
mod long;
mod marks;
mod masked;
mod renew;
mod report;
mod state;
#[cfg(test)]
mod tests;
mod undo;
mod when;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

pub use self::expand::ExpandReport;
pub use self::file::FileError;
pub use self::grow::Stuck;
use self::marks::Mark;
pub use self::report::{GenerateReport, PrefillReport, Squeezes, Stop};
pub use self::when::{AnswerVote, When};
pub use crate::archive::{Recall, RecallFile, RecallFileError, RecallType};
use crate::cache::{self, Layout};
use crate::compact::{Mask, MaskError};
use crate::llama::{Batch, Context, ContextParams, LlamaError, Model, Pos, Sampler, SamplerParams, SeqId, Token};
use crate::policy::{self, Kind, PolicyError};
pub use crate::vote::CompressReport;
use crate::vote::{self, Sequence, VoteError, Voter};

/// Id of the only sequence in a session's context.
const SEQ: SeqId = 0;
/// Tokens of an answer without a set length, where the context length of the model's training is nearly used up or
/// exceeded: enough for a useful answer, and a bound on degenerate output.
pub const LEAST_ANSWER: usize = 512;

/// Errors of a session. After an error the session is as before the call. There are two exceptions, after which the
/// session is empty ([`Session::n_past`] is 0): memory runs out while the old state is restored, or recurrent layers
/// have lost their state.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Llama(#[from] LlamaError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Vote(VoteError),
    #[error(transparent)]
    Mask(MaskError),
    #[error("this model cannot be compressed: {0}; `policy` full runs it as it is")]
    Unsupported(&'static str),
    #[error(
        "the prompt has {tokens} tokens and the context {room} free cells; raise `n_ctx` (the model was trained for {trained})"
    )]
    PromptTooLong { tokens: usize, room: usize, trained: usize },
    #[error(
        "{n_ctx} cells are too few to go on in: {least} is the least with these `sinks` and `recent`{too} (raise `n_ctx` or lower them)",
        too = if *protected == 0 { String::new() } else { format!(" and the {protected} tokens of `protect`") }
    )]
    CacheTooSmall { n_ctx: usize, least: usize, protected: usize },
    #[error("the cache is full, and the policy `full` drops nothing")]
    Full,
    #[error("the policy `full` does not vote, so there is nothing to explain: choose another `policy`")]
    NoVote,
    #[error("the prompt is empty")]
    Empty,
    #[error(
        "position {0} lies inside the compressed part, or before what a sliding window or recurrent layers hold (exact from {1} on): start over and read the text again"
    )]
    Compressed(Pos, Pos),
    #[error("`{0}` cannot change in a living session")]
    Fixed(&'static str),
    #[error("the saved session does not fit: {0}")]
    Saved(&'static str),
}

impl From<VoteError> for SessionError {
    fn from(error: VoteError) -> Self {
        match error {
            // report cancellation as the same variant, wherever it was noticed
            VoteError::Llama(error) => Self::Llama(error),
            VoteError::Saved(reason) => Self::Saved(reason),
            error => Self::Vote(error),
        }
    }
}

/// Parameters of a new session.
#[derive(Clone, Debug, Default)]
pub struct SessionParams {
    pub context: ContextParams,
    pub policy: policy::Params,
    /// Account for the rounding of a quantized K cache in the vote; see `src/score.rs`.
    pub account_error: bool,
    /// Largest number of cells that the cache may grow to when a text does not fit. 0: the cache does not grow.
    pub grow_to: u32,
    /// Whether rows that leave the cache are kept, so that they can come back.
    pub recall: Recall,
    /// Storage type of rows outside the cache. [`RecallType::Q8_0`] takes half the bytes of f16, and rows come back
    /// rounded.
    pub recall_type: RecallType,
    /// Whether more questions may follow the next answer. If so, and if rows that leave the cache are lost, a vote
    /// before an answer drops nothing when that answer does not attend to the text: the vote then says nothing about
    /// later questions.
    pub more_questions: bool,
    /// Interval, in tokens of an answer, at which the cells are chosen anew while rows are set aside; see
    /// [`Session::renew`]. 0: never.
    pub renew: usize,
}

impl SessionParams {
    /// Returns the context parameters for a session with `n_ctx` usable cells, including the spare cells that votes
    /// need.
    pub fn with_spare_cells(&self, n_ctx: usize) -> ContextParams {
        let mut context = self.context.clone();
        context.n_ctx = u32::try_from(n_ctx).unwrap_or(u32::MAX);
        if self.policy.policy != Kind::Full {
            context.n_ctx = context.n_ctx.saturating_add(Voter::spare_cells(&self.policy) as u32);
        }
        context.n_batch = context.n_batch.clamp(1, context.n_ctx);
        context.n_ubatch = context.n_ubatch.clamp(1, context.n_batch);
        context
    }
}

/// A conversation: one sequence in a llama.cpp context of its own.
pub struct Session {
    ctx: Context,
    /// Votes and captures. None under the policy `full`, which runs llama.cpp unchanged.
    voter: Option<Voter>,
    sequence: Sequence,
    /// Attention mask over the rows that heads dropped, where heads keep unequal numbers of rows
    /// ([`policy::Params::exact`]).
    mask: Option<Mask>,
    policy: policy::Params,
    /// Context parameters as the caller gave them.
    context: ContextParams,
    /// Cells that the caller asked for. The context has more, as spare cells for votes.
    n_ctx: usize,
    /// Largest number of cells that the cache may grow to.
    grow_to: usize,
    stuck: Option<Stuck>,
    /// Cells that may be used now; at most `n_ctx`.
    limit: usize,
    chunk: usize,
    renew: usize,
    when: When,
    known: vote::Known,
    /// Ascending by position.
    marks: Vec<Mark>,
    /// Next-token logits after the newest token, `[n_vocab]`. A copy, because the probe pass overwrites llama.cpp's
    /// own.
    logits: Vec<f32>,
}

impl Session {
    /// Creates a session with a context of its own.
    ///
    /// # Errors
    /// [`SessionError::Policy`] for invalid settings; [`SessionError::Unsupported`] for models whose cache cannot be
    /// compacted (unless the policy is `full`); any error of creating the context.
    pub fn new(model: &Model, params: &SessionParams) -> Result<Self, SessionError> {
        params.policy.validate()?;
        let compresses = params.policy.policy != Kind::Full;
        if compresses && let Some(reason) = model.unsupported() {
            return Err(SessionError::Unsupported(reason));
        }
        let n_ctx = match params.context.n_ctx {
            0 => model.n_ctx_train(),
            n => n as usize,
        };
        let context = params.with_spare_cells(n_ctx);
        let ctx = Context::new(model, &context)?;
        let voter = if compresses {
            let mut voter = Voter::new(&ctx, &params.policy, params.account_error)?;
            voter.recall = params.recall.clone();
            voter.set_recall_type(params.recall_type)?;
            voter.more_questions = params.more_questions;
            voter.capture.follow(SEQ);
            Some(voter)
        } else {
            None
        };
        let sequence = voter.as_ref().map_or(Sequence::new(SEQ), |voter| voter.sequence(SEQ));
        Ok(Self {
            ctx,
            voter,
            sequence,
            mask: None,
            policy: params.policy.clone(),
            context: params.context.clone(),
            n_ctx,
            grow_to: params.grow_to as usize,
            stuck: None,
            limit: n_ctx,
            chunk: context.n_ubatch as usize,
            renew: params.renew,
            when: When::Prompt,
            known: vote::Known::default(),
            marks: Vec::new(),
            logits: Vec::new(),
        })
    }

    /// Returns the llama.cpp context.
    pub fn context(&self) -> &Context {
        &self.ctx
    }

    /// Returns the model.
    pub fn model(&self) -> &Model {
        self.ctx.model()
    }

    /// Number of tokens read so far, which is the position of the next token.
    pub fn n_past(&self) -> Pos {
        self.sequence.n_past
    }

    /// Returns the sequence: its tokens, and what its cells hold.
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// Number of cells that the session may use (`-c`).
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Limits the session to `n` cells, as if it had been created with so many. Cells that are in use stay.
    pub fn limit_cells(&mut self, n: usize) {
        self.limit = n.min(self.n_ctx);
    }

    /// Number of cells in use.
    pub fn cells_used(&self) -> usize {
        match &self.voter {
            Some(_) => cache::cells(&self.ctx, SEQ).len(),
            None => self.n_past() as usize,
        }
    }

    /// Bytes of K and V in one cell; None where the layout of the cache is not known.
    pub fn bytes_per_cell(&self) -> Option<usize> {
        Layout::of(&self.ctx, SEQ).ok().map(|l| l.bytes_per_cell())
    }

    /// Layout of the cache; None under the policy `full`.
    pub(crate) fn layout(&self) -> Option<&Layout> {
        self.voter.as_ref().map(|voter| &voter.layout)
    }

    /// Returns a flag that cancels a running call when set. The call then fails with [`LlamaError::Cancelled`], or ends
    /// with [`Stop::Cancelled`].
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.ctx.cancel_flag()
    }

    /// Returns the settings of the vote.
    pub fn policy(&self) -> &policy::Params {
        &self.policy
    }

    /// Marks the first `n` tokens as the system message, which the setting `protect` keeps. The mark survives
    /// [`Session::clear`] and applies to the text read afterwards. A saved session does not contain the mark.
    pub fn set_system_tokens(&mut self, n: usize) {
        if let Some(voter) = &mut self.voter {
            voter.system_end = Pos::try_from(n).unwrap_or(Pos::MAX);
        }
    }

    /// Changes the settings of later votes.
    ///
    /// # Errors
    /// [`SessionError::Policy`] for invalid settings; [`SessionError::Fixed`] for a setting that is fixed when the
    /// session is created: `window`, `sinks`, `samples`, `draft` or `replay` beyond the spare cells, or a change from
    /// or to the policy `full`.
    pub fn set_policy(&mut self, policy: policy::Params, account_error: bool) -> Result<(), SessionError> {
        policy.validate()?;
        let old = &self.policy;
        let is_full = |p: &policy::Params| p.policy == Kind::Full;
        for (changed, setting) in [
            (policy.window != old.window, "window"),
            (policy.sinks != old.sinks, "sinks"),
            (policy.samples > self.spare(), "samples"),
            (policy.draft > self.spare(), "draft"),
            (Voter::spare_cells(&policy) > self.spare(), "replay"),
            (is_full(&policy) != is_full(old), "policy"),
        ] {
            if changed {
                return Err(SessionError::Fixed(setting));
            }
        }
        if let Some(voter) = &mut self.voter {
            voter.policy = policy.clone();
            voter.account_error = account_error;
        }
        self.policy = policy;
        Ok(())
    }

    /// Number of spare cells for votes.
    fn spare(&self) -> usize {
        self.ctx.n_ctx() - self.n_ctx
    }

    fn room(&self) -> usize {
        self.limit.saturating_sub(self.cells_used())
    }

    fn check_room(&self, tokens: usize) -> Result<(), SessionError> {
        let (room, trained) = (self.room(), self.model().n_ctx_train());
        if tokens > room { Err(SessionError::PromptTooLong { tokens, room, trained }) } else { Ok(()) }
    }

    /// Changes whether more questions may follow: see [`SessionParams::more_questions`].
    pub fn set_more_questions(&mut self, may_follow: bool) {
        if let Some(voter) = &mut self.voter {
            voter.more_questions = may_follow;
        }
    }

    /// Changes what happens to rows that leave the cache. Rows that are set aside in another place are discarded.
    pub fn set_recall(&mut self, recall: Recall) {
        let Some(voter) = &mut self.voter else { return };
        voter.recall = recall.clone();
        if recall != self.recall() {
            self.sequence.archive = self.voter.as_ref().and_then(|voter| voter.sequence(SEQ).archive);
        }
    }

    /// Decodes a prompt (or a further turn) and keeps the next-token logits. Before that, rows that left the cache come
    /// back, as far as cells are free for them and the prompt. Calls `progress(done, of)` after each ubatch; a break
    /// cancels.
    ///
    /// # Errors
    /// [`SessionError::PromptTooLong`], [`LlamaError::Cancelled`] and other errors of decoding: the session is as
    /// before, but rows that came back stay in the cache. [`LlamaError::NotANumber`]: the prompt has been read.
    pub fn prefill(
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
        self.check_room(tokens.len())?;
        let first = self.n_past();
        let before = self.before()?;
        let mut batch = Batch::new(self.chunk);
        let mut done = 0;
        for chunk in tokens.chunks(self.chunk) {
            batch.clear();
            for (i, &token) in chunk.iter().enumerate() {
                let is_last = done + i + 1 == tokens.len();
                batch.add(token, first + (done + i) as Pos, SEQ, is_last)?;
            }
            done += chunk.len();
            let decoded = self.decode_batch(&batch, Some(tokens.len() - done));
            let decoded = decoded.and_then(|()| match progress(done, tokens.len()) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(LlamaError::Cancelled.into()),
            });
            if let Err(error) = decoded {
                self.undo(before);
                return Err(error);
            }
        }
        self.sequence.extend(tokens);
        self.known.has_read(tokens.len(), start.elapsed() - expanded.time);
        self.keep_logits()?;
        Ok(PrefillReport { tokens: tokens.len(), time: start.elapsed(), expanded, squeezes: Squeezes::default() })
    }

    /// Copies the next-token logits of the last decode.
    ///
    /// # Errors
    /// [`LlamaError::NotANumber`]; no logits are kept then.
    fn keep_logits(&mut self) -> Result<(), LlamaError> {
        self.logits.clear();
        let logits = self.ctx.logits()?;
        if logits.iter().any(|x| x.is_nan()) {
            return Err(LlamaError::NotANumber);
        }
        self.logits.extend_from_slice(logits);
        Ok(())
    }

    fn remove_from(&mut self, pos: Pos) {
        self.ctx.remove(SEQ, pos, -1);
        if let Some(voter) = &mut self.voter {
            voter.capture.forget_from(SEQ, pos);
        }
    }

    /// Next-token logits after the newest token, `[n_vocab]`; empty before the first prefill.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Decodes one token and keeps its next-token logits.
    ///
    /// # Errors
    /// [`LlamaError::NoCells`] when the cache is full, [`LlamaError::Cancelled`]: the session is as before.
    /// [`LlamaError::NotANumber`]: the token has been read, and the next call must be a prefill or [`Session::clear`].
    pub fn decode(&mut self, token: Token) -> Result<(), SessionError> {
        let mut batch = Batch::new(1);
        batch.add(token, self.n_past(), SEQ, true)?;
        if let Err(error) = self.decode_batch(&batch, None) {
            if !self.ctx.remove(SEQ, self.n_past(), -1) {
                self.clear();
            }
            return Err(error);
        }
        self.sequence.extend(&[token]);
        if let Some(voter) = &mut self.voter {
            voter.capture.pass(1);
        }
        self.keep_logits()?;
        Ok(())
    }

    /// Creates a sampler that has accepted all tokens of the session, for an answer of `n_predict` tokens (see
    /// [`Session::generate`]).
    ///
    /// # Errors
    /// Errors of [`Sampler::new`].
    pub fn sampler(&self, params: &SamplerParams, n_predict: i32) -> Result<Sampler, LlamaError> {
        let tokens = self.sequence.tokens();
        let most = match usize::try_from(n_predict) {
            Ok(n) => tokens.len().saturating_add(n),
            Err(_) => self.end_of_answer(),
        };
        let mut sampler = Sampler::new(self.model(), params, most)?;
        sampler.accept(tokens)?;
        Ok(sampler)
    }

    /// Returns the position at which an answer without a set length ends.
    fn end_of_answer(&self) -> usize {
        self.model().n_ctx_train().max(self.n_past() as usize + LEAST_ANSWER)
    }

    /// Generates up to `n_predict` tokens. A negative `n_predict` means: until the model ends its turn or the sequence
    /// reaches the context length of the training; where that is near or passed, at most [`LEAST_ANSWER`] tokens.
    ///
    /// Calls `on_token` with each token before it is decoded. An end-of-generation token is neither passed to
    /// `on_token` nor decoded.
    ///
    /// The answer is voted on as [`Session::set_vote`] says, and the cells are chosen anew at the interval
    /// [`SessionParams::renew`]. When no cell is free, the policy frees cells. The generation ends where it cannot free
    /// enough, under the policy `full`, and where the model has no further positions.
    ///
    /// # Errors
    /// [`LlamaError::NoLogits`] without a prompt, and any error of decoding. A full cache and a cancelled run are not
    /// errors: they end with a [`Stop`].
    pub fn generate(
        &mut self,
        sampler: &mut Sampler,
        n_predict: i32,
        mut on_token: impl FnMut(Token) -> ControlFlow<()>,
    ) -> Result<GenerateReport, SessionError> {
        if self.logits.is_empty() {
            return Err(LlamaError::NoLogits.into());
        }
        let start = Instant::now();
        let mut tokens = 0;
        let [mut squeezes, mut renewals] = [Squeezes::default(); 2];
        let mut free = self.room();
        let end = self.end_of_answer();
        let mut share = self.cells_used() as f64 / f64::from(self.n_past().max(1));
        let (mut meter, mut vote, mut unvoted, first) = (self.meter(), None, None, self.n_past());
        let stop = loop {
            if n_predict >= 0 && tokens == n_predict as usize {
                break Stop::Limit;
            }
            let token = sampler.sample(&self.logits)?;
            if self.model().is_eog(token) {
                break Stop::EndOfGeneration;
            }
            if n_predict < 0 && self.n_past() as usize >= end {
                break Stop::ContextFull;
            }
            if free == 0 {
                self.grow_for(1);
                free = self.room();
            }
            let used = self.limit - free;
            if meter.is_due(tokens, used, free == 0) && !self.policy.leaves_alone(used) {
                meter.stop();
                match self.compress_answer(first) {
                    Ok(report) => {
                        meter.has_voted(report.cells_before, report.cells_after);
                        vote = Some(AnswerVote { after: tokens, report });
                    }
                    Err(error) if when::ends_answer(&error) => break Stop::Cancelled,
                    // the answer continues with the present cells
                    Err(error) => unvoted = Some(error.to_string()),
                }
                free = self.room();
                share = self.cells_used() as f64 / f64::from(self.n_past());
            }
            if free == 0 {
                match self.make_room(1, &[]) {
                    Ok(squeeze) => squeezes.add(&squeeze),
                    Err(
                        SessionError::CacheTooSmall { .. }
                        | SessionError::Full
                        | SessionError::Llama(LlamaError::NoPositions { .. }),
                    ) => break Stop::ContextFull,
                    Err(SessionError::Llama(LlamaError::Cancelled)) => break Stop::Cancelled,
                    Err(error) => return Err(error),
                }
                free = self.room();
            }
            if self.renew > 0 && tokens > 0 && tokens % self.renew == 0 && self.rows_aside() > 0 {
                let cells = (share * f64::from(self.n_past())) as usize;
                match self.renew(cells.min(self.limit.saturating_sub(self.renew))) {
                    Ok(renewal) => renewals.add(&renewal),
                    Err(error) if when::ends_answer(&error) => break Stop::Cancelled,
                    Err(_) => {}
                }
                free = self.room();
                if free == 0 {
                    break Stop::ContextFull;
                }
            }
            let flow = on_token(token);
            let clock = Instant::now();
            match self.decode(token) {
                Ok(()) => {}
                Err(SessionError::Llama(LlamaError::NoCells { .. } | LlamaError::NoPositions { .. })) => {
                    break Stop::ContextFull;
                }
                Err(SessionError::Llama(LlamaError::Cancelled)) => break Stop::Cancelled,
                Err(error) => return Err(error),
            }
            meter.step(self.limit - free, clock.elapsed());
            tokens += 1;
            free -= 1;
            if flow.is_break() {
                break Stop::Cancelled;
            }
        };
        self.known.has_answered(&meter);
        Ok(GenerateReport { tokens, time: start.elapsed(), stop, vote, unvoted, squeezes, renewals })
    }

    /// Returns the first position at which the session can be truncated exactly; see [`Session::truncate`]. Position 0
    /// is always possible. Where all rows that left the cache are set aside, the rows that votes dropped do not limit
    /// the position.
    pub fn exact_from(&self) -> Pos {
        let compressed = match self.mask {
            None => self.sequence.can_be_cut_from(self.cells_used()),
            Some(_) => self.sequence.exact_from,
        };
        cache::cut_from(&self.ctx, SEQ).max(compressed).min(self.n_past())
    }

    /// Removes the tokens from position `pos` on. The next call must be a prefill, unless `pos` was marked; see
    /// [`Session::mark`].
    ///
    /// # Errors
    /// [`SessionError::Compressed`] in three cases: inside the part with composite cells, unless all other rows are set
    /// aside; where a sliding window would lack tokens that it has dropped since; and with recurrent layers.
    /// [`SessionError::Vote`] where memory runs out. The session is then as before.
    pub fn truncate(&mut self, pos: Pos) -> Result<(), SessionError> {
        let exact_from = self.exact_from();
        if pos < exact_from && pos > 0 {
            return Err(SessionError::Compressed(pos, exact_from));
        }
        if pos < self.n_past() {
            if pos > 0 && pos < self.sequence.exact_from {
                self.cut_inside(pos)?;
            } else {
                self.remove_from(pos);
                self.sequence.truncate(pos, self.cells_used());
            }
            self.logits.clear();
            self.back_to_mark(pos);
        }
        if self.n_past() == 0 {
            self.clear();
        }
        Ok(())
    }

    /// Empties the cache and starts over.
    pub fn clear(&mut self) {
        self.ctx.clear();
        if let Some(voter) = &mut self.voter {
            voter.capture.forget(SEQ);
            voter.capture.follow(SEQ);
        }
        self.mask = None;
        self.sequence = self.sequence.emptied();
        self.marks.clear();
        self.logits.clear();
    }
}
