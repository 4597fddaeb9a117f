//! Which entries of the KV cache to keep: scores in, a [`Selection`] out.
//!
//! Pure arithmetic. A policy sees probabilities and answers with indices; it knows no model, no
//! llama.cpp and no pointer, so each one can be checked against a few lines of float64.
//!
//! # Words
//! - *candidate* or *entry*: one of the `n` cached tokens of the sequence, numbered in the order of
//!   their positions. Every KV head has the same candidates.
//! - *head*: one of the `n_layer * n_head_kv` KV heads, layer-major: `head = layer * n_head_kv + h`.
//! - *group*: the query heads that share a KV head.
//! - `C`: how many cells the cache holds afterwards. One number for all heads, because one cell of
//!   llama.cpp holds a row for every layer and head.
//!
//! # Order of calls
//! [`build`], [`Policy::needs`], [`Policy::observe`] for head 0, 1, 2, ..., then [`Policy::select`].
//!
//! # Adding a policy
//! Write one file with a type that has `new(&Params, Shape, &Protected)` and implements [`Policy`], declare the
//! module, and add its line to `policies!` below.
//!
//! Source of the method: Tang, Liu, Xu, Huang, "Adaptive KV-Cache Compression without Manually
//! Setting Budget", arXiv 2509.03136; what differs from it is said in `gvote.rs`.

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

/// Makes [`Kind`] and its dispatch out of one line a policy: variant, name, type, what it does.
macro_rules! policies {
    ($($kind:ident, $name:literal, $policy:ty, $about:literal;)+) => {
        /// Which policy chooses.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Kind {
            $(#[doc = $about] #[serde(rename = $name)] $kind,)+
        }

        impl Kind {
            /// Every policy, in the order of the help text.
            pub const ALL: &'static [Kind] = &[$(Kind::$kind),+];

            /// What `--policy` and reports call it.
            pub const fn name(self) -> &'static str {
                match self { $(Kind::$kind => $name),+ }
            }

            /// One line for the help text.
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

/// The request as a policy sees it.
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

/// What the scorer measured for one KV head. A slice is empty when [`Needs`] did not ask for it.
///
/// The values are probabilities. A policy reads NaN, infinite and negative values as 0, so that one
/// broken head cannot stop a request.
#[derive(Debug, Clone, Copy)]
pub struct HeadScores<'a> {
    /// `[n]` mean softmax probability of each key under the `S` synthetic queries and the current
    /// query, over the group's query heads.
    pub future: &'a [f32],
    /// `[n]` mean causal attention that the last `window` real queries pay to each key, over the
    /// group's query heads.
    pub observed: &'a [f32],
    /// `[group][S + 1][n]` the softmax probabilities of every synthetic query by itself, those of
    /// the current query last.
    pub each: &'a [f32],
    /// `[n]` the weight of each key under a Gaussian query with the mean and variance of the synthetic ones, normalised to
    /// sum 1, mean over the group's query heads (arXiv 2510.00636).
    pub expected: &'a [f32],
    /// `[n]` length of each value vector.
    pub value_norm: &'a [f32],
    /// `[n]` cosine similarity of each key to the mean of all keys, each scaled to length 1; -1 to 1 (arXiv 2504.15364).
    pub key_similarity: &'a [f32],
    /// `[n]` sum over the observed queries and the group of p⁴: its fourth root is close to the largest p. With a replay,
    /// the queries are those of the repeated context.
    pub fourth_powers: &'a [f32],
    /// `[n]` mean attention that the repeated context pays to each key; empty without a replay.
    pub replayed: &'a [f32],
}

impl HeadScores<'_> {
    /// Nothing was measured.
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
    /// What comes of keys and values alone.
    pub fn of_cells(self) -> Self {
        Self { value_norm: self.value_norm, key_similarity: self.key_similarity, ..Self::default() }
    }

    /// No scores at all: the probe pass and the scorer can be skipped.
    pub const fn nothing(&self) -> bool {
        !(self.samples() || self.observed || self.value_norm || self.key_similarity)
    }

    /// Whether synthetic queries are needed: without them the probe pass can be skipped.
    pub const fn samples(&self) -> bool {
        self.future || self.each || self.expected
    }
}

/// Vectors of so many zeros. The caller knows what its system does best with large ones.
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

/// One way to choose what stays.
pub trait Policy {
    /// The name of the [`Kind`] this was built for.
    fn name(&self) -> &'static str;

    /// Which scores [`observe`](Policy::observe) reads. If nothing, `observe` need not be called.
    fn needs(&self) -> Needs;

    /// Takes in one KV head. Heads arrive in order, layer-major, each exactly once; `scores` is not
    /// kept.
    ///
    /// # Panics
    /// If a head is skipped or repeated, or a needed slice has the wrong length. Values never panic.
    fn observe(&mut self, head: usize, scores: &HeadScores<'_>);

    /// [`observe`](Policy::observe) for several heads, `first` and those that follow it. Where there are none, scores are about to come.
    ///
    /// # Panics
    /// As [`observe`](Policy::observe).
    fn observe_heads(&mut self, first: usize, heads: &[HeadScores<'_>]) {
        for (i, scores) in heads.iter().enumerate() {
            self.observe(first + i, scores);
        }
    }

    /// Where to take large buffers from, before the first head arrives.
    fn allocate_with(&mut self, _: Zeros) {}

    /// Chooses.
    ///
    /// # Panics
    /// If a policy that needs scores has not seen every head.
    fn select(self: Box<Self>) -> Selection;

    /// Chooses, or hands out the ranking where the settings want the count to be found by trial on the model
    /// ([`Params::tries`]).
    ///
    /// # Panics
    /// As [`select`](Policy::select).
    fn decide(self: Box<Self>) -> Decision {
        Decision::Selection(self.select())
    }

    /// [`decide`](Policy::decide), and a copy of the ranking behind it where there is one.
    ///
    /// # Panics
    /// As [`select`](Policy::select).
    fn explain(self: Box<Self>) -> (Decision, Option<Ranking>) {
        (self.decide(), None)
    }
}

/// What a policy comes to by itself.
#[derive(Debug, Clone)]
pub enum Decision {
    /// What stays.
    Selection(Selection),
    /// The order in which entries stay; their number is to be found by trial.
    Ranking(Ranking),
}

/// What stays.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// Candidates there were.
    pub n: usize,
    /// Which of them stay.
    pub kept: Kept,
    /// Share of the attention mass that is given up at the chosen `C`: mean over all KV heads, 0 to
    /// 1. None if the policy does not measure it.
    pub lost_mass: Option<f32>,
    /// Which rule set `C`.
    pub bound: Bound,
    /// The budgets the heads asked for by themselves, where the policy has such a thing.
    pub ragged: Option<Ragged>,
}

impl Selection {
    /// Everything stays and nothing is lost.
    pub const fn all(n: usize) -> Self {
        Self { n, kept: Kept::All, lost_mass: Some(0.0), bound: Bound::All, ragged: None }
    }

    /// `C`: cells of the sequence after compaction; of [`Kept::Ragged`] the mean over the heads, rounded up.
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

    /// The candidates that `head` keeps, ascending; None if it keeps all of them.
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

/// Which candidates stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// All of them: there is nothing to compact.
    All,
    /// The same for every head, ascending.
    Tokens(Vec<u32>),
    /// Composite cells: each head its own, the same number for all.
    Heads {
        /// `C`.
        n_cells: usize,
        /// `[head][n_cells]` candidate indices, ascending in each head.
        index: Vec<u32>,
    },
    /// Each head its own number, which no cache of llama.cpp can hold: to be looked at through a mask ([`Params::exact`]).
    Ragged {
        /// `[head]` where each head's part of `index` ends; it starts where that of the head before ends.
        end: Vec<usize>,
        /// Candidate indices, ascending in each head.
        index: Vec<u32>,
    },
}

/// Which rule set `C`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// The smallest `C` on which a trial came close enough to the full cache.
    Trial,
    /// The smallest `C` that gives up no more attention mass than allowed.
    LostMass,
    /// Everything stays, because what will be asked is not known: no question is in sight, so nothing could be tried; or the answer
    /// needs nothing of the text, and what a vote drops would be lost.
    Blind,
    /// The mean size of the heads' unions of votes (the paper's budget).
    Budget,
    /// The share that was asked for (`--ratio`).
    Ratio,
    /// `--max-cells` cut it.
    MaxCells,
    /// `--min-cells` raised it.
    MinCells,
    /// The sinks, the recent window and what is protected alone are more than the rule asked for.
    Forced,
    /// Nothing could be dropped, or the prompt is too short to be worth it.
    All,
}

/// How many entries the heads would keep if each could hold its own number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ragged {
    /// The most frugal head.
    pub min: u32,
    /// Mean over all heads.
    pub mean: f32,
    /// The greediest head.
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

/// Starts the policy that `params` asks for on a request of this shape.
///
/// A prompt that [`Params::leaves_alone`] gets a policy that needs no scores and keeps everything.
///
/// # Errors
/// [`Params::validate`]'s, and [`PolicyError::Shape`] for a request without layers, heads or
/// query heads, or with more candidates than 32 bits can number.
pub fn build(params: &Params, shape: Shape) -> Result<Box<dyn Policy + Send>, PolicyError> {
    build_protecting(params, shape, &Protected::default())
}

/// [`build`] with entries that stay like sinks.
///
/// # Errors
/// Those of `build`, and [`PolicyError::Protected`] where `max_cells` leaves no room for them.
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
