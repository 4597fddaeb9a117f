//! `gvote run`: answers one prompt.

use std::time::Instant;

use anyhow::Result;
use clap::Args;
use gvote::policy::Params;
use gvote::session::{Stop, When};

use super::Exit;
use super::args::{ContextArgs, ModelArgs, OutputArgs, PolicyArgs, SamplingArgs, WhenArgs};
use super::cells::Cells;
use super::prompt::{LengthArgs, RequestArgs};
use super::report::{Record, TurnReport, print_json};
use super::turn::{Answer, Steps};
use super::words::{count, note};

const EXAMPLES: &str = "\
Examples:
  gvote run -m model.gguf -p 'Why is the sky blue?'
  gvote run -m model.gguf -f report.txt -p 'What are the three main findings?' --temp 0
  git diff | gvote run -m model.gguf -f - -p 'Write a commit message.' --preset safe
  gvote run -m model.gguf -f book.txt -p 'Who is Ahab?' --max-cells 2048 --json | jq .vote
  gvote run -m model.gguf --raw -p 'Once upon a time' -n 64

The answer goes to stdout, all else to stderr. A model with a chat template gets the prompt as a user's message.";

/// Answer one prompt
#[derive(Args)]
#[command(after_help = EXAMPLES, allow_negative_numbers = true)]
pub struct RunArgs {
    #[command(flatten)]
    request: RequestArgs,
    #[command(flatten)]
    length: LengthArgs,

    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    context: ContextArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    when: WhenArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    output: OutputArgs,

    /// Leave out the prompt, which is printed before the answer if there is no chat template
    #[arg(long, help_heading = "Output")]
    no_display_prompt: bool,
}

pub fn run(args: &RunArgs) -> Result<()> {
    let policy = args.policy.params()?.policy;
    let steps = Steps::new(&args.output)?;
    let text = args.request.text()?;
    let grammar = args.sampling.grammar()?;
    steps.interrupt.begin();
    args.context.set_priority()?;
    let model = steps.load_model(&args.model, policy)?;
    let sampling = args.sampling.params(&model, grammar.as_ref())?;
    let prompt = args.request.request(&model, text)?;
    let cells = Cells::for_answer(&model, prompt.tokens.len(), args.length.predict);
    let (trained, predict) = (model.n_ctx_train(), usize::try_from(args.length.predict).unwrap_or(0));
    // a prompt beyond the training context already has its own note
    if (prompt.tokens.len()..prompt.tokens.len() + predict).contains(&trained) {
        note(&format!(
            "an answer of {} tokens may go past the {} that the model was trained for; there it may talk nonsense",
            count(predict),
            count(trained)
        ));
    }
    let params = args.policy.session(&args.context, cells.first())?;
    let mut session = steps.open(&model, &cells.given_to(params, &args.context))?;
    session.set_system_tokens(prompt.system);

    let when = args.when.given().unwrap_or(default_when(session.policy()));
    session.set_vote(when);
    let asked = Instant::now();
    let prefill = steps.prefill_long(&mut session, &prompt.tokens)?;
    let over_cap = session.policy().max_cells.is_some_and(|cap| session.cells_used() > cap);
    let vote = if when == When::Prompt || over_cap {
        session.set_vote(When::Prompt);
        Some(steps.compress(&mut session)?)
    } else {
        None
    };
    let mut shown = Answer::new(&args.output);
    if prompt.is_raw && !args.no_display_prompt {
        shown.show(&prompt.text)?;
    }
    let mut sampler = session.sampler(&sampling, args.length.predict)?;
    let ends = args.length.reverse_prompts();
    let answer =
        steps.answer(&mut session, &mut sampler, args.length.predict, &ends, asked, |piece| shown.show(piece))?;
    let report = TurnReport::new(&session, prefill, vote, answer);

    if args.output.json {
        print_json(&Record::new(&report, &session, sampling.seed, None))?;
    } else {
        shown.end_line()?;
        note("");
        report.print();
    }
    if report.decode.stop == Stop::Cancelled { Err(Exit::Cancelled.into()) } else { Ok(()) }
}

/// Votes before the answer if `--ratio` or `--replay` ask for a vote whatever it costs; otherwise only if the vote pays off.
fn default_when(policy: &Params) -> When {
    if policy.ratio.is_some() || policy.replay { When::Prompt } else { When::Auto }
}
