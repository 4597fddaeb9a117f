//! `gvote eval adaptivity`: tests whether a policy finds the budget that each request needs.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use gvote::SessionError;
use gvote::llama::{Model, Token};
use gvote::policy::Kind;
use gvote_eval::runner::{EvalError, Next, Request};
use gvote_eval::tasks::Sample;
use gvote_eval::texts;

use super::suites::{self, SuiteArgs};
use super::{CommonArgs, ROOM, SPARE, above_0, finish, note_too_long};
use crate::Exit;
use crate::turn::Steps;
use crate::words::{count, note};

/// Default target of the mean KL per token: hardly noticeable, about 1.02 times the perplexity.
const TARGET: f64 = 0.02;

/// Cells that a policy chooses, compared with the fewest that suffice
///
/// Each request is read once. Its cache is then compressed to various numbers of cells, and the model's predictions at every token of a
/// continuation are compared with those of the full cache. The continuation is the text's own next tokens, or the full cache's answer to a
/// task. C* is the fewest cells whose mean KL is within the target, found by search. A policy that adapts stays a little above C* on easy
/// and hard requests alike. The report compares it with the best fixed share of the cells, known only in hindsight.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("requests").required(true).multiple(true)
          .args(["text", "code", "ruler", "gsm8k", "longbench", "needle"]))]
pub struct AdaptivityArgs {
    #[command(flatten)]
    common: CommonArgs,

    /// Text to continue: narrative
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    text: Vec<PathBuf>,

    /// Source code to continue: a file, or all files below a folder
    #[arg(long, value_name = "PATH", help_heading = "Evaluation")]
    code: Vec<PathBuf>,

    #[command(flatten)]
    suites: SuiteArgs,

    /// Number of requests of each text and task
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = above_0, help_heading = "Evaluation")]
    limit: usize,

    /// Number of requests of each text and task to skip, for example to tune on one part and report on another
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Evaluation")]
    offset: usize,

    /// Prompt length of a text, in tokens
    #[arg(short, long, value_name = "N", default_value_t = 2048, value_parser = above_0, help_heading = "Evaluation")]
    prompt: usize,

    /// Maximum number of steps of a continuation; an answer may be shorter
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128, value_parser = above_0, help_heading = "Evaluation")]
    predict: usize,

    /// Tokens of a task's answer that are in the cache when it is compressed, and are not compared
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "blind", help_heading = "Evaluation")]
    after: usize,

    /// Limit of the mean KL per token, in nats [default: 0.02]
    #[arg(long, value_name = "X,...", value_delimiter = ',', value_parser = above::<0>, help_heading = "Evaluation")]
    target_kl: Vec<f64>,

    /// The same limit as a ratio of perplexities R; the KL is ln R
    #[arg(long, value_name = "R,...", value_delimiter = ',', value_parser = above::<1>, help_heading = "Evaluation")]
    target_ppl: Vec<f64>,
}

fn above<const LEAST: i32>(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|v: &f64| v.is_finite() && *v > f64::from(LEAST));
    value.ok_or_else(|| format!("a number above {LEAST} is needed"))
}

/// Origin of a request.
enum Source {
    Piece { family: &'static str, item: String, prompt: Vec<Token>, next: Vec<Token> },
    Sample(Sample),
}

pub fn run(args: &AdaptivityArgs) -> Result<()> {
    let AdaptivityArgs { common, suites, limit, offset, .. } = args;
    let steps = Steps::new(&common.output)?;
    let texts = args.texts()?;
    let samples = suites.samples(common.seeds[0], *offset, *limit)?;
    steps.interrupt.begin();
    common.context.set_priority()?;
    let model = steps.load_model(&common.model, Kind::Gvote)?;
    let of_tasks = if samples.numbered.is_empty() { 0 } else { suites::longest(&model, &samples.numbered) + ROOM };
    let of_texts = if texts.is_empty() { 0 } else { args.piece().saturating_add(SPARE) };
    let n_ctx = of_tasks.max(of_texts).min(model.n_ctx_train());

    let mut sources: Vec<(usize, Source)> =
        samples.numbered.iter().map(|(i, sample)| (*i, Source::Sample(sample.clone()))).collect();
    for text in texts {
        sources.extend(args.pieces(&model, &text)?);
    }
    if sources.is_empty() {
        return Err(Exit::Usage("no request is left: see --tasks, --limit and --offset".into()).into());
    }
    // round robin, so that a run stopped early covers all kinds
    sources.sort_by_key(|(i, _)| *i);

    let targets = args.targets();
    let mut runner = common.runner(&steps, &model, common.configs(&["balanced"])?, n_ctx, suites.raw)?;
    let bar = steps.count(sources.len() as u64, "requests");
    let (mut too_long, mut silent) = (0, 0);
    for (_, source) in &sources {
        match runner.adaptivity(&source.request(args), &targets) {
            Err(EvalError::Session(SessionError::PromptTooLong { .. })) => too_long += 1,
            Err(EvalError::NoAnswer(_)) => silent += 1,
            result => {
                steps.unless_cancelled(result)?;
            }
        }
        bar.inc(1);
    }
    samples.conclude();
    note_too_long(too_long, n_ctx);
    if silent > 0 {
        note(&format!("{silent} samples have no answer to compare and were left out"));
    }
    finish(&bar, &runner, &common.output)
}

struct Text {
    family: &'static str,
    name: String,
    text: String,
}

impl AdaptivityArgs {
    fn targets(&self) -> Vec<f64> {
        let given: Vec<f64> = self.target_kl.iter().copied().chain(self.target_ppl.iter().map(|r| r.ln())).collect();
        if given.is_empty() { vec![TARGET] } else { given }
    }

    fn texts(&self) -> Result<Vec<Text>> {
        let narrative = self.text.iter().map(|path| ("narrative", path));
        let code = self.code.iter().map(|path| ("code", path));
        let read =
            |(family, path): (_, &PathBuf)| Ok(Text { family, name: super::file_name(path), text: texts::read(path)? });
        narrative.chain(code).map(read).collect()
    }

    /// Returns the tokens of a prompt and its continuation, plus one that is decoded before anything is compared.
    fn piece(&self) -> usize {
        self.prompt.saturating_add(self.predict).saturating_add(1)
    }

    /// Splits a text into parts that do not overlap, with their numbers.
    fn pieces(&self, model: &Model, text: &Text) -> Result<Vec<(usize, Source)>> {
        let (prompt, whole) = (self.prompt, self.piece());
        let start = model.tokenize("", true, false)?;
        let tokens = model.tokenize(&text.text, false, false)?;
        let piece = |(i, tokens): (usize, &[Token])| {
            let item = format!("{} {i} @{prompt}", text.name);
            let (prompt, next) = tokens.split_at(prompt);
            (i, Source::Piece { family: text.family, item, prompt: [&start, prompt].concat(), next: next.to_vec() })
        };
        let pieces: Vec<_> =
            tokens.chunks_exact(whole).enumerate().skip(self.offset).take(self.limit).map(piece).collect();
        if pieces.is_empty() {
            let (name, found, all) =
                (&text.name, count(tokens.len()), count(whole.saturating_mul(self.offset.saturating_add(1))));
            bail!("{name}: {found} tokens, but -p, -n and --offset need {all}");
        }
        Ok(pieces)
    }
}

impl Source {
    fn request(&self, args: &AdaptivityArgs) -> Request<'_> {
        match self {
            Self::Piece { family, item, prompt, next } => {
                Request { family: (*family).into(), item: item.clone(), next: Next::Text { prompt, next } }
            }
            Self::Sample(sample) => Request {
                family: sample.family().into(),
                item: if sample.item.starts_with(&sample.suite) {
                    sample.item.clone()
                } else {
                    format!("{} {}", sample.suite, sample.item)
                },
                next: Next::Answer {
                    sample,
                    blind: args.suites.blind,
                    limit: args.predict.saturating_add(args.after),
                    after: args.after,
                },
            },
        }
    }
}
