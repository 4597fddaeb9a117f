//! Flags that say where a model's weights go, how they are read, and what is changed while loading. Names and meanings are llama.cpp's.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, anyhow};
use clap::Args;
use gvote::llama::rpc::Endpoint;
use gvote::llama::{KvOverride, LlamaError, LoadMode, ModelParams, SplitMode, TensorBuffer};
use gvote_gguf::{self as gguf, Gguf, GgufError};

use super::by_name;
use crate::Exit;

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct PlacementArgs {
    /// Number of layers to place on GPUs and workers, if there are any; or `auto` or `all`
    #[arg(long, visible_alias = "gpu-layers", value_name = "N", default_value = "auto", value_parser = gpu_layers)]
    pub n_gpu_layers: i32,

    /// Also place layers on the devices of these workers: machines that run `gvote rpc-server` or llama.cpp's rpc-server
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',', value_parser = Endpoint::from_str)]
    pub rpc: Vec<Endpoint>,

    /// Devices to place layers on, such as CUDA0,CUDA1; none = keep all layers in this machine's memory. The error for an unknown name
    /// lists the known ones [default: all GPUs and workers]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    device: Vec<String>,

    /// How to split the model over several devices: none (one device holds all of it), layer, row or tensor
    #[arg(long, value_name = "MODE", default_value = "layer", hide_possible_values = true, value_parser = by_name(&SplitMode::NAMES))]
    split_mode: SplitMode,

    /// Share of the model for each device in turn, such as 3,1 [default: by free memory]
    #[arg(long, value_name = "N,...", value_parser = shares)]
    tensor_split: Option<List<f32>>,

    /// Device that holds the model with --split-mode none, counted from 0; negative = no device
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    main_gpu: i32,

    /// Place tensors whose name matches a regular expression in buffers of this type, such as exps=CPU
    #[arg(long, value_name = "PATTERN=BUFFER,...", value_delimiter = ',', value_parser = TensorBuffer::from_str)]
    override_tensor: Vec<TensorBuffer>,

    /// Keep the weights of all experts (MoE) in this machine's memory
    #[arg(long)]
    cpu_moe: bool,

    /// Keep the weights of the experts (MoE) of the first N layers in this machine's memory
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=LAYERS_MAX))]
    n_cpu_moe: u32,

    /// How to read the model file: auto (mmap where possible), none, mmap, mlock, mmap+mlock, or dio (direct I/O, past the page cache)
    #[arg(long, value_name = "MODE", default_value = "auto", hide_possible_values = true, value_parser = by_name(&LoadMode::NAMES))]
    load_mode: LoadMode,

    /// Read the model into memory instead of mapping the file; same as --load-mode none
    #[arg(long, conflicts_with = "load_mode")]
    no_mmap: bool,

    /// Keep the system from swapping the model out; same as --load-mode mmap+mlock, or mlock with --no-mmap
    #[arg(long, conflicts_with = "load_mode")]
    mlock: bool,

    /// Override metadata values of the model file; TYPE is int, float, bool or str
    #[arg(long, value_name = "KEY=TYPE:VALUE,...", value_parser = overrides)]
    override_kv: Vec<List<KvOverride>>,

    /// LoRA adapters to apply (GGUF files)
    #[arg(long, value_name = "FILE,...", value_parser = adapters)]
    lora: Vec<List<Adapter>>,

    /// LoRA adapters to apply, each with its scale
    #[arg(long, value_name = "FILE:SCALE,...", value_parser = scaled_adapters)]
    lora_scaled: Vec<List<Adapter>>,
}

/// Most layers that llama.cpp can load (`LLAMA_MAX_LAYERS`).
const LAYERS_MAX: i64 = 512;

/// Values of one occurrence of a flag that takes a list.
#[derive(Clone)]
struct List<T>(Vec<T>);

#[derive(Clone)]
struct Adapter {
    path: PathBuf,
    scale: f32,
}

impl PlacementArgs {
    pub fn params(&self) -> ModelParams {
        let no_devices = self.device == ["none"];
        let experts = (0..self.n_cpu_moe).map(|il| TensorBuffer::experts(Some(il)));
        let experts = self.cpu_moe.then(|| TensorBuffer::experts(None)).into_iter().chain(experts);
        ModelParams {
            n_gpu_layers: self.n_gpu_layers,
            devices: match self.device.is_empty() {
                true => None,
                false => Some(self.device.iter().filter(|_| !no_devices).cloned().collect()),
            },
            split_mode: self.split_mode,
            main_gpu: self.main_gpu,
            tensor_split: self.tensor_split.iter().flat_map(|list| &list.0).copied().collect(),
            load_mode: match (self.no_mmap, self.mlock) {
                (false, false) => self.load_mode,
                (true, false) => LoadMode::None,
                (false, true) => LoadMode::MmapMlock,
                (true, true) => LoadMode::Mlock,
            },
            tensor_buffers: self.override_tensor.iter().cloned().chain(experts).collect(),
            kv_overrides: self.kv_overrides(),
            adapters: self.adapters().map(|adapter| (adapter.path.clone(), adapter.scale)).collect(),
        }
    }

    /// Reads the model file's metadata, with the overrides of `--override-kv` applied.
    pub fn open(&self, model: &Path) -> Result<Gguf, GgufError> {
        Gguf::open_with(model, &self.kv_overrides())
    }

    fn kv_overrides(&self) -> Vec<KvOverride> {
        self.override_kv.iter().flat_map(|list| &list.0).cloned().collect()
    }

    /// Checks the adapters before llama.cpp loads them: a damaged one makes llama.cpp end the process.
    pub fn check_adapters(&self, model: &Gguf) -> Result<()> {
        for Adapter { path, .. } in self.adapters() {
            let adapter = Gguf::open(path).map_err(|error| anyhow!("--lora {error}"))?;
            gguf::check_adapter(&adapter, model).map_err(|reason| anyhow!("--lora {}: {reason}", path.display()))?;
        }
        Ok(())
    }

    fn adapters(&self) -> impl Iterator<Item = &Adapter> {
        self.lora.iter().chain(&self.lora_scaled).flat_map(|list| &list.0)
    }
}

/// Puts the flag in front of an error about its value; makes it a usage error if the machine lacks the named thing.
pub fn name_flag(error: LlamaError) -> anyhow::Error {
    let flag = match error {
        LlamaError::Device { .. } => "--device",
        LlamaError::Buffer { .. } => "--override-tensor",
        LlamaError::TensorSplit { .. } => "--tensor-split",
        LlamaError::SplitMode => "--split-mode tensor",
        LlamaError::Adapter { .. } => return anyhow::Error::new(error).context("--lora"),
        error => return error.into(),
    };
    Exit::Usage(format!("{flag}: {error}")).into()
}

/// Parses a number of layers; `auto` and `all` become llama.cpp's numbers for them.
fn gpu_layers(text: &str) -> Result<i32, String> {
    match text {
        "auto" => Ok(-1),
        "all" => Ok(-2),
        n => n.parse().map_err(|_| "use a number, `auto` or `all`".into()),
    }
}

fn shares(text: &str) -> Result<List<f32>, String> {
    let share = |part: &str| part.parse().ok().filter(|x: &f32| x.is_finite() && *x >= 0.0);
    let shares: Option<Vec<f32>> = text.split([',', '/']).map(share).collect();
    shares.map(List).ok_or_else(|| "use numbers from 0 up, such as 3,1".into())
}

/// Parses a line of comma-separated values; a value that contains commas stands in quotes.
fn fields<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<List<T>, String> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(text.as_bytes());
    let line = reader.records().next().and_then(Result::ok).ok_or("it is empty, or its quotes do not match")?;
    line.iter().map(parse).collect::<Result<_, _>>().map(List)
}

fn overrides(text: &str) -> Result<List<KvOverride>, String> {
    fields(text, |field| field.parse().map_err(|error: gvote::llama::KvError| error.to_string()))
}

fn adapters(text: &str) -> Result<List<Adapter>, String> {
    let adapter = |field: &str| (!field.is_empty()).then(|| Adapter { path: field.into(), scale: 1.0 });
    fields(text, |field| adapter(field).ok_or_else(|| "name a file".into()))
}

fn scaled_adapters(text: &str) -> Result<List<Adapter>, String> {
    let adapter = |field: &str| {
        let (path, scale) = field.rsplit_once(':').filter(|(path, _)| !path.is_empty())?;
        let scale = scale.parse().ok().filter(|x: &f32| x.is_finite())?;
        Some(Adapter { path: path.into(), scale })
    };
    fields(text, |field| adapter(field).ok_or_else(|| "use FILE:SCALE, such as style.gguf:0.5".into()))
}
