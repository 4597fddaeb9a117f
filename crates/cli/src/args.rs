//! Flags that several commands share, and their conversion into the library's parameters.

mod placement;
mod rope;
mod sampling;

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, Result};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, ValueHint};
use gvote::SessionParams;
use gvote::llama::{CacheType, ContextParams, FlashAttention, ThreadParams};
use gvote::policy::{Evict, Kind, Params, Preset, Span};
use gvote::session::{Recall, RecallFile, RecallType, When};
use rustix::process::setpriority_process;

pub use self::placement::{PlacementArgs, name_flag};
use self::rope::RopeArgs;
pub use self::sampling::SamplingArgs;
use super::Exit;

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Model file (GGUF; the first part of a split model)
    #[arg(short, long, value_name = "FILE")]
    pub model: PathBuf,

    #[command(flatten)]
    pub placement: PlacementArgs,
}

/// Maximum for `--ctx-size`: a position is a signed 32-bit number.
const CTX_SIZE_MAX: i64 = i32::MAX as i64;

pub const THREADS_MAX: i64 = ContextParams::THREADS_MAX as i64;

#[derive(Args)]
#[command(next_help_heading = "Context and KV cache")]
pub struct ContextArgs {
    /// KV cache size in cells. 0: as many as the text needs; the cache then grows with the text, up to the context length the model was
    /// trained for. Longer prompts are compressed while they are read
    #[arg(short, long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u32).range(..=CTX_SIZE_MAX))]
    pub ctx_size: u32,

    /// Maximum number of tokens passed to llama.cpp in one call (logical batch)
    #[arg(short, long, value_name = "N", default_value_t = ContextParams::default().n_batch,
          value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,

    /// Maximum number of tokens computed at once (ubatch)
    #[arg(long, value_name = "N", default_value_t = ContextParams::default().n_ubatch,
          value_parser = clap::value_parser!(u32).range(1..))]
    ubatch_size: u32,

    /// Threads for generating the answer; 0 or less = all cores [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(i32).range(..=THREADS_MAX))]
    threads: Option<i32>,

    /// Threads for reading the prompt; 0 or less = same as --threads [default: as --threads]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(..=THREADS_MAX))]
    threads_batch: Option<i32>,

    /// Priority of the process and its threads: -1 low, 0 normal, 1 medium, 2 high, 3 realtime. Values above 0 need a privilege
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-1..=3))]
    prio: i32,

    /// How long idle threads poll for work before they sleep, 0 to 100. OpenMP threads follow OpenMP's own settings instead
    #[arg(long, value_name = "N", default_value_t = ThreadParams::default().poll,
          value_parser = clap::value_parser!(u32).range(..=100))]
    poll: u32,

    /// Flash attention; `auto` leaves the choice to llama.cpp
    #[arg(long, value_name = "on|off|auto", default_value = "auto", hide_possible_values = true,
          value_parser = flash_attention())]
    flash_attn: FlashAttention,

    /// Type of the K cache: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0 or q5_1
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = CacheType::from_str)]
    cache_type_k: CacheType,

    /// Type of the V cache; quantized types need flash attention
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = CacheType::from_str)]
    cache_type_v: CacheType,

    /// Keep all cells of sliding-window layers: takes more memory, and lets /regen and /edit go back further
    #[arg(long)]
    swa_full: bool,

    /// Keep the KV cache in this machine's memory, even for layers on GPUs and workers
    #[arg(long)]
    no_kv_offload: bool,

    #[command(flatten)]
    rope: RopeArgs,
}

impl ContextArgs {
    /// Sets the priority of the process, as llama.cpp's programs do; threads started later inherit it.
    ///
    /// # Errors
    /// The operating system's error; it reserves raised priorities for privileged processes.
    pub fn set_priority(&self) -> Result<()> {
        const NICE: [i32; 5] = [5, 0, -5, -10, -20];
        let nice = NICE[usize::try_from(self.prio + 1).unwrap_or_default()];
        if self.prio == 0 {
            return Ok(());
        }
        setpriority_process(None, nice).with_context(|| format!("--prio {}: the system does not allow it", self.prio))
    }

    /// Returns the context parameters. `n_ctx`: cells to use when `--ctx-size` is 0.
    pub fn params(&self, n_ctx: u32) -> ContextParams {
        // As in llama.cpp, 0 and below mean all cores.
        let given = |n: Option<i32>| n.filter(|&n| n > 0);
        let default = ContextParams::default();
        let n_threads = given(self.threads).unwrap_or(default.n_threads);
        ContextParams {
            n_ctx: if self.ctx_size == 0 { n_ctx } else { self.ctx_size },
            n_batch: self.batch_size,
            n_ubatch: self.ubatch_size,
            n_threads,
            n_threads_batch: given(self.threads_batch).unwrap_or(n_threads),
            threads: ThreadParams { priority: self.prio, poll: self.poll },
            yields_threads: true,
            flash_attn: self.flash_attn,
            type_k: self.cache_type_k,
            type_v: self.cache_type_v,
            swa_full: self.swa_full,
            offload_kqv: !self.no_kv_offload,
            rope: self.rope.params(),
            ..default
        }
    }
}

pub fn flash_attention() -> impl TypedValueParser<Value = FlashAttention> {
    let values = [
        PossibleValue::new("on").aliases(["enabled", "true", "1"]),
        PossibleValue::new("off").aliases(["disabled", "false", "0"]),
        PossibleValue::new("auto").alias("-1"),
    ];
    PossibleValuesParser::new(values).map(|text| match text.as_str() {
        "on" | "enabled" | "true" | "1" => FlashAttention::On,
        "off" | "disabled" | "false" | "0" => FlashAttention::Off,
        _ => FlashAttention::Auto,
    })
}

#[derive(Args)]
#[command(next_help_heading = "Cache policy")]
pub struct PolicyArgs {
    #[arg(long, value_name = "NAME", default_value = Kind::Gvote.name(), help = kinds_in_words(),
          hide_possible_values = true, hide_default_value = true, value_parser = named(Kind::ALL, Kind::name))]
    policy: Kind,

    #[command(flatten)]
    vote: VoteArgs,
}

/// Settings of a vote that every command which votes has.
#[derive(Args)]
#[command(next_help_heading = "Cache policy")]
pub struct VoteArgs {
    /// Allowed deviation from the full cache in a trial: safe, balanced or aggressive
    #[arg(long, value_name = "NAME", conflicts_with_all = ["target_kl", "lost_mass"],
          default_value = Preset::Balanced.name(), value_parser = named(Preset::ALL, Preset::name))]
    preset: Preset,

    /// The same limit as a number: mean KL divergence from the full cache, in nats per token
    #[arg(long, value_name = "NATS", conflicts_with = "lost_mass")]
    target_kl: Option<f32>,

    /// Tokens of the trial: the full cache drafts a continuation, and smaller caches are compared on it. Within a long answer, the trial
    /// uses twice as many of the answer's newest tokens
    #[arg(long, value_name = "N", default_value_t = Params::default().draft)]
    draft: usize,

    /// Use no trial; give up at most this share of the attention mass
    #[arg(long, value_name = "SHARE")]
    lost_mass: Option<f32>,

    /// Read the context a second time, to keep what any later question could need; costs about one more prefill
    #[arg(long)]
    replay: bool,

    /// gvote-paper: share of the current token's attention that sets the budget
    #[arg(long, value_name = "SHARE", default_value_t = Params::default().p_nuc)]
    p_nuc: f32,

    /// Number of synthetic queries that vote [default: 32, gvote-paper: 8]
    #[arg(long, value_name = "N")]
    samples: Option<usize>,

    /// Observation window: number of most recent real queries that vote
    #[arg(long, value_name = "N", default_value_t = Params::default().window)]
    window: usize,

    /// Neighbours kept with each selected token: tokens before and after it; 0 = none [default: gvote 2,32, others 0]
    #[arg(long, value_name = "BACK,FORWARD", value_parser = Span::from_str)]
    span: Option<Span>,

    /// Number of first tokens that always stay (attention sinks)
    #[arg(long, value_name = "N", default_value_t = Params::default().sinks)]
    sinks: usize,

    /// Number of last tokens that always stay; at least --window
    #[arg(long, value_name = "N", default_value_t = Params::default().recent)]
    recent: usize,

    /// Also keep the chat template's markers and the system message
    #[arg(long)]
    protect: bool,

    /// Keep this share of the cells instead of the number the policy finds [default: 0.5 where the policy has no rule]
    #[arg(long, value_name = "SHARE", conflicts_with_all = ["lost_mass", "target_kl"])]
    ratio: Option<f32>,

    /// Maximum number of cells after a vote, whatever the loss [default: no cap]
    #[arg(long, value_name = "N")]
    max_cells: Option<usize>,

    /// Minimum number of cells that the cache keeps
    #[arg(long, value_name = "N", default_value_t = Params::default().min_cells)]
    min_cells: usize,

    /// Seed of the synthetic queries
    #[arg(long, value_name = "N", default_value_t = Params::default().seed)]
    gvote_seed: u64,

    /// What a cell holds: a token of each head's own choice (composite), or one token for all heads (cells)
    #[arg(long, value_name = "WAY", default_value = Params::default().evict.name(),
          value_parser = named(Evict::ALL, Evict::name))]
    evict: Evict,

    /// Account for the rounding of a quantized K cache in the vote
    #[arg(long, value_name = "on|off", default_value = "off", action = ArgAction::Set, hide_possible_values = true,
          value_parser = PossibleValuesParser::new(["on", "off"]).map(|text| text == "on"))]
    key_error: bool,
}

impl VoteArgs {
    /// Returns the policy's parameters.
    ///
    /// # Errors
    /// [`Exit::Usage`] for settings that cannot work.
    pub fn params(&self, policy: Kind) -> Result<Params> {
        let defaults = Params::new(policy);
        let params = Params {
            target_kl: match self.lost_mass {
                Some(_) => None,
                None => Some(self.target_kl.unwrap_or(self.preset.target_kl())),
            },
            draft: self.draft,
            replay: self.replay,
            lost_mass: self.lost_mass.unwrap_or(self.preset.lost_mass()),
            p_nuc: self.p_nuc,
            samples: self.samples.unwrap_or(defaults.samples),
            window: self.window,
            span: self.span.unwrap_or(defaults.span),
            ratio: self.ratio,
            sinks: self.sinks,
            recent: self.recent,
            protect: self.protect,
            max_cells: self.max_cells,
            min_cells: self.min_cells,
            seed: self.gvote_seed,
            evict: self.evict,
            ..defaults
        };
        params.validate().map_err(|e| Exit::Usage(e.to_string()))?;
        Ok(params)
    }

    /// Returns the parameters of a session with this policy, and `n_ctx` cells unless `--ctx-size` is given.
    ///
    /// # Errors
    /// [`Exit::Usage`] for settings that cannot work.
    pub fn session(&self, policy: Kind, context: &ContextArgs, n_ctx: usize) -> Result<SessionParams> {
        let n_ctx = u32::try_from(n_ctx).unwrap_or(u32::MAX);
        Ok(SessionParams {
            context: context.params(n_ctx),
            policy: self.params(policy)?,
            account_error: self.key_error,
            ..SessionParams::default()
        })
    }
}

impl PolicyArgs {
    /// Returns the policy's parameters.
    ///
    /// # Errors
    /// [`Exit::Usage`] for settings that cannot work.
    pub fn params(&self) -> Result<Params> {
        self.vote.params(self.policy)
    }

    /// Returns the parameters of a session with this policy, and `n_ctx` cells unless `--ctx-size` is given.
    ///
    /// # Errors
    /// [`Exit::Usage`] for settings that cannot work.
    pub fn session(&self, context: &ContextArgs, n_ctx: usize) -> Result<SessionParams> {
        self.vote.session(self.policy, context, n_ctx)
    }
}

const RECALL_TYPES: &[(&str, RecallType)] = &[("cache", RecallType::Cache), ("q8_0", RecallType::Q8_0)];

/// When to vote for an answer.
#[derive(Args)]
#[command(next_help_heading = "Cache policy")]
pub struct WhenArgs {
    /// When to vote. prompt: before the answer; auto: once the answer is so long that fewer cells would have saved the time a vote takes;
    /// N: after N tokens of the answer. The answer uses the full cache until then. A prompt of more cells than --max-cells is always voted
    /// on before the answer [default: auto; prompt where run has --ratio or --replay]
    #[arg(long = "vote", value_name = "auto|prompt|N", value_parser = When::from_str)]
    when: Option<When>,
}

impl WhenArgs {
    pub fn given(&self) -> Option<When> {
        self.when
    }
}

/// What happens to rows that leave the cache, for a conversation that may need them again.
#[derive(Args)]
#[command(next_help_heading = "Cache policy")]
pub struct RecallArgs {
    /// What happens to rows that leave the cache. auto and ram: keep them in memory; FILE: in a new file of that name, deleted when the
    /// chat ends. The next message is then read with all of them back in the cache. off: drop them
    #[arg(long, value_name = "auto|ram|off|FILE", default_value = "auto", value_hint = ValueHint::FilePath)]
    recall: PathBuf,

    /// How these rows are stored: cache, bit by bit; or q8_0, in half the bytes of an f16 cache, with values rounded on the way back
    #[arg(long, value_name = "cache|q8_0", default_value = RecallType::Cache.name(), hide_possible_values = true,
          value_parser = by_name(RECALL_TYPES))]
    recall_type: RecallType,

    /// While an answer is written, choose the cells anew every N tokens, also among the rows set aside; 0 = never
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub renew: usize,
}

impl RecallArgs {
    /// Returns the setting; creates the file if one is named.
    ///
    /// # Errors
    /// Names the flag if the file cannot be created.
    pub fn open(&self) -> Result<Recall> {
        match self.recall.to_str() {
            Some("auto" | "ram") => Ok(Recall::Auto),
            Some("off") => Ok(Recall::Off),
            _ => RecallFile::create(&self.recall).map(Recall::File).context("--recall"),
        }
    }

    pub fn recall_type(&self) -> RecallType {
        self.recall_type
    }
}

fn kinds_in_words() -> String {
    let kinds = Kind::ALL.iter().map(|k| format!("\n{}: {}", k.name(), k.about()));
    let default = Kind::Gvote.name();
    format!("Who chooses what stays in the cache [default: {default}]{}", kinds.collect::<String>())
}

/// Returns a parser that accepts these names.
pub fn by_name<T: Copy + Send + Sync + 'static>(
    names: &'static [(&'static str, T)],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(names.iter().map(|entry| entry.0))
        .map(|text| names.iter().find(|entry| entry.0 == text).expect("it is a possible value").1)
}

/// Returns a parser that accepts the `name` of each of `all`.
pub fn named<T>(all: &'static [T], name: fn(T) -> &'static str) -> impl TypedValueParser<Value = T>
where
    T: Copy + FromStr<Err: std::error::Error + Send + Sync + 'static> + Send + Sync + 'static,
{
    PossibleValuesParser::new(all.iter().map(|&one| name(one))).try_map(|text| text.parse::<T>())
}

/// Parses a finite number for which `fits` holds. `what`: the numbers that fit, for the error.
pub fn number(text: &str, fits: fn(f32) -> bool, what: &str) -> Result<f32, String> {
    text.parse().ok().filter(|&x: &f32| x.is_finite() && fits(x)).ok_or_else(|| format!("use {what}"))
}

pub fn finite(text: &str) -> Result<f32, String> {
    number(text, |_| true, "a number")
}

pub fn share(text: &str) -> Result<f32, String> {
    number(text, |x| (0.0..=1.0).contains(&x), "a number from 0 to 1")
}

#[derive(Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Print one JSON object per answer on stdout, and nothing else
    #[arg(long)]
    pub json: bool,

    /// Show llama.cpp's log on stderr
    #[arg(short, long)]
    pub verbose: bool,
}
