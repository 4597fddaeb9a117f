//! ggml back ends of gvote's own, in addition to those that llama.cpp decodes with. Computations on a tensor run where the tensor lies, so
//! that only results cross the bus or the network.

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

/// Maximum number of layers that a device works on at once: while it computes one, the graph of another is built, and the results of an
/// earlier one are read.
pub(crate) const DEVICE_LAYERS: usize = 4;

/// Starts a thread of `scope` that works with devices.
///
/// # Errors
/// The system's error if it starts no more threads.
pub(crate) fn start<'s, T: Send + 's>(
    scope: &'s Scope<'s, '_>,
    work: impl FnOnce() -> T + Send + 's,
) -> io::Result<ScopedJoinHandle<'s, T>> {
    threads::start(scope, elsewhere(work))
}

/// Calls `wait` when the process exits, before the drivers that were loaded until now are torn down.
pub(crate) fn before_exit(wait: extern "C" fn()) {
    // SAFETY: a function that lives as long as this library, which calls it too when it is unloaded.
    unsafe { libc::atexit(wait) };
}

/// Prepares work with devices to run on another thread.
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

/// Reasons why a computation failed.
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
