//! Measures of keys and values by themselves. K and V of all heads lie side by side in a row: rows are turned into f32 as they
//! lie, many cells at once, and what is left of them, one number for each head and cell, is turned round.

use super::graph::LayerGraph;
use super::results::Block;
use crate::backend::{Builder, Results, Tensor};
use crate::sys;

/// Keeps a key of length 0 from being divided by it.
const NORM_EPSILON: f32 = 1e-12;

impl LayerGraph<'_> {
    /// [`crate::policy::HeadScores::value_norm`].
    pub(super) fn measure_values(&self, b: &mut Builder, out: &mut Results, to: Block) {
        for (first, n) in self.cell_chunks() {
            // SAFETY: shapes as noted.
            unsafe {
                if self.v_trans {
                    let squared = sys::ggml_sqr(b.ctx, self.channels(b, first, n)); // [n, d, heads]
                    let [_, d, heads, _] = (*squared).ne;
                    let ones = b.input([1, d as usize, heads as usize], vec![1.0; (d * heads) as usize]);
                    let norms = sys::ggml_sqrt(b.ctx, sys::ggml_out_prod(b.ctx, squared, ones)); // [n, 1, heads]
                    b.write_part(out, to.first, first, sys::ggml_reshape_2d(b.ctx, norms, n as i64, heads));
                } else {
                    let squared = sys::ggml_sqr(b.ctx, self.rows(b, self.layer.v, self.layer.n_embd_head_v, first, n));
                    let [_, heads, ..] = (*squared).ne;
                    let norms = sys::ggml_sqrt(b.ctx, sys::ggml_sum_rows(b.ctx, squared)); // [1, heads, n]
                    let norms = sys::ggml_reshape_2d(b.ctx, norms, heads, n as i64);
                    b.write_part(out, to.first, first, sys::ggml_transpose(b.ctx, norms));
                }
            }
        }
    }

    /// [`crate::policy::HeadScores::key_similarity`]: the cosine of each key to the mean direction of its head's.
    pub(super) fn compare_keys(&self, b: &mut Builder, out: &mut Results, to: Block) {
        let (d, heads) = (self.layer.n_embd_head_k as i64, self.n_head_kv() as i64);
        let chunks: Vec<_> = self.cell_chunks().collect();
        // made once where they fit into memory, else once for the mean and once for the cosines
        let mut all = None;
        let mut sum: Tensor = std::ptr::null_mut();
        // SAFETY: shapes as noted; every tensor belongs to this context.
        unsafe {
            for &(first, n) in &chunks {
                let keys = self.even_keys(b, first, n);
                let owned = self.view.pos[first..first + n].iter().map(|p| if *p >= 0 { 1.0 } else { 0.0 });
                let owned = b.input([1, n, 1], owned.collect());
                let part = sys::ggml_out_prod(b.ctx, sys::ggml_reshape_2d(b.ctx, keys, d * heads, n as i64), owned);
                sum = if sum.is_null() { part } else { sys::ggml_add_inplace(b.ctx, sum, part) };
                b.run(sum);
                all = (chunks.len() == 1).then_some(keys);
            }
            let mean = sys::ggml_l2_norm(b.ctx, sys::ggml_reshape_3d(b.ctx, sum, d, 1, heads), NORM_EPSILON);
            // keys have length sqrt(d), not 1
            let mean = sys::ggml_scale(b.ctx, mean, 1.0 / (d as f32).sqrt());
            for (first, n) in chunks {
                let keys = all.unwrap_or_else(|| self.even_keys(b, first, n));
                let by_head = sys::ggml_permute(b.ctx, keys, 0, 2, 1, 3); // [d, n, heads]
                let cosines = sys::ggml_mul_mat(b.ctx, by_head, mean); // [n, 1, heads]
                b.write_part(out, to.first, first, sys::ggml_reshape_2d(b.ctx, cosines, n as i64, heads));
            }
        }
    }

    /// The keys in `n` cells from `first` on, each scaled to a mean square of 1. `[d, heads, n]`
    fn even_keys(&self, b: &mut Builder, first: usize, n: usize) -> Tensor {
        let keys = self.rows(b, self.layer.k, self.layer.n_embd_head_k, first, n);
        // SAFETY: a contiguous tensor of this context; unlike l2_norm, this node needs no memory of its own.
        unsafe { sys::ggml_rms_norm(b.ctx, keys, NORM_EPSILON) }
    }

    /// The cells that are worked on at once: the first one, and how many.
    fn cell_chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (n_kv, at_once) = (self.view.n_kv, self.grain.cells);
        (0..n_kv).step_by(at_once).map(move |first| (first, at_once.min(n_kv - first)))
    }

    /// Rows of K or V as f32: `n` cells from `first` on. `[d, heads, n]`
    fn rows(&self, b: &mut Builder, storage: Tensor, d: u32, first: usize, n: usize) -> Tensor {
        let (d, heads) = (i64::from(d), self.n_head_kv() as i64);
        // SAFETY: the view stays inside the storage: whole rows of one stream.
        unsafe {
            let row = (*storage).nb[1];
            let offset = self.stream * (*storage).nb[2] + first * row;
            let view = sys::ggml_view_2d(b.ctx, storage, d * heads, n as i64, row, offset);
            let floats = if sys::ggml_is_quantized((*storage).type_) {
                let index = b.rows([n, 1, 1], (0..n as u32).collect());
                sys::ggml_get_rows(b.ctx, view, index)
            } else {
                sys::ggml_cast(b.ctx, view, sys::GGML_TYPE_F32)
            };
            sys::ggml_reshape_3d(b.ctx, floats, d, heads, n as i64)
        }
    }

    /// The channels of a transposed V as f32: `n` cells from `first` on. `[n, d, heads]`
    fn channels(&self, b: &Builder, first: usize, n: usize) -> Tensor {
        let (d, heads) = (i64::from(self.layer.n_embd_head_v), self.n_head_kv() as i64);
        // SAFETY: the view stays inside V's storage, as in compact/host.rs.
        unsafe {
            let v = self.layer.v;
            let element = sys::ggml_type_size((*v).type_);
            let channel = element * self.n_cells;
            let offset = self.stream * (*v).nb[2] + first * element;
            let view = sys::ggml_view_3d(b.ctx, v, n as i64, d, heads, channel, d as usize * channel, offset);
            sys::ggml_cast(b.ctx, view, sys::GGML_TYPE_F32)
        }
    }
}
