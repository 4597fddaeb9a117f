//! Evaluation: measures on texts and tasks what a compressed cache loses against the full one.
//!
//! Every measurement is one [`Record`], one line of a JSONL file. Tables, plots and figures are generated from such
//! files alone.

#![forbid(unsafe_code)]

pub mod config;
pub mod metrics;
pub mod page;
pub mod plot;
pub mod provenance;
pub mod record;
pub mod report;
pub mod runner;
pub mod search;
pub mod tasks;
pub mod text;
pub mod texts;

pub use provenance::Start;
pub use record::{Adaptivity, Fidelity, Record, Run, TaskScore};
