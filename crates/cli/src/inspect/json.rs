//! The description of a model file as JSON.

use std::collections::BTreeMap;

use gvote::llama::{CacheType, ContextParams};
use gvote_gguf::{Entry, Gguf, Support, Tensor};
use serde::Serialize;
use serde_json::{Map, Value, json};

#[derive(Serialize)]
pub struct Report {
    files: Vec<Value>,
    gguf_version: u32,
    alignment: u64,
    architecture: String,
    name: Option<String>,
    license: Option<String>,
    file_type: Option<&'static str>,
    n_params: u64,
    n_tensors: usize,
    /// Bytes of all tensors with a known type.
    n_bytes: u64,
    types: Vec<Value>,
    n_ctx_train: usize,
    n_layer: usize,
    n_embd: usize,
    n_head: usize,
    n_head_kv: Vec<usize>,
    n_embd_head_k: usize,
    n_embd_head_v: usize,
    n_expert: usize,
    n_expert_used: usize,
    rope: Value,
    sliding_window: Option<usize>,
    windowed_layers: Vec<usize>,
    tokenizer: Option<String>,
    n_vocab: Option<u64>,
    chat_template: Option<String>,
    /// For layers that keep the whole context. Types that llama.cpp refuses for this head size are left out.
    kv_bytes_per_cell: BTreeMap<&'static str, usize>,
    kv_bytes_per_window_cell: BTreeMap<&'static str, usize>,
    /// For layers with a sliding window, in a context as long as the training context.
    window_cells: usize,
    /// composite, base-only or refused
    support: &'static str,
    refused: Option<String>,
    /// Reasons why llama.cpp cannot load the file.
    faults: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Map<String, Value>>,
}

impl Report {
    pub fn new(file: &Gguf, tensors: bool, metadata: bool) -> Self {
        let info = &file.info;
        let (support, refused) = match info.support() {
            Support::Composite => ("composite", None),
            Support::BaseOnly => ("base-only", None),
            Support::Refused(reason) => ("refused", Some(reason)),
        };
        let per_type = |bytes: fn(&gvote_gguf::ModelInfo, CacheType) -> usize| {
            let types = CacheType::all().filter(|&t| info.can_cache(t));
            types.map(|t| (t.name(), bytes(info, t))).collect()
        };
        let whole = file.n_bytes().max(1) as f64;
        let types = file.by_type().into_iter().map(|t| {
            let share = t.bytes.map(|bytes| bytes as f64 / whole);
            json!({"type": t.name, "tensors": t.tensors, "params": t.values, "bytes": t.bytes, "share": share})
        });
        let rope = &info.rope;
        Self {
            files: file
                .parts
                .iter()
                .map(|part| json!({"path": part.path.to_string_lossy(), "size": part.size}))
                .collect(),
            gguf_version: file.version,
            alignment: file.alignment,
            architecture: info.architecture.clone(),
            name: info.name.clone(),
            license: info.license.clone(),
            file_type: info.quantization,
            n_params: file.n_params(),
            n_tensors: file.tensors.len(),
            n_bytes: file.n_bytes(),
            types: types.collect(),
            n_ctx_train: info.n_ctx_train,
            n_layer: info.n_layer,
            n_embd: info.n_embd,
            n_head: info.n_head,
            n_head_kv: info.n_head_kv.clone(),
            n_embd_head_k: info.n_embd_head_k,
            n_embd_head_v: info.n_embd_head_v,
            n_expert: info.n_expert.0,
            n_expert_used: info.n_expert.1,
            rope: json!({"dims": rope.dims, "base": rope.base, "scaling": rope.scaling, "factor": rope.factor,
                         "original_context": rope.original_context}),
            sliding_window: info.sliding_window,
            windowed_layers: (0..info.windowed.len()).filter(|&il| info.windowed[il]).collect(),
            tokenizer: info.tokenizer.clone(),
            n_vocab: info.n_vocab,
            chat_template: info.chat_template.clone(),
            kv_bytes_per_cell: per_type(|info, t| info.kv_bytes_per_cell(t, t)),
            kv_bytes_per_window_cell: per_type(|info, t| info.kv_bytes_per_window_cell(t, t)),
            window_cells: info.window_cells(info.n_ctx_train, ContextParams::default().n_ubatch as usize),
            support,
            refused,
            faults: file.faults.clone(),
            tensors: tensors.then(|| file.tensors.iter().map(tensor).collect()),
            metadata: metadata.then(|| file.entries.iter().map(entry).collect()),
        }
    }
}

fn tensor(t: &Tensor) -> Value {
    json!({"name": t.name, "type": t.type_name(), "shape": t.shape, "bytes": t.bytes, "offset": t.offset, "file": t.part})
}

/// Describes a metadata entry. `elements`: number of elements of an array; `value` holds the first 512.
fn entry(entry: &Entry) -> (String, Value) {
    let value =
        json!({"type": entry.kind.name(), "elements": entry.elements, "offset": entry.offset, "value": entry.value});
    (entry.key.clone(), value)
}
