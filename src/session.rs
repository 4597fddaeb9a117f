//! One sequence from prompt to answer: prefill, vote, compact, generate. The loop that every front end shares.

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

/// The sequence that holds the conversation.
const SEQ: SeqId = 0;
/// Tokens of an answer that nobody set a length for, where the model was trained for no longer text: enough to say something, and an
/// end to what may be nonsense.
pub const LEAST_ANSWER: usize = 512;

/// What can go wrong in a session. The session stays as it was before the call. Where that cannot be, because memory runs out
/// for the way back too, or because recurrent layers have lost their state, it is empty afterwards: [`Session::n_past`] is 0.
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
            // a caller who cancels should not need to know where it was noticed
            VoteError::Llama(error) => Self::Llama(error),
            VoteError::Saved(reason) => Self::Saved(reason),
            error => Self::Vote(error),
        }
    }
}

/// How to make a session.
#[derive(Clone, Debug, Default)]
pub struct SessionParams {
    pub context: ContextParams,
    pub policy: policy::Params,
    /// Account for the rounding of a quantized K cache in the vote: see `src/score.rs`.
    pub account_error: bool,
    /// Cells that the cache may grow to where a text needs more than it was made with; 0: it does not grow.
    pub grow_to: u32,
    /// Whether rows that leave the cache can come back.
    pub recall: Recall,
    /// How they are set aside: [`RecallType::Q8_0`] takes half the bytes of f16, and they come back rounded.
    pub recall_type: RecallType,
    /// More questions may follow upon the next answer. Where rows that leave the cache are lost, a vote for an answer that does not
    /// look at the text then drops none of it: it says nothing about what will be asked.
    pub more_questions: bool,
    /// While an answer is written, choose the cells anew every so many tokens, where something is set aside: see
    /// [`Session::renew`]. 0: never.
    pub renew: usize,
}

impl SessionParams {
    /// The context that a session with `n_ctx` cells of its own asks llama.cpp for.
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

/// One sequence in one context.
pub struct Session {
    ctx: Context,
    /// What compression needs; absent under the `full` policy, which leaves llama.cpp alone.
    voter: Option<Voter>,
    sequence: Sequence,
    /// What the heads dropped, where that is more than the cache could.
    mask: Option<Mask>,
    policy: policy::Params,
    /// As the caller asked for it.
    context: ContextParams,
    /// Cells that the caller asked for; the context has some more for votes.
    n_ctx: usize,
    /// Cells that there may be later.
    grow_to: usize,
    stuck: Option<Stuck>,
    /// Of those, the ones that may be used now.
    limit: usize,
    chunk: usize,
    renew: usize,
    when: When,
    known: vote::Known,
    /// Ascending by position.
    marks: Vec<Mark>,
    /// Next-token logits: those of the newest token, kept because the probe overwrites llama.cpp's.
    logits: Vec<f32>,
}

impl Session {
    /// # Errors
    /// [`SessionError::Policy`] for nonsense settings, [`SessionError::Unsupported`] for models without a cache that can be
    /// compacted (unless the policy is `full`), or whatever creating the context fails with.
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

    /// The context underneath.
    pub fn context(&self) -> &Context {
        &self.ctx
    }

    /// The model.
    pub fn model(&self) -> &Model {
        self.ctx.model()
    }

    /// Tokens so far: the position of the next one.
    pub fn n_past(&self) -> Pos {
        self.sequence.n_past
    }

    /// What its cells hold.
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// Cells that the session may use (`-c`).
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// From now on uses at most `n` of its cells, as if it had been made with so many; what it holds stays.
    pub fn limit_cells(&mut self, n: usize) {
        self.limit = n.min(self.n_ctx);
    }

    /// Cells in use.
    pub fn cells_used(&self) -> usize {
        match &self.voter {
            Some(_) => cache::cells(&self.ctx, SEQ).len(),
            None => self.n_past() as usize,
        }
    }

    /// Bytes of K and V in one cell, where the cache's layout is known.
    pub fn bytes_per_cell(&self) -> Option<usize> {
        Layout::of(&self.ctx, SEQ).ok().map(|l| l.bytes_per_cell())
    }

    /// What is known of the cache, where it can be compressed.
    pub(crate) fn layout(&self) -> Option<&Layout> {
        self.voter.as_ref().map(|voter| &voter.layout)
    }

    /// A flag that stops a running call when set: it answers with [`LlamaError::Cancelled`], or [`Stop::Cancelled`].
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.ctx.cancel_flag()
    }

    /// The settings of the vote.
    pub fn policy(&self) -> &policy::Params {
        &self.policy
    }

    /// Says that the first `n` tokens are the system message, which stays under the setting `protect`; also of what is read
    /// after [`Session::clear`]. A saved session does not carry it.
    pub fn set_system_tokens(&mut self, n: usize) {
        if let Some(voter) = &mut self.voter {
            voter.system_end = Pos::try_from(n).unwrap_or(Pos::MAX);
        }
    }

    /// Changes the settings of later votes.
    ///
    /// # Errors
    /// [`SessionError::Policy`] for nonsense, [`SessionError::Fixed`] for what the session was made with: `window`, `sinks`,
    /// more `samples` than there are cells set aside for, or a change from or to the policy `full`.
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

    /// Cells that were set aside for votes.
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

    /// Changes what becomes of rows that leave the cache. Those that are set aside elsewhere are given up.
    pub fn set_recall(&mut self, recall: Recall) {
        let Some(voter) = &mut self.voter else { return };
        voter.recall = recall.clone();
        if recall != self.recall() {
            self.sequence.archive = self.voter.as_ref().and_then(|voter| voter.sequence(SEQ).archive);
        }
    }

    /// Decodes a prompt (or a further turn) and keeps the next-token logits. `progress(done, of)` is called after each
    /// ubatch; breaking cancels. Rows that left the cache come back first, as far as there are cells for them and the prompt.
    ///
    /// # Errors
    /// [`SessionError::PromptTooLong`], [`LlamaError::Cancelled`] and others; the session is then as before, but rows that came
    /// back are in the cache. [`LlamaError::NotANumber`]: it has read the prompt.
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

    /// # Errors
    /// [`LlamaError::NotANumber`]; there are no logits then.
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

    /// Next-token logits of the newest token. `[n_vocab]`; empty before the first prefill.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Decodes one token and keeps its next-token logits.
    ///
    /// # Errors
    /// [`LlamaError::NoCells`] when the cache is full, [`LlamaError::Cancelled`]; the session is then as before.
    /// [`LlamaError::NotANumber`]; the session has read the token then, and the next call must be a prefill, or [`Session::clear`].
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

    /// A sampler that knows what the session has read, for an answer of `n_predict` tokens (see [`Session::generate`]).
    ///
    /// # Errors
    /// Those of [`Sampler::new`].
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

    /// Position where an answer ends whose length nobody has set.
    fn end_of_answer(&self) -> usize {
        self.model().n_ctx_train().max(self.n_past() as usize + LEAST_ANSWER)
    }

    /// Generates up to `n_predict` tokens (negative: until the model ends, or has come as far as it was trained for; [`LEAST_ANSWER`]
    /// tokens where that is near or behind).
    /// `on_token` gets each token before it is decoded; the last one, if it ends the generation, is not passed on and not
    /// decoded. It is voted on where [`Session::set_vote`] says so, and the cells are chosen anew from time to time where
    /// [`SessionParams::renew`] does. Where the cells run out, those that the policy can spare are freed; under the policy `full`, and
    /// where too few can be spared, that is the end, and so is that of a model's table of positions.
    ///
    /// # Errors
    /// [`LlamaError::NoLogits`] without a prompt; whatever decoding fails with. A full cache and a cancelled run are no
    /// errors but a [`Stop`].
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
                    // the answer goes on with the cells that there are
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

    /// From this position on the session can be cut exactly: see [`Session::truncate`]. At 0 it always can. Where everything that
    /// left the cache is set aside, what a vote dropped is no obstacle.
    pub fn exact_from(&self) -> Pos {
        let compressed = match self.mask {
            None => self.sequence.can_be_cut_from(self.cells_used()),
            Some(_) => self.sequence.exact_from,
        };
        cache::cut_from(&self.ctx, SEQ).max(compressed).min(self.n_past())
    }

    /// Forgets the tokens from position `pos` on. The next call must be a prefill, unless the place was marked: see
    /// [`Session::mark`].
    ///
    /// # Errors
    /// [`SessionError::Compressed`] inside the part whose cells hold different tokens in different heads, unless all others are set
    /// aside; where a sliding window would miss tokens that it dropped since; and with recurrent layers. [`SessionError::Vote`]
    /// where memory runs out. The session is then as before.
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

    /// Starts over with an empty cache.
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
