//! What the prompt's forward pass tells: hidden-state statistics, the observation window's queries, and the probe pass.
//!
//! llama.cpp's eval callback sees every node of the graph. Of each layer that stores K and V in the cache we read
//! - `attn_norm-<il>` `[n_embd, n_tokens]`: the hidden state that enters attention. Its mean and variance per channel
//!   over the prompt are kept, streaming over ubatches;
//! - q at the attention op `[n_embd_head_k, n_tokens, n_head]`, rotated just as the cached K is: those of the newest
//!   `window` positions are kept as f16, what ggml makes of them anyway before it multiplies with an f16 cache.
//!
//! The **probe pass** turns sampled hidden states into queries with the model's own weights: dummy tokens are decoded at the
//! next positions while the sequence is parked, their `attn_norm` is overwritten, and q is read at the attention op.
//! Biases, q-norms, RoPE and rotation all happen where they always do. Of llama.cpp's graph only the nodes between
//! `attn_norm` and q are needed (a tenth of a layer's weights and none of its attention), so where they live in host
//! memory we compute just those, in place, before llama.cpp computes anything, and end the graph; elsewhere the graph
//! runs as it is.
//!
//! One capture serves all sequences of a context: which of them a token belongs to is known when K is stored, by the cells
//! that the rows go to.
//!
//! In a context of our own the callback is installed only around the decode calls that need it; a decoding step never meets
//! it. In a context of an app it stays (see [`crate::guest`]).

mod moments;
pub(crate) mod node;
mod probe;
mod record;
mod state;
pub(crate) mod watch;

use std::collections::{BTreeMap, HashMap};

use half::f16;

use self::node::Node;
use self::probe::Probe;
use self::record::Record;
pub(crate) use self::record::Seen;
pub(crate) use self::state::Restored;
use self::watch::Watch;
use crate::cache::{self, CacheError, Layout};
use crate::llama::{Batch, Context, LlamaError, Pos, SeqId};
use crate::sys;

/// What can go wrong while reading the forward pass.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("the model's graph has no `attn_norm` for layer {0}: this architecture is not supported yet")]
    NoHidden(i32),
    #[error("the model's attention uses {0}, which is not supported yet")]
    Attention(&'static str),
    #[error("the graph node {0} has an unexpected shape or type: this architecture is not supported yet")]
    Shape(String),
    #[error("nothing was captured: decode a prompt with the capture on before compressing")]
    Empty,
    #[error("the probe needs {needed} free cells and the cache has {free}: raise -c, or lower --samples")]
    NoCells { needed: usize, free: usize },
    #[error("out of memory in the probe")]
    Memory,
    #[error("internal error in the eval callback: {0}")]
    Panic(String),
    #[error(transparent)]
    Cache(#[from] CacheError),
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

/// What is the same for every sequence in one layer of the cache.
struct Layer {
    il: i32,
    /// Floats of one token's queries: `n_head * n_embd_head_k`.
    n_q: usize,
    n_head: usize,
    scale: LogitScale,
}

enum Mode {
    /// Collect statistics and the window's queries of every sequence that is followed.
    Prompt,
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
    n_embd: usize,
    softcap: f32,
    window: usize,
    /// First positions left out of the statistics: attention sinks have hidden states like no other token.
    skip: usize,
    layers: Vec<Layer>,
    by_il: HashMap<i32, usize>,
    by_tensor: HashMap<*const sys::ggml_tensor, usize>,
    mode: Mode,
    records: BTreeMap<SeqId, Record>,
    /// Follow every sequence that shows up, and keep a list of its tokens.
    follows_all: bool,
    /// Whether the cells of the ubatch in work are known: they are when K is stored.
    rows_known: bool,
    /// The first layer's hidden states, held back until then. `[n_tokens][n_embd]`
    pending: Vec<f32>,
    scratch: Vec<u8>,
}

/// Reads what the forward passes of a context tell, sequence by sequence.
pub struct Capture {
    inner: Inner,
}

// SAFETY: raw pointers are followed only while a graph of the context is in work.
unsafe impl Send for Capture {}

impl Capture {
    /// A capture for the cache that `layout` describes, which follows no sequence yet. `window`: newest queries to keep;
    /// `skip`: first positions that stay out of the statistics.
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
                mode: Mode::Prompt,
                records: BTreeMap::new(),
                follows_all: false,
                rows_known: false,
                pending: Vec::new(),
                scratch: Vec::new(),
            },
        }
    }

    /// Follows a sequence from now on.
    pub fn follow(&mut self, seq: SeqId) {
        let Inner { records, layers, window, .. } = &mut self.inner;
        records.entry(seq).or_insert_with(|| Record::new(layers, *window));
    }

    /// Follows whatever sequence shows up, and lists its tokens for [`Self::take_seen`].
    pub(crate) fn follow_all(&mut self) {
        self.inner.follows_all = true;
    }

    /// What was decoded since the last call, by sequence and in order.
    pub(crate) fn take_seen(&mut self) -> Vec<(SeqId, Vec<Seen>)> {
        self.inner.records.iter_mut().map(|(seq, record)| (*seq, record.take_seen())).collect()
    }

    /// Forgets everything captured of a sequence.
    pub fn reset(&mut self, seq: SeqId) {
        self.inner.records.remove(&seq);
        if !self.inner.follows_all {
            self.follow(seq);
        }
    }

    /// Forgets the queries of positions from `p0` on: they were removed from the cache.
    pub fn forget_from(&mut self, seq: SeqId, p0: Pos) {
        if let Some(record) = self.inner.records.get_mut(&seq) {
            record.forget_from(p0);
        }
    }

    /// Decodes a batch with the capture on.
    ///
    /// # Errors
    /// What decoding fails with, or [`CaptureError`] when the graph is not one we know.
    pub fn decode(&mut self, ctx: &mut Context, batch: &Batch) -> Result<(), CaptureError> {
        self.inner.mode = Mode::Prompt;
        self.during(ctx, |ctx| ctx.decode(batch))
    }

    /// Decodes a batch of one ubatch and gives back all queries of `seq` in it, layer by layer.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn replay(&mut self, ctx: &mut Context, seq: SeqId, batch: &Batch) -> Result<Vec<Queries>, CaptureError> {
        self.inner.rows_known = false;
        self.inner.mode = Mode::Replay(seq, vec![Queries::default(); self.inner.layers.len()]);
        let result = self.during(ctx, |ctx| ctx.decode(batch));
        let mode = std::mem::replace(&mut self.inner.mode, Mode::Prompt);
        result?;
        match mode {
            Mode::Replay(_, queries) if queries.iter().all(|q| !q.pos.is_empty()) => Ok(queries),
            _ => Err(CaptureError::Empty),
        }
    }

    /// The queries of the observation window of `seq` that ends at `pos_last`, oldest first, in the i-th layer of the cache;
    /// the last one is the current query.
    ///
    /// # Errors
    /// [`CaptureError::Empty`] when the query at `pos_last` was not captured.
    pub fn window(&self, seq: SeqId, layer: usize, pos_last: Pos) -> Result<Queries, CaptureError> {
        let record = self.inner.records.get(&seq).ok_or(CaptureError::Empty)?;
        record.window(layer, self.inner.window, pos_last).ok_or(CaptureError::Empty)
    }

    /// How the i-th layer of the cache scales its attention logits.
    pub fn logit_scale(&self, layer: usize) -> LogitScale {
        self.inner.layers[layer].scale
    }

    /// Mean and variance per channel of the hidden state that enters attention in the i-th layer of the cache.
    pub fn statistics(&self, seq: SeqId, layer: usize) -> (Vec<f64>, Vec<f64>) {
        self.inner.records.get(&seq).map(|record| record.statistics(layer)).unwrap_or_default()
    }

    fn during<T>(
        &mut self,
        ctx: &mut Context,
        f: impl FnOnce(&mut Context) -> Result<T, LlamaError>,
    ) -> Result<T, CaptureError> {
        debug_assert_eq!(self.inner.ctx, ctx.as_ptr());
        watch::during(&mut self.inner, ctx, f)
    }

    /// Looks at a node for somebody who has the callback installed already: see [`watch::Watch`].
    pub(crate) fn on_node(&mut self, node: &Node, ask: bool) -> Result<bool, CaptureError> {
        if ask { self.inner.ask(node) } else { self.inner.read(node) }
    }
}

/// The attention op of a layer, by its operands.
struct Attention<'a> {
    q: Node<'a>,
    layer: usize,
}

/// A row of q that is wanted, and where it goes.
struct Wanted {
    row: usize,
    seq: SeqId,
    slot: usize,
    pos: Pos,
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
                    Mode::Prompt => true,
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
        match &self.mode {
            Mode::Probe(_) => true,
            Mode::Prompt => self.rows_known && self.records.values().any(|record| !record.rows.is_empty()),
            Mode::Replay(seq, _) => {
                self.rows_known && self.records.get(seq).is_some_and(|record| !record.rows.is_empty())
            }
        }
    }

    /// K is about to be stored: the row indices say which cells, and so which sequences and positions, the ubatch's tokens
    /// have.
    fn note_rows(&mut self, node: &Node) -> Result<(), CaptureError> {
        // SET_ROWS keeps the destination in src[2]; its result is a view of it
        if self.rows_known || matches!(self.mode, Mode::Probe(_)) || !self.by_tensor.contains_key(&node.storage()) {
            return Ok(());
        }
        let idxs = node.src(1).ok_or_else(|| node.shape_error())?;
        if idxs.0.type_ != sys::GGML_TYPE_I64 {
            return Err(idxs.shape_error());
        }
        let mut bytes = vec![0u8; idxs.0.ne[0] as usize * size_of::<i64>()];
        idxs.get(0, &mut bytes);
        let cells: Vec<i64> = bytes
            .chunks_exact(size_of::<i64>())
            .map(|b| i64::from_le_bytes(b.try_into().expect("chunks of eight")))
            .collect();
        if let Mode::Prompt = self.mode
            && self.follows_all
        {
            // SAFETY: the context is decoding, and its layout was accepted.
            for seq in unsafe { cache::owners(self.ctx, &cells) } {
                self.records.entry(seq).or_insert_with(|| Record::new(&self.layers, self.window));
            }
        }
        self.rows_known = true;
        for (seq, record) in &mut self.records {
            // SAFETY: as above.
            let rows = unsafe { cache::rows(self.ctx, *seq, &cells) };
            let own = rows.iter().enumerate().filter(|(_, row)| row.pos >= 0);
            record.rows = own.map(|(i, row)| (i, row.pos)).collect();
            if let Mode::Prompt = self.mode {
                if self.follows_all {
                    record.list(&cells, &rows);
                }
                record.add_moments(0, &self.pending, self.n_embd, self.skip);
            }
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
        let (scale, softcap) = (node.param(0), self.softcap);
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
            self.rows_known = false;
            self.pending.clear();
            self.pending.extend_from_slice(data);
        } else if self.rows_known {
            for record in self.records.values_mut() {
                record.add_moments(layer, data, self.n_embd, self.skip);
            }
        }
        self.scratch = scratch;
        Ok(())
    }

    /// The rows of q that are wanted of this ubatch.
    fn wanted(&self, n_tokens: usize) -> Vec<Wanted> {
        match &self.mode {
            Mode::Probe(probe) => {
                (0..n_tokens).map(|row| Wanted { row, seq: 0, slot: probe.done + row, pos: 0 }).collect()
            }
            Mode::Replay(seq, _) => {
                let rows = self.records.get(seq).map_or(&[][..], |record| &record.rows);
                rows.iter().enumerate().map(|(slot, &(row, pos))| Wanted { row, seq: *seq, slot, pos }).collect()
            }
            Mode::Prompt => {
                let of_record = |(seq, record): (&SeqId, &Record)| {
                    let newest = record.rows.iter().map(|row| row.1).max().unwrap_or(-1);
                    let oldest = (newest - self.window as Pos + 1).max(0);
                    let (seq, window) = (*seq, self.window);
                    let in_window = record.rows.iter().filter(move |row| row.1 >= oldest);
                    in_window.map(move |&(row, pos)| Wanted { row, seq, slot: pos as usize % window, pos }).collect()
                };
                self.records.iter().flat_map(|entry| -> Vec<Wanted> { of_record(entry) }).collect()
            }
        }
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
        let wanted = self.wanted(n_tokens);
        let token_at = |row: usize| row % n_tok as usize * q.0.nb[1] + row / n_tok as usize * q.0.nb[3];
        let Some(first) = wanted.iter().map(|w| token_at(w.row)).min() else { return Ok(()) };
        let last = wanted.iter().map(|w| token_at(w.row)).max().unwrap_or(first);
        // one transfer: a device answers many small ones slowly
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(last - first + (n_head - 1) * q.0.nb[2] + head_size * size_of::<f32>(), 0);
        q.get(first, &mut scratch);
        if let Mode::Replay(_, queries) = &mut self.mode {
            queries[layer].data.resize(wanted.len() * n_q, f16::ZERO);
            queries[layer].pos = wanted.iter().map(|w| w.pos).collect();
        }
        for Wanted { row, seq, slot, pos } in wanted {
            let out = match &mut self.mode {
                Mode::Probe(probe) => &mut probe.queries[layer],
                Mode::Replay(_, queries) => &mut queries[layer].data,
                Mode::Prompt => match self.records.get_mut(&seq) {
                    Some(record) => record.window_at(layer, slot, pos),
                    None => continue,
                },
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
