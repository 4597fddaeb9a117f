//! Parameters of the rotary position embedding.

#![forbid(unsafe_code)]

use super::{LlamaError, Model};
use crate::sys;

/// RoPE settings that override the model's; names as in llama.cpp.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParams {
    /// Scaling method; None: the model's.
    pub scaling: Option<RopeScaling>,
    /// 0: the model's value; the same holds for `freq_scale` and `yarn_orig_ctx`.
    pub freq_base: f32,
    /// The reciprocal of the factor by which the context grows.
    pub freq_scale: f32,
    pub yarn_orig_ctx: u32,
    /// Negative: the model's value; the same holds for the other factors.
    pub yarn_ext_factor: f32,
    pub yarn_attn_factor: f32,
    pub yarn_beta_slow: f32,
    pub yarn_beta_fast: f32,
}

impl Default for RopeParams {
    fn default() -> Self {
        Self {
            scaling: None,
            freq_base: 0.0,
            freq_scale: 0.0,
            yarn_orig_ctx: 0,
            yarn_ext_factor: -1.0,
            yarn_attn_factor: -1.0,
            yarn_beta_slow: -1.0,
            yarn_beta_fast: -1.0,
        }
    }
}

/// How the positions of a context longer than the training length are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeScaling {
    None,
    Linear,
    Yarn,
}

impl RopeScaling {
    /// Methods with llama.cpp's names.
    pub const NAMES: [(&'static str, Self); 3] = [("none", Self::None), ("linear", Self::Linear), ("yarn", Self::Yarn)];

    fn raw(self) -> sys::llama_rope_scaling_type {
        match self {
            Self::None => sys::LLAMA_ROPE_SCALING_TYPE_NONE,
            Self::Linear => sys::LLAMA_ROPE_SCALING_TYPE_LINEAR,
            Self::Yarn => sys::LLAMA_ROPE_SCALING_TYPE_YARN,
        }
    }
}

impl RopeParams {
    /// Checks that the stretched context length, which llama.cpp computes for YaRN from the training length, fits in an
    /// i32.
    pub(super) fn check(&self, model: &Model) -> Result<(), LlamaError> {
        let orig = f64::from(self.yarn_orig_ctx).max(model.n_ctx_train() as f64);
        let stretched = if self.freq_scale > 0.0 { orig / f64::from(self.freq_scale) } else { orig };
        if stretched > f64::from(i32::MAX) { Err(LlamaError::Rope) } else { Ok(()) }
    }

    pub(super) fn apply(&self, raw: &mut sys::llama_context_params) {
        raw.rope_scaling_type = self.scaling.map_or(sys::LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED, RopeScaling::raw);
        raw.rope_freq_base = self.freq_base;
        raw.rope_freq_scale = self.freq_scale;
        raw.yarn_orig_ctx = self.yarn_orig_ctx;
        raw.yarn_ext_factor = self.yarn_ext_factor;
        raw.yarn_attn_factor = self.yarn_attn_factor;
        raw.yarn_beta_slow = self.yarn_beta_slow;
        raw.yarn_beta_fast = self.yarn_beta_fast;
    }
}
