//! Scores of keys and values alone: the norm of each value, and the similarity of each key to the mean direction. K and V of all heads lie
//! side by side in a row.
//!
//! On the host, rows are converted to f32 as they are stored, few enough at a time to stay in the CPU's cache. The results, one number per
//! head and cell, are then transposed. A GPU multiplies faster than it converts: there a product with an identity matrix yields the same
//! numbers channel by channel, the order in which a transposed V is stored anyway, and sums over channels are contiguous.
//!
//! A GPU also multiplies faster than it squares. The squared length of a row is on the diagonal of the Gram matrix of a few rows, the
//! products of each with each. For so few rows the off-diagonal products cost less than writing and reading all squares. The rows of all
//! heads of a cell, and those of the next cell, are contiguous, so blocks of them form one batch. Keys are needed head by head for their
//! mean direction anyway; reading them a second time by rows would cost what is gained.

use super::graph::{Grain, LayerGraph};
use super::results::{Block, Rows};
use crate::backend::{Builder, Results, Tensor};
use crate::sys;

/// Smallest key length used as a divisor.
const LEAST_LENGTH: f32 = 1e-12;
/// Approximate number of rows in a Gram matrix: a power of two. A matrix takes whole cells, at least one.
pub(super) const GRAM: usize = 64;
/// A device measures a multiple of this number of cells: whole blocks, as CUDA's kernel for few columns requires (ggml-cuda/mmf.cu).
pub(super) const STEP: usize = if GRAM > 64 { GRAM } else { 64 };
/// Channels and columns of one part of an identity matrix: the same kernel requires at least this many channels and at most this many
/// columns.
const WIDTH: usize = 64;
const COLUMNS: usize = 16;

/// Whether K or V is stored as f16. A device multiplies such rows with each other.
fn is_f16(storage: Tensor) -> bool {
    // SAFETY: the storage lives as long as the context.
    unsafe { (*storage).type_ == sys::GGML_TYPE_F16 }
}

impl LayerGraph<'_> {
    /// Computes the requested scores of keys and values.
    pub(super) fn measure<'b>(&'b self, b: &mut Builder<'b>, out: &mut Results, rows: &Rows) {
        let at_once = self.grain.cells.min(rows.n_kv);
        let numbers = b.rows([at_once, 1, 1], &self.view.numbers[..at_once]);
        let Self { layer: &sys::gvote_shim_layer { k, v, n_embd_head_k: d_k, n_embd_head_v: d_v, .. }, .. } = *self;
        // SAFETY: the storage lives as long as the context.
        let alike = unsafe { d_k == d_v && (*k).type_ == (*v).type_ };
        let of_keys = Sums::new(self, b, k, d_k);
        let of_values = if alike && self.grain.is_coarse { of_keys } else { Sums::new(self, b, v, d_v) };
        if rows.value_norm.of_head > 0 {
            self.measure_values(b, out, rows.value_norm, numbers, of_values);
        }
        if rows.key_similarity.of_head > 0 {
            self.compare_keys(b, out, rows.key_similarity, numbers, of_keys);
        }
    }

    /// Computes [`crate::policy::HeadScores::value_norm`]. `numbers`: indices of the rows processed at once.
    fn measure_values(&self, b: &mut Builder, out: &mut Results, to: Block, numbers: Tensor, sums: Sums) {
        let Self { layer: &sys::gvote_shim_layer { v, n_embd_head_v: d, .. }, .. } = *self;
        for Cells { first, n, padded } in self.cell_chunks() {
            let squared = if self.v_trans {
                self.squared_over_channels(b, self.stored_channels(b, first, padded), sums)
            } else if !self.grain.is_coarse {
                self.squared_in_rows(b, self.rows(b, v, d, first, n, numbers))
            } else if self.has_gram(v, d) {
                self.squared_of_gram(b, v, d, first, padded, sums)
            } else {
                self.squared_over_channels(b, self.head_channels(b, v, d, first, padded, sums), sums)
            };
            // SAFETY: a tensor of this context.
            let norms = unsafe { sys::ggml_sqrt(b.ctx, squared) };
            b.write_part(out, to.first, first, first_cells(b, norms, n));
        }
    }

    /// Computes [`crate::policy::HeadScores::key_similarity`]: the cosine of each key to the mean direction of its head's keys.
    fn compare_keys<'b>(&'b self, b: &mut Builder<'b>, out: &mut Results, to: Block, numbers: Tensor, sums: Sums) {
        let Self { layer: &sys::gvote_shim_layer { k, n_embd_head_k: d, .. }, .. } = *self;
        let heads = self.n_head_kv() as i64;
        let mut sum: Tensor = std::ptr::null_mut();
        let mut inverse_lengths = Vec::new();
        // SAFETY: shapes as noted; every tensor belongs to this context.
        unsafe {
            for Cells { first, n, padded } in self.cell_chunks() {
                let (keys, squared) = if !self.grain.is_coarse {
                    let keys = self.rows(b, k, d, first, n, numbers);
                    (keys, self.squared_in_rows(b, keys))
                } else {
                    let keys = self.head_channels(b, k, d, first, padded, sums);
                    (keys, self.squared_over_channels(b, keys, sums))
                };
                let lengths = sys::ggml_clamp(b.ctx, sys::ggml_sqrt(b.ctx, squared), LEAST_LENGTH, f32::INFINITY);
                let owned = b.input([padded, 1, 1], &self.view.owned[first..first + padded]);
                let inverse = sys::ggml_div(b.ctx, sys::ggml_repeat(b.ctx, owned, lengths), lengths); // [padded, heads]
                let part = if self.grain.is_coarse {
                    sys::ggml_mul_mat(b.ctx, keys, sys::ggml_reshape_3d(b.ctx, inverse, padded as i64, 1, heads))
                } else {
                    let by_head = sys::ggml_permute(b.ctx, keys, 0, 2, 1, 3); // [d, n, heads]
                    b.out_prod(by_head, sys::ggml_reshape_3d(b.ctx, inverse, 1, n as i64, heads))
                };
                sum = if sum.is_null() { part } else { sys::ggml_add_inplace(b.ctx, sum, part) };
                b.run(sum); // [d, 1, heads]
                inverse_lengths.push(inverse);
            }
            let mean = sys::ggml_l2_norm(b.ctx, sum, LEAST_LENGTH);
            for (Cells { first, n, padded }, inverse) in self.cell_chunks().zip(inverse_lengths) {
                let keys = self.k_rows(b, 0, heads as usize, first, padded);
                let products = sys::ggml_mul_mat(b.ctx, keys, mean); // [padded, 1, heads]
                sys::ggml_mul_mat_set_prec(products, sys::GGML_PREC_F32);
                let products = sys::ggml_reshape_2d(b.ctx, products, padded as i64, heads);
                let cosines = sys::ggml_mul(b.ctx, products, inverse);
                b.write_part(out, to.first, first, first_cells(b, cosines, n));
            }
            debug_assert_eq!((*mean).ne, [i64::from(d), 1, heads, 1]);
        }
    }

    /// Sums of squares of `rows` `[d, heads, n]`. `[n, heads]`
    fn squared_in_rows(&self, b: &Builder, rows: Tensor) -> Tensor {
        // SAFETY: contiguous tensors of this context.
        unsafe {
            let [_, heads, n, _] = (*rows).ne;
            let sums = sys::ggml_sum_rows(b.ctx, sys::ggml_sqr(b.ctx, rows)); // [1, heads, n]
            sys::ggml_cont(b.ctx, sys::ggml_transpose(b.ctx, sys::ggml_reshape_2d(b.ctx, sums, heads, n)))
        }
    }

    /// Sums of squares of `channels` `[n, d, heads]`. `[n, heads]`
    fn squared_over_channels(&self, b: &Builder, channels: Tensor, sums: Sums) -> Tensor {
        // SAFETY: contiguous tensors of this context.
        unsafe {
            let [n, _, heads, _] = (*channels).ne;
            let summed = b.out_prod(sys::ggml_sqr(b.ctx, channels), sums.ones); // [n, 1, heads]
            sys::ggml_reshape_2d(b.ctx, summed, n, heads)
        }
    }

    /// Whether [`Self::squared_of_gram`] can be used: the rows of all heads must be contiguous.
    fn has_gram(&self, storage: Tensor, d: u32) -> bool {
        // SAFETY: the storage lives as long as the context.
        let (row, head) = unsafe { ((*storage).nb[1], sys::ggml_row_size((*storage).type_, i64::from(d))) };
        is_f16(storage) && row == self.n_head_kv() * head
    }

    /// Squared lengths of K or V for `n` cells from `first` on, a multiple of the grain's step. `[n, heads]`
    fn squared_of_gram(&self, b: &Builder, storage: Tensor, d: u32, first: usize, n: usize, sums: Sums) -> Tensor {
        let heads = self.n_head_kv();
        // a power of two, like the step
        let cells = self.grain.step.min(1 << (GRAM / heads).max(1).ilog2());
        let block = heads * cells;
        // SAFETY: the view stays inside the storage: whole cells of one stream. Shapes as noted.
        unsafe {
            let head = sys::ggml_row_size((*storage).type_, i64::from(d));
            let offset = self.stream * (*storage).nb[2] + first * (*storage).nb[1];
            let (d, n_row, n_block) = (i64::from(d), (heads * n) as i64, (n / cells) as i64);
            let rows = sys::ggml_view_2d(b.ctx, storage, d, n_row, head, offset);
            let channels = channels(b, rows, sums.identity); // [heads * n, d]
            let (channel, number) = ((*channels).nb[1], size_of::<f32>());
            let blocks = sys::ggml_view_3d(b.ctx, channels, block as i64, d, n_block, channel, block * number, 0);
            let gram = b.out_prod(blocks, blocks); // [block, block, n_block]
            let next = (block + 1) * number;
            let (cells, heads) = (cells as i64, heads as i64);
            let of_block = (*gram).nb[2];
            let diagonal =
                sys::ggml_view_4d(b.ctx, gram, 1, cells, n_block, heads, heads as usize * next, of_block, next, 0);
            sys::ggml_reshape_2d(b.ctx, sys::ggml_cont(b.ctx, diagonal), n as i64, heads)
        }
    }

    /// Chunks of cells that are processed at once.
    fn cell_chunks(&self) -> impl Iterator<Item = Cells> + use<> {
        let (n_kv, Grain { cells: at_once, step, .. }) = (self.view.n_kv, self.grain);
        (0..n_kv).step_by(at_once).map(move |first| {
            let n = at_once.min(n_kv - first);
            Cells { first, n, padded: n.next_multiple_of(step) }
        })
    }

    /// Rows of K or V as f32: `n` cells from `first` on. `[d, heads, n]`
    fn rows(&self, b: &Builder, storage: Tensor, d: u32, first: usize, n: usize, numbers: Tensor) -> Tensor {
        let (d, heads) = (i64::from(d), self.n_head_kv() as i64);
        // SAFETY: the view stays inside the storage: whole rows of one stream.
        unsafe {
            let row = (*storage).nb[1];
            let offset = self.stream * (*storage).nb[2] + first * row;
            let view = sys::ggml_view_2d(b.ctx, storage, d * heads, n as i64, row, offset);
            // works for every type, and on a GPU faster than a cast
            let floats = sys::ggml_get_rows(b.ctx, view, sys::ggml_view_1d(b.ctx, numbers, n as i64, 0));
            sys::ggml_reshape_3d(b.ctx, floats, d, heads, n as i64)
        }
    }

    /// K or V as f32 by channel: `n` cells from `first` on. `[n, d, heads]`
    fn head_channels(&self, b: &Builder, storage: Tensor, d: u32, first: usize, n: usize, sums: Sums) -> Tensor {
        let rows = self.head_rows(b, storage, d, 0..self.n_head_kv(), first..first + n);
        channels(b, rows, sums.identity)
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

/// Constants for extracting channels and summing over them; NULL where they are not needed.
#[derive(Clone, Copy)]
struct Sums {
    /// The columns of an identity matrix, the same for each head, in parts. Each part has the `width` channels that contain its ones.
    /// `[width, columns, d / columns, heads]`
    identity: Tensor,
    /// `[1, d, heads]`
    ones: Tensor,
}

impl Sums {
    fn new(graph: &LayerGraph, b: &mut Builder, storage: Tensor, d: u32) -> Self {
        let (d, heads) = (d as usize, graph.n_head_kv());
        let mut sums = Self { identity: std::ptr::null_mut(), ones: std::ptr::null_mut() };
        if graph.grain.is_coarse || graph.v_trans {
            sums.ones = b.input([1, d, heads], vec![1.0; d * heads]);
        }
        if graph.grain.is_coarse {
            let is_in_parts = is_f16(storage) && d.is_multiple_of(WIDTH);
            let (width, columns) = if is_in_parts { (WIDTH, COLUMNS) } else { (d, d) };
            let mut identity = vec![0.0; width * d];
            identity.chunks_exact_mut(width).enumerate().for_each(|(channel, column)| column[channel % width] = 1.0);
            let identity = b.input([width, columns, d / columns], identity);
            let [width, columns, parts, heads] = [width, columns, d / columns, heads].map(|n| n as i64);
            // SAFETY: a tensor of this context.
            sums.identity = unsafe { sys::ggml_repeat_4d(b.ctx, identity, width, columns, parts, heads) };
        }
        sums
    }
}

/// A chunk of cells that are processed at once.
struct Cells {
    first: usize,
    n: usize,
    /// Number of cells that are computed. The sequence owns none of those beyond `n`; llama.cpp's attention also reads cells that no
    /// sequence owns.
    padded: usize,
}

/// Returns `rows` `[d, n, heads]` of K or V as f32, channel by channel. `[n, d, heads]`
///
/// Each result is one number of the rows times 1, plus zeros: exact at any precision that can hold the stored numbers. For f16 no higher
/// precision is requested, for which cuBLAS would convert to f32 first.
fn channels(b: &Builder, rows: Tensor, identity: Tensor) -> Tensor {
    // SAFETY: shapes as noted; every tensor belongs to this context.
    unsafe {
        let ([d, n, heads, _], [_, row, head, _]) = ((*rows).ne, (*rows).nb);
        let ([width, columns, parts, _], [_, nb1, nb2, nb3]) = ((*identity).ne, (*identity).nb);
        let part = sys::ggml_row_size((*rows).type_, width);
        // each block of `width` channels meets width / columns parts in turn
        let rows = sys::ggml_view_4d(b.ctx, rows, width, n, d / width, heads, row, part, head, 0);
        let identity = sys::ggml_view_4d(b.ctx, identity, width, columns, parts, heads, nb1, nb2, nb3, 0);
        let channels = sys::ggml_mul_mat(b.ctx, rows, identity); // [n, columns, parts, heads]
        if !is_f16(rows) {
            sys::ggml_mul_mat_set_prec(channels, sys::GGML_PREC_F32);
        }
        sys::ggml_reshape_3d(b.ctx, channels, n, d, heads)
    }
}

/// Returns the numbers of the first `n` cells of `[padded, heads]`. `[n, heads]`
fn first_cells(b: &Builder, t: Tensor, n: usize) -> Tensor {
    // SAFETY: a part of a tensor of this context, if not all of it.
    unsafe {
        if (*t).ne[0] == n as i64 {
            return t;
        }
        sys::ggml_view_2d(b.ctx, t, n as i64, (*t).ne[1], (*t).nb[1], 0)
    }
}

#[cfg(test)]
mod tests;
