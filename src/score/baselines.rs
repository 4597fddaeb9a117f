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
        for (pos, data) in pos.chunks(self.chunk).zip(data.chunks(self.chunk * n_q)) {
            let mut b = Builder::new(n_head * 16 + self.layer.n_head_kv as usize * 8 + 40)?;
            let set = self.query_set(&mut b, Target::Future, pos, data, 1.0);
            let mut outputs = Vec::with_capacity(n_head);
            for kv in 0..self.layer.n_head_kv as usize {
                let k = self.k_view(&b, kv);
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
        for (kv, score) in scores.iter_mut().enumerate() {
            if needs.value_norm {
                score.value_norm.resize(n_kv, 0.0);
                for (i, norms) in score.value_norm.chunks_mut(self.cells_at_once).enumerate() {
                    let mut b = Builder::new(48)?;
                    let squared = self.squared_norms(&mut b, kv, i * self.cells_at_once, norms.len());
                    b.compute(device)?;
                    read(norms, squared);
                    norms.iter_mut().for_each(|x| *x = x.sqrt());
                }
            }
            if needs.key_similarity {
                score.key_similarity.resize(n_kv, 0.0);
                self.compare_keys(device, kv, &mut score.key_similarity)?;
            }
        }
        Ok(())
    }

    /// Squared lengths of one KV head's values in `n` cells from `first` on. `[1, n]`
    fn squared_norms(&self, b: &mut Builder, kv: usize, first: usize, n: usize) -> Tensor {
        let d = i64::from(self.layer.n_embd_head_v);
        // SAFETY: the views stay inside V's storage, as in compact.rs.
        unsafe {
            let v = self.layer.v;
            let stream = self.stream * (*v).nb[2];
            let values = if self.v_trans {
                let element = sys::ggml_type_size((*v).type_);
                let channel = element * self.n_cells;
                let offset = stream + kv * d as usize * channel + first * element;
                let view = sys::ggml_view_2d(b.ctx, v, n as i64, d, channel, offset);
                let floats = sys::ggml_cast(b.ctx, view, sys::GGML_TYPE_F32); // [n, d]
                sys::ggml_cont(b.ctx, sys::ggml_transpose(b.ctx, floats))
            } else {
                let offset = stream + first * (*v).nb[1] + kv * sys::ggml_row_size((*v).type_, d);
                let view = sys::ggml_view_2d(b.ctx, v, d, n as i64, (*v).nb[1], offset);
                self.as_floats(b, view, n)
            }; // [d, n]
            let squared = sys::ggml_sqr(b.ctx, values);
            let sums = sys::ggml_sum_rows(b.ctx, squared);
            b.output(sums)
        }
    }

    /// The cosine of each of one KV head's keys to their mean direction.
    fn compare_keys(&self, device: &mut Device, kv: usize, out: &mut [f32]) -> Result<(), ComputeError> {
        let at_once = self.cells_at_once;
        let mut direction = vec![0.0; self.layer.n_embd_head_k as usize];
        let mut part = direction.clone();
        for (i, cells) in self.view.pos.chunks(at_once).enumerate() {
            let mut b = Builder::new(48)?;
            let sum = self.sum_of_keys(&mut b, kv, i * at_once, cells);
            b.compute(device)?;
            read(&mut part, sum);
            direction.iter_mut().zip(&part).for_each(|(sum, x)| *sum += x);
        }
        let length = direction.iter().map(|x| x * x).sum::<f32>().sqrt().max(NORM_EPSILON);
        direction.iter_mut().for_each(|x| *x /= length);
        for (i, out) in out.chunks_mut(at_once).enumerate() {
            let mut b = Builder::new(48)?;
            let unit = self.unit_keys(&mut b, kv, i * at_once, out.len());
            let direction = b.input([direction.len(), 1, 1], direction.clone());
            // SAFETY: shapes [d, n] and [d, 1] give [n, 1].
            let cosines = unsafe { sys::ggml_mul_mat(b.ctx, unit, direction) };
            let cosines = b.output(cosines);
            b.compute(device)?;
            read(out, cosines);
        }
        Ok(())
    }

    /// The sum of one KV head's keys, each of length 1, in the cells from `first` on; `positions` below 0 are left out. `[d]`
    fn sum_of_keys(&self, b: &mut Builder, kv: usize, first: usize, positions: &[Pos]) -> Tensor {
        let owned = positions.iter().map(|p| if *p >= 0 { 1.0 } else { 0.0 }).collect();
        let owned = b.input([positions.len(), 1, 1], owned);
        let unit = self.unit_keys(b, kv, first, positions.len());
        // SAFETY: shapes [n, d] and [n, 1] give [d, 1].
        unsafe {
            let across = sys::ggml_cont(b.ctx, sys::ggml_transpose(b.ctx, unit));
            let sum = sys::ggml_mul_mat(b.ctx, across, owned);
            b.output(sum)
        }
    }

    /// One KV head's keys in `n` cells from `first` on, each scaled to length 1. `[d, n]`
    fn unit_keys(&self, b: &mut Builder, kv: usize, first: usize, n: usize) -> Tensor {
        let rows = self.k_rows(b, kv, first, n);
        let keys = self.as_floats(b, rows, n);
        // SAFETY: a tensor of this context.
        unsafe { sys::ggml_l2_norm(b.ctx, keys, NORM_EPSILON) }
    }

    /// The `n` rows of a matrix of any type as f32. `[d, n]`
    fn as_floats(&self, b: &mut Builder, rows: Tensor, n: usize) -> Tensor {
        let index = b.indices([n, 1, 1], 0..n as u32);
        // SAFETY: one index for each row.
        unsafe { sys::ggml_get_rows(b.ctx, rows, index) }
    }
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
