//! Every pointer that C hands in becomes a reference or a value here.
//!
//! What a pointer points to is the caller's promise: the header says what each one has to be. NULL is not trusted.

use std::ffi::{CStr, c_char, c_void};
use std::ptr::NonNull;

use super::handle::Failure;
use super::header::{GVOTE_ERROR_NULL, GVOTE_ERROR_PARAMS};
use crate::llama::Token;
use crate::sys::llama_context;

pub(super) fn null(what: &str) -> Failure {
    Failure::new(GVOTE_ERROR_NULL, format!("{what} is NULL"))
}

/// A context.
pub(super) fn context(ctx: *mut llama_context) -> Result<NonNull<llama_context>, Failure> {
    NonNull::new(ctx).ok_or_else(|| null("ctx"))
}

/// The size that a caller's struct begins with. Of one that is to be filled nothing else need be initialised.
pub(super) fn size_in<T>(object: *const T, what: &str, is_known: impl Fn(usize) -> bool) -> Result<usize, Failure> {
    if object.is_null() {
        return Err(null(what));
    }
    // SAFETY: a caller's struct begins with a size_t, whatever the alignment of its memory.
    let size = unsafe { object.cast::<usize>().read_unaligned() };
    if is_known(size) { Ok(size) } else { Err(super::params::unknown_size(what, size, size_of::<T>())) }
}

/// Writes the first bytes of a struct to the caller's one, as far as its size says it reaches. The size stays.
pub(super) fn write_sized<T: Copy>(
    object: *mut T,
    what: &str,
    value: &T,
    is_known: impl Fn(usize) -> bool,
) -> Result<(), Failure> {
    let rest = size_of::<usize>()..size_in(object, what, is_known)?.min(size_of::<T>());
    // SAFETY: both structs have so many bytes at least, and are two.
    unsafe {
        let from = std::ptr::from_ref(value).cast::<u8>().add(rest.start);
        std::ptr::copy_nonoverlapping(from, object.cast::<u8>().add(rest.start), rest.len());
    }
    Ok(())
}

/// A copy of `default` whose first bytes are the caller's.
pub(super) fn read_sized<T: Copy>(
    object: *const T,
    what: &str,
    default: T,
    is_known: impl Fn(usize) -> bool,
) -> Result<T, Failure> {
    let size = size_in(object, what, is_known)?.min(size_of::<T>());
    let mut value = default;
    // SAFETY: the caller's struct has as many bytes as it says, and ours no fewer. It holds numbers and pointers: any bytes are a value.
    unsafe { std::ptr::copy_nonoverlapping(object.cast::<u8>(), (&raw mut value).cast(), size) };
    Ok(value)
}

/// Writes a value that the caller must want.
pub(super) fn write<T>(to: *mut T, value: T) -> Result<(), Failure> {
    if to.is_null() {
        return Err(null("the place for the answer"));
    }
    put(to, value);
    Ok(())
}

/// Writes a value that the caller may want.
pub(super) fn put<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: a caller's variable of this type.
        unsafe { to.write_unaligned(value) };
    }
}

/// Copies values to a buffer that has room for them.
pub(super) fn copy_to<T: Copy>(values: &[T], to: *mut T) -> Result<(), Failure> {
    if values.is_empty() {
        return Ok(());
    }
    if to.is_null() {
        return Err(null("the buffer"));
    }
    // SAFETY: the caller says that the buffer has room for as many, whatever the alignment of its memory.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), to.cast(), size_of_val(values)) };
    Ok(())
}

/// A caller's buffer of bytes that the header wants to be written: by `gvote_state_get()`.
pub(super) fn bytes<'a>(data: *const c_void, size: usize) -> Result<&'a [u8], Failure> {
    if data.is_null() {
        return Err(null("data"));
    }
    if isize::try_from(size).is_err() {
        return Err(Failure::new(super::header::GVOTE_ERROR_SIZE, format!("no buffer has {size} bytes")));
    }
    // SAFETY: the caller says that the buffer has as many bytes.
    Ok(unsafe { std::slice::from_raw_parts(data.cast(), size) })
}

/// A caller's text.
pub(super) fn text<'a>(text: *const c_char, what: &str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(null(what));
    }
    // SAFETY: the caller says that it ends in a NUL.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Failure::new(GVOTE_ERROR_PARAMS, format!("{what} is not UTF-8")))
}

/// The last of a caller's tokens, `most` of them or all.
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
    // SAFETY: the caller says that there are as many tokens.
    Ok((n - n.min(most)..n).map(|i| unsafe { tokens.add(i).read_unaligned() }).collect())
}
