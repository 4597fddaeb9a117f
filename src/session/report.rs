//! What the steps of a session did.

use std::time::Duration;

use serde::Serialize;

/// What a prefill did.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PrefillReport {
    pub tokens: usize,
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
}

fn seconds<S: serde::Serializer>(time: &Duration, s: S) -> Result<S::Ok, S::Error> {
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
    /// No free cell is left.
    ContextFull,
    /// The caller, or the cancel flag, said so.
    Cancelled,
}

/// What a generation did.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct GenerateReport {
    pub tokens: usize,
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    pub stop: Stop,
}
