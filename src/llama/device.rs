//! What llama.cpp can compute on.

use std::ffi::CStr;

use crate::sys;

/// A CPU or an accelerator, as ggml knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its maker's name for it, such as `NVIDIA H100 80GB HBM3`.
    pub description: String,
    /// An accelerator, not the CPU or what only helps the CPU, such as a BLAS library.
    pub is_gpu: bool,
}

/// The devices of the back ends that were built in.
pub fn devices() -> Vec<Device> {
    super::init();
    // SAFETY: the back ends are registered by now; ggml keeps its devices and their descriptions for the whole process.
    unsafe {
        let all = (0..sys::ggml_backend_dev_count()).map(|i| sys::ggml_backend_dev_get(i));
        all.map(|device| Device {
            description: CStr::from_ptr(sys::ggml_backend_dev_description(device)).to_string_lossy().trim().to_owned(),
            is_gpu: matches!(
                sys::ggml_backend_dev_type(device),
                sys::GGML_BACKEND_DEVICE_TYPE_GPU | sys::GGML_BACKEND_DEVICE_TYPE_IGPU
            ),
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_a_cpu_and_it_has_a_name() {
        let devices = super::devices();
        assert!(devices.iter().any(|device| !device.is_gpu && !device.description.is_empty()), "{devices:?}");
    }
}
