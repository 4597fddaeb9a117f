//! The report of a vote.

use std::time::Duration;

use serde::Serialize;

use crate::policy::{Bound, Kept, Kind, Ragged, Selection};

/// Result of a compression, or the reason why it left the cache unchanged.
#[derive(Clone, Debug, Serialize)]
pub struct CompressReport {
    pub policy: Kind,
    /// Cells of the sequence before and after the vote; the mean over the heads if their budgets differ.
    pub cells_before: usize,
    pub cells_after: usize,
    /// Bytes of K and V in these cells. A mask ([`crate::policy::Params::exact`]) frees no bytes, whatever `cells_after` says.
    pub kv_bytes_before: usize,
    pub kv_bytes_after: usize,
    /// Attention mass that was given up, as the policy estimates it; 0 to 1.
    pub lost_mass: Option<f32>,
    /// The rule that set the number of cells.
    pub bound: Bound,
    pub ragged: Option<Ragged>,
    /// Numbers of cells that the trial tested, each with its mean KL divergence from the full cache, less that caused by rounding, in nats
    /// a token.
    pub tried: Vec<(usize, f32)>,
    /// Mean KL divergence that rounding alone caused in the trial, in nats a token.
    pub rounding: f32,
    /// Bytes of ggml's compute buffers during scoring; they are freed afterwards.
    pub compute_bytes: usize,
    /// Rows per head that came back from the archive before the vote.
    pub rows_back: usize,
    /// Time of recall: bringing rows back, and choosing among them where they did not all fit.
    #[serde(serialize_with = "seconds")]
    pub recall_time: Duration,
    #[serde(serialize_with = "seconds")]
    pub replay_time: Duration,
    /// Time of making queries: synthetic ones, and those of the newest tokens where these had to be computed again.
    #[serde(serialize_with = "seconds")]
    pub probe_time: Duration,
    #[serde(serialize_with = "seconds")]
    pub score_time: Duration,
    #[serde(serialize_with = "seconds")]
    pub select_time: Duration,
    #[serde(serialize_with = "seconds")]
    pub trial_time: Duration,
    /// Time of copying rows from the cache to the archive.
    #[serde(serialize_with = "seconds")]
    pub aside_time: Duration,
    #[serde(serialize_with = "seconds")]
    pub compact_time: Duration,
}

impl CompressReport {
    /// Total time of the compression.
    pub fn time(&self) -> Duration {
        let choice = self.probe_time + self.score_time + self.select_time + self.trial_time;
        self.recall_time + self.replay_time + choice + self.aside_time + self.compact_time
    }

    /// Share of the cells that were kept, 0 to 1.
    pub fn share(&self) -> f64 {
        self.cells_after as f64 / self.cells_before.max(1) as f64
    }
}

fn seconds<S: serde::Serializer>(time: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_f64(time.as_secs_f64())
}

impl CompressReport {
    /// Records the selection. `bytes_per_cell`: of K and V.
    pub(super) fn note(&mut self, selection: &Selection, bytes_per_cell: usize) {
        self.cells_after = selection.n_cells();
        self.kv_bytes_after = match selection.kept {
            // a mask frees nothing
            Kept::Ragged { .. } => self.kv_bytes_before,
            _ => selection.n_cells() * bytes_per_cell,
        };
        self.lost_mass = selection.lost_mass;
        self.bound = selection.bound;
        self.ragged = selection.ragged;
    }

    /// Records a recall that preceded the vote: the sequence had `cells` cells before `rows` rows of each head came back, which took
    /// `time`.
    pub(crate) fn note_recall(&mut self, cells: usize, rows: usize, time: Duration) {
        self.kv_bytes_before = self.kv_bytes_before / self.cells_before.max(1) * cells;
        (self.cells_before, self.rows_back, self.recall_time) = (cells, rows, time);
    }

    pub(crate) fn untouched(policy: Kind, n: usize, bytes_per_cell: usize) -> Self {
        Self {
            policy,
            cells_before: n,
            cells_after: n,
            kv_bytes_before: n * bytes_per_cell,
            kv_bytes_after: n * bytes_per_cell,
            lost_mass: Some(0.0),
            bound: Bound::All,
            ragged: None,
            tried: Vec::new(),
            rounding: 0.0,
            compute_bytes: 0,
            rows_back: 0,
            recall_time: Duration::ZERO,
            replay_time: Duration::ZERO,
            probe_time: Duration::ZERO,
            score_time: Duration::ZERO,
            select_time: Duration::ZERO,
            trial_time: Duration::ZERO,
            aside_time: Duration::ZERO,
            compact_time: Duration::ZERO,
        }
    }
}
