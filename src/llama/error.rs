#![forbid(unsafe_code)]

use std::path::PathBuf;

/// Errors of llama.cpp and its wrappers: one readable line each, with a remedy.
#[derive(Debug, thiserror::Error)]
pub enum LlamaError {
    #[error("{path}: llama.cpp cannot load this model{reason}; gvote inspect tells what the file holds")]
    Load { path: PathBuf, reason: String },
    #[error("{path}: this adapter does not fit the model: {reason}")]
    Adapter { path: PathBuf, reason: String },
    #[error("there is no device {name:?} to put layers on; there are: {known}")]
    Device { name: String, known: String },
    #[error("there is no buffer type {name:?}; there are: {known}")]
    Buffer { name: String, known: String },
    #[error("shares of devices are at most {most} numbers from 0 up")]
    TensorSplit { most: usize },
    #[error("the CPU has no threads with a priority or a polling level of their own here")]
    Threads,
    #[error("tensors can be split over GPUs and workers only, and there are none")]
    SplitMode,
    #[error(
        "RoPE would stretch the context past 2,147,483,647 tokens: lower `rope_scale` or `yarn_orig_ctx`, or raise `rope_freq_scale`"
    )]
    Rope,
    #[error("the path {0:?} holds a NUL byte")]
    PathNul(PathBuf),
    #[error(
        "llama.cpp cannot create a context{reason}; lower `n_ctx` or `n_ubatch`, or take other types with `type_k` and `type_v` (see gvote plan)"
    )]
    Context { reason: String },
    #[error(
        "no room in the KV cache: the batch needs {needed} cells, {free} of {size} are free; raise `n_ctx`, or compress more (`target_kl`, `max_cells`)"
    )]
    NoCells { needed: usize, free: usize, size: usize },
    #[error(
        "position {pos} lies past the end of this model's table of {n} positions: shorten the prompt, or lower `n_predict` (a vote needs some positions behind the text)"
    )]
    NoPositions { pos: i32, n: usize },
    #[error(
        "llama.cpp could not decode the batch (status {0}): its log (`verbose`) says why; a lower `n_ubatch` takes less memory"
    )]
    Decode(i32),
    #[error("out of memory: lower `n_ctx` or `n_ubatch`")]
    Memory,
    #[error("cancelled")]
    Cancelled,
    #[error(
        "the text could not be tokenized: this model has no tokenizer of its own, or it fails, or the text is too long"
    )]
    Tokenize,
    #[error("the batch is full: it holds {0} tokens")]
    BatchFull(usize),
    #[error("there is no sequence {seq}: the context was made for {n_seq_max} (n_seq_max)")]
    NoSequence { seq: i32, n_seq_max: usize },
    #[error(
        "the model computes logits that are no numbers (NaN): its file or a loaded session is damaged, or a setting does not suit it, such as `type_k`, `type_v`, `rope_freq_base`, `yarn_attn_factor`, `lora_scaled` or `override_kv`"
    )]
    NotANumber,
    #[error("there are no logits to sample from: decode a batch that asks for them first")]
    NoLogits,
    #[error("the grammar cannot be used: {0}")]
    Grammar(String),
    #[error("there is no token {token}: this model's are 0 to {}", n.saturating_sub(1))]
    NoSuchToken { token: i32, n: usize },
    #[error("no token can be drawn: {0}")]
    Sampling(String),
    #[error(
        "unknown sampler {0:?}: use some of penalties, dry, top_n_sigma, top_k, typ_p, top_p, min_p, xtc, temperature, adaptive_p"
    )]
    SamplerKind(String),
    #[error("the saved state does not fit this context{0}")]
    State(&'static str),
    #[error("unknown cache type {0:?}: use one of f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1")]
    CacheType(String),
    #[error("a quantized V cache (`type_v` {0}) needs flash attention: drop `flash_attn` off, or use `type_v` f16")]
    QuantizedV(&'static str),
}
