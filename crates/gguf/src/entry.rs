//! Metadata entries, with values parsed by gguf-rs.

use std::io::Cursor;

use serde_json::{Number, Value};

use super::walk::HEAD_MAX;
use gvote::llama::{KvOverride, KvValue};

/// Value types: `gguf_type` in `ggml/include/gguf.h`, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [(Self, &'static str, Option<u64>); 13] = [
        (Self::U8, "u8", Some(1)),
        (Self::I8, "i8", Some(1)),
        (Self::U16, "u16", Some(2)),
        (Self::I16, "i16", Some(2)),
        (Self::U32, "u32", Some(4)),
        (Self::I32, "i32", Some(4)),
        (Self::F32, "f32", Some(4)),
        (Self::Bool, "bool", Some(1)),
        (Self::String, "string", None),
        (Self::Array, "array", None),
        (Self::U64, "u64", Some(8)),
        (Self::I64, "i64", Some(8)),
        (Self::F64, "f64", Some(8)),
    ];

    pub(super) fn of(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).map(|row| row.0)
    }

    /// Returns one representative for all kinds that llama.cpp treats alike.
    fn class(self) -> Self {
        match self {
            Self::U8 | Self::I8 | Self::U16 | Self::I16 | Self::U32 | Self::I32 | Self::U64 => Self::I64,
            Self::F32 => Self::F64,
            other => other,
        }
    }

    /// Returns the name of the type in Rust.
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// Returns the size of one value in bytes; None for strings and arrays, whose sizes vary.
    pub(super) fn size(self) -> Option<u64> {
        Self::ALL[self as usize].2
    }
}

/// A metadata entry of a model file.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The key, such as `general.architecture`.
    pub key: String,
    /// Start of the entry, in bytes from the start of the file.
    pub offset: u64,
    /// Type of the value; for an array, the type of its elements.
    pub kind: Kind,
    /// Number of elements of an array; None for other values.
    pub elements: Option<u64>,
    /// The value. For an array at most the first 512 elements; None for a string longer than 1 MiB. See
    /// [`super::Gguf::value`].
    pub value: Option<Value>,
}

/// Overrides a value of the file, or adds the value. As in llama.cpp, a value of another type is ignored.
pub(super) fn replace(entries: &mut Vec<Entry>, KvOverride { key, value }: &KvOverride) {
    let (kind, value) = match value {
        KvValue::Int(n) => (Kind::I64, Value::from(*n)),
        KvValue::Float(x) => (Kind::F64, Value::from(*x)),
        KvValue::Bool(b) => (Kind::Bool, Value::from(*b)),
        KvValue::Str(text) => (Kind::String, Value::from(text.as_str())),
    };
    match entries.iter_mut().find(|entry| entry.key == *key) {
        None => entries.push(Entry { key: key.clone(), offset: 0, kind, elements: None, value: Some(value) }),
        Some(entry) if entry.elements.is_none() && entry.kind.class() == kind.class() => entry.value = Some(value),
        Some(_) => {}
    }
}

impl Entry {
    pub(super) fn as_u64(&self) -> Option<u64> {
        self.value.as_ref()?.as_u64()
    }

    /// Returns true if [`Self::value`] is complete.
    pub fn is_whole(&self) -> bool {
        match (&self.value, self.elements) {
            (Some(Value::Array(values)), Some(n)) => values.len() as u64 == n,
            (value, _) => value.is_some(),
        }
    }

    /// Returns the type as text, such as `u32` or `string[49152]`.
    pub fn type_name(&self) -> String {
        self.elements.map_or_else(|| self.kind.name().into(), |n| format!("{}[{n}]", self.kind.name()))
    }
}

/// Parses the value in `data`, or the first `array` elements of it.
pub(super) fn parse(version: u32, kind: Kind, array: Option<u64>, data: Vec<u8>) -> Result<Value, String> {
    /// A placeholder key, because gguf-rs requires one.
    const KEY: &str = "value";
    let data = if kind == Kind::String { utf8(&data).ok_or("a string ends behind its value")? } else { data };
    let mut body = (KEY.len() as u64).to_le_bytes().to_vec();
    body.extend(KEY.as_bytes());
    if let Some(n) = array {
        body.extend((Kind::Array as u32).to_le_bytes());
        body.extend((kind as u32).to_le_bytes());
        body.extend(n.to_le_bytes());
    } else {
        body.extend((kind as u32).to_le_bytes());
    }
    body.extend(data);
    // The cap applies to arrays of the tokenizer, which gguf-rs would otherwise truncate silently.
    let cap = array.unwrap_or(HEAD_MAX);
    let counts = [0, 1].map(u64::to_le_bytes).concat(); // numbers of tensors and entries
    let stream = [&version.to_le_bytes()[..], &counts, &body].concat();
    let decoded = gguf_rs::GGUFContainer::new(gguf_rs::ByteOrder::LE, Box::new(Cursor::new(stream)), cap).decode();
    let model = decoded.map_err(|error| format!("a value cannot be parsed ({error})"))?;
    let value = model.metadata().get(KEY).cloned().unwrap_or_default();
    Ok(if kind == Kind::F32 { shortest(value) } else { value })
}

/// Replaces invalid UTF-8 in length-prefixed strings by U+FFFD: llama.cpp accepts such bytes, and gguf-rs rejects them.
fn utf8(mut data: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(data.len());
    while let Some((len, rest)) = data.split_first_chunk() {
        let (text, rest) = rest.split_at_checked(u64::from_le_bytes(*len) as usize)?;
        let text = String::from_utf8_lossy(text);
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
        data = rest;
    }
    Some(out)
}

/// Rounds to the shortest decimal. gguf-rs widens a 32-bit float bit by bit, which makes 1e-5 into
/// 9.999999747378752e-6.
fn shortest(value: Value) -> Value {
    match value {
        Value::Array(values) => values.into_iter().map(shortest).collect(),
        Value::Number(n) => {
            let wide = n.as_f64().and_then(|x| (x as f32).to_string().parse().ok());
            wide.and_then(Number::from_f64).map_or(Value::Null, Value::Number)
        }
        other => other,
    }
}
