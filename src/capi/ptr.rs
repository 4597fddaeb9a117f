//! Turns every pointer that C passes into a reference or a value.
//!
//! The header states what each pointer must point to, and the caller guarantees it. Only NULL is checked.

use std::ffi::{CStr, c_char, c_void};
use std::ptr::NonNull;

use super::handle::Failure;
use super::header::{GVOTE_ERROR_NULL, GVOTE_ERROR_PARAMS};
use crate::llama::Token;
use crate::sys::llama_context;

pub(super) fn null(what: &str) -> Failure {
    Failure::new(GVOTE_ERROR_NULL, format!("{what} is NULL"))
}

/// Checks a context for NULL.
pub(super) fn context(ctx: *mut llama_context) -> Result<NonNull<llama_context>, Failure> {
    NonNull::new(ctx).ok_or_else(|| null("ctx"))
}

/// Reads the size field that a caller's struct begins with. The rest of an output struct may be uninitialised.
pub(super) fn size_in<T>(object: *const T, what: &str, is_known: impl Fn(usize) -> bool) -> Result<usize, Failure> {
    if object.is_null() {
        return Err(null(what));
    }
    // SAFETY: the caller's struct begins with a size_t; its memory may be unaligned.
    let size = unsafe { object.cast::<usize>().read_unaligned() };
    if is_known(size) { Ok(size) } else { Err(super::params::unknown_size(what, size, size_of::<T>())) }
}

/// Copies a struct to the caller's one, up to the size that the caller's states. The size field stays.
pub(super) fn write_sized<T: Copy>(
    object: *mut T,
    what: &str,
    value: &T,
    is_known: impl Fn(usize) -> bool,
) -> Result<(), Failure> {
    let rest = size_of::<usize>()..size_in(object, what, is_known)?.min(size_of::<T>());
    // SAFETY: both structs have at least so many bytes, and do not overlap.
    unsafe {
        let from = std::ptr::from_ref(value).cast::<u8>().add(rest.start);
        std::ptr::copy_nonoverlapping(from, object.cast::<u8>().add(rest.start), rest.len());
    }
    Ok(())
}

/// Returns a copy of `default`, overwritten by as many bytes as the caller's struct has.
pub(super) fn read_sized<T: Copy>(
    object: *const T,
    what: &str,
    default: T,
    is_known: impl Fn(usize) -> bool,
) -> Result<T, Failure> {
    let size = size_in(object, what, is_known)?.min(size_of::<T>());
    let mut value = default;
    // SAFETY: the caller guarantees `size` bytes, and ours has no fewer; all fields are numbers or pointers, for which any bytes are valid.
    unsafe { std::ptr::copy_nonoverlapping(object.cast::<u8>(), (&raw mut value).cast(), size) };
    Ok(value)
}

/// Writes a value to an output that must not be NULL.
pub(super) fn write<T>(to: *mut T, value: T) -> Result<(), Failure> {
    if to.is_null() {
        return Err(null("the place for the answer"));
    }
    put(to, value);
    Ok(())
}

/// Writes a value to an output that may be NULL.
pub(super) fn put<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: the caller guarantees a variable of this type.
        unsafe { to.write_unaligned(value) };
    }
}

/// Copies values to a caller's buffer, which has room for them.
pub(super) fn copy_to<T: Copy>(values: &[T], to: *mut T) -> Result<(), Failure> {
    if values.is_empty() {
        return Ok(());
    }
    if to.is_null() {
        return Err(null("the buffer"));
    }
    // SAFETY: the caller guarantees room for as many; the buffer may be unaligned.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), to.cast(), size_of_val(values)) };
    Ok(())
}

/// Borrows the caller's buffer, which `gvote_state_get()` filled according to the header.
pub(super) fn bytes<'a>(data: *const c_void, size: usize) -> Result<&'a [u8], Failure> {
    if data.is_null() {
        return Err(null("data"));
    }
    if isize::try_from(size).is_err() {
        return Err(Failure::new(super::header::GVOTE_ERROR_SIZE, format!("no buffer has {size} bytes")));
    }
    // SAFETY: the caller guarantees as many bytes.
    Ok(unsafe { std::slice::from_raw_parts(data.cast(), size) })
}

/// Borrows the caller's text.
pub(super) fn text<'a>(text: *const c_char, what: &str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(null(what));
    }
    // SAFETY: the caller guarantees a NUL at the end.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Failure::new(GVOTE_ERROR_PARAMS, format!("{what} is not UTF-8")))
}

/// Copies the last `most` of the caller's tokens, or all if fewer.
pub(super) fn last_tokens(tokens: *const Token, n: usize, most: usize) -> Result<Vec<Token>, Failure> {
    if n == 0 {
        return Ok(Vec::new());
    }
    if tokens.is_null() {
        return Err(null("ahead"));
    }
    if n > isize::MAX as usize / size_of::<Token>() {
        return Err(Failure::new(super::header::GVOTE_ERROR_SIZE, format!("no text has {n} tokens")));
    }
    // SAFETY: the caller guarantees as many tokens.
    Ok((n - n.min(most)..n).map(|i| unsafe { tokens.add(i).read_unaligned() }).collect())
}
