//! GSM8K (arXiv 2110.14168): arithmetic word problems, after worked examples.

use std::path::Path;

use super::rows::{self, Row};
use super::{Loaded, Metric, Sample, TaskError};

/// Number of worked examples used for most published scores.
pub const SHOTS: usize = 8;

const MAX_TOKENS: i32 = 256;

const INSTRUCTION: &str = "Problems are solved step by step. \
    The last line of a solution is #### and the result, a number alone.\n\n";

/// Loads the first `limit` problems of a file.
///
/// The context of each is an instruction and the last `shots` problems of the file with their solutions. These are
/// never scored, whatever the limit. An item is `gsm8k` and the index of its line, counted from 0.
///
/// # Errors
/// [`TaskError`] if the file cannot be read or has too few problems. Lines without `question`, or without an `answer`
/// that ends in `####` and a result, are put among the refused ones.
pub fn load(file: &Path, shots: usize, limit: usize) -> Result<Loaded, TaskError> {
    let mut refused = Vec::new();
    let problems = rows::read(file, &mut refused, |row| Problem::of(&row))?;
    if problems.len() <= shots {
        return Err(TaskError::TooFew { path: file.to_owned(), rows: problems.len(), shots });
    }
    let (scored, examples) = problems.split_at(problems.len() - shots);
    let mut context = INSTRUCTION.to_owned();
    for example in examples {
        context += &format!("{} {}\n\n", example.question(), without_sums(&example.answer));
    }
    let sample = |problem: &Problem| Sample {
        suite: "gsm8k".to_owned(),
        task: "gsm8k".to_owned(),
        item: format!("gsm8k {}", problem.index),
        context: context.clone(),
        question: problem.question(),
        answer_prefix: String::new(),
        references: vec![problem.result.clone()],
        metric: Metric::ExactNumber,
        max_tokens: MAX_TOKENS,
        depth: None,
    };
    Ok(Loaded { samples: scored.iter().take(limit).map(sample).collect(), refused })
}

struct Problem {
    index: usize,
    text: String,
    answer: String,
    result: String,
}

impl Problem {
    fn of(row: &Row) -> Result<Self, TaskError> {
        let (text, answer) = (row.text("question")?, row.text("answer")?);
        match answer.rsplit_once("####").map(|(_, result)| result.trim()) {
            Some(result) if result.contains(|c: char| c.is_ascii_digit()) => {
                let [text, answer, result] = [text, answer, result].map(str::to_owned);
                Ok(Self { index: row.index, text, answer, result })
            }
            _ => Err(row.wrong("`answer` does not end in #### and a number")),
        }
    }

    fn question(&self) -> String {
        format!("Question: {}\nAnswer:", self.text)
    }
}

/// Removes calculator annotations such as `<<16-3-4=9>>` from a solution.
fn without_sums(answer: &str) -> String {
    let mut plain = String::new();
    let mut rest = answer;
    while let Some((before, (_, after))) =
        rest.split_once("<<").and_then(|(before, from)| Some((before, from.split_once(">>")?)))
    {
        plain += before;
        rest = after;
    }
    plain + rest
}
