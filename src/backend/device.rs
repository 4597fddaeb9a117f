//! Devices, and a back end on each.

use super::ComputeError;
use crate::cache;
use crate::sys;

/// A back end of our own on one device.
pub(crate) struct Device {
    /// NULL for the host.
    place: sys::ggml_backend_dev_t,
    backend: sys::ggml_backend_t,
    /// NULL before it is needed.
    alloc: sys::ggml_gallocr_t,
    /// For what is read back and shared out: fresh memory for each graph would take the system longer than the reading.
    pub scratch: Vec<f32>,
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
    fn new(place: sys::ggml_backend_dev_t, n_threads: usize) -> Result<Self, ComputeError> {
        // SAFETY: the result is checked; NULL stands for the CPU.
        unsafe {
            let backend = sys::gvote_shim_backend_init(place);
            if backend.is_null() {
                return Err(ComputeError::Backend);
            }
            if sys::ggml_backend_is_cpu(backend) {
                sys::ggml_backend_cpu_set_n_threads(backend, n_threads as i32);
            }
            Ok(Self { place, backend, alloc: std::ptr::null_mut(), scratch: Vec::new() })
        }
    }

    pub(super) fn backend(&self) -> sys::ggml_backend_t {
        self.backend
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
    fn compute_bytes(&self) -> usize {
        // SAFETY: a valid allocator, with one buffer.
        if self.alloc.is_null() { 0 } else { unsafe { sys::ggml_gallocr_get_buffer_size(self.alloc, 0) } }
    }
}

/// Back ends on the devices that were met so far.
pub(crate) struct Devices {
    met: Vec<Device>,
    n_threads: usize,
}

impl Devices {
    /// `n_threads`: of a back end on the host.
    pub fn new(n_threads: usize) -> Self {
        Self { met: Vec::new(), n_threads }
    }

    /// The back end for what lies in this buffer.
    ///
    /// # Errors
    /// [`ComputeError::Backend`].
    ///
    /// # Safety
    /// The buffer is valid.
    pub unsafe fn at(&mut self, buffer: sys::ggml_backend_buffer_t) -> Result<&mut Device, ComputeError> {
        // SAFETY: passed on.
        let place = unsafe { place(buffer) };
        let i = match self.met.iter().position(|device| device.place == place) {
            Some(i) => i,
            None => {
                self.met.push(Device::new(place, self.n_threads)?);
                self.met.len() - 1
            }
        };
        Ok(&mut self.met[i])
    }

    /// Gives the compute memory back and says how many bytes it was. Back ends on other devices stay: starting one takes long.
    pub fn release(&mut self) -> usize {
        let bytes = self.met.iter().map(Device::compute_bytes).sum();
        self.met.retain(|device| !device.place.is_null());
        for device in &mut self.met {
            device.scratch = Vec::new();
            // SAFETY: ours; NULL is fine, and stands for none.
            unsafe { sys::ggml_gallocr_free(std::mem::replace(&mut device.alloc, std::ptr::null_mut())) };
        }
        bytes
    }
}

/// Where a buffer lies: its device, or NULL for memory that the host can work on in place.
///
/// # Safety
/// The buffer is valid.
pub(crate) unsafe fn place(buffer: sys::ggml_backend_buffer_t) -> sys::ggml_backend_dev_t {
    // SAFETY: passed on.
    unsafe {
        if cache::is_host(buffer) {
            return std::ptr::null_mut();
        }
        let device = sys::ggml_backend_buft_get_device(sys::ggml_backend_buffer_get_type(buffer));
        // where a test pretends that host memory is a device's
        if device.is_null() { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) } else { device }
    }
}
