//! LongBench (arXiv 2308.14508): multi_news, a summary of several articles.

use std::path::Path;

use super::rows::{self, Row};
use super::{Loaded, Metric, Sample, TaskError};

/// LongBench's own limit for this task (`dataset2maxlen.json`).
const MAX_TOKENS: i32 = 512;

const INSTRUCTION: &str = "Below are several news articles about the same events.\n\n";

const REQUEST: &str = "Write a one-page summary of all of these articles together.";

/// Loads the samples of multi_news. An item is `multi_news` and the index of its line, counted from 0.
///
/// # Errors
/// [`TaskError::Io`]. Lines without `context` or `answers` are put among the refused ones.
pub fn load(file: &Path) -> Result<Loaded, TaskError> {
    let mut refused = Vec::new();
    let samples = rows::read(file, &mut refused, |row| sample(&row))?;
    Ok(Loaded { samples, refused })
}

fn sample(row: &Row) -> Result<Sample, TaskError> {
    Ok(Sample {
        suite: "longbench".to_owned(),
        task: "multi_news".to_owned(),
        item: format!("multi_news {}", row.index),
        context: format!("{INSTRUCTION}{}\n\n", row.text("context")?.trim_end()),
        question: REQUEST.to_owned(),
        answer_prefix: String::new(),
        references: row.texts("answers")?,
        metric: Metric::RougeL,
        max_tokens: MAX_TOKENS,
        depth: None,
    })
}
