//! What a user can set, what it may be, and what to say when it may not.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Kind, Shape};

/// Prompts with fewer older entries than this are left alone: the observation window's 64 queries
/// would outnumber the keys they judge, and llama.cpp reads its cache in steps of 256 cells, so
/// that next to nothing would be gained.
const WORTHWHILE: usize = 64;
/// More synthetic queries than this change no ranking that 32 do not, and each costs a probe token.
const MAX_SAMPLES: usize = 256;
/// Each layer keeps its queries, so that a wider window would take gigabytes.
const MAX_WINDOW: usize = 1024;
/// A span longer than a page of text keeps whatever surrounds the first few hits and nothing else.
const MAX_SPAN: usize = 1024;
/// Sinks and recent cells are compared with positions, which are i32, and added to each other.
const MAX_FORCED: usize = i32::MAX as usize / 2;
/// A pool wider than this is no smoothing any more.
const MAX_POOL: usize = 63;
/// Past this the heads' common opinion drowns each head's own.
const MAX_HEAD_MIX: f32 = 1000.0;

/// A distribution further from the full cache's than this has nothing to do with it any more.
const MAX_KL: f32 = 10.0;
/// A trial of more tokens than this would cost more than the vote saves.
const MAX_DRAFT: usize = 256;

/// What a policy with a fixed budget keeps when nothing is said.
pub const DEFAULT_RATIO: f32 = 0.5;

/// The settings of a policy. `samples`, `window` and `seed` are read by the capture and the scorer;
/// they are here because they belong to the method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Who chooses.
    pub policy: Kind,
    /// `gvote`: the mean KL to the full cache that a continuation should stay within, in nats a token; the count that does is
    /// found by trial. None: `lost_mass` decides.
    pub target_kl: Option<f32>,
    /// `gvote`: tokens of that continuation, at most; twice as many where an answer has them already.
    pub draft: usize,
    /// `gvote`: largest share of the attention mass that may be given up, mean over the KV heads; where no trial is made.
    pub lost_mass: f32,
    /// `gvote-paper`: share of the current query's attention that sets the single-step budget.
    pub p_nuc: f32,
    /// Synthetic queries, `S`.
    pub samples: usize,
    /// Real queries at the end of the prompt whose attention is observed; 1 to 1024.
    pub window: usize,
    /// `gvote`: what a hit keeps around itself.
    pub span: Span,
    /// First entries that always stay.
    pub sinks: usize,
    /// Last entries that always stay. At least `window`: the observed scores of the window's own
    /// tokens are cut out, so they would be lost.
    pub recent: usize,
    /// Whether the chat template's markers and the system message always stay, too.
    pub protect: bool,
    /// Share of the entries to keep, instead of the policy's own rule. The policies without such a rule take
    /// [`DEFAULT_RATIO`], or `max_cells` where only that is given.
    pub ratio: Option<f32>,
    /// Cap on the cells, never exceeded.
    pub max_cells: Option<usize>,
    /// Cells that stay at least (all of them, if the prompt is shorter).
    pub min_cells: usize,
    /// `gvote`: read the context a second time, and keep what its own repetition looks at, instead of asking queries.
    pub replay: bool,
    /// Seed of the synthetic queries.
    pub seed: u64,
    /// What one cell holds afterwards.
    pub evict: Evict,
    /// `gvote`: positions that the observed attention is averaged over; odd.
    pub pool: usize,
    /// `gvote`: weight of the mean over all heads beside each head's own score.
    pub head_mix: f32,
    /// `adakv`, `gvote-paper`: keep the unequal budgets of the heads as the paper has them. A cache cannot: nothing is freed,
    /// and what a head has dropped is masked while decoding. For measuring only; a saved session does not carry the mask.
    pub exact: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            policy: Kind::Gvote,
            target_kl: Some(Preset::Balanced.target_kl()),
            draft: 32,
            lost_mass: Preset::Balanced.lost_mass(),
            p_nuc: 0.95,
            samples: 32,
            window: 64,
            span: Span { back: 2, forward: 32 },
            sinks: 4,
            recent: 64,
            protect: false,
            ratio: None,
            max_cells: None,
            min_cells: 0,
            replay: false,
            seed: 0,
            evict: Evict::Composite,
            pool: 5,
            head_mix: 0.3,
            exact: false,
        }
    }
}

impl Params {
    /// The defaults of one policy: those of `gvote`, but for the paper's 8 samples, and no spans where the policy's own
    /// paper has none.
    pub fn new(policy: Kind) -> Self {
        let samples = if policy == Kind::GvotePaper { 8 } else { 32 };
        let span = if policy == Kind::Gvote { Self::default().span } else { Span::NONE };
        Self { policy, samples, span, ..Self::default() }
    }

    /// These settings with a preset's budget.
    #[must_use]
    pub fn with_preset(self, preset: Preset) -> Self {
        Self { target_kl: Some(preset.target_kl()), lost_mass: preset.lost_mass(), ..self }
    }

    /// Cells of `n` that a fixed budget keeps.
    pub(super) fn fixed_cells(&self, n: usize) -> usize {
        match (self.ratio, self.max_cells) {
            (None, Some(cap)) => cap.min(n),
            (ratio, _) => (f64::from(ratio.unwrap_or(DEFAULT_RATIO)) * n as f64).round() as usize,
        }
    }

    /// Whether the count is found by trial on the model. With a replay it is not: what it keeps is for questions to come.
    pub fn tries(&self) -> bool {
        self.policy == Kind::Gvote && self.ratio.is_none() && self.target_kl.is_some() && !self.replay
    }

    /// Whether a prompt of `n` entries stays as it is. A prompt above `max_cells` never does,
    /// however short: the cap is a promise about memory.
    pub fn leaves_alone(&self, n: usize) -> bool {
        let short = n < self.sinks.saturating_add(self.recent).saturating_add(WORTHWHILE);
        let fits = self.max_cells.is_none_or(|cap| n <= cap);
        self.policy == Kind::Full || (short && fits)
    }

    /// Checks every setting that the policy reads.
    ///
    /// # Errors
    /// The first setting that is out of bounds; the message names the flag to change.
    pub fn validate(&self) -> Result<(), PolicyError> {
        // a capture keeps it for whatever policy may come later
        if !(1..=MAX_WINDOW).contains(&self.window) {
            return Err(PolicyError::Window(self.window));
        }
        if self.policy == Kind::Full {
            return match (self.max_cells, self.ratio) {
                (Some(cap), _) => Err(PolicyError::FullWithCap(cap)),
                (None, Some(ratio)) => Err(PolicyError::FullWithRatio(ratio)),
                (None, None) => Ok(()),
            };
        }
        // `contains` is false for NaN, as it should be.
        if let Some(kl) = self.target_kl
            && !(f32::MIN_POSITIVE..=MAX_KL).contains(&kl)
        {
            return Err(PolicyError::TargetKl(kl));
        }
        if !(1..=MAX_DRAFT).contains(&self.draft) {
            return Err(PolicyError::Draft(self.draft));
        }
        if !(f32::MIN_POSITIVE..1.0).contains(&self.lost_mass) {
            return Err(PolicyError::LostMass(self.lost_mass));
        }
        if !(f32::MIN_POSITIVE..=1.0).contains(&self.p_nuc) {
            return Err(PolicyError::PNuc(self.p_nuc));
        }
        if self.ratio.is_some_and(|ratio| !(f32::MIN_POSITIVE..=1.0).contains(&ratio)) {
            return Err(PolicyError::Ratio(self.ratio.unwrap_or_default()));
        }
        if !(1..=MAX_SAMPLES).contains(&self.samples) {
            return Err(PolicyError::Samples(self.samples));
        }
        if self.span.back > MAX_SPAN || self.span.forward > MAX_SPAN {
            return Err(PolicyError::Span(self.span));
        }
        if matches!(self.policy, Kind::Gvote | Kind::SnapKv | Kind::AdaKv) && self.recent < self.window {
            return Err(PolicyError::Recent { recent: self.recent, window: self.window });
        }
        if self.recent == 0 {
            return Err(PolicyError::NoRecent);
        }
        for (setting, n) in [("sinks", self.sinks), ("recent", self.recent)] {
            if n > MAX_FORCED {
                return Err(PolicyError::Forced { setting, n });
            }
        }
        let forced = self.sinks + self.recent;
        if let Some(cap) = self.max_cells {
            if cap <= forced {
                let (sinks, recent) = (self.sinks, self.recent);
                return Err(PolicyError::MaxCells { cap, sinks, recent, least: forced + 1 });
            }
            if self.min_cells > cap {
                return Err(PolicyError::MinCells { min: self.min_cells, cap });
            }
        }
        if self.pool.is_multiple_of(2) || self.pool > MAX_POOL {
            return Err(PolicyError::Pool(self.pool));
        }
        if self.replay && self.policy != Kind::Gvote {
            return Err(PolicyError::Replay(self.policy));
        }
        if !(0.0..=MAX_HEAD_MIX).contains(&self.head_mix) {
            return Err(PolicyError::HeadMix(self.head_mix));
        }
        self.validate_unequal()
    }

    /// What unequal budgets of the heads do not go with.
    fn validate_unequal(&self) -> Result<(), PolicyError> {
        let kind = self.policy;
        if self.exact && !matches!(kind, Kind::AdaKv | Kind::GvotePaper) {
            return Err(PolicyError::Exact(kind));
        }
        if (self.exact || kind == Kind::AdaKv) && self.evict == Evict::Cells {
            return Err(PolicyError::EvictUnequal);
        }
        let budget = self.ratio.is_some() || self.max_cells.is_some() || self.min_cells > 0;
        if self.exact && kind == Kind::GvotePaper && budget {
            return Err(PolicyError::ExactBudget);
        }
        Ok(())
    }
}

/// What a hit keeps around itself: a hit at `i` keeps `i - back ..= i + forward`. A key is looked
/// up, then the tokens that follow it are read out one by one; hence the longer way forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Entries before the hit.
    pub back: usize,
    /// Entries after it.
    pub forward: usize,
}

impl Span {
    /// A hit keeps only itself.
    pub const NONE: Span = Span { back: 0, forward: 0 };
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.back, self.forward)
    }
}

impl FromStr for Span {
    type Err = PolicyError;

    /// `BACK,FORWARD`, or `0` for no spans.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        if text == "0" {
            return Ok(Self::NONE);
        }
        let parse = || {
            let (back, forward) = text.split_once(',')?;
            Some(Span { back: back.trim().parse().ok()?, forward: forward.trim().parse().ok()? })
        };
        parse().ok_or_else(|| PolicyError::SpanText(text.to_owned()))
    }
}

/// Ready-made values of `target_kl` and `lost_mass`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Hardly a difference.
    Safe,
    /// The default.
    Balanced,
    /// Small, at some cost.
    Aggressive,
}

impl Preset {
    /// Every preset, from careful to bold.
    pub const ALL: &'static [Preset] = &[Preset::Safe, Preset::Balanced, Preset::Aggressive];

    /// Mean KL of the trial to the full cache, in nats a token.
    pub const fn target_kl(self) -> f32 {
        match self {
            Preset::Safe => 0.005,
            Preset::Balanced => 0.02,
            Preset::Aggressive => 0.1,
        }
    }

    /// The share of the attention mass that may be given up where no trial is made.
    pub const fn lost_mass(self) -> f32 {
        match self {
            Preset::Safe => 0.01,
            Preset::Balanced => 0.03,
            Preset::Aggressive => 0.1,
        }
    }

    /// What the command line calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Preset::Safe => "safe",
            Preset::Balanced => "balanced",
            Preset::Aggressive => "aggressive",
        }
    }
}

impl FromStr for Preset {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let found = Self::ALL.iter().copied().find(|preset| preset.name() == text);
        found.ok_or_else(|| PolicyError::UnknownPreset(text.to_owned()))
    }
}

/// What one cell holds after compaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evict {
    /// In cell `c`, every KV head holds the c-th entry it chose itself (arXiv 2509.05165).
    Composite,
    /// One token for all layers and heads.
    Cells,
}

impl Evict {
    /// Both ways.
    pub const ALL: &'static [Evict] = &[Evict::Composite, Evict::Cells];

    /// What the command line calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Evict::Composite => "composite",
            Evict::Cells => "cells",
        }
    }
}

impl FromStr for Evict {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let found = Self::ALL.iter().copied().find(|evict| evict.name() == text);
        found.ok_or_else(|| PolicyError::UnknownEvict(text.to_owned()))
    }
}

/// A setting that cannot work, and what to change.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each message says what its fields are
pub enum PolicyError {
    #[error(
        "`target_kl` is {0}, but must be above 0 and at most {MAX_KL} nats a token (0.02 is 1.02 times the perplexity)"
    )]
    TargetKl(f32),
    #[error("`draft` is {0}, but must be 1 to {MAX_DRAFT} tokens")]
    Draft(usize),
    #[error("`lost_mass` is {0}, but must lie between 0 and 1, both excluded (0.01 is safe, 0.1 bold)")]
    LostMass(f32),
    #[error("`p_nuc` is {0}, but must be above 0 and at most 1 (the paper uses 0.95)")]
    PNuc(f32),
    #[error("`samples` is {0}, but must be 1 to {MAX_SAMPLES}")]
    Samples(usize),
    #[error("`window` is {0}, but must be 1 to {MAX_WINDOW}")]
    Window(usize),
    #[error("`span` is {0}, but neither side may be above {MAX_SPAN}")]
    Span(Span),
    #[error("`span` is {0:?}, but should read BACK,FORWARD, such as 2,32, or 0 for no spans")]
    SpanText(String),
    #[error("`{setting}` is {n}, which is more than any cache holds")]
    Forced { setting: &'static str, n: usize },
    #[error(
        "`recent` is {recent}, but must be at least `window` ({window}): the window's own tokens \
         are not scored and would be lost; raise `recent` or lower `window`"
    )]
    Recent { recent: usize, window: usize },
    #[error("`recent` is 0, but the last token must stay for decoding to go on")]
    NoRecent,
    #[error(
        "`max_cells` is {cap}, but {sinks} sinks and {recent} recent tokens always stay; \
         set `max_cells` to {least} or more, or lower `sinks` or `recent`"
    )]
    MaxCells { cap: usize, sinks: usize, recent: usize, least: usize },
    #[error(
        "`max_cells` is {cap}, but {sinks} sinks, {recent} recent tokens and {protected} protected ones (`protect`) \
         always stay; set `max_cells` to {least} or more, or protect fewer"
    )]
    Protected { cap: usize, sinks: usize, recent: usize, protected: usize, least: usize },
    #[error("`min_cells` is {min}, but must not be above `max_cells` ({cap})")]
    MinCells { min: usize, cap: usize },
    #[error("`max_cells` is {0}, but the policy `full` keeps everything; choose another `policy`")]
    FullWithCap(usize),
    #[error("`ratio` is {0}, but the policy `full` keeps everything; choose another `policy`")]
    FullWithRatio(f32),
    #[error("`ratio` is {0}, but must be above 0 and at most 1 (0.5 keeps half of the cells)")]
    Ratio(f32),
    #[error("the pool is {0} positions wide, but must be an odd number of at most {MAX_POOL}")]
    Pool(usize),
    #[error("the head mix is {0}, but must be 0 to {MAX_HEAD_MIX}")]
    HeadMix(f32),
    #[error("`replay` is what gvote ranks by, and the policy {0} has no use for it; leave one of the two out")]
    Replay(Kind),
    #[error("exact is for unequal budgets of the heads, which the policy {0} does not have; take adakv or gvote-paper")]
    Exact(Kind),
    #[error("exact lets gvote-paper keep every union of votes: it goes with no `ratio`, `max_cells` and `min_cells`")]
    ExactBudget,
    #[error(
        "`evict` is cells, which keeps the same tokens in every head, but here the heads have unequal budgets; \
         take `evict` composite, or `policy` snapkv"
    )]
    EvictUnequal,
    #[error("`policy` {0:?} is unknown; choose one of {names}", names = names(Kind::ALL, |k| k.name()))]
    UnknownPolicy(String),
    #[error("`preset` {0:?} is unknown; choose one of {names}", names = names(Preset::ALL, |p| p.name()))]
    UnknownPreset(String),
    #[error("`evict` {0:?} is unknown; choose one of {names}", names = names(Evict::ALL, |e| e.name()))]
    UnknownEvict(String),
    #[error("nothing can be chosen from a request of the shape {0:?}")]
    Shape(Shape),
}

fn names<T: Copy>(all: &[T], name: fn(T) -> &'static str) -> String {
    all.iter().map(|&one| name(one)).collect::<Vec<_>>().join(", ")
}
