//! An adaptive KV cache for llama.cpp.
//!
//! gvote measures how much of the KV cache a request needs, keeps that part and frees the rest. It needs neither a
//! budget nor a patched llama.cpp. After a prompt, gvote models the hidden states as a Gaussian and samples plausible
//! future queries. These queries and the last real queries vote for the keys that they attend to, and the cache is
//! compacted to the winners (GVote, arXiv 2509.03136).
//!
//! ```no_run
//! use std::{ops::ControlFlow, path::Path};
//! use gvote::llama::{Model, ModelParams, SamplerParams};
//! use gvote::{Session, SessionParams};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let model = Model::load(Path::new("model.gguf"), &ModelParams::default(), |_| true)?;
//!     let mut session = Session::new(&model, &SessionParams::default())?;
//!
//!     let prompt = std::fs::read_to_string("document.txt")? + "\n\nSummary:";
//!     session.prefill(&model.tokenize(&prompt, true, true)?, |_, _| ControlFlow::Continue(()))?;
//!     let report = session.compress()?;
//!     eprintln!("{} -> {} cells", report.cells_before, report.cells_after);
//!
//!     let mut sampler = session.sampler(&SamplerParams::of(&model), 256)?;
//!     session.generate(&mut sampler, 256, |token| {
//!         print!("{}", String::from_utf8_lossy(&model.piece(token, false)));
//!         ControlFlow::Continue(())
//!     })?;
//!     Ok(())
//! }
//! ```
//!
//! # Modules
//! Data flows one way: `capture` -> `score` -> [`policy`] -> `compact`. `vote` runs these steps, [`session`] is the
//! loop around a vote, and [`explain`] reports what a vote kept.
//!
//! A *cell* is a slot of the KV cache. A *position* is the index of a token in its sequence; cell i need not hold
//! position i. A *composite cell* holds a different token for every layer and KV head, as that head chose.

mod archive;
mod attach;
mod backend;
mod bytes;
mod cache;
mod capi;
mod capture;
mod compact;
mod disk;
pub mod explain;
pub mod llama;
pub mod machine;
mod memory;
mod score;
pub mod session;
mod sys;
#[cfg(test)]
mod tests;
mod vote;

#[doc(hidden)] // public for a test that compares it with the sizes computed from a model file
pub use cache::Layout;
pub use compact::CompactError;
pub use gvote_policy as policy;
use gvote_policy::divergence;
pub use session::{Session, SessionError, SessionParams};
pub use vote::VoteError;
