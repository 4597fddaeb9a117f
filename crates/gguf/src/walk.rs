//! A bounded reader for one file that verifies every announced size.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufReader, Read, Seek};

use serde_json::Value;

use super::Tensor;
use super::entry::{Entry, Kind, parse};
use gvote::llama::TensorType;

/// Maximum number of metadata entries. Real files have 20 to 60.
const ENTRIES_MAX: u64 = 1 << 12;
/// Maximum number of tensors. Real files have up to a few thousand.
const TENSORS_MAX: u64 = 1 << 17;
/// Longest key in bytes: the format's own limit.
const KEY_MAX: u64 = (1 << 16) - 1;
/// Longest string in bytes, and longest array of numbers: `GGUF_MAX_STRING_LENGTH`, `GGUF_MAX_ARRAY_ELEMENTS`.
const STRING_MAX: u64 = 1 << 30;
/// Maximum number of strings in all arrays of a file, which are read one by one. The largest vocabularies have 2^18,
/// and as many merges.
const STRINGS_MAX: u64 = 1 << 24;
/// `GGML_MAX_NAME`: bytes of a name with the final NUL.
const TENSOR_NAME_MAX: u64 = 64;
/// `GGML_MAX_DIMS`.
const DIMS_MAX: u32 = 4;
/// Number of array elements that are kept: enough for arrays with one element for each layer (`LLAMA_MAX_LAYERS`).
pub(super) const HEAD_MAX: u64 = 512;
/// Largest value that is kept, and largest total of values and keys, in bytes. Chat templates have up to 100 KB.
const VALUE_MAX: u64 = 1 << 20;
const KEPT_MAX: u64 = 1 << 24;
/// Limits for one value requested by its key: elements and bytes.
const WHOLE_ELEMENTS_MAX: u64 = 1 << 20;
const WHOLE_MAX: u64 = 1 << 26;
/// Alignment of tensor data without `general.alignment`, in bytes.
const DEFAULT_ALIGNMENT: u64 = 32;
const ALIGNMENT: &str = "general.alignment";
/// The texts of the vocabulary.
const TOKENS: &str = "tokenizer.ggml.tokens";
/// Bytes before the first element of an array: the array type, the element type, the number of elements.
const ARRAY_HEAD: u64 = 4 + 4 + 8;

/// Why reading stopped. Offsets are bytes from the start of the file.
#[derive(Debug)]
pub(super) enum Fault {
    Io(io::Error),
    /// The file ends before the data expected at this offset.
    End {
        at: u64,
    },
    Bad {
        at: u64,
        what: String,
    },
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

pub(super) fn bad(at: u64, what: impl Into<String>) -> Fault {
    Fault::Bad { at, what: what.into() }
}

/// Contents of a file after the version.
pub(super) struct Found {
    pub alignment: u64,
    pub entries: Vec<Entry>,
    pub tensors: Vec<Tensor>,
    pub twins: Option<Twins>,
    /// Expected size of the file, in bytes.
    pub needed: u64,
}

/// Two tokens with the same text.
pub(super) struct Twins {
    pub text: String,
    pub first: u64,
    pub second: u64,
}

/// Location of a value.
struct Extent {
    kind: Kind,
    /// Number of elements of an array.
    elements: Option<u64>,
    /// Start of the value, after its type and its number of elements.
    data: u64,
    /// Number of first elements that are small enough to keep, and their end.
    head: u64,
    head_end: u64,
}

/// A reader that tracks its position and the end of the file, in bytes.
pub(super) struct Walk<R> {
    file: BufReader<R>,
    pos: u64,
    size: u64,
    strings: u64,
    kept: u64,
}

impl<R: Read + Seek> Walk<R> {
    /// Creates a reader. `source` is at its first byte and has `size` bytes.
    pub fn new(source: R, size: u64) -> Self {
        Self { file: BufReader::new(source), pos: 0, size, strings: 0, kept: 0 }
    }

    /// Reads everything after the version.
    pub fn rest(&mut self, version: u32) -> Result<Found, Fault> {
        let (n_tensors, n_entries) = (self.u64()?, self.u64()?);
        if n_tensors > TENSORS_MAX {
            return Err(bad(self.pos - 16, format!("it counts {n_tensors} tensors")));
        }
        if n_entries > ENTRIES_MAX {
            return Err(bad(self.pos - 8, format!("it counts {n_entries} metadata entries")));
        }
        let entries = self.entries(version, n_entries)?;
        let twins = self.twins(&entries)?;
        let alignment = alignment(&entries)?;
        let (tensors, needed) = self.tensors(n_tensors, alignment)?;
        Ok(Found { alignment, entries, tensors, twins, needed })
    }

    /// Checks that `n` bytes are left, and counts them as read.
    fn advance(&mut self, n: u64) -> Result<(), Fault> {
        if n > self.size - self.pos {
            return Err(Fault::End { at: self.pos });
        }
        self.pos += n;
        Ok(())
    }

    fn skip(&mut self, n: u64) -> Result<(), Fault> {
        self.advance(n)?;
        Ok(self.file.seek_relative(n as i64)?) // n fits the file, and the size of the file fits i64
    }

    fn go_to(&mut self, pos: u64) -> Result<(), Fault> {
        self.file.seek_relative(pos as i64 - self.pos as i64)?; // both are within the file
        self.pos = pos;
        Ok(())
    }

    pub fn take<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.advance(N as u64)?;
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn bytes(&mut self, n: u64) -> Result<Vec<u8>, Fault> {
        self.advance(n)?;
        let mut bytes = vec![0; n as usize]; // n fits the file
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Fault> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.take().map(u64::from_le_bytes)
    }

    fn length(&mut self, max: u64, of: &str) -> Result<u64, Fault> {
        match self.u64()? {
            n if n <= max => Ok(n),
            n => Err(bad(self.pos - 8, format!("{of} is said to have a length of {n}"))),
        }
    }

    /// Reads a key or the name of a tensor.
    fn name(&mut self, max: u64, of: &str) -> Result<Vec<u8>, Fault> {
        let n = self.length(max, of)?;
        self.bytes(n)
    }

    fn entries(&mut self, version: u32, n: u64) -> Result<Vec<Entry>, Fault> {
        let (mut entries, mut seen) = (Vec::new(), HashSet::new());
        for _ in 0..n {
            let offset = self.pos;
            let name = self.name(KEY_MAX, "a key")?;
            let key = lossy(&name);
            if name.is_empty() {
                return Err(bad(offset, "a metadata key is empty"));
            }
            if !seen.insert(name) {
                return Err(bad(offset, format!("it has the metadata key {key:?} twice")));
            }
            entries.push(self.entry(version, offset, key)?);
        }
        Ok(entries)
    }

    /// Reads the rest of an entry, after its key.
    fn entry(&mut self, version: u32, offset: u64, key: String) -> Result<Entry, Fault> {
        let found = self.extent(HEAD_MAX, VALUE_MAX)?;
        let value = self.value(version, &found, VALUE_MAX)?;
        self.kept += key.len() as u64 + if value.is_some() { found.head_end - found.data } else { 0 };
        if self.kept > KEPT_MAX {
            return Err(bad(offset, "its metadata is too large"));
        }
        Ok(Entry { key, offset, kind: found.kind, elements: found.elements, value })
    }

    /// Finds the first two entries of the vocabulary with the same text. Empty entries do not count: llama.cpp numbers
    /// them.
    fn twins(&mut self, entries: &[Entry]) -> Result<Option<Twins>, Fault> {
        let vocabulary = entries.iter().find(|entry| entry.key == TOKENS && entry.kind == Kind::String);
        let Some((vocabulary, n)) = vocabulary.and_then(|entry| Some((entry, entry.elements?))) else {
            return Ok(None);
        };
        let end = self.pos;
        self.go_to(vocabulary.offset)?;
        self.name(KEY_MAX, "a key")?;
        self.skip(ARRAY_HEAD)?;
        let hasher = RandomState::new();
        // Maps the hash of a text to its token: 64 bits distinguish the texts of any vocabulary.
        let mut seen = HashMap::new();
        let mut twins = None;
        for i in 0..n {
            let len = self.length(STRING_MAX, "a string")?;
            let text = self.bytes(len)?;
            if text.is_empty() {
                continue;
            }
            if let Some(first) = seen.insert(hasher.hash_one(&text), i) {
                twins = Some(Twins { text: lossy(&text), first, second: i });
                break;
            }
        }
        self.go_to(end)?;
        Ok(twins)
    }

    /// Reads the complete value of the entry at `offset`, from the start of the file; None if the value is too long to
    /// print.
    pub fn whole_value(&mut self, version: u32, offset: u64) -> Result<Option<Value>, Fault> {
        self.skip(offset)?;
        self.name(KEY_MAX, "a key")?;
        let found = self.extent(WHOLE_ELEMENTS_MAX, WHOLE_MAX)?;
        if found.elements.is_some_and(|n| n > found.head) {
            return Ok(None);
        }
        self.value(version, &found, WHOLE_MAX)
    }

    /// Parses the kept part of a value with gguf-rs. None for a string of more than `max` bytes.
    fn value(&mut self, version: u32, found: &Extent, max: u64) -> Result<Option<Value>, Fault> {
        let (end, len) = (self.pos, found.head_end - found.data);
        if found.elements.is_none() && len > max {
            return Ok(None);
        }
        self.go_to(found.data)?;
        let data = self.bytes(len)?;
        self.go_to(end)?;
        let array = found.elements.map(|_| found.head);
        parse(version, found.kind, array, data).map_err(|why| bad(found.data, why)).map(Some)
    }

    fn kind(&mut self) -> Result<Kind, Fault> {
        let number = self.u32()?;
        Kind::of(number).ok_or_else(|| bad(self.pos - 4, format!("a value has type {number}, which there is not")))
    }

    /// Skips a value and determines how much of it to keep.
    fn extent(&mut self, elements_max: u64, bytes_max: u64) -> Result<Extent, Fault> {
        let (mut kind, mut elements) = (self.kind()?, None);
        if kind == Kind::Array {
            kind = self.kind()?;
            if kind == Kind::Array {
                return Err(bad(self.pos - 4, "an array holds arrays"));
            }
            elements = Some(self.length(STRING_MAX, "an array")?);
        }
        let (data, n) = (self.pos, elements.unwrap_or(1));
        let Some(size) = kind.size() else {
            // A single string is kept completely or not at all.
            let bytes_max = if elements.is_some() { bytes_max } else { u64::MAX };
            let (head, head_end) = self.strings(n, elements_max, bytes_max)?;
            return Ok(Extent { kind, elements, data, head, head_end });
        };
        self.skip(n * size)?; // n is at most 2^30
        let head = n.min(elements_max);
        Ok(Extent { kind, elements, data, head, head_end: data + head * size })
    }

    /// Skips `n` strings. Returns the number of first strings to keep, and their end.
    fn strings(&mut self, n: u64, elements_max: u64, bytes_max: u64) -> Result<(u64, u64), Fault> {
        let start = self.pos;
        self.strings += n;
        if self.strings > STRINGS_MAX {
            return Err(bad(start, format!("its arrays hold more than {STRINGS_MAX} strings")));
        }
        let (mut head, mut head_end) = (0, start);
        for i in 0..n {
            let len = self.length(STRING_MAX, "a string")?;
            self.skip(len)?;
            if i == head && i < elements_max && self.pos - start <= bytes_max {
                (head, head_end) = (i + 1, self.pos);
            }
        }
        Ok((head, head_end))
    }

    /// Checks the tensors' descriptions. Returns them and the expected size of the file in bytes. As in
    /// `gguf_init_from_reader()`, data must follow the order of the descriptions, without holes.
    fn tensors(&mut self, n: u64, alignment: u64) -> Result<(Vec<Tensor>, u64), Fault> {
        let (mut tensors, mut seen) = (Vec::<Tensor>::new(), HashSet::new());
        // Start of the next tensor's data; after a tensor of unknown type, only a lower bound.
        let (mut next, mut is_exact) = (0, true);
        let mut end = 0;
        for _ in 0..n {
            let at = self.pos;
            let raw_name = self.name(TENSOR_NAME_MAX - 1, "a tensor's name")?;
            let tensor = self.tensor(at, lossy(&raw_name))?;
            let name = &tensor.name;
            let in_place = if is_exact { tensor.offset == next } else { tensor.offset >= next };
            if !in_place || !tensor.offset.is_multiple_of(alignment) {
                let (found, should) = (tensor.offset, if is_exact { "" } else { "at least " });
                let what = format!(
                    "the data of tensor {name:?} is out of place, at {found} of the data instead of {should}{next}"
                );
                return Err(bad(at, what));
            }
            // Below 2^63: checked with the shape.
            let after = tensor.offset + tensor.bytes.unwrap_or(0);
            is_exact = tensor.bytes.is_some();
            next = after.next_multiple_of(alignment);
            end = after;
            if !seen.insert(raw_name) {
                return Err(bad(at, format!("it has the tensor {name:?} twice")));
            }
            tensors.push(tensor);
        }
        if tensors.is_empty() {
            return Ok((tensors, self.pos));
        }
        let start = self.pos.next_multiple_of(alignment);
        for tensor in &mut tensors {
            tensor.offset += start;
        }
        Ok((tensors, start + end))
    }

    /// Reads the rest of the description at `at`, after the name. The tensor's offset counts from the start of the
    /// data.
    fn tensor(&mut self, at: u64, name: String) -> Result<Tensor, Fault> {
        let n_dims = self.u32()?;
        if n_dims > DIMS_MAX {
            return Err(bad(self.pos - 4, format!("tensor {name:?} has {n_dims} dimensions")));
        }
        let mut shape = vec![0; n_dims as usize];
        for dim in &mut shape {
            *dim = self.u64()?;
        }
        let (number, offset) = (self.u32()?, self.u64()?);
        let kind = TensorType::of(number);
        let values = shape.iter().try_fold(1_u64, |n, &dim| n.checked_mul(dim));
        let bytes = values.and_then(|values| match kind {
            Some(kind) if !shape.first().unwrap_or(&1).is_multiple_of(kind.block) => None,
            Some(kind) => (values / kind.block).checked_mul(kind.bytes),
            None => Some(0),
        });
        // The limit leaves room for rounding up and for adding the start of the data.
        let fits = bytes.and_then(|bytes| bytes.checked_add(offset)).is_some_and(|end| end < 1 << 62);
        match (values, bytes) {
            (Some(values), Some(bytes)) if fits => {
                Ok(Tensor { name, shape, values, number, kind, offset, bytes: kind.map(|_| bytes), part: 0 })
            }
            _ => Err(bad(at, format!("tensor {name:?} cannot have the shape {shape:?} at {offset}"))),
        }
    }
}

/// Returns the alignment. `gguf_init_from_reader()` requires a 32-bit number that is a power of two.
fn alignment(entries: &[Entry]) -> Result<u64, Fault> {
    let Some(entry) = entries.iter().find(|entry| entry.key == ALIGNMENT) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let number = entry.value.as_ref().and_then(Value::as_u64).filter(|n| n.is_power_of_two());
    match number {
        Some(n) if entry.kind == Kind::U32 => Ok(n),
        _ => Err(bad(entry.offset, format!("{ALIGNMENT} is not a power of two"))),
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
