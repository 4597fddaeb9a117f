//! What the steps of a session did.

use std::time::Duration;

use serde::Serialize;

use super::{AnswerVote, ExpandReport};
use crate::vote::CompressReport;

/// What a prefill did.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PrefillReport {
    pub tokens: usize,
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    /// What came back before it was read; its time is part of the whole.
    pub expanded: ExpandReport,
    pub squeezes: Squeezes,
}

/// What it took to stay within the cells that there are.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Squeezes {
    /// How often cells were freed to go on.
    pub count: usize,
    /// The largest share of the attention mass that one of them gave up, as the policy estimates it; 0 to 1.
    pub lost_mass: Option<f32>,
    /// Of the time that is told beside this.
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

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// The model ended its turn.
    EndOfGeneration,
    /// As many tokens as asked for.
    Limit,
    /// No free cell is left and none can be spared, or the model has come as far as it was trained for.
    ContextFull,
    /// A text that ends answers would have come: for callers that look for one, see [`super::Session::generate`].
    ReversePrompt,
    /// The caller, or the cancel flag, said so.
    Cancelled,
}

/// What a generation did.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateReport {
    pub tokens: usize,
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    pub stop: Stop,
    /// The vote on it, where there was one after it had begun. Its time is part of the whole.
    #[serde(skip)]
    pub vote: Option<AnswerVote>,
    /// Why a vote on it failed. It went on with the cells that there were.
    #[serde(skip)]
    pub unvoted: Option<String>,
    pub squeezes: Squeezes,
    /// How often the cells were chosen anew, and what that took.
    pub renewals: Squeezes,
}
