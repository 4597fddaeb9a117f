//! `gvote chat`: a conversation with a model.

use std::env;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

use anyhow::{Error, Result, bail};
use clap::Args;
use gvote::SessionParams;
use gvote::policy::Kind;
use gvote::session::{Recall, Stop, When};
use gvote_chat::{Message, Role};

use super::args::{ContextArgs, ModelArgs, OutputArgs, PolicyArgs, RecallArgs, SamplingArgs, WhenArgs, share};
use super::cells::Cells;
use super::conversation::Conversation;
use super::input::{Entry, Input};
use super::prompt::{LengthArgs, PromptArgs, tell_of_system};
use super::report::{Cache, Record, TurnReport, print_json};
use super::turn::{Answer, Steps, is_too_long};
use super::words::{count, line, note, plural};
use super::{Exit, is_closed_pipe, print_error};

const EXAMPLES: &str = "\
Examples:
  gvote chat -m model.gguf
  gvote chat -m model.gguf -sys 'Answer in one sentence.' -f report.txt -p 'Who wrote this?'
  gvote chat -m model.gguf --max-cells 1024 -c 2048
  gvote chat -m model.gguf --session talk.gvote
  printf 'Hi!\\nAnd in French?\\n' | gvote chat -m model.gguf --json

A line that ends in \\ goes on in the next one; a line of \"\"\" begins and ends a block.
What begins with / and is no command is a message, and a block always is.
/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the chat. Without a terminal each line is a message.";

/// Chat with a model
#[derive(Args)]
#[command(after_help = EXAMPLES, allow_negative_numbers = true)]
pub struct ChatArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    length: LengthArgs,

    /// End after one answer; with -p or -f, do not wait for input
    #[arg(long, help_heading = "Prompt")]
    single_turn: bool,

    /// Continue the conversation saved in this file, if it exists; save the conversation there at the end and with /save
    #[arg(long, value_name = "FILE", help_heading = "Prompt")]
    session: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    context: ContextArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    when: WhenArgs,
    #[command(flatten)]
    recall: RecallArgs,

    /// With --vote prompt: vote again once the cache has grown by this share of the cells left by the last vote
    #[arg(long, value_name = "SHARE", default_value_t = 0.25, help_heading = "Cache policy", value_parser = share)]
    revote_share: f32,

    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy)]
enum Command {
    Stats,
    Regen,
    Edit,
    System,
    Clear,
    Save,
    Load,
    Help,
    Exit,
}

/// Commands: name, argument, description.
const COMMANDS: [(Command, &str, &str, &str); 9] = [
    (Command::Stats, "/stats", "", "tokens, cells, bytes and times so far"),
    (Command::Regen, "/regen", "", "answer the last message again"),
    (Command::Edit, "/edit", "TEXT", "say this instead of the last message"),
    (Command::System, "/system", "[TEXT]", "set the system message, or none, and start over"),
    (Command::Clear, "/clear", "", "forget the conversation"),
    (Command::Save, "/save", "[FILE]", "save the conversation and its cache, without a name to the file of --session"),
    (Command::Load, "/load", "FILE", "go on with a saved conversation"),
    (Command::Help, "/help", "", "this list"),
    (Command::Exit, "/exit", "", "end the chat (as does Ctrl-D)"),
];

struct Chat<'a> {
    args: &'a ChatArgs,
    steps: Steps,
    conversation: Conversation,
    seed: u32,
    last: Option<TurnReport>,
    /// Whether a person types the messages, and so can read an error and try again.
    is_interactive: bool,
    failed: usize,
}

pub fn run(args: &ChatArgs) -> Result<()> {
    let params = args.policy.session(&args.context, 0)?;
    if params.policy.replay {
        let why = "--replay needs the whole context in the cache, which a chat has before its first vote only: take gvote run";
        return Err(Exit::Usage(why.into()).into());
    }
    let on_terminal = io::stdin().is_terminal() && io::stdout().is_terminal() && !args.output.json;
    let steps = Steps::new(&args.output)?;
    let first = args.prompt.text()?;
    let grammar = args.sampling.grammar()?;

    steps.interrupt.begin();
    args.context.set_priority()?;
    let recall = args.recall.open()?;
    let model = steps.load_model(&args.model, params.policy.policy)?;
    let sampling = args.sampling.params(&model, grammar.as_ref())?;
    let template = args.prompt.template(&model)?;
    if template.is_fallback() {
        note("this model has no chat template; ChatML is used");
    }
    let cells = Cells::for_chat(&model);
    let params = cells.given_to(args.policy.session(&args.context, cells.first())?, &args.context);
    let recall_type = args.recall.recall_type();
    if matches!(recall, Recall::Off) && params.policy.policy != Kind::Full {
        note("--recall off: what the vote for one message drops is lost for all that come after it");
    }
    let session = steps.open(
        &model,
        &SessionParams { recall, recall_type, renew: args.recall.renew, more_questions: true, ..params },
    )?;
    let system = args.prompt.system()?;
    tell_of_system(&template, system.as_ref());
    steps.interrupt.end();

    let revote_share = f64::from(args.revote_share);
    let mut chat = Chat {
        args,
        steps,
        seed: sampling.seed,
        conversation: Conversation::new(
            session,
            sampling,
            template,
            &args.length,
            revote_share,
            args.when.given().unwrap_or(When::Auto),
        ),
        last: None,
        is_interactive: on_terminal,
        failed: 0,
    };
    chat.conversation.set_system(system);
    chat.take_up_session()?;
    if on_terminal {
        chat.greet();
    }
    let talked = chat.talk(first);
    let kept = chat.keep_session();
    if let (Err(_), Err(error)) = (&talked, &kept) {
        // the first error decides the exit status
        print_error(error);
    }
    talked.and(kept)?;
    chat.conclude()
}

impl Chat<'_> {
    fn greet(&self) {
        let session = self.conversation.session();
        let most = match session.n_ctx_most() {
            most if most > session.n_ctx() => format!(" (up to {} when it needs them)", count(most)),
            _ => String::new(),
        };
        note(&format!(
            "{}, {} cells{most}, policy {}. /help lists the commands, Ctrl-D ends the chat.",
            session.model().description(),
            count(session.n_ctx()),
            session.policy().policy,
        ));
    }

    /// Loads the file of `--session`. If it does not exist, creates it at once, so that a path which cannot be written is reported before
    /// the conversation and not after it.
    fn take_up_session(&mut self) -> Result<()> {
        let Some(path) = &self.args.session else { return Ok(()) };
        if !path.exists() {
            return self.conversation.save(path);
        }
        let asked = self.conversation.system().cloned();
        let messages = self.conversation.load(path)?;
        if asked.is_some() && asked.as_ref() != self.conversation.system() {
            bail!(
                "the conversation in {} has another system message: leave -sys out, or name another file",
                path.display()
            );
        }
        if messages > 0 {
            self.tell_loaded(messages);
        }
        Ok(())
    }

    fn keep_session(&mut self) -> Result<()> {
        match &self.args.session {
            Some(path) if !self.conversation.is_in(path) => self.conversation.save(path),
            _ => Ok(()),
        }
    }

    fn tell_loaded(&self, messages: usize) {
        let cache = Cache::of(self.conversation.session()).in_words();
        note(&format!("loaded {}, {cache}", plural(messages, "message")));
    }

    fn talk(&mut self, first: Option<String>) -> Result<()> {
        if let Some(text) = first {
            self.message(text)?;
            if self.args.single_turn {
                return Ok(());
            }
        }
        let mut input =
            if self.is_interactive { Input::editor(COMMANDS.iter().map(|c| c.1).collect())? } else { Input::lines() };
        loop {
            let (text, is_block) = match input.next()? {
                Entry::Text { text, .. } if text.trim().is_empty() => continue,
                Entry::Text { text, is_block } => (text, is_block),
                Entry::Refused(error) => {
                    self.fail(error)?;
                    continue;
                }
                Entry::Cleared => continue,
                Entry::End => return Ok(()),
            };
            if let Some((command, rest)) = command(&text).filter(|_| !is_block) {
                match self.command(command, rest) {
                    Ok(true) => {}
                    Ok(false) => return Ok(()),
                    Err(error) => self.survive(error)?,
                }
                continue;
            }
            if self.is_interactive && !is_block && text.starts_with('/') {
                note("no command, so it is a message; /help lists the commands");
            }
            self.message(text)?;
            if self.args.single_turn {
                return Ok(());
            }
        }
    }

    fn message(&mut self, text: String) -> Result<()> {
        self.turn(|conversation, steps, answer| conversation.ask(text, steps, |piece| answer.show(piece)))
    }

    /// Generates one answer, shows it, and reports on it.
    fn turn(&mut self, work: impl FnOnce(&mut Conversation, &Steps, &mut Answer) -> Result<TurnReport>) -> Result<()> {
        let mut answer = Answer::new(&self.args.output);
        self.steps.interrupt.begin();
        let report = work(&mut self.conversation, &self.steps, &mut answer);
        self.steps.interrupt.end();
        let report = match report {
            Ok(report) => report,
            Err(error) => {
                answer.end_line()?;
                return self.fail(error);
            }
        };
        if self.args.output.json {
            print_json(&Record::new(
                &report,
                self.conversation.session(),
                self.seed,
                Some(self.conversation.totals.turns),
            ))?;
        } else {
            answer.end_line()?;
            note(&format!("[{}]", report.summary()));
        }
        let stop = report.decode.stop;
        self.last = Some(report);
        match stop {
            Stop::ContextFull => self.tell_full(),
            Stop::Cancelled if !self.is_interactive => return Err(Exit::Cancelled.into()),
            _ => {}
        }
        Ok(())
    }

    /// Reports that a message got no answer.
    fn fail(&mut self, error: Error) -> Result<()> {
        if self.args.output.json {
            print_json(&serde_json::json!({ "error": format!("{error:#}") }))?;
        }
        self.survive(error)
    }

    fn tell_full(&self) {
        let session = self.conversation.session();
        let trained = session.model().n_ctx_train();
        note(&if session.n_past() as usize >= trained {
            let trained = count(trained);
            format!(
                "the conversation is as long as the {trained} tokens that the model was trained for: /clear starts over"
            )
        } else {
            "the context is full: /clear starts over, a larger -c makes room".into()
        });
    }

    /// Reports an error that the chat can survive; returns the others.
    fn survive(&mut self, error: Error) -> Result<()> {
        let is_cancelled = matches!(error.downcast_ref(), Some(Exit::Cancelled));
        if is_closed_pipe(&error) || (is_cancelled && !self.is_interactive) || self.args.single_turn {
            return Err(error);
        }
        let error = if is_too_long(&error) { error.context("try a shorter message, or /clear") } else { error };
        print_error(&error);
        self.failed += usize::from(!is_cancelled);
        Ok(())
    }

    /// Executes a command. Returns false if it ends the chat.
    fn command(&mut self, command: Command, rest: &str) -> Result<bool> {
        match command {
            Command::Exit => return Ok(false),
            Command::Help => help(),
            Command::Stats => self.stats(),
            Command::Clear => {
                self.conversation.clear();
                self.last = None;
                note("forgotten");
            }
            Command::System => {
                let message = (!rest.is_empty()).then(|| Message::new(Role::System, rest));
                tell_of_system(self.conversation.template(), message.as_ref());
                self.conversation.set_system(message);
                self.last = None;
                note("the conversation starts over");
            }
            Command::Regen => {
                self.turn(|conversation, steps, answer| conversation.regenerate(steps, |piece| answer.show(piece)))?
            }
            Command::Edit => {
                if rest.is_empty() {
                    bail!("/edit needs the text to say instead of the last message");
                }
                let text = rest.to_owned();
                self.turn(|conversation, steps, answer| conversation.edit(text, steps, |piece| answer.show(piece)))?
            }
            Command::Save => {
                let path = match &self.args.session {
                    Some(path) if rest.is_empty() => path.clone(),
                    _ => file_name("/save", rest)?,
                };
                self.conversation.save(&path)?;
                note(&format!("saved to {}", path.display()));
            }
            Command::Load => {
                let path = file_name("/load", rest)?;
                let messages = self.conversation.load(&path)?;
                self.last = None;
                self.tell_loaded(messages);
            }
        }
        Ok(true)
    }

    fn stats(&self) {
        if let Some(report) = &self.last {
            report.print();
        }
        self.print_totals();
    }

    fn print_totals(&self) {
        line("total", &self.conversation.totals.in_words());
        line("now", &Cache::of(self.conversation.session()).in_words());
    }

    /// Prints the final report. Fails if a message failed in a chat that is not interactive, where nobody could repeat it.
    fn conclude(&self) -> Result<()> {
        if !self.args.output.json && self.conversation.totals.turns > 0 {
            note("");
            self.print_totals();
        }
        if self.failed > 0 && !self.is_interactive {
            bail!("{} of the lines failed; see above", self.failed);
        }
        Ok(())
    }
}

/// Splits a text into a command and its argument; None: the text is a message. A command without an argument must stand alone.
fn command(text: &str) -> Option<(Command, &str)> {
    let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let name = if name == "/quit" { "/exit" } else { name };
    let (command, _, value, _) = COMMANDS.into_iter().find(|(_, known, ..)| *known == name)?;
    let rest = rest.trim();
    (!value.is_empty() || rest.is_empty()).then_some((command, rest))
}

fn help() {
    for (_, name, value, about) in COMMANDS {
        line(&format!("{name} {value}"), about);
    }
    line("\\", "at the end of a line: the message goes on in the next one");
    line("\"\"\"", "alone on a line: begins and ends a message of many lines, which is never a command");
}

/// Returns the path given after a command; `~/` stands for the home folder, as in a shell.
fn file_name(command: &str, name: &str) -> Result<PathBuf> {
    if name.is_empty() {
        bail!("{command} needs the name of a file");
    }
    let home = name.strip_prefix("~/").zip(env::home_dir());
    Ok(home.map_or_else(|| PathBuf::from(name), |(rest, home)| home.join(rest)))
}
