//! Invariants of the reader of model files for arbitrary input. Used by the tests and by cargo-fuzz.

use std::collections::HashSet;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use gvote::llama::CacheType;
use gvote_gguf::{Gguf, GgufError};

/// Bytes followed by zeros, as in a sparse file.
struct Sparse<'a> {
    data: Cursor<&'a [u8]>,
    size: u64,
}

impl Read for Sparse<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.data.read(buf)?;
        if n > 0 {
            return Ok(n);
        }
        let pos = self.data.position();
        let n = (buf.len() as u64).min(self.size.saturating_sub(pos)) as usize;
        buf[..n].fill(0);
        self.data.set_position(pos + n as u64);
        Ok(n)
    }
}

impl Seek for Sparse<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.data.seek(to)
    }
}

/// Reads a file of this content with a hole of `hole` bytes at its end, and checks that the result makes sense.
pub fn check(data: &[u8], hole: u64) -> Result<Gguf, GgufError> {
    let size = data.len() as u64 + hole;
    let source = Sparse { data: Cursor::new(data), size };
    let found = Gguf::parse(Path::new("/nowhere/model.gguf"), source, size);
    match &found {
        Ok(file) => check_file(file, size),
        Err(error) => {
            let line = error.to_string();
            assert!(line.starts_with("/nowhere/model.gguf: ") && !line.contains('\n'), "{line}");
            if let GgufError::Malformed { offset, .. } | GgufError::TruncatedHeader { offset, .. } = error {
                assert!(*offset <= size, "{line}");
            }
        }
    }
    found
}

fn check_file(file: &Gguf, size: u64) {
    let mut end = 0;
    for tensor in &file.tensors {
        assert!(tensor.offset >= end && tensor.offset.is_multiple_of(file.alignment), "{tensor:?} after {end}");
        end = tensor.offset + tensor.bytes.unwrap_or(0);
    }
    assert!(end <= size, "the data ends at {end} of {size}");
    let mut names = HashSet::new();
    assert!(file.tensors.iter().filter(|tensor| is_exact(&tensor.name)).all(|tensor| names.insert(&tensor.name)));
    let mut keys = HashSet::new();
    assert!(file.entries.iter().filter(|entry| is_exact(&entry.key)).all(|entry| keys.insert(&entry.key)));
    assert!(file.entries.is_sorted_by_key(|entry| entry.offset));
    for entry in &file.entries {
        entry.type_name();
        entry.is_whole();
    }

    let bytes: u64 = file.by_type().iter().filter_map(|share| share.bytes).sum();
    assert_eq!(bytes, file.n_bytes());
    let info = &file.info;
    assert_eq!((info.n_head_kv.len(), info.windowed.len()), (info.n_layer.min(info.n_head_kv.len()), info.n_layer));
    info.support();
    for cache_type in CacheType::all() {
        info.can_cache(cache_type);
        info.kv_bytes_per_cell(cache_type, cache_type);
        info.kv_bytes_per_window_cell(cache_type, cache_type);
    }
}

/// Whether the text is exactly what the file holds; different invalid UTF-8 is displayed alike.
fn is_exact(text: &str) -> bool {
    !text.contains(char::REPLACEMENT_CHARACTER)
}
