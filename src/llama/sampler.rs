use std::ffi::{CStr, CString, c_char};
use std::ptr::NonNull;

use super::{LlamaError, Model, SamplerParams, Token};
use crate::sys;

/// Smallest temperature. Logits divided by a smaller one overflow; the likeliest token has all the probability before
/// that.
const LEAST_TEMP: f32 = 1e-6;
/// Largest number of tokens that penalties look back, which takes 64 MiB. Callers may ask for "all" of a text without
/// an end.
const MOST_REMEMBERED: usize = 1 << 24;
/// Bytes of a grammar's error message, which may quote the rest of the grammar.
const REASON_SIZE: usize = 256;

/// A chain of llama.cpp's samplers, with an optional grammar.
pub struct Sampler {
    ptr: NonNull<sys::gvote_shim_sampler>,
    seed: u32,
    /// Keeps the vocabulary alive, which grammars and DRY read.
    _model: Model,
}

// SAFETY: the samplers are owned; the model's vocabulary is only read, and nothing changes it.
unsafe impl Send for Sampler {}

impl Sampler {
    /// Creates samplers for a text of up to `n_context` tokens, prompt and answer. Samplers that look back at "all"
    /// tokens look back this far.
    ///
    /// # Errors
    /// [`LlamaError::Grammar`], [`LlamaError::NoSuchToken`], [`LlamaError::Sampling`], [`LlamaError::Memory`].
    pub fn new(model: &Model, params: &SamplerParams, n_context: usize) -> Result<Self, LlamaError> {
        params.check(model)?;
        let most = n_context.min(MOST_REMEMBERED) as i32;
        let last_n = |n: i32| if n < 0 { most } else { n.min(most) };
        let seed = match params.seed {
            SamplerParams::RANDOM => rand::random_range(0..SamplerParams::RANDOM),
            seed => seed,
        };
        let breakers = params.dry.sequence_breakers.iter();
        // llama.cpp reads each text up to its first NUL byte.
        let breakers: Vec<CString> = breakers
            .map(|text| CString::new(text.split('\0').next().unwrap_or_default()).unwrap_or_default())
            .collect();
        let breakers: Vec<*const c_char> = breakers.iter().map(|text| text.as_ptr()).collect();
        let biases: Vec<_> =
            params.logit_bias.iter().map(|&(token, bias)| sys::llama_logit_bias { token, bias }).collect();
        let kinds: Vec<_> = params.samplers.iter().map(|&kind| kind as sys::gvote_shim_sampler_kind).collect();
        let raw = sys::gvote_shim_sampling {
            seed,
            temp: if params.temp < LEAST_TEMP { 0.0 } else { params.temp },
            dynatemp_range: params.dynatemp_range,
            dynatemp_exponent: params.dynatemp_exponent,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            typical_p: params.typical_p,
            top_n_sigma: params.top_n_sigma,
            xtc_probability: params.xtc_probability,
            xtc_threshold: params.xtc_threshold,
            penalty_last_n: last_n(params.repeat_last_n),
            penalty_repeat: params.repeat_penalty,
            penalty_freq: params.frequency_penalty,
            penalty_present: params.presence_penalty,
            dry_multiplier: params.dry.multiplier,
            dry_base: params.dry.base,
            dry_allowed_length: params.dry.allowed_length.max(0),
            dry_penalty_last_n: last_n(params.dry.penalty_last_n),
            dry_sequence_breakers: breakers.as_ptr(),
            n_dry_sequence_breakers: breakers.len(),
            adaptive_target: params.adaptive_target,
            adaptive_decay: params.adaptive_decay,
            mirostat: params.mirostat as i32,
            mirostat_tau: params.mirostat_tau,
            mirostat_eta: params.mirostat_eta,
            samplers: kinds.as_ptr(),
            n_samplers: kinds.len(),
            logit_bias: biases.as_ptr(),
            n_logit_bias: biases.len(),
            ignore_eos: params.ignore_eos,
            grammar: params.grammar.as_ref().map_or(std::ptr::null(), |grammar| grammar.as_ptr()),
        };
        let mut ptr = std::ptr::null_mut();
        // SAFETY: the vocabulary belongs to a live model; the settings and the data they point to outlive the call, and
        // their counts are those of the vectors.
        let reason = unsafe { sys::gvote_shim_sampler_new(model.vocab(), &raw, &raw mut ptr) };
        Self::done(reason)?;
        let ptr = NonNull::new(ptr).ok_or(LlamaError::Memory)?;
        Ok(Self { ptr, seed, _model: model.clone() })
    }

    /// Returns the seed in use: the given one, or a random one.
    pub fn seed(&self) -> u32 {
        self.seed
    }

    /// Chooses the next token from its logits `[n_vocab]` and records the choice.
    ///
    /// # Errors
    /// [`LlamaError::NoLogits`] for an empty slice; [`LlamaError::NotANumber`]; [`LlamaError::Sampling`] if the grammar
    /// leaves no token; [`LlamaError::Memory`].
    pub fn sample(&mut self, logits: &[f32]) -> Result<Token, LlamaError> {
        if logits.is_empty() {
            return Err(LlamaError::NoLogits);
        }
        // llama.cpp sorts the logits, and its result is undefined for NaN.
        let (mut largest, mut comparable) = (f32::NEG_INFINITY, true);
        for &logit in logits {
            comparable &= logit < f32::INFINITY;
            largest = largest.max(logit);
        }
        if !comparable || largest == f32::NEG_INFINITY {
            return Err(LlamaError::NotANumber);
        }
        let mut token = sys::LLAMA_TOKEN_NULL;
        // SAFETY: exclusive access; the pointer and the length belong to one slice.
        let reason =
            unsafe { sys::gvote_shim_sampler_sample(self.ptr.as_ptr(), logits.as_ptr(), logits.len(), &raw mut token) };
        Self::done(reason).map(|()| token)
    }

    /// Records tokens that were not sampled here, such as those of the prompt. The grammar does not see them, because
    /// it applies to the answer only.
    ///
    /// # Errors
    /// [`LlamaError::Memory`].
    pub fn accept(&mut self, tokens: &[Token]) -> Result<(), LlamaError> {
        // SAFETY: exclusive access; the pointer and the length belong to one slice.
        let reason = unsafe { sys::gvote_shim_sampler_accept(self.ptr.as_ptr(), tokens.as_ptr(), tokens.len()) };
        Self::done(reason)
    }

    fn done(reason: *const c_char) -> Result<(), LlamaError> {
        if reason.is_null() {
            return Ok(());
        }
        // SAFETY: the shim returns a static string.
        match unsafe { CStr::from_ptr(reason) } {
            reason if reason == c"out of memory" => Err(LlamaError::Memory),
            reason => Err(LlamaError::Sampling(reason.to_string_lossy().into_owned())),
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // SAFETY: freed once.
        unsafe { sys::gvote_shim_sampler_free(self.ptr.as_ptr()) };
    }
}

impl Model {
    /// Returns an error that explains why a grammar is invalid.
    pub(super) fn check_grammar(&self, grammar: &CStr) -> Result<(), LlamaError> {
        if !self.has_tokenizer() {
            return Err(LlamaError::Grammar("this model has no tokenizer".into()));
        }
        let mut reason = [0u8; REASON_SIZE];
        // SAFETY: a valid vocabulary and string; the buffer's true size is passed.
        let fits = unsafe {
            sys::gvote_shim_grammar_check(self.vocab(), grammar.as_ptr(), reason.as_mut_ptr().cast(), reason.len())
        };
        if fits {
            return Ok(());
        }
        let reason = CStr::from_bytes_until_nul(&reason).map_or("".into(), CStr::to_string_lossy);
        Err(LlamaError::Grammar(reason.lines().next().unwrap_or_default().trim_end().to_owned()))
    }
}
