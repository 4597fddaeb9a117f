//! Streaming mean and variance (Chan, Golub & LeVeque 1979).

use crate::backend::{Builder, ComputeError, Device, read};
use crate::sys;

/// Mean and variance of each channel, streaming.
#[derive(Clone, Default)]
pub(super) struct Moments {
    pub count: f64,
    pub mean: Vec<f64>,
    /// Sum of squared differences from the mean.
    pub m2: Vec<f64>,
}

/// The same of the rows of one block, in f32: only the merge of blocks needs f64.
pub(super) struct Block {
    count: usize,
    mean: Vec<f32>,
    m2: Vec<f32>,
}

impl Block {
    /// Some `rows` of `data` `[n_row][n_embd]`.
    pub fn of(data: &[f32], n_embd: usize, rows: &[u32]) -> Self {
        let row = |i: &u32| &data[*i as usize * n_embd..][..n_embd];
        let mut mean = vec![0f32; n_embd];
        for row in rows.iter().map(row) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
        }
        mean.iter_mut().for_each(|m| *m /= rows.len() as f32);
        let mut m2 = vec![0f32; n_embd];
        // two passes over a block that is in the CPU's cache
        for row in rows.iter().map(row) {
            for ((s, x), m) in m2.iter_mut().zip(row).zip(&mean) {
                let d = x - m;
                *s += d * d;
            }
        }
        Self { count: rows.len(), mean, m2 }
    }

    /// Some `rows` of a contiguous f32 tensor `[n_embd, n_row]` that has been computed, where it lies.
    ///
    /// # Errors
    /// [`ComputeError`].
    ///
    /// # Safety
    /// The tensor lies on the device, and is not written meanwhile.
    pub unsafe fn on(device: &mut Device, t: &sys::ggml_tensor, rows: &[u32]) -> Result<Self, ComputeError> {
        let n_embd = t.ne[0] as usize;
        let is_range = rows.windows(2).all(|w| w[0] + 1 == w[1]);
        let mut b = Builder::new(20)?;
        let mut out = b.results(n_embd, 0..2);
        // SAFETY: shapes as noted; every tensor belongs to the builder's context.
        unsafe {
            let data = b.elsewhere(t);
            let picked = if is_range {
                let first = rows.first().map_or(0, |&row| row as usize);
                sys::ggml_view_2d(b.ctx, data, t.ne[0], rows.len() as i64, t.nb[1], first * t.nb[1])
            } else {
                let index = b.rows([rows.len(), 1, 1], rows.to_vec());
                sys::ggml_get_rows(b.ctx, data, index)
            };
            let channels = sys::ggml_cont(b.ctx, sys::ggml_transpose(b.ctx, picked)); // [n, n_embd]
            let mean = sys::ggml_mean(b.ctx, channels); // [1, n_embd]
            b.write(&mut out, 0, mean);
            let off = sys::ggml_sub(b.ctx, channels, mean);
            let m2 = sys::ggml_sum_rows(b.ctx, sys::ggml_sqr_inplace(b.ctx, off));
            b.write(&mut out, 1, m2);
        }
        b.compute(device)?;
        let mut mean = vec![0.0; 2 * n_embd];
        read(&mut mean, out.tensor);
        let m2 = mean.split_off(n_embd);
        Ok(Self { count: rows.len(), mean, m2 })
    }
}

impl Moments {
    pub fn merge(&mut self, block: &Block) {
        if block.count == 0 {
            return;
        }
        if self.mean.is_empty() {
            self.mean = vec![0.0; block.mean.len()];
            self.m2 = self.mean.clone();
        }
        let (before, count) = (self.count, block.count as f64);
        let total = before + count;
        let (share, between) = (count / total, before * count / total);
        for ((mean, m2), (x, x2)) in self.mean.iter_mut().zip(&mut self.m2).zip(block.mean.iter().zip(&block.m2)) {
            let delta = f64::from(*x) - *mean;
            *mean += delta * share;
            *m2 += f64::from(*x2) + delta * delta * between;
        }
        self.count = total;
    }
}
