//! Captures data from the forward pass: statistics of hidden states, the queries of the observation window, and the queries of the probe
//! pass.
//!
//! llama.cpp's eval callback visits every node of the graph. For each layer that stores K and V in the cache, two nodes are read:
//! - `attn_norm-<il>` `[n_embd, n_tokens]`: the hidden state that enters attention. Its mean and variance per channel over the prompt are
//!   accumulated ubatch by ubatch, on the device that holds the hidden state;
//! - q at the attention op `[n_embd_head_k, n_tokens, n_head]`, rotated like the cached K: the queries of the newest `window` positions are
//!   kept as f16, the type to which ggml converts them anyway before it multiplies with an f16 cache.
//!
//! Every node that is read stops the graph, which costs time on a GPU: see `src/capture/part.rs`. Most ubatches therefore pass unread. Of a
//! long text every sixteenth contributes to the statistics, and queries are read only where they are known to vote, at the end of a prompt.
//! Where that is not known, as behind the C interface, a vote decodes the newest tokens again. Results that are computed on a device stay
//! there until the last layer has passed: see `src/capture/pending.rs`.
//!
//! The **probe pass** turns sampled hidden states into queries with the model's own weights. Dummy tokens are decoded at the next positions
//! while the sequence is parked. Of llama.cpp's graph only the nodes between `attn_norm` and q are needed (a tenth of a layer's weights and
//! none of its attention). At the start of each part of the graph, the samples replace `attn_norm`, just these nodes are computed in place,
//! q is read, and the part ends. Biases, q-norms, RoPE and rotation are applied as usual. If the path leads over several back ends, as with
//! weights in host memory that a GPU computes with, the whole graph is computed and `attn_norm` is overwritten on the way.
//!
//! One capture serves all sequences of a context. The cells that a token's K goes to tell which sequence the token belongs to.
//!
//! In a context of our own the callback is installed only around the decode calls that need it, and never during a decoding step. In an
//! app's context the callback is installed and removed automatically: see `src/attach.rs`.

mod graph;
mod moments;
pub(crate) mod node;
mod part;
mod pending;
mod probe;
mod record;
mod state;
pub(crate) mod watch;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use half::f16;
use half::vec::HalfBitsVecExt;

use self::node::Node;
use self::pending::Pending;
#[cfg(test)]
pub(crate) use self::probe::PRETEND_SCATTERED;
use self::probe::Probe;
pub use self::probe::SyntheticQueries;
use self::record::Record;
pub(crate) use self::record::{FIRST, Seen};
pub(crate) use self::state::{Captured, Restored};
use self::watch::Watch;
use crate::backend::{ComputeError, Devices};
use crate::cache::{CacheError, Layout};
use crate::llama::{Batch, Context, LlamaError, Pos, SeqId};
use crate::sys;

/// Errors while reading the forward pass.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(
        "the model's graph has no `attn_norm` for layer {0}: this architecture is not supported yet; `policy` full runs it as it is"
    )]
    NoHidden(i32),
    #[error("the model's attention uses {0}, which is not supported yet; `policy` full runs it as it is")]
    Attention(&'static str),
    #[error(
        "the graph node {0} has an unexpected shape or type: this architecture is not supported yet; `policy` full runs it as it is"
    )]
    Shape(String),
    #[error("the capture was made for another context")]
    OtherContext,
    #[error("nothing was captured: decode a prompt with the capture on before compressing")]
    Empty,
    #[error("the probe needs {needed} free cells and the cache has {free}: raise `n_ctx`, or lower `samples`")]
    NoCells { needed: usize, free: usize },
    #[error("internal error in the eval callback: {0}")]
    Panic(String),
    #[error(transparent)]
    Compute(#[from] ComputeError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Llama(#[from] LlamaError),
}

/// Maps q·k to the argument of softmax in one layer: `post * tanh(pre * q·k)` with a softcap, else `post * q·k`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitScale {
    pub pre: f32,
    pub post: f32,
    pub softcap: bool,
}

impl Default for LogitScale {
    fn default() -> Self {
        Self { pre: 1.0, post: 1.0, softcap: false }
    }
}

/// Properties of one layer of the cache that all sequences share.
struct Layer {
    il: i32,
    /// Floats of one token's queries: `n_head * n_embd_head_k`.
    n_q: usize,
    n_head: usize,
    scale: LogitScale,
}

enum Mode {
    /// An app decodes: records its tokens, and collects statistics where they are due.
    Listen,
    /// Collects statistics where they are due and, if `wants_queries`, the window's queries of every followed sequence.
    Prompt { wants_queries: bool },
    /// As `Prompt` with queries, for tokens that are decoded again to obtain their queries.
    Again,
    /// Overwrites hidden states with samples and collects the resulting queries.
    Probe(Probe),
    /// Collects all queries of a sequence, layer by layer.
    Replay(SeqId, Vec<Queries>),
}

/// What to read of the current ubatch.
#[derive(Clone, Copy, Default)]
struct Reads {
    /// Whether the ubatch was examined and K of the first layer is not stored yet.
    begun: bool,
    hidden: bool,
    queries: bool,
    /// Whether the ubatch is a step of answers: at most one token per sequence, and nothing to read.
    step: bool,
}

/// Queries of one layer, `[n_query][n_head][n_embd_head_k]`.
#[derive(Clone, Debug, Default)]
pub struct Queries {
    pub data: Vec<f16>,
    pub pos: Vec<Pos>,
}

/// Queries of an observation window in one layer, as in [`Queries`], in parts that lie where they were captured.
pub struct Window<'a> {
    pub parts: Vec<&'a [f16]>,
    pub pos: Vec<Pos>,
}

impl<'a> Window<'a> {
    /// The newest query, `[n_head][n_embd_head_k]`.
    pub fn current(&self) -> &'a [f16] {
        let n_q = self.parts.iter().map(|part| part.len()).sum::<usize>() / self.pos.len().max(1);
        self.parts.last().map_or(&[], |part| &part[part.len() - n_q..])
    }

    /// All queries in one piece.
    #[cfg(test)]
    pub fn joined(&self) -> Queries {
        Queries { data: self.parts.concat(), pos: self.pos.clone() }
    }
}

/// Returns `n` zeros. Allocated as integers because the system provides zeroed pages for these, which cost nothing before they are written
/// to.
fn zeros(n: usize) -> Vec<f16> {
    vec![0_u16; n].reinterpret_into()
}

struct Inner {
    ctx: *mut sys::llama_context,
    n_embd: usize,
    softcap: f32,
    window: usize,
    /// Number of first positions that are left out of the statistics: the hidden states of attention sinks are unlike those of other
    /// tokens.
    skip: usize,
    layers: Vec<Layer>,
    by_il: HashMap<i32, usize>,
    by_tensor: HashMap<*const sys::ggml_tensor, usize>,
    mode: Mode,
    records: BTreeMap<SeqId, Record>,
    /// What to read of the current ubatch.
    reads: Reads,
    devices: Devices,
    /// Results that still lie on devices, one entry per device.
    pending: Vec<Pending>,
    /// Whether the results cover a whole ubatch.
    is_whole: bool,
    /// Whether no other callback needs to see the nodes of the current graph.
    is_alone: bool,
    /// Error that could not be returned at once; nothing more is read until it is taken.
    failed: Option<CaptureError>,
    /// The current ubatch of an app's prompt: its number of tokens, and its start.
    reading: Option<(usize, Instant)>,
    /// Tokens of the ubatches that were completed, and their total time.
    read: (usize, Duration),
}

/// Captures data from the forward passes of a context, sequence by sequence.
pub struct Capture {
    inner: Inner,
}

// SAFETY: raw pointers are followed only while the context computes a graph.
unsafe impl Send for Capture {}

impl Capture {
    /// Makes a capture for the cache that `layout` describes. It follows no sequence yet. `window`: number of newest queries to keep;
    /// `skip`: number of first positions to leave out of the statistics.
    pub fn new(ctx: &Context, layout: &Layout, window: usize, skip: usize) -> Self {
        let layers: Vec<_> = layout
            .layers
            .iter()
            .map(|l| Layer {
                il: l.il,
                n_q: (l.n_head * l.n_embd_head_k) as usize,
                n_head: l.n_head as usize,
                scale: LogitScale::default(),
            })
            .collect();
        Self {
            inner: Inner {
                ctx: ctx.as_ptr(),
                n_embd: ctx.model().n_embd(),
                softcap: layout.info.softcap,
                window,
                skip,
                by_il: layers.iter().enumerate().map(|(i, l)| (l.il, i)).collect(),
                by_tensor: layout.layers.iter().enumerate().map(|(i, l)| (l.k.cast_const(), i)).collect(),
                layers,
                mode: Mode::Listen,
                records: BTreeMap::new(),
                reads: Reads::default(),
                devices: Devices::new(ctx.n_threads_batch()),
                pending: Vec::new(),
                is_whole: false,
                is_alone: true,
                failed: None,
                reading: None,
                read: (0, Duration::ZERO),
            },
        }
    }

    /// See [`Devices::start`].
    ///
    /// # Errors
    /// [`ComputeError`].
    pub(crate) fn start(&mut self, layout: &Layout) -> Result<(), ComputeError> {
        if layout.is_host() {
            return Ok(());
        }
        self.inner.devices.start(layout)?;
        self.inner.prepare(layout)
    }

    /// Starts following a sequence.
    pub fn follow(&mut self, seq: SeqId) {
        let Inner { records, layers, window, .. } = &mut self.inner;
        records.entry(seq).or_insert_with(|| Record::new(layers, *window));
    }

    /// Returns the tokens recorded for a sequence since the last call, by position.
    pub(crate) fn take_seen(&mut self, seq: SeqId) -> Vec<Seen> {
        self.inner.records.get_mut(&seq).map(Record::take_seen).unwrap_or_default()
    }

    /// Forgets everything captured of a sequence, and stops following it.
    pub fn forget(&mut self, seq: SeqId) {
        self.settle();
        self.inner.records.remove(&seq);
    }

    /// Forgets the queries of these positions of a sequence: they were removed from the cache.
    pub(crate) fn forget_at(&mut self, seq: SeqId, is_gone: impl Fn(Pos) -> bool) {
        if let Some(record) = self.inner.records.get_mut(&seq) {
            record.forget(is_gone);
        }
    }

    /// Forgets the queries of positions from `p0` on.
    pub fn forget_from(&mut self, seq: SeqId, p0: Pos) {
        self.forget_at(seq, |pos| pos >= p0);
    }

    /// Decodes a batch of the followed sequences, and reads from it what is due. `wants_queries`: the batch ends within an observation
    /// window.
    ///
    /// # Errors
    /// Errors of decoding, or [`CaptureError`] if the graph is not of a known form.
    pub fn decode(&mut self, ctx: &mut Context, batch: &Batch, wants_queries: bool) -> Result<(), CaptureError> {
        self.check_context(ctx)?;
        if !self.reads(batch.len(), wants_queries) {
            ctx.decode(batch)?;
            self.pass(batch.len());
            return Ok(());
        }
        self.decode_as(Mode::Prompt { wants_queries }, ctx, batch)
    }

    /// Whether [`Self::decode`] reads anything from a batch of `n` tokens.
    pub(crate) fn reads(&self, n: usize, wants_queries: bool) -> bool {
        wants_queries || self.inner.records.values().any(|record| record.is_due(n))
    }

    /// Decodes tokens again to obtain their queries.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_again(&mut self, ctx: &mut Context, batch: &Batch) -> Result<(), CaptureError> {
        self.decode_as(Mode::Again, ctx, batch)
    }

    fn decode_as(&mut self, mode: Mode, ctx: &mut Context, batch: &Batch) -> Result<(), CaptureError> {
        self.inner.mode = mode;
        let result = self.during(ctx, |ctx| ctx.decode(batch));
        self.inner.mode = Mode::Listen;
        result
    }

    /// Records that `n` tokens of the followed sequences were decoded without being read.
    pub fn pass(&mut self, n: usize) {
        self.inner.records.values_mut().for_each(|record| record.count(n));
    }

    /// Decodes a batch of one ubatch and returns all queries of `seq` in it, layer by layer.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn replay(&mut self, ctx: &mut Context, seq: SeqId, batch: &Batch) -> Result<Vec<Queries>, CaptureError> {
        self.inner.mode = Mode::Replay(seq, vec![Queries::default(); self.inner.layers.len()]);
        let result = self.during(ctx, |ctx| ctx.decode(batch));
        let mode = std::mem::replace(&mut self.inner.mode, Mode::Listen);
        result?;
        match mode {
            Mode::Replay(_, queries) if queries.iter().all(|q| !q.pos.is_empty()) => Ok(queries),
            _ => Err(CaptureError::Empty),
        }
    }

    /// Returns the queries of the observation window of `seq` that ends at `pos_last`, oldest first, in the i-th layer of the cache. The
    /// last one is the current query.
    ///
    /// # Errors
    /// [`CaptureError::Empty`] if the query at `pos_last` was not captured.
    pub fn window(&self, seq: SeqId, layer: usize, pos_last: Pos) -> Result<Window<'_>, CaptureError> {
        let record = self.inner.records.get(&seq).ok_or(CaptureError::Empty)?;
        record.window(layer, self.inner.window, pos_last).ok_or(CaptureError::Empty)
    }

    /// Reads results that still lie on devices. An error is returned by the next call that can fail.
    pub(crate) fn settle(&mut self) {
        if let Err(error) = self.inner.settle() {
            self.inner.failed = Some(error);
        }
    }

    /// Frees the working memory if the cache is in host memory. It is allocated again when there is something to read.
    pub(crate) fn release(&mut self, layout: &Layout) {
        self.settle();
        if layout.is_host() && self.inner.failed.is_none() {
            self.inner.pending.clear();
            self.inner.devices.release();
        }
    }

    /// Whether every layer has statistics.
    pub(crate) fn has_statistics(&self, seq: SeqId) -> bool {
        self.inner.records.get(&seq).is_some_and(Record::has_moments)
    }

    /// Scaling of the attention logits in the i-th layer of the cache.
    pub fn logit_scale(&self, layer: usize) -> LogitScale {
        self.inner.layers[layer].scale
    }

    /// Mean and variance per channel of the hidden state that enters attention in the i-th layer of the cache.
    #[cfg(test)]
    pub fn statistics(&mut self, seq: SeqId, layer: usize) -> (Vec<f64>, Vec<f64>) {
        self.settle();
        self.inner.records.get(&seq).map(|record| record.statistics(layer)).unwrap_or_default()
    }

    /// Checks that this is the context whose graphs are read here.
    fn check_context(&self, ctx: &Context) -> Result<(), CaptureError> {
        if self.inner.ctx == ctx.as_ptr() { Ok(()) } else { Err(CaptureError::OtherContext) }
    }

    fn during<T>(
        &mut self,
        ctx: &mut Context,
        f: impl FnOnce(&mut Context) -> Result<T, LlamaError>,
    ) -> Result<T, CaptureError> {
        self.check_context(ctx)?;
        self.inner.settle()?;
        self.inner.is_alone = true;
        let result = watch::during(&mut self.inner, ctx, f);
        match self.failure() {
            Some(error) => Err(error),
            None => result,
        }
    }

    /// Takes the error that occurred in a part of a graph that [`Self::on_node`] ended.
    pub(crate) fn failure(&mut self) -> Option<CaptureError> {
        self.inner.failed.take()
    }

    /// Whether the current graph is a step of answers and `node` is its last node.
    pub(crate) fn ends_step(&self, node: &Node) -> bool {
        self.inner.reads.step && self.inner.is_last_node(node)
    }

    /// Returns the prompt tokens that an app decoded since the last call, as far as they could be timed, and the time that they took.
    pub(crate) fn take_read(&mut self) -> (usize, Duration) {
        std::mem::take(&mut self.inner.read)
    }

    /// Processes a node on behalf of a callback that is installed already: see [`watch::Watch`]. `is_alone`: no other callback needs to see
    /// the node.
    pub(crate) fn on_node(&mut self, node: &Node, ask: bool, is_alone: bool) -> Result<bool, CaptureError> {
        let ends_reading = self.inner.reading.is_some() && self.inner.is_last_node(node);
        self.inner.is_alone = is_alone;
        if ask {
            Ok(self.inner.ask(node)? || ends_reading)
        } else if ends_reading {
            self.inner.end_reading();
            Ok(true)
        } else {
            self.inner.read(node)
        }
    }
}
