//! Settings and saved states of the C interface, on whatever libFuzzer thinks of: `make fuzz`.
#![no_main]

use gvote::llama;

#[path = "../../tests/common/capi_check.rs"]
mod capi_check;
#[path = "../../tests/common/edit.rs"]
mod edit;
#[allow(dead_code)] // it serves tests too
#[path = "../../src/tests/tiny.rs"]
mod tiny;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = capi_check::check(data);
});
