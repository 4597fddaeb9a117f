//! Memory that is large and fresh. The system makes a page ready when it is first written to: in pages of 4 KiB that takes several
//! times as long as to write, in large ones a quarter of that.

use std::alloc::{Layout, alloc_zeroed};

use half::f16;

/// Half of so much lies in whole large pages, wherever it begins.
#[cfg(target_os = "linux")]
const LEAST_BYTES: usize = 4 << 20;
/// What a large page holds on most systems.
#[cfg(target_os = "linux")]
const PAGE: usize = 2 << 20;

/// Asks for large pages for what is yet to be written to, nearly all of it. What is small stays as it is, and so does all where the
/// system has no such pages.
pub(crate) fn ask_for_large_pages<T>(memory: &mut [T]) {
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
    #[cfg(target_os = "linux")]
    if size_of_val(memory) >= LEAST_BYTES {
        let range = memory.as_mut_ptr_range();
        let start = range.start.cast::<u8>();
        let (first, end) = (start.addr().next_multiple_of(PAGE), range.end.addr() / PAGE * PAGE);
        // SAFETY: whole pages inside of memory that is ours; its contents stay as they are.
        unsafe { libc::madvise(start.with_addr(first).cast(), end - first, libc::MADV_HUGEPAGE) };
    }
}

/// Gives memory that was freed back to the system, where it is kept for later: after a vote that is some of what the vote took.
pub(crate) fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: what is in use stays as it is.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Types for which all-zero bytes are a valid zero.
///
/// # Safety
/// All-zero bytes are a valid value.
pub(crate) unsafe trait Number {}

// SAFETY: all zero bits are 0.
unsafe impl Number for u8 {}
// SAFETY: all zero bits are 0.
unsafe impl Number for u16 {}
// SAFETY: all zero bits are 0.
unsafe impl Number for u32 {}
// SAFETY: all zero bits are 0.0.
unsafe impl Number for f32 {}
// SAFETY: all zero bits are 0.0.
unsafe impl Number for f16 {}

/// [`zeros`], where nothing can be done without them.
pub(crate) fn must_have_zeros<T: Number + Clone + Default>(n: usize) -> Vec<T> {
    zeros(n).unwrap_or_else(|| vec![T::default(); n])
}

/// `n` zeros, of which none takes up memory before it is written to; None where the system has not as much.
pub(crate) fn zeros<T: Number>(n: usize) -> Option<Vec<T>> {
    let layout = Layout::array::<T>(n).ok()?;
    if layout.size() == 0 {
        return Some(Vec::new());
    }
    // SAFETY: the layout is not empty; it is that of a vector of as many numbers, which may be all zero bits.
    let mut zeros = unsafe {
        let start = alloc_zeroed(layout).cast::<T>();
        if start.is_null() {
            return None;
        }
        Vec::from_raw_parts(start, n, n)
    };
    ask_for_large_pages(&mut zeros);
    Some(zeros)
}
