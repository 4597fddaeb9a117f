//! The weight of a key under a Gaussian query (arXiv 2510.00636), from the mean and variance of its logits.

use super::graph::LayerGraph;
use super::results::LayerScores;
use crate::backend::{Builder, ComputeError, Device, HostMemory, read};
use crate::capture::Queries;
use crate::sys;

impl LayerGraph<'_> {
    /// [`crate::policy::HeadScores::expected`]: mean and variance of each key's logits over the synthetic queries.
    pub(super) fn expect(&self, device: &mut Device, scores: &mut LayerScores) -> Result<(), ComputeError> {
        let (n_kv, n_head, group) = (self.view.n_kv, self.layer.n_head as usize, self.group());
        let n_q = n_head * self.layer.n_embd_head_k as usize;
        // the current query, last of the future ones, is no sample
        let n_samples = self.queries.future.pos.len() - 1;
        let Queries { data, pos } = &self.queries.future;
        let samples = Queries { data: data[..n_samples * n_q].to_vec(), pos: pos[..n_samples].to_vec() };

        let mut b = Builder::new(n_samples * (8 + self.n_head_kv() * 32) + 24)?;
        let mut out = b.results(n_kv, 2 * n_head);
        let sets = self.query_sets(&mut b, &samples);
        for (kv, kv_heads) in self.head_chunks() {
            let k = self.k_rows(&b, kv, kv_heads);
            for set in &sets {
                let (kq, scale) = self.logits(&mut b, set, k, std::ptr::null_mut(), kv);
                let heads = kv_heads * group;
                let weights = b.input([1, set.n, heads], vec![1.0; set.n * heads]);
                // SAFETY: shapes [n_kv, n, heads] and [1, n, heads] give [n_kv, 1, heads].
                let (sum, squares) = unsafe {
                    let logits = sys::ggml_reshape_3d(b.ctx, kq, n_kv as i64, set.n as i64, heads as i64);
                    let logits = sys::ggml_scale_inplace(b.ctx, logits, scale);
                    let sum = sys::ggml_out_prod(b.ctx, logits, weights);
                    (sum, sys::ggml_out_prod(b.ctx, sys::ggml_sqr(b.ctx, logits), weights))
                };
                b.write(&mut out, kv * group, sum);
                b.write(&mut out, n_head + kv * group, squares);
            }
        }
        b.compute(device)?;
        let mut sums = HostMemory::default();
        sums.resize(device, 2 * n_head * n_kv)?;
        read(&mut sums, out.tensor);
        let (sums, squares) = sums.split_at(n_head * n_kv);
        for head in 0..n_head {
            let row = head * n_kv..(head + 1) * n_kv;
            let to = &mut scores.data[scores.rows.expected.at(head / group) * n_kv..][..n_kv];
            if head % group == 0 {
                to.fill(0.0);
            }
            add_weights(&sums[row.clone()], &squares[row], n_samples as f64, group as f64, to);
        }
        Ok(())
    }
}

/// Adds one query head's weights exp(mean + variance / 2), normalised, divided by `group`. `sums`, `squares`: over `n` queries, of
/// each key's logits and of their squares.
fn add_weights(sums: &[f32], squares: &[f32], n: f64, group: f64, out: &mut [f32]) {
    let exponent = |(sum, squares): (&f32, &f32)| {
        let mean = f64::from(*sum) / n;
        let variance = (f64::from(*squares) / n - mean * mean).max(0.0);
        let x = mean + variance / 2.0;
        // hidden cells have -inf logits
        if x.is_finite() { x } else { f64::NEG_INFINITY }
    };
    let exponents = || sums.iter().zip(squares).map(exponent);
    let max = exponents().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = exponents().map(|x| (x - max).exp()).sum();
    for (out, x) in out.iter_mut().zip(exponents()) {
        *out += ((x - max).exp() / total / group) as f32;
    }
}
