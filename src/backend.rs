//! ggml back ends of our own, beside those that llama.cpp decodes with: what is computed about a tensor is computed where the
//! tensor lies, so that only results cross the bus, or the wire.

mod device;
mod graph;
mod lane;
mod memory;

use std::io;
use std::thread::{Scope, ScopedJoinHandle};

pub(crate) use self::device::{Device, Devices, HostMemory, STAGE, has_own_host_memory, place};
pub(crate) use self::graph::{Builder, Results, Tensor};
pub(crate) use self::lane::Lane;
use crate::policy::threads;

/// Layers that a device works on at once, at most: while it computes one, another is described to it, and what came of one before is read.
pub(crate) const DEVICE_LAYERS: usize = 4;

/// A thread of `scope` that works with devices.
///
/// # Errors
/// The system's, where it starts no more threads.
pub(crate) fn start<'s, T: Send + 's>(
    scope: &'s Scope<'s, '_>,
    work: impl FnOnce() -> T + Send + 's,
) -> io::Result<ScopedJoinHandle<'s, T>> {
    threads::start(scope, elsewhere(work))
}

/// Has `wait` called when the process ends, before the drivers are torn down that were loaded until now.
pub(crate) fn before_exit(wait: extern "C" fn()) {
    // SAFETY: a function that lives as long as this library, which calls it too when it is unloaded.
    unsafe { libc::atexit(wait) };
}

/// Work with devices that another thread is to do.
pub(crate) fn elsewhere<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    #[cfg(test)]
    let work = {
        let pretends = crate::cache::PRETEND_DEVICE.get();
        move || {
            crate::cache::PRETEND_DEVICE.set(pretends);
            work()
        }
    };
    work
}

/// Why something could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum ComputeError {
    #[error("out of memory ({0}): lower `n_ubatch`, `n_ctx` or `samples`")]
    Memory(&'static str),
    #[error(
        "the back end that holds the KV cache cannot be started a second time; `policy` full runs the model as it is"
    )]
    Backend,
    #[error(
        "the device that holds the KV cache cannot compute {0} of gvote's own: another `type_k` or `type_v`, or `n_gpu_layers` 0, may do; `policy` full runs the model as it is"
    )]
    Unsupported(String),
    #[error("the system starts no more threads ({0})")]
    Threads(#[from] io::Error),
    #[error("a graph of gvote's own failed (ggml status {0}); `policy` full runs the model as it is")]
    Failed(i32),
}
