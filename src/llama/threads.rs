//! Thread pools with settings that differ from ggml's defaults.

use std::ptr::NonNull;

use super::LlamaError;
use crate::sys;

/// How the CPU threads run; names as in llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadParams {
    /// Scheduling priority (`--prio`): -1 low, 0 as the process, 1 medium, 2 high, 3 realtime. Values above 0 require a
    /// privilege.
    pub priority: i32,
    /// How long a thread polls for work before it sleeps (`--poll`): 0 not at all, 100 for long. OpenMP threads, which
    /// ggml uses unless built without OpenMP, wait as OpenMP is configured.
    pub poll: u32,
}

impl Default for ThreadParams {
    fn default() -> Self {
        Self { priority: 0, poll: 50 }
    }
}

/// The threads of one context.
pub(super) struct Pool(NonNull<sys::ggml_threadpool>);

// SAFETY: ggml lets one thread after the other compute with it.
unsafe impl Send for Pool {}

impl Pool {
    /// Creates a pool; None if the parameters are the defaults. `most`: maximum number of threads that compute at once.
    pub fn new(params: ThreadParams, most: i32) -> Result<Option<Self>, LlamaError> {
        if params == ThreadParams::default() {
            return Ok(None);
        }
        // SAFETY: any numbers are valid.
        let pool = unsafe { sys::gvote_shim_threadpool_new(most, params.priority, params.poll) };
        NonNull::new(pool).map(|pool| Some(Self(pool))).ok_or(LlamaError::Threads)
    }

    /// Attaches the pool to a context.
    ///
    /// # Safety
    /// The context is valid, and is freed before the pool.
    pub unsafe fn serve(&self, ctx: *mut sys::llama_context) {
        // SAFETY: both are valid; prompts and single tokens share the threads.
        unsafe { sys::llama_attach_threadpool(ctx, self.0.as_ptr(), self.0.as_ptr()) };
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once, after the context.
        unsafe { sys::gvote_shim_threadpool_free(self.0.as_ptr()) };
    }
}
