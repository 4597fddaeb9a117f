//! `keydiff`: keeps keys unlike the others (Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for
//! Long-Context LLM Inference in Resource-Constrained Environments", arXiv 2504.15364).
//!
//! For each KV head the anchor is the mean of all keys, each scaled to length 1. The keys with the smallest cosine
//! similarity to the anchor are kept. Needs no queries.

use super::fixed::FixedBudget;
use super::{HeadScores, Kind, Needs, Params, Policy, Protected, Selection, Shape};

pub(super) struct KeyDiff {
    budget: FixedBudget,
    score: Vec<f32>,
}

impl KeyDiff {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        Self { budget: FixedBudget::new(params, shape, protected), score: Vec::with_capacity(shape.n) }
    }
}

impl Policy for KeyDiff {
    fn name(&self) -> &'static str {
        Kind::KeyDiff.name()
    }

    fn needs(&self) -> Needs {
        Needs { key_similarity: true, ..Needs::default() }
    }

    fn observe(&mut self, head: usize, scores: &HeadScores<'_>) {
        self.score.clear();
        // 1 - similarity is 0 to 2: scores must not be negative.
        self.score.extend(scores.key_similarity.iter().map(|similarity| 1.0 - similarity));
        self.budget.add(head, &self.score);
    }

    fn select(self: Box<Self>) -> Selection {
        self.budget.select()
    }
}
