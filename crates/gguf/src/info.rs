//! Description of the model from the metadata.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::Tensor;
use super::entry::Entry;
use super::support::refusal;
use super::walk::{Fault, HEAD_MAX, bad};
use super::window::window;
use gvote::llama::CacheType;

/// Largest number of heads, and of values in a row. Keeps every product of them within 64 bits.
const DIM_MAX: u64 = 1 << 20;

/// `llama_ftype` in `include/llama.h`, by number; empty for removed numbers.
#[rustfmt::skip]
const FILE_TYPES: [&str; 43] = [
    "F32", "F16", "Q4_0", "Q4_1", "", "", "", "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S",
    "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "", "", "", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "F8_E4M3",
];

/// Metadata of a model. For a split model: that of the first file, which covers all parts.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// `general.architecture`, as llama.cpp names it.
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// `general.license`.
    pub license: Option<String>,
    /// Name of the quantization mix (`general.file_type`, `llama_ftype` in `llama.h`), such as `Q4_K_M`.
    pub quantization: Option<&'static str>,
    /// Layers of the trunk: blocks without those that only predict further tokens (`nextn_predict_layers`).
    pub n_layer: usize,
    /// Largest number of query heads in any layer.
    pub n_head: usize,
    /// Number of KV heads of each layer; 0 for a layer without attention.
    pub n_head_kv: Vec<usize>,
    /// Width of the hidden state, in values.
    pub n_embd: usize,
    /// Values in the key of one head. Layers with a window may differ.
    pub n_embd_head_k: usize,
    /// Values in the value vector of one head. Layers with a window may differ.
    pub n_embd_head_v: usize,
    /// Number of experts in a layer and the largest number that a token uses in any layer; 0 for a dense model.
    pub n_expert: (usize, usize),
    /// Training context length, in tokens.
    pub n_ctx_train: usize,
    /// Parameters of the rotary embedding.
    pub rope: Rope,
    /// Kind of tokenizer (`tokenizer.ggml.model`), and the number of its tokens.
    pub tokenizer: Option<String>,
    pub n_vocab: Option<u64>,
    /// The chat template.
    pub chat_template: Option<String>,
    /// Length of the sliding window in tokens, if llama.cpp uses one for this architecture.
    pub sliding_window: Option<usize>,
    /// Whether each layer uses the sliding window.
    pub windowed: Vec<bool>,
    /// Number of files of the model (`split.count`).
    pub n_split: usize,
    /// Layers from this index on reuse another layer's keys and values.
    n_layer_kv: usize,
    pub(super) refusal: Option<&'static str>,
}

/// Parameters of the rotary embedding in the file. The architecture sets missing ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rope {
    /// Number of rotated values in a head.
    pub dims: Option<usize>,
    pub base: Option<f64>,
    /// The scaling method: `linear`, `yarn`, ...
    pub scaling: Option<String>,
    pub factor: Option<f64>,
    /// Context length before the scaling, in tokens.
    pub original_context: Option<usize>,
}

/// The metadata of one architecture.
pub(super) struct Keys<'a> {
    entries: HashMap<&'a str, &'a Entry>,
    pub architecture: &'a str,
}

impl<'a> Keys<'a> {
    pub fn of(entries: &'a [Entry]) -> Result<Self, Fault> {
        let entries: HashMap<&str, &Entry> = entries.iter().map(|entry| (&*entry.key, entry)).collect();
        let named = entries.get("general.architecture").and_then(|entry| entry.value.as_ref()?.as_str());
        let Some(architecture) = named else {
            let at = entries.get("general.architecture").map_or(0, |entry| entry.offset);
            return Err(bad(at, "it does not name its architecture (general.architecture)"));
        };
        Ok(Self { entries, architecture })
    }

    pub fn general(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)?.value.as_ref()
    }

    fn text(&self, key: &str) -> Option<String> {
        self.general(key)?.as_str().map(Into::into)
    }

    /// Returns the entry `<architecture>.<key>`.
    pub fn own(&self, key: &str) -> Option<&Entry> {
        self.entries.get(&*format!("{}.{key}", self.architecture)).copied()
    }

    /// Returns the value of `<architecture>.<key>`, or None if the file has no such key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.own(key)?.value.as_ref()
    }

    pub fn number(&self, key: &str, max: u64) -> Result<Option<u64>, Fault> {
        let Some(entry) = self.own(key) else {
            return Ok(None);
        };
        match entry.value.as_ref().and_then(Value::as_u64) {
            Some(n) if n <= max => Ok(Some(n)),
            _ => Err(bad(entry.offset, format!("its value of {} is implausible", entry.key))),
        }
    }

    pub fn dim(&self, key: &str) -> Result<Option<usize>, Fault> {
        Ok(self.number(key, DIM_MAX)?.map(|n| n as usize))
    }

    /// Returns one number for each of `n` layers, from a common number or an array, like `get_key_or_arr()`.
    fn per_layer(&self, key: &str, n: usize) -> Result<Option<Vec<usize>>, Fault> {
        let entry = self.own(key);
        let Some((entry, Value::Array(values))) = entry.and_then(|e| e.value.as_ref().map(|value| (e, value))) else {
            return Ok(self.dim(key)?.map(|value| vec![value; n]));
        };
        let dim = |value: &Value| value.as_u64().filter(|&n| n <= DIM_MAX).map(|n| n as usize);
        match values.iter().map(dim).collect::<Option<Vec<_>>>() {
            Some(layers) if entry.elements == Some(n as u64) => Ok(Some(layers)),
            _ => Err(bad(entry.offset, format!("its values of {} do not fit its {n} layers", entry.key))),
        }
    }

    /// Returns the numbers of query heads and KV heads of each of `n_block` layers.
    pub fn heads(&self, n_block: usize) -> Result<(Vec<usize>, Vec<usize>), Fault> {
        let n_heads = self.per_layer("attention.head_count", n_block)?.unwrap_or_default();
        let n_head_kv = self.per_layer("attention.head_count_kv", n_block)?.unwrap_or(n_heads.clone());
        Ok((n_heads, n_head_kv))
    }

    fn rope(&self) -> Result<Rope, Fault> {
        let real = |key| self.get(key).and_then(Value::as_f64);
        Ok(Rope {
            dims: self.dim("rope.dimension_count")?,
            base: real("rope.freq_base"),
            scaling: self.get("rope.scaling.type").and_then(Value::as_str).map(Into::into),
            factor: real("rope.scaling.factor").or(real("rope.scale_linear")),
            original_context: self.number("rope.scaling.original_context_length", u32::MAX.into())?.map(|n| n as usize),
        })
    }
}

/// Describes the model; `tensors` are those of all files.
pub(super) fn describe(keys: &Keys, tensors: &[Tensor]) -> Result<ModelInfo, Fault> {
    let architecture = keys.architecture;
    let general = |key: &str| keys.general(key).and_then(Value::as_u64);

    let n_block = keys.number("block_count", HEAD_MAX)?.unwrap_or(0) as usize;
    let n_layer = n_block - keys.number("nextn_predict_layers", n_block as u64)?.unwrap_or(0) as usize;
    let (n_heads, mut n_head_kv) = keys.heads(n_block)?;
    n_head_kv.truncate(n_layer);

    let n_embd = keys.dim("embedding_length")?.unwrap_or(0);
    let default_head = n_heads.first().map_or(0, |&n| n_embd.checked_div(n).unwrap_or(0));
    let shared = keys.number("attention.shared_kv_layers", n_block as u64)?.unwrap_or(0) as usize;
    let (sliding_window, windowed) = window(keys, n_layer)?;
    let file_type = general("general.file_type").and_then(|n| FILE_TYPES.get(n as usize));
    let tokens = keys.entries.get("tokenizer.ggml.tokens").and_then(|entry| entry.elements);

    let n_layer_kv = if architecture == "gemma3n" { 20 } else { n_block - shared };
    let heads: HashSet<_> = n_heads
        .iter()
        .zip(n_head_kv.iter().zip(&windowed))
        .take(n_layer_kv)
        .filter(|(_, (n_head_kv, is_windowed))| **n_head_kv > 0 && !**is_windowed)
        .map(|(n_head, (n_head_kv, _))| (*n_head, *n_head_kv))
        .collect();

    let n_expert_used = keys.per_layer("expert_used_count", n_block)?.unwrap_or_default();

    let mut info = ModelInfo {
        architecture: architecture.into(),
        name: keys.text("general.name"),
        license: keys.text("general.license"),
        quantization: file_type.copied().filter(|name| !name.is_empty()),
        n_layer,
        n_head: n_heads.into_iter().max().unwrap_or(0),
        n_head_kv,
        n_embd,
        n_embd_head_k: keys.dim("attention.key_length")?.unwrap_or(default_head),
        n_embd_head_v: keys.dim("attention.value_length")?.unwrap_or(default_head),
        n_expert: (keys.dim("expert_count")?.unwrap_or(0), n_expert_used.into_iter().max().unwrap_or(0)),
        n_ctx_train: keys.number("context_length", u32::MAX.into())?.unwrap_or(0) as usize,
        rope: keys.rope()?,
        tokenizer: keys.text("tokenizer.ggml.model"),
        n_vocab: tokens.or(keys.number("vocab_size", u32::MAX.into())?),
        chat_template: keys.text("tokenizer.chat_template").filter(|text| !text.is_empty()),
        sliding_window,
        windowed,
        n_split: general("split.count").unwrap_or(1) as usize,
        n_layer_kv,
        refusal: None,
    };
    info.refusal = refusal(keys, &info, tensors, heads.len() > 1);
    Ok(info)
}

impl ModelInfo {
    /// KV heads of the layers that store their own keys and values, either those with the sliding window or those
    /// without.
    pub fn cached(&self, windowed: bool) -> impl Iterator<Item = usize> {
        let layers = self.n_head_kv.iter().zip(&self.windowed).take(self.n_layer_kv);
        layers.filter(move |&(&n, &w)| n > 0 && w == windowed).map(|(&n, _)| n)
    }

    /// Bytes of a cell over all layers that keep the whole context, which are the cells that gvote frees.
    ///
    /// Layers with a sliding window have a small cache of their own and are not counted. As in `llama_kv_cache`, a
    /// layer's K row has n_head_kv * n_embd_head_k values, its V row n_head_kv * n_embd_head_v.
    pub fn kv_bytes_per_cell(&self, type_k: CacheType, type_v: CacheType) -> usize {
        self.bytes_per_cell(false, type_k, type_v)
    }

    /// Bytes of a cell over all layers with a sliding window, assuming heads of the same size as in the other layers.
    pub fn kv_bytes_per_window_cell(&self, type_k: CacheType, type_v: CacheType) -> usize {
        self.bytes_per_cell(true, type_k, type_v)
    }

    /// Cells that llama.cpp allocates for layers with a sliding window in a context of `n_ctx` cells, unless the full
    /// cache is requested: those of the window and of one ubatch (`src/llama-kv-cache-iswa.cpp`).
    pub fn window_cells(&self, n_ctx: usize, n_ubatch: usize) -> usize {
        const PADDING: usize = 256;
        let Some(window) = self.sliding_window else { return 0 };
        n_ctx.min(window + n_ubatch).next_multiple_of(PADDING)
    }

    fn bytes_per_cell(&self, windowed: bool, type_k: CacheType, type_v: CacheType) -> usize {
        let row = |cache_type: CacheType, n: usize| {
            let stored = cache_type.stored();
            n.div_ceil(stored.block as usize) * stored.bytes as usize
        };
        let (k, v) = (self.n_embd_head_k, self.n_embd_head_v);
        self.cached(windowed).map(|n| row(type_k, n * k) + row(type_v, n * v)).sum()
    }

    /// Returns true if llama.cpp supports a cache of this type: its blocks must not cross heads.
    pub fn can_cache(&self, cache_type: CacheType) -> bool {
        let block = cache_type.stored().block as usize;
        [self.n_embd_head_k, self.n_embd_head_v].iter().all(|n| n.is_multiple_of(block))
    }
}
