//! `gvote eval`: measures the loss of a compressed cache, on texts and tasks.

mod adaptivity;
mod suites;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use gvote::llama::{ContextParams, Model};
use gvote::policy::Kind;
use gvote::{SessionError, SessionParams};
use gvote_eval::config::Config;
use gvote_eval::provenance::{Start, command_words};
use gvote_eval::record::{self, Journal, Record};
use gvote_eval::report::Report;
use gvote_eval::runner::{Continuation, EvalError, Runner};
use gvote_eval::tasks::Sample;
use gvote_eval::tasks::turns::{self, Talk};
use gvote_eval::text;
use indicatif::ProgressBar;

use self::suites::SuiteArgs;
use super::Exit;
use super::args::{ContextArgs, ModelArgs, OutputArgs};
use super::turn::{Steps, print};
use super::words::{note, plural};

const EXAMPLES: &str = "\
Examples:
  gvote eval text -m model.gguf -f wiki.test.raw --config balanced --config snapkv -o runs.jsonl
  gvote eval tasks -m model.gguf --needle -o runs.jsonl
  gvote eval tasks -m model.gguf --ruler ruler/4096 --limit 5 --blind --config 'half:ratio=0.5' -o runs.jsonl
  gvote eval turns -m model.gguf --ruler ruler/4096 --tasks niah_multikey_2 --limit 5 -o turns.jsonl
  gvote eval adaptivity -m model.gguf --text wiki.test.raw --code src --needle --config balanced --target-kl 0.02 -o runs.jsonl
  gvote eval report runs.jsonl -o report.html
  gvote eval report text.jsonl tasks.jsonl --baseline balanced -o results.md

A run that was stopped goes on where it was when it is started again with the same -o.";

const CONFIGS: &str = "\
A configuration is the name of a policy or preset, or NAME:KEY=VALUE,... with the keys policy, preset, target-kl, draft, \
lost-mass, ratio, max-cells, min-cells, p-nuc, samples, window, recent, sinks, span (back-forward), pool, head-mix, protect, replay, evict, exact, \
seed, key-error, ctx-size, recall, renew.

ctx-size=N reads the prompt in N cells, as `gvote run -c N` does with a longer prompt: cells are freed on the way, and the \
policy's own budget applies to what is left. ratio=1 keeps all of that.

recall=auto sets aside what leaves the cache, and chooses anew for the question among all that was read: at the end of a prompt \
that is read in fewer cells (ctx-size), after the question of --blind, and before every message of a chat. recall=off lets it be \
lost. Without it, texts and tasks go as in `gvote run`, where it is lost, and turns as in `gvote chat`, where it is set aside.

renew=N, for gvote eval adaptivity, chooses the cells anew every N tokens of an answer, as `gvote chat --renew N` does.

exact=true, for adakv and gvote-paper, keeps a different number of tokens in every head, as their papers have it. No cache of \
llama.cpp can: nothing is freed, what a head drops is masked while decoding (needs -fa off), and the cells of a record are the \
mean that a head keeps.";

/// Measure the loss of a compressed cache against the full one
#[derive(Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Text(TextArgs),
    Tasks(TasksArgs),
    Turns(TurnsArgs),
    Adaptivity(adaptivity::AdaptivityArgs),
    Report(ReportArgs),
}

#[derive(Args)]
#[command(after_help = CONFIGS)]
struct CommonArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    context: ContextArgs,
    #[command(flatten)]
    output: OutputArgs,

    /// Configurations to compare, see below [default: balanced; tasks: full and balanced]
    #[arg(long, value_name = "CONFIG", help_heading = "Evaluation")]
    config: Vec<Config>,

    /// Seeds of the synthetic queries
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "0", help_heading = "Evaluation")]
    seeds: Vec<u64>,

    /// Append every measurement to this file, and skip those already in it
    #[arg(short, long, value_name = "FILE", help_heading = "Evaluation")]
    out: PathBuf,
}

/// KL divergence, perplexity ratio and same top token over teacher-forced continuations of a text
#[derive(Args)]
struct TextArgs {
    #[command(flatten)]
    common: CommonArgs,

    /// Text file
    #[arg(short, long, value_name = "FILE", help_heading = "Evaluation")]
    file: PathBuf,

    /// Prompt lengths in tokens
    #[arg(
        short,
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "2048",
        value_parser = above_0,
        help_heading = "Evaluation"
    )]
    prompt: Vec<usize>,

    /// Number of steps of a continuation
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256, value_parser = above_0, help_heading = "Evaluation")]
    predict: usize,

    /// Number of prompts, spread evenly over the text; at most as many as it has starting places for
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = above_0, help_heading = "Evaluation")]
    texts: usize,
}

fn above_0(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "use a whole number above 0".into())
}

/// Scores of answers: RULER, GSM8K, LongBench, or needles that need no data
#[derive(Args)]
#[command(group = clap::ArgGroup::new("suite").required(true).multiple(true)
          .args(["ruler", "gsm8k", "longbench", "needle"]))]
struct TasksArgs {
    #[command(flatten)]
    common: CommonArgs,

    #[command(flatten)]
    suites: SuiteArgs,

    /// Number of samples of each task
    #[arg(long, value_name = "N", default_value_t = usize::MAX, hide_default_value = true, help_heading = "Evaluation")]
    limit: usize,

    /// Number of samples of each task to skip
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Evaluation")]
    offset: usize,
}

/// Scores of answers to several questions in one chat about a document: the needles of RULER's keys, or those that need no data
///
/// The first question comes with the document. With --blind, the document comes alone, to be answered with OK, and all questions follow it.
#[derive(Args)]
struct TurnsArgs {
    #[command(flatten)]
    tasks: TasksArgs,

    /// Number of questions in a chat
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = above_0, help_heading = "Evaluation")]
    questions: usize,
}

/// Tables and plots of the measurements
#[derive(Args)]
struct ReportArgs {
    /// Files written by `gvote eval`
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Write to this file instead of stdout: .md, .html, .json or .csv
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Compare every other configuration with this one, request by request (ablation)
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,

    /// Title of a .md report
    #[arg(long, value_name = "TEXT", default_value = "Results")]
    title: String,

    /// File with Markdown to put before the tables of a .md report
    #[arg(long, value_name = "FILE")]
    notes: Option<PathBuf>,
}

pub fn run(args: &EvalArgs) -> Result<()> {
    match &args.command {
        Command::Text(args) => text(args),
        Command::Tasks(args) => tasks(args),
        Command::Turns(args) => turns(args),
        Command::Adaptivity(args) => adaptivity::run(args),
        Command::Report(args) => report(args),
    }
}

impl CommonArgs {
    fn configs(&self, defaults: &[&str]) -> Result<Vec<Config>> {
        if self.config.is_empty() {
            return Ok(defaults.iter().map(|name| Config::named(name)).collect::<Result<_, _>>()?);
        }
        Ok(self.config.clone())
    }

    fn runner(&self, steps: &Steps, model: &Model, configs: Vec<Config>, n_ctx: usize, raw: bool) -> Result<Runner> {
        let n_ctx = u32::try_from(n_ctx).unwrap_or(u32::MAX);
        // measurements must not depend on other programs that run
        let context = ContextParams { yields_threads: false, ..self.context.params(n_ctx) };
        let params = SessionParams { context, ..SessionParams::default() };
        steps.check_memory(&params)?;
        let mut journal = Journal::open(&self.out)?;
        if journal.cut_off {
            note_cut_off(&self.out);
        }
        journal.begin(Start::now(command(), &self.model.model, &params.context, &configs, &self.seeds))?;
        let runner = Runner::new(&self.model.model, model, &params, configs, self.seeds.clone(), raw, journal)?;
        steps.interrupt.cancels(runner.session().cancel_flag());
        Ok(runner)
    }
}

/// Additional cells for a text and its continuation.
const SPARE: usize = 7;
/// Cells for answers and chat templates, in addition to the prompts.
const ROOM: usize = 1024;
/// Cells for a question of a chat, in addition to its answer.
const TURN: usize = 256;

fn text(args: &TextArgs) -> Result<()> {
    let common = &args.common;
    let steps = Steps::new(&common.output)?;
    let text = text::read(&args.file).with_context(|| args.file.display().to_string())?;
    steps.interrupt.begin();
    common.context.set_priority()?;
    let model = steps.load_model(&common.model, Kind::Gvote)?;
    let tokens = model.tokenize(&text, true, false)?;
    // one more token: it is decoded before anything is compared
    let needed = |n: usize| n.saturating_add(args.predict).saturating_add(1);
    let longest = args.prompt.iter().copied().max().unwrap_or(0);
    if needed(longest) > tokens.len() {
        let (file, found, predict) = (args.file.display(), tokens.len(), args.predict);
        bail!("{file}: {found} tokens, but -p {longest} -n {predict} need {}", needed(longest));
    }
    let n_ctx = needed(longest) + SPARE;
    let mut runner = common.runner(&steps, &model, common.configs(&["balanced"])?, n_ctx, true)?;
    // at most as many as there are starting places
    let texts = |n: usize| args.texts.min(tokens.len() - needed(n) + 1);
    let bar = steps.count(args.prompt.iter().map(|&n| texts(n)).sum::<usize>() as u64, "texts");
    for &n in &args.prompt {
        let (needed, texts) = (needed(n), texts(n));
        for t in 0..texts {
            let start = t * (tokens.len() - needed) / texts.max(2);
            let (prompt, next) = tokens[start..start + needed].split_at(n);
            // items are named by their start: the t-th of four texts differs from the t-th of eight
            let item = format!("{} {start} @{n}", file_name(&args.file));
            steps.unless_cancelled(runner.continuation(&Continuation { item, prompt, next }))?;
            bar.inc(1);
        }
    }
    finish(&bar, &runner, &common.output)
}

const NO_SAMPLE: &str = "no sample is left: see --tasks, --limit and --offset";

fn tasks(args: &TasksArgs) -> Result<()> {
    let common = &args.common;
    let steps = Steps::new(&common.output)?;
    let samples = args.suites.samples(common.seeds[0], args.offset, args.limit)?;
    if samples.numbered.is_empty() {
        return Err(Exit::Usage(NO_SAMPLE.into()).into());
    }
    steps.interrupt.begin();
    common.context.set_priority()?;
    let model = steps.load_model(&common.model, Kind::Gvote)?;
    let n_ctx = (suites::longest(&model, &samples.numbered) + ROOM).min(model.n_ctx_train());
    let configs = common.configs(&[Kind::Full.name(), "balanced"])?;
    let mut runner = common.runner(&steps, &model, configs, n_ctx, args.suites.raw)?;
    let bar = steps.count(samples.numbered.len() as u64, "samples");
    let measure = |(_, sample): &(usize, Sample)| runner.task(sample, args.suites.blind);
    let too_long = measure_each(&steps, &bar, &samples.numbered, measure)?;
    samples.conclude();
    note_too_long(too_long, n_ctx);
    finish(&bar, &runner, &common.output)
}

/// Measures one item after another. Returns the number of items left out because they are longer than the context.
fn measure_each<T>(
    steps: &Steps,
    bar: &ProgressBar,
    items: &[T],
    mut measure: impl FnMut(&T) -> Result<usize, EvalError>,
) -> Result<usize> {
    let mut too_long = 0;
    for item in items {
        match measure(item) {
            Err(EvalError::Session(SessionError::PromptTooLong { .. })) => too_long += 1,
            result => {
                steps.unless_cancelled(result)?;
            }
        }
        bar.inc(1);
    }
    Ok(too_long)
}

fn turns(args: &TurnsArgs) -> Result<()> {
    let TurnsArgs { tasks: TasksArgs { common, suites, limit, offset }, questions } = args;
    let steps = Steps::new(&common.output)?;
    let samples = suites.samples(common.seeds[0], *offset, *limit)?;
    if samples.numbered.is_empty() {
        return Err(Exit::Usage(NO_SAMPLE.into()).into());
    }
    let talk = |(_, sample): &(usize, Sample)| turns::talk(sample, *questions, common.seeds[0], suites.blind);
    let talks: Vec<Talk> = samples.numbered.iter().filter_map(talk).collect();
    if talks.is_empty() {
        let why = format!("--questions {questions}: no sample has the needles of so many keys, one for each question");
        return Err(Exit::Usage(why).into());
    }
    if talks.len() < samples.numbered.len() {
        let left_out = plural(samples.numbered.len() - talks.len(), "sample");
        note(&format!("{left_out} without the needles of {questions} keys left out"));
    }
    steps.interrupt.begin();
    common.context.set_priority()?;
    let model = steps.load_model(&common.model, Kind::Gvote)?;
    let answers = talks[0].turns.iter().map(|turn| turn.max_tokens as usize + TURN).sum::<usize>();
    let n_ctx = (suites::longest(&model, &samples.numbered) + answers + ROOM).min(model.n_ctx_train());
    let configs = common.configs(&[Kind::Full.name(), "balanced"])?;
    let mut runner = common.runner(&steps, &model, configs, n_ctx, suites.raw)?;
    let bar = steps.count(talks.len() as u64, "chats");
    let too_long = measure_each(&steps, &bar, &talks, |talk| runner.turns(talk))?;
    samples.conclude();
    note_too_long(too_long, n_ctx);
    finish(&bar, &runner, &common.output)
}

fn note_too_long(count: usize, n_ctx: usize) {
    if count > 0 {
        note(&format!("{count} samples are longer than the context (-c {n_ctx}) and were left out"));
    }
}

fn finish(bar: &ProgressBar, runner: &Runner, output: &OutputArgs) -> Result<()> {
    bar.finish_and_clear();
    let report = Report::new(runner.records());
    if output.json {
        print(&(report.to_json() + "\n"))?;
    } else {
        print(&report.to_text())?;
    }
    Ok(())
}

fn report(args: &ReportArgs) -> Result<()> {
    let records = read(&args.files)?;
    let mut report = Report::new(&records);
    if let Some(baseline) = &args.baseline {
        let names: Vec<&str> = report.configs.iter().map(|config| config.name.as_str()).collect();
        if !names.contains(&baseline.as_str()) {
            let names = names.join(", ");
            return Err(Exit::Usage(format!("--baseline {baseline}: the records are of {names}")).into());
        }
        report = report.compare_with(baseline, &records);
    }
    let Some(out) = &args.out else {
        return Ok(print(&report.to_text())?);
    };
    let text = match out.extension().and_then(|e| e.to_str()) {
        Some("md") => {
            let read = |path: &PathBuf| text::read(path).with_context(|| path.display().to_string());
            let notes = args.notes.as_ref().map(read).transpose()?.unwrap_or_default();
            report.to_markdown(&args.title, &notes, &command_words(&command()))
        }
        Some("html") => report.to_html(),
        Some("json") => report.to_json(),
        Some("csv") => {
            let file = fs::File::create(out).with_context(|| out.display().to_string())?;
            return report.write_csv(file).with_context(|| out.display().to_string());
        }
        _ => return Err(Exit::Usage(format!("{}: name it .md, .html, .json or .csv", out.display())).into()),
    };
    fs::write(out, text).with_context(|| out.display().to_string())
}

/// Reads the records of all files. A record that two files share word for word counts once, such as after copying a file and continuing the
/// copy.
fn read(files: &[PathBuf]) -> Result<Vec<Record>> {
    let mut known = HashSet::new();
    let mut records = Vec::new();
    for file in files {
        let contents = record::read(file)?;
        if contents.cut_off {
            note_cut_off(file);
        }
        let is_new = |record: &Record| known.insert(serde_json::to_string(record).unwrap_or_default());
        records.extend(contents.records.into_iter().filter(is_new));
    }
    Ok(records)
}

fn note_cut_off(file: &Path) {
    note(&format!("{}: the last line is cut off, as by a run that was killed, and is left out", file.display()));
}

/// Returns the command line as typed, with the program's name without its folder.
fn command() -> Vec<String> {
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    [env!("CARGO_BIN_NAME").to_owned()].into_iter().chain(words).collect()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
