//! `full`: keeps every entry. The reference for all other policies, and the result for a prompt too short to compress.

use super::{HeadScores, Needs, Params, Policy, Protected, Selection, Shape};

pub(super) struct Full {
    name: &'static str,
    n: usize,
}

impl Full {
    /// Stores the name of the requested policy: a short prompt under `gvote` is still reported as `gvote`.
    pub fn new(params: &Params, shape: Shape, _protected: &Protected) -> Self {
        Self { name: params.policy.name(), n: shape.n }
    }
}

impl Policy for Full {
    fn name(&self) -> &'static str {
        self.name
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn observe(&mut self, _head: usize, _scores: &HeadScores<'_>) {}

    fn select(self: Box<Self>) -> Selection {
        Selection::all(self.n)
    }
}
