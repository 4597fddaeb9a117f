//! Evaluates unequal budgets: attention as if every head could hold its own number of rows, with the full cache behind a mask.
//!
//! Nothing is freed. While tokens are decoded, the products q·k (`kq-<il>` `[n_kv, n_tokens, n_head]`, f32, before the softmax) of the
//! cells that a head has dropped are set to minus infinity, so that they get no weight. Cells of tokens that are decoded later are never
//! masked. With flash attention the products are never stored, and a softcap would turn minus infinity into a finite number: both are
//! refused. For measurements only; the runnable methods are in [`super::compact`].

use std::collections::HashMap;

use super::CompactError;
use crate::backend::ComputeError;
use crate::cache::{self, CacheError, Layout};
use crate::capture::node::Node;
use crate::capture::watch::{Watch, during};
use crate::llama::{Batch, Context, LlamaError, SeqId};
use crate::policy::Selection;
use crate::sys;

/// Reasons why a mask was refused, or a masked decode failed.
#[derive(Debug, thiserror::Error)]
pub enum MaskError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Selection(#[from] CompactError),
    #[error("exact masks the product of q and k, which flash attention does not show: set `flash_attn` off")]
    Flash,
    #[error("exact masks the product of q and k, which this model's attention goes on to change: {0}")]
    Attention(&'static str),
    #[error("a mask (exact) lies over this cache: it cannot be compressed again")]
    Masked,
    #[error("the graph node {0} is not what a mask (exact) expects: this architecture is not supported yet")]
    Graph(String),
    #[error("internal error in the eval callback: {0}")]
    Panic(String),
    #[error(transparent)]
    Compute(#[from] ComputeError),
    #[error(transparent)]
    Llama(#[from] LlamaError),
}

struct Layer {
    il: i32,
    n_head: usize,
    /// `[n_head_kv]` cells that each head has dropped, ascending.
    dropped: Vec<Vec<u32>>,
    /// Number of graphs of this decode in which the layer was masked.
    masked: usize,
}

/// The cells of one sequence that each head has dropped.
pub(crate) struct Mask {
    layers: Vec<Layer>,
    by_tensor: HashMap<*const sys::ggml_tensor, usize>,
    /// Buffer for products that the host cannot access in place.
    scratch: Vec<f32>,
}

// SAFETY: the tensor pointers are only compared, never followed.
unsafe impl Send for Mask {}

impl Mask {
    /// Makes a mask over the cells that `seq` has now.
    ///
    /// # Errors
    /// [`MaskError::Flash`], [`MaskError::Attention`], or an error if the selection does not fit the cache.
    pub fn new(ctx: &Context, seq: SeqId, selection: &Selection) -> Result<Self, MaskError> {
        let layout = Layout::of(ctx, seq)?;
        // V is stored untransposed only for flash attention
        if !layout.info.v_trans {
            return Err(MaskError::Flash);
        }
        if layout.info.softcap > 0.0 {
            return Err(MaskError::Attention("a softcap"));
        }
        let cells = cache::cells(ctx, seq);
        super::check(layout.n_head_kv().sum(), &cells, selection, ctx.n_threads_batch())?;
        let dropped_by = |head| {
            let kept = selection.kept_by(head);
            let stays = |place| kept.is_none_or(|kept| kept.binary_search(&place).is_ok());
            let dropped = (0..).zip(&cells).filter(|(place, _)| !stays(*place));
            let mut dropped: Vec<u32> = dropped.map(|(_, cell)| cell.index).collect();
            dropped.sort_unstable();
            dropped
        };
        let mut heads = 0..;
        let layers = layout.layers.iter().map(|layer| Layer {
            il: layer.il,
            n_head: layer.n_head as usize,
            dropped: heads.by_ref().take(layer.n_head_kv as usize).map(dropped_by).collect(),
            masked: 0,
        });
        Ok(Self {
            layers: layers.collect(),
            by_tensor: layout.layers.iter().enumerate().map(|(i, l)| (l.k.cast_const(), i)).collect(),
            scratch: Vec::new(),
        })
    }

    /// Decodes a batch behind the mask.
    ///
    /// # Errors
    /// [`MaskError::Graph`] if a layer was not masked, or the error of decoding.
    pub fn decode(&mut self, ctx: &mut Context, batch: &Batch) -> Result<(), MaskError> {
        for layer in &mut self.layers {
            layer.masked = 0;
        }
        during(self, ctx, |ctx| ctx.decode(batch))?;
        let graphs = self.layers[0].masked;
        match self.layers.iter().find(|layer| layer.masked == 0 || layer.masked != graphs) {
            Some(layer) => Err(MaskError::Graph(format!("kq-{}", layer.il))),
            None => Ok(()),
        }
    }

    /// Returns the layer whose q·k this node computes.
    fn layer_of(&self, node: &Node) -> Option<usize> {
        let is_kq = node.0.op == sys::GGML_OP_MUL_MAT && node.name().to_bytes().starts_with(b"kq-");
        let k = node.src(0).filter(|_| is_kq)?;
        self.by_tensor.get(&k.storage()).copied()
    }

    fn apply(&mut self, node: &Node, layer: usize) -> Result<(), MaskError> {
        let layer = &mut self.layers[layer];
        let [n_kv, n_tokens, n_head, n_stream] = node.0.ne.map(|n| n as usize);
        let last = layer.dropped.iter().filter_map(|cells| cells.last()).max();
        // SAFETY: plain query of a valid tensor.
        let contiguous = unsafe { sys::ggml_is_contiguous(node.0) };
        if node.0.type_ != sys::GGML_TYPE_F32
            || !contiguous
            || (n_head, n_stream) != (layer.n_head, 1)
            || last.is_some_and(|&cell| cell as usize >= n_kv)
        {
            return Err(MaskError::Graph(node.name().to_string_lossy().into_owned()));
        }
        let group = n_head / layer.dropped.len();
        node.change_floats(&mut self.scratch, |products| {
            for (head, products) in products.chunks_exact_mut(n_tokens * n_kv).enumerate() {
                for row in products.chunks_exact_mut(n_kv) {
                    for &cell in &layer.dropped[head / group] {
                        row[cell as usize] = f32::NEG_INFINITY;
                    }
                }
            }
        })?;
        layer.masked += 1;
        Ok(())
    }
}

impl Watch for Mask {
    type Error = MaskError;

    fn ask(&mut self, node: &Node) -> Result<bool, MaskError> {
        if node.0.op == sys::GGML_OP_SOFT_MAX
            && let Some(il) = node.layer_after("kq_soft_max")
            && self.layers.iter().any(|layer| layer.il == il)
            && node.src(0).and_then(|kq| self.layer_of(&kq)).is_none()
        {
            return Err(MaskError::Attention("a step before the softmax"));
        }
        Ok(self.layer_of(node).is_some())
    }

    fn read(&mut self, node: &Node) -> Result<bool, MaskError> {
        if let Some(layer) = self.layer_of(node) {
            self.apply(node, layer)?;
        }
        Ok(true)
    }

    fn panicked(text: String) -> MaskError {
        MaskError::Panic(text)
    }
}
