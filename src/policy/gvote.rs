//! `gvote`: the default. GVote (arXiv 2509.03136) with real queries, spans and value norms, and a budget that is found by
//! trial.
//!
//! For each KV head, over its `n` entries `j`; `nz(x) = x / sum(x)`:
//! 1. `m[j]` = `nz(future)`: what synthetic and current queries look at (the paper's step 2).
//! 2. `s[j]` = `observed`, average-pooled over `pool` positions among the entries before the last `window`, 0 for the
//!    window itself (SnapKV, arXiv 2404.14469).
//! 3. Two opinions on what is worth keeping:
//!    - **passages**: `a[j] = max(nz(s)[j - forward ..= j + back])`, so that a hit at `i` lifts `i - back ..= i + forward`,
//!      plus `head_mix` times the mean of `a[j]` over all heads. The tokens that answer follow the token that is attended
//!      to, and are read out one by one: this finds needles.
//!    - **single entries**: `b[j] = (nz(s v)[j] + nz(m v)[j]) (1 - cos[j])` with the length `v` of the value vector, so
//!      what an entry adds to the output of attention, and the cosine of its key to the mean key of the head: of keys that
//!      are like all others many are left, of one that is not there is no other (KeyDiff, arXiv 2504.15364). This keeps the
//!      text's distribution.
//! 4. The first `sinks`, the last `recent` and protected entries rank before all others. Then the two opinions take turns: the best passage
//!    entry that is left, the best single entry that is left, and so on; equal scores, older first.
//! 5. `C`: as the caller finds it by trial ([`Decision::Ranking`]); or the smallest count for which the mean over heads of
//!    the mass of `m` outside the head's own best `C` is at most `lost_mass`; or a fixed share. Then `min_cells` and
//!    `max_cells`.
//!
//! With a replay (KVzip, arXiv 2505.23416) both opinions are the one of the repeated context: `r[j] v[j]`, where `r[j]` is
//! about the largest probability that a repeated token paid to the entry. Every token of the context is looked up by its
//! own repetition, so spans would only blur it.
//!
//! With [`Evict::Cells`] the opinions are the means of `a` and of `b` over all heads, one ranking for all.
//!
//! Memory: 6 bytes for each head and entry (a cell of SmolLM2 takes 256 bytes a head: 2.3 %), whose larger part becomes the
//! selection. Arithmetic is O(n log n) a head, sorted on a few threads; the result depends neither on their number nor on
//! the order of their work.

use std::thread;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::rank::{self, Forced};
use super::ranking::Ranking;
use super::{Decision, Evict, HeadScores, Kind, Needs, Params, Policy, Protected, Selection, Shape};

/// `m`, `a` and `b` are stored as f16 times this. The largest, 1, becomes half of f16's range; what underflows
/// is below 2e-12, which no count of entries turns into a loss. Every stored value is a multiple of
/// 2^-24, so that sums over up to 16,384 heads are exact in f64 and the same in any order.
const SCALE: f32 = 32768.0;

/// Sorting the heads takes milliseconds, and each thread some 33 bytes an entry: more threads would hardly help.
const MAX_THREADS: usize = 8;
/// Scoring so many entries takes half a millisecond: fewer are not worth a thread.
const ENTRIES_A_THREAD: usize = 32768;

pub(super) struct Gvote {
    params: Params,
    shape: Shape,
    forced: Forced,
    /// Heads observed so far.
    seen: usize,
    /// `[head][n]` the bits of `a * SCALE` and `b * SCALE` as f16, `a` above; ranking the heads turns them into entries from
    /// best to worst, in place. Empty for `Evict::Cells`.
    score: Vec<u32>,
    /// `[head][n]` `m * SCALE`. Empty for `Evict::Cells`.
    mass: Vec<f16>,
    /// `[n]` sums of `a`, `b` and `m` over the heads; the last two are empty for `Evict::Composite`.
    passages_sum: Vec<f64>,
    single_sum: Vec<f64>,
    mass_sum: Vec<f64>,
    /// One for each thread.
    scratch: Vec<Scratch>,
    /// `a` of the heads of a layer.
    passages: Vec<f32>,
}

/// Rows to work in: `[n]` `m`, `s` (0 in the window) and `b` of one head, and others.
struct Scratch {
    future: Vec<f32>,
    observed: Vec<f32>,
    single: Vec<f32>,
    row: Vec<f32>,
    half: Vec<f16>,
    /// The first `n` are `a`.
    padded: Vec<f32>,
}

impl Scratch {
    fn new(n: usize) -> Self {
        let row = || vec![0.0; n];
        let half = vec![f16::ZERO; n];
        Self { future: row(), observed: row(), single: row(), row: row(), half, padded: Vec::new() }
    }

    /// Steps 1 to 3: see above.
    fn score(&mut self, params: &Params, scores: &HeadScores<'_>) {
        if params.replay { self.score_replay(scores) } else { self.score_queries(params, scores) }
    }

    /// Steps 1 to 3 from queries: fills `future` with `m`, `single` with `b` and the first `n` of `padded` with `a`, but
    /// for the other heads' part.
    fn score_queries(&mut self, params: &Params, scores: &HeadScores<'_>) {
        let Self { future, observed, single, row, padded, .. } = self;
        let older = observed.len().saturating_sub(params.window);
        rank::normalise(scores.future, future);
        rank::average_pool(&scores.observed[..older], params.pool, padded, &mut observed[..older]);

        rank::weigh(future, scores.value_norm, row);
        rank::normalise(row, single);
        rank::weigh(observed, scores.value_norm, row);
        padded.clear();
        padded.resize(row.len(), 0.0);
        rank::normalise(row, padded);
        // a quarter, so that the sum of the two, times a number of at most 2, is at most 1
        for ((b, s), cosine) in single.iter_mut().zip(&*padded).zip(scores.key_similarity) {
            *b = 0.25 * (*b + s) * rank::clean(1.0 - cosine);
        }

        rank::normalise(observed, row);
        rank::spread(row, params.span, padded);
    }

    /// The same from a replay: `a` and `b` are one.
    fn score_replay(&mut self, scores: &HeadScores<'_>) {
        let Self { future, single, row, padded, .. } = self;
        rank::normalise(scores.replayed, future);
        let peaks: Vec<f32> = scores.fourth_powers.iter().map(|&p| rank::clean(p).sqrt().sqrt()).collect();
        rank::weigh(&peaks, scores.value_norm, row);
        rank::normalise(row, single);
        padded.clear();
        padded.extend_from_slice(single);
    }

    /// What is kept of a head until all have been seen.
    fn pack(&mut self, score: &mut [u32], mass: &mut [f16], passages: &mut [f32]) {
        let Self { padded, single, future, half, .. } = self;
        let scaled = |row: &mut [f32], out: &mut [f16]| {
            row.iter_mut().for_each(|x| *x *= SCALE);
            out.convert_from_f32_slice(row);
        };
        let n = score.len();
        passages.copy_from_slice(&padded[..n]);
        scaled(&mut padded[..n], half);
        score.iter_mut().zip(&*half).for_each(|(s, a)| *s = u32::from(a.to_bits()) << 16);
        scaled(single, half);
        score.iter_mut().zip(&*half).for_each(|(s, b)| *s |= u32::from(b.to_bits()));
        scaled(future, mass);
    }
}

impl Gvote {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        let n = shape.n;
        let per_token = if params.evict == Evict::Cells { n } else { 0 };
        Self {
            params: params.clone(),
            shape,
            forced: Forced::new(params, n, protected),
            seen: 0,
            score: Vec::new(),
            mass: Vec::new(),
            passages_sum: vec![0.0; n],
            single_sum: vec![0.0; per_token],
            mass_sum: vec![0.0; per_token],
            scratch: vec![Scratch::new(n)],
            passages: Vec::new(),
        }
    }

    fn check(&self, first: usize, heads: &[HeadScores<'_>]) {
        let n = self.shape.n;
        assert!(first == self.seen && first + heads.len() <= self.shape.heads(), "head {first} is out of order");
        for (head, scores) in (first..).zip(heads) {
            assert_eq!(scores.value_norm.len(), n, "value norms of head {head}");
            if self.params.replay {
                assert_eq!(scores.replayed.len(), n, "replayed scores of head {head}");
                assert_eq!(scores.fourth_powers.len(), n, "fourth powers of head {head}");
            } else {
                assert_eq!(scores.future.len(), n, "future scores of head {head}");
                assert_eq!(scores.observed.len(), n, "observed scores of head {head}");
                assert_eq!(scores.key_similarity.len(), n, "key similarities of head {head}");
            }
        }
    }

    /// Scores heads, some of them in each thread, and keeps what ranks them later.
    fn keep_scores(&mut self, heads: &[HeadScores<'_>]) {
        let Self { params, shape, score, mass, passages_sum, passages, scratch, .. } = self;
        let (n, params) = (shape.n, &*params);
        let threads = n_threads().min(heads.len() * n / ENTRIES_A_THREAD).max(1);
        let share = heads.len().div_ceil(threads);
        scratch.resize_with(threads.max(scratch.len()), || Scratch::new(n));
        // grown layer by layer, while the queries that were scored are freed
        let start = score.len();
        score.reserve_exact(heads.len() * n);
        score.resize(start + heads.len() * n, 0);
        mass.reserve_exact(heads.len() * n);
        mass.resize(start + heads.len() * n, f16::ZERO);
        passages.resize(heads.len() * n, 0.0);
        let parts = score[start..].chunks_mut(share * n).zip(mass[start..].chunks_mut(share * n));
        let parts = parts.zip(passages.chunks_mut(share * n)).zip(heads.chunks(share)).zip(scratch);
        let parts =
            parts.map(|((((score, mass), passages), heads), scratch)| Part { score, mass, passages, heads, scratch });
        if threads == 1 {
            parts.for_each(|part| part.score(params, n));
        } else {
            thread::scope(|scope| parts.for_each(|part| drop(scope.spawn(move || part.score(params, n)))));
        }
        // one after another, so that the sum does not depend on the number of threads
        passages.chunks(n.max(1)).for_each(|row| add(passages_sum, row));
    }

    /// Steps 3 and 4 with each head's own opinions.
    fn rank_heads(mut self) -> Ranking {
        let (n, heads) = (self.shape.n, self.shape.heads());
        // with a replay each head's own opinion is all there is
        let head_mix = if self.params.replay { 0.0 } else { self.params.head_mix };
        let weight = f64::from(head_mix) / heads as f64;
        let common: Vec<f32> = self.passages_sum.iter().map(|sum| (weight * sum) as f32).collect();

        let threads = n_threads();
        let share = heads.div_ceil(threads);
        let mut at_rank = vec![0.0; n];
        thread::scope(|scope| {
            let work = self.score.chunks_mut(share * n).zip(self.mass.chunks(share * n));
            let (common, forced) = (&common, &self.forced);
            let start = |(first, (score, mass))| scope.spawn(move || rank_some(score, mass, common, forced, first));
            let running: Vec<_> = (0..).step_by(share).zip(work).map(start).collect();
            for thread in running {
                let part = thread.join().expect("a ranking thread panicked");
                at_rank.iter_mut().zip(part).for_each(|(sum, mass)| *sum += mass);
            }
        });
        drop(std::mem::take(&mut self.mass));

        let curve = rank::lost_curve(at_rank, heads as f64 * f64::from(SCALE));
        Ranking::new(self.params, self.forced, heads, self.score, curve)
    }

    /// Steps 3 and 4 with one ranking for all.
    fn rank_tokens(self) -> Ranking {
        let heads = self.shape.heads() as f64;
        let mut order = vec![0; self.shape.n];
        let mut turns = Turns::new(&self.forced);
        let mean = |sum: &[f64], j: usize| (sum[j] / heads) as f32;
        turns.take(0, |j| mean(&self.passages_sum, j), |j| mean(&self.single_sum, j), &mut order);
        let at_rank = order.iter().map(|&j| self.mass_sum[j as usize]).collect();
        let curve = rank::lost_curve(at_rank, heads);
        Ranking::new(self.params, self.forced, 1, order, curve)
    }

    fn ranking(self) -> Ranking {
        assert_eq!(self.seen, self.shape.heads(), "heads observed before select");
        match self.params.evict {
            Evict::Composite => self.rank_heads(),
            Evict::Cells => self.rank_tokens(),
        }
    }
}

impl Policy for Gvote {
    fn name(&self) -> &'static str {
        Kind::Gvote.name()
    }

    fn needs(&self) -> Needs {
        let asks = !self.params.replay;
        Needs { future: asks, observed: asks, key_similarity: asks, value_norm: true, ..Needs::default() }
    }

    fn observe(&mut self, head: usize, scores: &HeadScores<'_>) {
        self.observe_layer(head, std::slice::from_ref(scores));
    }

    fn observe_layer(&mut self, first: usize, heads: &[HeadScores<'_>]) {
        self.check(first, heads);
        self.seen += heads.len();
        match self.params.evict {
            Evict::Composite => self.keep_scores(heads),
            Evict::Cells => {
                let scratch = &mut self.scratch[0];
                for scores in heads {
                    scratch.score(&self.params, scores);
                    add(&mut self.passages_sum, &scratch.padded);
                    add(&mut self.single_sum, &scratch.single);
                    add(&mut self.mass_sum, &scratch.future);
                }
            }
        }
    }

    /// Where the count would be found by trial, the bound on the lost mass stands in: there is no model here to try it on.
    fn select(self: Box<Self>) -> Selection {
        self.ranking().by_rule()
    }

    fn decide(self: Box<Self>) -> Decision {
        if self.params.tries() { Decision::Ranking(self.ranking()) } else { Decision::Selection(self.select()) }
    }

    fn explain(self: Box<Self>) -> (Decision, Option<Ranking>) {
        let (tries, ranking) = (self.params.tries(), self.ranking());
        let decision =
            if tries { Decision::Ranking(ranking.clone()) } else { Decision::Selection(ranking.clone().by_rule()) };
        (decision, Some(ranking))
    }
}

/// Some heads of a layer, and where their scores go: `[heads][n]` each.
struct Part<'a> {
    score: &'a mut [u32],
    mass: &'a mut [f16],
    passages: &'a mut [f32],
    heads: &'a [HeadScores<'a>],
    scratch: &'a mut Scratch,
}

impl Part<'_> {
    fn score(self, params: &Params, n: usize) {
        let rows = self.score.chunks_mut(n).zip(self.mass.chunks_mut(n)).zip(self.passages.chunks_mut(n));
        for (((score, mass), passages), scores) in rows.zip(self.heads) {
            self.scratch.score(params, scores);
            self.scratch.pack(score, mass, passages);
        }
    }
}

fn n_threads() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_THREADS)
}

fn add(sum: &mut [f64], row: &[f32]) {
    sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
}

/// Ranks some heads: `score` is `[head][n]` pairs of `a` and `b` and becomes `[head][n]` entries from
/// best to worst; `first` is the number of the first of them. Returns `[n]` the `mass` at each rank, summed over these heads.
fn rank_some(score: &mut [u32], mass: &[f16], common: &[f32], forced: &Forced, first: usize) -> Vec<f64> {
    let n = forced.n;
    let mut at_rank = vec![0.0; n];
    let mut turns = Turns::new(forced);
    let mut order = vec![0; n];
    let mut row = vec![0.0_f32; n];
    let value = |bits: u32| f16::from_bits(bits as u16).to_f32();
    for (i, (score, mass)) in score.chunks_mut(n).zip(mass.chunks(n)).enumerate() {
        turns.take(first + i, |j| value(score[j] >> 16) / SCALE + common[j], |j| value(score[j]), &mut order);
        score.copy_from_slice(&order);
        mass.convert_to_f32_slice(&mut row);
        for (sum, &entry) in at_rank.iter_mut().zip(&order) {
            *sum += f64::from(row[entry as usize]);
        }
    }
    at_rank
}

/// Two opinions that take turns.
struct Turns<'a> {
    forced: &'a Forced,
    keys: [Vec<u64>; 2],
    spare: Vec<u64>,
    taken: Vec<bool>,
}

impl<'a> Turns<'a> {
    fn new(forced: &'a Forced) -> Self {
        Self { forced, keys: [Vec::new(), Vec::new()], spare: Vec::new(), taken: Vec::new() }
    }

    /// Fills `order` with the entries of a KV head from best to worst: forced ones, then in turn the best of either score that is left.
    fn take(&mut self, head: usize, first: impl Fn(usize) -> f32, second: impl Fn(usize) -> f32, order: &mut [u32]) {
        let [ours, theirs] = &mut self.keys;
        ours.clear();
        theirs.clear();
        rank::push_keys(ours, self.forced, head, first);
        rank::push_keys(theirs, self.forced, head, second);
        rank::sort_keys(ours, &mut self.spare);
        rank::sort_keys(theirs, &mut self.spare);
        self.taken.clear();
        self.taken.resize(order.len(), false);

        let fixed = self.forced.count_of(head);
        order.iter_mut().zip(&*ours).take(fixed).for_each(|(to, &key)| *to = rank::entry(key));
        let mut best = [&*ours, &*theirs].map(|keys| keys[fixed..].iter().map(|&key| rank::entry(key)));
        for (turn, to) in order[fixed..].iter_mut().enumerate() {
            let is_left = |&entry: &u32| !self.taken[entry as usize];
            // each opinion names every entry once, so there is one left as long as a place is
            *to = best[turn % 2].find(is_left).unwrap_or_default();
            self.taken[*to as usize] = true;
        }
    }
}
