//! What llama.cpp allocates, and what it would.

use std::path::Path;

use super::{Context, ContextParams, Device, LlamaError, Model, ModelParams, device};
use crate::sys;

/// Bytes of buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    /// The weights. On the host they are mapped from the file, as far as they are not repacked.
    pub weights: usize,
    /// Of the weights, those that are repacked for the device.
    pub repacked: usize,
    /// The KV cache, with the window's where there is one.
    pub cache: usize,
    /// What a batch computes in.
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
    /// In the machine's memory.
    pub host: Buffers,
    /// In that of accelerators, all of them together.
    pub device: Buffers,
}

impl From<sys::gvote_shim_memory_use> for Buffers {
    fn from(raw: sys::gvote_shim_memory_use) -> Self {
        Self { weights: raw.model, repacked: raw.repacked, cache: raw.cache, compute: raw.compute }
    }
}

impl Context {
    /// Those of them that lie on one accelerator, or a worker's device.
    fn buffers_on(&self, device: &Device) -> Buffers {
        let Some(device) = device::find(&device.name) else { return Buffers::default() };
        // SAFETY: valid context and device; a plain struct that the shim fills.
        unsafe {
            let mut used = std::mem::zeroed();
            sys::gvote_shim_memory_on(self.as_ptr(), device, &raw mut used);
            used.into()
        }
    }

    /// The buffers that llama.cpp holds for this context and its model.
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

/// A model without its weights: llama.cpp works out which buffers it would make, and makes none of them.
pub struct Simulation(Model);

impl Simulation {
    /// Takes the time of reading the metadata and the vocabulary.
    ///
    /// # Errors
    /// [`LlamaError::Load`] with llama.cpp's own reason.
    pub fn load(path: &Path, params: &ModelParams) -> Result<Self, LlamaError> {
        Model::load_with(path, params, true, |_| true).map(Self)
    }

    /// What a model loaded for real and a context of these parameters would hold.
    ///
    /// # Errors
    /// As [`Context::new`].
    pub fn memory(&self, params: &ContextParams) -> Result<Memory, LlamaError> {
        // the context has no buffers behind it: it must not leave this function
        Context::new(&self.0, params).map(|context| context.buffers())
    }

    /// The accelerators and workers' devices that would hold some of it, with what they would hold.
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
