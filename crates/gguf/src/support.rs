//! How much of a model gvote can compress, judged by its metadata.

use serde_json::Value;

use super::Tensor;
use super::info::{Keys, ModelInfo};

/// How much of a model gvote can compress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Support {
    /// Everything: every layer keeps the whole context, and all of the cache is compressed.
    Composite,
    /// A part: some layers use a sliding window. The cache of the others is compressed; the window's cache is already
    /// small.
    BaseOnly,
    /// Nothing. The reason completes "this model is not supported: ".
    Refused(String),
}

/// Reasons for refusal, with the names of the refused architectures. From `llm_arch_is_recurrent()`,
/// `llm_arch_is_hybrid()`, `llm_arch_is_diffusion()`, `llama_model_has_encoder()`, `llama_model::create_memory()`, and
/// `f_max_alibi_bias` in `src/models`.
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
const SINKS: &str = "its attention has learned sinks, which a vote does not see";
const MLA: &str = "it uses multi-head latent attention: its cache has no V";

pub(super) fn refusal(keys: &Keys, info: &ModelInfo, tensors: &[Tensor], is_uneven: bool) -> Option<&'static str> {
    let name = keys.architecture;
    if let Some(row) = REFUSED.iter().find(|row| row.1.contains(&name)) {
        return Some(row.0);
    }
    let positive = |key| keys.get(key).and_then(Value::as_f64).is_some_and(|n| n > 0.0);
    let is_model = keys.general("general.type").is_none_or(|kind| kind == "model");
    // models/baichuan.cpp: the 13B, with 40 layers, has no RoPE.
    let alibi = positive("attention.max_alibi_bias") || (name == "baichuan" && info.n_layer == 40);
    let causal = keys.get("attention.causal").and_then(Value::as_bool).unwrap_or(true);
    match (info.cached(false).count(), info.cached(true).count()) {
        _ if !is_model => Some("it is an adapter or a side file: give the text model's file"),
        _ if positive("attention.key_length_mla") => Some(MLA),
        _ if alibi => Some(ALIBI),
        _ if !causal => Some("its attention looks ahead: it reads text and cannot write any"),
        _ if tensors.is_empty() => Some("the file holds no weights"),
        (0, 0) => Some("its metadata names no layer with an attention cache"),
        (0, _) => Some("every layer uses a sliding window"),
        // `capture` and `session` would detect this too late.
        _ if tensors.iter().any(|tensor| tensor.name.contains(".attn_sinks")) => Some(SINKS),
        _ if is_uneven => Some("its layers differ in their number of heads, which is not supported yet"),
        _ => None,
    }
}

impl ModelInfo {
    /// Returns how much of this model gvote can compress, judged by its metadata. llama.cpp makes the final decision
    /// when the model is loaded ([`gvote::llama::Model::unsupported`] and the shim): this function does not refuse
    /// unknown architectures.
    pub fn support(&self) -> Support {
        match self.refusal {
            Some(reason) => Support::Refused(reason.into()),
            None if self.sliding_window.is_some() => Support::BaseOnly,
            None => Support::Composite,
        }
    }
}
