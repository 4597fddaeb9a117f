//! Divergence between two next-token distributions.

/// Divergence at one step of a continuation under two caches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// KL(full || got), in nats.
    pub kl: f64,
    /// ln p_full(next) - ln p_got(next), in nats.
    pub log_ratio: f64,
    /// Whether both have the same most likely token.
    pub same_top: bool,
}

impl Divergence {
    /// Compares the logits under the full cache and under the cache in question; `next` is the token that follows.
    ///
    /// With z = logit - max logit and Z = sum of e^z, ln p = z - ln Z, so that
    /// KL = sum of e^z_full (z_full - z_got) / Z_full - ln Z_full + ln Z_got.
    /// A token that is impossible in `full` (a logit of -inf) adds nothing.
    ///
    /// # Panics
    /// If the two slices have different lengths, or `next` is out of range.
    pub fn between(full: &[f32], got: &[f32], next: usize) -> Self {
        assert_eq!(full.len(), got.len(), "logits of two vocabularies");
        let (top_full, top_got) = (top(full), top(got));
        let z_full = |token: usize| f64::from(full[token]) - f64::from(full[top_full]);
        let z_got = |token: usize| f64::from(got[token]) - f64::from(got[top_got]);
        let (mut sum_full, mut sum_got, mut apart) = (0.0, 0.0, 0.0);
        for token in 0..full.len() {
            let (f, g) = (z_full(token), z_got(token));
            let weight = f.exp();
            sum_full += weight;
            sum_got += g.exp();
            // 0 times an infinite distance would be NaN.
            if weight != 0.0 {
                apart += weight * (f - g);
            }
        }
        let (ln_full, ln_got) = (sum_full.ln(), sum_got.ln());
        let kl = apart / sum_full - ln_full + ln_got;
        Self {
            // Rounding can make a KL of nearly 0 negative. Not `f64::max`, which would hide a NaN.
            kl: if kl < 0.0 { 0.0 } else { kl },
            log_ratio: (z_full(next) - ln_full) - (z_got(next) - ln_got),
            same_top: top_full == top_got,
        }
    }
}

/// A compact next-token distribution: the likeliest tokens individually, all others as one event.
///
/// The KL of two distributions reduced in this way is never larger than the full KL (data processing inequality). It
/// misses only differences among tokens that together have almost no probability.
pub struct Likely {
    /// Tokens and ln p, likeliest first.
    top: Vec<(u32, f32)>,
    /// Total probability of all other tokens.
    rest: f64,
}

impl Likely {
    /// Number of individual tokens: they cover all but about a percent of the probability even of plain text, in 8 KiB.
    const KEPT: usize = 1024;
    /// Nats below the likeliest token: most of a vocabulary lies lower and need not be sorted.
    const TALL: f32 = 12.0;

    /// Reduces the distribution of `logits`, `[n_vocab]`.
    pub fn of(logits: &[f32]) -> Self {
        let ln_sum = ln_sum_exp(logits);
        let tall = most(logits) - Self::TALL;
        let mut order: Vec<u32> = (0..logits.len() as u32).filter(|&token| logits[token as usize] > tall).collect();
        if order.len() < Self::KEPT {
            order = (0..logits.len() as u32).collect();
        }
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if order.len() > Self::KEPT {
            order.select_nth_unstable_by(Self::KEPT, by_logit);
            order.truncate(Self::KEPT);
        }
        order.sort_unstable_by(by_logit);
        let ln_p = |token: u32| f64::from(logits[token as usize]) - ln_sum;
        let top: Vec<_> = order.into_iter().map(|token| (token, ln_p(token) as f32)).collect();
        let rest = (1.0 - top.iter().map(|t| f64::from(t.1).exp()).sum::<f64>()).max(0.0);
        Self { top, rest }
    }

    /// Returns the KL of this distribution to that of `logits`, in nats.
    pub fn kl(&self, logits: &[f32]) -> f64 {
        let ln_sum = ln_sum_exp(logits);
        let (mut kl, mut got_top) = (0.0, 0.0);
        for &(token, ln_p) in &self.top {
            let ln_q = f64::from(logits[token as usize]) - ln_sum;
            let p = f64::from(ln_p).exp();
            got_top += ln_q.exp();
            if p > 0.0 {
                kl += p * (f64::from(ln_p) - ln_q);
            }
        }
        // Smaller values are rounding errors.
        let got_rest = (1.0 - got_top).max(f64::from(f32::EPSILON));
        if self.rest > 0.0 && self.top.len() < logits.len() {
            kl += self.rest * (self.rest / got_rest).ln();
        }
        // Rounding can make a KL of nearly 0 negative. Not `f64::max`, which would hide a NaN.
        if kl < 0.0 { 0.0 } else { kl }
    }
}

/// Values that a vector unit processes side by side: enough for any unit.
const LANES: usize = 16;

/// Returns ln of the sum of e^z, within about 1e-7; NaN if any logit is NaN.
fn ln_sum_exp(logits: &[f32]) -> f64 {
    let most = most(logits);
    let mut sum = 0.0;
    // Blocks are small enough for f32 to hold their sums.
    for block in logits.chunks(256 * LANES) {
        let mut sums = [0f32; LANES];
        let lanes = block.chunks_exact(LANES);
        sum += lanes.remainder().iter().map(|&z| f64::from(exp(z - most))).sum::<f64>();
        for lane in lanes {
            sums.iter_mut().zip(lane).for_each(|(sum, &z)| *sum += exp(z - most));
        }
        sum += sums.iter().map(|&sum| f64::from(sum)).sum::<f64>();
    }
    f64::from(most) + sum.ln()
}

/// Returns the largest logit, ignoring NaN.
fn most(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let lanes = logits.chunks_exact(LANES);
    let rest = lanes.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    let mut most = [f32::NEG_INFINITY; LANES];
    for lane in lanes {
        most.iter_mut().zip(lane).for_each(|(most, &z)| *most = larger(*most, z));
    }
    most.into_iter().fold(rest, larger)
}

/// Computes e^x for x up to 0, within about 1e-7 (1 + |x|) of it, without branches or calls, because the standard
/// library's function does not vectorise. 2^y is 2^i, assembled from bits, times 2^f, whose Taylor series is short for
/// |f| up to a half. NaN stays NaN.
fn exp(x: f32) -> f32 {
    // Adding this leaves the nearest integer in the low bits.
    const ROUND: f32 = (3 << 22) as f32;
    const C: [f32; 6] =
        [std::f32::consts::LN_2, 0.240_226_5, 0.055_504_11, 0.009_618_129, 0.001_333_356, 0.000_154_035];
    let y = x * std::f32::consts::LOG2_E;
    let y = if y < -126.0 { -126.0 } else { y };
    let shifted = y + ROUND;
    let f = y - (shifted - ROUND);
    let i = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let power = f32::from_bits(i.wrapping_add(127) << 23);
    power * (1.0 + f * (C[0] + f * (C[1] + f * (C[2] + f * (C[3] + f * (C[4] + f * C[5]))))))
}

/// Returns the most likely token; among equal ones, the first.
fn top(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, token| if logits[token] > logits[best] { token } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits like those of a language model: a few tall ones above thousands of others.
    fn logits(seed: u32, n: usize) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| -3.0 * (uniform() + 1e-6).ln()).collect()
    }

    #[test]
    fn the_likeliest_tokens_tell_nearly_the_whole_divergence() {
        for seed in 0..8 {
            let full = logits(seed, 20_000);
            let got: Vec<f32> = full.iter().zip(logits(seed + 100, 20_000)).map(|(f, e)| f + 0.1 * e).collect();
            let exact = Divergence::between(&full, &got, 0).kl;
            let short = Likely::of(&full).kl(&got);
            assert!(short <= exact + 1e-6 && short > 0.7 * exact, "{short} of {exact}");
        }
    }

    #[test]
    fn a_small_vocabulary_is_kept_whole() {
        let (full, got) = (logits(1, 500), logits(2, 500));
        let (exact, short) = (Divergence::between(&full, &got, 0).kl, Likely::of(&full).kl(&got));
        assert!((exact - short).abs() < 1e-5 * exact, "{short} for {exact}");
        assert_eq!(Likely::of(&full).top.len(), 500);
    }

    #[test]
    fn a_distribution_is_at_no_distance_from_itself() {
        let full = logits(3, 20_000);
        assert!(Likely::of(&full).kl(&full) < 1e-6);
    }

    #[test]
    fn exp_is_that_of_the_standard_library() {
        for i in 0..100_000 {
            let x = -0.001 * i as f32;
            let (exact, ours) = (f64::from(x).exp(), f64::from(exp(x)));
            assert!((ours - exact).abs() < 2e-7 * f64::from(1.0 - x) * exact + 1e-37, "{x}: {ours}, not {exact}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn a_nan_is_not_hidden() {
        let full = logits(5, 5000);
        for at in [0, 1234, 4999] {
            let mut got = full.clone();
            got[at] = f32::NAN;
            assert!(Likely::of(&full).kl(&got).is_nan(), "at {at}");
        }
    }

    #[test]
    fn impossible_tokens_add_nothing() {
        let mut full = logits(4, 3000);
        let got = full.clone();
        full[..2500].fill(f32::NEG_INFINITY);
        let exact = Divergence::between(&full, &got, 0).kl;
        let short = Likely::of(&full).kl(&got);
        assert!((exact - short).abs() < 1e-4 * exact, "{short} for {exact}");
    }
}
