//! What people and programs are told.

#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use serde::Serialize;

use super::ffi::gvote::gvote_report;

/// A line on stderr, as llama.cpp logs. That nobody reads it is nothing to fail for.
pub fn line(text: &str) {
    let _ = writeln!(std::io::stderr(), "gvote: {text}");
}

/// A vote, as the file of statistics has it.
#[derive(Serialize)]
struct Vote {
    sequence: i32,
    /// Tokens of the sequence, and of its answer so far.
    tokens: i32,
    answer_tokens: i32,
    cells_before: u32,
    cells_after: u32,
    kv_bytes_before: u64,
    kv_bytes_after: u64,
    bytes_aside: u64,
    seconds: f64,
    trial_seconds: f64,
    score_seconds: f64,
    compact_seconds: f64,
    aside_seconds: f64,
}

/// Tells of a vote.
pub fn vote(sequence: i32, start: i32, tokens: i32, seconds: f64, report: &gvote_report, stats: Option<&Path>) {
    let answer_tokens = tokens - start;
    line(&format!(
        "sequence {sequence}: {} -> {} cells ({:.1} -> {:.1} MiB) after {answer_tokens} tokens of the answer, {seconds:.2} s",
        report.cells_before,
        report.cells_after,
        mib(report.kv_bytes_before),
        mib(report.kv_bytes_after)
    ));
    let Some(path) = stats else { return };
    let vote = Vote {
        sequence,
        tokens,
        answer_tokens,
        cells_before: report.cells_before,
        cells_after: report.cells_after,
        kv_bytes_before: report.kv_bytes_before,
        kv_bytes_after: report.kv_bytes_after,
        bytes_aside: report.bytes_aside,
        seconds,
        trial_seconds: report.trial_s,
        score_seconds: report.score_s + report.probe_s,
        compact_seconds: report.compact_s,
        aside_seconds: report.aside_s,
    };
    if let Err(error) = append(path, &vote) {
        line(&format!("GVOTE_STATS={}: {error}", path.display()));
    }
}

fn append(path: &Path, vote: &Vote) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(vote)?;
    text.push(b'\n');
    // at once: several processes may write to it
    OpenOptions::new().create(true).append(true).open(path)?.write_all(&text)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
