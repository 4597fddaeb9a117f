//! Every pointer that C hands in becomes a reference or a value here.
//!
//! What a pointer points to is the caller's promise: the header says what each one has to be. NULL is not trusted.

use std::ffi::c_void;
use std::ptr::NonNull;

use super::handle::Failure;
use super::header::GVOTE_ERROR_NULL;
use crate::llama::Token;
use crate::sys::llama_context;

pub(super) fn null(what: &str) -> Failure {
    Failure::new(GVOTE_ERROR_NULL, format!("{what} is NULL"))
}

/// A context.
pub(super) fn context(ctx: *mut llama_context) -> Result<NonNull<llama_context>, Failure> {
    NonNull::new(ctx).ok_or_else(|| null("ctx"))
}

/// A struct that begins with its size, as bytes of that size. `sizes`: those that can be.
pub(super) fn sized_bytes<'a, T>(
    object: *const T,
    what: &str,
    is_known: impl Fn(usize) -> bool,
) -> Result<&'a [u8], Failure> {
    if object.is_null() {
        return Err(null(what));
    }
    // SAFETY: a caller's struct begins with a size_t, whatever the alignment of its memory; it has as many bytes as it says.
    unsafe {
        let size = object.cast::<usize>().read_unaligned();
        if !is_known(size) {
            return Err(super::params::unknown_size(what, size, size_of::<T>()));
        }
        Ok(std::slice::from_raw_parts(object.cast(), size))
    }
}

/// Writes the first bytes of a struct to the caller's one, as far as its size says it reaches. The size stays.
pub(super) fn write_sized<T: Copy>(
    object: *mut T,
    what: &str,
    value: &T,
    is_known: impl Fn(usize) -> bool,
) -> Result<(), Failure> {
    let size = sized_bytes(object, what, is_known)?.len();
    let rest = size_of::<usize>()..size;
    // SAFETY: both structs have `size` bytes at least, and are two.
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
    let bytes = sized_bytes(object, what, is_known)?;
    let mut value = default;
    // SAFETY: no more bytes than the struct has, which holds numbers only: any bytes are a value.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut value).cast(), bytes.len()) };
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
    // SAFETY: the caller says that the buffer has room for as many.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len()) };
    Ok(())
}

/// A caller's buffer.
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
