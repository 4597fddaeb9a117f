//! Policies that decide which entries of the KV cache to keep: scores in, a [`Selection`] out.
//!
//! Pure arithmetic: a policy receives probabilities and returns indices. It uses no model, no llama.cpp and no raw
//! pointers, so each policy can be checked against a few lines of float64.
//!
//! # Terms
//! - *candidate* or *entry*: one of the `n` cached tokens of the sequence, numbered in the order of their positions.
//!   Every KV head has the same candidates.
//! - *head*: one of the `n_layer * n_head_kv` KV heads, layer-major: `head = layer * n_head_kv + h`.
//! - *group*: the query heads that share a KV head.
//! - `C`: number of cells in the cache after compaction. All heads share one `C`, because one cell of llama.cpp holds a
//!   row for every layer and head.
//!
//! # Order of calls
//! [`build`], [`Policy::needs`], [`Policy::observe`] for head 0, 1, 2, ..., then [`Policy::select`].
//!
//! # Adding a policy
//! Write one file with a type that has `new(&Params, Shape, &Protected)` and implements [`Policy`], declare the module,
//! and add its line to `policies!` below.
//!
//! Source of the method: Tang, Liu, Xu, Huang, "Adaptive KV-Cache Compression without Manually Setting Budget", arXiv
//! 2509.03136. `gvote.rs` states the differences.

#![forbid(unsafe_code)]

mod adakv;
pub mod divergence;
mod expected_attention;
mod fixed;
mod full;
mod gvote;
mod gvote_paper;
mod keydiff;
mod opinions;
mod params;
mod protected;
mod rank;
mod ranking;
pub mod room;
mod snapkv;
mod streaming_llm;
#[cfg(test)]
mod tests;
pub mod threads;
mod turns;

use serde::{Deserialize, Serialize};

pub use opinions::{Agreement, HeadOpinion, Opinions};
pub use params::{DEFAULT_RATIO, Evict, Params, PolicyError, Preset, Span};
pub use protected::Protected;
pub use ranking::Ranking;

/// Generates [`Kind`] and its dispatch from one line for each policy: variant, name, type, description.
macro_rules! policies {
    ($($kind:ident, $name:literal, $policy:ty, $about:literal;)+) => {
        /// The policy that makes the selection.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Kind {
            $(#[doc = $about] #[serde(rename = $name)] $kind,)+
        }

        impl Kind {
            /// Every policy, in the order of the help text.
            pub const ALL: &'static [Kind] = &[$(Kind::$kind),+];

            /// The name used by `--policy` and in reports.
            pub const fn name(self) -> &'static str {
                match self { $(Kind::$kind => $name),+ }
            }

            /// One-line description for the help text.
            pub const fn about(self) -> &'static str {
                match self { $(Kind::$kind => $about),+ }
            }

            fn start(self, params: &Params, shape: Shape, protected: &Protected) -> Box<dyn Policy + Send> {
                match self { $(Kind::$kind => Box::new(<$policy>::new(params, shape, protected))),+ }
            }
        }
    };
}

policies! {
    Full, "full", full::Full, "keeps every entry: the reference";
    Gvote, "gvote", gvote::Gvote, "real and synthetic queries, passages and single entries, as many as a trial asks for";
    GvotePaper, "gvote-paper", gvote_paper::GvotePaper, "the paper's votes and budget (arXiv 2509.03136)";
    StreamingLlm, "streaming-llm", streaming_llm::StreamingLlm, "first and last tokens, a fixed share (arXiv 2309.17453)";
    SnapKv, "snapkv", snapkv::SnapKv, "what the last real queries looked at, a fixed share (arXiv 2404.14469)";
    AdaKv, "adakv", adakv::AdaKv,
        "snapkv whose heads share a layer's budget; here it costs the cells of the greediest head (arXiv 2407.11550)";
    ExpectedAttention, "expected-attention", expected_attention::ExpectedAttention,
        "Gaussian future queries and value norms, a fixed share (arXiv 2510.00636)";
    KeyDiff, "keydiff", keydiff::KeyDiff, "keys unlike the others, a fixed share (arXiv 2504.15364)";
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Kind {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let found = Self::ALL.iter().copied().find(|kind| kind.name() == text);
        found.ok_or_else(|| PolicyError::UnknownPolicy(text.to_owned()))
    }
}

/// Dimensions of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Candidates: the cells of one sequence in the order of their positions, the same for every
    /// head.
    pub n: usize,
    /// Layers whose cache is compressed (of a sliding-window model only those with a full cache).
    pub n_layer: usize,
    /// KV heads of one layer.
    pub n_head_kv: usize,
    /// Query heads that share one KV head.
    pub group: usize,
}

impl Shape {
    /// All KV heads: `n_layer * n_head_kv`.
    pub const fn heads(&self) -> usize {
        self.n_layer * self.n_head_kv
    }
}

/// Scores of one KV head. A slice is empty if [`Needs`] did not ask for it.
///
/// The values are probabilities. A policy reads NaN, infinite and negative values as 0, so that one broken head cannot
/// fail a request.
#[derive(Debug, Clone, Copy)]
pub struct HeadScores<'a> {
    /// `[n]` mean softmax probability of each key under the `S` synthetic queries and the current
    /// query, over the group's query heads.
    pub future: &'a [f32],
    /// `[n]` mean causal attention that the last `window` real queries pay to each key, over the
    /// group's query heads.
    pub observed: &'a [f32],
    /// `[group][S + 1][n]` the softmax probabilities of every single synthetic query, then those of the current query.
    pub each: &'a [f32],
    /// `[n]` the weight of each key under a Gaussian query with the mean and variance of the synthetic ones, normalised to
    /// sum 1, mean over the group's query heads (arXiv 2510.00636).
    pub expected: &'a [f32],
    /// `[n]` length of each value vector.
    pub value_norm: &'a [f32],
    /// `[n]` cosine similarity of each key to the mean of all keys, each scaled to length 1; -1 to 1 (arXiv 2504.15364).
    pub key_similarity: &'a [f32],
    /// `[n]` sum over the observed queries and the group of p⁴; its fourth root is close to the largest p. With a
    /// replay, the queries are those of the repeated context.
    pub fourth_powers: &'a [f32],
    /// `[n]` mean attention that the repeated context pays to each key; empty without a replay.
    pub replayed: &'a [f32],
}

impl HeadScores<'_> {
    /// No scores.
    pub const NONE: Self = Self {
        future: &[],
        observed: &[],
        each: &[],
        expected: &[],
        value_norm: &[],
        key_similarity: &[],
        fourth_powers: &[],
        replayed: &[],
    };
}

/// Which of the [`HeadScores`] a policy reads; the scorer may leave out the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// [`HeadScores::future`].
    pub future: bool,
    /// [`HeadScores::observed`].
    pub observed: bool,
    /// [`HeadScores::each`].
    pub each: bool,
    /// [`HeadScores::expected`].
    pub expected: bool,
    /// [`HeadScores::value_norm`].
    pub value_norm: bool,
    /// [`HeadScores::key_similarity`].
    pub key_similarity: bool,
    /// [`HeadScores::fourth_powers`].
    pub fourth_powers: bool,
}

impl Needs {
    /// Returns only the needs that can be computed from keys and values, without queries.
    pub fn of_cells(self) -> Self {
        Self { value_norm: self.value_norm, key_similarity: self.key_similarity, ..Self::default() }
    }

    /// Returns true if no scores are needed. The probe pass and the scorer can then be skipped.
    pub const fn nothing(&self) -> bool {
        !(self.samples() || self.observed || self.value_norm || self.key_similarity)
    }

    /// Returns true if synthetic queries are needed. Without them the probe pass can be skipped.
    pub const fn samples(&self) -> bool {
        self.future || self.each || self.expected
    }
}

/// Allocators for zero-filled vectors of a given length. The caller supplies the ones that suit large buffers on its
/// system.
#[derive(Clone, Copy)]
pub struct Zeros {
    pub of_u32: fn(usize) -> Vec<u32>,
    pub of_u16: fn(usize) -> Vec<u16>,
}

impl Default for Zeros {
    fn default() -> Self {
        Self { of_u32: |n| vec![0; n], of_u16: |n| vec![0; n] }
    }
}

/// A method for choosing which entries to keep.
pub trait Policy {
    /// The name of the [`Kind`] this was built for.
    fn name(&self) -> &'static str;

    /// The scores that [`observe`](Policy::observe) reads. If none are needed, `observe` need not be called.
    fn needs(&self) -> Needs;

    /// Reads the scores of one KV head. Heads arrive in layer-major order, each exactly once. `scores` is not stored.
    ///
    /// # Panics
    /// If a head is skipped or repeated, or a needed slice has the wrong length. Values never panic.
    fn observe(&mut self, head: usize, scores: &HeadScores<'_>);

    /// Calls [`observe`](Policy::observe) for consecutive heads, starting with `first`. An empty slice announces that
    /// scores will follow.
    ///
    /// # Panics
    /// As [`observe`](Policy::observe).
    fn observe_heads(&mut self, first: usize, heads: &[HeadScores<'_>]) {
        for (i, scores) in heads.iter().enumerate() {
            self.observe(first + i, scores);
        }
    }

    /// Sets the allocator for large buffers. Call before the first head is observed.
    fn allocate_with(&mut self, _: Zeros) {}

    /// Makes the selection.
    ///
    /// # Panics
    /// If a policy that needs scores has not seen every head.
    fn select(self: Box<Self>) -> Selection;

    /// Makes the selection, or returns the ranking if the settings ask for a count found by trial on the model
    /// ([`Params::tries`]).
    ///
    /// # Panics
    /// As [`select`](Policy::select).
    fn decide(self: Box<Self>) -> Decision {
        Decision::Selection(self.select())
    }

    /// Returns the result of [`decide`](Policy::decide) and a copy of the underlying ranking, if the policy has one.
    ///
    /// # Panics
    /// As [`select`](Policy::select).
    fn explain(self: Box<Self>) -> (Decision, Option<Ranking>) {
        (self.decide(), None)
    }
}

/// Result of [`Policy::decide`].
#[derive(Debug, Clone)]
pub enum Decision {
    /// The final selection.
    Selection(Selection),
    /// The order in which entries are kept. The caller finds their number by trial.
    Ranking(Ranking),
}

/// The entries that are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// Number of candidates.
    pub n: usize,
    /// The kept candidates.
    pub kept: Kept,
    /// Share of the attention mass that is given up at the chosen `C`: mean over all KV heads, 0 to 1. None if the
    /// policy does not measure it.
    pub lost_mass: Option<f32>,
    /// The rule that set `C`.
    pub bound: Bound,
    /// Budgets that the heads would have had individually; None if the policy computes none.
    pub ragged: Option<Ragged>,
}

impl Selection {
    /// Keeps everything and loses nothing.
    pub const fn all(n: usize) -> Self {
        Self { n, kept: Kept::All, lost_mass: Some(0.0), bound: Bound::All, ragged: None }
    }

    /// `C`: cells of the sequence after compaction. For [`Kept::Ragged`], the mean over the heads, rounded up.
    pub fn n_cells(&self) -> usize {
        match &self.kept {
            Kept::All => self.n,
            Kept::Tokens(index) => index.len(),
            Kept::Heads { n_cells, .. } => *n_cells,
            Kept::Ragged { end, index } => index.len().div_ceil(end.len().max(1)),
        }
    }

    /// `C / n`, 0 to 1.
    pub fn share(&self) -> f32 {
        if self.n == 0 { 1.0 } else { self.n_cells() as f32 / self.n as f32 }
    }

    /// The candidates that `head` keeps, ascending. None if the head keeps all of them.
    pub fn kept_by(&self, head: usize) -> Option<&[u32]> {
        match &self.kept {
            Kept::All => None,
            Kept::Tokens(index) => Some(index),
            Kept::Heads { n_cells, index } => Some(&index[head * n_cells..][..*n_cells]),
            Kept::Ragged { end, index } => {
                let start = head.checked_sub(1).map_or(0, |before| end[before]);
                Some(&index[start..end[head]])
            }
        }
    }
}

/// The kept candidates, in one of four layouts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// All candidates: no compaction is necessary.
    All,
    /// The same candidates for every head, ascending.
    Tokens(Vec<u32>),
    /// Composite cells: each head keeps its own candidates, the same number in every head.
    Heads {
        /// `C`.
        n_cells: usize,
        /// `[head][n_cells]` candidate indices, ascending in each head.
        index: Vec<u32>,
    },
    /// Each head keeps its own number of candidates. A llama.cpp cache cannot store this, so decoding applies a mask
    /// ([`Params::exact`]).
    Ragged {
        /// `[head]` end of each head's part of `index`; the part starts where the previous head's part ends.
        end: Vec<usize>,
        /// Candidate indices, ascending in each head.
        index: Vec<u32>,
    },
}

/// The rule that set `C`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// The smallest `C` on which a trial came close enough to the full cache.
    Trial,
    /// The smallest `C` that gives up no more attention mass than allowed.
    LostMass,
    /// Everything is kept because future questions are unknown: no question is in sight, so no trial was possible; or
    /// the answer needs nothing of the text, and whatever a vote drops would be lost.
    Blind,
    /// The mean size of the heads' unions of votes (the paper's budget).
    Budget,
    /// The requested share (`--ratio`).
    Ratio,
    /// `--max-cells` lowered `C`.
    MaxCells,
    /// `--min-cells` raised `C`.
    MinCells,
    /// The sinks, the recent window and the protected entries alone exceed what the rule asked for.
    Forced,
    /// Nothing could be dropped, or the prompt is too short to gain from compression.
    All,
}

/// Numbers of entries that the heads would keep if each could hold a number of its own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ragged {
    /// Smallest number in any head.
    pub min: u32,
    /// Mean over all heads.
    pub mean: f32,
    /// Largest number in any head.
    pub max: u32,
}

impl Ragged {
    fn of(counts: &[u32]) -> Self {
        let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        Self {
            min: counts.iter().copied().min().unwrap_or(0),
            mean: (total as f64 / counts.len() as f64) as f32,
            max: counts.iter().copied().max().unwrap_or(0),
        }
    }
}

/// Creates the policy that `params` asks for, for a request of this shape.
///
/// If [`Params::leaves_alone`] is true for the prompt, returns a policy that needs no scores and keeps everything.
///
/// # Errors
/// Returns the errors of [`Params::validate`], and [`PolicyError::Shape`] for a request without layers, heads or query
/// heads, or with more candidates than a u32 can number.
pub fn build(params: &Params, shape: Shape) -> Result<Box<dyn Policy + Send>, PolicyError> {
    build_protecting(params, shape, &Protected::default())
}

/// Works like [`build`], with protected entries that always stay, like sinks.
///
/// # Errors
/// Returns the errors of [`build`], and [`PolicyError::Protected`] if `max_cells` leaves no room for the protected
/// entries.
pub fn build_protecting(
    params: &Params,
    shape: Shape,
    protected: &Protected,
) -> Result<Box<dyn Policy + Send>, PolicyError> {
    params.validate()?;
    let countable = u32::try_from(shape.n).is_ok();
    if shape.heads() == 0 || shape.group == 0 || !countable {
        return Err(PolicyError::Shape(shape));
    }
    if params.leaves_alone(shape.n) {
        return Ok(Box::new(full::Full::new(params, shape, protected)));
    }
    if let Some(cap) = params.max_cells
        && cap < shape.n
    {
        let forced = rank::Forced::new(params, shape.n, protected).count();
        if cap <= forced {
            let (sinks, recent) = (params.sinks, params.recent);
            let protected = forced.saturating_sub(sinks + recent);
            return Err(PolicyError::Protected { cap, sinks, recent, protected, least: forced + 1 });
        }
    }
    Ok(params.policy.start(params, shape, protected))
}
