//! What a bench program needs beside its measurements: the model, the data, statistics.
#![allow(dead_code)] // each bench program uses its own part of it

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use gvote::Session;
use gvote::llama::{Model, ModelParams, Token};

pub type Error = Box<dyn std::error::Error>;

/// `../shared/data`, seen from the project's root.
pub const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data");

pub fn default_model() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"), PathBuf::from);
    cache.join("gvote/models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

pub fn load_model(path: &Path) -> Result<Model, Error> {
    Ok(Model::load(path, &ModelParams::default(), |_| true)?)
}

pub fn prefill(session: &mut Session, tokens: &[Token]) -> Result<f64, Error> {
    let report = session.prefill(tokens, |_, _| ControlFlow::Continue(()))?;
    Ok(report.time.as_secs_f64())
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * 0.5).round() as usize]
}
