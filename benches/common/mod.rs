//! What a bench program needs beside its measurements: the model, the data, statistics.
#![allow(dead_code)] // each bench program uses its own part of it

use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Args;
use gvote::Session;
use gvote::llama::{Model, ModelParams, Token};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub type Error = Box<dyn std::error::Error>;

/// `../shared/data`, seen from the project's root.
pub const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data");

pub fn default_model() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"), PathBuf::from);
    cache.join("gvote/models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

#[derive(Args)]
pub struct ModelArgs {
    #[arg(short, long, default_value_os_t = default_model())]
    pub model: PathBuf,
    /// Layers to keep on the GPU, where there is one; -1: as many as fit
    #[arg(long, default_value_t = ModelParams::default().n_gpu_layers, allow_negative_numbers = true)]
    n_gpu_layers: i32,
}

impl ModelArgs {
    pub fn load(&self) -> Result<Model, Error> {
        Ok(Model::load(
            &self.model,
            &ModelParams { n_gpu_layers: self.n_gpu_layers, ..ModelParams::default() },
            |_| true,
        )?)
    }
}

/// The command line, with llama.cpp's flags of several letters as clap reads them.
pub fn arguments() -> impl Iterator<Item = String> {
    std::env::args().map(|arg| match arg.as_str() {
        "-ngl" => "--n-gpu-layers".into(),
        "-fa" => "--flash-attn".into(),
        "-ctk" => "--cache-type-k".into(),
        "-ctv" => "--cache-type-v".into(),
        "-ub" => "--ubatch-size".into(),
        _ => arg,
    })
}

/// `n` tokens of the whole vocabulary, the same in every run.
pub fn random_tokens(model: &Model, n: usize) -> Vec<Token> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    (0..n).map(|_| rng.random_range(0..model.n_vocab() as Token)).collect()
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
