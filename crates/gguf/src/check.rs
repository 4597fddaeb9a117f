//! Finds contradictions in a file for which llama.cpp would end the process by an assertion.
//!
//! The rules follow the assertions that a file can reach in `src/llama-vocab.cpp`, `src/llama-model.cpp`
//! (`load_hparams()`), `src/llama-model-loader.cpp` and ggml's operators. Faults that llama.cpp reports as an error are
//! not checked here.

use serde_json::Value;

use super::Tensor;
use super::entry::Kind;
use super::info::{Keys, ModelInfo};
use super::walk::Twins;

/// `LLAMA_MAX_EXPERTS` in `src/llama-hparams.h`.
const EXPERTS_MAX: u64 = 1024;
/// `LLAMA_ROPE_SCALING_TYPES` in `src/llama-model.cpp`.
const ROPE_SCALINGS: [&str; 4] = ["none", "linear", "yarn", "longrope"];
/// Architectures without rotation, regardless of the file: `llama_model_rope_type()`, and `src/models/starcoder.cpp`.
const WITHOUT_ROPE: [&str; 5] = ["gpt2", "gptj", "jais", "mpt", "starcoder"];
/// Tokenizer names of files without a vocabulary.
const NO_VOCABULARY: [&str; 2] = ["no_vocab", "none"];

/// Returns the faults of a file. Each completes "llama.cpp cannot load this model: ".
pub(super) fn faults(keys: &Keys, info: &ModelInfo, tensors: &[Tensor], twins: Option<&Twins>) -> Vec<String> {
    let rules = [
        vocabulary(info, tensors, twins),
        layers(keys),
        experts(keys, info),
        rope_scaling(info),
        rope_dimensions(keys, info, ""),
        rope_dimensions(keys, info, "_swa"),
        heads(keys),
        epsilon(keys, "attention.layer_norm_rms_epsilon"),
        epsilon(keys, "attention.layer_norm_epsilon"),
    ];
    rules.into_iter().flatten().collect()
}

fn vocabulary(info: &ModelInfo, tensors: &[Tensor], twins: Option<&Twins>) -> Option<String> {
    if let Some(Twins { text, first, second }) = twins {
        return Some(format!("its vocabulary has two entries {text:?}, the tokens {first} and {second}"));
    }
    // llama.cpp would create this many dummy tokens.
    let is_without = info.tokenizer.as_deref().is_some_and(|name| NO_VOCABULARY.contains(&name));
    let embedding = tensors.iter().find(|tensor| tensor.name == "token_embd.weight");
    let rows = embedding.and_then(|tensor| tensor.shape.get(1)).copied();
    let n_vocab = info.n_vocab.filter(|_| is_without);
    let (n_vocab, rows) = n_vocab.zip(rows).filter(|(n_vocab, rows)| n_vocab != rows)?;
    Some(format!("it counts {n_vocab} tokens and embeds {rows}"))
}

fn layers(keys: &Keys) -> Option<String> {
    let n = keys.get("block_count").and_then(Value::as_u64)?;
    (n == 0).then(|| "it counts 0 layers (block_count)".into())
}

fn experts(keys: &Keys, info: &ModelInfo) -> Option<String> {
    let n = info.n_expert.0 as u64;
    let used = info.n_expert.1 as u64;
    let number = |key| keys.get(key).and_then(Value::as_u64).unwrap_or(0);
    let (groups, groups_used) = (number("expert_group_count"), number("expert_group_used_count"));
    // These architectures treat one expert as none.
    if info.architecture.starts_with("hunyuan") && n <= 1 {
        return None;
    }
    if n > EXPERTS_MAX {
        return Some(format!("it counts {n} experts; {EXPERTS_MAX} are possible"));
    }
    if used > n || (n > 0 && used == 0) {
        return Some(format!("a token meets {used} of {n} experts (expert_used_count, expert_count)"));
    }
    let divides = groups <= 1 || (n.is_multiple_of(groups) && (1..groups).contains(&groups_used));
    if (groups > 0 && groups >= n) || !divides {
        return Some(format!("it uses {groups_used} of {groups} groups of {n} experts (expert_group_count)"));
    }
    None
}

fn rope_scaling(info: &ModelInfo) -> Option<String> {
    let name = info.rope.scaling.as_deref().filter(|name| !ROPE_SCALINGS.contains(name))?;
    Some(format!("its RoPE is scaled by {name:?} (rope.scaling.type), which is unknown"))
}

/// Checks the rotated dimensions. `layers`: the suffix of the keys for layers with a sliding window.
fn rope_dimensions(keys: &Keys, info: &ModelInfo, layers: &str) -> Option<String> {
    let number = |key: &str| keys.get(&format!("{key}{layers}")).and_then(Value::as_u64);
    let dims = number("rope.dimension_count")?;
    let head = number("attention.key_length").unwrap_or(info.n_embd_head_k as u64);
    // Some refused architectures rotate a part that does not count as a head.
    let is_rotated = info.refusal.is_none() && !WITHOUT_ROPE.contains(&&*info.architecture);
    let is_sound = dims > 0 && dims.is_multiple_of(2) && dims <= head;
    (is_rotated && !is_sound).then(|| {
        format!("it rotates {dims} of the {head} values of a head (rope.dimension_count{layers}), which must be even and not more")
    })
}

fn heads(keys: &Keys) -> Option<String> {
    let n_block = keys.get("block_count").and_then(Value::as_u64).unwrap_or(0);
    let (n_heads, n_head_kv) = keys.heads(n_block as usize).ok()?;
    let mut layers = n_heads.into_iter().zip(n_head_kv);
    let (n, kv) = layers.find(|&(n, kv)| kv > 0 && !n.is_multiple_of(kv))?;
    Some(format!("its {n} heads cannot share {kv} KV heads (attention.head_count, head_count_kv)"))
}

fn epsilon(keys: &Keys, key: &str) -> Option<String> {
    let entry = keys.own(key).filter(|entry| entry.kind == Kind::F32)?;
    // JSON cannot represent NaN.
    let value = entry.value.as_ref().and_then(Value::as_f64);
    let is_sound = value.is_some_and(|value| value >= 0.0);
    (!is_sound).then(|| format!("{} is not a positive number", entry.key))
}
