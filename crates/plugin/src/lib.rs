//! gvote in programs that use llama.cpp and know nothing of it: preloaded, it stands in front of libllama.so.
//!
//! The exported functions have the names of llama.h. Each does what gvote needs before and after, and calls llama.cpp's own. What
//! votes, and how, is libgvote's affair: it is opened when the first context is made, and called through `gvote.h`. So the plugin
//! itself links neither library, and does no harm in programs that have no llama.cpp.
//!
//! Whatever goes wrong here, the program goes on with the cells it has; a line on stderr says why.

mod batch;
mod context;
mod ffi;
mod handle;
mod hooks;
mod report;
mod sequence;
mod settings;
mod state;
