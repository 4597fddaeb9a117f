//! Writes a model of real shapes with random weights, for measurements on machines without a model.

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;

#[path = "../../tests/common/random_model.rs"]
mod random_model;

use random_model::{Shape, Weights};

/// Write a GGUF file with random weights: the speed is that of a real model of this shape, the text means nothing
///
/// The defaults are the shape of Llama 3.1 8B: 4.5 GB in q4_0. The file has no tokenizer: gvote bench and the benches take random
/// tokens.
#[derive(Parser)]
#[command(bin_name = "random-model", max_term_width = 100)]
struct Cli {
    /// The file to write
    file: PathBuf,
    /// How weights are stored
    #[arg(long = "type", value_enum, default_value_t = Weights::Q4_0)]
    weights: Weights,
    #[arg(long, default_value_t = 32)]
    n_layer: u32,
    #[arg(long, default_value_t = 4096)]
    n_embd: u32,
    #[arg(long, default_value_t = 32)]
    n_head: u32,
    #[arg(long, default_value_t = 8)]
    n_head_kv: u32,
    #[arg(long, default_value_t = 14336)]
    n_ff: u32,
    #[arg(long, default_value_t = 128_256)]
    n_vocab: u32,
    /// Tokens that the model says it was trained for
    #[arg(long, default_value_t = 131_072)]
    n_ctx: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<(), String> {
    let cli = Cli::parse();
    let Cli { weights, n_layer, n_embd, n_head, n_head_kv, n_ff, n_vocab, n_ctx, .. } = cli;
    let shape = Shape { weights, n_layer, n_embd, n_head, n_head_kv, n_ff, n_vocab, n_ctx };
    let start = Instant::now();
    let size = shape.write(&cli.file, cli.seed).map_err(|error| format!("{}: {error}", cli.file.display()))?;
    println!("{}: {:.2} GB in {:.1} s", cli.file.display(), size as f64 / 1e9, start.elapsed().as_secs_f64());
    Ok(())
}
