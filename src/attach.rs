//! Attached contexts: gvote inside an app's llama.cpp context. The app decodes as before, gvote observes its graphs
//! through the eval callback, and votes on request.
//!
//! The app keeps its own sequences, positions, outputs and callbacks. While the app generates, one token at a time,
//! gvote reads nothing: its callback is removed at the end of such a step, and comes back with the next graph that
//! llama.cpp builds. So gvote does not observe every token. Before each call, it compares the cells of a sequence one
//! by one with its records. A longer sequence or another tail is accepted. Other changes by the app
//! (`llama_memory_seq_add`, a hole, a loaded state) are refused.

mod answer;
mod expand;
mod known;
mod saved;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::{ControlFlow, Range};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use self::answer::Answer;
use self::known::Known;
use crate::archive::{Bring, Recall, RecallType};
use crate::cache::{self, Cell};
use crate::capture::CaptureError;
use crate::capture::node::Node;
use crate::compact::{self, CompactError};
use crate::llama::{Context, Pos, SeqId, Token, Visit};
use crate::policy::{self, Kind, PolicyError};
use crate::sys;
use crate::vote::{self, CompressReport, Sequence, Stage, Vote, VoteError, Voter, When, room};

/// Errors of an attached context. The context is as it was.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error(transparent)]
    Vote(VoteError),
    #[error("this model cannot be compressed: {0}")]
    Unsupported(&'static str),
    #[error("gvote is not attached to this context: call gvote_attach after the context was made, before the prompt")]
    NotAttached,
    #[error("nothing is known of sequence {seq}: {reason}")]
    NotSeen { seq: SeqId, reason: &'static str },
    #[error("sequence {seq} was changed without gvote: {reason}")]
    Changed { seq: SeqId, reason: &'static str },
    #[error(
        "position {pos} lies inside the compressed part of the sequence, or before what its sliding window holds: it is exact from {exact_from} on only"
    )]
    Compressed { pos: Pos, exact_from: Pos },
    #[error("`{0}` cannot change while gvote is attached: detach first")]
    Fixed(&'static str),
    #[error("sequence {seq} is not one of this context (n_seq_max is {n_seq_max})")]
    NoSequence { seq: SeqId, n_seq_max: usize },
    #[error("layer {0} keeps no cells that gvote works on: the model has no such layer, or it uses a sliding window")]
    NoLayer(i32),
    #[error("layer {layer} has {n_head_kv} KV heads, and {head} is none of them")]
    NoHead { layer: i32, head: u32, n_head_kv: u32 },
    #[error("there is no token {token}: the model has {n_vocab}")]
    NoToken { token: Token, n_vocab: usize },
    #[error("the forward pass could not be read: {0}")]
    Unread(String),
    #[error(
        "{needed} cells cannot be freed: of the {limit} that sequence {seq} can have, at least {least} stay ({}); decode fewer tokens at once, make the context larger, or keep fewer",
        if *protected == 0 { "sinks and recent".into() } else { format!("sinks, recent and {protected} protected tokens") }
    )]
    TooFew { seq: SeqId, needed: usize, limit: usize, least: usize, protected: usize },
    #[error("sequence {seq} ends before position {end}: {n_past} tokens of it were decoded")]
    NotThere { seq: SeqId, end: Pos, n_past: Pos },
    #[error("the cache is full, and the policy full drops nothing")]
    Full,
}

impl<E: Into<VoteError>> From<E> for AttachError {
    fn from(error: E) -> Self {
        Self::Vote(error.into())
    }
}

/// An eval callback with its user data.
pub type Callback = (unsafe extern "C" fn(*mut sys::ggml_tensor, bool, *mut c_void) -> bool, *mut c_void);

/// Settings of a [`Attachment`].
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub policy: policy::Params,
    /// Whether the vote accounts for the rounding of a quantized K cache.
    pub account_error: bool,
    /// What happens to rows that leave the cache.
    pub recall: Recall,
    /// Storage type of rows that are set aside.
    pub recall_type: RecallType,
    /// When [`Attachment::vote_if_due`] votes on an answer.
    pub when: When,
}

/// An attachment of gvote to an app's context, behind a C handle (`gvote_t`): the settings, and the attached context, if any.
pub struct Attachment {
    settings: Settings,
    cancel: Arc<AtomicBool>,
    /// The app's own callback, called for every node that the callback asks for.
    next: Option<Callback>,
    attached: Option<Attached>,
}

// SAFETY: raw pointers are followed only in calls that name the context, or from inside a graph of it.
unsafe impl Send for Attachment {}

/// State for one attached context.
struct Attached {
    ctx: Context,
    voter: Voter,
    /// gvote's eval callback, as installed.
    callback: Callback,
    known: BTreeMap<SeqId, Known>,
    answers: BTreeMap<SeqId, Answer>,
    /// Measured durations of reading and voting.
    costs: vote::Known,
    /// Error that ended reading the forward pass. While set, nothing is captured and calls on a sequence are refused.
    unread: Option<CaptureError>,
    /// Whether gvote, and whether the app's own callback, asked for the node in work.
    asked: (bool, bool),
}

impl Attachment {
    /// Creates an attachment that has no context yet.
    ///
    /// # Errors
    /// [`PolicyError`] for invalid settings.
    pub fn new(settings: Settings) -> Result<Self, PolicyError> {
        settings.policy.validate()?;
        Ok(Self { settings, cancel: Arc::default(), next: None, attached: None })
    }

    /// Returns the cancel flag. While the flag is set, running and later votes fail with [`LlamaError::Cancelled`].
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.cancel.clone()
    }

    /// Returns the settings in force.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns the error that ended reading the forward pass, if any.
    pub fn unread_reason(&self) -> Option<String> {
        self.attached.as_ref()?.unread.as_ref().map(ToString::to_string)
    }

    /// Sets the callback that is called along with gvote's. If gvote's callback is removed at the moment, `next` is not
    /// called until [`Self::attach`].
    pub fn set_next_callback(&mut self, next: Option<Callback>) {
        self.next = next;
    }

    /// Changes the settings of later votes.
    ///
    /// # Errors
    /// [`PolicyError`] for invalid settings. [`AttachError::Fixed`] for settings that cannot change while attached:
    /// `window`, `sinks`, `recall` and `recall_type`.
    pub fn set(&mut self, settings: Settings) -> Result<(), AttachError> {
        settings.policy.validate()?;
        if let Some(attached) = &mut self.attached {
            let (new, now) = (&settings.policy, &self.settings.policy);
            for (changed, name) in [
                (new.window != now.window, "window"),
                (new.sinks != now.sinks, "sinks"),
                (settings.recall != self.settings.recall, "recall"),
                (settings.recall_type != self.settings.recall_type, "recall_type"),
            ] {
                if changed {
                    return Err(AttachError::Fixed(name));
                }
            }
            attached.voter.policy = new.clone();
            attached.voter.account_error = settings.account_error;
        }
        self.settings = settings;
        Ok(())
    }

    /// Attaches to a context: installs `callback`, which calls [`Self::on_node`], and observes what the context
    /// decodes. A callback that the context already has is called along with `callback`. A context that was attached
    /// before is left as it is.
    ///
    /// # Errors
    /// [`AttachError::Unsupported`] and [`VoteError::Cache`], with the reason.
    ///
    /// # Safety
    /// `ctx` is a valid context that nobody else uses during the call. It outlives the attachment, which ends with
    /// [`Self::detach`] or another `attach`.
    pub unsafe fn attach(&mut self, ctx: NonNull<sys::llama_context>, callback: Callback) -> Result<(), AttachError> {
        // SAFETY: the same contract as this function.
        let ctx = unsafe { Context::lent(ctx, self.cancel.clone()) };
        let present = eval_callback(&ctx);
        if present == Some(callback) && self.attached.as_ref().is_some_and(|attached| attached.is_in(&ctx)) {
            // the callback may be removed after a step of an answer
            // SAFETY: as below.
            unsafe { sys::gvote_shim_set_eval_callback(ctx.as_ptr(), Some(callback.0), callback.1) };
            return Ok(());
        }
        if let Some(reason) = ctx.model().unsupported() {
            return Err(AttachError::Unsupported(reason));
        }
        let mut voter = Voter::new(&ctx, &self.settings.policy, self.settings.account_error)?;
        voter.recall = self.settings.recall.clone();
        voter.set_recall_type(self.settings.recall_type)?;
        if let Some(present) = present.filter(|present| *present != callback) {
            self.next = Some(present);
        }
        // SAFETY: valid context; the caller keeps the callback valid while it is installed.
        unsafe { sys::gvote_shim_set_eval_callback(ctx.as_ptr(), Some(callback.0), callback.1) };
        let there = (0..ctx.n_seq_max() as SeqId).filter(|&seq| !cache::cells(&ctx, seq).is_empty());
        let known = there.map(|seq| (seq, Known::unheard(voter.sequence(seq)))).collect();
        self.attached = Some(Attached {
            ctx,
            voter,
            callback,
            known,
            answers: BTreeMap::new(),
            costs: vote::Known::default(),
            unread: None,
            asked: (false, false),
        });
        Ok(())
    }

    /// Detaches from a context and restores the callback that the context had before. Drops all records of its
    /// sequences.
    ///
    /// # Errors
    /// [`AttachError::NotAttached`].
    pub fn detach(&mut self, ctx: NonNull<sys::llama_context>, callback: Callback) -> Result<(), AttachError> {
        let attached = self.attached_in(ctx)?;
        let is_ours = eval_callback(&attached.ctx) == Some(callback);
        self.attached = None;
        if is_ours {
            let (next, data) = self.next.take().map_or((None, std::ptr::null_mut()), |next| (Some(next.0), next.1));
            // SAFETY: the attached context; its previous callback is the app's own.
            unsafe { sys::gvote_shim_set_eval_callback(ctx.as_ptr(), next, data) };
        }
        Ok(())
    }

    fn attached_in(&mut self, ctx: NonNull<sys::llama_context>) -> Result<&mut Attached, AttachError> {
        let attached = self.attached.as_mut().filter(|attached| attached.ctx.as_ptr() == ctx.as_ptr());
        attached.ok_or(AttachError::NotAttached)
    }

    /// Handles a node of a graph in work, before (`ask`) and after it is computed; see [`crate::capture::watch`]. At
    /// the end of a step of which neither gvote nor the app wants a node, removes the callback.
    ///
    /// # Safety
    /// `t` is a node that ggml passes to an eval callback of the context.
    pub unsafe fn on_node(&mut self, t: *mut sys::ggml_tensor, ask: bool) -> bool {
        #[cfg(test)]
        ASKED.set(ASKED.get() + usize::from(ask));
        let asked = self.attached.as_ref().map_or((false, true), |attached| attached.asked);
        let ours = match &mut self.attached {
            // SAFETY: see above.
            Some(attached) if ask || asked.0 => {
                let is_alone = !ask && self.next.is_none() && attached.has_callback();
                // SAFETY: see above.
                attached.on_node(&unsafe { Node::new(t) }, ask, is_alone)
            }
            _ => !ask,
        };
        let theirs = match self.next {
            // SAFETY: the app's own callback and data, called as ggml would.
            Some((next, data)) if ask || asked.1 => unsafe { next(t, ask, data) },
            _ => !ask,
        };
        if ask {
            if let Some(attached) = &mut self.attached {
                attached.asked = (ours, theirs);
                // SAFETY: as above.
                if !ours && self.next.is_none() && attached.may_rest(&unsafe { Node::new(t) }) {
                    // SAFETY: this is the last node of the graph, and we answer no to it.
                    unsafe { sys::gvote_shim_rest_eval_callback(attached.ctx.as_ptr()) };
                }
            }
            ours || theirs
        } else {
            ours && theirs
        }
    }

    /// Lets the policy vote on a sequence and compacts it. With `is_rehearsal`, only votes.
    ///
    /// # Errors
    /// [`AttachError`]; the context is then as before.
    pub fn compress(
        &mut self,
        ctx: NonNull<sys::llama_context>,
        seq: SeqId,
        is_rehearsal: bool,
        progress: &dyn Fn(Stage) -> ControlFlow<()>,
    ) -> Result<CompressReport, AttachError> {
        let attached = self.attached_in(ctx)?;
        attached.check_sequence(seq)?;
        let report = attached.vote(seq, !is_rehearsal, is_rehearsal, progress)?;
        if let Some(answer) = attached.answers.get_mut(&seq).filter(|_| !is_rehearsal) {
            answer.was_voted_on();
        }
        Ok(report)
    }

    /// Frees cells in the stream of a sequence until `needed` are free, besides the spare cells of a later vote. If too
    /// few are free, the policy votes, and only this sequence loses cells. `ahead`: the end of the text that is still
    /// to come, at most `window` tokens; may be empty.
    ///
    /// # Errors
    /// [`AttachError`]; the context is then as before.
    pub fn make_room(
        &mut self,
        ctx: NonNull<sys::llama_context>,
        seq: SeqId,
        needed: usize,
        ahead: &[Token],
        progress: &dyn Fn(Stage) -> ControlFlow<()>,
    ) -> Result<CompressReport, AttachError> {
        let attached = self.attached_in(ctx)?;
        attached.check_sequence(seq)?;
        let Attached { ctx, voter, known, .. } = attached;
        let cells = cache::cells(ctx, seq);
        let (free, spare) = (cache::cells_free(ctx, seq), Voter::spare_cells(&voter.policy));
        if free >= needed.saturating_add(spare) {
            return Ok(CompressReport::untouched(voter.policy.policy, cells.len(), voter.layout.bytes_per_cell()));
        }
        if voter.policy.policy == Kind::Full {
            return Err(AttachError::Full);
        }
        if let Some(&token) = ahead.iter().find(|&&token| !ctx.model().has_token(token)) {
            return Err(AttachError::NoToken { token, n_vocab: ctx.model().n_vocab() });
        }
        let limit = (cells.len() + free).saturating_sub(spare);
        let always = room::least_cells(&voter.policy);
        let most = |protected| {
            let least = always + protected;
            let too_few = AttachError::TooFew { seq, needed, limit, least, protected };
            room::most_cells(least, limit, needed).ok_or(too_few)
        };
        most(0)?;
        let known = Known::up_to_date(known, voter, seq, &cells)?;
        let most = most(voter.protected_with(ctx.model(), &known.sequence, &[]))?;
        if cells.iter().any(|cell| cell.shared) {
            // a vote could not free cells that are shared
            return Err(CompactError::Shared.into());
        }
        let mut visit = Visit::new(ctx)?;
        // SAFETY: valid context, with our callbacks installed.
        unsafe { sys::gvote_shim_update(visit.as_ptr()) };
        let captured = voter.capture.captured(seq);
        let mut done = || {
            let mut vote = Vote { ctx: &mut visit, voter, sequence: &mut known.sequence, progress };
            vote.observe_newest(ahead)?;
            let (selection, mut report) = vote.choose_most(&cells, most, ahead)?;
            let left = vote.compact(&cells, selection, &mut report)?;
            Ok((report, left))
        };
        let done: Result<_, VoteError> = done();
        let (report, left) = done.inspect_err(|_| voter.capture.set_back(seq, captured))?;
        known.bind(&left);
        Ok(report)
    }

    /// Returns the cells of a sequence, and gvote's record of it.
    ///
    /// # Errors
    /// [`AttachError::NotAttached`], [`AttachError::NotSeen`], [`AttachError::Changed`].
    pub fn sequence(
        &mut self,
        ctx: NonNull<sys::llama_context>,
        seq: SeqId,
    ) -> Result<(Vec<Cell>, &Sequence), AttachError> {
        let attached = self.attached_in(ctx)?;
        attached.check_sequence(seq)?;
        let Attached { ctx, voter, known, .. } = attached;
        let cells = cache::cells(ctx, seq);
        let known = Known::up_to_date(known, voter, seq, &cells)?;
        Ok((cells, &known.sequence))
    }

    /// Returns the first position at which a sequence can be truncated exactly. Where all rows that left the cache are
    /// set aside, the rows that votes dropped do not limit the position.
    ///
    /// # Errors
    /// Errors of [`Self::sequence`].
    pub fn exact_from(&mut self, ctx: NonNull<sys::llama_context>, seq: SeqId) -> Result<Pos, AttachError> {
        let (cells, known) = self.sequence(ctx, seq)?;
        let (exact_from, n_past) = (known.can_be_cut_from(cells.len()), known.n_past());
        Ok(cache::cut_from(&self.attached_in(ctx)?.ctx, seq).max(exact_from).min(n_past))
    }

    /// Returns the true position that a KV head of a model's layer holds in each cell of a sequence.
    ///
    /// # Errors
    /// [`AttachError::NoLayer`], [`AttachError::NoHead`], and errors of [`Self::sequence`].
    pub fn positions(
        &mut self,
        ctx: NonNull<sys::llama_context>,
        seq: SeqId,
        layer: i32,
        head: u32,
    ) -> Result<Vec<Pos>, AttachError> {
        let first = self.attached_in(ctx)?.first_head(layer, head)?;
        let (cells, sequence) = self.sequence(ctx, seq)?;
        Ok(sequence.positions(&cells, first + head as usize))
    }

    /// Protects the tokens at these positions from every later vote, or ends the protection. A negative end means the
    /// end of the sequence. A head that has already lost one of these tokens stays without it.
    ///
    /// # Errors
    /// [`AttachError::NotThere`] where the sequence ends before `positions` do, and errors of [`Self::sequence`].
    pub fn protect(
        &mut self,
        ctx: NonNull<sys::llama_context>,
        seq: SeqId,
        positions: Range<Pos>,
        stays: bool,
    ) -> Result<(), AttachError> {
        let attached = self.attached_in(ctx)?;
        attached.check_sequence(seq)?;
        let Attached { ctx, voter, known, .. } = attached;
        let known = Known::up_to_date(known, voter, seq, &cache::cells(ctx, seq))?;
        let n_past = known.sequence.n_past();
        let end = if positions.end < 0 { n_past } else { positions.end };
        if end > n_past {
            return Err(AttachError::NotThere { seq, end, n_past });
        }
        known.sequence.protect(positions.start..end, stays);
        Ok(())
    }

    /// Removes the tokens at `pos` and later from a sequence. Inside the compressed part, brings the newest rows before
    /// `pos` back into the cells of the sequence.
    ///
    /// # Errors
    /// [`AttachError::Compressed`] inside the part with composite cells, unless the whole sequence is removed, or every
    /// row is in the cache or set aside. [`CompactError`] where memory runs out. Errors of [`Self::sequence`].
    pub fn truncate(&mut self, ctx: NonNull<sys::llama_context>, seq: SeqId, pos: Pos) -> Result<(), AttachError> {
        let attached = self.attached_in(ctx)?;
        attached.check_sequence(seq)?;
        let pos = pos.max(0);
        if pos > 0 {
            let Attached { ctx, voter, known, .. } = attached;
            let cells = cache::cells(ctx, seq);
            let sequence = &Known::up_to_date(known, voter, seq, &cells)?.sequence;
            let can_be_cut_from = sequence.can_be_cut_from(cells.len());
            let exact_from = cache::cut_from(ctx, seq).max(can_be_cut_from).min(sequence.n_past());
            if pos < exact_from {
                return Err(AttachError::Compressed { pos, exact_from });
            }
            if pos < sequence.exact_from() {
                attached.arrange(seq, pos, Bring::Newest(cells.len().min(pos as usize)))?;
            }
        }
        let Attached { ctx, voter, known, .. } = attached;
        ctx.remove(seq, pos, -1);
        match Known::up_to_date(known, voter, seq, &cache::cells(ctx, seq)) {
            Ok(_) | Err(AttachError::NotSeen { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Attached {
    fn is_in(&self, ctx: &Context) -> bool {
        self.ctx.as_ptr() == ctx.as_ptr()
    }

    fn check_sequence(&self, seq: SeqId) -> Result<(), AttachError> {
        let n_seq_max = self.ctx.n_seq_max();
        if seq < 0 || seq as usize >= n_seq_max {
            return Err(AttachError::NoSequence { seq, n_seq_max });
        }
        match &self.unread {
            Some(error) => Err(AttachError::Unread(error.to_string())),
            None => Ok(()),
        }
    }

    /// Lets the policy vote on a sequence. `brings_back`: rows that earlier votes set aside take part in the choice.
    fn vote(
        &mut self,
        seq: SeqId,
        brings_back: bool,
        is_rehearsal: bool,
        progress: &dyn Fn(Stage) -> ControlFlow<()>,
    ) -> Result<CompressReport, AttachError> {
        let Self { ctx, voter, known, costs, .. } = self;
        let mut visit = Visit::new(ctx)?;
        // SAFETY: valid context, with our callbacks installed.
        unsafe { sys::gvote_shim_update(visit.as_ptr()) };
        let mut cells = cache::cells(&visit, seq);
        let n_before = cells.len();
        let limit = cells.len() + cache::cells_free(&visit, seq).saturating_sub(Voter::spare_cells(&voter.policy));
        let known = Known::up_to_date(known, voter, seq, &cells)?;
        let captured = voter.capture.captured(seq);
        // rows that the heads hold now, to restore them if the vote fails after others came back
        let may_come = brings_back && known.sequence.n_aside() > 0;
        let n_heads = if may_come { voter.layout.n_head_kv().sum() } else { 0 };
        let held = known.sequence.held(&cells, n_heads);
        let mut done = || {
            let mut vote = Vote { ctx: &mut visit, voter, sequence: &mut known.sequence, progress };
            vote.observe_newest(&[])?;
            let clock = Instant::now();
            let came = if brings_back { vote.reconsider(limit, |_| ())? } else { 0 };
            if came > 0 {
                cells = cache::cells(vote.ctx, seq);
            }
            let recall_time = clock.elapsed();
            let (selection, mut report) = vote.choose(&cells)?;
            report.note_recall(n_before, came, recall_time);
            let left = if is_rehearsal { None } else { Some(vote.compact(&cells, selection, &mut report)?) };
            Ok((report, left))
        };
        let done: Result<_, VoteError> = done();
        let (mut report, left) = done.inspect_err(|_| {
            voter.capture.set_back(seq, captured);
            let cells = cache::cells(&visit, seq);
            let sequence = &mut known.sequence;
            if may_come && sequence.held(&cells, n_heads) != held {
                let bring = Bring::Held { pos: &held, n_cells: n_before };
                // if memory runs out here, the sequence keeps more rows in the cache than before
                let _ = sequence.arrange(&mut visit, &cells, sequence.n_past(), bring, voter.devices());
                voter.release();
                known.bind(&cache::cells(&visit, seq));
            }
        })?;
        if let Some(cells) = left {
            known.bind(&cells);
            let clock = Instant::now();
            compact::give_back(&mut visit, seq);
            report.compact_time += clock.elapsed();
            if report.rows_back == 0 {
                costs.has_voted(&report);
            }
        }
        Ok(report)
    }

    /// Returns the index of the first head of a layer of the model, counted over the layers of the cache.
    fn first_head(&self, layer: i32, head: u32) -> Result<usize, AttachError> {
        let layers = &self.voter.layout.layers;
        let i = layers.iter().position(|l| l.il == layer).ok_or(AttachError::NoLayer(layer))?;
        let n_head_kv = layers[i].n_head_kv;
        if head >= n_head_kv {
            return Err(AttachError::NoHead { layer, head, n_head_kv });
        }
        Ok(self.voter.layout.n_head_kv().take(i).sum())
    }

    /// Whether `node` ends a step of answers, in a context where gvote's callback is installed.
    fn may_rest(&self, node: &Node) -> bool {
        self.unread.is_none() && self.voter.capture.ends_step(node) && self.has_callback()
    }

    /// Whether gvote's callback is installed in the context itself, not called by another callback.
    fn has_callback(&self) -> bool {
        eval_callback(&self.ctx) == Some(self.callback)
    }

    fn on_node(&mut self, node: &Node, ask: bool, is_alone: bool) -> bool {
        if self.unread.is_some() {
            return !ask;
        }
        match self.voter.capture.on_node(node, ask, is_alone) {
            Ok(answer) => {
                self.unread = self.voter.capture.failure();
                answer
            }
            Err(error) => {
                self.unread = Some(error);
                !ask
            }
        }
    }
}

#[cfg(test)]
thread_local! {
    /// Number of nodes that [`Attachment::on_node`] was asked about.
    pub(crate) static ASKED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Returns the eval callback that is installed in a context.
fn eval_callback(ctx: &Context) -> Option<Callback> {
    let (mut callback, mut data) = (None, std::ptr::null_mut());
    // SAFETY: valid context.
    unsafe { sys::gvote_shim_get_eval_callback(ctx.as_ptr(), &raw mut callback, &raw mut data) };
    callback.map(|callback| (callback, data))
}
