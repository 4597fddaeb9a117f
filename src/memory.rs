//! Large, fresh allocations. The system prepares a page at its first write: with pages of 4 KiB that takes several
//! times as long as the write itself, with large pages a quarter of that.

use std::alloc::{Layout, alloc_zeroed};

use half::f16;

/// Least size for large pages: at least half of so many bytes lies in whole large pages, at any alignment.
#[cfg(target_os = "linux")]
const LEAST_BYTES: usize = 4 << 20;
/// Size of a large page on most systems.
#[cfg(target_os = "linux")]
const PAGE: usize = 2 << 20;

/// Requests large pages for memory of which nearly all is yet to be written. Small allocations stay as they are, and so
/// do all where the system has no large pages.
pub(crate) fn ask_for_large_pages<T>(memory: &mut [T]) {
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
    #[cfg(target_os = "linux")]
    if size_of_val(memory) >= LEAST_BYTES {
        let range = memory.as_mut_ptr_range();
        let start = range.start.cast::<u8>();
        let (first, end) = (start.addr().next_multiple_of(PAGE), range.end.addr() / PAGE * PAGE);
        // SAFETY: whole pages inside our own memory; their contents do not change.
        unsafe { libc::madvise(start.with_addr(first).cast(), end - first, libc::MADV_HUGEPAGE) };
    }
}

/// Returns freed memory that the allocator keeps to the system, such as memory that a vote took.
pub(crate) fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: memory in use is not touched.
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

/// Returns [`zeros`], or aborts where memory runs out.
pub(crate) fn must_have_zeros<T: Number + Clone + Default>(n: usize) -> Vec<T> {
    zeros(n).unwrap_or_else(|| vec![T::default(); n])
}

/// Allocates `n` zeros, which take no physical memory before they are written to; None where memory runs out.
pub(crate) fn zeros<T: Number>(n: usize) -> Option<Vec<T>> {
    let layout = Layout::array::<T>(n).ok()?;
    if layout.size() == 0 {
        return Some(Vec::new());
    }
    // SAFETY: the layout is not empty and matches a vector of `n` numbers, for which all-zero bits are valid.
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
