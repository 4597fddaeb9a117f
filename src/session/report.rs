//! Reports of a session's operations.

use std::time::Duration;

use serde::Serialize;

use super::{AnswerVote, ExpandReport};
use crate::vote::CompressReport;

/// Report of a prefill.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PrefillReport {
    pub tokens: usize,
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    /// Rows that came back before the prompt was read. Their time is part of `time`.
    pub expanded: ExpandReport,
    pub squeezes: Squeezes,
}

/// Votes that freed cells to stay within the cache size.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Squeezes {
    /// Number of votes.
    pub count: usize,
    /// Largest share of the attention mass that one vote gave up, as estimated by the policy; 0 to 1.
    pub lost_mass: Option<f32>,
    /// Duration of the votes; part of the `time` of the report that contains this.
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
}

impl Squeezes {
    pub(super) fn add(&mut self, report: &CompressReport) {
        self.append(&Self { count: 1, time: report.time(), lost_mass: report.lost_mass });
    }

    pub(super) fn append(&mut self, more: &Self) {
        self.count += more.count;
        self.time += more.time;
        if let Some(lost) = more.lost_mass {
            self.lost_mass = Some(self.lost_mass.map_or(lost, |most| most.max(lost)));
        }
    }
}

pub(super) fn seconds<S: serde::Serializer>(time: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_f64(time.as_secs_f64())
}

/// Reason why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// The model ended its turn.
    EndOfGeneration,
    /// The requested number of tokens was reached.
    Limit,
    /// No cell is free and none can be freed, or the sequence has reached the context length of the model's training.
    ContextFull,
    /// A stop text would have followed. Set by callers that look for stop texts; [`super::Session::generate`] does not.
    ReversePrompt,
    /// The caller or the cancel flag stopped the generation.
    Cancelled,
}

/// Report of a generation.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateReport {
    pub tokens: usize,
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    pub stop: Stop,
    /// Vote within the answer, if there was one. Its time is part of `time`.
    #[serde(skip)]
    pub vote: Option<AnswerVote>,
    /// Error of a failed vote within the answer, which continued with the present cells.
    #[serde(skip)]
    pub unvoted: Option<String>,
    pub squeezes: Squeezes,
    /// How often the cells were chosen anew, and how long that took.
    pub renewals: Squeezes,
}
