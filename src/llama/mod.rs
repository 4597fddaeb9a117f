//! Safe owners of llama.h objects.
//!
//! Each type owns one llama.cpp object and frees it. A [`Context`] keeps its [`Model`] alive. This module contains no
//! eviction: the modules above it (`capture`, `score`, `compact`) use the raw context.

mod abort;
mod batch;
mod busy;
mod context;
mod device;
mod error;
mod fingerprint;
pub mod log;
mod markers;
mod memory;
mod model;
mod placement;
mod rope;
pub mod rpc;
mod sampler;
mod sampling;
mod state;
mod tensor_type;
mod threads;
mod tokenize;

pub use abort::{AbortHandler, CrashHandler, exit, on_abort, on_crash};
pub use batch::Batch;
pub(crate) use context::Visit;
pub use context::{CacheType, Context, ContextParams, FlashAttention};
pub use device::{Device, DeviceMemory, devices};
pub use error::LlamaError;
pub use markers::Marker;
pub use memory::{Buffers, Memory, Simulation};
pub use model::{Model, Pieces, Token};
pub use placement::{KvError, KvOverride, KvValue, LoadMode, ModelParams, SplitMode, TensorBuffer, TensorBufferError};
pub use rope::{RopeParams, RopeScaling};
pub use sampler::Sampler;
pub use sampling::{Dry, Mirostat, SamplerKind, SamplerParams, is_repeat_penalty};
pub use tensor_type::TensorType;
pub use threads::ThreadParams;

use std::sync::Once;

/// A token's logical position in its sequence, as used by RoPE. Not a cell index.
pub type Pos = i32;

/// The id of a sequence in a context, below `n_seq_max`.
pub type SeqId = i32;

/// Initialises llama.cpp's back ends once in a process and redirects its log to [`log`].
pub(crate) fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::install();
        // SAFETY: no arguments; called once, before any other llama.cpp function.
        unsafe { crate::sys::gvote_shim_llama_init() };
    });
}
