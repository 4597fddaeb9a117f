//! Steps of a turn with their progress display: loading, reading the prompt, voting, answering.

use std::cell::OnceCell;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use gvote::explain::Explanation;
use gvote::llama::rpc::{self, Endpoint};
use gvote::llama::{Model, Pieces, Pos, Sampler, Token};
use gvote::policy::Kind;
use gvote::session::{CompressReport, GenerateReport, PrefillReport, Stop, Stuck};
use gvote::{Session, SessionError, SessionParams};
use gvote_gguf::{Gguf, Support};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Exit;
use super::args::{ModelArgs, OutputArgs, name_flag};
use super::crash::{self, Step};
use super::fits::Loaded;
use super::interrupt::Interrupt;
use super::reverse::Reverse;
use super::words::{bytes, count, note};

/// Redraws of a progress bar per second.
const REDRAWS: u8 = 10;
/// Length of the progress bar while a model loads; llama.cpp reports a fraction.
const LOAD_STEPS: f32 = 1000.0;
/// Time after which a worker that has not answered probably serves another client.
const PATIENCE: Duration = Duration::from_secs(3);

/// Runs the steps, shows their progress, and stops them on Ctrl-C.
pub struct Steps {
    pub interrupt: Interrupt,
    show_progress: bool,
    loaded: OnceCell<Loaded>,
}

impl Steps {
    pub fn new(output: &OutputArgs) -> Result<Self> {
        gvote::llama::log::set_verbose(output.verbose);
        Ok(Self {
            interrupt: Interrupt::install()?,
            // llama.cpp's log would break up the progress bars
            show_progress: io::stderr().is_terminal() && !output.json && !output.verbose,
            loaded: OnceCell::new(),
        })
    }

    pub fn load_model(&self, args: &ModelArgs, policy: Kind) -> Result<Model> {
        let file = check_model_file(args, policy)?;
        args.placement.check_adapters(&file)?;
        connect(&args.placement.rpc)?;
        crash::about(&args.model);
        crash::at(Step::Load);
        let loaded = self.loaded.get_or_init(|| Loaded::new(&file, args.placement.params()));
        loaded.check_weights(&file)?;
        let bar = self.bar(LOAD_STEPS as u64, "loading {bar:30} {percent} %");
        let model = Model::load(&args.model, &args.placement.params(), |done| {
            bar.set_position((done * LOAD_STEPS) as u64);
            !self.interrupt.pressed()
        });
        bar.finish_and_clear();
        self.unless_cancelled(model.map_err(name_flag))
    }

    /// Creates a session that Ctrl-C can stop.
    pub fn open(&self, model: &Model, params: &SessionParams) -> Result<Session> {
        crash::at(Step::Open);
        self.check_memory(params)?;
        let (asked, trained) = (params.context.n_ctx as usize, model.n_ctx_train());
        if asked > trained && params.grow_to == 0 {
            note(&format!("the model was trained for {} tokens; past them it may talk nonsense", count(trained)));
        }
        let session = Session::new(model, params)?;
        self.interrupt.cancels(session.cancel_flag());
        Ok(session)
    }

    /// Refuses a session that does not fit into the machine's memory.
    pub fn check_memory(&self, params: &SessionParams) -> Result<()> {
        self.loaded.get().map_or(Ok(()), |loaded| loaded.check_context(params))
    }

    /// Reads a prompt, which may have more tokens than the cache has cells.
    pub fn prefill_long(&self, session: &mut Session, tokens: &[Token]) -> Result<PrefillReport> {
        let bar = self.bar(tokens.len() as u64, "reading {bar:30} {human_pos}/{human_len} tokens in {elapsed}");
        crash::at(Step::Read);
        let report = session.prefill_long(tokens, |done, _| {
            bar.set_position(done as u64);
            ControlFlow::Continue(())
        });
        bar.finish_and_clear();
        tell_stuck(session);
        self.unless_cancelled(report)
    }

    pub fn compress(&self, session: &mut Session) -> Result<CompressReport> {
        let bar = self.bar(0, "voting {elapsed}");
        crash::at(Step::Vote);
        let report = session.compress();
        bar.finish_and_clear();
        self.unless_cancelled(report)
    }

    /// Votes and returns the vote with an explanation of its choices.
    pub fn explain(&self, session: &mut Session) -> Result<Explanation> {
        let bar = self.bar(0, "voting {elapsed}");
        crash::at(Step::Vote);
        let explanation = session.explain();
        bar.finish_and_clear();
        self.unless_cancelled(explanation)
    }

    /// Generates an answer, up to the first of `reverse_prompts`, and passes its text to `show` piece by piece. `asked`: time of the
    /// request.
    pub fn answer(
        &self,
        session: &mut Session,
        sampler: &mut Sampler,
        n_predict: i32,
        reverse_prompts: &[String],
        asked: Instant,
        mut show: impl FnMut(&str) -> io::Result<()>,
    ) -> Result<Reply> {
        let model = session.model().clone();
        let first = session.n_past();
        let (mut text, mut pieces, mut reverse) = (String::new(), Pieces::default(), Reverse::new(reverse_prompts));
        // bytes of the text after each token, and bytes shown so far
        let (mut lengths, mut shown, mut is_reversed) = (Vec::new(), 0, false);
        let (mut broken, mut timeline) = (Ok(()), Vec::new());
        crash::at(Step::Answer);
        let report = session.generate(sampler, n_predict, |token| {
            let tokens = lengths.len() + 1;
            if tokens.is_power_of_two() {
                timeline.push((tokens, asked.elapsed()));
            }
            let piece = pieces.push(&model.piece(token, false));
            text.push_str(&piece);
            lengths.push(text.len());
            let (part, is_end) = reverse.push(&piece);
            is_reversed = is_end;
            shown += part.len();
            broken = show(&part);
            if broken.is_err() || is_end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        broken?;
        let mut report = report?;
        tell_stuck(session);
        if is_reversed {
            report.stop = Stop::ReversePrompt;
            let cached = cut(session, first, &lengths, shown).map_or(text.clone(), |length| text[..length].to_owned());
            text.truncate(shown);
            return Ok(Reply { text, cached, report, timeline });
        }
        let mut rest = reverse.finish();
        if lengths.len() > report.tokens {
            // stopped between showing the token and decoding it
            text.truncate(lengths.iter().rev().nth(1).copied().unwrap_or(0));
        } else {
            let unfinished = pieces.finish();
            text.push_str(&unfinished);
            rest += &unfinished;
        }
        show(&rest)?;
        Ok(Reply { cached: text.clone(), text, report, timeline })
    }

    /// Replaces an error after Ctrl-C by [`Exit::Cancelled`]: the error only follows from the interruption.
    pub fn unless_cancelled<T>(&self, result: Result<T, impl Into<anyhow::Error>>) -> Result<T> {
        result.map_err(|error| if self.interrupt.pressed() { Exit::Cancelled.into() } else { error.into() })
    }

    /// Returns a progress bar over `len` things, with the remaining time.
    pub fn count(&self, len: u64, things: &str) -> ProgressBar {
        self.bar(len, &format!("{{bar:30}} {{human_pos}}/{{human_len}} {things} in {{elapsed}}, {{eta}} left"))
    }

    fn bar(&self, len: u64, template: &str) -> ProgressBar {
        if !self.show_progress {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template(template).expect("the templates are constants");
        let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr_with_hz(REDRAWS));
        bar.set_style(style.progress_chars("=> "));
        bar.enable_steady_tick(Duration::from_secs(1) / u32::from(REDRAWS));
        bar
    }
}

/// A generated answer.
pub struct Reply {
    pub text: String,
    /// Text whose tokens the cache holds: less than `text` if a reverse prompt began within a token, more if the cache could not be
    /// truncated.
    pub cached: String,
    pub report: GenerateReport,
    /// Time since the request at which there were 1, 2, 4 and so on tokens.
    pub timeline: Vec<(usize, Duration)>,
}

/// Removes the tokens of an answer that go past byte `end` from the cache. `lengths`: bytes of the text after each token. Returns the bytes
/// whose tokens stay; None if the cache cannot be truncated there.
fn cut(session: &mut Session, first: Pos, lengths: &[usize], end: usize) -> Option<usize> {
    let length = lengths.iter().copied().filter(|&length| length <= end).max().unwrap_or(0);
    // a token without own text belongs to the next token
    let kept = if length == 0 { 0 } else { lengths.partition_point(|&l| l < length) + 1 };
    session.truncate(first + kept as Pos).ok().map(|()| length)
}

/// Registers the devices of workers with llama.cpp.
pub fn connect(workers: &[Endpoint]) -> Result<()> {
    for worker in workers {
        let (done, is_done) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                if is_done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    note(&format!("waiting for the worker {worker}: it serves one client at a time"));
                }
            });
            let added = rpc::add_worker(worker);
            drop(done);
            added
        })?;
    }
    Ok(())
}

/// Checks a model file before llama.cpp does, whose errors say less.
fn check_model_file(args: &ModelArgs, policy: Kind) -> Result<Gguf> {
    // the error begins with the path
    let file = args.placement.open(&args.model);
    let file = file.and_then(|file| file.check().map(|()| file)).map_err(|e| anyhow!("-m {e}"))?;
    if let Support::Refused(reason) = file.info.support()
        && policy != Kind::Full
    {
        bail!("{}: this model is not supported: {reason}; --policy full runs it as it is", args.model.display());
    }
    Ok(file)
}

/// Notes why a cache no longer grows.
fn tell_stuck(session: &mut Session) {
    let Some(Stuck { n_ctx, memory }) = session.take_stuck() else { return };
    let why = memory.map_or_else(String::new, |(needed, available)| {
        let size = |n| bytes(n, n);
        format!(" (a larger one takes {} of memory, and {} are available)", size(needed), size(available))
    });
    note(&format!("the cache stays at {} cells{why}: cells are freed where the text needs more", count(n_ctx)));
}

/// Prints an answer on stdout while it is generated; prints nothing with `--json`.
pub struct Answer {
    is_shown: bool,
    is_mid_line: bool,
}

impl Answer {
    pub fn new(output: &OutputArgs) -> Self {
        Self { is_shown: !output.json, is_mid_line: false }
    }

    pub fn show(&mut self, text: &str) -> io::Result<()> {
        if !self.is_shown || text.is_empty() {
            return Ok(());
        }
        self.is_mid_line = !text.ends_with('\n');
        print(text)
    }

    /// Ends the last line if it has no newline yet.
    pub fn end_line(&mut self) -> io::Result<()> {
        if self.is_mid_line { self.show("\n") } else { Ok(()) }
    }
}

/// Writes to stdout and flushes.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Whether the session refused a prompt that does not fit.
pub fn is_too_long(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(SessionError::PromptTooLong { .. }))
}
