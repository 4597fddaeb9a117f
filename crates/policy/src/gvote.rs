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
//! 4. The first `sinks`, the last `recent` and protected entries rank before all others. Then the two opinions take turns: the
//!    best passage entry that is left, the best single entry that is left, and so on; equal scores, older first. Scores
//!    are compared as f16, which tells apart what differs by a thousandth: of so few scores one can count each, and needs no
//!    other sort.
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
//! selection, and for each thread 4 bytes an entry while it scores, or 24 and 256 KiB while it ranks. Arithmetic is O(n) a head,
//! some heads in each thread; the result depends neither on the number of threads nor on the order of their work.

use std::ops::Range;
use std::sync::Mutex;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::rank::{self, Forced, Sum};
use super::ranking::Ranking;
use super::turns::{self, Turns};
use super::{Decision, Evict, HeadScores, Kind, Needs, Params, Policy, Protected, Selection, Shape, Zeros};
use crate::threads;

/// `m`, `a` and `b` are stored as f16 times this. The largest, 1, becomes half of f16's range; what underflows
/// is below 2e-12, which no count of entries turns into a loss. Every stored value is a multiple of
/// 2^-24, so that sums over up to 16,384 heads are exact in f64 and the same in any order.
const SCALE: f32 = 32768.0;

/// Scoring so many entries takes a quarter of a millisecond: fewer are not worth a thread.
const ENTRIES_A_THREAD: usize = 32768;
/// A thread that ranks needs 24 bytes an entry: 3 for each of so many heads.
const HEADS_A_THREAD: usize = 8;
/// Adding up so many takes a tenth of a millisecond.
const SUMMED_A_THREAD: usize = 1 << 17;
/// Entries that are scored at a time: few enough to stay in the fastest cache.
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
    /// `[head][n]` the bits of `a * SCALE` and `b * SCALE` as f16, `a` above; ranking the heads turns them into entries from
    /// best to worst, in place. Empty for `Evict::Cells`. This and `mass` are asked for at once, but take up memory only some
    /// layers at a time, as they are written to, while the queries that were scored are freed.
    score: Vec<u32>,
    /// `[head][n]` the bits of `m * SCALE` as f16. Empty for `Evict::Cells`.
    mass: Vec<u16>,
    /// `[n]` sums of `a`, `b` and `m` over the heads; the last two are empty for `Evict::Composite`.
    passages_sum: Vec<f64>,
    single_sum: Vec<f64>,
    mass_sum: Vec<f64>,
    /// One for each thread, when none scores.
    scratch: Mutex<Vec<Scratch>>,
    /// `[heads][n]` `a` of the heads that were observed last, which `passages_sum` still lacks, and room for the next.
    passages: Vec<f32>,
    next_passages: Vec<f32>,
}

/// Rows to work in, for one thread: `[n]` `s`, 0 in the window, and others of a block or a little more.
struct Scratch {
    observed: Vec<f32>,
    passages: Vec<f32>,
    single: Vec<f32>,
    mass: Vec<f32>,
    row: Vec<f32>,
    padded: Vec<f32>,
}

/// Some entries of one head, from `first` on: `a`, but for the other heads' part, `b` and `m`.
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

    /// Steps 1 to 3: see above. Hands on one block after another.
    fn score(&mut self, params: &Params, scores: &HeadScores<'_>, take: impl FnMut(Scored<'_>)) {
        if params.replay { self.score_replay(scores, take) } else { self.score_queries(params, scores, take) }
    }

    /// Steps 1 to 3 from queries: once over the head for the sums of every `nz`, and once more with them. What is cheap to
    /// compute is computed twice rather than kept.
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
            // a quarter, so that the sum of the two, times a number of at most 2, is at most 1
            for ((b, &s), &cosine) in single.iter_mut().zip(&*row).zip(&scores.key_similarity[part.clone()]) {
                *b = 0.25 * (*b / weighed_future + s / weighed_seen) * rank::clean(1.0 - cosine);
            }

            rank::spread(observed, params.span, part.clone(), padded);
            rank::scale(&padded[..part.len()], seen, passages);
            take(Scored { first: part.start, passages, single, mass });
        }
    }

    /// The same from a replay: `a` and `b` are one.
    fn score_replay(&mut self, scores: &HeadScores<'_>, mut take: impl FnMut(Scored<'_>)) {
        let Self { observed, passages, single, mass, .. } = self;
        let [mut replayed, mut looked_up] = [const { Sum::new() }; 2];
        replayed.add_clean(scores.replayed);
        // the root first: the fourth power of what matters may be too small to matter
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

    /// Keeps them until all heads have been seen: in rows of `[n]`.
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

    /// Scores heads, some of them in each thread, and keeps what ranks them later.
    fn keep_scores(&mut self, first: usize, heads: &[HeadScores<'_>]) {
        let Self { params, shape, zeros, score, mass, passages_sum, passages, next_passages, scratch, .. } = self;
        let (n, params, scratch) = (shape.n, &*params, &*scratch);
        if score.is_empty() {
            (*score, *mass) = ((zeros.of_u32)(shape.heads() * n), (zeros.of_u16)(shape.heads() * n));
        }
        let threads = self.threads.min(heads.len() * n / ENTRIES_A_THREAD).max(1);
        // one of the threads is late
        let share = heads.len().div_ceil(2 * threads).max(1);
        if next_passages.len() < heads.len() * n {
            // not longer by zeros that one thread writes and others write over
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
            // the heads before these, one after another, so that the sum does not depend on the number of threads
            add_all(passages_sum, passages, n);
            threads::touch(&mut next_score[..n_next]);
            threads::touch(&mut next_mass[..n_next]);
        };
        threads::share_out(threads, parts, work, meanwhile);
        std::mem::swap(passages, next_passages);
    }

    /// Steps 3 and 4 with each head's own opinions.
    fn rank_heads(mut self) -> Ranking {
        let (n, heads) = (self.shape.n, self.shape.heads());
        self.sum_up_passages();
        (self.passages, self.next_passages, self.scratch) = Default::default();
        // with a replay each head's own opinion is all there is
        let head_mix = if self.params.replay { 0.0 } else { self.params.head_mix };
        let weight = f64::from(head_mix * SCALE) / heads as f64;
        let passages = self.passages_sum.iter().map(|sum| (weight * sum) as f32).collect();
        let common = Common { passages, share: 1.0 / (1.0 + head_mix) };

        let threads = self.threads.min(heads.div_ceil(HEADS_A_THREAD));
        // some of the threads are late
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

    /// Adds what `passages_sum` still lacks, some entries in each thread.
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

    /// Steps 3 and 4 with one ranking for all.
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

/// `0..n` in blocks.
fn blocks(n: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(BLOCK).map(move |first| first..n.min(first + BLOCK))
}

fn add(sum: &mut [f64], row: &[f32]) {
    sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
}

/// [`add`] of rows that begin `n` apart, one after another; a block of all of them at a time.
fn add_all(sum: &mut [f64], rows: &[f32], n: usize) {
    for (first, sum) in (0..).step_by(BLOCK).zip(sum.chunks_mut(BLOCK)) {
        rows.chunks(n.max(1)).for_each(|row| add(sum, row.get(first..).unwrap_or_default()));
    }
}

/// What the heads have in common, to be mixed into the `a` of each.
struct Common {
    /// `[n]` `head_mix` times the mean of `a` over all heads, times [`SCALE`].
    passages: Vec<f32>,
    /// `1 / (1 + head_mix)`: the largest sum of the two, stored, becomes what 1 is stored as.
    share: f32,
}

impl Common {
    /// Adds it to `a` of a head: `score` is `[n]` pairs of `a` and `b`, as they are stored.
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

/// What a thread ranks heads with.
struct Ranker {
    turns: Turns,
    /// `[n]` the `mass` at each rank, summed over the heads that it ranked.
    at_rank: Vec<f64>,
}

impl Ranker {
    fn new(n: usize) -> Self {
        Self { turns: Turns::new(n), at_rank: vec![0.0; n] }
    }

    /// Ranks some heads: `score` is `[head][n]` pairs of `a` and `b` and becomes `[head][n]` entries from best to worst; `first` is
    /// the number of the first of them.
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
            // peaks, nothing at all, and what is no probability
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
            // from nothing to the most there can be
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
