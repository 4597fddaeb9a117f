//! The reader of model files, on whatever libFuzzer thinks of: `make fuzz`.
#![no_main]

#[path = "../../tests/common/gguf_check.rs"]
mod gguf_check;

/// Bytes of zeros that follow, as in a sparse file.
const HOLE: u64 = 1 << 16;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = gguf_check::check(data, 0);
    let _ = gguf_check::check(data, HOLE);
});
