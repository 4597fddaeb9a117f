//! Arithmetic of a plan, based on llama.cpp's own sizes.

use anyhow::Result;
use gvote::SessionParams;
use gvote::llama::{Buffers, CacheType, ContextParams, Device, LlamaError, Memory, Simulation};
use gvote_gguf::ModelInfo;
use serde::Serialize;

/// llama.cpp rounds the cells of a cache up to a multiple of this (`GGML_PAD` in `llama-context.cpp`).
const CELLS_STEP: usize = 256;
/// Upper limit for the cells of a plan.
pub const CELLS_MAX: usize = 1 << 24;
/// Maximum number of steps when searching for the most cells that fit; interpolation needs three or four.
const SEARCH_MAX: usize = 24;

/// Memory that one cache type needs; sizes are in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Need {
    #[serde(rename = "type")]
    pub name: &'static str,
    #[serde(skip)]
    pub cache_type: CacheType,
    pub kv_cache: usize,
    pub compute: usize,
    /// Total with the weights, in the memory that the limit applies to: that of GPUs and workers if layers are placed there.
    pub total: usize,
    /// Additional bytes in the machine's memory, if layers are placed on a GPU or a worker.
    pub host: usize,
    pub fits: Option<bool>,
    /// Largest -c within the limit.
    pub most_cells: Option<usize>,
}

/// Computes the sizes of contexts for sessions of one kind.
pub struct Sizes<'a> {
    pub info: &'a ModelInfo,
    pub simulation: &'a Simulation,
    pub session: SessionParams,
}

impl Sizes<'_> {
    fn context(&self, cache_type: CacheType, cells: usize) -> ContextParams {
        let mut session = self.session.clone();
        (session.context.type_k, session.context.type_v) = (cache_type, cache_type);
        session.with_spare_cells(cells)
    }

    pub fn memory(&self, cache_type: CacheType, cells: usize) -> Result<Memory, LlamaError> {
        self.simulation.memory(&self.context(cache_type, cells))
    }

    /// Returns the buffers of such a context on each device that holds any.
    pub fn devices(&self, cache_type: CacheType, cells: usize) -> Result<Vec<(Device, Buffers)>, LlamaError> {
        self.simulation.devices(&self.context(cache_type, cells))
    }

    /// Returns the memory for `cells` cells of a type, and how many cells would fit into `limit` bytes.
    pub fn need(&self, cache_type: CacheType, cells: usize, limit: Option<usize>) -> Result<Need> {
        let memory = self.memory(cache_type, cells)?;
        let total = limited(&memory);
        let most = match limit {
            Some(limit) => {
                let twice = self.memory(cache_type, 2 * cells)?;
                let cache = |memory: Memory| memory.host.cache + memory.device.cache;
                let grown = cache(twice).saturating_sub(cache(memory));
                // the cache of a sliding window also grows until it is full
                let lasting = match self.info.kv_bytes_per_cell(cache_type, cache_type) {
                    0 => usize::MAX,
                    n => n,
                };
                Some(self.most_cells(cache_type, limit, lasting.min(grown / cells))?)
            }
            None => None,
        };
        Ok(Need {
            name: cache_type.name(),
            cache_type,
            kv_cache: memory.host.cache + memory.device.cache,
            compute: memory.host.compute + memory.device.compute,
            total,
            host: if memory.device.total() > 0 { memory.host.total() } else { 0 },
            fits: limit.map(|limit| total <= limit),
            most_cells: most,
        })
    }

    /// Returns the largest -c whose buffers take at most `limit` bytes; 0 if there is none. Each cell takes at least `per_cell` bytes.
    fn most_cells(&self, cache_type: CacheType, limit: usize, per_cell: usize) -> Result<usize, LlamaError> {
        let spare = self.context(cache_type, 0).n_ctx as usize;
        // in steps of llama.cpp's allocation, less the spare cells that the session takes
        let cells = |steps: usize| steps * CELLS_STEP - spare;
        let bytes = |steps| self.memory(cache_type, cells(steps)).map(|memory| limited(&memory));
        let bound = limit.checked_div(per_cell).unwrap_or(CELLS_MAX).min(CELLS_MAX) / CELLS_STEP;
        let low = spare / CELLS_STEP + 1;
        let (mut low, mut high) = (low, bound.max(low) + 1);
        let (mut at_low, mut at_high) = (bytes(low)?, bytes(high)?);
        if at_low > limit {
            return Ok(0);
        }
        if at_high <= limit {
            return Ok(cells(high));
        }
        for step in 0..SEARCH_MAX {
            if high - low <= 1 {
                break;
            }
            // sizes are nearly linear in the cells; the occasional halving ends the search where they are not
            let share = (limit - at_low) as f64 / (at_high - at_low).max(1) as f64;
            let guess = if step % 4 == 3 { high.midpoint(low) } else { low + ((high - low) as f64 * share) as usize };
            let guess = guess.clamp(low + 1, high - 1);
            let size = bytes(guess)?;
            if size <= limit { (low, at_low) = (guess, size) } else { (high, at_high) = (guess, size) }
        }
        Ok(cells(low))
    }
}

/// Returns the bytes that a limit applies to.
fn limited(memory: &Memory) -> usize {
    if memory.device.total() > 0 { memory.device.total() } else { memory.host.total() }
}

/// Returns the bytes that a vote takes while it runs, as measured in `docs/performance.md`: the logits of a batch of the draft (f32) and of
/// the draft itself (f16), scores and probabilities, and the working memory of each thread.
pub fn vote_bytes(draft: usize, n_vocab: usize, heads: usize, cells: usize, threads: usize) -> usize {
    const A_LOGIT: usize = 4 + 2;
    const A_HEAD_AND_CELL: usize = 6;
    const A_THREAD_AND_CELL: usize = 128;
    draft * n_vocab * A_LOGIT + heads * cells * A_HEAD_AND_CELL + threads * cells * A_THREAD_AND_CELL
}

/// Parses a number of bytes such as `8G`, `512M`, `1.5GiB`. A bare number is bytes, and K is 1,024 bytes.
pub fn size(text: &str) -> Result<usize, String> {
    let wrong = || "use a number with K, M, G or T, such as 8G".to_owned();
    let upper = text.trim().to_ascii_uppercase();
    let digits = upper.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match upper[digits.len()..].trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| wrong())?;
    let bytes = number * f64::from(1_u32 << (shift % 32)) * if shift >= 32 { 4_294_967_296.0 } else { 1.0 };
    if bytes.is_finite() && bytes >= 1.0 && bytes < (1_u64 << 60) as f64 { Ok(bytes as usize) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let sizes = ["8G", "8g", "8GiB", "8GB", "1.5M", "512K", "100", "2T", " 1 G"].map(|text| size(text).unwrap());
        let g = 1_usize << 30;
        assert_eq!(sizes, [8 * g, 8 * g, 8 * g, 8 * g, 3 << 19, 1 << 19, 100, 2048 * g, g]);
        for text in ["", "G", "8X", "-8G", "0", "nan", "1e99G", "inf"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
