//! Real models for tests.
#![allow(dead_code)] // each test program uses only a part of it

use std::path::PathBuf;

/// Returns the default model; `make setup` fetches it.
pub fn model() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"), PathBuf::from);
    let path = cache.join("gvote/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run `make setup`", path.display());
    path
}

/// Returns a model if it exists; otherwise prints that the test is skipped.
pub fn optional(name: &str) -> Option<PathBuf> {
    let path = model().with_file_name(name);
    if !path.exists() {
        eprintln!("skipped: {} is not there (make setup)", path.display());
        return None;
    }
    Some(path)
}
