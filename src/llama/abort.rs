//! Handlers for the end of the process in llama.cpp: a failed assertion of ggml, an uncaught exception, a fatal signal.

use std::ffi::{CStr, c_char, c_int};
use std::sync::OnceLock;

use crate::sys;

/// Receives a message and returns the exit status of the process, or None to let C++ end it by `abort()`.
pub type AbortHandler = fn(message: &str) -> Option<u8>;

/// Receives a description of a fatal signal and returns the exit status of the process. Runs inside the signal handler,
/// so it must not allocate or lock. `write` writes to stderr.
pub type CrashHandler = fn(signal: &'static str, write: &dyn Fn(&str)) -> u8;

static ABORT: OnceLock<AbortHandler> = OnceLock::new();
static CRASH: OnceLock<CrashHandler> = OnceLock::new();

/// Signals of a fault, with descriptions.
const FATAL: [(c_int, &str); 5] = [
    (libc::SIGSEGV, "SIGSEGV: a wrong address, or the end of the stack"),
    (libc::SIGBUS, "SIGBUS: a file that became shorter while it was read, or memory that is gone"),
    (libc::SIGFPE, "SIGFPE: a division by zero"),
    (libc::SIGILL, "SIGILL: an instruction that this CPU does not have"),
    (libc::SIGABRT, "SIGABRT"),
];

/// Sets a handler for failed assertions of ggml and uncaught C++ exceptions.
///
/// The process ends afterwards in any case. The handler may run in any thread, in the middle of a call; C++ then prints
/// nothing. For programs only: a library leaves this to the app. The first handler of a process stays.
pub fn on_abort(handler: AbortHandler) {
    if ABORT.set(handler).is_ok() {
        // SAFETY: plain functions, sound to call from any thread.
        unsafe {
            sys::ggml_set_abort_callback(Some(aborted));
            sys::gvote_shim_on_terminate(Some(aborted));
        }
    }
}

/// Sets a handler that provides the last line of the process when a fault ends it.
///
/// A stack overflow needs an alternative stack, which the standard library gives to the main thread and to its own
/// threads. For programs only, like [`on_abort`]; the first handler stays.
pub fn on_crash(handler: CrashHandler) {
    if CRASH.set(handler).is_err() {
        return;
    }
    for (signal, _) in FATAL {
        // SAFETY: a zeroed sigaction is valid; the handler is a plain function that calls nothing but write() and _exit().
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = crashed as extern "C" fn(c_int) as usize;
            action.sa_flags = libc::SA_ONSTACK | libc::SA_RESETHAND;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

unsafe extern "C" fn aborted(message: *const c_char) {
    // SAFETY: ggml and the shim pass a NUL-terminated string that lives for the call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    if let Some(status) = ABORT.get().and_then(|handler| handler(&message)) {
        exit(status);
    }
}

extern "C" fn crashed(signal: c_int) {
    let name = FATAL.iter().find(|known| known.0 == signal).map_or("a signal", |known| known.1);
    // SAFETY: a string of that length.
    let write = |text: &str| _ = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
    if let Some(handler) = CRASH.get() {
        exit(handler(name, &write));
    }
}

/// Ends the process at once, because threads of llama.cpp may still use objects that C++ destroys at an ordinary exit.
pub fn exit(status: u8) -> ! {
    // SAFETY: no memory is touched.
    unsafe { libc::_exit(status.into()) }
}
