//! The tests to run, in llama-bench's order.

use std::fmt;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use gvote::policy::Kind;

use crate::Exit;
use crate::plan::size;

/// Most sequences that llama.cpp can hold in one context (`LLAMA_MAX_SEQ`).
const SEQUENCES_MAX: i64 = 256;

/// llama-bench's flags, with its defaults.
#[derive(Args)]
#[command(next_help_heading = "Tests")]
pub struct TestArgs {
    /// Lengths of the prompts to read, in tokens; 0 = none
    #[arg(short = 'p', long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    n_prompt: Vec<u32>,

    /// Lengths of the texts to generate, in tokens; 0 = none
    #[arg(short = 'n', long, value_name = "N,...", value_delimiter = ',', default_value = "128")]
    n_gen: Vec<u32>,

    /// Depths: lengths of the context before each test, in tokens
    #[arg(short = 'd', long, value_name = "N,...", value_delimiter = ',', default_value = "0")]
    n_depth: Vec<u32>,

    /// Number of sequences that generate together, each with its own context; tests that read prompts are not affected
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=SEQUENCES_MAX))]
    n_parallel: Vec<u32>,

    /// Memory for KV caches, such as 24G: with --n-parallel, report how many such sequences fit
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true, requires = "n_parallel")]
    pub memory: Option<usize>,

    /// Number of repetitions of each test under each policy
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,

    /// Text file to take the tokens from; - is standard input [default: random tokens, as in llama-bench]
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// Skip the warm-up, so that the first run is timed cold
    #[arg(long)]
    pub no_warmup: bool,
}

/// Work that a test times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Reads a prompt of this many tokens.
    Read(usize),
    /// Generates this many tokens, one at a time.
    Generate(usize),
    /// Generates tokens in several sequences at once: each batch has one token of every sequence.
    Together { tokens: usize, sequences: usize },
}

impl Work {
    /// Returns the tokens read or generated in each sequence.
    pub fn tokens(self) -> usize {
        let (Self::Read(n) | Self::Generate(n) | Self::Together { tokens: n, .. }) = self;
        n
    }

    /// Returns the number of sequences.
    pub fn sequences(self) -> usize {
        if let Self::Together { sequences, .. } = self { sequences } else { 1 }
    }
}

/// Work to time after a context of `depth` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    pub work: Work,
    pub depth: usize,
}

/// Formats llama-bench's names: `pp512`, `tg128 @ d4096`; with 8 sequences `tg128 x8 @ d4096`.
impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.work {
            Work::Read(n) => write!(f, "pp{n}")?,
            Work::Generate(n) => write!(f, "tg{n}")?,
            Work::Together { tokens, sequences } => write!(f, "tg{tokens} x{sequences}")?,
        }
        if self.depth > 0 { write!(f, " @ d{}", self.depth) } else { Ok(()) }
    }
}

/// Tests to run, from the flags.
pub struct Plan {
    pub policies: Vec<Kind>,
    pub repetitions: u32,
    depths: Vec<usize>,
    work: Vec<Work>,
}

impl Plan {
    /// Creates the plan.
    ///
    /// # Errors
    /// [`Exit::Usage`] if there is nothing to do or a policy is named twice.
    pub fn new(args: &TestArgs, policies: &[Kind]) -> Result<Self> {
        let sizes = |list: &[u32]| list.iter().map(|&n| n as usize).collect::<Vec<_>>();
        let read = sizes(&args.n_prompt).into_iter().map(Work::Read);
        let (n_gen, n_parallel) = (sizes(&args.n_gen), sizes(&args.n_parallel));
        let together = |&tokens: &usize| {
            let work = |&sequences: &usize| Work::Together { tokens, sequences };
            n_parallel.iter().map(work).collect::<Vec<_>>()
        };
        let generate: Vec<Work> = match n_parallel.is_empty() {
            true => n_gen.iter().copied().map(Work::Generate).collect(),
            false => n_gen.iter().flat_map(together).collect(),
        };
        let work: Vec<_> = read.chain(generate).filter(|w| w.tokens() > 0).collect();
        if work.is_empty() {
            return Err(Exit::Usage("there is nothing to measure: give -p or -n a length above 0".into()).into());
        }
        for (i, kind) in policies.iter().enumerate() {
            if policies[..i].contains(kind) {
                return Err(Exit::Usage(format!("--policies names {kind} twice: leave one out")).into());
            }
        }
        Ok(Self { policies: policies.to_vec(), repetitions: args.repetitions, depths: sizes(&args.n_depth), work })
    }

    pub fn depths(&self) -> impl Iterator<Item = usize> {
        self.depths.iter().copied()
    }

    pub fn tests_at(&self, depth: usize) -> impl Iterator<Item = Test> {
        self.work.iter().map(move |&work| Test { work, depth })
    }

    /// Returns the tokens of the longest test, without its context.
    pub fn longest_test(&self) -> usize {
        self.work.iter().map(|w| w.tokens()).max().unwrap_or(0)
    }

    /// Returns the tokens of the longest context and the longest test together.
    pub fn longest(&self) -> usize {
        self.depths().max().unwrap_or(0) + self.longest_test()
    }

    /// Returns the number of timed runs of all tests.
    pub fn runs(&self) -> u64 {
        let tests = self.depths.len() * self.work.len();
        (tests * self.policies.len()) as u64 * u64::from(self.repetitions)
    }

    /// Whether any test generates in several sequences.
    pub fn is_batched(&self) -> bool {
        self.work.iter().any(|work| matches!(work, Work::Together { .. }))
    }

    /// Whether any policy votes.
    pub fn votes(&self) -> bool {
        self.depths().any(|d| d > 0) && self.policies.iter().any(|&kind| kind != Kind::Full)
    }

    /// Whether there are policies to compare with `full`.
    pub fn compares(&self) -> bool {
        self.policies.len() > 1 && self.policies.contains(&Kind::Full)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_have_llama_benchs_names() {
        let name = |work, depth| Test { work, depth }.to_string();
        assert_eq!(name(Work::Read(512), 0), "pp512");
        assert_eq!(name(Work::Generate(128), 4096), "tg128 @ d4096");
        assert_eq!(name(Work::Together { tokens: 128, sequences: 8 }, 4096), "tg128 x8 @ d4096");
    }
}
