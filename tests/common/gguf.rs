//! Handwritten model files.
#![allow(dead_code)] // each test program uses only a part of it

use std::collections::BTreeMap;

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A metadata value.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    U16(u16),
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(&'a str),
    Array(&'a [u32]),
    Texts(&'a [&'a str]),
}
use Value::*;

impl Value<'_> {
    pub fn encode(&self) -> Vec<u8> {
        let kind = |kind: u32, bytes: &[u8]| [&kind.to_le_bytes()[..], bytes].concat();
        let array = |of: u32, n: usize, items: &[u8]| {
            kind(9, &[&of.to_le_bytes()[..], &(n as u64).to_le_bytes(), items].concat())
        };
        match self {
            U16(n) => kind(2, &n.to_le_bytes()),
            U32(n) => kind(4, &n.to_le_bytes()),
            I32(n) => kind(5, &n.to_le_bytes()),
            U64(n) => kind(10, &n.to_le_bytes()),
            F32(x) => kind(6, &x.to_le_bytes()),
            Bool(b) => kind(7, &[u8::from(*b)]),
            Text(text) => kind(8, &string(text)),
            Array(values) => {
                let items: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                array(4, values.len(), &items)
            }
            Texts(values) => {
                let items: Vec<u8> = values.iter().flat_map(|v| string(v)).collect();
                array(8, values.len(), &items)
            }
        }
    }
}

/// A tensor: name, shape, number of its ggml type, its data, and the offset of its data. None: directly after the previous tensor.
#[derive(Clone)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub shape: &'a [u64],
    pub kind: u32,
    pub bytes: u64,
    pub offset: Option<u64>,
}

pub fn tensor<'a>(name: &'a str, shape: &'a [u64], kind: u32, bytes: u64) -> Tensor<'a> {
    Tensor { name, shape, kind, bytes, offset: None }
}

/// Returns a file up to the start of the data, and the size of the file with data.
pub fn head(entries: &[(&str, Value)], tensors: &[Tensor]) -> (Vec<u8>, u64) {
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend([tensors.len() as u64, entries.len() as u64].map(u64::to_le_bytes).concat());
    for (key, value) in entries {
        file.extend(string(key));
        file.extend(value.encode());
    }
    let mut end = 0_u64;
    for tensor in tensors {
        file.extend(string(tensor.name));
        file.extend((tensor.shape.len() as u32).to_le_bytes());
        file.extend(tensor.shape.iter().flat_map(|dim| dim.to_le_bytes()));
        let offset = tensor.offset.unwrap_or(end.next_multiple_of(32));
        file.extend([&tensor.kind.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        end = offset.saturating_add(tensor.bytes);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    let size = (file.len() as u64).saturating_add(end);
    (file, size)
}

/// Returns a model file with additional metadata before its own.
pub fn with_entries(file: &[u8], entries: &[(&str, Value)]) -> Vec<u8> {
    const COUNT: std::ops::Range<usize> = 16..24;
    let entry = |key: &str, value: Value| [string(key), value.encode()].concat();
    let mut added: Vec<u8> = entries.iter().flat_map(|(key, value)| entry(key, *value)).collect();
    // keep the data aligned
    let filled = |n: usize| entry("filler", Text(&" ".repeat(n)));
    let n = (0..32).find(|&n| (added.len() + filled(n).len()).is_multiple_of(32)).unwrap();
    added.extend(filled(n));
    let count = u64::from_le_bytes(file[COUNT].try_into().unwrap()) + entries.len() as u64 + 1;
    [&file[..COUNT.start], &count.to_le_bytes(), &added, &file[COUNT.end..]].concat()
}

/// Returns a file with a tensor of this ggml type and 256 values, and room for its data.
pub fn handwritten(entries: &[(&str, Value)], ggml_type: u32) -> Vec<u8> {
    let (mut file, _) = head(entries, &[tensor("output.weight", &[256], ggml_type, 0)]);
    file.resize(file.len() + 2048, 0);
    file
}

/// Returns the metadata of a decoder with 4 layers, 4 heads, 2 KV heads of 32 values. A key of `extra` that begins with a dot belongs to
/// the architecture; it replaces a default entry of the same name.
pub fn decoder<'a>(name: &'a str, extra: &[(&'a str, Value<'a>)]) -> Vec<(String, Value<'a>)> {
    let shape = [
        ("general.architecture", Text(name)),
        (".block_count", U32(4)),
        (".embedding_length", U32(128)),
        (".attention.head_count", U32(4)),
        (".attention.head_count_kv", U32(2)),
    ];
    let mut entries = BTreeMap::new();
    for (key, value) in shape.iter().chain(extra) {
        let owner = if key.starts_with('.') { name } else { "" };
        entries.insert(format!("{owner}{key}"), *value);
    }
    entries.into_iter().collect()
}

pub fn borrowed<'a>(entries: &'a [(String, Value<'a>)]) -> Vec<(&'a str, Value<'a>)> {
    entries.iter().map(|(key, value)| (key.as_str(), *value)).collect()
}

fn whole(name: &str, extra: &[(&str, Value)], tensors: &[Tensor]) -> Vec<u8> {
    let entries = decoder(name, extra);
    let (mut file, size) = head(&borrowed(&entries), tensors);
    file.resize(size as usize, 0);
    file
}

/// Returns small files with every kind of content, to be changed at random.
pub fn seeds() -> Vec<Vec<u8>> {
    let words: Vec<String> = (0..600).map(|i| format!("w{i}")).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let rich = [
        ("general.alignment", U32(32)),
        ("general.file_type", U32(15)),
        ("general.name", Text("gr\u{fc}n")),
        (".attention.head_count_kv", Array(&[0, 1, 2, 2])),
        (".attention.sliding_window", U32(128)),
        (".attention.sliding_window_pattern", Array(&[1, 0, 1, 0])),
        (".context_length", U64(8192)),
        (".rope.freq_base", F32(1e6)),
        (".attention.causal", Bool(true)),
        ("tokenizer.chat_template", Text("{{ messages }}<|im_start|>")),
        ("tokenizer.ggml.tokens", Texts(&words)),
        ("tokenizer.ggml.token_type", Array(&[1; 600])),
    ];
    let split = [("split.no", U16(0)), ("split.count", U16(2)), ("split.tensors.count", U32(2))];
    let plain = [tensor("output.weight", &[256, 2], 12, 288), tensor("blk.0.attn_norm.weight", &[8], 0, 32)];
    let strange = [tensor("a", &[64], 39, 34), tensor("b", &[7, 7], 77, 64), tensor("c", &[128], 40, 72)];
    vec![
        whole("llama", &[], &plain),
        whole("gemma3", &rich, &plain),
        whole("gpt-oss", &[], &strange),
        whole("qwen2", &split, &plain),
    ]
}
