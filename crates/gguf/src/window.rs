//! Finds the layers with a sliding window.

use serde_json::Value;

use super::info::Keys;
use super::walk::Fault;

/// Architectures whose sliding-window layers follow a default pattern (others list the layers). Each row has the
/// period, whether the full-attention layer comes first instead of last in it, and the names. From the calls of
/// `load_swa_pattern()` in `src/models`.
#[rustfmt::skip]
const WINDOWED: &[(usize, bool, &[&str])] = &[
    (2, false, &["gemma2", "gpt-oss"]),
    (4, false, &["afmoe", "cohere2", "exaone-moe", "exaone4", "limite", "llama4", "mellum", "muse-glimmer", "olmo2"]),
    (4, true, &["cohere2moe", "laguna", "smallthinker"]),
    (5, false, &["gemma3n"]),
    (6, false, &["gemma3"]),
    (8, false, &["plamo3"]),
];

/// Longest window, in tokens: llama.cpp adds to the length in 32 bits.
const WINDOW_MAX: u64 = 1 << 30;

/// Returns the length of the sliding window in tokens, and whether each layer uses it. Many files give a window that
/// llama.cpp ignores (phi3, qwen2): it applies only if the architecture has a default pattern or the file lists the
/// layers.
pub(super) fn window(keys: &Keys, n_layer: usize) -> Result<(Option<usize>, Vec<bool>), Fault> {
    const PATTERN: &str = "attention.sliding_window_pattern";
    let name = keys.architecture;
    let known = WINDOWED.iter().find(|row| row.2.contains(&name));
    let default = match name {
        "exaone4" if n_layer != 64 => return Ok((None, vec![false; n_layer])), // only the 32B has a window
        "gemma2" | "exaone4" => 4096,
        "llama4" => 8192,
        _ => 0,
    };
    let tokens = keys.number("attention.sliding_window", WINDOW_MAX)?.unwrap_or(default);
    if tokens == 0 || (known.is_none() && keys.get(PATTERN).is_none()) {
        return Ok((None, vec![false; n_layer]));
    }
    let mut windowed: Vec<_> = if let Some(Value::Array(layers)) = keys.get(PATTERN) {
        layers.iter().map(|w| w.as_bool().unwrap_or(w.as_u64() != Some(0))).collect()
    } else {
        let &(period, full_first, _) = known.unwrap_or(&(0, false, &[]));
        let period = keys.dim(PATTERN)?.unwrap_or(period);
        let full = if full_first { 0 } else { period.saturating_sub(1) };
        // llama_hparams::set_swa_pattern()
        (0..n_layer).map(|il| period == 0 || il % period != full).collect()
    };
    windowed.resize(n_layer, false);
    Ok((Some(tokens as usize), windowed))
}
