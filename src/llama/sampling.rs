//! Sampling settings, with llama.cpp's names and defaults.

use std::ffi::CString;
use std::str::FromStr;

use super::{LlamaError, Model, Token};
use crate::sys;

/// A step of the sampler chain, and a name in `--samplers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SamplerKind {
    Penalties = sys::GVOTE_SHIM_SAMPLER_PENALTIES,
    Dry = sys::GVOTE_SHIM_SAMPLER_DRY,
    TopNSigma = sys::GVOTE_SHIM_SAMPLER_TOP_N_SIGMA,
    TopK = sys::GVOTE_SHIM_SAMPLER_TOP_K,
    TypicalP = sys::GVOTE_SHIM_SAMPLER_TYPICAL_P,
    TopP = sys::GVOTE_SHIM_SAMPLER_TOP_P,
    MinP = sys::GVOTE_SHIM_SAMPLER_MIN_P,
    Xtc = sys::GVOTE_SHIM_SAMPLER_XTC,
    Temperature = sys::GVOTE_SHIM_SAMPLER_TEMPERATURE,
    AdaptiveP = sys::GVOTE_SHIM_SAMPLER_ADAPTIVE_P,
}

impl SamplerKind {
    /// All steps: those of the default chain in order, then adaptive-p.
    pub const ALL: &[Self] = &[
        Self::Penalties,
        Self::Dry,
        Self::TopNSigma,
        Self::TopK,
        Self::TypicalP,
        Self::TopP,
        Self::MinP,
        Self::Xtc,
        Self::Temperature,
        Self::AdaptiveP,
    ];

    /// Returns llama.cpp's name, and its letter for `--sampler-seq`.
    fn spelling(self) -> (&'static str, char) {
        match self {
            Self::Penalties => ("penalties", 'e'),
            Self::Dry => ("dry", 'd'),
            Self::TopNSigma => ("top_n_sigma", 's'),
            Self::TopK => ("top_k", 'k'),
            Self::TypicalP => ("typ_p", 'y'),
            Self::TopP => ("top_p", 'p'),
            Self::MinP => ("min_p", 'm'),
            Self::Xtc => ("xtc", 'x'),
            Self::Temperature => ("temperature", 't'),
            Self::AdaptiveP => ("adaptive_p", 'a'),
        }
    }

    /// Returns llama.cpp's name.
    pub fn name(self) -> &'static str {
        self.spelling().0
    }

    /// Returns the step with this letter.
    pub fn from_letter(letter: char) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.spelling().1 == letter)
    }

    /// Returns llama.cpp's letter for `--sampler-seq`.
    pub fn letter(self) -> char {
        self.spelling().1
    }
}

impl FromStr for SamplerKind {
    type Err = LlamaError;

    /// Parses llama.cpp's spellings: `top_k`, `top-k`, `topk`, in any case.
    fn from_str(text: &str) -> Result<Self, LlamaError> {
        let bare = |name: &str| name.to_lowercase().replace(['_', '-'], "");
        let name = match &bare(text)[..] {
            "nucleus" => "topp".into(),
            "temp" => "temperature".into(),
            "typ" => "typp".into(),
            name => name.to_owned(),
        };
        let found = Self::ALL.iter().copied().find(|kind| bare(kind.name()) == name);
        found.ok_or_else(|| LlamaError::SamplerKind(text.into()))
    }
}

/// Version of Mirostat, which replaces the chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Mirostat {
    #[default]
    Off = 0,
    V1 = 1,
    V2 = 2,
}

/// DRY: tokens that would continue a repetition become less likely by `multiplier * base ^ (length - allowed_length)`.
#[derive(Clone, Debug)]
pub struct Dry {
    /// `--dry-multiplier`; 0 = off.
    pub multiplier: f32,
    /// `--dry-base`; 1 or more.
    pub base: f32,
    /// `--dry-allowed-length`: repetitions up to this length are not penalised.
    pub allowed_length: i32,
    /// `--dry-penalty-last-n`: number of last tokens searched for repetitions; 0 = off, -1 = all.
    pub penalty_last_n: i32,
    /// `--dry-sequence-breaker`: texts that end a repetition.
    pub sequence_breakers: Vec<String>,
}

impl Default for Dry {
    fn default() -> Self {
        Self {
            multiplier: 0.0,
            base: 1.75,
            allowed_length: 2,
            penalty_last_n: 64,
            sequence_breakers: ["\n", ":", "\"", "*"].map(Into::into).to_vec(),
        }
    }
}

/// How the next token is sampled; names and defaults as in llama.cpp.
#[derive(Clone, Debug)]
pub struct SamplerParams {
    /// Random seed (`-s`). [`Self::RANDOM`]: each sampler draws its own, see [`super::Sampler::seed`].
    pub seed: u32,
    /// The steps of the chain, in order (`--samplers`). The last step, the draw, is implicit.
    pub samplers: Vec<SamplerKind>,
    /// Temperature (`--temp`). 0 or below always takes the likeliest token that the previous steps leave.
    pub temp: f32,
    /// Largest deviation of the temperature from `temp`, depending on the entropy (`--dynatemp-range`); 0 = off.
    pub dynatemp_range: f32,
    /// Exponent that maps entropy to the dynamic temperature (`--dynatemp-exp`).
    pub dynatemp_exponent: f32,
    /// Keep the k likeliest tokens (`--top-k`); 0 = all.
    pub top_k: i32,
    /// Nucleus sampling (`--top-p`); 1 = off.
    pub top_p: f32,
    /// Smallest probability relative to the likeliest token (`--min-p`); 0 = off.
    pub min_p: f32,
    /// Locally typical sampling (`--typical`); 1 = off.
    pub typical_p: f32,
    /// Keep logits within this many standard deviations of the best (`--top-n-sigma`); 0 or below = off.
    pub top_n_sigma: f32,
    /// Probability that XTC drops the likeliest tokens (`--xtc-probability`); 0 = off.
    pub xtc_probability: f32,
    /// Smallest probability of a token that XTC drops (`--xtc-threshold`); above 0.5 = off.
    pub xtc_threshold: f32,
    /// Penalty for tokens of the last `repeat_last_n` (`--repeat-penalty`); 1 = off.
    pub repeat_penalty: f32,
    /// Number of last tokens that penalties apply to (`--repeat-last-n`); 0 = off, -1 = all.
    pub repeat_last_n: i32,
    /// Subtracted from the logits of tokens that have occurred (`--presence-penalty`); 0 = off.
    pub presence_penalty: f32,
    /// Subtracted for each occurrence of a token (`--frequency-penalty`); 0 = off.
    pub frequency_penalty: f32,
    pub dry: Dry,
    /// Prefer tokens near this probability (`--adaptive-target`); below 0 = off. Needs [`SamplerKind::AdaptiveP`] in
    /// the chain.
    pub adaptive_target: f32,
    /// How slowly the adaptive target adjusts (`--adaptive-decay`), 0 to 0.99.
    pub adaptive_decay: f32,
    /// `--mirostat`.
    pub mirostat: Mirostat,
    /// Target entropy of Mirostat (`--mirostat-ent`).
    pub mirostat_tau: f32,
    /// Learning rate of Mirostat (`--mirostat-lr`).
    pub mirostat_eta: f32,
    /// Biases added to the logits of tokens (`--logit-bias`).
    pub logit_bias: Vec<(Token, f32)>,
    /// Ignore tokens that end the text (`--ignore-eos`).
    pub ignore_eos: bool,
    /// Grammar of the answer in llama.cpp's GBNF; the start rule is `root` (`--grammar`).
    pub grammar: Option<CString>,
}

impl SamplerParams {
    /// llama.cpp's marker for a random seed; never a seed itself.
    pub const RANDOM: u32 = sys::LLAMA_DEFAULT_SEED;

    /// Returns the settings that the model's file recommends (`general.sampling.*`), and llama.cpp's defaults for the
    /// rest.
    pub fn of(model: &Model) -> Self {
        let text = |key: sys::llama_model_meta_key| {
            // SAFETY: a plain query; llama.cpp returns a constant string.
            let key = unsafe { std::ffi::CStr::from_ptr(sys::llama_model_meta_key_str(key)) };
            model.meta(key.to_str().unwrap_or_default())
        };
        fn set<T: FromStr>(to: &mut T, text: Option<String>, fits: impl Fn(&T) -> bool) {
            if let Some(value) = text.and_then(|text| text.trim().parse().ok()).filter(fits) {
                *to = value;
            }
        }
        let finite = |x: &f32| x.is_finite();
        let mut params = Self::default();
        set(&mut params.top_k, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_TOP_K), |_| true);
        set(&mut params.top_p, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_TOP_P), finite);
        set(&mut params.min_p, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_MIN_P), finite);
        set(&mut params.xtc_probability, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_XTC_PROBABILITY), finite);
        set(&mut params.xtc_threshold, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_XTC_THRESHOLD), finite);
        set(&mut params.temp, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_TEMP), finite);
        set(&mut params.repeat_last_n, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_PENALTY_LAST_N), |_| true);
        set(&mut params.repeat_penalty, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_PENALTY_REPEAT), |&x| {
            is_repeat_penalty(x)
        });
        set(&mut params.mirostat_tau, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_MIROSTAT_TAU), finite);
        set(&mut params.mirostat_eta, text(sys::LLAMA_MODEL_META_KEY_SAMPLING_MIROSTAT_ETA), finite);
        params.mirostat = match text(sys::LLAMA_MODEL_META_KEY_SAMPLING_MIROSTAT).as_deref().map(str::trim) {
            Some("1") => Mirostat::V1,
            Some("2") => Mirostat::V2,
            _ => Mirostat::Off,
        };
        if let Some(names) = text(sys::LLAMA_MODEL_META_KEY_SAMPLING_SEQUENCE).filter(|names| !names.is_empty()) {
            // llama.cpp skips unknown names.
            params.samplers = names.split(';').filter_map(|name| name.trim().parse().ok()).collect();
        }
        params
    }

    /// Checks that this model supports the settings.
    ///
    /// # Errors
    /// [`LlamaError::Grammar`], [`LlamaError::NoSuchToken`].
    pub fn check(&self, model: &Model) -> Result<(), LlamaError> {
        let n = model.n_vocab();
        if let Some(&(token, _)) =
            self.logit_bias.iter().find(|&&(token, _)| usize::try_from(token).is_ok_and(|t| t >= n) || token < 0)
        {
            return Err(LlamaError::NoSuchToken { token, n });
        }
        match &self.grammar {
            Some(grammar) => model.check_grammar(grammar),
            None => Ok(()),
        }
    }
}

impl Default for SamplerParams {
    fn default() -> Self {
        Self {
            seed: Self::RANDOM,
            samplers: SamplerKind::ALL.iter().copied().filter(|&kind| kind != SamplerKind::AdaptiveP).collect(),
            temp: 0.8,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            top_n_sigma: -1.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            dry: Dry::default(),
            adaptive_target: -1.0,
            adaptive_decay: 0.9,
            mirostat: Mirostat::Off,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            logit_bias: Vec::new(),
            ignore_eos: false,
            grammar: None,
        }
    }
}

/// Returns true for a valid repetition penalty. llama.cpp multiplies by the penalty and by its inverse.
pub fn is_repeat_penalty(x: f32) -> bool {
    x > 0.0 && x.is_finite() && x.recip().is_finite()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samplers_have_llama_cpps_spellings() {
        use SamplerKind::*;
        for (text, kind) in [
            ("top_k", TopK),
            ("top-k", TopK),
            ("topk", TopK),
            ("TOP_N_SIGMA", TopNSigma),
            ("typ_p", TypicalP),
            ("typ", TypicalP),
            ("nucleus", TopP),
            ("temp", Temperature),
            ("temperature", Temperature),
            ("adaptive-p", AdaptiveP),
        ] {
            assert_eq!(text.parse::<SamplerKind>().unwrap(), kind, "{text}");
        }
        assert!("top".parse::<SamplerKind>().is_err());
    }

    #[test]
    fn the_default_chain_is_llama_cpps() {
        let letters: String = SamplerParams::default().samplers.iter().map(|kind| kind.letter()).collect();
        assert_eq!(letters, "edskypmxt");
        for &kind in SamplerKind::ALL {
            assert_eq!(SamplerKind::from_letter(kind.letter()), Some(kind));
        }
    }
}
