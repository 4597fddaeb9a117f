//! Shared base of the policies with a fixed budget: takes one score for each head and entry, keeps the best `C` of each
//! head.
//!
//! `C` is a share of the entries (`--ratio`), or `--max-cells`; see [`Params::fixed_cells`].

use super::rank::{self, Forced};
use super::{Bound, Evict, Params, Protected, Selection, Shape};

/// Collects scores head by head. Takes 4 bytes for each head and entry.
pub(super) struct FixedBudget {
    params: Params,
    shape: Shape,
    forced: Forced,
    /// Heads added so far.
    seen: usize,
    /// `[head][n]` entries from best to worst. Empty for `Evict::Cells`.
    ranking: Vec<u32>,
    /// `[n]` scores summed over heads, each head's normalised to sum 1. Empty for `Evict::Composite`.
    sum: Vec<f64>,
    /// Scratch for one head.
    normal: Vec<f32>,
    padded: Vec<f32>,
    keys: Vec<u64>,
}

impl FixedBudget {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        let per_token = if params.evict == Evict::Cells { shape.n } else { 0 };
        Self {
            params: params.clone(),
            shape,
            forced: Forced::new(params, shape.n, protected),
            seen: 0,
            ranking: Vec::new(),
            sum: vec![0.0; per_token],
            normal: vec![0.0; shape.n],
            padded: Vec::new(),
            keys: Vec::with_capacity(shape.n),
        }
    }

    /// Adds the scores of the next head: `[n]`, not negative, larger is better.
    ///
    /// # Panics
    /// If the head is not the next one, or `scores` does not have `n` values.
    pub fn add(&mut self, head: usize, scores: &[f32]) {
        assert!(head == self.seen && head < self.shape.heads(), "head {head} is out of order");
        assert_eq!(scores.len(), self.shape.n, "scores of head {head}");
        self.seen += 1;
        rank::normalise(scores, &mut self.normal);
        rank::spread(&self.normal, self.params.span, 0..self.shape.n, &mut self.padded);
        match self.params.evict {
            Evict::Composite => {
                self.keys.clear();
                rank::push_keys(&mut self.keys, &self.forced, head, |j| self.padded[j]);
                self.keys.sort_unstable();
                self.ranking.reserve_exact(self.shape.n);
                self.ranking.extend(self.keys.iter().map(|&key| rank::entry(key)));
            }
            Evict::Cells => {
                for (sum, &score) in self.sum.iter_mut().zip(&self.padded) {
                    *sum += f64::from(score);
                }
            }
        }
    }

    pub fn select(self) -> Selection {
        let wanted = self.params.fixed_cells(self.shape.n);
        self.select_count(wanted, Bound::Ratio)
    }

    /// Selects as many cells as `rule` wants, within the bounds.
    pub fn select_count(mut self, wanted: usize, rule: Bound) -> Selection {
        assert_eq!(self.seen, self.shape.heads(), "heads observed before select");
        let n = self.shape.n;
        let (count, bound) = rank::bounded(wanted, rule, &self.forced, &self.params);
        if bound == Bound::All {
            return Selection::all(n);
        }
        let kept = match self.params.evict {
            Evict::Composite => rank::keep_heads(self.ranking, n, count),
            Evict::Cells => {
                self.keys.clear();
                rank::push_keys(&mut self.keys, &self.forced, 0, |j| self.sum[j] as f32);
                self.keys.sort_unstable();
                rank::keep_tokens(self.keys.iter().map(|&key| rank::entry(key)).collect(), count)
            }
        };
        Selection { n, kept, lost_mass: None, bound, ragged: None }
    }
    /// Selects an individual number of entries for each head: `counts[head]`. Composite only.
    pub fn select_ragged(self, counts: &[u32], bound: Bound) -> Selection {
        assert_eq!(self.seen, self.shape.heads(), "heads observed before select");
        let n = self.shape.n;
        if bound == Bound::All {
            return Selection::all(n);
        }
        let kept = rank::keep_ragged(self.ranking, n, counts);
        Selection { n, kept, lost_mass: None, bound, ragged: None }
    }
}
