//! Arithmetic that the policies share: cleaning, normalising, pooling, spans, ranking, the curve of the lost mass, and
//! the bounds on `C`.

use std::ops::Range;

use super::{Bound, Evict, Kept, Kind, Params, Protected, Span};
use crate::threads;

/// Entries cut in a third of a millisecond; smaller batches do not amortise a thread.
const CUT_A_THREAD: usize = 1 << 18;

/// The forced entries, which always stay: the first `sinks` and the last `recent` of `n` entries, and the protected
/// entries between them.
#[derive(Debug, Clone)]
pub(super) struct Forced {
    /// Entries below this index are sinks.
    pub head: usize,
    /// Entries from this index on are recent.
    pub tail: usize,
    pub n: usize,
    protected: Protected,
}

impl Forced {
    pub fn new(params: &Params, n: usize, protected: &Protected) -> Self {
        // If the prompt is shorter than sinks and recent together, `head` equals `tail` and everything stays.
        let tail = n.saturating_sub(params.recent);
        let head = params.sinks.min(tail);
        let is_for_all = params.evict == Evict::Cells || params.policy == Kind::StreamingLlm;
        Self { head, tail, n, protected: protected.between(head, tail, is_for_all) }
    }

    pub fn contains(&self, head: usize, entry: usize) -> bool {
        entry < self.head || entry >= self.tail || self.protected(head).binary_search(&(entry as u32)).is_ok()
    }

    /// The protected entries of a KV head between sinks and recent ones, ascending.
    pub fn protected(&self, head: usize) -> &[u32] {
        self.protected.of_head(head)
    }

    /// The entries that always stay in this KV head, ascending.
    pub fn entries(&self, head: usize) -> impl Iterator<Item = u32> {
        (0..self.head as u32).chain(self.protected(head).iter().copied()).chain(self.tail as u32..self.n as u32)
    }

    /// Number of entries that always stay in this KV head.
    pub fn count_of(&self, head: usize) -> usize {
        self.head + self.protected(head).len() + self.n - self.tail
    }

    /// The fewest cells that hold the forced entries of every head.
    pub fn count(&self) -> usize {
        self.head + self.protected.most() + self.n - self.tail
    }
}

/// Values below this do not affect the result. Denormal values (below 1.2e-38) would slow a processor down a hundred
/// times.
const FAINT: f32 = 1e-30;

/// Returns `x`, or 0 if `x` is no valid probability or length, or too small to matter.
#[inline]
pub(super) fn clean(x: f32) -> f32 {
    if (FAINT..=1.0 / FAINT).contains(&x) { x } else { 0.0 }
}

/// The sum of a row, in eight running sums. Their number is fixed, so that the result is the same on every machine, and
/// large enough for the compiler to use vector instructions.
pub(super) struct Sum([f32; Self::LANES]);

impl Sum {
    const LANES: usize = 8;

    pub const fn new() -> Self {
        Self([0.0; Self::LANES])
    }

    /// Adds the next values of the row; every part but the last has a multiple of [`Self::LANES`] values.
    pub fn add(&mut self, part: &[f32]) {
        self.add_each(part, |x| x);
    }

    /// Works like [`Self::add`], but cleans the values first.
    pub fn add_clean(&mut self, part: &[f32]) {
        self.add_each(part, clean);
    }

    fn add_each(&mut self, part: &[f32], value: impl Fn(f32) -> f32) {
        let (chunks, rest) = part.as_chunks::<{ Self::LANES }>();
        let mut lanes = self.0;
        for chunk in chunks {
            lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane += value(x));
        }
        lanes.iter_mut().zip(rest).for_each(|(lane, &x)| *lane += value(x));
        self.0 = lanes;
    }

    /// Returns the divisor that scales the row to sum 1, or 1 for a row of zeros.
    pub fn divisor(&self) -> f32 {
        let sum: f32 = self.0.iter().sum();
        if sum > 0.0 { sum } else { 1.0 }
    }
}

/// `nz`: writes the values of `from`, cleaned and scaled to sum 1, to `into`. All values are 0 if they sum to 0.
pub(super) fn normalise(from: &[f32], into: &mut [f32]) {
    into.iter_mut().zip(from).for_each(|(to, &x)| *to = clean(x));
    let mut sum = Sum::new();
    sum.add(into);
    let divisor = sum.divisor();
    into.iter_mut().for_each(|x| *x /= divisor);
}

/// Writes the values of `from`, cleaned and divided by `divisor`, to `into`.
pub(super) fn scale(from: &[f32], divisor: f32, into: &mut [f32]) {
    into.iter_mut().zip(from).for_each(|(to, &x)| *to = clean(x) / divisor);
}

/// Writes `from` times `weight`, entry by entry, to `into`; an invalid length counts as 0. `from` is clean.
pub(super) fn weigh(from: &[f32], weight: &[f32], into: &mut [f32]) {
    for ((to, &x), &w) in into.iter_mut().zip(from).zip(weight) {
        *to = clean(x * w);
    }
}

/// Averages over `width` (odd) positions around each one. Writes to `into`, which begins at position `first`. Positions
/// outside of `from` are zeros, as in SnapKV's `avg_pool1d` (arXiv 2404.14469). `padded` is scratch space.
pub(super) fn average_pool(from: &[f32], width: usize, first: usize, padded: &mut Vec<f32>, into: &mut [f32]) {
    let side = width / 2;
    pad(from, first, side, into.len() + 2 * side, padded);
    padded.iter_mut().for_each(|x| *x = clean(*x));
    into.fill(0.0);
    for shift in 0..width {
        for (to, &x) in into.iter_mut().zip(&padded[shift..]) {
            *to += x;
        }
    }
    let scale = 1.0 / width as f32;
    into.iter_mut().for_each(|x| *x = clean(*x * scale));
}

/// Copies `len` values to `padded`, beginning `before` positions before `first`. Positions outside of `from` are zeros.
fn pad(from: &[f32], first: usize, before: usize, len: usize, padded: &mut Vec<f32>) {
    let zeros = before.saturating_sub(first);
    let start = (first + zeros - before).min(from.len());
    let end = (first + len).saturating_sub(before).clamp(start, from.len());
    padded.clear();
    padded.resize(zeros.min(len), 0.0);
    padded.extend_from_slice(&from[start..end]);
    padded.resize(len, 0.0);
}

/// Sliding maximum: replaces `x[j]` with the maximum of the `width` values from `x[j]` on (fewer at the end). Takes O(n
/// log width), all vectorised: windows of 1, 2, 4, ... are joined in place.
pub(super) fn window_max(x: &mut [f32], width: usize) {
    const LANES: usize = 8;
    let mut have = 1;
    while have < width {
        let step = have.min(width - have);
        let mut j = 0;
        // Reads the values ahead before they change.
        while let Some(&ahead) = x.get(j + step..).and_then(|x| x.first_chunk::<LANES>()) {
            join(&mut x[j..j + LANES], &ahead);
            j += LANES;
        }
        for j in j..x.len().saturating_sub(step) {
            let ahead = x[j + step];
            join(&mut x[j..=j], &[ahead]);
        }
        have += step;
    }
}

/// Writes the larger value of each pair to `x`.
fn join(x: &mut [f32], ahead: &[f32]) {
    // Not `f32::max`: the values contain no NaN, and the test for NaN costs more than the maximum.
    x.iter_mut().zip(ahead).for_each(|(x, &ahead)| *x = if ahead > *x { ahead } else { *x });
}

/// Applies spans to the entries `part`: sets the first values of `padded` to `max(score[j - forward ..= j + back])`, so
/// that a hit at `i` raises `i - back ..= i + forward`. Scores are not negative.
pub(super) fn spread(score: &[f32], span: Span, part: Range<usize>, padded: &mut Vec<f32>) {
    // With `forward` values before and `back` after, every window is `x[j..j + width]`. The zeros never exceed a score.
    let (forward, back) = (span.forward.min(score.len()), span.back.min(score.len()));
    pad(score, part.start, forward, forward + part.len() + back, padded);
    window_max(padded, forward + back + 1);
}

/// Appends the key of every entry of a KV head, from the first entry to the last.
pub(super) fn push_keys(keys: &mut Vec<u64>, forced: &Forced, head: usize, score: impl Fn(usize) -> f32) {
    keys.extend((0..forced.head).map(forced_key));
    let mut next = forced.head;
    for &entry in forced.protected(head) {
        let entry = entry as usize;
        keys.extend((next..entry).map(|j| key(score(j), j)));
        keys.push(forced_key(entry));
        next = entry + 1;
    }
    keys.extend((next..forced.tail).map(|j| key(score(j), j)));
    keys.extend((forced.tail..forced.n).map(forced_key));
}

/// Returns a number that sorts the entries of a head: ascending keys are descending scores, and among equal scores the
/// older entry comes first. Spans produce many equal scores; if a span does not fit, the part nearest to its hit is
/// kept. `score` must be finite and not negative.
#[inline]
pub(super) fn key(score: f32, entry: usize) -> u64 {
    // The bits of non-negative floats sort like the floats. Adding 0 turns -0 into 0.
    (u64::from(!(score + 0.0).to_bits()) << 32) | entry as u64
}

/// Returns a key that sorts the entry before all others.
#[inline]
pub(super) fn forced_key(entry: usize) -> u64 {
    entry as u64
}

/// Returns the entry of a key.
#[inline]
pub(super) fn entry(key: u64) -> u32 {
    key as u32
}

/// Turns the mass at each rank (in any unit, summed over heads) into the share lost by a cut: `curve[c]`, for `c` in
/// `0..=n`, is the mass at ranks `c..` divided by `whole`.
pub(super) fn lost_curve(mut at_rank: Vec<f64>, whole: f64) -> Vec<f64> {
    at_rank.push(0.0);
    // Sums from the smallest values up, so that large kept masses do not round small lost ones.
    let mut lost = 0.0;
    for mass in at_rank.iter_mut().rev() {
        lost += *mass;
        *mass = lost / whole;
    }
    at_rank
}

/// Returns the smallest `C` that loses at most `eps`. The curve falls, so a binary search finds `C`. Its last value is
/// 0, so a solution always exists.
pub(super) fn smallest_count(curve: &[f64], eps: f32) -> usize {
    curve.partition_point(|&lost| lost > f64::from(eps))
}

/// Returns `C` after all bounds, and the bound that set it. `wanted` is the count that the policy's own `rule` asks
/// for.
pub(super) fn bounded(wanted: usize, rule: Bound, forced: &Forced, params: &Params) -> (usize, Bound) {
    let (mut count, mut bound) = (wanted, rule);
    if count < forced.count() {
        (count, bound) = (forced.count(), Bound::Forced);
    }
    if count < params.min_cells {
        (count, bound) = (params.min_cells, Bound::MinCells);
    }
    match params.max_cells {
        // Checked last, because the cap overrides all other bounds.
        Some(cap) if cap < count => (cap, Bound::MaxCells),
        _ if count >= forced.n => (forced.n, Bound::All),
        _ => (count, bound),
    }
}

/// Keeps the first `count` of each head's ranking, ascending.
///
/// `ranking` is `[head][n]` entries from best to worst; the result reuses its memory.
pub(super) fn keep_heads(mut ranking: Vec<u32>, n: usize, count: usize) -> Kept {
    let heads = ranking.len() / n;
    cut(&mut ranking, n, &vec![count as u32; heads]);
    Kept::Heads { n_cells: count, index: ranking }
}

/// Keeps the first `counts[head]` of each head's ranking, ascending. `ranking` as in [`keep_heads`].
pub(super) fn keep_ragged(mut ranking: Vec<u32>, n: usize, counts: &[u32]) -> Kept {
    cut(&mut ranking, n, counts);
    let end = counts.iter().scan(0, |end, &count| {
        *end += count as usize;
        Some(*end)
    });
    Kept::Ragged { end: end.collect(), index: ranking }
}

/// Reduces a ranking of `[head][n]` entries to the best `counts` of each head, ascending, with the heads divided among
/// threads.
fn cut(ranking: &mut Vec<u32>, n: usize, counts: &[u32]) {
    let threads = threads::at_most().min(ranking.len() / CUT_A_THREAD).max(1);
    let share = counts.len().div_ceil(threads).max(1);
    let parts = ranking.chunks_mut(share * n).zip(counts.chunks(share));
    threads::share_out(threads, parts, |(rows, counts)| sort_best(rows, n, counts), || ());
    let mut end = 0;
    for (head, &count) in counts.iter().enumerate() {
        ranking.copy_within(head * n..head * n + count as usize, end);
        end += count as usize;
    }
    ranking.truncate(end);
    ranking.shrink_to_fit();
}

/// Sorts the first `counts` entries of each row of `n` in ascending order. The rest of each row is unspecified
/// afterwards.
fn sort_best(rows: &mut [u32], n: usize, counts: &[u32]) {
    let mut stays = vec![false; n];
    for (row, &count) in rows.chunks_mut(n).zip(counts) {
        stays.fill(false);
        row[..count as usize].iter().for_each(|&entry| stays[entry as usize] = true);
        let mut next = 0;
        for (entry, &stays) in (0..).zip(&stays) {
            // Branch-free: writes every entry, and the next one overwrites an entry that does not stay.
            row[next] = entry;
            next += usize::from(stays);
        }
    }
}

/// Keeps the first `count` of the ranking that all heads share, ascending.
pub(super) fn keep_tokens(mut ranking: Vec<u32>, count: usize) -> Kept {
    ranking.truncate(count);
    ranking.sort_unstable();
    ranking.shrink_to_fit();
    Kept::Tokens(ranking)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalise_sums_to_one_and_drops_what_is_no_probability() {
        let mut out = [9.0; 5];
        normalise(&[1.0, f32::NAN, -2.0, f32::INFINITY, 3.0], &mut out);
        assert_eq!(out, [0.25, 0.0, 0.0, 0.0, 0.75]);
        normalise(&[0.0; 5], &mut out);
        assert_eq!(out, [0.0; 5]);
    }

    #[test]
    fn a_pool_divides_by_its_width_at_the_edges_too() {
        let mut out = [0.0; 6];
        average_pool(&[10.0, 0.0, 0.0, 0.0, 0.0, 5.0], 5, 0, &mut Vec::new(), &mut out);
        let expected = [2.0, 2.0, 2.0, 1.0, 1.0, 1.0];
        out.iter().zip(expected).for_each(|(a, b)| assert!((a - b).abs() < 1e-6, "{out:?}"));
    }

    #[test]
    fn window_max_is_the_maximum_of_every_window() {
        let values: Vec<f32> = (0..50).map(|i| ((i * 37) % 23) as f32).collect();
        for width in 1..60 {
            let mut out = values.clone();
            window_max(&mut out, width);
            for j in 0..values.len() {
                let end = (j + width).min(values.len());
                let expected = values[j..end].iter().copied().fold(0.0, f32::max);
                assert_eq!(out[j], expected, "width {width}, position {j}");
            }
        }
    }

    #[test]
    fn keys_sort_by_score_then_age_and_forced_ones_first() {
        let mut keys = [key(0.5, 7), key(0.0, 0), key(0.5, 2), key(1e-40, 5), forced_key(9), key(-0.0, 1)];
        keys.sort_unstable();
        assert_eq!(keys.map(entry), [9, 2, 7, 5, 0, 1]);
    }

    #[test]
    fn the_curve_is_what_lies_behind_the_cut() {
        let curve = lost_curve(vec![4.0, 2.0, 1.0, 1.0], 8.0);
        assert_eq!(curve, [1.0, 0.5, 0.25, 0.125, 0.0]);
        assert_eq!(smallest_count(&curve, 0.5), 1);
        assert_eq!(smallest_count(&curve, 0.49), 2);
        assert_eq!(smallest_count(&curve, 0.125), 3);
        assert_eq!(smallest_count(&curve, 0.1), 4);
    }

    #[test]
    fn the_cap_beats_every_other_bound() {
        let params = Params { sinks: 2, recent: 3, min_cells: 10, max_cells: Some(20), ..Params::default() };
        let at = |wanted, n| bounded(wanted, Bound::LostMass, &Forced::new(&params, n, &Protected::default()), &params);
        assert_eq!(at(15, 100), (15, Bound::LostMass));
        assert_eq!(at(7, 100), (10, Bound::MinCells));
        assert_eq!(at(1, 100), (10, Bound::MinCells));
        assert_eq!(at(21, 100), (20, Bound::MaxCells));
        assert_eq!(at(8, 9), (9, Bound::All));
        let params = Params { min_cells: 0, ..params };
        let forced = Forced::new(&params, 100, &Protected::default());
        assert_eq!(bounded(1, Bound::Budget, &forced, &params), (5, Bound::Forced));
    }

    #[test]
    fn forced_entries_meet_in_a_short_prompt() {
        let params = Params { sinks: 4, recent: 6, ..Params::default() };
        for n in 0..20 {
            let forced = Forced::new(&params, n, &Protected::default());
            assert_eq!(forced.count(), (0..n).filter(|&j| forced.contains(0, j)).count(), "n {n}");
            assert_eq!(forced.count(), n.min(10), "n {n}");
        }
    }

    #[test]
    fn heads_are_cut_in_place_and_sorted() {
        let ranking = vec![3, 0, 2, 1, /* head 1 */ 1, 3, 0, 2];
        let kept = keep_heads(ranking.clone(), 4, 2);
        assert_eq!(kept, Kept::Heads { n_cells: 2, index: vec![0, 3, 1, 3] });
        let kept = keep_heads(ranking.clone(), 4, 3);
        assert_eq!(kept, Kept::Heads { n_cells: 3, index: vec![0, 2, 3, 0, 1, 3] });
        let kept = keep_ragged(ranking.clone(), 4, &[1, 4]);
        assert_eq!(kept, Kept::Ragged { end: vec![1, 5], index: vec![3, 0, 1, 2, 3] });
        let kept = keep_ragged(ranking, 4, &[4, 2]);
        assert_eq!(kept, Kept::Ragged { end: vec![4, 6], index: vec![0, 1, 2, 3, 1, 3] });
    }
}
