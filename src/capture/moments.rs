//! Streaming mean and variance (Chan, Golub & LeVeque 1979).

/// Mean and variance of each channel, streaming.
#[derive(Clone, Default)]
pub(super) struct Moments {
    pub count: f64,
    pub mean: Vec<f64>,
    /// Sum of squared differences from the mean.
    pub m2: Vec<f64>,
}

impl Moments {
    /// Merges the rows of a block `[n_row][n_embd]`.
    pub fn merge<'a>(&mut self, n_embd: usize, rows: impl Iterator<Item = &'a [f32]> + Clone) {
        let count = rows.clone().count() as f64;
        if count == 0.0 {
            return;
        }
        // Two passes over a block that is in the CPU's cache, in f32; only the merge of blocks needs f64.
        let mut mean = vec![0f32; n_embd];
        for row in rows.clone() {
            for (m, x) in mean.iter_mut().zip(row) {
                *m += x;
            }
        }
        for m in &mut mean {
            *m /= count as f32;
        }
        let mut m2 = vec![0f32; n_embd];
        for row in rows {
            for ((s, x), m) in m2.iter_mut().zip(row).zip(&mean) {
                let d = x - m;
                *s += d * d;
            }
        }
        if self.mean.is_empty() {
            self.mean = vec![0.0; n_embd];
            self.m2 = vec![0.0; n_embd];
        }
        let total = self.count + count;
        for c in 0..n_embd {
            let delta = f64::from(mean[c]) - self.mean[c];
            self.mean[c] += delta * count / total;
            self.m2[c] += f64::from(m2[c]) + delta * delta * self.count * count / total;
        }
        self.count = total;
    }
}
