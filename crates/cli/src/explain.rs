//! `gvote explain`: shows what a vote keeps of a prompt, and why.

mod page;
mod terminal;

use std::env;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{ArgAction, Args};
use gvote::explain::{Explanation, Recalled};
use gvote::policy::{Kind, Params};
use gvote::session::Recall;
use gvote::{Session, SessionParams};
use serde::Serialize;

use super::Exit;
use super::args::{ContextArgs, ModelArgs, OutputArgs, PolicyArgs, by_name};
use super::cells::Cells;
use super::prompt::RequestArgs;
use super::report::{Prefill, Vote, print_json};
use super::turn::Steps;
use super::words::{bytes, count, line};

const EXAMPLES: &str = "\
Examples:
  gvote explain -m model.gguf -f report.txt -p 'Who wrote this, and when?'
  gvote explain -m model.gguf -f report.txt -p 'Summarise.' --preset safe -o safe.html
  gvote explain -m model.gguf -f report.txt -p 'Summarise.' --terminal
  gvote explain -m model.gguf -f report.txt -p 'Summarise.' --json | jq '.heads[].lost_mass'
  gvote explain -m model.gguf -f book.txt -p 'Who is Ahab?' -c 4096 --recall auto

The page is one file that needs no network. Nothing is answered: only the prompt is read, and the vote is taken.";

/// Default path of the page, if neither -o nor another form is requested.
const DEFAULT_OUT: &str = "explain.html";

const RECALL: &[(&str, bool)] = &[("auto", true), ("off", false)];

/// Show what a vote keeps of a prompt, and why: as a page, in the terminal, or as JSON
#[derive(Args)]
#[command(after_help = EXAMPLES, allow_negative_numbers = true)]
pub struct ExplainArgs {
    #[command(flatten)]
    request: RequestArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    context: ContextArgs,
    #[command(flatten)]
    policy: PolicyArgs,

    /// What happens to rows that leave the cache when a prompt has more tokens than cells. auto: set them aside, choose for the prompt's
    /// end among everything that was read, as `gvote chat` does, and show what came back; off: drop them, as `gvote run` does
    #[arg(long, value_name = "auto|off", default_value = "off", hide_possible_values = true,
          action = ArgAction::Set,
          help_heading = "Cache policy", value_parser = by_name(RECALL))]
    recall: bool,

    /// Write the page to this file [default: explain.html, without --terminal and --json]
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,

    /// Print a compact view on stdout
    #[arg(long, help_heading = "Output", conflicts_with = "json")]
    terminal: bool,

    #[command(flatten)]
    output: OutputArgs,
}

impl ExplainArgs {
    fn page(&self) -> Option<&Path> {
        let by_default = (!self.terminal && !self.output.json).then(|| Path::new(DEFAULT_OUT));
        self.out.as_deref().or(by_default)
    }
}

pub fn run(args: &ExplainArgs) -> Result<()> {
    let policy = args.policy.params()?.policy;
    if policy == Kind::Full {
        return Err(Exit::Usage("--policy full keeps everything, so there is nothing to explain".into()).into());
    }
    let steps = Steps::new(&args.output)?;
    let text = args.request.text()?;
    args.page().map_or(Ok(()), check_writable)?;
    steps.interrupt.begin();
    args.context.set_priority()?;
    let model = steps.load_model(&args.model, policy)?;
    let request = args.request.request(&model, text)?;
    let cells = Cells::for_answer(&model, request.tokens.len(), 0);
    let recall = if args.recall { Recall::Auto } else { Recall::Off };
    let params = SessionParams { recall, ..args.policy.session(&args.context, cells.first())? };
    let mut session = steps.open(&model, &params)?;
    if args.recall {
        session.note_recall();
    }
    session.set_system_tokens(request.system);
    let prefill = steps.prefill_long(&mut session, &request.tokens)?;
    let explanation = steps.explain(&mut session)?;

    let vote = Vote::new(explanation.report.clone(), prefill.time);
    let time = prefill.time;
    let prefill = Prefill::new(prefill);
    let recalled = explanation.recall.as_ref().map(|recall| ("recall", in_words(recall)));
    let lines = [prefill.lines(session.n_ctx()), vote.lines(session.policy()), recalled.into_iter().collect()].concat();
    if !args.output.json {
        lines.iter().for_each(|(label, text)| line(label, text));
    }
    if let Some(path) = args.page() {
        let about = page::About {
            model: model_name(args, &session),
            command: env::args().collect(),
            lines: lines.into_iter().map(|(label, text)| (label.to_owned(), text)).collect(),
            prefill: time,
        };
        let page = page::render(&explanation, &about);
        fs::write(path, &page).with_context(|| cannot_write(path))?;
        if !args.output.json {
            line("page", &format!("{}, {}", path.display(), bytes(page.len(), page.len())));
        }
    }
    if args.terminal {
        let view = terminal::view(&explanation, terminal::width());
        let mut out = anstream::stdout().lock();
        out.write_all(view.as_bytes()).and_then(|()| out.flush())?;
    }
    if args.output.json {
        let (model, policy) = (session.model().description(), session.policy());
        print_json(&Record { model, policy, prefill: &prefill, vote: &vote, explanation: &explanation })?;
    }
    Ok(())
}

/// Describes how many tokens left each head while the prompt was read, and how many came back.
fn in_words(recall: &Recalled) -> String {
    let [left, back] = [recall.left, recall.back()].map(|tokens| count(tokens.round() as usize));
    format!("{left} tokens had left each head, of which {back} came back and stay")
}

/// Returns the model's file name and description.
fn model_name(args: &ExplainArgs, session: &Session) -> String {
    let file = args.model.model.file_name().unwrap_or_default();
    format!("{}: {}", file.to_string_lossy(), session.model().description())
}

/// JSON object that `--json` prints.
#[derive(Serialize)]
struct Record<'a> {
    model: String,
    policy: &'a Params,
    prefill: &'a Prefill,
    vote: &'a Vote,
    #[serde(flatten)]
    explanation: &'a Explanation,
}

/// Checks before the work that the page can be written. Leaves an existing file unchanged.
fn check_writable(path: &Path) -> Result<()> {
    let open = |options: &mut fs::OpenOptions| options.append(true).open(path).map(drop);
    let tried = match open(File::options().create_new(true)) {
        Ok(()) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open(&mut File::options()),
        Err(error) => Err(error),
    };
    tried.with_context(|| cannot_write(path))
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write the page to {} (-o)", path.display())
}
