//! What a vote saw and weighed, kept where somebody wants it explained. Other votes keep nothing.

use super::Sequence;
use crate::cache::Cell;
use crate::llama::Token;
use crate::policy::{HeadOpinion, Opinions, Params, Protected, Ranking, Selection, Shape};

/// The notes of one vote.
#[derive(Default)]
pub(crate) struct Notes {
    opinions: Option<Opinions>,
    ranking: Option<Ranking>,
    /// The continuation that a trial compared on.
    pub draft: Vec<Token>,
    /// The mean KL beyond that of rounding that the trial let pass, in nats a token.
    pub bar: Option<f32>,
    /// `[n + 1]` the mean share of the attention mass that is lost at each count; empty where the policy has none.
    pub curve: Vec<f64>,
    /// `[head]`; see [`Opinions::on`].
    pub heads: Vec<HeadOpinion>,
    /// `[n_past]` what real and synthetic queries look at, mean over the heads, by position; sums to 1. Empty where they did
    /// not vote.
    pub real: Vec<f64>,
    pub synthetic: Vec<f64>,
}

impl Notes {
    /// A vote begins.
    pub fn begin(&mut self, params: &Params, shape: Shape, protected: &Protected) {
        self.opinions = Some(Opinions::new(params, shape, protected));
    }

    /// Where scores are noted, once the vote has begun.
    pub fn opinions(&mut self) -> Option<&mut Opinions> {
        self.opinions.as_mut()
    }

    /// What it is going to be cut from.
    pub fn ranked(&mut self, ranking: Option<Ranking>) {
        self.curve = ranking.as_ref().map(|ranking| ranking.curve().to_vec()).unwrap_or_default();
        self.ranking = ranking;
    }

    /// What it came to. `cells`: those of the sequence, before anything is dropped.
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
