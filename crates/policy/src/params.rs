//! Settings of the policies, their valid ranges, and the errors for invalid values.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Kind, Shape};

/// Prompts with fewer older entries than this are left unchanged. The 64 queries of the observation window would
/// outnumber the keys they judge, and llama.cpp reads its cache in steps of 256 cells, so almost nothing would be
/// gained.
const WORTHWHILE: usize = 64;
/// Limit on the synthetic queries. More than this change no ranking that 32 do not, and each costs a probe token.
const MAX_SAMPLES: usize = 256;
/// Limit on the observation window. Each layer stores the window's queries, so a wider window would take gigabytes.
const MAX_WINDOW: usize = 1024;
/// Limit on each side of a span. A span longer than a page of text would keep only the surroundings of the first few
/// hits.
const MAX_SPAN: usize = 1024;
/// Limit on the numbers of sinks and recent entries. Both are compared with positions, which are i32, and added to each
/// other.
const MAX_FORCED: usize = i32::MAX as usize / 2;
/// Limit on the pool. A wider pool no longer smooths.
const MAX_POOL: usize = 63;
/// Limit on the head mix. Above this, the mean over all heads outweighs each head's own score.
const MAX_HEAD_MIX: f32 = 1000.0;

/// Limit on the target KL, in nats a token. A distribution farther from the full cache's is unrelated to it.
const MAX_KL: f32 = 10.0;
/// Limit on the tokens of a trial. A longer trial would cost more than the vote saves.
const MAX_DRAFT: usize = 256;

/// Share that a policy with a fixed budget keeps if neither `ratio` nor `max_cells` is set.
pub const DEFAULT_RATIO: f32 = 0.5;

/// Settings of a policy. The capture and the scorer read `samples`, `window` and `seed`, which are here because they
/// belong to the method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// The policy that makes the selection.
    pub policy: Kind,
    /// `gvote`: largest mean KL of a continuation to the full cache, in nats a token. The count that stays within this
    /// KL is found by trial. None: `lost_mass` sets the count.
    pub target_kl: Option<f32>,
    /// `gvote`: maximum number of tokens in that continuation; twice as many if an answer already has them.
    pub draft: usize,
    /// `gvote`: largest share of the attention mass that may be given up, mean over the KV heads. Applies where no
    /// trial is made.
    pub lost_mass: f32,
    /// `gvote-paper`: share of the current query's attention that sets the single-step budget.
    pub p_nuc: f32,
    /// Synthetic queries, `S`.
    pub samples: usize,
    /// Real queries at the end of the prompt whose attention is observed (the observation window); 1 to 1024.
    pub window: usize,
    /// `gvote`: entries that a hit keeps around itself.
    pub span: Span,
    /// Number of first entries that always stay.
    pub sinks: usize,
    /// Number of last entries that always stay. At least `window`: the observed scores of the window's own tokens are
    /// cut out, so these tokens would be lost.
    pub recent: usize,
    /// Whether the markers of the chat template and the system message always stay, too.
    pub protect: bool,
    /// Share of the entries to keep, instead of the policy's own rule. Policies without such a rule use
    /// [`DEFAULT_RATIO`], or `max_cells` if only `max_cells` is set.
    pub ratio: Option<f32>,
    /// Maximum number of cells, never exceeded.
    pub max_cells: Option<usize>,
    /// Minimum number of cells that stay (all cells, if the prompt is shorter).
    pub min_cells: usize,
    /// `gvote`: reads the context a second time and keeps the entries that its own repetition attends to, instead of
    /// using queries.
    pub replay: bool,
    /// Seed of the synthetic queries.
    pub seed: u64,
    /// Contents of a cell after compaction.
    pub evict: Evict,
    /// `gvote`: number of positions that the observed attention is averaged over; odd.
    pub pool: usize,
    /// `gvote`: weight of the mean over all heads beside each head's own score.
    pub head_mix: f32,
    /// `adakv`, `gvote-paper`: keeps the unequal budgets of the heads, as in the papers. A cache cannot store them: no
    /// memory is freed, and the entries that a head drops are masked while decoding. For measurements only; a saved
    /// session does not include the mask.
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
    /// Returns the defaults of one policy: those of `gvote`, except for the paper's 8 samples with `gvote-paper`, and
    /// no spans where the policy's own paper has none.
    pub fn new(policy: Kind) -> Self {
        let samples = if policy == Kind::GvotePaper { 8 } else { 32 };
        let span = if policy == Kind::Gvote { Self::default().span } else { Span::NONE };
        Self { policy, samples, span, ..Self::default() }
    }

    /// Returns these settings with the budget of a preset.
    #[must_use]
    pub fn with_preset(self, preset: Preset) -> Self {
        Self { target_kl: Some(preset.target_kl()), lost_mass: preset.lost_mass(), ..self }
    }

    /// Number of cells that a fixed budget keeps of `n`.
    pub(super) fn fixed_cells(&self, n: usize) -> usize {
        match (self.ratio, self.max_cells) {
            (None, Some(cap)) => cap.min(n),
            (ratio, _) => (f64::from(ratio.unwrap_or(DEFAULT_RATIO)) * n as f64).round() as usize,
        }
    }

    /// Returns true if the count is found by trial on the model. With a replay there is no trial, because a replay
    /// keeps entries for future questions.
    pub fn tries(&self) -> bool {
        self.policy == Kind::Gvote && self.ratio.is_none() && self.target_kl.is_some() && !self.replay
    }

    /// Returns true if a prompt of `n` entries is left unchanged. A prompt above `max_cells` never is, however short,
    /// because the cap is a promise about memory.
    pub fn leaves_alone(&self, n: usize) -> bool {
        let short = n < self.sinks.saturating_add(self.recent).saturating_add(WORTHWHILE);
        let fits = self.max_cells.is_none_or(|cap| n <= cap);
        self.policy == Kind::Full || (short && fits)
    }

    /// Checks every setting that the policy reads.
    ///
    /// # Errors
    /// Returns the first setting that is out of bounds; the message names the setting to change.
    pub fn validate(&self) -> Result<(), PolicyError> {
        // `window` applies to every policy: a capture stores the window for any later policy.
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
        // `contains` is false for NaN, which must be rejected.
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

    /// Checks the settings that conflict with unequal budgets of the heads.
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

/// Entries that a hit keeps around itself: a hit at `i` keeps `i - back ..= i + forward`. A key is looked up, then the
/// tokens that follow it are read out one by one; hence the longer forward side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Entries before the hit.
    pub back: usize,
    /// Entries after the hit.
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

    /// Parses `BACK,FORWARD`, or `0` for no spans.
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
    /// Almost no difference from the full cache.
    Safe,
    /// The default.
    Balanced,
    /// A small cache, at some cost in quality.
    Aggressive,
}

impl Preset {
    /// Every preset, from the most careful to the boldest.
    pub const ALL: &'static [Preset] = &[Preset::Safe, Preset::Balanced, Preset::Aggressive];

    /// Mean KL of the trial to the full cache, in nats a token.
    pub const fn target_kl(self) -> f32 {
        match self {
            Preset::Safe => 0.005,
            Preset::Balanced => 0.02,
            Preset::Aggressive => 0.1,
        }
    }

    /// Share of the attention mass that may be given up if no trial is made.
    pub const fn lost_mass(self) -> f32 {
        match self {
            Preset::Safe => 0.01,
            Preset::Balanced => 0.03,
            Preset::Aggressive => 0.1,
        }
    }

    /// The name on the command line.
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

/// Contents of a cell after compaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evict {
    /// In cell `c`, every KV head holds the c-th entry that it chose itself (arXiv 2509.05165).
    Composite,
    /// One cell holds the same token for all layers and heads.
    Cells,
}

impl Evict {
    /// Every variant.
    pub const ALL: &'static [Evict] = &[Evict::Composite, Evict::Cells];

    /// The name on the command line.
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

/// An invalid setting, with a message that says what to change.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each message explains its fields
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
