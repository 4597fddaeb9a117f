//! `snapkv`: keeps the entries that the last real queries attended to (Li et al., "SnapKV: LLM Knows What You are
//! Looking for Before Generation", arXiv 2404.14469).
//!
//! For each KV head: the attention that the last `window` queries pay to each older entry, mean over the queries and
//! the group's query heads, average-pooled over `pool` positions. The best `C` entries are kept, always including the
//! window itself.

use super::fixed::FixedBudget;
use super::{HeadScores, Kind, Needs, Params, Policy, Protected, Selection, Shape, rank};

pub(super) struct SnapKv {
    budget: FixedBudget,
    observed: Observed,
}

impl SnapKv {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        Self { budget: FixedBudget::new(params, shape, protected), observed: Observed::new(params, shape) }
    }
}

/// Computes the paper's scores of the entries of one head.
pub(super) struct Observed {
    /// Number of entries before the window.
    older: usize,
    pool: usize,
    /// `[n]` pooled attention of one head. Entries in the window are never written and stay 0.
    pooled: Vec<f32>,
    padded: Vec<f32>,
}

impl Observed {
    pub fn new(params: &Params, shape: Shape) -> Self {
        Self {
            older: shape.n.saturating_sub(params.window),
            pool: params.pool,
            pooled: vec![0.0; shape.n],
            padded: Vec::new(),
        }
    }

    /// Returns the pooled mean attention, `[n]`.
    pub fn pool(&mut self, scores: &HeadScores<'_>) -> &[f32] {
        let older = self.older;
        rank::average_pool(&scores.observed[..older], self.pool, 0, &mut self.padded, &mut self.pooled[..older]);
        &self.pooled
    }
}

impl Policy for SnapKv {
    fn name(&self) -> &'static str {
        Kind::SnapKv.name()
    }

    fn needs(&self) -> Needs {
        Needs { observed: true, ..Needs::default() }
    }

    fn observe(&mut self, head: usize, scores: &HeadScores<'_>) {
        self.budget.add(head, self.observed.pool(scores));
    }

    fn select(self: Box<Self>) -> Selection {
        self.budget.select()
    }
}
