//! One row of the result: a test under a policy.

use std::time::Duration;

use gvote::llama::{ContextParams, FlashAttention, Model};
use gvote::policy::Kind;
use serde::Serialize;

use super::measure::{Arm, Runs, Vote};
use super::plan::{Test, Work};
use super::stats::{deviation, mean, median};
use crate::args::ModelArgs;

/// Figures that all rows share.
pub struct Facts {
    model_filename: String,
    model_type: String,
    model_size: u64,
    model_n_params: u64,
    n_gpu_layers: i32,
    pub context: ContextParams,
    /// Bytes for KV caches, `--memory`.
    pub memory: Option<usize>,
}

impl Facts {
    pub fn new(model: &Model, args: &ModelArgs, context: ContextParams, memory: Option<usize>) -> Self {
        Self {
            model_filename: args.model.display().to_string(),
            model_type: model.description(),
            model_size: model.size(),
            model_n_params: model.n_params(),
            n_gpu_layers: args.placement.n_gpu_layers,
            context,
            memory,
        }
    }
}

/// All figures of a test under a policy. Names, units and order follow llama-bench where it has the figure.
#[derive(Serialize)]
pub struct Row {
    pub version: &'static str,
    pub llama_cpp_version: &'static str,
    pub model_filename: String,
    pub model_type: String,
    /// Bytes of all tensors.
    pub model_size: u64,
    pub model_n_params: u64,
    pub n_batch: u32,
    pub n_ubatch: u32,
    pub n_threads: i32,
    pub n_threads_batch: i32,
    pub type_k: &'static str,
    pub type_v: &'static str,
    pub n_gpu_layers: i32,
    /// -1: auto, 0: off, 1: on.
    pub flash_attn: i8,
    pub policy: &'static str,
    pub test: String,
    pub n_prompt: usize,
    pub n_gen: usize,
    pub n_depth: usize,
    /// Number of sequences that generate together.
    pub n_parallel: usize,
    pub avg_ns: u64,
    pub stddev_ns: u64,
    /// Tokens per second, of all sequences together.
    pub avg_ts: f64,
    pub stddev_ts: f64,
    /// Tokens per second of each sequence.
    pub avg_ts_sequence: f64,
    /// Tokens per second divided by those under `full`: median over paired repetitions.
    pub ratio_to_full: Option<f64>,
    /// Cells that hold the context of a sequence when the test starts.
    pub cells: usize,
    /// `cells` divided by `n_depth`, 0 to 1.
    pub share_kept: Option<f64>,
    /// Bytes of K and V in the cells, before the vote and after the compaction.
    pub kv_bytes_before: usize,
    pub kv_bytes: usize,
    /// `kv_bytes` in all sequences.
    pub kv_bytes_total: usize,
    /// Number of sequences whose caches fit into `--memory`: see [`fitting`].
    pub sequences_fit: Option<usize>,
    /// Time to read the context.
    pub context_ms: Option<f64>,
    /// Time of probe, scores and choice, and below of the compaction; means over the repetitions.
    pub vote_ms: Option<f64>,
    pub compact_ms: Option<f64>,
    /// Time of vote and compaction as a share of `context_ms`, 0 to 1.
    pub share_of_prefill: Option<f64>,
    /// Growth of the resident set during vote and compaction, in bytes; the maximum of all repetitions.
    pub peak_rss_growth: Option<usize>,
    /// Skipped by serde: CSV has no lists.
    #[serde(skip)]
    pub samples_ns: Vec<u64>,
    #[serde(skip)]
    pub samples_ts: Vec<f64>,
}

impl Row {
    /// Creates a row. `full`: the runs under that policy, if it takes part.
    pub fn new(facts: &Facts, test: Test, arm: &Arm, runs: &Runs, full: Option<&Runs>) -> Self {
        let context = &facts.context;
        let (n_prompt, n_gen) = match test.work {
            Work::Read(n) => (n, 0),
            Work::Generate(n) | Work::Together { tokens: n, .. } => (0, n),
        };
        let sequences = test.work.sequences();
        let rates = |runs: &Runs| -> Vec<f64> {
            runs.times.iter().map(|time| (test.work.tokens() * sequences) as f64 / time.as_secs_f64()).collect()
        };
        let samples_ts = rates(runs);
        let ratio_to_full = full.map(|full| {
            let pairs = samples_ts.iter().zip(rates(full));
            median(&pairs.map(|(mine, full)| mine / full).collect::<Vec<_>>())
        });
        let ns: Vec<f64> = runs.times.iter().map(|time| time.as_nanos() as f64).collect();

        // the votes are seeded, so all repetitions choose the same cells
        let vote = runs.votes.last().map(|vote| &vote.report);
        let voted = vote.filter(|vote| vote.policy != Kind::Full);
        let mean_ms = |of: fn(&Vote) -> Duration| {
            voted.map(|_| mean(&runs.votes.iter().map(|vote| ms(of(vote))).collect::<Vec<_>>()))
        };
        let vote_ms = mean_ms(|vote| vote.report.time() - vote.report.compact_time);
        let compact_ms = mean_ms(|vote| vote.report.compact_time);
        let context_ms = vote.and(arm.context_time()).map(ms);
        let share_of_prefill =
            vote_ms.zip(compact_ms).zip(context_ms).map(|((vote, compact), read)| (vote + compact) / read);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            llama_cpp_version: env!("GVOTE_LLAMA_VERSION"),
            model_filename: facts.model_filename.clone(),
            model_type: facts.model_type.clone(),
            model_size: facts.model_size,
            model_n_params: facts.model_n_params,
            n_batch: context.n_batch,
            n_ubatch: context.n_ubatch,
            n_threads: context.n_threads,
            n_threads_batch: context.n_threads_batch,
            type_k: context.type_k.name(),
            type_v: context.type_v.name(),
            n_gpu_layers: facts.n_gpu_layers,
            flash_attn: match context.flash_attn {
                FlashAttention::Auto => -1,
                FlashAttention::Off => 0,
                FlashAttention::On => 1,
            },
            policy: arm.kind.name(),
            test: test.to_string(),
            n_prompt,
            n_gen,
            n_depth: test.depth,
            n_parallel: sequences,
            avg_ns: mean(&ns) as u64,
            stddev_ns: deviation(&ns) as u64,
            avg_ts: mean(&samples_ts),
            stddev_ts: deviation(&samples_ts),
            avg_ts_sequence: mean(&samples_ts) / sequences as f64,
            ratio_to_full,
            cells: vote.map_or(0, |vote| vote.cells_after),
            share_kept: vote.map(|vote| vote.share()),
            kv_bytes_before: vote.map_or(0, |vote| vote.kv_bytes_before),
            kv_bytes: vote.map_or(0, |vote| vote.kv_bytes_after),
            kv_bytes_total: vote.map_or(0, |vote| vote.kv_bytes_after) * sequences,
            sequences_fit: facts.memory.zip(arm.bytes_per_cell()).map(|(memory, bytes_per_cell)| {
                let cells = vote.map_or(0, |vote| vote.cells_after) + test.work.tokens();
                fitting(memory / bytes_per_cell.max(1), test.depth, cells)
            }),
            context_ms,
            vote_ms,
            compact_ms,
            share_of_prefill,
            peak_rss_growth: voted.and_then(|_| runs.votes.iter().filter_map(|vote| vote.growth).max()),
            samples_ns: runs.times.iter().map(|time| time.as_nanos() as u64).collect(),
            samples_ts,
        }
    }
}

/// Returns the number of sequences that fit into `all` cells, if they read `depth` tokens one after another and then hold `cells` each. The
/// last one needs one cell per token before its vote.
fn fitting(all: usize, depth: usize, cells: usize) -> usize {
    let most = depth.max(cells);
    if all < most { 0 } else { 1 + (all - most) / cells.max(1) }
}

fn ms(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::fitting;

    #[test]
    fn the_last_sequence_needs_all_its_cells_once() {
        assert_eq!(fitting(1000, 100, 100), 10);
        assert_eq!(fitting(1000, 100, 110), 9);
        // 18 hold 50 cells each, and the last one needs 100
        assert_eq!(fitting(1000, 100, 50), 19);
        assert_eq!((fitting(100, 100, 50), fitting(99, 100, 50)), (1, 0));
    }
}
