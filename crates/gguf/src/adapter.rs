//! Checks adapters before llama.cpp applies them: llama.cpp trusts the types of the metadata and some of the shapes,
//! and ends the process if they are wrong (`src/llama-adapter.cpp`).

use std::collections::HashMap;

use serde_json::Value;

use super::{Gguf, Kind, Tensor};

/// Returns the text value of `key`, or None if the key is missing.
fn text<'a>(file: &'a Gguf, key: &str) -> Result<Option<&'a str>, String> {
    let Some(entry) = file.entry(key) else { return Ok(None) };
    let value = entry.value.as_ref().and_then(Value::as_str);
    value.map(Some).ok_or_else(|| format!("its {key} is no text"))
}

/// Checks an adapter (LoRA) against `base` before llama.cpp does.
///
/// # Errors
/// Returns a message that says what is wrong with the adapter or does not fit the model.
pub fn check_adapter(adapter: &Gguf, base: &Gguf) -> Result<(), String> {
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        if text(adapter, key)? != Some(expected) {
            return Err(format!("it is no LoRA: its {key} is not {expected:?}"));
        }
    }
    let [own, of_model] = [adapter, base].map(|file| &file.info.architecture);
    if own != of_model {
        return Err(format!("it is for the architecture {own:?}, and the model is {of_model:?}"));
    }
    if adapter.entry("adapter.lora.alpha").is_some_and(|entry| entry.kind != Kind::F32 || entry.elements.is_some()) {
        return Err("its adapter.lora.alpha is no f32".into());
    }
    if adapter.entry("adapter.alora.invocation_tokens").is_some() {
        return Err("it is an activated LoRA, which wants to be turned on and off within a text".into());
    }
    check_tensors(&adapter.tensors, &base.tensors)
}

/// Types that ggml cannot multiply.
const NO_FACTORS: [&str; 5] = ["i8", "i16", "i32", "i64", "f64"];

/// The two matrices of one weight.
#[derive(Default)]
struct Pair<'a> {
    a: Option<&'a Tensor>,
    b: Option<&'a Tensor>,
}

fn check_tensors(tensors: &[Tensor], base: &[Tensor]) -> Result<(), String> {
    let mut pairs = HashMap::<&str, Pair>::new();
    for tensor in tensors {
        if let Some(name) = tensor.name.strip_suffix(".lora_a") {
            pairs.entry(name).or_default().a = Some(tensor);
        } else if let Some(name) = tensor.name.strip_suffix(".lora_b") {
            pairs.entry(name).or_default().b = Some(tensor);
        } else if !tensor.name.ends_with("_norm.weight") {
            return Err(format!("its tensor {:?} is neither a lora_a nor a lora_b", tensor.name));
        }
        if tensor.kind.is_none_or(|kind| NO_FACTORS.contains(&kind.name)) {
            return Err(format!("its tensor {:?} is of a type that cannot be multiplied", tensor.name));
        }
    }
    let base: HashMap<&str, &Tensor> = base.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    for (name, pair) in pairs {
        let (Some(a), Some(b)) = (pair.a, pair.b) else {
            return Err(format!("it has only one of the two matrices of {name:?}"));
        };
        let Some(weight) = base.get(name) else {
            return Err(format!("the model has no tensor {name:?}"));
        };
        let [a, b, w] = [a, b, weight].map(shape);
        // For the embedding, the rows of A are looked up, not multiplied: llm_build_inp_embd()
        let is_embedding = name.ends_with("token_embd.weight");
        let (ends, rank) = if is_embedding { ([b[1], a[1]], [a[0], b[0]]) } else { ([a[0], b[1]], [a[1], b[0]]) };
        let is_stacked = [a, b].iter().all(|of| of[2..] == w[2..]);
        if ends != [w[0], w[1]] || rank[0] != rank[1] || !is_stacked {
            return Err(format!("its matrices of {name:?} have other shapes than the model's"));
        }
    }
    Ok(())
}

/// Returns the shape with four dimensions, as in ggml.
fn shape(tensor: &Tensor) -> [u64; 4] {
    std::array::from_fn(|i| tensor.shape.get(i).copied().unwrap_or(1))
}
