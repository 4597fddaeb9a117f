//! What the prompt's forward pass tells: hidden-state statistics, the observation window's queries, and the probe pass.
//!
//! llama.cpp's eval callback sees every node of the graph. Of each layer that stores K and V in the cache we read
//! - `attn_norm-<il>` `[n_embd, n_tokens]`: the hidden state that enters attention. Its mean and variance per channel
//!   over the prompt are kept, streaming over ubatches;
//! - q at the attention op `[n_embd_head_k, n_tokens, n_head]`, rotated just as the cached K is: those of the newest
//!   `window` positions are kept as f16, what ggml makes of them anyway before it multiplies with an f16 cache.
//!
//! The **probe pass** turns sampled hidden states into queries with the model's own weights: dummy tokens are decoded in
//! an empty scratch sequence at the next positions, their `attn_norm` is overwritten, and q is read at the attention op.
//! Biases, q-norms, RoPE and rotation all happen where they always do. Of llama.cpp's graph only the nodes between
//! `attn_norm` and q are needed (a tenth of a layer's weights and none of its attention), so where they live in host
//! memory we compute just those, in place, before llama.cpp computes anything, and end the graph; elsewhere the graph
//! runs as it is.
//!
//! The callback is installed only around the decode calls that need it; a decoding step never meets it.

mod moments;
pub(crate) mod node;
mod probe;
mod state;
pub(crate) mod watch;

use std::collections::HashMap;

use half::f16;

use self::moments::Moments;
use self::node::Node;
use self::probe::Probe;
use self::watch::Watch;
use crate::cache::Layout;
use crate::llama::{Batch, Context, LlamaError, Pos, SeqId};
use crate::sys;

/// What can go wrong while reading the forward pass.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(
        "the model's graph has no `attn_norm` for layer {0}: this architecture is not supported yet; --policy full runs it as it is"
    )]
    NoHidden(i32),
    #[error("the model's attention uses {0}, which is not supported yet; --policy full runs it as it is")]
    Attention(&'static str),
    #[error(
        "the graph node {0} has an unexpected shape or type: this architecture is not supported yet; --policy full runs it as it is"
    )]
    Shape(String),
    #[error("nothing was captured: decode a prompt with the capture on before compressing")]
    Empty,
    #[error("the probe needs a second sequence: make the context with n_seq_max of at least 2")]
    NoScratch,
    #[error("the probe needs {needed} free cells and the cache has {free}: raise -c, or lower --samples")]
    NoCells { needed: usize, free: usize },
    #[error("out of memory in the probe: lower --samples, or -c")]
    Memory,
    #[error("internal error in the eval callback: {0}")]
    Panic(String),
    #[error(transparent)]
    Llama(#[from] LlamaError),
}

/// How a layer turns q·k into the argument of softmax: `post * tanh(pre * q·k)` with a softcap, else `post * q·k`.
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

struct LayerCapture {
    il: i32,
    k: *const sys::ggml_tensor,
    /// Floats of one token's queries: `n_head * n_embd_head_k`.
    n_q: usize,
    n_head: usize,
    moments: Moments,
    /// `[window][n_q]`; position p lives in slot p mod window.
    window_q: Vec<f16>,
    window_pos: Vec<Pos>,
    scale: LogitScale,
}

enum Mode {
    /// Collect statistics and the window's queries of a sequence.
    Prompt(SeqId),
    /// Overwrite hidden states by samples and collect the queries they become.
    Probe(Probe),
    /// Collect all queries of a sequence, layer by layer.
    Replay(SeqId, Vec<Queries>),
}

/// Queries of one layer. `[n_query][n_head][n_embd_head_k]`
#[derive(Clone, Debug, Default)]
pub struct Queries {
    pub data: Vec<f16>,
    pub pos: Vec<Pos>,
}

struct Inner {
    ctx: *mut sys::llama_context,
    layout: Layout,
    n_embd: usize,
    window: usize,
    /// First positions left out of the statistics: attention sinks have hidden states like no other token.
    skip: usize,
    layers: Vec<LayerCapture>,
    by_il: HashMap<i32, usize>,
    by_tensor: HashMap<*const sys::ggml_tensor, usize>,
    mode: Mode,
    /// Position of each token of the ubatch in work (-1: another sequence); unknown until K is stored.
    rows: Option<Vec<Pos>>,
    /// The first layer's hidden states, held back until the rows are known. `[n_tokens][n_embd]`
    pending: Vec<f32>,
    scratch: Vec<u8>,
}

/// Reads what the forward passes of one sequence tell. One per sequence.
pub struct Capture {
    inner: Inner,
}

// SAFETY: raw pointers are followed only inside `watch::during`, which holds the context.
unsafe impl Send for Capture {}

impl Capture {
    /// A capture for the cache that `layout` describes. `window`: newest queries to keep; `skip`: first positions that
    /// stay out of the statistics.
    pub fn new(ctx: &Context, layout: &Layout, window: usize, skip: usize) -> Self {
        let layers: Vec<_> = layout
            .layers
            .iter()
            .map(|l| {
                let n_q = (l.n_head * l.n_embd_head_k) as usize;
                LayerCapture {
                    il: l.il,
                    k: l.k,
                    n_q,
                    n_head: l.n_head as usize,
                    moments: Moments::default(),
                    window_q: vec![f16::ZERO; window * n_q],
                    window_pos: vec![-1; window],
                    scale: LogitScale::default(),
                }
            })
            .collect();
        Self {
            inner: Inner {
                ctx: ctx.as_ptr(),
                layout: layout.clone(),
                n_embd: ctx.model().n_embd(),
                window,
                skip,
                by_il: layers.iter().enumerate().map(|(i, l)| (l.il, i)).collect(),
                by_tensor: layers.iter().enumerate().map(|(i, l)| (l.k, i)).collect(),
                layers,
                mode: Mode::Prompt(0),
                rows: None,
                pending: Vec::new(),
                scratch: Vec::new(),
            },
        }
    }

    /// Forgets everything captured.
    pub fn reset(&mut self) {
        for layer in &mut self.inner.layers {
            layer.moments = Moments::default();
            layer.window_pos.fill(-1);
        }
    }

    /// Forgets the queries of positions from `p0` on: they were removed from the cache.
    pub fn forget_from(&mut self, p0: Pos) {
        for layer in &mut self.inner.layers {
            for pos in layer.window_pos.iter_mut().filter(|p| **p >= p0) {
                *pos = -1;
            }
        }
    }

    /// Decodes a batch with the capture on, collecting what belongs to `seq`.
    ///
    /// # Errors
    /// What decoding fails with, or [`CaptureError`] when the graph is not one we know.
    pub fn decode(&mut self, ctx: &mut Context, seq: SeqId, batch: &Batch) -> Result<(), CaptureError> {
        self.inner.mode = Mode::Prompt(seq);
        self.during(ctx, |ctx| ctx.decode(batch))
    }

    /// Decodes a batch of one ubatch and gives back all queries of `seq` in it, layer by layer.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn replay(&mut self, ctx: &mut Context, seq: SeqId, batch: &Batch) -> Result<Vec<Queries>, CaptureError> {
        self.inner.rows = None;
        self.inner.mode = Mode::Replay(seq, vec![Queries::default(); self.inner.layers.len()]);
        let result = self.during(ctx, |ctx| ctx.decode(batch));
        let mode = std::mem::replace(&mut self.inner.mode, Mode::Prompt(0));
        result?;
        match mode {
            Mode::Replay(_, queries) if queries.iter().all(|q| !q.pos.is_empty()) => Ok(queries),
            _ => Err(CaptureError::Empty),
        }
    }

    /// The queries of the observation window that ends at `pos_last`, oldest first, in the i-th layer of the cache; the last
    /// one is the current query.
    ///
    /// # Errors
    /// [`CaptureError::Empty`] when the query at `pos_last` was not captured.
    pub fn window(&self, layer: usize, pos_last: Pos) -> Result<Queries, CaptureError> {
        let layer = &self.inner.layers[layer];
        let window = self.inner.window;
        let mut out = Queries::default();
        for pos in (pos_last - window as Pos + 1).max(0)..=pos_last {
            let slot = pos as usize % window;
            if layer.window_pos[slot] == pos {
                out.data.extend_from_slice(&layer.window_q[slot * layer.n_q..][..layer.n_q]);
                out.pos.push(pos);
            }
        }
        if out.pos.last() == Some(&pos_last) { Ok(out) } else { Err(CaptureError::Empty) }
    }

    /// How the i-th layer of the cache scales its attention logits.
    pub fn logit_scale(&self, layer: usize) -> LogitScale {
        self.inner.layers[layer].scale
    }

    /// Mean and variance per channel of the hidden state that enters attention in the i-th layer of the cache.
    pub fn statistics(&self, layer: usize) -> (Vec<f64>, Vec<f64>) {
        let m = &self.inner.layers[layer].moments;
        (m.mean.clone(), m.m2.iter().map(|s| s / m.count.max(1.0)).collect())
    }

    fn during<T>(
        &mut self,
        ctx: &mut Context,
        f: impl FnOnce(&mut Context) -> Result<T, LlamaError>,
    ) -> Result<T, CaptureError> {
        debug_assert_eq!(self.inner.ctx, ctx.as_ptr());
        watch::during(&mut self.inner, ctx, f)
    }
}

/// The attention op of a layer, by its operands.
struct Attention<'a> {
    q: Node<'a>,
    layer: usize,
}

impl Watch for Inner {
    type Error = CaptureError;

    fn ask(&mut self, node: &Node) -> Result<bool, CaptureError> {
        match node.0.op {
            sys::GGML_OP_SET_ROWS => {
                self.note_rows(node)?;
                Ok(false)
            }
            sys::GGML_OP_SOFT_MAX => {
                self.note_scale(node)?;
                Ok(false)
            }
            sys::GGML_OP_FLASH_ATTN_EXT | sys::GGML_OP_MUL_MAT => {
                let Some(attention) = self.attention(node) else {
                    return Ok(false);
                };
                if node.0.op == sys::GGML_OP_FLASH_ATTN_EXT {
                    self.note_flash_scale(node, attention.layer)?;
                }
                if matches!(self.mode, Mode::Probe(_)) && attention.q.is_in_host_memory() {
                    self.take_path(&attention)?;
                    return Ok(false);
                }
                Ok(self.wants_queries())
            }
            sys::GGML_OP_MUL | sys::GGML_OP_ADD | sys::GGML_OP_RMS_NORM | sys::GGML_OP_NORM => {
                let wanted = match self.mode {
                    Mode::Prompt(_) => true,
                    Mode::Probe(_) => !node.is_in_host_memory(),
                    Mode::Replay(..) => false,
                };
                Ok(wanted && self.hidden_layer(node).is_some())
            }
            _ => Ok(false),
        }
    }

    fn read(&mut self, node: &Node) -> Result<bool, CaptureError> {
        if let Some(layer) = self.hidden_layer(node) {
            self.on_hidden(node, layer)?;
        } else if let Some(attention) = self.attention(node) {
            self.on_queries(&attention)?;
            // Nobody wants the logits of a probe: what follows the last attention need not run.
            let is_probe = matches!(self.mode, Mode::Probe(_));
            return Ok(!(is_probe && attention.layer + 1 == self.layers.len()));
        }
        Ok(true)
    }

    fn panicked(text: String) -> CaptureError {
        CaptureError::Panic(text)
    }
}

impl Inner {
    fn hidden_layer(&self, node: &Node) -> Option<usize> {
        self.by_il.get(&node.layer_after("attn_norm")?).copied()
    }

    fn attention<'a>(&self, node: &Node<'a>) -> Option<Attention<'a>> {
        let (k, q) = match node.0.op {
            sys::GGML_OP_FLASH_ATTN_EXT => (node.src(1)?, node.src(0)?),
            sys::GGML_OP_MUL_MAT if node.name().to_bytes().starts_with(b"kq-") => (node.src(0)?, node.src(1)?),
            _ => return None,
        };
        let layer = *self.by_tensor.get(&k.storage())?;
        Some(Attention { q, layer })
    }

    /// Whether the ubatch holds tokens whose queries are of use.
    fn wants_queries(&self) -> bool {
        match (&self.mode, &self.rows) {
            (Mode::Probe(_), _) => true,
            (_, Some(rows)) => rows.iter().any(|p| *p >= 0),
            (_, None) => false,
        }
    }

    /// K is about to be stored: the row indices say which cells, and so which positions, the ubatch's tokens have.
    fn note_rows(&mut self, node: &Node) -> Result<(), CaptureError> {
        let (Mode::Prompt(seq) | Mode::Replay(seq, _)) = self.mode else {
            return Ok(());
        };
        // SET_ROWS keeps the destination in src[2]; its result is a view of it
        if self.rows.is_some() || !self.by_tensor.contains_key(&node.storage()) {
            return Ok(());
        }
        let idxs = node.src(1).ok_or_else(|| node.shape_error())?;
        if idxs.0.type_ != sys::GGML_TYPE_I64 {
            return Err(idxs.shape_error());
        }
        let n = idxs.0.ne[0] as usize;
        let mut bytes = vec![0u8; n * size_of::<i64>()];
        idxs.get(0, &mut bytes);
        let first = i64::from(self.layout.info.stream) * i64::from(self.layout.info.n_cells);
        let cells: Vec<u32> = bytes
            .chunks_exact(size_of::<i64>())
            .map(|b| i64::from_le_bytes(b.try_into().expect("chunks of eight")) - first)
            .map(|i| u32::try_from(i).unwrap_or(u32::MAX))
            .collect();
        let mut pos = vec![-1; n];
        // SAFETY: both arrays have n entries; the cache was accepted by the shim.
        unsafe {
            sys::gvote_shim_cells_pos(self.ctx, seq, cells.as_ptr(), n as u32, pos.as_mut_ptr());
        }
        self.rows = Some(pos);
        if let Mode::Prompt(_) = self.mode {
            let pending = std::mem::take(&mut self.pending);
            self.add_moments(0, &pending);
            self.pending = pending;
        }
        Ok(())
    }

    fn note_flash_scale(&mut self, node: &Node, layer: usize) -> Result<(), CaptureError> {
        if node.src(4).is_some() {
            return Err(CaptureError::Attention("learned attention sinks"));
        }
        let (scale, softcap) = (node.param(0), node.param(2));
        self.layers[layer].scale = if softcap > 0.0 {
            LogitScale { pre: scale / softcap, post: softcap, softcap: true }
        } else {
            LogitScale { pre: 1.0, post: scale, softcap: false }
        };
        Ok(())
    }

    fn note_scale(&mut self, node: &Node) -> Result<(), CaptureError> {
        let Some(&layer) = node.layer_after("kq_soft_max").and_then(|il| self.by_il.get(&il)) else {
            return Ok(());
        };
        if node.src(2).is_some() {
            return Err(CaptureError::Attention("learned attention sinks"));
        }
        let (scale, softcap) = (node.param(0), self.layout.info.softcap);
        // without flash attention llama.cpp caps the bare product and scales afterwards
        self.layers[layer].scale = if softcap > 0.0 {
            LogitScale { pre: 1.0 / softcap, post: softcap * scale, softcap: true }
        } else {
            LogitScale { pre: 1.0, post: scale, softcap: false }
        };
        Ok(())
    }

    fn on_hidden(&mut self, node: &Node, layer: usize) -> Result<(), CaptureError> {
        let [n_embd, n_tokens, ..] = node.0.ne;
        // SAFETY: plain query of a valid tensor.
        let contiguous = unsafe { sys::ggml_is_contiguous(node.0) };
        if node.0.type_ != sys::GGML_TYPE_F32 || n_embd as usize != self.n_embd || !contiguous {
            return Err(node.shape_error());
        }
        let n_tokens = n_tokens as usize;
        if let Mode::Probe(_) = self.mode {
            self.inject(node, layer, n_tokens);
            return Ok(());
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let data = node.floats(&mut scratch);
        if layer == 0 {
            self.rows = None;
            self.pending.clear();
            self.pending.extend_from_slice(data);
        } else {
            self.add_moments(layer, data);
        }
        self.scratch = scratch;
        Ok(())
    }

    fn add_moments(&mut self, layer: usize, data: &[f32]) {
        let Some(rows) = &self.rows else { return };
        let skip = self.skip as Pos;
        let kept = data.chunks_exact(self.n_embd).zip(rows).filter(|(_, pos)| **pos >= skip).map(|(row, _)| row);
        self.layers[layer].moments.merge(self.n_embd, kept);
    }

    fn on_queries(&mut self, attention: &Attention) -> Result<(), CaptureError> {
        let (q, layer) = (attention.q, attention.layer);
        let n_q = self.layers[layer].n_q;
        let n_head = self.layers[layer].n_head;
        let head_size = n_q / n_head;
        let [d, n_tok, heads, n_stream] = q.0.ne;
        if q.0.type_ != sys::GGML_TYPE_F32
            || d as usize != head_size
            || heads as usize != n_head
            || q.0.nb[0] != size_of::<f32>()
        {
            return Err(q.shape_error());
        }
        let n_tokens = (n_tok * n_stream) as usize;
        let wanted: Vec<(usize, usize, Pos)> = match &self.mode {
            Mode::Probe(probe) => (0..n_tokens).map(|row| (row, probe.done + row, 0)).collect(),
            Mode::Replay(..) => {
                let rows = self.rows.as_deref().unwrap_or_default().iter().enumerate();
                rows.filter(|(_, pos)| **pos >= 0).enumerate().map(|(slot, (row, pos))| (row, slot, *pos)).collect()
            }
            Mode::Prompt(_) => {
                let rows = self.rows.as_deref().unwrap_or_default();
                let newest = rows.iter().copied().max().unwrap_or(-1);
                let oldest = (newest - self.window as Pos + 1).max(0);
                rows.iter()
                    .enumerate()
                    .filter(|(_, pos)| **pos >= oldest)
                    .map(|(row, pos)| (row, *pos as usize % self.window, *pos))
                    .collect()
            }
        };
        let token_at = |row: usize| row % n_tok as usize * q.0.nb[1] + row / n_tok as usize * q.0.nb[3];
        let Some(first) = wanted.iter().map(|w| token_at(w.0)).min() else { return Ok(()) };
        let last = wanted.iter().map(|w| token_at(w.0)).max().unwrap_or(first);
        // one transfer: a device answers many small ones slowly
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(last - first + (n_head - 1) * q.0.nb[2] + head_size * size_of::<f32>(), 0);
        q.get(first, &mut scratch);
        if let Mode::Replay(_, queries) = &mut self.mode {
            queries[layer].data.resize(wanted.len() * n_q, f16::ZERO);
            queries[layer].pos = wanted.iter().map(|w| w.2).collect();
        }
        for (row, slot, pos) in wanted {
            let out = match &mut self.mode {
                Mode::Probe(probe) => &mut probe.queries[layer],
                Mode::Replay(_, queries) => &mut queries[layer].data,
                Mode::Prompt(_) => {
                    self.layers[layer].window_pos[slot] = pos;
                    &mut self.layers[layer].window_q
                }
            };
            let out = &mut out[slot * n_q..][..n_q];
            for (h, out) in out.chunks_exact_mut(head_size).enumerate() {
                let bytes = &scratch[token_at(row) - first + h * q.0.nb[2]..];
                for (x, b) in out.iter_mut().zip(bytes.chunks_exact(size_of::<f32>())) {
                    *x = f16::from_f32(f32::from_le_bytes(b.try_into().expect("chunks of four")));
                }
            }
        }
        self.scratch = scratch;
        Ok(())
    }
}
