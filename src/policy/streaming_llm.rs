//! `streaming-llm`: the first tokens and the last ones, whatever they say (Xiao et al., "Efficient Streaming Language
//! Models with Attention Sinks", arXiv 2309.17453).
//!
//! Keeps the first `sinks` entries and the newest `C - sinks`. Positions stay what they were: the paper's renumbering
//! serves endless streams, not a prompt within the trained context.

use super::rank::{self, Forced};
use super::{Bound, HeadScores, Kept, Kind, Needs, Params, Policy, Selection, Shape};

pub(super) struct StreamingLlm {
    params: Params,
    n: usize,
}

impl StreamingLlm {
    pub fn new(params: &Params, shape: Shape) -> Self {
        Self { params: params.clone(), n: shape.n }
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
        let n = self.n;
        let forced = Forced::new(&self.params, n);
        let (count, bound) = rank::bounded(self.params.fixed_cells(n), Bound::Ratio, &forced, &self.params);
        if bound == Bound::All {
            return Selection::all(n);
        }
        let tail = n - (count - forced.head);
        let kept = (0..forced.head as u32).chain(tail as u32..n as u32).collect();
        Selection { n, kept: Kept::Tokens(kept), lost_mass: None, bound, ragged: None }
    }
}
