//! Memory that llama.cpp allocates, or would allocate.

use std::path::Path;

use super::{Context, ContextParams, Device, LlamaError, Model, ModelParams, device};
use crate::sys;

/// Sizes of buffers, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    /// The weights. On the host they are mapped from the file, except for repacked ones.
    pub weights: usize,
    /// The part of the weights that is repacked for the device.
    pub repacked: usize,
    /// The KV cache, including that of layers with a sliding window.
    pub cache: usize,
    /// Scratch space for computing a batch.
    pub compute: usize,
}

impl Buffers {
    pub fn total(&self) -> usize {
        self.weights + self.cache + self.compute
    }
}

/// The buffers of a model and one context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Buffers in host memory.
    pub host: Buffers,
    /// Buffers in the memory of all accelerators together.
    pub device: Buffers,
}

impl From<sys::gvote_shim_memory_use> for Buffers {
    fn from(raw: sys::gvote_shim_memory_use) -> Self {
        Self { weights: raw.model, repacked: raw.repacked, cache: raw.cache, compute: raw.compute }
    }
}

impl Context {
    /// Returns the buffers of this context and its model on one accelerator or worker's device.
    fn buffers_on(&self, device: &Device) -> Buffers {
        let Some(device) = device::find(&device.name) else { return Buffers::default() };
        // SAFETY: valid context and device; a plain struct that the shim fills.
        unsafe {
            let mut used = std::mem::zeroed();
            sys::gvote_shim_memory_on(self.as_ptr(), device, &raw mut used);
            used.into()
        }
    }

    /// Returns the buffers that llama.cpp holds for this context and its model.
    pub fn buffers(&self) -> Memory {
        // SAFETY: valid context; plain structs that the shim fills.
        let (host, device) = unsafe {
            let (mut host, mut device) = std::mem::zeroed();
            sys::gvote_shim_memory(self.as_ptr(), &raw mut host, &raw mut device);
            (host, device)
        };
        Memory { host: host.into(), device: device.into() }
    }
}

/// A model without weights: llama.cpp computes the sizes of its buffers but allocates none.
pub struct Simulation(Model);

impl Simulation {
    /// Loads the metadata and the vocabulary only, and takes as long as reading these.
    ///
    /// # Errors
    /// [`LlamaError::Load`] with llama.cpp's own reason.
    pub fn load(path: &Path, params: &ModelParams) -> Result<Self, LlamaError> {
        Model::load_with(path, params, true, |_| true).map(Self)
    }

    /// Returns the buffers that the loaded model and a context with these parameters would hold.
    ///
    /// # Errors
    /// As [`Context::new`].
    pub fn memory(&self, params: &ContextParams) -> Result<Memory, LlamaError> {
        // The context has no buffers and must not leave this function.
        Context::new(&self.0, params).map(|context| context.buffers())
    }

    /// Returns the accelerators and workers' devices that would hold a part of them, each with its buffers.
    ///
    /// # Errors
    /// As [`Context::new`].
    pub fn devices(&self, params: &ContextParams) -> Result<Vec<(Device, Buffers)>, LlamaError> {
        let context = Context::new(&self.0, params)?;
        let mut used = Vec::new();
        for device in device::devices().into_iter().filter(|device| device.is_gpu) {
            let buffers = context.buffers_on(&device);
            if buffers.total() > 0 {
                used.push((device, buffers));
            }
        }
        Ok(used)
    }
}
