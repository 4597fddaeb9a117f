//! `gvote bench`: llama-bench's tests, run under several policies in turn.

mod markdown;
mod measure;
mod memory;
mod output;
mod plan;
mod progress;
mod row;
mod stats;
mod text;
mod together;

use anyhow::Result;
use clap::Args;
use gvote::llama::{LlamaError, Model, Token};
use gvote::policy::{Kind, Params};
use gvote::{SessionError, SessionParams};

use super::Exit;
use super::args::{ContextArgs, ModelArgs, OutputArgs, VoteArgs, named};
use super::prompt::read_file;
use super::turn::Steps;
use super::words::{count, note};
use measure::{Arm, Runs};
use output::{Format, Output};
use plan::{Plan, Test, TestArgs};
use progress::Progress;
use row::{Facts, Row};

const EXAMPLES: &str = "\
Examples:
  gvote bench -m model.gguf
  gvote bench -m model.gguf -f book.txt -d 0,4096 -p 0 --policies full,gvote -o csv > decoding.csv
  gvote bench -m model.gguf -f book.txt -d 8192 -p 0 -npl 1,8,32 --memory 24G

The first reads 512 tokens (pp512) and generates 128 (tg128) five times under each policy, as llama-bench does. The second asks
what decoding gains after a context of 4,096 tokens of a real text (tg128 @ d4096). The third decodes 1, 8 and 32 sequences
together (tg128 x8 @ d8192), each with such a context in cells of its own; t/s is that of all of them. The vote is taken on one
and its cells are copied: each would vote alike. `fit` counts the sequences that --memory holds while the last one is read.

A test at a depth starts with a context of that many tokens, read once and restored for each repetition. A policy that
compresses votes on it and compacts the cache before each repetition: cells, KV, vote and compaction tell of that. Policies take
turns within a repetition, so that a busy machine hits all alike; `vs full` is the median ratio of paired repetitions.
Ctrl-C ends the program; the rows measured by then are printed.";

/// Measure speed, cells and bytes under several policies, as llama-bench does
#[derive(Args)]
#[command(after_help = EXAMPLES, allow_negative_numbers = true)]
pub struct BenchArgs {
    #[command(flatten)]
    tests: TestArgs,

    #[arg(long, help = kinds(), value_name = "NAME,...", value_delimiter = ',', default_value = "full,gvote", hide_possible_values = true,
          help_heading = "Cache policy", value_parser = named(Kind::ALL, Kind::name))]
    policies: Vec<Kind>,

    #[command(flatten)]
    vote: VoteArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    context: ContextArgs,

    /// Output format on stdout: a table (md), or all figures (csv, json, jsonl)
    #[arg(short, long, value_name = "md|csv|json|jsonl", default_value = Format::Md.name(), hide_possible_values = true,
          help_heading = "Output", value_parser = named(Format::ALL, Format::name))]
    output: Format,

    /// Show llama.cpp's log on stderr
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

fn kinds() -> String {
    let names: Vec<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
    format!("Policies to compare: {}", names.join(", "))
}

impl BenchArgs {
    /// Returns the session's parameters under this policy. Flags such as --max-cells do not apply to `full`.
    fn session(&self, kind: Kind, n_ctx: usize) -> Result<SessionParams> {
        if kind != Kind::Full {
            return self.vote.session(kind, &self.context, n_ctx);
        }
        let others = self.vote.session(self.strictest(), &self.context, n_ctx)?;
        Ok(SessionParams { policy: Params::new(kind), ..others })
    }

    /// Returns the policy with the strictest requirements on the model.
    fn strictest(&self) -> Kind {
        self.policies.iter().copied().find(|&kind| kind != Kind::Full).unwrap_or(Kind::Full)
    }
}

pub fn run(args: &BenchArgs) -> Result<()> {
    let plan = Plan::new(&args.tests, &args.policies)?;
    for &kind in &plan.policies {
        args.session(kind, 0)?;
    }
    let text = args.tests.file.as_deref().map(read_file).transpose()?;
    let steps = Steps::new(&OutputArgs { json: false, verbose: args.verbose })?;
    steps.interrupt.begin();
    args.context.set_priority()?;
    let model = steps.load_model(&args.model, args.strictest())?;
    check_room(args, &plan, &model)?;
    let tokens = match &text {
        Some(text) => text::tokens_of(&model, text, plan.longest())?,
        None => text::random_tokens(&model, plan.longest())?,
    };
    if text.is_none() && plan.votes() {
        note("random tokens have no structure to vote on: give a real text with -f for realistic shares and times");
    }

    let facts = Facts::new(&model, &args.model, args.session(Kind::Full, 0)?.context, args.tests.memory);
    let progress = Progress::new(plan.runs(), args.verbose);
    let bench = Bench { args, plan: &plan, steps: &steps, model: &model, tokens: &tokens, progress: &progress };
    let mut output = args.output.start(&facts, &plan);
    let mut done = Ok(());
    for depth in plan.depths() {
        done = bench.at_depth(depth, &facts, &mut *output);
        if done.is_err() {
            break;
        }
    }
    progress.end();
    output.finish()?;
    done
}

/// Checks that the tests fit the context. A context longer than the training context needs an explicit `-c`.
fn check_room(args: &BenchArgs, plan: &Plan, model: &Model) -> Result<()> {
    let (needed, trained, given) = (plan.longest(), model.n_ctx_train(), args.context.ctx_size as usize);
    if given == 0 && needed > trained {
        return Err(Exit::Usage(format!(
            "the tests need {} cells (-d and -p or -n together), and the model was trained for {}: lower them, or set -c {needed}",
            count(needed),
            count(trained),
        ))
        .into());
    }
    if given > 0 && needed > given {
        return Err(Exit::Usage(format!(
            "the tests need {} cells (-d and -p or -n together), and -c is {}: lower them, or set -c {needed}",
            count(needed),
            count(given),
        ))
        .into());
    }
    if needed > trained {
        note(&format!(
            "the model was trained for {} tokens; its speed past them is real, its votes may not be",
            count(trained)
        ));
    }
    Ok(())
}

struct Bench<'a> {
    args: &'a BenchArgs,
    plan: &'a Plan,
    steps: &'a Steps,
    model: &'a Model,
    tokens: &'a [Token],
    progress: &'a Progress,
}

impl Bench<'_> {
    /// Runs all tests at one depth. The sessions are created once, with the cells that the longest test needs.
    fn at_depth(&self, depth: usize, facts: &Facts, output: &mut dyn Output) -> Result<()> {
        let (context, rest) = self.tokens.split_at(depth);
        let n_ctx = depth + self.plan.longest_test();
        let mut arms = Vec::new();
        for &kind in &self.plan.policies {
            let params = self.args.session(kind, n_ctx)?;
            self.steps.check_memory(&params)?;
            arms.push(Arm::new(self.model, kind, &params)?);
        }
        for test in self.plan.tests_at(depth) {
            let runs = self.measure(&mut arms, test, context, rest)?;
            let full = arms.iter().position(|arm| arm.kind == Kind::Full).map(|i| &runs[i]);
            let full = full.filter(|full| full.too_large.is_none());
            for (arm, runs) in arms.iter().zip(&runs) {
                if let Some(error) = &runs.too_large {
                    self.progress.suspend(|| note(&format!("{test}, {}: {error}", arm.kind)));
                    continue;
                }
                let row = Row::new(facts, test, arm, runs, full);
                self.progress.suspend(|| output.row(&row))?;
            }
        }
        Ok(())
    }

    /// Runs one test under every policy in turn.
    fn measure(&self, arms: &mut [Arm], test: Test, context: &[Token], tokens: &[Token]) -> Result<Vec<Runs>> {
        if !self.args.tests.no_warmup {
            for arm in &mut *arms {
                self.progress.show(|| format!("{test}, {}: warm-up", arm.kind));
                self.guard(arm, |arm| arm.warm_up(test.work, tokens))?;
            }
        }
        let mut runs: Vec<Runs> = arms.iter().map(|_| Runs::default()).collect();
        for i in 1..=self.plan.repetitions {
            for (arm, runs) in arms.iter_mut().zip(&mut runs) {
                self.progress.show(|| format!("{test}, {}: {i} of {}", arm.kind, self.plan.repetitions));
                if runs.too_large.is_none() {
                    self.guard(arm, |arm| {
                        runs.votes.extend(arm.rewind(context)?);
                        match arm.run(test.work, tokens) {
                            Ok(time) => runs.times.push(time),
                            // sequences that do not fit under one policy are a result, not a failure
                            Err(SessionError::Llama(error @ LlamaError::Context { .. })) => {
                                runs.too_large = Some(error)
                            }
                            Err(error) => return Err(error),
                        }
                        Ok(())
                    })?;
                }
                self.progress.advance();
            }
        }
        Ok(runs)
    }

    /// Runs `work` so that Ctrl-C can stop this policy's session.
    fn guard(&self, arm: &mut Arm, work: impl FnOnce(&mut Arm) -> Result<(), SessionError>) -> Result<()> {
        self.steps.interrupt.cancels(arm.cancel_flag());
        let done = self.steps.unless_cancelled(work(arm));
        if self.steps.interrupt.pressed() { Err(Exit::Cancelled.into()) } else { done }
    }
}
