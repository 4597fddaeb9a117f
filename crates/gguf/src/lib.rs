//! Reads the description in a model file without loading the model: its shape, the bytes of a KV cell, whether gvote
//! supports the model.
//!
//! The crate `gguf-rs` parses the metadata, but never straight from the file. gguf-rs 0.1.8 trusts its input:
//! - It allocates a string's length (up to 1 GiB) before checking that the file is that long.
//! - It keeps about 60 bytes for each byte of a long array, and truncates a tokenizer's arrays silently.
//! - It reads without a buffer.
//! - It panics on a tensor of type 40 and rejects the types above (NVFP4, Q1_0, Q2_0, F8_E4M3 of the pinned llama.cpp),
//!   and assumes a block size of 256 for every type past 9.
//! - It detects neither a truncated file nor a duplicate key.
//!
//! So a bounded walk checks the structure and passes gguf-rs one value at a time, limited to the part worth keeping,
//! under a header that announces no tensors. This crate reads and checks tensors itself, with ggml's own sizes. It also
//! names the file types itself, because gguf-rs' names differ from those of `llama_ftype`, and asking for one panics on
//! a negative number.
//!
//! The format: `ggml/include/gguf.h`. The checks follow `ggml/src/gguf.cpp`; the keys and defaults follow
//! `src/llama-arch.cpp`, `src/llama-model.cpp` and `src/models/*.cpp` of the pinned llama.cpp.

#![forbid(unsafe_code)]

mod adapter;
mod check;
mod entry;
mod info;
mod split;
mod support;
mod walk;
mod window;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use self::adapter::check_adapter;
pub use self::entry::{Entry, Kind};
pub use self::info::{ModelInfo, Rope};
pub use self::support::Support;
use self::walk::{Fault, Found, Walk};
use gvote::llama::{KvOverride, TensorType};

/// Why a file cannot be read. One line each: the path, the fault and its place, and a remedy.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("{path}: there is no such file: check the path")]
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
    #[error(
        "{path}: the file ends inside its own header, after {size} bytes: more was promised at byte {offset}: download it again"
    )]
    TruncatedHeader { path: PathBuf, size: u64, offset: u64 },
    #[error("{path}: the file is cut short: it should have {needed} bytes and has {size}: download it again")]
    TruncatedData { path: PathBuf, needed: u64, size: u64 },
    #[error("{path}: the file is damaged at byte {offset}: {what}: download it again, or convert it anew")]
    Malformed { path: PathBuf, offset: u64, what: String },
    #[error("{path}: llama.cpp cannot load this model: {what}: get another file of it, or convert it anew")]
    Unloadable { path: PathBuf, what: String },
    #[error("{path}: this is part {part} of {count} of a model: give the first part, {first}")]
    NotFirstPart { path: PathBuf, part: u64, count: u64, first: PathBuf },
    #[error("{path}: part {part} of {count} of the model is missing: put it beside the first")]
    MissingPart { path: PathBuf, part: u64, count: u64 },
    #[error("{path}: the model is split into {count} files, and llama.cpp finds them by name: call this one {should}")]
    PartName { path: PathBuf, count: u64, should: String },
}

/// Description of a tensor in a model file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    /// Dimensions, innermost first.
    pub shape: Vec<u64>,
    /// Number of values.
    pub values: u64,
    /// Number of the type (`ggml_type`).
    pub number: u32,
    /// The type; None if this llama.cpp does not know it.
    pub kind: Option<TensorType>,
    /// Start of the data, in bytes from the start of the file.
    pub offset: u64,
    /// Size of the data in bytes; None for an unknown type.
    pub bytes: Option<u64>,
    /// Index into [`Gguf::parts`] of the file with this tensor.
    pub part: usize,
}

impl Tensor {
    /// Returns the type's name in capitals, as in file names, such as `Q4_K`.
    pub fn type_name(&self) -> String {
        self.kind.map_or_else(|| format!("type {}", self.number), |kind| kind.name.to_uppercase())
    }
}

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
}

/// Contents of a model's files without the weights.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// Version of the format.
    pub version: u32,
    /// Alignment of tensor data, in bytes.
    pub alignment: u64,
    pub parts: Vec<Part>,
    /// The metadata; for a split model, that of the first file.
    pub entries: Vec<Entry>,
    pub tensors: Vec<Tensor>,
    pub info: ModelInfo,
    /// Faults for which llama.cpp would end the process. Each completes "llama.cpp cannot load this model: ".
    pub faults: Vec<String>,
}

/// Totals of the tensors of one type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeShare {
    /// Name, as in [`Tensor::type_name`].
    pub name: String,
    pub tensors: usize,
    pub values: u64,
    /// Size in bytes; None for a type that this llama.cpp does not know.
    pub bytes: Option<u64>,
}

/// Reads the description of the model in the file at `path`: see [`Gguf::open`].
///
/// # Errors
/// See [`GgufError`].
pub fn read(path: &Path) -> Result<ModelInfo, GgufError> {
    Gguf::open(path).map(|file| file.info)
}

impl Gguf {
    /// Reads the description in the file at `path`, and in the other parts of a split model beside it. Checks that all
    /// of the tensor data is present, except for the size of tensors of an unknown type.
    ///
    /// # Errors
    /// See [`GgufError`]. Time and memory are bounded, whatever sizes a damaged file announces.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        Self::open_with(path, &[])
    }

    /// Works like [`Self::open`], with metadata values overridden as in llama.cpp.
    ///
    /// # Errors
    /// See [`GgufError`].
    pub fn open_with(path: &Path, overrides: &[KvOverride]) -> Result<Self, GgufError> {
        let (file, size) = open_file(path)?;
        let mut first = OneFile::parse(path, file, size)?;
        overrides.iter().for_each(|one| entry::replace(&mut first.found.entries, one));
        split::join(path, first)
    }

    /// Works like [`Self::open`] for the bytes of a file, `size` in number. The other parts of a split model are
    /// expected beside `path`.
    ///
    /// # Errors
    /// See [`GgufError`].
    pub fn parse(path: &Path, source: impl Read + Seek, size: u64) -> Result<Self, GgufError> {
        split::join(path, OneFile::parse(path, source, size)?)
    }

    /// Returns an error for contradictions in the file for which llama.cpp would end the process.
    ///
    /// # Errors
    /// [`GgufError::Unloadable`] with the first of [`Self::faults`].
    pub fn check(&self) -> Result<(), GgufError> {
        match self.faults.first() {
            None => Ok(()),
            Some(what) => Err(GgufError::Unloadable { path: self.parts[0].path.clone(), what: what.clone() }),
        }
    }

    /// Returns the metadata entry of that name.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// Returns a value from the metadata, however long; None if the file has no such key.
    ///
    /// # Errors
    /// [`GgufError::Read`] for a value too long to print, or if the file has changed.
    pub fn value(&self, key: &str) -> Result<Option<Value>, GgufError> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        if let Some(value) = entry.value.clone().filter(|_| entry.is_whole()) {
            return Ok(Some(value));
        }
        let path = &self.parts[0].path;
        let (file, size) = open_file(path)?;
        let found = Walk::new(file, size).whole_value(self.version, entry.offset);
        match found.map_err(|fault| GgufError::of(fault, path, size))? {
            Some(value) => Ok(Some(value)),
            None => {
                let source = io::Error::other(format!("the value of {key} is too long"));
                Err(GgufError::Read { path: path.clone(), source })
            }
        }
    }

    /// Number of values in all tensors.
    pub fn n_params(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.values).fold(0, u64::saturating_add)
    }

    /// Size of all tensors of known types, in bytes.
    pub fn n_bytes(&self) -> u64 {
        self.tensors.iter().filter_map(|tensor| tensor.bytes).fold(0, u64::saturating_add)
    }

    /// Size of all files, in bytes.
    pub fn file_size(&self) -> u64 {
        self.parts.iter().map(|part| part.size).sum()
    }

    /// Returns the types of the tensors, by descending size in bytes.
    pub fn by_type(&self) -> Vec<TypeShare> {
        let mut shares = BTreeMap::<u32, TypeShare>::new();
        for tensor in &self.tensors {
            let share = shares.entry(tensor.number).or_insert_with(|| TypeShare {
                name: tensor.type_name(),
                tensors: 0,
                values: 0,
                bytes: tensor.kind.map(|_| 0),
            });
            share.tensors += 1;
            share.values = share.values.saturating_add(tensor.values);
            share.bytes = share.bytes.zip(tensor.bytes).map(|(sum, bytes)| sum.saturating_add(bytes));
        }
        let mut shares: Vec<_> = shares.into_values().collect();
        shares.sort_by_key(|share| std::cmp::Reverse(share.bytes));
        shares
    }
}

impl GgufError {
    fn of(fault: Fault, path: &Path, size: u64) -> Self {
        let path = path.to_owned();
        match fault {
            Fault::Io(source) if source.kind() == io::ErrorKind::NotFound => Self::NotFound { path },
            // The file shrank while being read.
            Fault::Io(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
                Self::TruncatedHeader { path, size, offset: size }
            }
            Fault::Io(source) => Self::Read { path, source },
            Fault::End { at } => Self::TruncatedHeader { path, size, offset: at },
            Fault::Bad { at, what } => Self::Malformed { path, offset: at, what },
        }
    }
}

fn open_file(path: &Path) -> Result<(File, u64), GgufError> {
    let fault = |e: io::Error| GgufError::of(e.into(), path, 0);
    let meta = fs::metadata(path).map_err(fault)?;
    let path_buf = || path.to_owned();
    match meta.len() {
        _ if meta.is_dir() => Err(GgufError::Folder { path: path_buf() }),
        // Opening a pipe would block until a writer appears.
        _ if !meta.is_file() => Err(GgufError::NotAFile { path: path_buf() }),
        size => Ok((File::open(path).map_err(fault)?, size)),
    }
}

/// Contents of one file.
struct OneFile {
    version: u32,
    size: u64,
    found: Found,
}

impl OneFile {
    fn parse(path: &Path, source: impl Read + Seek, size: u64) -> Result<Self, GgufError> {
        let owned = || path.to_owned();
        let fault = |fault| GgufError::of(fault, path, size);
        if size == 0 {
            return Err(GgufError::Empty { path: owned() });
        }
        let mut walk = Walk::new(source, size);
        let hint = match &walk.take().map_err(fault)? {
            b"GGUF" => None,
            b"FUGG" => return Err(GgufError::BigEndian { path: owned() }),
            b"vers" => Some("it looks like a Git LFS pointer: fetch the file itself (git lfs pull)"),
            b"lmgg" | b"fmgg" | b"tjgg" => Some("it has the old GGML format: get a GGUF of the model"),
            [b'<', ..] => Some("it looks like a web page: download the file itself"),
            _ => Some("check the path, or convert the model (convert_hf_to_gguf.py)"),
        };
        if let Some(hint) = hint {
            return Err(GgufError::NotGguf { path: owned(), hint });
        }
        let version = walk.u32().map_err(fault)?;
        match version {
            2 | 3 => {}
            // A small number in the other byte order has zeros in the low half.
            v if v != 0 && v & 0xffff == 0 => return Err(GgufError::BigEndian { path: owned() }),
            _ => return Err(GgufError::Version { path: owned(), version }),
        }
        match walk.rest(version).map_err(fault)? {
            found if found.needed > size => Err(GgufError::TruncatedData { path: owned(), needed: found.needed, size }),
            found => Ok(Self { version, size, found }),
        }
    }

    fn entry(&self, key: &str) -> Option<&Entry> {
        self.found.entries.iter().find(|entry| entry.key == key)
    }
}
