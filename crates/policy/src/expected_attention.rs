//! `expected-attention`: scores by the attention that a Gaussian future query would pay, times the norm of the value
//! (Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
//! arXiv 2510.00636).
//!
//! For a query q ~ N(μ, Σ) the expected weight of key k is E[exp(s q·k)] = exp(s μ·k + s² kᵀΣk / 2), normalised over
//! the keys and averaged over the group's query heads. The score is `(weight + ε) ‖v‖`. Here μ·k and kᵀΣk are the mean
//! and the variance of the logits of the synthetic queries, which are samples of that Gaussian at the next positions;
//! the paper averages the rotation over the next 512 positions instead.

use super::fixed::FixedBudget;
use super::{HeadScores, Kind, Needs, Params, Policy, Protected, Selection, Shape, rank};

/// The paper's ε: keeps a value with a large norm competitive if its expected weight is almost 0.
const EPSILON: f32 = 0.02;

pub(super) struct ExpectedAttention {
    budget: FixedBudget,
    score: Vec<f32>,
}

impl ExpectedAttention {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        Self { budget: FixedBudget::new(params, shape, protected), score: Vec::with_capacity(shape.n) }
    }
}

impl Policy for ExpectedAttention {
    fn name(&self) -> &'static str {
        Kind::ExpectedAttention.name()
    }

    fn needs(&self) -> Needs {
        Needs { expected: true, value_norm: true, ..Needs::default() }
    }

    fn observe(&mut self, head: usize, scores: &HeadScores<'_>) {
        let weighted = scores.expected.iter().zip(scores.value_norm);
        self.score.clear();
        self.score.extend(weighted.map(|(&weight, &norm)| (rank::clean(weight) + EPSILON) * rank::clean(norm)));
        self.budget.add(head, &self.score);
    }

    fn select(self: Box<Self>) -> Selection {
        self.budget.select()
    }
}
