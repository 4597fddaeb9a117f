//! `adakv`: SnapKV's scores with a budget that the heads of a layer share (Feng et al., "Ada-KV: Optimizing KV Cache
//! Eviction by Adaptive Budget Allocation for Efficient LLM Inference", arXiv 2407.11550, algorithms 1 and 2).
//!
//! Scores and ranking within a head are those of `snapkv`. For each layer of `h` KV heads and a budget of `C`:
//! 1. Sinks and recent tokens stay in every head; `u = C - forced` further entries a head are distributed.
//! 2. The best `h * u` entries are taken over all heads of the layer together; head `i` wins `w_i` of them. The
//!    comparison uses the raw attention, which sums to 1 in every head, not a head's normalised score.
//! 3. Safeguard: head `i` gets `α u + (1 - α) w_i`, rounded so that the layer still keeps `h * C`; `α` = 0.2.
//!
//! So each head has a budget of its own ([`Ragged`](super::Ragged)). A cell of llama.cpp holds one row for every head,
//! so a cache needs as many cells as the largest budget of any head in any layer. The other heads fill the remaining
//! rows with their next best entries. Every head then keeps the same entries as `snapkv` with that many cells: **in
//! llama.cpp, Ada-KV is SnapKV with more cells.** With [`Params::exact`] the budgets stay unequal, so that
//! [`Kept::Ragged`](super::Kept::Ragged) can be measured.

use super::fixed::FixedBudget;
use super::rank::{self, Forced};
use super::snapkv::Observed;
use super::{Bound, HeadScores, Kind, Needs, Params, Policy, Protected, Ragged, Selection, Shape, Span};

/// The inverse of the paper's `α`. An integer, so that rounding is the same on every machine.
const SAFEGUARD: usize = 5;

pub(super) struct AdaKv {
    observed: Observed,
    budget: FixedBudget,
    shape: Shape,
    span: Span,
    forced: Forced,
    exact: bool,
    /// `u`: entries to distribute, for each head.
    free: usize,
    bound: Bound,
    /// Raw scores of the current layer, as keys, each with its head's index in the layer.
    layer: Vec<(u64, u32)>,
    /// `[head]` budgets of the layers observed so far.
    counts: Vec<u32>,
    lifted: Vec<f32>,
}

impl AdaKv {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        let forced = Forced::new(params, shape.n, protected);
        let wanted = params.fixed_cells(shape.n);
        let (count, bound) = if params.exact {
            rank::bounded(wanted, Bound::Ratio, &forced, params)
        } else {
            // The caps limit cells, whose number is known only after all heads have been observed.
            let rule = if wanted < forced.count() { Bound::Forced } else { Bound::Ratio };
            (wanted.clamp(forced.count(), shape.n), rule)
        };
        Self {
            observed: Observed::new(params, shape),
            budget: FixedBudget::new(params, shape, protected),
            shape,
            span: params.span,
            exact: params.exact,
            // Does not underflow: validation rejects a cap below the forced entries.
            free: count - forced.count(),
            bound,
            layer: Vec::with_capacity(shape.n_head_kv * (forced.tail - forced.head)),
            forced,
            counts: Vec::with_capacity(shape.heads()),
            lifted: Vec::new(),
        }
    }

    /// Runs steps 2 and 3 for the current layer.
    fn share(&mut self) {
        let heads = self.shape.n_head_kv;
        let all = self.free * heads;
        if 0 < all && all < self.layer.len() {
            // Selects the best entries without sorting them; their order does not matter.
            self.layer.select_nth_unstable(all - 1);
        }
        let mut won = vec![0; heads];
        for &(_, head) in &self.layer[..all] {
            won[head as usize] += 1;
        }
        let first = self.counts.len();
        let forced = |in_layer| self.forced.count_of(first + in_layer);
        let shares = safeguard(&won, self.free);
        self.counts.extend(shares.iter().enumerate().map(|(i, count)| (forced(i) + count) as u32));
        self.layer.clear();
    }
}

impl Policy for AdaKv {
    fn name(&self) -> &'static str {
        Kind::AdaKv.name()
    }

    fn needs(&self) -> Needs {
        Needs { observed: true, ..Needs::default() }
    }

    fn observe(&mut self, head: usize, scores: &HeadScores<'_>) {
        let pooled = self.observed.pool(scores);
        self.budget.add(head, pooled);
        rank::spread(pooled, self.span, 0..self.shape.n, &mut self.lifted);
        let in_layer = head % self.shape.n_head_kv;
        let key = |j: usize| (rank::key(rank::clean(self.lifted[j]), j), in_layer as u32);
        let Forced { head: start, tail, .. } = self.forced;
        let free = (start..tail).filter(|&j| !self.forced.contains(head, j));
        self.layer.extend(free.map(key));
        if in_layer + 1 == self.shape.n_head_kv {
            self.share();
        }
    }

    fn select(self: Box<Self>) -> Selection {
        let Self { budget, counts, bound, exact, .. } = *self;
        let ragged = Ragged::of(&counts);
        let selection = match exact {
            true => budget.select_ragged(&counts, bound),
            false => budget.select_count(ragged.max as usize, bound),
        };
        Selection { ragged: Some(ragged), ..selection }
    }
}

/// Step 3: returns the number of entries that each head gets beside its forced ones; the mean is `free`. The largest
/// remainders are rounded up; among equal remainders, the first.
fn safeguard(won: &[usize], free: usize) -> Vec<usize> {
    let parts: Vec<usize> = won.iter().map(|won| free + (SAFEGUARD - 1) * won).collect();
    let mut counts: Vec<usize> = parts.iter().map(|part| part / SAFEGUARD).collect();
    let left = free * won.len() - counts.iter().sum::<usize>();
    let mut by_remainder: Vec<usize> = (0..won.len()).collect();
    by_remainder.sort_by_key(|&head| std::cmp::Reverse(parts[head] % SAFEGUARD));
    for &head in &by_remainder[..left] {
        counts[head] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_is_safe_and_nothing_is_lost_in_rounding() {
        assert_eq!(safeguard(&[30, 0, 0], 10), [26, 2, 2]);
        assert_eq!(safeguard(&[10, 10, 10], 10), [10, 10, 10]);
        assert_eq!(safeguard(&[0, 0], 0), [0, 0]);
        // 1.2 + 0.8 * (5, 8, 5) = 5.2, 7.6, 5.2
        assert_eq!(safeguard(&[5, 8, 5], 6), [5, 8, 5]);
        // 0.6 + 0.8 * (1, 2, 6) = 1.4, 2.2, 5.4
        assert_eq!(safeguard(&[1, 2, 6], 3), [2, 2, 5]);
    }
}
