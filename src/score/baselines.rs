//! Measures of keys and values by themselves, and the weight under a Gaussian query.

use super::CellScores;
use super::graph::{LayerGraph, Target};
use crate::backend::{Builder, ComputeError, Device, Tensor, read};
use crate::llama::Pos;
use crate::policy::Needs;
use crate::sys;

/// Keeps a key of length 0 from being divided by it.
const NORM_EPSILON: f32 = 1e-12;

/// Sums over queries of one query head's logits and of their squares. `[n_kv]` each
#[derive(Default)]
struct LogitSums {
    sum: Vec<f64>,
    squares: Vec<f64>,
}

impl LayerGraph<'_> {
    /// [`crate::policy::HeadScores::expected`]: mean and variance of each key's logits over the synthetic queries.
    pub(super) fn expect(&self, device: &mut Device, scores: &mut [CellScores]) -> Result<(), ComputeError> {
        let n_kv = self.view.n_kv;
        let n_q = (self.layer.n_head * self.layer.n_embd_head_k) as usize;
        let n_head = self.layer.n_head as usize;
        let group = n_head / self.layer.n_head_kv as usize;
        // the current query, last of the future ones, is no sample
        let n_samples = self.queries.future.pos.len() - 1;
        let pos = &self.queries.future.pos[..n_samples];
        let data = &self.queries.future.data[..n_samples * n_q];
        let mut sums: Vec<_> =
            (0..n_head).map(|_| LogitSums { sum: vec![0.0; n_kv], squares: vec![0.0; n_kv] }).collect();
        let mut row = vec![0.0f32; n_kv];
        for (pos, data) in pos.chunks(self.grain.queries).zip(data.chunks(self.grain.queries * n_q)) {
            let mut b = Builder::new(n_head * 16 + self.layer.n_head_kv as usize * 8 + 40)?;
            let set = self.query_set(&mut b, Target::Future, pos, data, 1.0, 1);
            let mut outputs = Vec::with_capacity(n_head);
            for kv in 0..self.layer.n_head_kv as usize {
                let k = self.k_rows(&b, kv, 1, 0, n_kv);
                for head in kv * group..(kv + 1) * group {
                    let (kq, scale) = self.logits(&mut b, &set, k, std::ptr::null_mut(), head);
                    // SAFETY: shapes [n_kv, n] and [1, n] give [n_kv, 1].
                    let (sum, squares) = unsafe {
                        let logits = sys::ggml_scale_inplace(b.ctx, kq, scale);
                        let sum = sys::ggml_out_prod(b.ctx, logits, set.weights);
                        let squared = sys::ggml_sqr(b.ctx, logits);
                        (sum, sys::ggml_out_prod(b.ctx, squared, set.weights))
                    };
                    outputs.push((b.output(sum), b.output(squares)));
                }
            }
            b.compute(device)?;
            for (sums, (sum, squares)) in sums.iter_mut().zip(outputs) {
                for (to, from) in [(&mut sums.sum, sum), (&mut sums.squares, squares)] {
                    read(&mut row, from);
                    to.iter_mut().zip(&row).for_each(|(to, x)| *to += f64::from(*x));
                }
            }
        }
        for (score, members) in scores.iter_mut().zip(sums.chunks(group)) {
            score.expected.resize(n_kv, 0.0);
            for member in members {
                add_weights(member, n_samples as f64, group as f64, &mut score.expected);
            }
        }
        Ok(())
    }

    /// [`crate::policy::HeadScores::value_norm`] and [`crate::policy::HeadScores::key_similarity`].
    pub(super) fn measure_keys(
        &self,
        device: &mut Device,
        scores: &mut [CellScores],
        needs: Needs,
    ) -> Result<(), ComputeError> {
        let n_kv = self.view.n_kv;
        for (i, scores) in scores.chunks_mut(self.grain.kv_heads).enumerate() {
            let heads = Heads { first: i * self.grain.kv_heads, n: scores.len() };
            if needs.value_norm {
                scores.iter_mut().for_each(|score| score.value_norm.resize(n_kv, 0.0));
                self.measure_values(device, heads, scores)?;
            }
            if needs.key_similarity {
                scores.iter_mut().for_each(|score| score.key_similarity.resize(n_kv, 0.0));
                self.compare_keys(device, heads, scores)?;
            }
        }
        Ok(())
    }

    /// Lengths of the values.
    fn measure_values(&self, device: &mut Device, heads: Heads, scores: &mut [CellScores]) -> Result<(), ComputeError> {
        for first in (0..self.view.n_kv).step_by(self.grain.cells) {
            let n = self.grain.cells.min(self.view.n_kv - first);
            let mut b = Builder::new(48)?;
            let squared = self.squared_norms(&mut b, heads, first, n);
            b.compute(device)?;
            let norms = &mut device.scratch;
            norms.resize(n * heads.n, 0.0);
            read(norms, squared);
            for (score, norms) in scores.iter_mut().zip(norms.chunks(n)) {
                score.value_norm[first..first + n].iter_mut().zip(norms).for_each(|(to, x)| *to = x.sqrt());
            }
        }
        Ok(())
    }

    /// Squared lengths of the values in `n` cells from `first` on. `[1, n, heads]`
    fn squared_norms(&self, b: &mut Builder, heads: Heads, first: usize, n: usize) -> Tensor {
        let (d, n_heads) = (i64::from(self.layer.n_embd_head_v), heads.n as i64);
        // SAFETY: the views stay inside V's storage, as in compact.rs.
        unsafe {
            let v = self.layer.v;
            let stream = self.stream * (*v).nb[2];
            let values = if self.v_trans {
                let element = sys::ggml_type_size((*v).type_);
                let channel = element * self.n_cells;
                let head = d as usize * channel;
                let offset = stream + heads.first * head + first * element;
                let view = sys::ggml_view_3d(b.ctx, v, n as i64, d, n_heads, channel, head, offset);
                let floats = sys::ggml_cast(b.ctx, view, sys::GGML_TYPE_F32); // [n, d, heads]
                sys::ggml_cont(b.ctx, sys::ggml_transpose(b.ctx, floats))
            } else {
                let head = sys::ggml_row_size((*v).type_, d);
                let offset = stream + first * (*v).nb[1] + heads.first * head;
                let view = sys::ggml_view_3d(b.ctx, v, d, n as i64, n_heads, (*v).nb[1], head, offset);
                self.as_floats(b, view)
            }; // [d, n, heads]
            let squared = sys::ggml_sqr(b.ctx, values);
            let sums = sys::ggml_sum_rows(b.ctx, squared);
            b.output(sums)
        }
    }

    /// The cosine of each key to the mean direction of its head's.
    fn compare_keys(&self, device: &mut Device, heads: Heads, scores: &mut [CellScores]) -> Result<(), ComputeError> {
        let d = self.layer.n_embd_head_k as usize;
        let mut directions = vec![0.0; d * heads.n];
        let mut part = directions.clone();
        for (i, cells) in self.view.pos.chunks(self.grain.cells).enumerate() {
            let mut b = Builder::new(48)?;
            let sum = self.sum_of_keys(&mut b, heads, i * self.grain.cells, cells);
            b.compute(device)?;
            read(&mut part, sum);
            directions.iter_mut().zip(&part).for_each(|(sum, x)| *sum += x);
        }
        for direction in directions.chunks_mut(d) {
            let length = direction.iter().map(|x| x * x).sum::<f32>().sqrt().max(NORM_EPSILON);
            direction.iter_mut().for_each(|x| *x /= length);
        }
        for first in (0..self.view.n_kv).step_by(self.grain.cells) {
            let n = self.grain.cells.min(self.view.n_kv - first);
            let mut b = Builder::new(48)?;
            let unit = self.unit_keys(&mut b, heads, first, n);
            let directions = b.input([d, 1, heads.n], directions.clone());
            // SAFETY: shapes [d, n, heads] and [d, 1, heads] give [n, 1, heads].
            let product = unsafe { sys::ggml_mul_mat(b.ctx, unit, directions) };
            let product = b.output(product);
            b.compute(device)?;
            let cosines = &mut device.scratch;
            cosines.resize(n * heads.n, 0.0);
            read(cosines, product);
            for (score, cosines) in scores.iter_mut().zip(cosines.chunks(n)) {
                score.key_similarity[first..first + n].copy_from_slice(cosines);
            }
        }
        Ok(())
    }

    /// The sums of the keys, each of length 1, in the cells from `first` on; `positions` below 0 are left out. `[d, 1, heads]`
    fn sum_of_keys(&self, b: &mut Builder, heads: Heads, first: usize, positions: &[Pos]) -> Tensor {
        let owned = positions.iter().map(|p| if *p >= 0 { 1.0 } else { 0.0 });
        let owned = owned.cycle().take(positions.len() * heads.n).collect();
        let owned = b.input([positions.len(), 1, heads.n], owned);
        let unit = self.unit_keys(b, heads, first, positions.len());
        // SAFETY: shapes [n, d, heads] and [n, 1, heads] give [d, 1, heads].
        unsafe {
            let across = sys::ggml_cont(b.ctx, sys::ggml_transpose(b.ctx, unit));
            let sum = sys::ggml_mul_mat(b.ctx, across, owned);
            b.output(sum)
        }
    }

    /// The keys in `n` cells from `first` on, each scaled to length 1. `[d, n, heads]`
    fn unit_keys(&self, b: &mut Builder, heads: Heads, first: usize, n: usize) -> Tensor {
        let rows = self.k_rows(b, heads.first, heads.n, first, n);
        let keys = self.as_floats(b, rows);
        // SAFETY: a tensor of this context.
        unsafe { sys::ggml_l2_norm(b.ctx, keys, NORM_EPSILON) }
    }

    /// A view `[d, n, heads]` of K or V as f32.
    fn as_floats(&self, b: &mut Builder, view: Tensor) -> Tensor {
        // SAFETY: a view of this context, and one index for each of its rows.
        unsafe {
            if !sys::ggml_is_quantized((*view).type_) {
                return sys::ggml_cast(b.ctx, view, sys::GGML_TYPE_F32);
            }
            let [_, n, heads, _] = (*view).ne.map(|n| n as usize);
            let rows = (0..n as u32).cycle().take(n * heads).collect();
            let index = b.rows([n, heads, 1], rows);
            sys::ggml_get_rows(b.ctx, view, index)
        }
    }
}

/// Some KV heads of a layer.
#[derive(Clone, Copy)]
struct Heads {
    first: usize,
    n: usize,
}

/// Adds one query head's weights exp(mean + variance / 2), normalised, divided by `group`.
fn add_weights(sums: &LogitSums, n: f64, group: f64, out: &mut [f32]) {
    let exponent = |(sum, squares): (&f64, &f64)| {
        let mean = sum / n;
        let variance = (squares / n - mean * mean).max(0.0);
        let x = mean + variance / 2.0;
        // hidden cells have -inf logits
        if x.is_finite() { x } else { f64::NEG_INFINITY }
    };
    let exponents = || sums.sum.iter().zip(&sums.squares).map(exponent);
    let max = exponents().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = exponents().map(|x| (x - max).exp()).sum();
    for (out, x) in out.iter_mut().zip(exponents()) {
        *out += ((x - max).exp() / total / group) as f32;
    }
}
