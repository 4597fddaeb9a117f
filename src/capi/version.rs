//! Checks that the llama.cpp in the process is the one that gvote was built for.
//!
//! gvote accesses structures that llama.h does not declare. Two checks come first: the version numbers of the loaded
//! libraries, and, for each context, the addresses of members that exported functions return, which must match the
//! offsets in our headers.

use std::ffi::CStr;
use std::ptr::NonNull;

use super::handle::Failure;
use super::header::GVOTE_ERROR_VERSION;
use crate::sys;

/// Checks the versions of the libraries that this process has loaded.
pub(super) fn check_libraries() -> Result<(), Failure> {
    // SAFETY: both return static strings.
    let (llama, ggml) = unsafe { (CStr::from_ptr(sys::llama_version()), CStr::from_ptr(sys::ggml_version())) };
    compare("llama.cpp", &llama.to_string_lossy(), env!("GVOTE_LLAMA_VERSION"))?;
    compare("ggml", &ggml.to_string_lossy(), env!("GVOTE_GGML_VERSION"))
}

fn compare(name: &str, found: &str, expected: &str) -> Result<(), Failure> {
    // a suffix describes the build, as in 1.2.3-dev
    let number = found.split(['-', '+']).next().unwrap_or_default();
    if number == expected {
        return Ok(());
    }
    let text = format!("gvote was built for {name} {expected}, but the process has loaded {name} {found}");
    Err(Failure::new(GVOTE_ERROR_VERSION, text))
}

/// Checks the layout of the structures of a living context.
pub(super) fn check_context(ctx: NonNull<sys::llama_context>) -> Result<(), Failure> {
    // SAFETY: the caller guarantees a living context; the shim calls exported functions and compares addresses.
    let reason = unsafe { sys::gvote_shim_check_layout(ctx.as_ptr()) };
    if reason.is_null() {
        return Ok(());
    }
    // SAFETY: a static string.
    let reason = unsafe { CStr::from_ptr(reason) }.to_string_lossy();
    let text =
        format!("the llama.cpp in this process was built from other sources than gvote: {reason} lies elsewhere");
    Err(Failure::new(GVOTE_ERROR_VERSION, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_at_hand_are_the_right_ones() {
        assert_eq!(check_libraries().map_err(|failure| failure.status), Ok(()));
    }

    #[test]
    fn another_version_is_refused_and_named() {
        for (found, right) in [("1.2.3", true), ("1.2.3-dev", true), ("1.2.4", false), ("1.2", false), ("", false)] {
            let outcome = compare("llama.cpp", found, "1.2.3");
            assert_eq!(outcome.is_ok(), right, "{found}");
            if let Err(failure) = outcome {
                assert_eq!(failure.status, GVOTE_ERROR_VERSION);
            }
        }
    }
}
