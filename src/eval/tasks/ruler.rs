//! RULER (arXiv 2404.06654): needles, variable tracking and word counts, from the files of its own generator.

use std::path::Path;

use super::rows::{self, Row};
use super::{Metric, Sample, TaskError};

/// The samples of `<folder>/<task>.jsonl` for each of the tasks, in order. The suite is named after the folder, such as
/// `ruler/4096`; an item is the task and the index of its line, counted from 0.
///
/// # Errors
/// [`TaskError`]: a file that cannot be read, or a line without `input`, `outputs`, `answer_prefix` or a question.
pub fn load(folder: &Path, tasks: &[String]) -> Result<Vec<Sample>, TaskError> {
    let whole = folder.canonicalize().map_err(|error| TaskError::Io(folder.to_owned(), error))?;
    let suite = format!("ruler/{}", whole.file_name().unwrap_or_default().display());
    let mut samples = Vec::new();
    for task in tasks {
        for row in rows::read(&folder.join(format!("{task}.jsonl")))? {
            samples.push(sample(&suite, task, &row)?);
        }
    }
    Ok(samples)
}

/// The tasks that a folder has files for, by name.
///
/// # Errors
/// [`TaskError::Io`].
pub fn tasks_in(folder: &Path) -> Result<Vec<String>, TaskError> {
    let at = |error| TaskError::Io(folder.to_owned(), error);
    let mut tasks = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(at)? {
        let path = entry.map_err(at)?.path();
        if path.extension().is_some_and(|e| e == "jsonl") {
            tasks.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    tasks.sort();
    Ok(tasks)
}

fn sample(suite: &str, task: &str, row: &Row) -> Result<Sample, TaskError> {
    let input = row.text("input")?;
    let start = question_start(task);
    let (context, question) = split(input, start)
        .ok_or_else(|| row.wrong(format!("no context and then a line that starts with {start:?} in `input`")))?;
    let max_tokens = max_tokens(task);
    Ok(Sample {
        suite: suite.to_owned(),
        task: task.to_owned(),
        item: format!("{task} {}", row.index),
        context: context.to_owned(),
        question: question.to_owned(),
        answer_prefix: row.text("answer_prefix")?.to_owned(),
        references: row.texts("outputs")?,
        metric: Metric::ShareFound,
        max_tokens,
        depth: depth(row, max_tokens),
    })
}

/// How the line of the question starts (`template` in RULER's `scripts/data/synthetic/constants.py`).
fn question_start(task: &str) -> &'static str {
    if matches!(task, "vt" | "fwe") { "Question:" } else { "What " }
}

/// Parts a prompt before the last line that starts with `start`; neither part is empty.
fn split<'a>(input: &'a str, start: &str) -> Option<(&'a str, &'a str)> {
    let line_end = input.rfind(&format!("\n{start}"))?;
    Some(input.split_at(line_end + 1))
}

/// Tokens that an answer may have (`tokens_to_generate` in RULER's `constants.py`).
fn max_tokens(task: &str) -> i32 {
    match task {
        "vt" => 30,
        "fwe" => 50,
        _ => 128,
    }
}

/// Where the needle lies in the prompt; of several needles, one of them. `token_position_answer` is a token of the prompt;
/// `length` counts the tokens of the prompt and those that the answer may have.
fn depth(row: &Row, max_tokens: i32) -> Option<f64> {
    let tokens = row.number("length")? - f64::from(max_tokens);
    let place = row.number("token_position_answer")?;
    (tokens > 0.0).then(|| (place / tokens).clamp(0.0, 1.0))
}
