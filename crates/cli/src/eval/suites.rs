//! Flags for the tasks to take samples from.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use gvote::llama::Model;
use gvote_eval::tasks::{self, Loaded, Sample};

use crate::Exit;
use crate::words::{note, plural};

/// Limit for the needle lengths: more words than the longest context of any model holds.
const NEEDLE_WORDS_MAX: u64 = 1_000_000;

#[derive(Args)]
pub struct SuiteArgs {
    /// Folder of RULER tasks, one TASK.jsonl each
    #[arg(long, value_name = "FOLDER", help_heading = "Evaluation")]
    ruler: Option<PathBuf>,

    /// RULER tasks to use [default: all in the folder]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', requires = "ruler", help_heading = "Evaluation")]
    tasks: Vec<String>,

    /// Test problems of GSM8K, JSONL
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    gsm8k: Option<PathBuf>,

    /// Summarisation task of LongBench, JSONL
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    longbench: Option<PathBuf>,

    /// Needles in a generated text: a grid of depths and lengths
    #[arg(long, help_heading = "Evaluation")]
    needle: bool,

    /// Lengths of the needle grid, in words
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "500,1000,2000",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=NEEDLE_WORDS_MAX),
        help_heading = "Evaluation"
    )]
    needle_words: Vec<usize>,

    /// Compress the context before the question is known
    #[arg(long, help_heading = "Evaluation")]
    pub blind: bool,

    /// Use prompts as they are, without the chat template
    #[arg(long, help_heading = "Evaluation")]
    pub raw: bool,
}

impl SuiteArgs {
    /// Returns the samples of all requested suites, each with its number within its task: `limit` of each task, after skipping `offset`.
    /// Names and counts the rows that cannot be used.
    ///
    /// # Errors
    /// [`TaskError`], or if no row of any file can be used.
    pub fn samples(&self, seed: u64, offset: usize, limit: usize) -> Result<Samples> {
        let (mut all, mut refused) = (Vec::new(), Vec::new());
        let mut add = |loaded: Loaded| {
            all.extend(loaded.samples);
            refused.extend(loaded.refused);
        };
        if let Some(folder) = &self.ruler {
            let known = tasks::ruler::tasks_in(folder)?;
            if let Some(name) = self.tasks.iter().find(|&name| !known.contains(name)) {
                let (folder, known) = (folder.display(), known.join(", "));
                return Err(Exit::Usage(format!("--tasks: {folder} has no task {name:?}; it has: {known}")).into());
            }
            let names = if self.tasks.is_empty() { known } else { self.tasks.clone() };
            add(tasks::ruler::load(folder, &names)?);
        }
        if let Some(file) = &self.gsm8k {
            add(tasks::gsm8k::load(file, tasks::gsm8k::SHOTS, usize::MAX)?);
        }
        if let Some(file) = &self.longbench {
            add(tasks::longbench::load(file)?);
        }
        if self.needle {
            all.extend(tasks::needle::grid(&self.needle_words, &tasks::needle::DEPTHS, seed));
        }
        refused.iter().for_each(|error| note(&format!("left out: {error}")));
        if all.is_empty() && !refused.is_empty() {
            bail!("none of the {} can be used", plural(refused.len(), "row"));
        }
        // round robin over the tasks, so that a run stopped early covers all of them
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
        Ok(Samples { numbered, refused: refused.len() })
    }
}

/// Samples, each with its number within its task.
pub struct Samples {
    pub numbered: Vec<(usize, Sample)>,
    /// Number of rows that could not be used.
    refused: usize,
}

impl Samples {
    /// Reports how many rows were left out.
    pub fn conclude(&self) {
        if self.refused > 0 {
            note(&format!("{} could not be used and left out; see above", plural(self.refused, "row")));
        }
    }
}

/// Returns the tokens of the longest question with its context.
pub fn longest(model: &Model, samples: &[(usize, Sample)]) -> usize {
    let tokens = |s: &Sample| model.tokenize(&s.full_turn(), true, false).map_or(0, |t| t.len());
    samples.iter().map(|(_, sample)| tokens(sample)).max().unwrap_or(0)
}
