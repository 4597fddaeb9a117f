//! How far two next-token distributions are apart.

/// One step of a continuation under two caches.
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
    /// Of the logits under the full cache and under the cache in question; `next` is the token that follows.
    ///
    /// With z = logit - max logit and Z = sum of e^z, ln p = z - ln Z, so that
    /// KL = sum of e^z_full (z_full - z_got) / Z_full - ln Z_full + ln Z_got.
    /// A token that is impossible in `full` (a logit of -inf) adds nothing.
    ///
    /// # Panics
    /// If the two have different lengths, or `next` is outside of them.
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
            // Rounding can take a KL of nearly 0 below it. Not `f64::max`, which would hide a NaN.
            kl: if kl < 0.0 { 0.0 } else { kl },
            log_ratio: (z_full(next) - ln_full) - (z_got(next) - ln_got),
            same_top: top_full == top_got,
        }
    }
}

/// A next-token distribution in little memory: the likeliest tokens one by one, all the others as one event.
///
/// The KL of what is left of the two distributions after that is never larger than the whole one (data processing
/// inequality), and misses only what differs among tokens that together have next to no probability.
pub struct Likely {
    /// Tokens and ln p, likeliest first.
    top: Vec<(u32, f32)>,
    /// Probability of all others.
    rest: f64,
}

impl Likely {
    /// Tokens kept: all but a percent or so of the probability even of plain text, in 8 KiB.
    const KEPT: usize = 1024;

    /// The distribution that `logits` stand for. `[n_vocab]`
    pub fn of(logits: &[f32]) -> Self {
        let ln_sum = ln_sum_exp(logits);
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
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

    /// KL of this distribution to the one that `logits` stand for, in nats.
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
        let got_rest = (1.0 - got_top).max(f64::MIN_POSITIVE);
        if self.rest > 0.0 && self.top.len() < logits.len() {
            kl += self.rest * (self.rest / got_rest).ln();
        }
        // Rounding can take a KL of nearly 0 below it. Not `f64::max`, which would hide a NaN.
        if kl < 0.0 { 0.0 } else { kl }
    }
}

fn ln_sum_exp(logits: &[f32]) -> f64 {
    let most = f64::from(logits[top(logits)]);
    most + logits.iter().map(|&z| (f64::from(z) - most).exp()).sum::<f64>().ln()
}

/// The most likely token; of equal ones the first.
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
    fn impossible_tokens_add_nothing() {
        let mut full = logits(4, 3000);
        let got = full.clone();
        full[..2500].fill(f32::NEG_INFINITY);
        let exact = Divergence::between(&full, &got, 0).kl;
        let short = Likely::of(&full).kl(&got);
        assert!((exact - short).abs() < 1e-4 * exact, "{short} for {exact}");
    }
}
