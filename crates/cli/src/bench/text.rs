//! The tokens that are read and generated.

use anyhow::{Result, bail};
use gvote::llama::{Model, Token};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::words::count;

/// The same random tokens in every run.
const SEED: u64 = 0;

/// The first `n` tokens of a text, with BOS in front where the model wants one.
pub fn tokens_of(model: &Model, text: &str, n: usize) -> Result<Vec<Token>> {
    let mut tokens = model.tokenize(text, true, false)?;
    if tokens.len() < n {
        bail!("the text of -f has {} tokens, and the tests need {}: give a longer one", count(tokens.len()), count(n));
    }
    tokens.truncate(n);
    Ok(tokens)
}

/// `n` tokens drawn from the whole vocabulary, as llama-bench does, with BOS in front where the model wants one.
pub fn random_tokens(model: &Model, n: usize) -> Result<Vec<Token>> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let n_vocab = model.n_vocab() as Token;
    let mut tokens = if model.adds_bos() { model.tokenize("", true, false)? } else { Vec::new() };
    tokens.resize_with(n, || rng.random_range(0..n_vocab));
    Ok(tokens)
}
