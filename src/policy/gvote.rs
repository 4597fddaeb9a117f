//! `gvote`: the default. GVote (arXiv 2509.03136) with real queries mixed in, forward spans, and a
//! bound on the lost attention mass instead of the nucleus.
//!
//! For each KV head, over its `n` entries `j`; `nz(x) = x / sum(x)`:
//! 1. `m[j]` = `nz(future)`: what synthetic and current queries look at (the paper's step 2).
//! 2. `s[j]` = `observed`, average-pooled over `pool` positions among the entries before the last
//!    `window`, 0 for the window itself; then `nz` (SnapKV, arXiv 2404.14469).
//! 3. `score[j] = s[j] + m[j]`.
//! 4. Spans: `score'[j] = max(score[j - forward ..= j + back])`, so that a hit at `i` lifts
//!    `i - back ..= i + forward`. The tokens that answer follow the token that is attended to.
//! 5. `final[j] = score'[j] + head_mix * mean over all heads of score'[j]`.
//! 6. The first `sinks` and the last `recent` rank before all others; equal scores, older first.
//! 7. `C` = the smallest count for which the mean over heads of the mass of `m` outside the head's
//!    own top `C` is at most `lost_mass`; then `min_cells` and `max_cells`.
//!
//! With [`Evict::Cells`] the ranking is the mean of `score'` alone, one for all heads, and step 7
//! uses it.
//!
//! Memory: 6 bytes for each head and entry (a cell of SmolLM2 takes 256 bytes a head: 2.3 %), whose
//! larger part becomes the selection. Arithmetic is O(n log n) a head, sorted on a few threads; the
//! result depends neither on their number nor on the order of their work.

use std::thread;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::rank::{self, Forced};
use super::{Bound, Evict, HeadScores, Kind, Needs, Params, Policy, Selection, Shape};

/// `m` is stored as f16 times this. The largest `m`, 1, becomes half of f16's range; what underflows
/// is below 2e-12, which no count of entries turns into a loss. Every stored value is a multiple of
/// 2^-24, so that sums over up to 16,384 heads are exact in f64 and the same in any order.
const MASS_SCALE: f32 = 32768.0;

/// Sorting the heads takes milliseconds: more threads would take longer to start than to help.
const MAX_THREADS: usize = 4;

pub(super) struct Gvote {
    params: Params,
    shape: Shape,
    forced: Forced,
    /// Heads observed so far.
    seen: usize,
    /// `[head][n]` bits of the f32 `score'`; `select` turns them into the ranking, in place. Empty
    /// for `Evict::Cells`.
    score: Vec<u32>,
    /// `[head][n]` `m * MASS_SCALE`. Empty for `Evict::Cells`.
    mass: Vec<f16>,
    /// `[n]` sum of `score'` over the heads.
    score_sum: Vec<f64>,
    /// `[n]` sum of `m` over the heads. Empty for `Evict::Composite`.
    mass_sum: Vec<f64>,
    /// Scratch for one head: `[n]` `m`, `[n]` `s` (0 in the window), a padded row.
    future: Vec<f32>,
    observed: Vec<f32>,
    padded: Vec<f32>,
}

impl Gvote {
    pub fn new(params: &Params, shape: Shape) -> Self {
        let n = shape.n;
        let per_token = if params.evict == Evict::Cells { n } else { 0 };
        Self {
            params: params.clone(),
            shape,
            forced: Forced::new(params, n),
            seen: 0,
            score: Vec::new(),
            mass: Vec::new(),
            score_sum: vec![0.0; n],
            mass_sum: vec![0.0; per_token],
            future: vec![0.0; n],
            observed: vec![0.0; n],
            padded: Vec::new(),
        }
    }

    /// Steps 1 to 4: fills `self.future` with `m` and the first `n` of `self.padded` with `score'`.
    fn score_head(&mut self, scores: &HeadScores<'_>) {
        let n = self.shape.n;
        rank::normalise(scores.future, &mut self.future);

        let older = n.saturating_sub(self.params.window);
        let (pooled, s) = (&mut self.padded, &mut self.observed);
        rank::average_pool(&scores.observed[..older], self.params.pool, pooled, &mut s[..older]);
        pooled.clear();
        pooled.extend_from_slice(&s[..older]);
        rank::normalise(pooled, &mut s[..older]);

        self.observed.iter_mut().zip(&self.future).for_each(|(s, m)| *s += m);
        rank::spread(&self.observed, self.params.span, &mut self.padded);
        self.observed[older..].fill(0.0);
        if !scores.replayed.is_empty() {
            self.add_replay(scores);
        }
    }

    /// Adds what the repeated context looked at to `score'` and, as a mean attention, to `m`.
    fn add_replay(&mut self, scores: &HeadScores<'_>) {
        let weight = self.params.replay;
        let mut row = vec![0.0; self.shape.n];
        let peaks: Vec<f32> = scores.fourth_powers.iter().map(|&p| rank::clean(p).sqrt().sqrt()).collect();
        rank::normalise(&peaks, &mut row);
        self.padded.iter_mut().zip(&row).for_each(|(score, peak)| *score += weight * peak);
        rank::normalise(scores.replayed, &mut row);
        self.future.iter_mut().zip(&row).for_each(|(m, mean)| *m = (*m + weight * mean) / (1.0 + weight));
    }

    /// Steps 5 to 7 with each head's own ranking.
    fn select_heads(mut self) -> Selection {
        let (n, heads) = (self.shape.n, self.shape.heads());
        let weight = f64::from(self.params.head_mix) / heads as f64;
        let common: Vec<f32> = self.score_sum.iter().map(|sum| (weight * sum) as f32).collect();

        let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_THREADS);
        let share = heads.div_ceil(threads) * n;
        let mut at_rank = vec![0.0; n];
        thread::scope(|scope| {
            let work = self.score.chunks_mut(share).zip(self.mass.chunks(share));
            let (common, forced) = (&common, &self.forced);
            let running: Vec<_> =
                work.map(|(score, mass)| scope.spawn(move || rank_heads(score, mass, common, forced))).collect();
            for thread in running {
                let part = thread.join().expect("a ranking thread panicked");
                at_rank.iter_mut().zip(part).for_each(|(sum, mass)| *sum += mass);
            }
        });
        drop(std::mem::take(&mut self.mass));

        let curve = rank::lost_curve(at_rank, heads as f64 * f64::from(MASS_SCALE));
        self.finish(&curve, |ranking, count| rank::keep_heads(ranking, n, count))
    }

    /// Steps 5 to 7 with one ranking for all.
    fn select_tokens(mut self) -> Selection {
        let (n, heads) = (self.shape.n, self.shape.heads() as f64);
        let mut keys = Vec::with_capacity(n);
        rank::push_keys(&mut keys, &self.forced, |j| (self.score_sum[j] / heads) as f32);
        keys.sort_unstable();
        self.score = keys.into_iter().map(rank::entry).collect();

        let at_rank = self.score.iter().map(|&j| self.mass_sum[j as usize]).collect();
        let curve = rank::lost_curve(at_rank, heads);
        self.finish(&curve, rank::keep_tokens)
    }

    fn finish(self, curve: &[f64], keep: impl FnOnce(Vec<u32>, usize) -> super::Kept) -> Selection {
        let n = self.shape.n;
        let (wanted, rule) = match self.params.ratio {
            Some(_) => (self.params.fixed_cells(n), Bound::Ratio),
            None => (rank::smallest_count(curve, self.params.lost_mass), Bound::LostMass),
        };
        let (count, bound) = rank::bounded(wanted, rule, &self.forced, &self.params);
        if bound == Bound::All {
            return Selection::all(n);
        }
        let lost_mass = Some(curve[count] as f32);
        Selection { n, kept: keep(self.score, count), lost_mass, bound, ragged: None }
    }
}

impl Policy for Gvote {
    fn name(&self) -> &'static str {
        Kind::Gvote.name()
    }

    fn needs(&self) -> Needs {
        Needs { future: true, observed: true, ..Needs::default() }
    }

    fn observe(&mut self, head: usize, scores: &HeadScores<'_>) {
        let n = self.shape.n;
        assert!(head == self.seen && head < self.shape.heads(), "head {head} is out of order");
        assert_eq!(scores.future.len(), n, "future scores of head {head}");
        assert_eq!(scores.observed.len(), n, "observed scores of head {head}");
        self.seen += 1;

        self.score_head(scores);
        for (sum, &score) in self.score_sum.iter_mut().zip(&self.padded) {
            *sum += f64::from(score);
        }
        match self.params.evict {
            Evict::Composite => {
                // grown head by head, while the queries that were scored are freed layer by layer
                self.score.reserve_exact(n);
                self.score.extend(self.padded[..n].iter().map(|score| score.to_bits()));
                self.future.iter_mut().for_each(|m| *m *= MASS_SCALE);
                self.mass.reserve_exact(n);
                self.mass.resize((head + 1) * n, f16::ZERO);
                self.mass[head * n..].convert_from_f32_slice(&self.future);
            }
            Evict::Cells => {
                for (sum, &m) in self.mass_sum.iter_mut().zip(&self.future) {
                    *sum += f64::from(m);
                }
            }
        }
    }

    fn select(self: Box<Self>) -> Selection {
        assert_eq!(self.seen, self.shape.heads(), "heads observed before select");
        match self.params.evict {
            Evict::Composite => self.select_heads(),
            Evict::Cells => self.select_tokens(),
        }
    }
}

/// Ranks some heads: `score` is `[head][n]` bits of `score'` and becomes `[head][n]` entries from
/// best to worst. Returns `[n]` the `mass` at each rank, summed over these heads.
fn rank_heads(score: &mut [u32], mass: &[f16], common: &[f32], forced: &Forced) -> Vec<f64> {
    let n = forced.n;
    let mut at_rank = vec![0.0; n];
    let mut keys = Vec::with_capacity(n);
    let mut row = vec![0.0_f32; n];
    for (score, mass) in score.chunks_mut(n).zip(mass.chunks(n)) {
        mass.convert_to_f32_slice(&mut row);
        keys.clear();
        rank::push_keys(&mut keys, forced, |j| f32::from_bits(score[j]) + common[j]);
        keys.sort_unstable();
        for ((to, sum), &key) in score.iter_mut().zip(&mut at_rank).zip(&keys) {
            *to = rank::entry(key);
            *sum += f64::from(row[*to as usize]);
        }
    }
    at_rank
}
