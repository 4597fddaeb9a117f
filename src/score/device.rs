//! Back ends of our own on the devices that hold the cache.

use super::ScoreError;
use crate::sys;

/// A back end of our own on the device that holds a part of the cache.
pub(super) struct Device {
    buffer_type: sys::ggml_backend_buffer_type_t,
    pub(super) backend: sys::ggml_backend_t,
    /// NULL before it is needed.
    alloc: sys::ggml_gallocr_t,
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; NULL is fine for an allocator.
        unsafe {
            sys::ggml_gallocr_free(self.alloc);
            sys::ggml_backend_free(self.backend);
        }
    }
}

// SAFETY: a back end and its allocator are used by one thread at a time (&mut).
unsafe impl Send for Device {}

impl Device {
    fn new(buffer_type: sys::ggml_backend_buffer_type_t) -> Result<Self, ScoreError> {
        // SAFETY: the buffer type comes from a living buffer; results are checked.
        unsafe {
            let device = sys::ggml_backend_buft_get_device(buffer_type);
            let backend = sys::gvote_shim_backend_init(device);
            if backend.is_null() {
                return Err(ScoreError::Backend);
            }
            if sys::ggml_backend_is_cpu(backend) {
                // whole layers are shared out among threads instead: a barrier after each small node costs more than it gains
                sys::ggml_backend_cpu_set_n_threads(backend, 1);
            }
            Ok(Self { buffer_type, backend, alloc: std::ptr::null_mut() })
        }
    }

    /// The allocator of graphs; another one where the last was lost.
    pub(super) fn allocator(&mut self) -> &mut sys::ggml_gallocr_t {
        if self.alloc.is_null() {
            // SAFETY: the back end lives.
            self.alloc = unsafe { sys::ggml_gallocr_new(sys::ggml_backend_get_default_buffer_type(self.backend)) };
        }
        &mut self.alloc
    }

    /// Bytes of its compute buffer.
    pub(super) fn compute_bytes(&self) -> usize {
        // SAFETY: a valid allocator, with one buffer.
        if self.alloc.is_null() { 0 } else { unsafe { sys::ggml_gallocr_get_buffer_size(self.alloc, 0) } }
    }
}

/// The back end for the memory that holds this layer's K.
pub(super) fn device_for<'a>(
    devices: &'a mut Vec<Device>,
    layer: &sys::gvote_shim_layer,
) -> Result<&'a mut Device, ScoreError> {
    // SAFETY: K's storage lives as long as the context, which the caller of `score` holds.
    let buffer_type = unsafe { sys::ggml_backend_buffer_get_type((*layer.k).buffer) };
    let i = match devices.iter().position(|d| d.buffer_type == buffer_type) {
        Some(i) => i,
        None => {
            devices.push(Device::new(buffer_type)?);
            devices.len() - 1
        }
    };
    Ok(&mut devices[i])
}
