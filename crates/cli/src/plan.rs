//! `gvote plan`: computes what fits into a given amount of memory.

mod fit;

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use gvote::SessionParams;
use gvote::llama::{CacheType, ContextParams, FlashAttention, Simulation};
use gvote::policy::{Kind, Params};
use gvote_gguf::{ModelInfo, Support};
use serde::Serialize;

use super::args::{PlacementArgs, flash_attention, name_flag};
use super::crash::{self, Step};
use super::given::{Given, quoted};
use super::report::print_json;
use super::table::{labelled, plain, table};
use super::turn::{connect, print};
use super::words::{bytes, count, note};
pub use fit::size;
use fit::{Need, Sizes, vote_bytes};

const EXAMPLES: &str = "\
Examples:
  gvote plan model.gguf --memory 8G --prompt 30000
  gvote plan model.gguf --memory 24G --prompt 100000 -ngl all --json | jq -r .command
  gvote plan model.gguf --prompt 4096 -ub 128
  gvote plan model.gguf --prompt 100000 -ngl all --rpc 192.168.1.7:50052,192.168.1.8:50052

The sizes of weights, KV cache and compute buffers are llama.cpp's own: it works them out for this machine without allocating or \
reading the weights. Not in them: the vocabulary, the program itself, and what a vote needs while it works; the report names an \
estimate of the last. How much a vote keeps is found for each request and cannot be known beforehand.

Exit status: 1 if the prompt does not fit with any cache type.";

/// Show what fits into a given amount of memory, and which flags to use
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct PlanArgs {
    /// Model file (GGUF; the first part of a split model)
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// Memory limit, such as 8G or 512M: for GPUs and workers together if layers are placed there, else for the machine
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true)]
    memory: Option<usize>,

    /// Tokens of the prompt [default: what the model was trained for, less the answer]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..1 << 24))]
    prompt: Option<u32>,

    /// Tokens of the answer
    #[arg(short = 'n', long, visible_alias = "n-predict", value_name = "N", default_value_t = 512,
          value_parser = clap::value_parser!(u32).range(0..1 << 24))]
    predict: u32,

    #[command(flatten)]
    shared: Given<SharedArgs>,

    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,

    /// Show llama.cpp's log on stderr
    #[arg(short, long)]
    verbose: bool,
}

/// Flags shared with `gvote run` that change sizes.
#[derive(Args)]
struct SharedArgs {
    #[command(flatten)]
    placement: PlacementArgs,

    /// Maximum number of tokens computed at once (ubatch): fewer need smaller compute buffers, and more time
    #[arg(long, value_name = "N", default_value_t = ContextParams::default().n_ubatch, help_heading = CONTEXT,
          value_parser = clap::value_parser!(u32).range(1..))]
    ubatch_size: u32,

    /// Flash attention; `auto` leaves the choice to llama.cpp. A quantized cache needs it
    #[arg(long, value_name = "on|off|auto", default_value = "auto", hide_possible_values = true, help_heading = CONTEXT,
          value_parser = flash_attention())]
    flash_attn: FlashAttention,

    /// Keep the KV cache in this machine's memory, even for layers on GPUs and workers
    #[arg(long, help_heading = CONTEXT)]
    no_kv_offload: bool,

    /// Count all cells of sliding-window layers
    #[arg(long, help_heading = CONTEXT)]
    swa_full: bool,
}

const CONTEXT: &str = "Context and KV cache";

/// Example shares of the cells that a vote may keep.
const SHARES: [(&str, f64); 3] = [("all", 1.0), ("half", 0.5), ("a quarter", 0.25)];

/// A plan; sizes are in bytes.
#[derive(Serialize)]
struct Plan {
    model: String,
    /// Cells of the cache, `-c`.
    cells: usize,
    prompt: usize,
    predict: usize,
    n_ctx_train: usize,
    memory: Option<usize>,
    weights: usize,
    /// Reason why the model cannot be compressed, if so.
    refused: Option<String>,
    /// Cache types that llama.cpp accepts for this model, the most exact first.
    types: Vec<Need>,
    /// Recommended type: the most exact one that fits and is not larger than f16.
    chosen: Option<&'static str>,
    /// GPUs and workers that hold something with the chosen type, or f16, as llama.cpp would distribute it now.
    devices: Vec<OnDevice>,
    command: Option<String>,
    /// Cache after a vote, with the chosen type and example shares.
    after_vote: Vec<Kept>,
    /// Estimated memory of the vote itself.
    vote_bytes: usize,
}

#[derive(Serialize)]
struct OnDevice {
    name: String,
    /// Address of a worker, or the vendor's name of a GPU.
    description: String,
    weights: usize,
    kv_cache: usize,
    compute: usize,
    total: usize,
    /// Free memory now, if known.
    free: Option<usize>,
}

#[derive(Serialize)]
struct Kept {
    #[serde(skip)]
    name: &'static str,
    share: f64,
    cells: usize,
    /// Bytes of these cells in the layers that are compressed.
    kv_bytes: usize,
    free_cells: usize,
}

pub fn run(args: &PlanArgs) -> Result<()> {
    gvote::llama::log::set_verbose(args.verbose);
    let plan = Plan::new(args)?;
    if args.json {
        print_json(&plan)?
    } else {
        print(&plan.in_words())?
    }
    if plan.cells > plan.n_ctx_train {
        note(&format!("the model was trained for {} tokens; past them it may talk nonsense", count(plan.n_ctx_train)));
    }
    for device in &plan.devices {
        if let Some(free) = device.free.filter(|&free| free < device.total) {
            let (name, free) = (&device.name, bytes(free, free));
            note(&format!("{name} ({}) has {free} free, and that is too little", plain(&device.description)));
        }
    }
    plan.verdict()
}

impl Plan {
    fn new(args: &PlanArgs) -> Result<Self> {
        let shared = &args.shared.flags;
        let file = shared.placement.open(&args.model)?;
        file.check()?;
        let info = &file.info;
        let predict = args.predict as usize;
        let trained = || info.n_ctx_train.min(fit::CELLS_MAX).saturating_sub(predict).max(1);
        let prompt = args.prompt.map_or_else(trained, |n| n as usize);
        let cells = prompt + predict;

        let refused = match info.support() {
            Support::Refused(reason) => Some(reason),
            _ => None,
        };
        let policy = Params::new(if refused.is_some() { Kind::Full } else { Kind::Gvote });
        shared.placement.check_adapters(&file)?;
        connect(&shared.placement.rpc)?;
        crash::about(&args.model);
        crash::at(Step::Load);
        let simulation = Simulation::load(&args.model, &shared.placement.params()).map_err(name_flag)?;
        crash::at(Step::Open);
        let context = ContextParams {
            n_ubatch: shared.ubatch_size,
            flash_attn: shared.flash_attn,
            offload_kqv: !shared.no_kv_offload,
            swa_full: shared.swa_full,
            ..ContextParams::default()
        };
        let threads = context.n_threads as usize;
        let draft = policy.draft;
        let sizes =
            Sizes { info, simulation: &simulation, session: SessionParams { context, policy, ..Default::default() } };

        let possible =
            |t: &CacheType| !t.is_quantized() || (shared.flash_attn != FlashAttention::Off && info.can_cache(*t));
        let types = CacheType::all().filter(possible).map(|t| sizes.need(t, cells, args.memory));
        let types: Vec<Need> = types.collect::<Result<_>>()?;
        let memory = sizes.memory(CacheType::F16, cells)?;
        let chosen = types.iter().find(|need| need.cache_type != CacheType::F32 && need.fits != Some(false));
        let after_vote = match chosen {
            Some(need) if refused.is_none() => kept(info, need.cache_type, prompt, cells),
            _ => Vec::new(),
        };
        let devices = sizes.devices(chosen.map_or(CacheType::F16, |need| need.cache_type), cells)?;
        let devices = devices.into_iter().map(|(device, buffers)| OnDevice {
            free: device.memory().map(|memory| memory.free),
            name: device.name,
            description: device.description,
            weights: buffers.weights,
            kv_cache: buffers.cache,
            compute: buffers.compute,
            total: buffers.total(),
        });
        let heads = info.cached(false).sum();
        Ok(Self {
            model: info.name.clone().unwrap_or_else(|| info.architecture.clone()),
            cells,
            prompt,
            predict,
            n_ctx_train: info.n_ctx_train,
            memory: args.memory,
            weights: memory.host.weights + memory.device.weights,
            command: chosen.map(|need| command(args, need.cache_type, cells, refused.is_some())),
            chosen: chosen.map(|need| need.name),
            devices: devices.collect(),
            vote_bytes: match refused {
                Some(_) => 0,
                None => vote_bytes(draft, info.n_vocab.unwrap_or(0) as usize, heads, prompt, threads),
            },
            types,
            after_vote,
            refused,
        })
    }

    fn in_words(&self) -> String {
        let size = |n| bytes(n, n);
        let mut out = labelled("model", &format!("{}, {} of weights", plain(&self.model), size(self.weights)));
        out += &labelled(
            "cells",
            &format!(
                "{} (-c): {} of the prompt, {} of the answer",
                count(self.cells),
                count(self.prompt),
                count(self.predict)
            ),
        );
        if let Some(memory) = self.memory {
            out += &labelled("memory", &size(memory));
        }
        if let Some(reason) = &self.refused {
            out += &labelled("policy", &format!("full, for nothing can be compressed: {reason}"));
        }
        out += &labelled("buffers", "as llama.cpp allocates them, with the whole prompt in the cache");
        let rows = self.types.iter().map(|need| {
            [
                need.name.into(),
                size(need.kv_cache),
                size(need.compute),
                size(need.total),
                need.fits.map_or("", |fits| if fits { "yes" } else { "no" }).into(),
                need.most_cells.map_or_else(String::new, count),
            ]
        });
        out += &match self.memory {
            Some(_) => table(["type", "KV cache", "compute", "with weights", "fits", "largest -c"], rows, 1),
            None => table(
                ["type", "KV cache", "compute", "with weights"],
                rows.map(|[name, cache, compute, total, ..]| [name, cache, compute, total]),
                1,
            ),
        };
        if let Some(host) = self.types.iter().map(|need| need.host).max().filter(|&n| n > 0) {
            let there =
                if self.devices.len() > 1 { "on all of these devices together" } else { "on the GPU or worker" };
            out += &labelled("", &format!("{there}; besides up to {} in this machine's memory", size(host)));
        }
        if !self.devices.is_empty() {
            let name = self.chosen.unwrap_or(CacheType::F16.name());
            out += &labelled("devices", &format!("as llama.cpp shares the layers out now, with {name}"));
            let rows = self.devices.iter().map(|device| {
                [
                    format!("{} ({})", plain(&device.name), plain(&device.description)),
                    size(device.weights),
                    size(device.kv_cache),
                    size(device.compute),
                    size(device.total),
                    device.free.map_or_else(String::new, size),
                ]
            });
            out += &table(["device", "weights", "KV cache", "compute", "together", "free"], rows, 1);
        }
        out += &self.vote_in_words();
        if let Some(command) = &self.command {
            out += &labelled("use", command);
        }
        out
    }

    fn vote_in_words(&self) -> String {
        if self.after_vote.is_empty() {
            return String::new();
        }
        let name = self.chosen.unwrap_or_default();
        let mut out = labelled("a vote", &format!("keeps what the request needs; as examples, with {name}:"));
        let rows = self.after_vote.iter().map(|kept| {
            [kept.name.into(), count(kept.cells), bytes(kept.kv_bytes, kept.kv_bytes), count(kept.free_cells)]
        });
        out += &table(["kept", "cells", "KV in use", "free cells"], rows, 1);
        for line in [
            "The share cannot be known beforehand: the defaults kept 18 % on tasks of RULER at 4,096 tokens",
            "and 53 to 75 % of plain text (docs/results.md). Free cells hold further text, and decoding reads",
            "less; the buffer stays as large as -c makes it, and it has cells for the whole prompt.",
        ] {
            out += &labelled("", line);
        }
        let vote = self.vote_bytes;
        out + &labelled("", &format!("While it works, a vote takes about {} more (an estimate).", bytes(vote, vote)))
    }

    /// Checks that some cache type fits.
    ///
    /// # Errors
    /// If none fits.
    fn verdict(&self) -> Result<()> {
        let (Some(memory), None) = (self.memory, self.chosen) else {
            return Ok(());
        };
        let best = self.types.iter().max_by_key(|need| need.most_cells);
        let most = best.and_then(|need| need.most_cells).unwrap_or(0);
        let (cells, memory) = (count(self.cells), bytes(memory, memory));
        let way_out = match best {
            Some(need) if most > self.predict => {
                let flags = type_flags(need.cache_type);
                let prompt = most - self.predict;
                let longer = "and `gvote run` reads a longer one in as many cells, of which it frees some on the way";
                format!("--prompt {prompt} would{flags}, {longer} (-c {most}); or raise --memory, lower -n or -ub")
            }
            _ => "raise --memory, lower -ub, or take a smaller model".into(),
        };
        anyhow::bail!("{cells} cells do not fit into {memory} with any cache type: {way_out}")
    }
}

/// Returns the memory in use after votes that keep the example shares.
fn kept(info: &ModelInfo, cache_type: CacheType, prompt: usize, cells: usize) -> Vec<Kept> {
    let per_cell = info.kv_bytes_per_cell(cache_type, cache_type);
    let one = |(name, share): (_, f64)| {
        let kept = (prompt as f64 * share).ceil() as usize;
        Kept { name, share, cells: kept, kv_bytes: kept * per_cell, free_cells: cells - kept }
    };
    SHARES.map(one).into()
}

fn type_flags(cache_type: CacheType) -> String {
    match cache_type {
        CacheType::F16 => String::new(),
        other => format!(" -ctk {0} -ctv {0}", other.name()),
    }
}

/// Returns a `gvote run` command line for a shell.
fn command(args: &PlanArgs, cache_type: CacheType, cells: usize, is_refused: bool) -> String {
    let path = quoted(&args.model.to_string_lossy());
    let mut out = format!("gvote run -m {path} -f FILE -c {cells} -n {}{}", args.predict, type_flags(cache_type));
    for word in &args.shared.words {
        out = out + " " + word;
    }
    if is_refused {
        out += " --policy full";
    }
    out
}
