use std::ptr::NonNull;

use super::{LlamaError, Model, Token};
use crate::sys;

/// How the next token is chosen; names and defaults as in llama.cpp.
#[derive(Clone, Debug)]
pub struct SamplerParams {
    /// Random seed (`-s`).
    pub seed: u32,
    /// Temperature (`--temp`); 0 or below is greedy.
    pub temp: f32,
    /// Keep the k most likely (`--top-k`); 0 = all.
    pub top_k: i32,
    /// Nucleus (`--top-p`); 1 = off.
    pub top_p: f32,
    /// Least probability relative to the best token (`--min-p`); 0 = off.
    pub min_p: f32,
    /// Penalty for tokens of the last `repeat_last_n` (`--repeat-penalty`); 1 = off.
    pub repeat_penalty: f32,
    /// Tokens the penalty looks back (`--repeat-last-n`).
    pub repeat_last_n: i32,
}

impl Default for SamplerParams {
    fn default() -> Self {
        Self {
            seed: sys::LLAMA_DEFAULT_SEED,
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
        }
    }
}

/// A chain of llama.cpp samplers.
pub struct Sampler {
    chain: NonNull<sys::llama_sampler>,
    candidates: Vec<sys::llama_token_data>,
}

// SAFETY: a chain owns its samplers and touches no global state.
unsafe impl Send for Sampler {}

impl Sampler {
    /// The chain penalties, top-k, top-p, min-p, temperature, draw; or penalties and greedy for `temp <= 0`.
    pub fn new(model: &Model, params: &SamplerParams) -> Self {
        // SAFETY: each init returns a sampler that the chain takes over.
        unsafe {
            let chain = sys::llama_sampler_chain_init(sys::llama_sampler_chain_default_params());
            let add = |sampler| sys::llama_sampler_chain_add(chain, sampler);
            if params.repeat_penalty != 1.0 {
                add(sys::llama_sampler_init_penalties(
                    model.n_vocab() as i32,
                    params.repeat_last_n,
                    params.repeat_penalty,
                    0.0,
                    0.0,
                ));
            }
            if params.temp <= 0.0 {
                add(sys::llama_sampler_init_greedy());
            } else {
                add(sys::llama_sampler_init_top_k(params.top_k));
                add(sys::llama_sampler_init_top_p(params.top_p, 1));
                add(sys::llama_sampler_init_min_p(params.min_p, 1));
                add(sys::llama_sampler_init_temp(params.temp));
                add(sys::llama_sampler_init_dist(params.seed));
            }
            Self {
                chain: NonNull::new(chain).expect("llama.cpp allocates samplers with new, which never returns NULL"),
                candidates: Vec::new(),
            }
        }
    }

    /// Chooses the next token from its logits `[n_vocab]`, and remembers the choice.
    ///
    /// # Errors
    /// [`LlamaError::Memory`].
    pub fn sample(&mut self, logits: &[f32]) -> Result<Token, LlamaError> {
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(id, &logit)| sys::llama_token_data {
            id: id as Token,
            logit,
            p: 0.0,
        }));
        let mut array = sys::llama_token_data_array {
            data: self.candidates.as_mut_ptr(),
            size: self.candidates.len(),
            selected: -1,
            sorted: false,
        };
        // SAFETY: the array describes our candidates; samplers reorder and shrink it in place.
        let token = unsafe { sys::gvote_shim_sample(self.chain.as_ptr(), &raw mut array) };
        if token == sys::LLAMA_TOKEN_NULL { Err(LlamaError::Memory) } else { Ok(token) }
    }

    /// Remembers a token that was not sampled here (for the repetition penalty).
    pub fn accept(&mut self, token: Token) {
        // SAFETY: valid chain.
        unsafe { sys::llama_sampler_accept(self.chain.as_ptr(), token) };
    }

    /// Forgets what was sampled.
    pub fn reset(&mut self) {
        // SAFETY: valid chain.
        unsafe { sys::llama_sampler_reset(self.chain.as_ptr()) };
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // SAFETY: the chain and its samplers are freed once.
        unsafe { sys::llama_sampler_free(self.chain.as_ptr()) };
    }
}
