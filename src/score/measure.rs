//! Measures of keys and values by themselves. K and V of all heads lie side by side in a row.
//!
//! On the host rows are turned into f32 as they lie, so many that they stay in the CPU's cache, and what is left of them, one
//! number for each head and cell, is transposed. A GPU multiplies faster than it converts: there the product with an identity matrix
//! gives the same numbers channel by channel, as a transposed V is stored anyway, and a sum over channels lies as it should.

use super::graph::LayerGraph;
use super::results::{Block, Rows};
use crate::backend::{Builder, Results, Tensor};
use crate::sys;

/// Keeps a key of length 0 from being divided by it.
const LEAST_LENGTH: f32 = 1e-12;

impl LayerGraph<'_> {
    /// What is asked for of both.
    pub(super) fn measure<'b>(&'b self, b: &mut Builder<'b>, out: &mut Results, rows: &Rows) {
        let at_once = self.grain.cells.min(rows.n_kv);
        let numbers = b.rows([at_once, 1, 1], &self.view.numbers[..at_once]);
        let (d_k, d_v) = (self.layer.n_embd_head_k, self.layer.n_embd_head_v);
        let of_keys = Sums::new(self, b, d_k, self.grain.is_coarse);
        let of_values = match d_k == d_v && self.grain.is_coarse {
            true => of_keys,
            false => Sums::new(self, b, d_v, self.grain.is_coarse || self.v_trans),
        };
        if rows.value_norm.of_head > 0 {
            self.measure_values(b, out, rows.value_norm, numbers, of_values);
        }
        if rows.key_similarity.of_head > 0 {
            self.compare_keys(b, out, rows.key_similarity, numbers, of_keys);
        }
    }

    /// [`crate::policy::HeadScores::value_norm`]. `numbers`: of as many rows as are worked on at once.
    fn measure_values(&self, b: &mut Builder, out: &mut Results, to: Block, numbers: Tensor, sums: Sums) {
        let d = self.layer.n_embd_head_v;
        let by_channel = self.v_trans || self.grain.is_coarse;
        for (first, n) in self.cell_chunks() {
            let squared = if by_channel {
                let values = match self.v_trans {
                    true => self.stored_channels(b, first, n),
                    false => self.channels(b, self.layer.v, d, first, n, sums),
                };
                self.squared_over_channels(b, values, sums)
            } else {
                self.squared_in_rows(b, self.rows(b, self.layer.v, d, first, n, numbers))
            };
            // SAFETY: a tensor of this context.
            let norms = unsafe { sys::ggml_sqrt(b.ctx, squared) };
            b.write_part(out, to.first, first, norms);
        }
    }

    /// [`crate::policy::HeadScores::key_similarity`]: the cosine of each key to the mean direction of its head's.
    fn compare_keys<'b>(&'b self, b: &mut Builder<'b>, out: &mut Results, to: Block, numbers: Tensor, sums: Sums) {
        let (d, heads) = (self.layer.n_embd_head_k, self.n_head_kv() as i64);
        let by_channel = self.grain.is_coarse;
        let mut sum: Tensor = std::ptr::null_mut();
        let mut inverse_lengths = Vec::new();
        // SAFETY: shapes as noted; every tensor belongs to this context.
        unsafe {
            for (first, n) in self.cell_chunks() {
                let (keys, squared) = if by_channel {
                    let keys = self.channels(b, self.layer.k, d, first, n, sums);
                    (keys, self.squared_over_channels(b, keys, sums))
                } else {
                    let keys = self.rows(b, self.layer.k, d, first, n, numbers);
                    (keys, self.squared_in_rows(b, keys))
                };
                let lengths = sys::ggml_clamp(b.ctx, sys::ggml_sqrt(b.ctx, squared), LEAST_LENGTH, f32::INFINITY);
                let owned = b.input([n, 1, 1], &self.view.owned[first..first + n]);
                let inverse = sys::ggml_div(b.ctx, sys::ggml_repeat(b.ctx, owned, lengths), lengths); // [n, heads]
                let part = if by_channel {
                    sys::ggml_mul_mat(b.ctx, keys, sys::ggml_reshape_3d(b.ctx, inverse, n as i64, 1, heads))
                } else {
                    let by_head = sys::ggml_permute(b.ctx, keys, 0, 2, 1, 3); // [d, n, heads]
                    b.out_prod(by_head, sys::ggml_reshape_3d(b.ctx, inverse, 1, n as i64, heads))
                };
                sum = if sum.is_null() { part } else { sys::ggml_add_inplace(b.ctx, sum, part) };
                b.run(sum); // [d, 1, heads]
                inverse_lengths.push(inverse);
            }
            let mean = sys::ggml_l2_norm(b.ctx, sum, LEAST_LENGTH);
            for ((first, n), inverse) in self.cell_chunks().zip(inverse_lengths) {
                let keys = self.k_rows(b, 0, heads as usize, first, n);
                let products = sys::ggml_mul_mat(b.ctx, keys, mean); // [n, 1, heads]
                sys::ggml_mul_mat_set_prec(products, sys::GGML_PREC_F32);
                let products = sys::ggml_reshape_2d(b.ctx, products, n as i64, heads);
                b.write_part(out, to.first, first, sys::ggml_mul(b.ctx, products, inverse));
            }
            debug_assert_eq!((*mean).ne, [i64::from(d), 1, heads, 1]);
        }
    }

    /// The sums of squares of `rows` `[d, heads, n]`. `[n, heads]`
    fn squared_in_rows(&self, b: &Builder, rows: Tensor) -> Tensor {
        // SAFETY: contiguous tensors of this context.
        unsafe {
            let [_, heads, n, _] = (*rows).ne;
            let sums = sys::ggml_sum_rows(b.ctx, sys::ggml_sqr(b.ctx, rows)); // [1, heads, n]
            sys::ggml_cont(b.ctx, sys::ggml_transpose(b.ctx, sys::ggml_reshape_2d(b.ctx, sums, heads, n)))
        }
    }

    /// The same of `channels` `[n, d, heads]`.
    fn squared_over_channels(&self, b: &Builder, channels: Tensor, sums: Sums) -> Tensor {
        // SAFETY: contiguous tensors of this context.
        unsafe {
            let [n, _, heads, _] = (*channels).ne;
            let summed = b.out_prod(sys::ggml_sqr(b.ctx, channels), sums.ones); // [n, 1, heads]
            sys::ggml_reshape_2d(b.ctx, summed, n, heads)
        }
    }

    /// The cells that are worked on at once: the first one, and how many.
    fn cell_chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (n_kv, at_once) = (self.view.n_kv, self.grain.cells);
        (0..n_kv).step_by(at_once).map(move |first| (first, at_once.min(n_kv - first)))
    }

    /// Rows of K or V as f32: `n` cells from `first` on. `[d, heads, n]`
    fn rows(&self, b: &Builder, storage: Tensor, d: u32, first: usize, n: usize, numbers: Tensor) -> Tensor {
        let (d, heads) = (i64::from(d), self.n_head_kv() as i64);
        // SAFETY: the view stays inside the storage: whole rows of one stream.
        unsafe {
            let row = (*storage).nb[1];
            let offset = self.stream * (*storage).nb[2] + first * row;
            let view = sys::ggml_view_2d(b.ctx, storage, d * heads, n as i64, row, offset);
            // of whatever type, and on a GPU faster than a cast
            let floats = sys::ggml_get_rows(b.ctx, view, sys::ggml_view_1d(b.ctx, numbers, n as i64, 0));
            sys::ggml_reshape_3d(b.ctx, floats, d, heads, n as i64)
        }
    }

    /// K or V as f32 by channel: `n` cells from `first` on. `[n, d, heads]`
    fn channels(&self, b: &Builder, storage: Tensor, d: u32, first: usize, n: usize, sums: Sums) -> Tensor {
        // SAFETY: shapes as noted.
        unsafe {
            let rows = self.head_rows(b, storage, d, 0..self.n_head_kv(), first..first + n);
            let channels = sys::ggml_mul_mat(b.ctx, rows, sums.identity);
            sys::ggml_mul_mat_set_prec(channels, sys::GGML_PREC_F32);
            channels
        }
    }

    /// The channels of a transposed V as f32: `n` cells from `first` on. `[n, d, heads]`
    fn stored_channels(&self, b: &Builder, first: usize, n: usize) -> Tensor {
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

/// What channels are made and summed up with; NULL where there are none.
#[derive(Clone, Copy)]
struct Sums {
    /// `[d, d, heads]`
    identity: Tensor,
    /// `[1, d, heads]`
    ones: Tensor,
}

impl Sums {
    fn new(graph: &LayerGraph, b: &mut Builder, d: u32, by_channel: bool) -> Self {
        let (d, heads) = (d as usize, graph.n_head_kv());
        if !by_channel {
            return Self { identity: std::ptr::null_mut(), ones: std::ptr::null_mut() };
        }
        let ones = b.input([1, d, heads], vec![1.0; d * heads]);
        let mut identity = vec![0.0; d * d];
        identity.iter_mut().step_by(d + 1).for_each(|x| *x = 1.0);
        let identity = b.input([d, d, 1], identity);
        // SAFETY: a tensor of this context.
        let identity = unsafe { sys::ggml_repeat_4d(b.ctx, identity, d as i64, d as i64, heads as i64, 1) };
        Self { identity, ones }
    }
}
