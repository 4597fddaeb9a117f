//! RULER (arXiv 2404.06654): needles, variable tracking, word counts and questions about documents, from the files of
//! RULER's own generator.

use std::path::Path;

use super::rows::{self, Row};
use super::{Loaded, Metric, Sample, TaskError};

/// Loads the samples of `<folder>/<task>.jsonl` for each of the tasks, in order. The suite is named after the folder,
/// such as `ruler/4096`; an item is the task and the index of its line, counted from 0.
///
/// # Errors
/// [`TaskError::Io`]. Lines without `input`, `outputs`, `answer_prefix` or a question are put among the refused ones.
pub fn load(folder: &Path, tasks: &[String]) -> Result<Loaded, TaskError> {
    let whole = folder.canonicalize().map_err(|error| TaskError::Io(folder.to_owned(), error))?;
    let suite = format!("ruler/{}", whole.file_name().unwrap_or_default().display());
    let mut loaded = Loaded::default();
    for task in tasks {
        let file = folder.join(format!("{task}.jsonl"));
        loaded.samples.extend(rows::read(&file, &mut loaded.refused, |row| sample(&suite, task, &row))?);
    }
    Ok(loaded)
}

/// Returns the tasks that a folder has files for, sorted by name.
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
    let (context, question) = split(task, input).map_err(|what| row.wrong(what))?;
    let max_tokens = max_tokens(task);
    Ok(Sample {
        suite: suite.to_owned(),
        task: task.to_owned(),
        item: format!("{task} {}", row.index),
        context: context.to_owned(),
        question: question.to_owned(),
        answer_prefix: row.text("answer_prefix")?.to_owned(),
        references: row.texts("outputs")?,
        // One of several spellings suffices (`string_match_part` in RULER's `scripts/eval/synthetic/constants.py`).
        metric: if is_qa(task) { Metric::AnyFound } else { Metric::ShareFound },
        max_tokens,
        depth: depth(row, max_tokens),
    })
}

fn is_qa(task: &str) -> bool {
    task.starts_with("qa")
}

/// Splits a prompt before the question (`template` in RULER's `scripts/data/synthetic/constants.py`).
///
/// The question is the last line that starts like the task's questions; in qa, it includes the preceding instruction.
/// Neither part is empty.
fn split<'a>(task: &str, input: &'a str) -> Result<(&'a str, &'a str), String> {
    /// The instruction, which occurs before the documents and again before the question.
    const INSTRUCTION: &str = "Answer the question based on the given documents.";
    let start = if task.starts_with("niah") { "What " } else { "Question:" };
    let line = |start: &str, text: &str| text.rfind(&format!("\n{start}")).map(|end_of_last| end_of_last + 1);
    let mut at = line(start, input)
        .ok_or_else(|| format!("no context and then a line that starts with {start:?} in `input`"))?;
    if is_qa(task)
        && let Some(instruction) = line(INSTRUCTION, &input[..at])
        && !input[instruction..at].trim_end().contains('\n')
    {
        at = instruction;
    }
    let (context, question) = input.split_at(at);
    if context.trim().is_empty() {
        Err("no context before the question in `input`".to_owned())
    } else {
        Ok((context, question))
    }
}

/// Maximum number of tokens in an answer (`tokens_to_generate` in RULER's `constants.py`).
fn max_tokens(task: &str) -> i32 {
    match task {
        "vt" => 30,
        "cwe" => 120,
        "fwe" => 50,
        task if is_qa(task) => 32,
        _ => 128,
    }
}

/// Returns the position of the needle in the prompt; with several needles, of one of them. `token_position_answer` is
/// the index of a token of the prompt; `length` counts the tokens of the prompt plus the maximum of the answer.
fn depth(row: &Row, max_tokens: i32) -> Option<f64> {
    let tokens = row.number("length")? - f64::from(max_tokens);
    let place = row.number("token_position_answer")?;
    (tokens > 0.0).then(|| (place / tokens).clamp(0.0, 1.0))
}
