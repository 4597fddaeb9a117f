//! Evaluation: what a compressed cache loses against the full one, measured on texts and tasks.
//!
//! Every measurement is one [`Record`], one line of a JSONL file. Tables, plots and figures are made from such files alone.

pub mod config;
pub mod record;

pub use record::{Adaptivity, Fidelity, Record, Run, TaskScore};
