//! What happens when ggml gives up.

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

use crate::sys;

/// Gets ggml's message, and answers with the exit status of the process, or leaves it to ggml to end it by `abort()`.
pub type AbortHandler = fn(message: &str) -> Option<u8>;

static HANDLER: OnceLock<AbortHandler> = OnceLock::new();

/// Asks `handler` whenever ggml gives up: there is no way back, and the process ends after it. It may run in any thread, in the
/// midst of a call; ggml prints nothing then. For programs: a library leaves this to the app that it is part of. The first
/// handler of a process stays.
pub fn on_abort(handler: AbortHandler) {
    if HANDLER.set(handler).is_ok() {
        // SAFETY: a plain function, sound to call from any thread.
        unsafe { sys::ggml_set_abort_callback(Some(trampoline)) };
    }
}

unsafe extern "C" fn trampoline(message: *const c_char) {
    // SAFETY: ggml passes a NUL-terminated string that lives for the call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    if let Some(status) = HANDLER.get().and_then(|handler| handler(&message)) {
        exit(status);
    }
}

/// Ends the process at once. Threads of llama.cpp may be at work: they would run into what C++ tears down at an ordinary exit.
pub fn exit(status: u8) -> ! {
    // SAFETY: no memory is touched.
    unsafe { libc::_exit(status.into()) }
}
