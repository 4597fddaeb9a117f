//! Memory on a device.

use super::{ComputeError, Tensor};
use crate::sys;

/// Limit on the bytes of results that wait on a device; a single larger result is allowed.
const MOST_KEPT: usize = 64 << 20;

/// Bump allocator in the memory of a back end.
#[derive(Default)]
pub(super) struct Memory {
    /// NULL until memory is allocated.
    buffer: sys::ggml_backend_buffer_t,
    /// Bytes that are in use, from the start.
    pub(super) used: usize,
    /// Alignment of allocations, in bytes.
    alignment: usize,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; NULL is fine.
        unsafe { sys::ggml_backend_buffer_free(self.buffer) };
    }
}

// SAFETY: plain memory.
unsafe impl Send for Memory {}

impl Memory {
    pub(super) fn bytes(&self) -> usize {
        // SAFETY: a valid buffer.
        if self.buffer.is_null() { 0 } else { unsafe { sys::ggml_backend_buffer_get_size(self.buffer) } }
    }

    pub(super) fn has_room(&self, sizes: &[usize]) -> bool {
        self.used + padded(sizes, self.alignment) <= self.bytes()
    }

    /// Replaces the memory by a larger buffer: the present size plus `n` times the `sizes`, or only the `sizes` if that cannot be
    /// allocated.
    pub(super) fn grow(&mut self, backend: sys::ggml_backend_t, sizes: &[usize], n: usize) -> Result<(), ComputeError> {
        // SAFETY: a valid back end; the buffer is ours, and NULL is fine.
        unsafe {
            self.alignment = sys::ggml_backend_get_alignment(backend).max(size_of::<f32>());
            let needed = padded(sizes, self.alignment);
            let ample = (self.bytes() + n * needed).min(MOST_KEPT).max(needed);
            if ample <= self.bytes() {
                return Ok(());
            }
            let buffer_type = sys::ggml_backend_get_default_buffer_type(backend);
            sys::ggml_backend_buffer_free(std::mem::replace(&mut self.buffer, std::ptr::null_mut()));
            for bytes in [ample, needed] {
                self.buffer = sys::gvote_shim_alloc_buffer(buffer_type, bytes);
                if !self.buffer.is_null() {
                    return Ok(());
                }
            }
        }
        Err(ComputeError::Memory("statistics and queries"))
    }

    /// Allocates the next bytes to a tensor, and returns their offset.
    pub(super) fn give(&mut self, t: Tensor) -> usize {
        let at = self.used;
        self.put(t, at);
        // SAFETY: plain query of a valid tensor.
        self.used += padded(&[unsafe { sys::ggml_nbytes(t) }], self.alignment);
        at
    }

    /// Places a tensor at an offset.
    pub(super) fn put(&self, t: Tensor, at: usize) {
        // SAFETY: ggml checks that the tensor has no memory, and that it lies inside.
        unsafe {
            let base: *mut u8 = sys::ggml_backend_buffer_get_base(self.buffer).cast();
            sys::ggml_backend_tensor_alloc(self.buffer, t, base.wrapping_add(at).cast());
        }
    }
}

/// Total bytes of tensors that begin at multiples of `alignment`.
fn padded(sizes: &[usize], alignment: usize) -> usize {
    sizes.iter().map(|size| size.next_multiple_of(alignment.max(1))).sum()
}
