//! Streaming mean and variance (Chan, Golub & LeVeque 1979).

use std::ops::Range;

use crate::backend::{Builder, ComputeError, Lane};
use crate::sys;

/// Streaming mean and variance of each channel.
#[derive(Clone, Default)]
pub(super) struct Moments {
    pub count: f64,
    pub mean: Vec<f64>,
    /// Sum of squared differences from the mean.
    pub m2: Vec<f64>,
}

/// Mean and variance over the rows of one block, in f32: only merging blocks requires f64.
pub(super) struct Block {
    count: usize,
    mean: Vec<f32>,
    m2: Vec<f32>,
}

impl Block {
    /// Computes the moments of some `rows` of `data`, `[n_row][n_embd]`.
    pub fn of(data: &[f32], n_embd: usize, rows: &[u32]) -> Self {
        let row = |i: &u32| &data[*i as usize * n_embd..][..n_embd];
        let mut mean = vec![0f32; n_embd];
        for row in rows.iter().map(row) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
        }
        mean.iter_mut().for_each(|m| *m /= rows.len() as f32);
        let mut m2 = vec![0f32; n_embd];
        // two passes, because the block is in the CPU's cache
        for row in rows.iter().map(row) {
            for ((s, x), m) in m2.iter_mut().zip(row).zip(&mean) {
                let d = x - m;
                *s += d * d;
            }
        }
        Self { count: rows.len(), mean, m2 }
    }

    /// Fetches the moments that [`Sums`] computed on a device.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn fetched(lane: &mut Lane, sums: &Sums, n_embd: usize) -> Result<Self, ComputeError> {
        let mean = lane.floats(sums.mean, n_embd)?.to_vec();
        Ok(Self { count: sums.count, mean, m2: lane.floats(sums.m2, n_embd)?.to_vec() })
    }
}

/// A choice of rows of a tensor.
#[derive(Clone, Copy)]
pub(super) enum Rows {
    From(usize),
    /// The row numbers were sent to the device.
    Sent(usize),
}

/// Locations of the mean and `m2` of one block on a device.
pub(super) struct Sums {
    count: usize,
    mean: usize,
    m2: usize,
}

impl Sums {
    /// Byte range from the start of the mean to the end of `m2`.
    pub fn bytes(&self, n_embd: usize) -> Range<usize> {
        self.mean..self.m2 + n_embd * size_of::<f32>()
    }

    /// Queues the sums over `n` rows of a contiguous f32 tensor `[n_embd, n_row]` on the device that holds it. None: see [`Lane::enqueue`].
    ///
    /// # Errors
    /// [`ComputeError`].
    ///
    /// # Safety
    /// As for [`Lane::enqueue`].
    pub unsafe fn enqueue(
        lane: &mut Lane,
        t: &sys::ggml_tensor,
        rows: Rows,
        n: usize,
    ) -> Result<Option<Self>, ComputeError> {
        let mut b = Builder::new(20)?;
        // SAFETY: shapes as noted; every tensor belongs to the builder's context.
        let (mean, m2) = unsafe {
            let data = b.elsewhere(t);
            let picked = match rows {
                Rows::From(first) => sys::ggml_view_2d(b.ctx, data, t.ne[0], n as i64, t.nb[1], first * t.nb[1]),
                Rows::Sent(at) => {
                    let picked = sys::ggml_get_rows(b.ctx, data, lane.sent(&b, at, n));
                    lane.lend(picked);
                    picked
                }
            };
            let channels = sys::ggml_cont(b.ctx, sys::ggml_transpose(b.ctx, picked)); // [n, n_embd]
            lane.lend(channels);
            let mean = sys::ggml_mean(b.ctx, channels); // [1, n_embd]
            let off = sys::ggml_sub_inplace(b.ctx, channels, mean);
            let m2 = sys::ggml_sum_rows(b.ctx, sys::ggml_sqr_inplace(b.ctx, off)); // [1, n_embd]
            (mean, m2)
        };
        let kept = Self { count: n, mean: lane.keep(mean), m2: lane.keep(m2) };
        b.run(m2);
        // SAFETY: all tensors but the views have memory.
        Ok(unsafe { lane.enqueue(&mut b)? }.then_some(kept))
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
