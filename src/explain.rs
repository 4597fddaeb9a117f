//! What a vote kept of a prompt, and why: for a page, a terminal, or another program.
//!
//! [`crate::Session::explain`] makes an [`Explanation`]. Which tokens stayed is read off the cache after the vote; the scores
//! are those that the policy saw.

#![forbid(unsafe_code)]

mod bits;
mod recalled;
mod text;

use serde::Serialize;

pub use self::bits::Bits;
pub use self::recalled::{EarlierVote, Recalled};
pub use self::text::shown;
use crate::llama::Token;
use crate::policy::{HeadOpinion, Params};
use crate::vote::CompressReport;

/// What a vote kept, and why.
///
/// *Position*: of a token in the text, from 0. *Head*: a KV head, counted over all layers of the cache, layer-major.
#[derive(Debug, Clone, Serialize)]
pub struct Explanation {
    #[serde(skip)]
    pub report: CompressReport,
    #[serde(skip)]
    pub policy: Params,
    /// `[position]` the tokens.
    pub tokens: Vec<Token>,
    /// `[position]` their text, as it can be shown: see the module's escapes.
    pub texts: Vec<String>,
    /// The numbers that the model gives to the layers of the cache; a sliding-window model has others beside them.
    pub layers: Vec<i32>,
    /// KV heads of each layer.
    pub n_head_kv: usize,
    /// `[head][position]` what is in the cache after the vote.
    pub kept: Bits,
    /// `[position]` heads that hold the token.
    pub kept_by: Vec<u32>,
    /// `[head]` how the vote looks from each head; empty where nothing was weighed or all stays.
    pub heads: Vec<HeadOpinion>,
    /// `[n + 1]` mean share of the attention mass that is given up by each number of cells; empty where the policy has none.
    pub curve: Vec<f64>,
    /// The mean KL beyond that of rounding that a trial let pass, in nats a token.
    pub bar: Option<f32>,
    /// The continuation on which the trial compared, as it can be shown.
    pub draft: Vec<String>,
    /// `[position]` what the last real queries look at, mean over the heads; sums to at most 1. Empty where they did not
    /// vote.
    pub real: Vec<f64>,
    /// `[position]` what synthetic queries and the current one look at, or the repeated text of a replay.
    pub synthetic: Vec<f64>,
    /// What left the cache before the vote, and came back; absent where no vote came before it, or nobody noted it: see
    /// [`crate::Session::note_recall`].
    pub recall: Option<Recalled>,
}

/// Tokens of a passage.
const PASSAGE: usize = 24;

/// A passage of the text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Passage {
    /// The position of its first token, and that behind its last one.
    pub start: usize,
    pub end: usize,
    /// Mean share of the heads that keep its tokens, 0 to 1.
    pub share: f64,
}

impl Explanation {
    /// KV heads of all layers.
    pub fn n_heads(&self) -> usize {
        self.layers.len() * self.n_head_kv
    }

    /// The `most` passages that were kept by most heads, the best first, at least one passage apart, and apart from what always stays.
    pub fn passages(&self, most: usize) -> Vec<Passage> {
        let end = self.kept_by.len().saturating_sub(self.policy.recent);
        let starts = self.policy.sinks..(end + 1).saturating_sub(PASSAGE);
        let share = |start: usize| {
            let kept: u32 = self.kept_by[start..start + PASSAGE].iter().sum();
            f64::from(kept) / (PASSAGE * self.n_heads()) as f64
        };
        let mut all: Vec<_> =
            starts.map(|start| Passage { start, end: start + PASSAGE, share: share(start) }).collect();
        // of equal ones the first
        all.sort_by(|a, b| b.share.total_cmp(&a.share));
        let mut best: Vec<Passage> = Vec::new();
        for passage in all {
            if best.len() == most {
                break;
            }
            if best.iter().all(|other| passage.end + PASSAGE <= other.start || other.end + PASSAGE <= passage.start) {
                best.push(passage);
            }
        }
        best
    }
}
