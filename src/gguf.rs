//! What a model file says before it is loaded: its shape, the bytes of a KV cell, whether gvote can work on it.
//!
//! The metadata is parsed by the crate `gguf-rs`, but never straight from the file. gguf-rs 0.1.8 trusts what it reads: it
//! allocates a string's length (up to 1 GiB) before it knows that the file has so much, keeps some 60 bytes for each byte of a
//! long array, reads without a buffer, panics on a tensor of type 40 and refuses the types above (NVFP4, Q1_0, Q2_0, F8_E4M3 of
//! the pin), takes 256 for the block of every type past 9, and minds neither a truncated file nor a key given twice. So a
//! bounded walk checks the structure first, copies out the few entries that matter, and hands gguf-rs those alone, under a
//! header that promises no tensors; tensors are checked here. Its names of file types are not those of `llama_ftype`, and
//! asking for one panics on a negative number: the names are ours.
//!
//! The format: `ggml/include/gguf.h`; the checks follow `ggml/src/gguf.cpp`, the keys and defaults `src/llama-arch.cpp`,
//! `src/llama-model.cpp` and `src/models/*.cpp` of the pinned llama.cpp.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::llama::CacheType;

/// Metadata entries a file may have. Real ones have 20 to 60.
const KV_MAX: u64 = 1 << 12;
/// Tensors a file may have. Real ones have up to a few thousand.
const TENSOR_MAX: u64 = 1 << 20;
/// Longest key, bytes: the format's own limit.
const KEY_MAX: u64 = (1 << 16) - 1;
/// Longest string, bytes, and longest array of numbers: `GGUF_MAX_STRING_LENGTH`, `GGUF_MAX_ARRAY_ELEMENTS`.
const STRING_MAX: u64 = 1 << 30;
/// Longest array of strings: they are walked one by one. The largest vocabularies have 2^18.
const STRINGS_MAX: u64 = 1 << 24;
/// `GGML_MAX_NAME`, bytes with the final NUL.
const TENSOR_NAME_MAX: u64 = 64;
/// `GGML_MAX_DIMS`.
const DIMS_MAX: u32 = 4;
/// `LLAMA_MAX_LAYERS`; also the longest array worth keeping, for the arrays we read have a value a layer.
const LAYER_MAX: u64 = 512;
/// Most heads, and most values in a row. Keeps every product of them inside 64 bits.
const DIM_MAX: u64 = 1 << 20;
/// Largest entry handed to gguf-rs, and all of them together, bytes. Chat templates have up to 100 KB.
const ENTRY_MAX: u64 = 1 << 20;
const KEPT_MAX: usize = 1 << 24;
/// Where tensor data starts without `general.alignment`, bytes.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Why a file cannot be read. One line each: the path, what is wrong, what to do.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("{path}: there is no such file: check the path (-m)")]
    NotFound { path: PathBuf },
    #[error("{path}: this is a folder: give the .gguf file in it")]
    Folder { path: PathBuf },
    #[error("{path}: this is not a regular file: give a .gguf file on disk")]
    NotAFile { path: PathBuf },
    #[error("{path}: cannot be read: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: the file is empty: download it again")]
    Empty { path: PathBuf },
    #[error("{path}: this is not a GGUF file: {hint}")]
    NotGguf { path: PathBuf, hint: &'static str },
    #[error("{path}: GGUF version {version} is not supported (2 and 3 are): get or convert a newer file")]
    Version { path: PathBuf, version: u32 },
    #[error("{path}: this GGUF file is big-endian: convert it for this machine (gguf-py: gguf_convert_endian.py)")]
    BigEndian { path: PathBuf },
    #[error("{path}: the file ends inside its own header, after {size} bytes: download it again")]
    TruncatedHeader { path: PathBuf, size: u64 },
    #[error("{path}: the file is cut short: it should have {needed} bytes and has {size}: download it again")]
    TruncatedData { path: PathBuf, needed: u64, size: u64 },
    #[error("{path}: the file is damaged: {what}: download it again, or convert it anew")]
    Malformed { path: PathBuf, what: String },
}

/// How far gvote can go with a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Support {
    /// Every layer keeps the whole context: all of the cache is compressed.
    Composite,
    /// Some layers use a sliding window: the cache of the others is compressed, the window's is small already.
    BaseOnly,
    /// Not at all; the reason in words that complete "this model is not supported: ".
    Refused(String),
}

/// A model file's own words. Of a split model: the first file's, which holds the metadata of all.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// `general.architecture`, as llama.cpp names it.
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// Name of the weights' mix (`general.file_type`, `llama_ftype` in `llama.h`), such as `Q4_K_M`.
    pub quantization: Option<&'static str>,
    /// Layers of the trunk: blocks less those that only predict further tokens (`nextn_predict_layers`).
    pub n_layer: usize,
    /// Query heads, of the layer that has most.
    pub n_head: usize,
    /// KV heads of each layer; 0 for a layer without attention.
    pub n_head_kv: Vec<usize>,
    /// Values in a hidden state.
    pub n_embd: usize,
    /// Values in a key, a head. Layers with a window may differ.
    pub n_embd_head_k: usize,
    /// Values in a value vector, a head. Layers with a window may differ.
    pub n_embd_head_v: usize,
    /// Tokens of context the model was trained for.
    pub n_ctx_train: usize,
    /// Whether the file carries a chat template.
    pub has_chat_template: bool,
    /// Tokens in the sliding window, where llama.cpp gives this architecture one.
    pub sliding_window: Option<usize>,
    /// Whether each layer uses the sliding window.
    pub windowed: Vec<bool>,
    /// Files of the model (`split.count`).
    pub n_split: usize,
    /// Layers from here on read another layer's keys and values.
    n_layer_kv: usize,
    refusal: Option<&'static str>,
}

/// Read what the file at `path` says of its model, and check that all of its tensor data is there. Tensors of a type that this
/// version does not know are not checked.
///
/// # Errors
/// See [`GgufError`]. Neither time nor memory depends on what a damaged file promises.
pub fn read(path: &Path) -> Result<ModelInfo, GgufError> {
    let owned = || path.to_owned();
    let fault = |size: u64, source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => GgufError::NotFound { path: owned() },
        io::ErrorKind::UnexpectedEof => GgufError::TruncatedHeader { path: owned(), size },
        io::ErrorKind::InvalidData => GgufError::Malformed { path: owned(), what: source.to_string() },
        _ => GgufError::Read { path: owned(), source },
    };
    let meta = fs::metadata(path).map_err(|e| fault(0, e))?;
    let size = meta.len();
    match size {
        _ if meta.is_dir() => return Err(GgufError::Folder { path: owned() }),
        // opening a pipe would wait for its writer
        _ if !meta.is_file() => return Err(GgufError::NotAFile { path: owned() }),
        0 => return Err(GgufError::Empty { path: owned() }),
        _ => {}
    }
    let fault = |e| fault(size, e);
    let file = BufReader::new(File::open(path).map_err(fault)?);
    let mut walk = Walk { file, pos: 0, size };

    let hint = match &walk.take().map_err(fault)? {
        b"GGUF" => None,
        b"FUGG" => return Err(GgufError::BigEndian { path: owned() }),
        b"vers" => Some("it looks like a Git LFS pointer: fetch the file itself (git lfs pull)"),
        b"lmgg" | b"fmgg" | b"tjgg" => Some("it has the old GGML format: get a GGUF of the model"),
        [b'<', ..] => Some("it looks like a web page: download the file itself"),
        _ => Some("check the path (-m), or convert the model (convert_hf_to_gguf.py)"),
    };
    if let Some(hint) = hint {
        return Err(GgufError::NotGguf { path: owned(), hint });
    }
    let version = walk.u32().map_err(fault)?;
    match version {
        2 | 3 => {}
        // a small number in the other byte order has its zeros in the low half
        v if v != 0 && v & 0xffff == 0 => return Err(GgufError::BigEndian { path: owned() }),
        _ => {
            return Err(GgufError::Version { path: owned(), version });
        }
    }
    match walk.model(version).map_err(fault)? {
        (_, needed) if needed > size => Err(GgufError::TruncatedData { path: owned(), needed, size }),
        (info, _) => Ok(info),
    }
}

/// What becomes of it in [`read`]: [`GgufError::Malformed`].
fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// A reader that knows where it is and where the file ends, in bytes.
struct Walk {
    file: BufReader<File>,
    pos: u64,
    size: u64,
}

impl Walk {
    /// All that comes after the version: the model, and the size the file should have, bytes.
    fn model(&mut self, version: u32) -> io::Result<(ModelInfo, u64)> {
        let (n_tensors, n_kv) = (self.u64()?, self.u64()?);
        if n_tensors > TENSOR_MAX || n_kv > KV_MAX {
            return Err(bad(format!("it counts {n_tensors} tensors and {n_kv} metadata entries")));
        }
        let kv = self.metadata(version, n_kv)?;
        let needed = self.tensors(n_tensors, &kv)?;
        Ok((describe(&kv, n_tensors)?, needed))
    }

    /// Check that `n` bytes are left, and count them as read.
    fn advance(&mut self, n: u64) -> io::Result<()> {
        if n > self.size - self.pos {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.pos += n;
        Ok(())
    }

    fn skip(&mut self, n: u64) -> io::Result<()> {
        self.advance(n)?;
        self.file.seek_relative(n as i64) // n fits the file, and its size fits i64
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.advance(N as u64)?;
        self.file.read_exact(&mut bytes).map(|()| bytes)
    }

    fn bytes(&mut self, n: u64) -> io::Result<Vec<u8>> {
        self.advance(n)?;
        let mut bytes = vec![0; n as usize]; // n fits the file
        self.file.read_exact(&mut bytes).map(|()| bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn length(&mut self, max: u64, of: &str) -> io::Result<u64> {
        match self.u64()? {
            n if n <= max => Ok(n),
            n => Err(bad(format!("it holds {of} of length {n}"))),
        }
    }

    /// Walk the metadata, and have gguf-rs parse the entries that say something of the model's shape.
    fn metadata(&mut self, version: u32, n_kv: u64) -> io::Result<BTreeMap<String, Value>> {
        let mut seen = HashSet::new();
        let mut kept = Vec::new();
        let mut n_kept = 0_u64;
        for _ in 0..n_kv {
            let start = self.pos;
            let n = self.length(KEY_MAX, "a key")?;
            let key = self.bytes(n)?;
            let elements = self.skip_value()?;
            let wanted = !key.starts_with(b"tokenizer.") || key == b"tokenizer.chat_template";
            let len = self.pos - start;
            if wanted && elements <= LAYER_MAX && len <= ENTRY_MAX {
                self.file.seek_relative(-(len as i64))?;
                self.pos = start;
                kept.extend(self.bytes(len)?);
                n_kept += 1;
            }
            if kept.len() > KEPT_MAX {
                return Err(bad("its metadata is too large"));
            }
            if !seen.insert(key) {
                return Err(bad("it has a metadata key twice"));
            }
        }

        let counts = [0, n_kept].map(u64::to_le_bytes).concat(); // of tensors and entries
        let header = [&version.to_le_bytes()[..], &counts].concat();
        let stream = Box::new(Cursor::new(header).chain(Cursor::new(kept)));
        // the cap is on arrays of the tokenizer, of which there are none here
        gguf_rs::GGUFContainer::new(gguf_rs::ByteOrder::LE, stream, LAYER_MAX)
            .decode()
            .map(|model| model.metadata().clone())
            .map_err(|error| bad(format!("its metadata cannot be parsed ({error})")))
    }

    /// Step over a value. Returns the number of elements of an array, 1 for anything else.
    fn skip_value(&mut self) -> io::Result<u64> {
        let (mut kind, mut n) = (self.u32()?, 1);
        if kind == 9 {
            kind = self.u32()?;
            n = self.length(if kind == 8 { STRINGS_MAX } else { STRING_MAX }, "an array")?;
        }
        match kind {
            0 | 1 | 7 => self.skip(n)?,
            2 | 3 => self.skip(n * 2)?,
            4..=6 => self.skip(n * 4)?,
            10..=12 => self.skip(n * 8)?,
            8 => {
                for _ in 0..n {
                    let len = self.length(STRING_MAX, "a string")?;
                    self.skip(len)?;
                }
            }
            _ => return Err(bad(format!("it holds a value of unknown type {kind}"))),
        }
        Ok(n)
    }

    /// Check the tensors' descriptions; returns where the data of the last one ends, bytes. As in `gguf_init_from_reader()`, data
    /// must lie in the order of the descriptions, without holes.
    fn tensors(&mut self, n_tensors: u64, kv: &BTreeMap<String, Value>) -> io::Result<u64> {
        let alignment = match kv.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(value) => match value.as_u64().filter(|a| a.is_power_of_two()) {
                Some(a) if a <= u32::MAX.into() => a,
                _ => return Err(bad("general.alignment is not a power of two")),
            },
        };
        let (mut next, mut end) = (Some(0), 0);
        for _ in 0..n_tensors {
            let n = self.length(TENSOR_NAME_MAX - 1, "a tensor's name")?;
            let name = String::from_utf8_lossy(&self.bytes(n)?).into_owned();
            let n_dims = self.u32()?;
            if n_dims > DIMS_MAX {
                return Err(bad(format!("tensor {name:?} has {n_dims} dimensions")));
            }
            let mut dims = [1_u64; DIMS_MAX as usize];
            for dim in &mut dims[..n_dims as usize] {
                *dim = self.u64()?;
            }
            let (kind, offset) = (self.u32()?, self.u64()?);
            let block = BLOCKS.get(kind as usize).filter(|block| block.0 > 0);
            let Some(&(block, bytes)) = block else {
                next = None; // left to llama.cpp, and with it the places of those that follow
                continue;
            };
            let elements = dims.iter().try_fold(1_u64, |n, &dim| n.checked_mul(dim));
            let whole = elements.filter(|_| dims[0].is_multiple_of(block));
            let bytes = whole.and_then(|n| (n / block).checked_mul(bytes));
            let after = bytes.and_then(|n| n.checked_add(offset)).filter(|&n| n < 1 << 63);
            let Some(after) = after else {
                return Err(bad(format!("tensor {name:?} cannot have shape {dims:?}")));
            };
            if next.is_some_and(|next| next != offset) {
                return Err(bad(format!("the data of tensor {name:?} is out of place")));
            }
            next = next.map(|_| after.next_multiple_of(alignment));
            end = end.max(after);
        }
        // both are below 2^63: no overflow
        Ok(if n_tensors > 0 { self.pos.next_multiple_of(alignment) + end } else { self.pos })
    }
}

/// Values in a block and bytes of a block of each ggml type of the pin: `type_traits` in `ggml/src/ggml.c`. (0, 0): given up.
#[rustfmt::skip]
const BLOCKS: [(u64, u64); 44] = [
    // F32, F16, Q4_0, Q4_1, -, -, Q5_0, Q5_1, Q8_0, Q8_1
    (1, 4), (1, 2), (32, 18), (32, 20), (0, 0), (0, 0), (32, 22), (32, 24), (32, 34), (32, 36),
    // Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K, IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S
    (256, 84), (256, 110), (256, 144), (256, 176), (256, 210), (256, 292), (256, 66), (256, 74), (256, 98), (256, 50),
    // IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, I8, I16, I32, I64, F64, IQ1_M
    (32, 18), (256, 110), (256, 82), (256, 136), (1, 1), (1, 2), (1, 4), (1, 8), (1, 8), (256, 56),
    // BF16, -, -, -, TQ1_0, TQ2_0, -, -, -, MXFP4
    (1, 2), (0, 0), (0, 0), (0, 0), (256, 54), (256, 66), (0, 0), (0, 0), (0, 0), (32, 17),
    // NVFP4, Q1_0, Q2_0, F8_E4M3
    (64, 36), (128, 18), (64, 18), (1, 1),
];

/// `llama_ftype` in `include/llama.h`, by number; empty where a number was given up.
#[rustfmt::skip]
const FILE_TYPES: [&str; 43] = [
    "F32", "F16", "Q4_0", "Q4_1", "", "", "", "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S",
    "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "", "", "", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "F8_E4M3",
];

/// Architectures refused by name, and why: `llm_arch_is_recurrent()`, `llm_arch_is_hybrid()`, `llm_arch_is_diffusion()`,
/// `llama_model_has_encoder()`, `llama_model::create_memory()`, and `f_max_alibi_bias` in `src/models`.
#[rustfmt::skip]
const REFUSED: &[(&str, &[&str])] = &[
    ("it is recurrent and keeps no attention cache", &["mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"]),
    ("it mixes recurrent and attention layers, a layout that is not supported yet", &[
        "jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "lfm3", "nemotron_h", "nemotron_h_moe", "qwen3next",
        "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next", "qwen35", "qwen35moe", "qwen4exp", "deepseek4", "deepseek41",
        "minimax-01",
    ]),
    ("it is a diffusion model and keeps no attention cache", &["dream", "llada", "llada-moe", "rnd1"]),
    ("it only encodes text (embeddings, labels) and keeps no attention cache", &[
        "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert",
        "gemma-embedding", "gemma-embedding2", "t5encoder", "clef",
    ]),
    ("it has an encoder; only decoder-only models keep the cache that gvote works on", &["t5"]),
    ("it drafts tokens for another model and is of no use alone", &["eagle3", "dflash", "gemma4-assistant"]),
    ("it is no language model: give the text model's file", &["clip", "wavtokenizer-dec"]),
    ("its cache holds more than keys and values (sparse attention), a layout that is not supported yet", &[
        "deepseek32", "glm-dsa", "hy_v4", "dots3note", "mistral-large4", "minimax-m3",
    ]),
    (ALIBI, &["bloom", "refact"]),
];
const ALIBI: &str = "it uses ALiBi: its attention needs one position a cell for all heads";
const MLA: &str = "it uses multi-head latent attention: its cache has no V";

/// Architectures whose layers with a sliding window follow a rhythm by default (others list the layers): its period, and whether
/// the layer with full attention comes first in it, not last. From the calls of `load_swa_pattern()` in `src/models`.
#[rustfmt::skip]
const WINDOWED: &[(usize, bool, &[&str])] = &[
    (2, false, &["gemma2", "gpt-oss"]),
    (4, false, &["afmoe", "cohere2", "exaone-moe", "exaone4", "limite", "llama4", "mellum", "muse-glimmer", "olmo2"]),
    (4, true, &["cohere2moe", "laguna", "smallthinker"]),
    (5, false, &["gemma3n"]),
    (6, false, &["gemma3"]),
    (8, false, &["plamo3"]),
];

/// The metadata of one architecture.
struct Keys<'a> {
    kv: &'a BTreeMap<String, Value>,
    architecture: &'a str,
}

impl Keys<'_> {
    /// `<architecture>.<key>`, or None if the file has no such key.
    fn get(&self, key: &str) -> Option<&Value> {
        self.kv.get(&format!("{}.{key}", self.architecture))
    }

    fn number(&self, key: &str, max: u64) -> io::Result<Option<u64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(n) if n <= max => Ok(Some(n)),
            _ => Err(bad(format!("its value of {key} is implausible"))),
        }
    }

    fn dim(&self, key: &str) -> io::Result<Option<usize>> {
        Ok(self.number(key, DIM_MAX)?.map(|n| n as usize))
    }

    /// A number for all of `n` layers, or one each: `get_key_or_arr()`.
    fn per_layer(&self, key: &str, n: usize) -> io::Result<Option<Vec<usize>>> {
        let Some(Value::Array(values)) = self.get(key) else {
            return Ok(self.dim(key)?.map(|value| vec![value; n]));
        };
        let dim = |value: &Value| value.as_u64().filter(|&n| n <= DIM_MAX).map(|n| n as usize);
        match values.iter().map(dim).collect::<Option<Vec<_>>>() {
            Some(layers) if layers.len() == n => Ok(Some(layers)),
            _ => Err(bad(format!("its values of {key} do not fit its {n} layers"))),
        }
    }
}

fn describe(kv: &BTreeMap<String, Value>, n_tensors: u64) -> io::Result<ModelInfo> {
    let text = |key: &str| kv.get(key).and_then(Value::as_str);
    let general = |key: &str| kv.get(key).and_then(Value::as_u64);
    let Some(architecture) = text("general.architecture") else {
        return Err(bad("it does not name its architecture (general.architecture)"));
    };
    let keys = Keys { kv, architecture };

    let n_block = keys.number("block_count", LAYER_MAX)?.unwrap_or(0) as usize;
    let n_layer = n_block - keys.number("nextn_predict_layers", n_block as u64)?.unwrap_or(0) as usize;
    let n_heads = keys.per_layer("attention.head_count", n_block)?.unwrap_or_default();
    let mut n_head_kv = keys.per_layer("attention.head_count_kv", n_block)?.unwrap_or(n_heads.clone());
    n_head_kv.truncate(n_layer);

    let n_embd = keys.dim("embedding_length")?.unwrap_or(0);
    let default_head = n_heads.first().map_or(0, |&n| n_embd.checked_div(n).unwrap_or(0));
    let shared = keys.number("attention.shared_kv_layers", n_block as u64)?.unwrap_or(0) as usize;
    let (sliding_window, windowed) = window(&keys, n_layer)?;
    let file_type = general("general.file_type").and_then(|n| FILE_TYPES.get(n as usize));

    let mut info = ModelInfo {
        architecture: architecture.into(),
        name: text("general.name").map(Into::into),
        quantization: file_type.copied().filter(|name| !name.is_empty()),
        n_layer,
        n_head: n_heads.into_iter().max().unwrap_or(0),
        n_head_kv,
        n_embd,
        n_embd_head_k: keys.dim("attention.key_length")?.unwrap_or(default_head),
        n_embd_head_v: keys.dim("attention.value_length")?.unwrap_or(default_head),
        n_ctx_train: keys.number("context_length", u32::MAX.into())?.unwrap_or(0) as usize,
        has_chat_template: text("tokenizer.chat_template").is_some_and(|t| !t.is_empty()),
        sliding_window,
        windowed,
        n_split: general("split.count").unwrap_or(1) as usize,
        n_layer_kv: if architecture == "gemma3n" { 20 } else { n_block - shared },
        refusal: None,
    };
    info.refusal = refusal(&keys, &info, n_tensors);
    Ok(info)
}

/// The sliding window in tokens, and the layers that use it. Many files name a window that llama.cpp ignores (phi3, qwen2): it
/// counts only where the architecture has a rhythm of layers, or the file lists them.
fn window(keys: &Keys, n_layer: usize) -> io::Result<(Option<usize>, Vec<bool>)> {
    const PATTERN: &str = "attention.sliding_window_pattern";
    let name = keys.architecture;
    let known = WINDOWED.iter().find(|row| row.2.contains(&name));
    let default = match name {
        "exaone4" if n_layer != 64 => return Ok((None, vec![false; n_layer])), // only the 32B has one
        "gemma2" | "exaone4" => 4096,
        "llama4" => 8192,
        _ => 0,
    };
    let tokens = keys.number("attention.sliding_window", u32::MAX.into())?.unwrap_or(default);
    if tokens == 0 || (known.is_none() && keys.get(PATTERN).is_none()) {
        return Ok((None, vec![false; n_layer]));
    }
    let mut windowed: Vec<_> = if let Some(Value::Array(layers)) = keys.get(PATTERN) {
        layers.iter().map(|w| w.as_bool().unwrap_or(w.as_u64() != Some(0))).collect()
    } else {
        let &(period, full_first, _) = known.unwrap_or(&(0, false, &[]));
        let period = keys.dim(PATTERN)?.unwrap_or(period);
        let full = if full_first { 0 } else { period.saturating_sub(1) };
        // llama_hparams::set_swa_pattern()
        (0..n_layer).map(|il| period == 0 || il % period != full).collect()
    };
    windowed.resize(n_layer, false);
    Ok((Some(tokens as usize), windowed))
}

fn refusal(keys: &Keys, info: &ModelInfo, n_tensors: u64) -> Option<&'static str> {
    let name = keys.architecture;
    if let Some(row) = REFUSED.iter().find(|row| row.1.contains(&name)) {
        return Some(row.0);
    }
    let positive = |key| keys.get(key).and_then(Value::as_f64).is_some_and(|n| n > 0.0);
    let is_model = keys.kv.get("general.type").is_none_or(|kind| kind == "model");
    // models/baichuan.cpp: the 13B, with 40 layers, has no RoPE
    let alibi = positive("attention.max_alibi_bias") || (name == "baichuan" && info.n_layer == 40);
    let causal = keys.get("attention.causal").and_then(Value::as_bool).unwrap_or(true);
    match (info.cached(false).count(), info.cached(true).count()) {
        _ if !is_model => Some("it is an adapter or a side file: give the text model's file"),
        _ if positive("attention.key_length_mla") => Some(MLA),
        _ if alibi => Some(ALIBI),
        _ if !causal => Some("its attention looks ahead: it reads text and cannot write any"),
        // the first file of a split model may hold metadata only
        _ if n_tensors == 0 && info.n_split <= 1 => Some("the file holds no weights"),
        (0, 0) => Some("its metadata names no layer with an attention cache"),
        (0, _) => Some("every layer uses a sliding window"),
        _ => None,
    }
}

impl ModelInfo {
    /// KV heads of the layers that store keys and values of their own, with the window or without it.
    fn cached(&self, windowed: bool) -> impl Iterator<Item = usize> {
        let layers = self.n_head_kv.iter().zip(&self.windowed).take(self.n_layer_kv);
        layers.filter(move |&(&n, &w)| n > 0 && w == windowed).map(|(&n, _)| n)
    }

    /// Bytes of a cell over all layers that keep the whole context: the cells that gvote frees. Layers with a sliding window have a
    /// small cache of their own and are not counted. A layer's K row has n_head_kv * n_embd_head_k values, its V row
    /// n_head_kv * n_embd_head_v: `llama_kv_cache`.
    pub fn kv_bytes_per_cell(&self, type_k: CacheType, type_v: CacheType) -> usize {
        let row = |cache_type: CacheType, n: usize| {
            let (block, bytes) = BLOCKS[cache_type.raw() as usize];
            n.div_ceil(block as usize) * bytes as usize
        };
        let (k, v) = (self.n_embd_head_k, self.n_embd_head_v);
        self.cached(false).map(|n| row(type_k, n * k) + row(type_v, n * v)).sum()
    }

    /// How far gvote can go with this model, as far as its metadata tells. llama.cpp has the last word when the model is loaded
    /// ([`crate::llama::Model::unsupported`] and the shim): an architecture unknown here is not refused here.
    pub fn support(&self) -> Support {
        match self.refusal {
            Some(reason) => Support::Refused(reason.into()),
            None if self.sliding_window.is_some() => Support::BaseOnly,
            None => Support::Composite,
        }
    }
}
