//! Devices that llama.cpp can compute on.

use std::ffi::{CStr, CString, c_char};

use super::LlamaError;
use crate::sys;

/// A CPU or an accelerator in ggml's list of devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// ggml's name, such as `CPU`, `CUDA0` or `RPC0`.
    pub name: String,
    /// The manufacturer's name, such as `NVIDIA H100 80GB HBM3`; for a worker's device, the worker's endpoint.
    pub description: String,
    /// True for an accelerator or a worker's device; false for the CPU and for CPU helpers such as a BLAS library.
    pub is_gpu: bool,
}

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    pub free: usize,
    pub total: usize,
}

impl Device {
    /// Returns the device's memory, querying the worker for a worker's device. None if the device no longer exists.
    pub fn memory(&self) -> Option<DeviceMemory> {
        let device = find(&self.name)?;
        let mut memory = DeviceMemory { free: 0, total: 0 };
        // SAFETY: a registered device; both numbers are written.
        unsafe { sys::ggml_backend_dev_memory(device, &raw mut memory.free, &raw mut memory.total) };
        Some(memory)
    }
}

/// Lists the devices of the built-in back ends and of workers ([`rpc::add_worker`](super::rpc::add_worker)).
pub fn devices() -> Vec<Device> {
    super::init();
    // SAFETY: the back ends are registered by now; ggml keeps its devices and their descriptions for the whole process.
    unsafe {
        let all = (0..sys::ggml_backend_dev_count()).map(|i| sys::ggml_backend_dev_get(i));
        all.map(|device| Device {
            name: text(sys::ggml_backend_dev_name(device)),
            description: text(sys::ggml_backend_dev_description(device)),
            is_gpu: matches!(
                sys::ggml_backend_dev_type(device),
                sys::GGML_BACKEND_DEVICE_TYPE_GPU | sys::GGML_BACKEND_DEVICE_TYPE_IGPU
            ),
        })
        .collect()
    }
}

/// Returns ggml's handle of a device.
pub(super) fn find(name: &str) -> Option<sys::ggml_backend_dev_t> {
    super::init();
    let name = CString::new(name).ok()?;
    // SAFETY: the name lives for the call.
    let device = unsafe { sys::ggml_backend_dev_by_name(name.as_ptr()) };
    (!device.is_null()).then_some(device)
}

/// Returns ggml's handle of an accelerator or a CPU helper.
pub(super) fn accelerator(name: &str) -> Result<sys::ggml_backend_dev_t, LlamaError> {
    // SAFETY: a registered device.
    let is_other = |device: &_| unsafe { sys::ggml_backend_dev_type(*device) } != sys::GGML_BACKEND_DEVICE_TYPE_CPU;
    find(name).filter(is_other).ok_or_else(|| {
        let others = devices().into_iter().filter(|device| find(&device.name).as_ref().is_some_and(is_other));
        LlamaError::Device { name: name.into(), known: listed(others.map(|device| device.name)) }
    })
}

/// Returns the buffer type with that name, of any device.
pub(super) fn buffer_type(name: &str) -> Result<sys::ggml_backend_buffer_type_t, LlamaError> {
    super::init();
    // SAFETY: the back ends are registered by now; ggml keeps devices, buffer types and their names for the whole process.
    let known: Vec<_> = unsafe {
        let all = (0..sys::ggml_backend_dev_count()).map(|i| sys::ggml_backend_dev_get(i));
        let types = all.map(|device| sys::ggml_backend_dev_buffer_type(device)).filter(|buft| !buft.is_null());
        types.map(|buft| (text(sys::ggml_backend_buft_name(buft)), buft)).collect()
    };
    let found = known.iter().find(|(known, _)| known == name).map(|(_, buft)| *buft);
    found
        .ok_or_else(|| LlamaError::Buffer { name: name.into(), known: listed(known.into_iter().map(|(name, _)| name)) })
}

fn listed(names: impl Iterator<Item = String>) -> String {
    let names: Vec<_> = names.collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

/// Copies a C string.
///
/// # Safety
/// `text` ends with NUL and lives for the call.
unsafe fn text(text: *const c_char) -> String {
    // SAFETY: as above.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_cpu_with_a_name_and_memory() {
        let devices = devices();
        let cpu = devices.iter().find(|device| device.name == "CPU").unwrap_or_else(|| panic!("{devices:?}"));
        assert!(!cpu.is_gpu && !cpu.description.is_empty(), "{devices:?}");
        let memory = cpu.memory().unwrap();
        assert!(memory.total >= memory.free && memory.free > 0, "{memory:?}");
    }

    #[test]
    fn a_device_that_is_not_there_has_no_memory() {
        let gone = Device { name: "CUDA999".into(), description: String::new(), is_gpu: true };
        assert_eq!(gone.memory(), None);
    }
}
