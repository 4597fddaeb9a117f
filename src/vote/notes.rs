//! Records what a vote observed and decided, for votes that are to be explained. Other votes record nothing.

use super::Sequence;
use crate::cache::Cell;
use crate::llama::Token;
use crate::policy::{HeadOpinion, Opinions, Params, Protected, Ranking, Selection, Shape};

/// Notes on one vote.
#[derive(Default)]
pub(crate) struct Notes {
    opinions: Option<Opinions>,
    ranking: Option<Ranking>,
    /// Tokens on which the trial compared smaller caches with the full cache.
    pub draft: Vec<Token>,
    /// Largest mean KL divergence that the trial accepts, less that caused by rounding, in nats a token.
    pub bar: Option<f32>,
    /// `[n + 1]` mean share of the attention mass that is lost at each number of cells; empty if the policy has no such curve.
    pub curve: Vec<f64>,
    /// `[head]`; see [`Opinions::on`].
    pub heads: Vec<HeadOpinion>,
    /// `[n_past]` attention of real and of synthetic queries by position, mean over the heads; sums to 1. Empty if these queries did not
    /// vote.
    pub real: Vec<f64>,
    pub synthetic: Vec<f64>,
}

impl Notes {
    /// Starts the notes of a vote.
    pub fn begin(&mut self, params: &Params, shape: Shape, protected: &Protected) {
        self.opinions = Some(Opinions::new(params, shape, protected));
    }

    /// Receiver of the scores; None before the vote has begun.
    pub fn opinions(&mut self) -> Option<&mut Opinions> {
        self.opinions.as_mut()
    }

    /// Records the ranking from which the selection will be made.
    pub fn ranked(&mut self, ranking: Option<Ranking>) {
        self.curve = ranking.as_ref().map(|ranking| ranking.curve().to_vec()).unwrap_or_default();
        self.ranking = ranking;
    }

    /// Records the selection. `cells`: those of the sequence before anything is dropped.
    pub fn selected(&mut self, selection: &Selection, sequence: &Sequence, cells: &[Cell], n_heads: usize) {
        let (Some(opinions), ranking) = (self.opinions.take(), self.ranking.take()) else { return };
        self.heads = opinions.on(selection, ranking.as_ref());
        for head in 0..n_heads {
            let positions = sequence.positions(cells, head);
            for (sums, values) in [&mut self.real, &mut self.synthetic].into_iter().zip(opinions.of_head(head)) {
                if values.is_empty() {
                    continue;
                }
                sums.resize(sequence.n_past() as usize, 0.0);
                for (&pos, &value) in positions.iter().zip(values) {
                    sums[pos as usize] += f64::from(value) / n_heads as f64;
                }
            }
        }
    }
}
