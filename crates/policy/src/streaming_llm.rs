//! `streaming-llm`: keeps the first and the last tokens, regardless of content (Xiao et al., "Efficient Streaming
//! Language Models with Attention Sinks", arXiv 2309.17453).
//!
//! Keeps the first `sinks` entries and the newest `C - sinks`. Positions do not change: the paper's renumbering serves
//! endless streams, not a prompt within the trained context.

use super::rank::{self, Forced};
use super::{Bound, HeadScores, Kind, Needs, Params, Policy, Protected, Selection, Shape};

pub(super) struct StreamingLlm {
    params: Params,
    forced: Forced,
}

impl StreamingLlm {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        Self { params: params.clone(), forced: Forced::new(params, shape.n, protected) }
    }
}

impl Policy for StreamingLlm {
    fn name(&self) -> &'static str {
        Kind::StreamingLlm.name()
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn observe(&mut self, _head: usize, _scores: &HeadScores<'_>) {}

    fn select(self: Box<Self>) -> Selection {
        let Self { params, forced } = *self;
        let n = forced.n;
        let (count, bound) = rank::bounded(params.fixed_cells(n), Bound::Ratio, &forced, &params);
        if bound == Bound::All {
            return Selection::all(n);
        }
        // Newer entries score higher.
        let mut keys = Vec::with_capacity(n);
        rank::push_keys(&mut keys, &forced, 0, |j| j as f32);
        keys.sort_unstable();
        let kept = rank::keep_tokens(keys.into_iter().map(rank::entry).collect(), count);
        Selection { n, kept, lost_mass: None, bound, ragged: None }
    }
}
