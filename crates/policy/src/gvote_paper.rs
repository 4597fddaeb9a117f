//! `gvote-paper`: GVote as published (arXiv 2509.03136), reduced to equal head sizes that a llama.cpp cell can store.
//!
//! For each query head of a KV head's group, on softmax probabilities `p`:
//! 1. `b` = size of the smallest set of keys that holds `p_nuc` of the current query's attention.
//! 2. Each of the `S` synthetic queries votes for its own top `b`.
//! 3. The current query votes for its own top `b`.
//!
//! The union holds every entry with a vote from any query head of the group, the first `sinks` and the last `recent`.
//! Its size is the KV head's budget, and differs from head to head ([`Ragged`]). All heads of a llama.cpp cache hold
//! the same number of cells, so
//!
//! 4. `C = ceil(mean budget over all heads)`, then `min_cells` and `max_cells`;
//! 5. each head keeps its top `C` by number of votes, then by the probability summed over all queries of the group,
//!    then the older entry. Sinks and recent entries rank before all others.
//!
//! With [`Evict::Cells`] votes and sums are added up over all heads, and the first `C` of that one ranking are kept.
//!
//! With [`Params::exact`] each head keeps its own union instead, as in the paper, so that
//! [`Kept::Ragged`](super::Kept::Ragged) can be measured.
//!
//! This policy is a baseline: exact and simple rather than fast. It takes 4 bytes for each head and entry.

use std::cmp::Reverse;

use super::rank::{self, Forced};
use super::{Bound, Evict, HeadScores, Kind, Needs, Params, Policy, Protected, Ragged, Selection, Shape};

pub(super) struct GvotePaper {
    params: Params,
    shape: Shape,
    forced: Forced,
    /// `[head]` size of the union, for the heads observed so far.
    budget: Vec<u32>,
    /// `[head][n]` entries from best to worst. Empty for `Evict::Cells`.
    ranking: Vec<u32>,
    /// `[n]` share of the summed probability at each rank, summed over heads (`Composite`), or of each entry (`Cells`).
    share: Vec<f64>,
    /// `[n]` votes and summed probabilities of all heads. Empty for `Evict::Composite`.
    all_votes: Vec<u64>,
    all_sums: Vec<f64>,
    /// Scratch for one head: `[n]` votes, summed probabilities, keys.
    votes: Vec<u32>,
    sums: Vec<f64>,
    keys: Vec<u64>,
}

impl GvotePaper {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        let n = shape.n;
        let (per_head, per_token) = match params.evict {
            Evict::Composite => (shape.heads() * n, 0),
            Evict::Cells => (0, n),
        };
        Self {
            params: params.clone(),
            shape,
            forced: Forced::new(params, n, protected),
            budget: Vec::with_capacity(shape.heads()),
            ranking: Vec::with_capacity(per_head),
            share: vec![0.0; n],
            all_votes: vec![0; per_token],
            all_sums: vec![0.0; per_token],
            votes: vec![0; n],
            sums: vec![0.0; n],
            keys: Vec::with_capacity(n),
        }
    }

    /// Runs steps 1 to 3 for one query head; `queries` is `[S + 1][n]`, the current query last.
    fn vote(&mut self, queries: &[f32]) {
        let n = self.shape.n;
        let (samples, current) = queries.split_at(queries.len() - n);
        self.load(current);
        self.keys.sort_unstable();
        let b = nucleus(&self.keys, current, self.params.p_nuc);
        self.cast(b);
        for sample in samples.chunks_exact(n) {
            self.load(sample);
            if 0 < b && b < n {
                // Selects the top `b` without sorting them; their order does not matter.
                self.keys.select_nth_unstable(b - 1);
            }
            self.cast(b);
        }
    }

    fn load(&mut self, p: &[f32]) {
        self.keys.clear();
        for (j, (&p, sum)) in p.iter().zip(&mut self.sums).enumerate() {
            *sum += f64::from(rank::clean(p));
            self.keys.push(rank::key(rank::clean(p), j));
        }
    }

    fn cast(&mut self, b: usize) {
        for &key in &self.keys[..b] {
            self.votes[rank::entry(key) as usize] += 1;
        }
    }
}

impl Policy for GvotePaper {
    fn name(&self) -> &'static str {
        Kind::GvotePaper.name()
    }

    fn needs(&self) -> Needs {
        Needs { each: true, ..Needs::default() }
    }

    fn observe(&mut self, head: usize, scores: &HeadScores<'_>) {
        let (n, queries) = (self.shape.n, self.params.samples + 1);
        let in_order = head == self.budget.len() && head < self.shape.heads();
        assert!(in_order, "head {head} is out of order");
        assert_eq!(scores.each.len(), self.shape.group * queries * n, "scores of head {head}");

        self.votes.fill(0);
        self.sums.fill(0.0);
        for query_head in scores.each.chunks_exact(queries * n) {
            self.vote(query_head);
        }
        let union = (0..n).filter(|&j| self.votes[j] > 0 || self.forced.contains(head, j)).count();
        self.budget.push(union as u32);

        let total: f64 = self.sums.iter().sum();
        let share = |sum: f64| if total > 0.0 { sum / total } else { 0.0 };
        match self.params.evict {
            Evict::Composite => {
                let order = rank_by_votes(&self.forced, head, &self.votes, &self.sums);
                for (at_rank, &j) in self.share.iter_mut().zip(&order) {
                    *at_rank += share(self.sums[j as usize]);
                }
                self.ranking.extend(order);
            }
            Evict::Cells => {
                for j in 0..n {
                    self.all_votes[j] += u64::from(self.votes[j]);
                    self.all_sums[j] += self.sums[j];
                    self.share[j] += share(self.sums[j]);
                }
            }
        }
    }

    fn select(mut self: Box<Self>) -> Selection {
        let (n, heads) = (self.shape.n, self.shape.heads());
        assert_eq!(self.budget.len(), heads, "heads observed before select");
        if self.params.evict == Evict::Cells {
            self.ranking = rank_by_votes(&self.forced, 0, &self.all_votes, &self.all_sums);
            self.share = self.ranking.iter().map(|&j| self.share[j as usize]).collect();
        }
        let total: u64 = self.budget.iter().map(|&b| u64::from(b)).sum();
        let ragged = Ragged::of(&self.budget);
        if self.params.exact {
            let kept = rank::keep_ragged(self.ranking, n, &self.budget);
            return Selection { n, kept, lost_mass: None, bound: Bound::Budget, ragged: Some(ragged) };
        }
        let (wanted, rule) = match self.params.ratio {
            Some(_) => (self.params.fixed_cells(n), Bound::Ratio),
            None => (total.div_ceil(heads as u64) as usize, Bound::Budget),
        };
        let (count, bound) = rank::bounded(wanted, rule, &self.forced, &self.params);
        if bound == Bound::All {
            return Selection { ragged: Some(ragged), ..Selection::all(n) };
        }
        let curve = rank::lost_curve(self.share, heads as f64);
        let kept = match self.params.evict {
            Evict::Composite => rank::keep_heads(self.ranking, n, count),
            Evict::Cells => rank::keep_tokens(self.ranking, count),
        };
        let lost_mass = Some(curve[count] as f32);
        Selection { n, kept, lost_mass, bound, ragged: Some(ragged) }
    }
}

/// Returns the size of the smallest set that holds `p_nuc` of the attention. `keys` is sorted, best first. The share is
/// relative to the sum of `p`, which is 1 except for rounding: `p_nuc` = 1 must be reachable.
fn nucleus(keys: &[u64], p: &[f32], p_nuc: f32) -> usize {
    let of = |key: &u64| f64::from(rank::clean(p[rank::entry(*key) as usize]));
    let target = f64::from(p_nuc) * keys.iter().map(of).sum::<f64>();
    let mut sum = 0.0;
    let mut size = 0;
    while size < keys.len() && sum < target {
        sum += of(&keys[size]);
        size += 1;
    }
    size
}

/// Sorts all entries, best first: forced entries, then by votes, then by summed probability, then the older entry.
fn rank_by_votes<V: Copy + Ord>(forced: &Forced, head: usize, votes: &[V], sums: &[f64]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..forced.n as u32).collect();
    order.sort_unstable_by_key(|&entry| {
        let j = entry as usize;
        // Sums are finite and not negative, so their bits sort in the same order.
        Reverse((forced.contains(head, j), votes[j], sums[j].to_bits(), Reverse(entry)))
    });
    order
}
