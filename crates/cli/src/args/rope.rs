//! Flags of the rotary position embedding (RoPE), for contexts longer than the training context. Names and meanings are llama.cpp's.

use anyhow::Result;
use clap::Args;
use gvote::llama::{RopeParams, RopeScaling};

use super::{by_name, finite, number};

#[derive(Args)]
#[command(next_help_heading = "RoPE")]
pub struct RopeArgs {
    /// How to scale positions of a longer context to the trained range: none, linear or yarn [default: as the model says]
    #[arg(long, value_name = "MODE", hide_possible_values = true, value_parser = by_name(&RopeScaling::NAMES))]
    rope_scaling: Option<RopeScaling>,

    /// Factor by which the context is extended
    #[arg(long, value_name = "N", value_parser = scale, conflicts_with = "rope_freq_scale")]
    rope_scale: Option<f32>,

    /// Base frequency of RoPE, above 1; 0 = as the model says
    #[arg(long, value_name = "N", default_value_t = 0.0, hide_default_value = true, value_parser = base)]
    rope_freq_base: f32,

    /// Frequency scale of RoPE, the inverse of --rope-scale; 0 = as the model says
    #[arg(long, value_name = "N", default_value_t = 0.0, hide_default_value = true, value_parser = scale_or_0)]
    rope_freq_scale: f32,

    /// YaRN: training context in tokens; 0 = as the model says
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true,
          value_parser = clap::value_parser!(u32).range(..=i64::from(i32::MAX)))]
    yarn_orig_ctx: u32,

    /// YaRN: extrapolation mix factor, up to 1; 0 = interpolate only; negative = as the model says
    #[arg(long, value_name = "X", default_value_t = -1.0, hide_default_value = true, value_parser = up_to_1)]
    yarn_ext_factor: f32,

    /// YaRN: factor on the magnitude of the attention, up to 100; negative = as the model says
    #[arg(long, value_name = "X", default_value_t = -1.0, hide_default_value = true, value_parser = up_to_100)]
    yarn_attn_factor: f32,

    /// YaRN: number of turns in the context below which a dimension is interpolated; negative = as the model says
    #[arg(long, value_name = "X", default_value_t = -1.0, hide_default_value = true, value_parser = finite)]
    yarn_beta_slow: f32,

    /// YaRN: number of turns in the context above which a dimension is extrapolated; negative = as the model says
    #[arg(long, value_name = "X", default_value_t = -1.0, hide_default_value = true, value_parser = finite)]
    yarn_beta_fast: f32,
}

impl RopeArgs {
    pub fn params(&self) -> RopeParams {
        RopeParams {
            scaling: self.rope_scaling,
            freq_base: self.rope_freq_base,
            freq_scale: self.rope_scale.map_or(self.rope_freq_scale, |n| 1.0 / n),
            yarn_orig_ctx: self.yarn_orig_ctx,
            yarn_ext_factor: self.yarn_ext_factor,
            yarn_attn_factor: self.yarn_attn_factor,
            yarn_beta_slow: self.yarn_beta_slow,
            yarn_beta_fast: self.yarn_beta_fast,
        }
    }
}

/// Largest scale: no context is extended by more, and the angles stop being finite numbers beyond it.
const SCALE_MAX: f32 = 1e6;

fn is_scale(x: f32) -> bool {
    (1.0 / SCALE_MAX..=SCALE_MAX).contains(&x)
}

fn scale(text: &str) -> Result<f32, String> {
    number(text, is_scale, "a number from 0.000001 to 1000000")
}

fn scale_or_0(text: &str) -> Result<f32, String> {
    number(text, |x| x == 0.0 || is_scale(x), "0, or a number from 0.000001 to 1000000")
}

fn base(text: &str) -> Result<f32, String> {
    number(text, |x| x == 0.0 || x > 1.0, "0, or a number above 1")
}

fn up_to_1(text: &str) -> Result<f32, String> {
    number(text, |x| x <= 1.0, "a number up to 1")
}

/// Parses the attention factor; the products of keys and queries grow with its square.
fn up_to_100(text: &str) -> Result<f32, String> {
    number(text, |x| x <= 100.0, "a number up to 100")
}
