//! Files of sessions, on whatever libFuzzer thinks of: `make fuzz`.
#![no_main]

use gvote::llama;

#[path = "../../tests/common/edit.rs"]
mod edit;
#[path = "../../tests/common/session_check.rs"]
mod session_check;
#[allow(dead_code)] // it serves tests too
#[path = "../../src/tests/tiny.rs"]
mod tiny;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = session_check::check(data);
});
