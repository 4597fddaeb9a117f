//! The weight of a key under a Gaussian query (arXiv 2510.00636), from the mean and variance of its logits.

use super::graph::{LayerGraph, Logits};
use super::results::LayerScores;
use crate::backend::{Builder, ComputeError, Device};
use crate::sys;

impl LayerGraph<'_> {
    /// Computes [`crate::policy::HeadScores::expected`]: from the mean and variance of each key's logits over the synthetic queries.
    pub(super) fn expect(&self, device: &mut Device, scores: &mut LayerScores) -> Result<(), ComputeError> {
        let (n_kv, n_head, group) = (self.view.n_kv, self.layer.n_head as usize, self.group());
        // the current query comes last and is not a sample
        let samples = self.queries.n_observed..self.queries.pos.len() - 1;
        let n_samples = samples.len();

        // squares need no more nodes than fourth powers
        let mut b = Builder::on(device, self.n_nodes(n_samples, 0, true, false))?;
        let mut out = b.results(n_kv, 0..2 * n_head);
        for (kv, kv_heads) in self.head_chunks() {
            let k = self.k_rows(&b, kv, kv_heads, 0, n_kv);
            for set in &self.query_sets(&mut b, samples.clone()) {
                let Logits { kq, scale, masked } = self.logits(&mut b, set, k, std::ptr::null_mut(), kv);
                // a column of ones selects the queries of each head of the group
                let one = |i: usize| if i % group == i / group % group { 1.0 } else { 0.0 };
                let columns = set.n * group;
                let ones: Vec<f32> = (0..kv_heads * columns * group).map(one).collect();
                let ones = b.input([group, columns, kv_heads], ones);
                // SAFETY: shapes [n_kv, columns, kv_heads] and [group, columns, kv_heads] give [n_kv, group, kv_heads].
                let (sum, squares) = unsafe {
                    let logits = b.run_after(masked, sys::ggml_scale_inplace(b.ctx, kq, scale));
                    let sum = b.out_prod(logits, ones);
                    (sum, b.out_prod(sys::ggml_sqr(b.ctx, logits), ones))
                };
                b.write(&mut out, kv * group, sum);
                b.write(&mut out, n_head + kv * group, squares);
            }
        }
        b.begin(device)?;
        let mut sums = vec![0.0; 2 * n_head * n_kv];
        device.read(&mut sums, out.tensor)?;
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

/// Adds one query head's weights exp(mean + variance / 2), normalised and divided by `group`. `sums`, `squares`: sums over `n` queries of
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
