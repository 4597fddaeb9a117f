//! `gvote`: the default policy. GVote (arXiv 2509.03136) with real queries, spans and value norms, and a budget found
//! by trial.
//!
//! For each KV head, over its `n` entries `j`, with `nz(x) = x / sum(x)`:
//! 1. `m[j]` = `nz(future)`: attention of the synthetic queries and the current query (the paper's step 2).
//! 2. `s[j]` = `observed`, average-pooled over `pool` positions among the entries before the last `window`; 0 in the
//!    window itself (SnapKV, arXiv 2404.14469).
//! 3. Two opinions on which entries are worth keeping:
//!    - **passages**: `a[j] = max(nz(s)[j - forward ..= j + back])`, so that a hit at `i` raises
//!      `i - back ..= i + forward`, plus `head_mix` times the mean of `a[j]` over all heads. The tokens that answer a
//!      question follow the attended token and are read out one by one. This opinion finds needles.
//!    - **single entries**: `b[j] = (nz(s v)[j] + nz(m v)[j]) (1 - cos[j])`, with the length `v` of the value vector
//!      and the cosine of the entry's key to the mean key of the head. The first factor estimates the entry's
//!      contribution to the attention output. The second favours unusual keys: a key like all others has many
//!      substitutes, an unusual key has none (KeyDiff, arXiv 2504.15364). This opinion preserves the distribution of
//!      the text.
//! 4. The first `sinks`, the last `recent` and the protected entries rank before all others. Then the two opinions take
//!    turns: the best remaining passage entry, the best remaining single entry, and so on. Among equal scores, the
//!    older entry comes first. Scores are compared as f16, which resolves differences of one thousandth. There are so
//!    few f16 values that a counting sort suffices.
//! 5. `C` is found by the caller's trial ([`Decision::Ranking`]); or is the smallest count for which the mass of `m`
//!    outside each head's own best `C`, averaged over the heads, is at most `lost_mass`; or is a fixed share.
//!    `min_cells` and `max_cells` apply afterwards.
//!
//! With a replay (KVzip, arXiv 2505.23416) both opinions equal the score of the repeated context: `r[j] v[j]`, where
//! `r[j]` is approximately the largest probability that a repeated token paid to the entry. The repetition looks up
//! every token of the context individually, so spans would only blur the scores.
//!
//! With [`Evict::Cells`] the opinions are the means of `a` and of `b` over all heads, and all heads share one ranking.
//!
//! Memory: 6 bytes for each head and entry (a cell of SmolLM2 takes 256 bytes a head: 2.3 %), most of which becomes the
//! selection. In addition, each thread takes 4 bytes an entry while scoring, or 24 bytes an entry and 256 KiB while
//! ranking. The arithmetic is O(n) a head, with the heads divided among the threads. The result depends neither on the
//! number of threads nor on the order of their work.

use std::ops::Range;
use std::sync::Mutex;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::rank::{self, Forced, Sum};
use super::ranking::Ranking;
use super::turns::{self, Turns};
use super::{Decision, Evict, HeadScores, Kind, Needs, Params, Policy, Protected, Selection, Shape, Zeros};
use crate::threads;

/// Scale at which `m`, `a` and `b` are stored as f16. The largest value, 1, becomes half of f16's range. Values that
/// underflow are below 2e-12, too small to add up to a loss at any number of entries. Every stored value is a multiple
/// of 2^-24, so that sums over up to 16,384 heads are exact in f64 and the same in any order.
const SCALE: f32 = 32768.0;

/// Entries scored in a quarter of a millisecond; smaller batches do not amortise a thread.
const ENTRIES_A_THREAD: usize = 32768;
/// Heads for each ranking thread. A ranking thread needs 24 bytes an entry, which is 3 for each of these heads.
const HEADS_A_THREAD: usize = 8;
/// Values summed in a tenth of a millisecond; smaller batches do not amortise a thread.
const SUMMED_A_THREAD: usize = 1 << 17;
/// Entries scored at a time: few enough to stay in the fastest CPU cache.
const BLOCK: usize = 1024;

const ALIVE: &str = "what is done to a head does not panic";

pub(super) struct Gvote {
    params: Params,
    shape: Shape,
    forced: Forced,
    /// Heads observed so far.
    seen: usize,
    threads: usize,
    zeros: Zeros,
    /// `[head][n]` the bits of `a * SCALE` and `b * SCALE` as f16, with `a` in the upper half. Ranking replaces them in
    /// place by the head's entries from best to worst. Empty for `Evict::Cells`. This buffer and `mass` are reserved at
    /// once but take up memory only a few layers at a time, as they are written, while the scored queries are freed.
    score: Vec<u32>,
    /// `[head][n]` the bits of `m * SCALE` as f16. Empty for `Evict::Cells`.
    mass: Vec<u16>,
    /// `[n]` sums of `a`, `b` and `m` over the heads; the last two are empty for `Evict::Composite`.
    passages_sum: Vec<f64>,
    single_sum: Vec<f64>,
    mass_sum: Vec<f64>,
    /// Scratch buffers that no thread is using at the moment.
    scratch: Mutex<Vec<Scratch>>,
    /// `[heads][n]` `a` of the most recently observed heads, not yet added to `passages_sum`, and a buffer for the next
    /// heads.
    passages: Vec<f32>,
    next_passages: Vec<f32>,
}

/// Scratch rows of one thread: `observed` is `[n]` `s`, 0 in the window; the other rows hold one block or slightly
/// more.
struct Scratch {
    observed: Vec<f32>,
    passages: Vec<f32>,
    single: Vec<f32>,
    mass: Vec<f32>,
    row: Vec<f32>,
    padded: Vec<f32>,
}

/// Scores of consecutive entries of one head, starting with `first`: `a` without the other heads' part, `b` and `m`.
struct Scored<'a> {
    first: usize,
    passages: &'a mut [f32],
    single: &'a mut [f32],
    mass: &'a mut [f32],
}

impl Scratch {
    fn new(n: usize) -> Self {
        let row = || vec![0.0; BLOCK];
        let observed = vec![0.0; n];
        Self { observed, passages: row(), single: row(), mass: row(), row: row(), padded: Vec::new() }
    }

    /// Computes steps 1 to 3 of the module's description and passes each block to `take`.
    fn score(&mut self, params: &Params, scores: &HeadScores<'_>, take: impl FnMut(Scored<'_>)) {
        if params.replay { self.score_replay(scores, take) } else { self.score_queries(params, scores, take) }
    }

    /// Computes steps 1 to 3 from queries in two passes over the head: the first sums every `nz`, the second applies
    /// the sums. Cheap intermediate values are computed twice rather than stored.
    fn score_queries(&mut self, params: &Params, scores: &HeadScores<'_>, mut take: impl FnMut(Scored<'_>)) {
        let Self { observed, passages, single, mass, row, padded } = self;
        let n = observed.len();
        let older = &scores.observed[..n.saturating_sub(params.window)];
        let [mut future, mut weighed_future, mut seen, mut weighed_seen] = [const { Sum::new() }; 4];
        future.add_clean(scores.future);
        let future = future.divisor();
        for part in blocks(n) {
            let (norms, s) = (&scores.value_norm[part.clone()], &mut observed[part.clone()]);
            let [mass, row] = [&mut *mass, &mut *row].map(|row| &mut row[..part.len()]);
            rank::scale(&scores.future[part.clone()], future, mass);
            rank::weigh(mass, norms, row);
            weighed_future.add(row);

            let pooled = older.len().clamp(part.start, part.end) - part.start;
            rank::average_pool(older, params.pool, part.start, padded, &mut s[..pooled]);
            seen.add(s);
            rank::weigh(s, norms, row);
            weighed_seen.add(row);
        }
        let [weighed_future, seen, weighed_seen] = [weighed_future, seen, weighed_seen].map(|sum| sum.divisor());
        for part in blocks(n) {
            let norms = &scores.value_norm[part.clone()];
            let [passages, single, mass, row] =
                [&mut *passages, &mut *single, &mut *mass, &mut *row].map(|row| &mut row[..part.len()]);
            rank::scale(&scores.future[part.clone()], future, mass);
            rank::weigh(mass, norms, single);
            rank::weigh(&observed[part.clone()], norms, row);
            // The factor 0.25 keeps the sum of the two, times a number of at most 2, at or below 1.
            for ((b, &s), &cosine) in single.iter_mut().zip(&*row).zip(&scores.key_similarity[part.clone()]) {
                *b = 0.25 * (*b / weighed_future + s / weighed_seen) * rank::clean(1.0 - cosine);
            }

            rank::spread(observed, params.span, part.clone(), padded);
            rank::scale(&padded[..part.len()], seen, passages);
            take(Scored { first: part.start, passages, single, mass });
        }
    }

    /// Computes steps 1 to 3 from a replay: `a` and `b` are equal.
    fn score_replay(&mut self, scores: &HeadScores<'_>, mut take: impl FnMut(Scored<'_>)) {
        let Self { observed, passages, single, mass, .. } = self;
        let [mut replayed, mut looked_up] = [const { Sum::new() }; 2];
        replayed.add_clean(scores.replayed);
        // Takes the root before cleaning: the fourth power of a relevant value may be small enough for `clean` to drop.
        let peaks = scores.fourth_powers.iter().map(|p| rank::clean(p.sqrt().sqrt()));
        for ((r, peak), &norm) in observed.iter_mut().zip(peaks).zip(scores.value_norm) {
            *r = rank::clean(peak * norm);
        }
        looked_up.add(observed);
        let [replayed, looked_up] = [replayed, looked_up].map(|sum| sum.divisor());
        for part in blocks(observed.len()) {
            let [passages, single, mass] = [&mut *passages, &mut *single, &mut *mass].map(|row| &mut row[..part.len()]);
            rank::scale(&scores.replayed[part.clone()], replayed, mass);
            rank::scale(&observed[part.clone()], looked_up, single);
            passages.copy_from_slice(single);
            take(Scored { first: part.start, passages, single, mass });
        }
    }
}

impl Scored<'_> {
    fn part(&self) -> Range<usize> {
        self.first..self.first + self.mass.len()
    }

    /// Stores the block in the rows of one head, each `[n]`, until all heads have been observed.
    fn pack(self, score: &mut [u32], mass: &mut [u16], passages: &mut [f32]) {
        let part = self.part();
        passages[part.clone()].copy_from_slice(self.passages);
        let scaled = |row: &mut [f32], to: &mut [f16]| {
            row.iter_mut().for_each(|x| *x *= SCALE);
            to.convert_from_f32_slice(row);
        };
        let mut half = [[f16::ZERO; BLOCK]; 2];
        let [a, b] = half.each_mut().map(|half| &mut half[..part.len()]);
        scaled(self.passages, a);
        scaled(self.single, b);
        scaled(self.mass, mass[part.clone()].reinterpret_cast_mut());
        for ((score, a), b) in score[part].iter_mut().zip(a).zip(b) {
            *score = turns::pair(*a, *b);
        }
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
            threads: threads::at_most(),
            zeros: Zeros::default(),
            score: Vec::new(),
            mass: Vec::new(),
            passages_sum: vec![0.0; n],
            single_sum: vec![0.0; per_token],
            mass_sum: vec![0.0; per_token],
            scratch: Mutex::default(),
            passages: Vec::new(),
            next_passages: Vec::new(),
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

    /// Scores heads in several threads and stores their scores for the ranking.
    fn keep_scores(&mut self, first: usize, heads: &[HeadScores<'_>]) {
        let Self { params, shape, zeros, score, mass, passages_sum, passages, next_passages, scratch, .. } = self;
        let (n, params, scratch) = (shape.n, &*params, &*scratch);
        if score.is_empty() {
            (*score, *mass) = ((zeros.of_u32)(shape.heads() * n), (zeros.of_u16)(shape.heads() * n));
        }
        let threads = self.threads.min(heads.len() * n / ENTRIES_A_THREAD).max(1);
        // Two parts a thread, because one of the threads may be late.
        let share = heads.len().div_ceil(2 * threads).max(1);
        if next_passages.len() < heads.len() * n {
            // Allocates a new buffer: extending the old one would write zeros in one thread that the others then
            // overwrite.
            *next_passages = vec![0.0; heads.len() * n];
        }
        next_passages.truncate(heads.len() * n);
        let (score, next_score) = score[first * n..].split_at_mut(heads.len() * n);
        let (mass, next_mass) = mass[first * n..].split_at_mut(heads.len() * n);
        if first == 0 {
            threads::touch(score);
            threads::touch(mass);
        }
        let n_next = next_mass.len().min(heads.len() * n);
        let parts = score.chunks_mut(share * n).zip(mass.chunks_mut(share * n));
        let parts = parts.zip(next_passages.chunks_mut(share * n)).zip(heads.chunks(share));
        let parts = parts.map(|(((score, mass), passages), heads)| Part { score, mass, passages, heads });
        let work = |part: Part<'_>| {
            let mut own = scratch.lock().expect(ALIVE).pop().unwrap_or_else(|| Scratch::new(n));
            part.score(params, &mut own);
            scratch.lock().expect(ALIVE).push(own);
        };
        let meanwhile = || {
            // Adds the previous heads one after another, so that the sum does not depend on the number of threads.
            add_all(passages_sum, passages, n);
            threads::touch(&mut next_score[..n_next]);
            threads::touch(&mut next_mass[..n_next]);
        };
        threads::share_out(threads, parts, work, meanwhile);
        std::mem::swap(passages, next_passages);
    }

    /// Computes steps 3 and 4 with each head's own opinions.
    fn rank_heads(mut self) -> Ranking {
        let (n, heads) = (self.shape.n, self.shape.heads());
        self.sum_up_passages();
        (self.passages, self.next_passages, self.scratch) = Default::default();
        // With a replay, only the head's own opinion counts.
        let head_mix = if self.params.replay { 0.0 } else { self.params.head_mix };
        let weight = f64::from(head_mix * SCALE) / heads as f64;
        let passages = self.passages_sum.iter().map(|sum| (weight * sum) as f32).collect();
        let common = Common { passages, share: 1.0 / (1.0 + head_mix) };

        let threads = self.threads.min(heads.div_ceil(HEADS_A_THREAD));
        // Eight parts a thread, because some of the threads may be late.
        let share = heads.div_ceil(8 * threads);
        let parts = self.score.chunks_mut(share * n).zip(self.mass.chunks(share * n));
        let forced = &self.forced;
        let rankers = Mutex::new(Vec::new());
        let work = |(first, (score, mass))| {
            let mut own = rankers.lock().expect(ALIVE).pop().unwrap_or_else(|| Ranker::new(n));
            own.rank(score, mass, &common, forced, first);
            rankers.lock().expect(ALIVE).push(own);
        };
        threads::share_out(threads, (0..).step_by(share).zip(parts), work, || ());
        drop(std::mem::take(&mut self.mass));
        let mut at_rank = vec![0.0; n];
        for ranker in rankers.into_inner().expect(ALIVE) {
            at_rank.iter_mut().zip(ranker.at_rank).for_each(|(sum, mass)| *sum += mass);
        }

        let curve = rank::lost_curve(at_rank, heads as f64 * f64::from(SCALE));
        Ranking::new(self.params, self.forced, heads, self.score, curve)
    }

    /// Adds the remaining rows to `passages_sum`, dividing the entries among threads.
    fn sum_up_passages(&mut self) {
        let (n, passages) = (self.shape.n, &self.passages);
        let threads = self.threads.min(passages.len() / SUMMED_A_THREAD).max(1);
        let share = n.div_ceil(threads).max(1);
        let parts = (0..).step_by(share).zip(self.passages_sum.chunks_mut(share));
        threads::share_out(
            threads,
            parts,
            |(first, sum)| add_all(sum, passages.get(first..).unwrap_or_default(), n),
            || (),
        );
    }

    /// Computes steps 3 and 4 with one ranking for all heads.
    fn rank_tokens(self) -> Ranking {
        let heads = self.shape.heads() as f64;
        let mean = |sum: f64| f16::from_f64(sum * f64::from(SCALE) / heads);
        let means = self.passages_sum.iter().zip(&self.single_sum).map(|(&a, &b)| turns::pair(mean(a), mean(b)));
        let mut order: Vec<u32> = means.collect();
        Turns::new(self.shape.n).rank(&self.forced, 0, &mut order);
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

    fn allocate_with(&mut self, zeros: Zeros) {
        self.zeros = zeros;
    }

    fn observe(&mut self, head: usize, scores: &HeadScores<'_>) {
        self.observe_heads(head, std::slice::from_ref(scores));
    }

    fn observe_heads(&mut self, first: usize, heads: &[HeadScores<'_>]) {
        self.check(first, heads);
        self.seen += heads.len();
        match self.params.evict {
            Evict::Composite => self.keep_scores(first, heads),
            Evict::Cells => {
                let scratch = self.scratch.get_mut().expect(ALIVE);
                let mut own = scratch.pop().unwrap_or_else(|| Scratch::new(self.shape.n));
                for scores in heads {
                    own.score(&self.params, scores, |scored| {
                        let part = scored.part();
                        add(&mut self.passages_sum[part.clone()], scored.passages);
                        add(&mut self.single_sum[part.clone()], scored.single);
                        add(&mut self.mass_sum[part], scored.mass);
                    });
                }
                scratch.push(own);
            }
        }
    }

    /// Uses the bound on the lost mass where the count would be found by trial, because no model is available here.
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

/// Consecutive heads of a layer and the destinations of their scores, each `[heads][n]`.
struct Part<'a> {
    score: &'a mut [u32],
    mass: &'a mut [u16],
    passages: &'a mut [f32],
    heads: &'a [HeadScores<'a>],
}

impl Part<'_> {
    fn score(self, params: &Params, scratch: &mut Scratch) {
        let n = scratch.observed.len();
        let rows = self.score.chunks_mut(n).zip(self.mass.chunks_mut(n)).zip(self.passages.chunks_mut(n));
        for (((score, mass), passages), scores) in rows.zip(self.heads) {
            scratch.score(params, scores, |scored| scored.pack(score, mass, passages));
        }
    }
}

/// Splits `0..n` into blocks.
fn blocks(n: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(BLOCK).map(move |first| first..n.min(first + BLOCK))
}

fn add(sum: &mut [f64], row: &[f32]) {
    sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
}

/// Applies [`add`] to rows that begin `n` apart, in order, one block of all rows at a time.
fn add_all(sum: &mut [f64], rows: &[f32], n: usize) {
    for (first, sum) in (0..).step_by(BLOCK).zip(sum.chunks_mut(BLOCK)) {
        rows.chunks(n.max(1)).for_each(|row| add(sum, row.get(first..).unwrap_or_default()));
    }
}

/// The mean over all heads that is mixed into each head's `a`.
struct Common {
    /// `[n]` `head_mix` times the mean of `a` over all heads, times [`SCALE`].
    passages: Vec<f32>,
    /// `1 / (1 + head_mix)`: scales the largest possible sum of `a` and the common part back to the stored value of 1.
    share: f32,
}

impl Common {
    /// Adds the common part to a head's `a`. `score` is `[n]` stored pairs of `a` and `b`.
    fn mix_into(&self, score: &mut [u32]) {
        let (mut half, mut wide) = ([f16::ZERO; BLOCK], [0.0_f32; BLOCK]);
        for (score, common) in score.chunks_mut(BLOCK).zip(self.passages.chunks(BLOCK)) {
            half.iter_mut().zip(&*score).for_each(|(a, &score)| *a = turns::first(score));
            half.convert_to_f32_slice(&mut wide);
            wide.iter_mut().zip(common).for_each(|(a, common)| *a = (*a + common) * self.share);
            half.convert_from_f32_slice(&wide);
            score.iter_mut().zip(half).for_each(|(score, a)| *score = turns::pair(a, turns::second(*score)));
        }
    }
}

/// Ranking buffers of one thread.
struct Ranker {
    turns: Turns,
    /// `[n]` the `mass` at each rank, summed over the heads that this thread ranked.
    at_rank: Vec<f64>,
}

impl Ranker {
    fn new(n: usize) -> Self {
        Self { turns: Turns::new(n), at_rank: vec![0.0; n] }
    }

    /// Ranks consecutive heads, starting with head number `first`. `score` is `[head][n]` pairs of `a` and `b` and
    /// becomes `[head][n]` entries from best to worst.
    fn rank(&mut self, score: &mut [u32], mass: &[u16], common: &Common, forced: &Forced, first: usize) {
        let Self { turns, at_rank } = self;
        let n = forced.n;
        let (mut half, mut wide) = ([0_u16; BLOCK], [0.0_f32; BLOCK]);
        for (head, (score, mass)) in (first..).zip(score.chunks_mut(n).zip(mass.chunks(n))) {
            common.mix_into(score);
            turns.rank(forced, head, score);
            for (at_rank, score) in at_rank.chunks_mut(BLOCK).zip(score.chunks(BLOCK)) {
                half.iter_mut().zip(score).for_each(|(half, &entry)| *half = mass[entry as usize]);
                half.reinterpret_cast::<f16>().convert_to_f32_slice(&mut wide);
                add(at_rank, &wide);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Span;
    use super::*;

    #[test]
    fn a_head_is_scored_in_blocks_as_in_one() {
        let spans = [Span { back: 3, forward: 1024 }, Span { back: 1024, forward: 0 }];
        for (n, span) in [(1, spans[0]), (BLOCK, spans[1]), (BLOCK + 30, spans[0]), (3 * BLOCK + 7, spans[1])] {
            // peaks, zeros, and invalid probabilities
            let row = |seed: usize| -> Vec<f32> {
                let value = |j| [0.3, 0.0, 1e-3, f32::NAN, 1e-7, 2.0, 1e-40][j * j * seed / 3 % 7];
                (0..n).map(value).collect()
            };
            let [future, observed, value_norm, key_similarity] = [5, 11, 13, 17].map(row);
            let params = Params { span, pool: 63, ..Params::default() };
            let scores = HeadScores {
                future: &future,
                observed: &observed,
                value_norm: &value_norm,
                key_similarity: &key_similarity,
                ..HeadScores::NONE
            };
            let [mut a, mut b, mut m] = [vec![0.0; n], vec![0.0; n], vec![0.0; n]];
            Scratch::new(n).score(&params, &scores, |scored| {
                a[scored.part()].copy_from_slice(scored.passages);
                b[scored.part()].copy_from_slice(scored.single);
                m[scored.part()].copy_from_slice(scored.mass);
            });

            let older = n.saturating_sub(params.window);
            let normalised = |from: &[f32]| {
                let mut row = vec![0.0; n];
                rank::normalise(from, &mut row);
                row
            };
            let weighed = |from: &[f32]| {
                let mut row = vec![0.0; n];
                rank::weigh(from, &value_norm, &mut row);
                normalised(&row)
            };
            let (mut s, mut lifted) = (vec![0.0; n], Vec::new());
            rank::average_pool(&observed[..older], params.pool, 0, &mut lifted, &mut s[..older]);
            rank::spread(&normalised(&s), span, 0..n, &mut lifted);
            assert_eq!(m, normalised(&future));
            assert_eq!(a, lifted[..n]);
            let both = weighed(&s).into_iter().zip(weighed(&m)).map(|(s, m)| m + s);
            let single = both.zip(&key_similarity).map(|(b, cosine)| 0.25 * b * rank::clean(1.0 - cosine));
            assert_eq!(b, single.collect::<Vec<_>>());
        }
    }
    #[test]
    fn what_heads_have_in_common_moves_a_alone_and_fits_beside_the_largest() {
        let n = BLOCK + 30;
        for head_mix in [0.0, 0.3, 1000.0] {
            // values from 0 to the largest possible
            let a = |j: usize| f16::from_f32(SCALE * [0.0, 1e-6, 0.01, 1.0][j % 4]);
            let common = |j: usize| SCALE * head_mix * [0.0, 1e-5, 1.0][j % 3];
            let b = |j: usize| f16::from_f32(j as f32);
            let mut score: Vec<u32> = (0..n).map(|j| turns::pair(a(j), b(j))).collect();
            let passages = (0..n).map(common).collect();
            Common { passages, share: 1.0 / (1.0 + head_mix) }.mix_into(&mut score);
            for (j, score) in score.into_iter().enumerate() {
                let sum = f64::from(a(j)) + f64::from(common(j));
                let expected = f16::from_f64(sum / (1.0 + f64::from(head_mix)));
                assert_eq!([turns::first(score), turns::second(score)], [expected, b(j)], "{j}, {head_mix}");
                assert!(expected.to_f32() <= SCALE);
            }
        }
    }
}
