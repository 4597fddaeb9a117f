//! Tasks: contexts, questions about them, and metrics for the answers.
//!
//! Each benchmark has a module that turns its files into [`Sample`]s; [`needle`] needs no files. A prompt may exceed
//! the caller's context, which the caller has to handle.

pub mod gsm8k;
pub mod longbench;
pub mod needle;
mod rows;
pub mod ruler;
#[cfg(test)]
mod tests;
pub mod turns;

use std::io;
use std::path::PathBuf;

use super::metrics::{exact_number, rouge_l, share_found};

/// One question about a context.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Name of the suite, such as `ruler/4096`, `gsm8k`, `longbench`, `needle`.
    pub suite: String,
    /// Name of the task, such as `niah_single_1`.
    pub task: String,
    /// Name of the sample, unique within its suite.
    pub item: String,
    /// The part that may be compressed before the question is known. Ends in white space.
    pub context: String,
    pub question: String,
    /// Start of the assistant's turn. May begin with a space, so that it can also follow the user's text directly.
    pub answer_prefix: String,
    /// Correct answers; at least one.
    pub references: Vec<String>,
    pub metric: Metric,
    /// Maximum number of tokens in the answer.
    pub max_tokens: i32,
    /// Position of the needle in the context, 0 (start) to 1 (end); None if there is none or its position is unknown.
    pub depth: Option<f64>,
}

impl Sample {
    /// Returns the kind of request.
    pub fn family(&self) -> &str {
        match (self.suite.as_str(), self.task.as_str()) {
            ("gsm8k", _) => "few-shot",
            ("longbench", _) => "summary",
            (_, task) if task.starts_with("niah") => "needle",
            (suite, task) if suite.starts_with("ruler") => task,
            (suite, _) => suite,
        }
    }

    /// Returns the user's complete turn: context and question.
    pub fn full_turn(&self) -> String {
        format!("{}{}", self.context, self.question)
    }

    /// Returns the score of an answer (without the prefix), 0 to 1.
    pub fn score(&self, answer: &str) -> f64 {
        self.metric.score(answer, &self.references)
    }
}

/// Contents of the files of a task.
#[derive(Debug, Default)]
pub struct Loaded {
    pub samples: Vec<Sample>,
    /// Errors of the rows that are left out, each with file and line.
    pub refused: Vec<TaskError>,
}

/// How an answer is compared with the references.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Share of the references that the answer contains: [`share_found`].
    ShareFound,
    /// 1 if the answer contains a reference, otherwise 0.
    AnyFound,
    /// 1 if the answer ends in the number of a reference, otherwise 0: [`exact_number`].
    ExactNumber,
    /// The best F-measure of the longest common subsequence of words: [`rouge_l`].
    RougeL,
}

impl Metric {
    /// Returns the score of an answer, 0 to 1.
    pub fn score(self, answer: &str, references: &[String]) -> f64 {
        match self {
            Self::ShareFound => share_found(answer, references),
            Self::AnyFound => f64::from(share_found(answer, references) > 0.0),
            Self::ExactNumber => f64::from(references.iter().any(|reference| exact_number(answer, reference))),
            Self::RougeL => rouge_l(answer, references),
        }
    }
}

/// Why the file of a task cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    #[error("{path}:{line}: {what}")]
    Line {
        path: PathBuf,
        /// Line number, counted from 1.
        line: usize,
        what: String,
    },
    #[error("{0}: no source files (--code)")]
    NoCode(PathBuf),
    #[error("{path}: {rows} problems (--gsm8k) are too few for {shots} worked examples and one to score")]
    TooFew { path: PathBuf, rows: usize, shots: usize },
}
