//! Selects the nodes of the current graph that are read, and processes their data.

use std::ops::Range;
use std::time::Instant;

use super::moments::Block;
use super::node::Node;
use super::record::Record;
use super::watch::Watch;
use super::{CaptureError, Inner, LogitScale, Mode, Reads};
use crate::backend::{Builder, Tensor};
use crate::cache;
use crate::llama::{Pos, SeqId};
use crate::sys;

/// The attention op of a layer and its operands.
pub(super) struct Attention<'a> {
    pub op: Node<'a>,
    pub q: Node<'a>,
    pub layer: usize,
}

impl Attention<'_> {
    /// Number of tokens in q. With several streams in the cache they are split over a fourth dimension.
    pub fn n_tokens(&self) -> usize {
        let [_, n_tok, _, n_stream] = self.q.0.ne;
        (n_tok * n_stream) as usize
    }
}

/// A row of q to be copied, and its destination.
pub(super) struct Wanted {
    pub row: usize,
    pub seq: SeqId,
    pub slot: usize,
    pub pos: Pos,
}

impl Watch for Inner {
    type Error = CaptureError;

    fn ask(&mut self, node: &Node) -> Result<bool, CaptureError> {
        if self.failed.is_some() {
            return Ok(false);
        }
        if let Mode::Probe(probe) = &self.mode {
            return Ok(self.asks_for(probe.way, node));
        }
        match node.0.op {
            sys::GGML_OP_SET_ROWS => {
                if self.stores_first_k(node) && !std::mem::take(&mut self.reads.begun) {
                    self.begin(node)?;
                }
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
                Ok(self.reads.queries)
            }
            sys::GGML_OP_MUL | sys::GGML_OP_ADD | sys::GGML_OP_RMS_NORM | sys::GGML_OP_NORM => {
                let Some(layer) = self.hidden_layer(node) else {
                    return Ok(false);
                };
                if layer == 0 {
                    // SAFETY: called from inside the graph.
                    let stored = unsafe { nodes(self.ctx) }.find(|node| self.stores_first_k(node));
                    self.begin(&stored.ok_or_else(|| node.shape_error())?)?;
                    self.reads.begun = true;
                }
                Ok(self.reads.hidden)
            }
            _ => Ok(false),
        }
    }

    fn read(&mut self, node: &Node) -> Result<bool, CaptureError> {
        if let Mode::Probe(_) = self.mode {
            return self.read_probe(node);
        }
        if self.take(node)? {
            self.end_ubatch()?;
        } else if self.is_alone
            && let Some(part) = self.part_behind(node)
        {
            return Ok(!self.go_on(&part));
        }
        Ok(true)
    }

    fn panicked(text: String) -> CaptureError {
        CaptureError::Panic(text)
    }
}

/// Shortest ubatch that tells how fast a prompt is read: shorter ones are bound by reading the weights.
const LEAST_TIMED: usize = 32;

/// Number of rows of a tensor with any number of dimensions.
fn rows_of(node: &Node) -> usize {
    node.0.ne[1..].iter().map(|&n| n as usize).product()
}

/// Returns the nodes of the graph that a context is computing.
///
/// # Safety
/// Must be called from inside that graph, for which `'a` lasts.
pub(super) unsafe fn nodes<'a>(ctx: *mut sys::llama_context) -> impl Iterator<Item = Node<'a>> {
    // SAFETY: see above.
    unsafe {
        let graph = sys::gvote_shim_graph(ctx);
        let n = if graph.is_null() { 0 } else { sys::ggml_graph_n_nodes(graph) };
        (0..n).map(move |i| Node::new(sys::ggml_graph_node(graph, i)))
    }
}

/// Returns the last node of that graph.
///
/// # Safety
/// As for [`nodes`].
pub(super) unsafe fn last_node<'a>(ctx: *mut sys::llama_context) -> Option<Node<'a>> {
    // SAFETY: as above.
    unsafe {
        let graph = sys::gvote_shim_graph(ctx);
        let has_nodes = !graph.is_null() && sys::ggml_graph_n_nodes(graph) > 0;
        has_nodes.then(|| Node::new(sys::ggml_graph_node(graph, -1)))
    }
}

impl Inner {
    /// Processes a node that is read. Returns whether it is the last such node of its ubatch.
    pub(super) fn take(&mut self, node: &Node) -> Result<bool, CaptureError> {
        if let Some(layer) = self.hidden_layer(node) {
            self.on_hidden(node, layer)?;
            Ok(!self.reads.queries && self.is_last(layer))
        } else if let Some(attention) = self.attention(node) {
            self.on_queries(&attention)?;
            Ok(self.is_last(attention.layer))
        } else {
            Ok(false)
        }
    }

    fn is_last(&self, layer: usize) -> bool {
        layer + 1 == self.layers.len()
    }

    /// Whether `node` is the last node of the current graph.
    pub(super) fn is_last_node(&self, node: &Node) -> bool {
        // SAFETY: called from inside the graph.
        unsafe { last_node(self.ctx) }.is_some_and(|last| std::ptr::eq(last.0, node.0))
    }

    /// Records that a ubatch of a prompt was completed.
    pub(super) fn end_reading(&mut self) {
        if let Some((n, since)) = self.reading.take() {
            self.read.0 += n;
            self.read.1 += since.elapsed();
        }
    }

    pub(super) fn stores_first_k(&self, node: &Node) -> bool {
        node.0.op == sys::GGML_OP_SET_ROWS && self.by_tensor.get(&node.storage()) == Some(&0)
    }

    pub(super) fn hidden_layer(&self, node: &Node) -> Option<usize> {
        self.by_il.get(&node.layer_after("attn_norm")?).copied()
    }

    pub(super) fn attention<'a>(&self, node: &Node<'a>) -> Option<Attention<'a>> {
        let (k, q) = match node.0.op {
            sys::GGML_OP_FLASH_ATTN_EXT => (node.src(1)?, node.src(0)?),
            sys::GGML_OP_MUL_MAT if node.name().to_bytes().starts_with(b"kq-") => (node.src(0)?, node.src(1)?),
            _ => return None,
        };
        // for a cache in f32, flash attention reads a copy in f16
        let k = if k.0.op == sys::GGML_OP_CPY { k.src(0)? } else { k };
        // with weights in host memory a GPU may compute a layer's attention, for which it gets a copy of K
        // SAFETY: called from inside the graph.
        let k = k.original(unsafe { sys::gvote_shim_graph(self.ctx) }).unwrap_or(k);
        let layer = *self.by_tensor.get(&k.storage())?;
        Some(Attention { op: *node, q, layer })
    }

    /// Examines a ubatch: the rows to which K is about to be written give the cells, and thus the sequences and positions, of its tokens.
    /// Then decides what to read of the ubatch.
    fn begin(&mut self, stored: &Node) -> Result<(), CaptureError> {
        self.settle()?;
        // SET_ROWS keeps the destination in src[2]; its result is a view of it
        let idxs = stored.src(1).ok_or_else(|| stored.shape_error())?;
        if idxs.0.type_ != sys::GGML_TYPE_I64 {
            return Err(idxs.shape_error());
        }
        let mut bytes = vec![0u8; idxs.0.ne[0] as usize * size_of::<i64>()];
        idxs.get(0, &mut bytes)?;
        let cells: Vec<i64> = bytes
            .chunks_exact(size_of::<i64>())
            .map(|b| i64::from_le_bytes(b.try_into().expect("chunks of eight")))
            .collect();
        if let Mode::Listen = self.mode {
            // SAFETY: the context is decoding, and its layout was accepted.
            for seq in unsafe { cache::owners(self.ctx, &cells) } {
                self.records.entry(seq).or_insert_with(|| Record::new(&self.layers, self.window));
            }
        }
        let mut reads = Reads::default();
        for (seq, record) in &mut self.records {
            // SAFETY: as above.
            let rows = unsafe { cache::rows(self.ctx, *seq, &cells) };
            let own = rows.iter().enumerate().filter(|(_, row)| row.pos >= 0);
            record.rows = own.map(|(i, row)| (i, row.pos)).collect();
            if record.rows.is_empty() {
                continue;
            }
            match self.mode {
                Mode::Listen => {
                    record.list(&cells, &rows);
                    // embeddings cannot be decoded again, so this is the only chance to read them
                    let embeds = rows.iter().any(|row| row.pos >= 0 && row.token < 0);
                    reads.queries |= embeds;
                    reads.hidden |= embeds || record.is_due(record.rows.len());
                }
                Mode::Prompt { .. } | Mode::Again => {
                    reads.queries |= !matches!(self.mode, Mode::Prompt { wants_queries: false });
                    reads.hidden |= record.is_due(record.rows.len());
                }
                Mode::Replay(of, _) => reads.queries |= of == *seq,
                Mode::Probe(_) => {}
            }
            if matches!(self.mode, Mode::Listen | Mode::Prompt { .. }) {
                record.count(record.rows.len());
            }
        }
        reads.step = matches!(self.mode, Mode::Listen)
            && !(reads.hidden || reads.queries)
            && self.records.values().all(|record| record.rows.len() <= 1);
        self.reads = reads;
        let is_prompt = matches!(self.mode, Mode::Listen) && cells.len() >= LEAST_TIMED;
        self.reading = is_prompt.then(|| (cells.len(), Instant::now()));
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
        // without flash attention llama.cpp caps the unscaled product and scales afterwards
        self.layers[layer].scale = if softcap > 0.0 {
            LogitScale { pre: 1.0 / softcap, post: softcap * scale, softcap: true }
        } else {
            LogitScale { pre: 1.0, post: scale, softcap: false }
        };
        Ok(())
    }

    /// Checks that a hidden state has the expected form: `[n_embd, n_tokens]`, contiguous, f32.
    pub(super) fn check_hidden(&self, node: &Node) -> Result<(), CaptureError> {
        // SAFETY: plain query of a valid tensor.
        let contiguous = unsafe { sys::ggml_is_contiguous(node.0) };
        let is_known = node.0.type_ == sys::GGML_TYPE_F32 && node.0.ne[0] as usize == self.n_embd && contiguous;
        if is_known { Ok(()) } else { Err(node.shape_error()) }
    }

    fn on_hidden(&mut self, node: &Node, layer: usize) -> Result<(), CaptureError> {
        self.check_hidden(node)?;
        let counted = self.records.iter().map(|(seq, record)| (*seq, record.counted(self.skip)));
        let counted: Vec<_> = counted.filter(|(_, rows)| !rows.is_empty()).collect();
        let n_rows = rows_of(node);
        if counted.iter().flat_map(|(_, rows)| rows).any(|&row| row as usize >= n_rows) {
            return Err(node.shape_error());
        }
        for (seq, rows) in counted {
            if !node.place().is_null() {
                self.take_sums(node, seq, layer, &rows)?;
                if layer == 0
                    && let Some(record) = self.records.get_mut(&seq)
                {
                    record.waiting = rows.len();
                }
            } else if let Some(record) = self.records.get_mut(&seq) {
                // SAFETY: the node has been computed, and stays as it is while ggml waits for us.
                let block = Block::of(unsafe { node.floats() }, self.n_embd, &rows);
                record.layer_mut(layer).moments.merge(&block);
            }
        }
        Ok(())
    }

    /// Returns the rows of q that are needed from this ubatch.
    fn wanted(&self, n_tokens: usize) -> Vec<Wanted> {
        match &self.mode {
            Mode::Probe(probe) => {
                (0..n_tokens).map(|row| Wanted { row, seq: 0, slot: probe.number(row), pos: 0 }).collect()
            }
            Mode::Replay(seq, _) => {
                let rows = self.records.get(seq).map_or(&[][..], |record| &record.rows);
                rows.iter().enumerate().map(|(slot, &(row, pos))| Wanted { row, seq: *seq, slot, pos }).collect()
            }
            Mode::Listen | Mode::Prompt { .. } | Mode::Again => {
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

    /// Checks that q has the expected form: `[n_embd_head_k, n_tokens, n_head]` f32. With several streams in the cache the tokens are split
    /// over a fourth dimension.
    pub(super) fn check_queries(&self, attention: &Attention) -> Result<(), CaptureError> {
        let (q, layer) = (attention.q, &self.layers[attention.layer]);
        let [d, _, heads, _] = q.0.ne;
        let is_known = q.0.type_ == sys::GGML_TYPE_F32
            && (d * heads) as usize == layer.n_q
            && heads as usize == layer.n_head
            && q.0.nb[0] == size_of::<f32>();
        if is_known { Ok(()) } else { Err(q.shape_error()) }
    }

    pub(super) fn on_queries(&mut self, attention: &Attention) -> Result<(), CaptureError> {
        self.check_queries(attention)?;
        let n = attention.n_tokens();
        let wanted = self.wanted(n);
        let has_other_rows = match &self.mode {
            Mode::Probe(probe) => probe.n() != n,
            _ => wanted.iter().any(|wanted| wanted.row >= n),
        };
        if has_other_rows {
            return Err(attention.q.shape_error());
        }
        if let Some(first) = wanted.iter().map(|w| w.row).min() {
            let end = wanted.iter().map(|w| w.row).max().map_or(first, |last| last + 1);
            let [_, n_tok, _, n_stream] = attention.q.0.ne.map(|n| n as usize);
            let tokens = if n_stream == 1 { first..end } else { 0..n_tok };
            self.take_queries(attention, tokens, wanted)?;
        }
        Ok(())
    }
}

/// Returns a view of some `tokens` of q with one row per token, `[n_embd_head_k, n_head, n_tokens, n_stream]`. With several streams
/// `tokens` covers all of them.
///
/// # Safety
/// As for [`Builder::elsewhere`].
pub(super) unsafe fn by_token(b: &Builder, q: Node, tokens: Range<usize>) -> Tensor {
    // SAFETY: a part of q.
    unsafe {
        let ([d, _, heads, n_stream], [_, nb1, nb2, nb3]) = (q.0.ne, q.0.nb);
        let (n, offset) = (tokens.len() as i64, tokens.start * nb1);
        let part = sys::ggml_view_4d(b.ctx, b.elsewhere(q.0), d, n, heads, n_stream, nb1, nb2, nb3, offset);
        sys::ggml_permute(b.ctx, part, 0, 2, 1, 3)
    }
}
