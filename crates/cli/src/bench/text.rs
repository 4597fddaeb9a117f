//! Tokens to read and generate.

use anyhow::{Result, bail};
use gvote::llama::{Model, Token};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::words::count;

/// Fixed seed: every run uses the same random tokens.
const SEED: u64 = 0;

/// Returns the first `n` tokens of a text, after BOS if the model adds one.
pub fn tokens_of(model: &Model, text: &str, n: usize) -> Result<Vec<Token>> {
    let mut tokens = model.tokenize(text, true, false)?;
    if tokens.len() < n {
        bail!("the text of -f has {} tokens, and the tests need {}: give a longer one", count(tokens.len()), count(n));
    }
    tokens.truncate(n);
    Ok(tokens)
}

/// Returns `n` tokens drawn from the whole vocabulary, as llama-bench does, after BOS if the model adds one.
pub fn random_tokens(model: &Model, n: usize) -> Result<Vec<Token>> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let n_vocab = model.n_vocab() as Token;
    let mut tokens = if model.adds_bos() { model.tokenize("", true, false)? } else { Vec::new() };
    tokens.resize_with(n, || rng.random_range(0..n_vocab));
    Ok(tokens)
}
