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

/// The most likely token; of equal ones the first.
fn top(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, token| if logits[token] > logits[best] { token } else { best })
}
