//! Which tasks to take samples from.

use std::collections::HashMap;
use std::path::PathBuf;

use clap::Args;
use gvote::eval::tasks::{self, Sample, TaskError};
use gvote::llama::Model;

#[derive(Args)]
pub struct SuiteArgs {
    /// A folder of RULER tasks, TASK.jsonl each
    #[arg(long, value_name = "FOLDER", help_heading = "Evaluation")]
    ruler: Option<PathBuf>,

    /// RULER tasks [default: all in the folder]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', requires = "ruler", help_heading = "Evaluation")]
    tasks: Vec<String>,

    /// The test problems of GSM8K, JSONL
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    gsm8k: Option<PathBuf>,

    /// A summarisation task of LongBench, JSONL
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    longbench: Option<PathBuf>,

    /// Needles in a made-up text: a grid of depths and lengths
    #[arg(long, help_heading = "Evaluation")]
    needle: bool,

    /// Lengths of the needle grid, in words
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "500,1000,2000",
        help_heading = "Evaluation"
    )]
    needle_words: Vec<usize>,

    /// Compress the context before the question is known
    #[arg(long, help_heading = "Evaluation")]
    pub blind: bool,

    /// Prompts as they are, without the chat template
    #[arg(long, help_heading = "Evaluation")]
    pub raw: bool,
}

impl SuiteArgs {
    /// The samples of all suites asked for, with their number within their task: `limit` of each, after the first `offset`.
    pub fn samples(&self, seed: u64, offset: usize, limit: usize) -> Result<Vec<(usize, Sample)>, TaskError> {
        let mut all = Vec::new();
        if let Some(folder) = &self.ruler {
            let names = if self.tasks.is_empty() { tasks::ruler::tasks_in(folder)? } else { self.tasks.clone() };
            all.extend(tasks::ruler::load(folder, &names)?);
        }
        if let Some(file) = &self.gsm8k {
            all.extend(tasks::gsm8k::load(file, tasks::gsm8k::SHOTS, usize::MAX)?);
        }
        if let Some(file) = &self.longbench {
            all.extend(tasks::longbench::load(file)?);
        }
        if self.needle {
            all.extend(tasks::needle::grid(&self.needle_words, &tasks::needle::DEPTHS, seed));
        }
        // round robin over the tasks, so that a run that is stopped early has seen all of them
        let mut seen = HashMap::<(String, String), usize>::new();
        let mut numbered: Vec<(usize, Sample)> = Vec::new();
        for sample in all {
            let n = seen.entry((sample.suite.clone(), sample.task.clone())).or_default();
            if (offset..offset.saturating_add(limit)).contains(n) {
                numbered.push((*n, sample));
            }
            *n += 1;
        }
        numbered.sort_by_key(|(n, _)| *n);
        Ok(numbered)
    }
}

/// Tokens of the longest question with its context.
pub fn longest(model: &Model, samples: &[(usize, Sample)]) -> usize {
    let tokens = |s: &Sample| model.tokenize(&s.full_turn(), true, false).map_or(0, |t| t.len());
    samples.iter().map(|(_, sample)| tokens(sample)).max().unwrap_or(0)
}
