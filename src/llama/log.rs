//! Redirects llama.cpp's log: silent by default; the first error of a call is kept for its error message; everything
//! goes to stderr if verbose.

use std::ffi::{CStr, c_char, c_void};
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys;

static VERBOSE: AtomicBool = AtomicBool::new(false);
static FIRST_ERROR: Mutex<String> = Mutex::new(String::new());

/// Prints all of llama.cpp's log to stderr, or none of it.
pub fn set_verbose(verbose: bool) {
    VERBOSE.store(verbose, Ordering::Relaxed);
}

/// Takes the first error that llama.cpp logged since [`clear_reason`]; later ones only repeat that the call failed.
///
/// Formatted for appending to a message: `": why"`, or empty.
pub(crate) fn take_reason() -> String {
    let text = std::mem::take(&mut *FIRST_ERROR.lock().unwrap_or_else(|e| e.into_inner()));
    let text = text.trim();
    // llama.cpp prefixes the name of the C++ function, which does not help users.
    let text = text.split_once(": ").map_or(text, |(head, rest)| if head.contains(' ') { text } else { rest });
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

pub(crate) fn clear_reason() {
    FIRST_ERROR.lock().unwrap_or_else(|e| e.into_inner()).clear();
}

pub(crate) fn install() {
    // SAFETY: the callback is a plain function, sound to call from any thread, and needs no user data.
    unsafe { sys::llama_log_set(Some(on_log), std::ptr::null_mut()) };
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: ggml passes a NUL-terminated string that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    if level == sys::GGML_LOG_LEVEL_ERROR {
        let mut first = FIRST_ERROR.lock().unwrap_or_else(|e| e.into_inner());
        if first.is_empty() {
            *first = text.to_string();
        }
    }
    if VERBOSE.load(Ordering::Relaxed) {
        // A closed stderr must not become a panic inside llama.cpp.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}
