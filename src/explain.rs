//! Explains what a vote kept of a prompt, and why: for a page, a terminal, or another program.
//!
//! [`crate::Session::explain`] creates an [`Explanation`]. The kept tokens are read from the cache after the vote; the
//! scores are those that the policy used.

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

/// Result of a vote, with the reasons.
///
/// *Position*: index of a token in the text, from 0. *Head*: a KV head, counted over all layers of the cache,
/// layer-major.
#[derive(Debug, Clone, Serialize)]
pub struct Explanation {
    #[serde(skip)]
    pub report: CompressReport,
    #[serde(skip)]
    pub policy: Params,
    /// Tokens, `[position]`.
    pub tokens: Vec<Token>,
    /// Printable text of each token, `[position]`; see [`shown`] for the escapes.
    pub texts: Vec<String>,
    /// Model layer numbers of the cache's layers. A sliding-window model has further layers.
    pub layers: Vec<i32>,
    /// KV heads in each layer.
    pub n_head_kv: usize,
    /// Rows in the cache after the vote, `[head][position]`.
    pub kept: Bits,
    /// Number of heads that hold each token, `[position]`.
    pub kept_by: Vec<u32>,
    /// What the vote means to each head, `[head]`; empty where nothing was scored or everything stays.
    pub heads: Vec<HeadOpinion>,
    /// Mean share of the attention mass that each number of cells gives up, `[n + 1]`; empty where the policy computes
    /// none.
    pub curve: Vec<f64>,
    /// Mean KL divergence beyond that of rounding that the trial allowed, in nats a token.
    pub bar: Option<f32>,
    /// Printable text of the continuation that the trial compared.
    pub draft: Vec<String>,
    /// Attention of the last real queries to each position, `[position]`, mean over the heads; sums to at most 1. Empty
    /// where they did not vote.
    pub real: Vec<f64>,
    /// Attention of the synthetic queries and the current one, or of the repeated text of a replay, `[position]`.
    pub synthetic: Vec<f64>,
    /// Rows that left the cache before the vote and came back. None where no vote came before, or none was recorded:
    /// see [`crate::Session::note_recall`].
    pub recall: Option<Recalled>,
}

/// Number of tokens in a passage.
const PASSAGE: usize = 24;

/// A passage of the text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Passage {
    /// Position of the first token, and position after the last one.
    pub start: usize,
    pub end: usize,
    /// Mean share of the heads that keep the tokens, 0 to 1.
    pub share: f64,
}

impl Explanation {
    /// Number of KV heads in all layers.
    pub fn n_heads(&self) -> usize {
        self.layers.len() * self.n_head_kv
    }

    /// Returns at most `most` passages that the most heads kept, best first. They are at least one passage apart, and
    /// outside the tokens that always stay.
    pub fn passages(&self, most: usize) -> Vec<Passage> {
        let end = self.kept_by.len().saturating_sub(self.policy.recent);
        let starts = self.policy.sinks..(end + 1).saturating_sub(PASSAGE);
        let share = |start: usize| {
            let kept: u32 = self.kept_by[start..start + PASSAGE].iter().sum();
            f64::from(kept) / (PASSAGE * self.n_heads()) as f64
        };
        let mut all: Vec<_> =
            starts.map(|start| Passage { start, end: start + PASSAGE, share: share(start) }).collect();
        // a stable sort: of equal passages the first wins
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
