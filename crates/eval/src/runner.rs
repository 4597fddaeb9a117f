//! Runs requests: reads each prompt once and starts every configuration from the saved full cache.

mod adaptivity;
#[cfg(test)]
mod tests;
mod turns;

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::Path;

use super::config::Config;
use super::metrics::Distance;
use super::record::{Fidelity, Journal, Record, RecordError, Run, TaskScore};
use super::tasks::Sample;
pub use adaptivity::{Next, Request};
use gvote::llama::{LlamaError, Model, Pos, Sampler, SamplerParams, Token};
use gvote::policy::Kind;
use gvote::session::{Recall, Stop};
use gvote::{Session, SessionError, SessionParams};
use gvote_chat::{ChatTemplate, Message, Rendered, Role, TemplateError};

/// Why an evaluation stops.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Llama(#[from] LlamaError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the configurations differ in {0}, which one session cannot change: evaluate them one after another")]
    Mixed(&'static str),
    #[error(
        "{config}: ctx-size is too few cells to go on in: {least} is the least with its sinks, recent and protected tokens"
    )]
    TooFew { config: String, least: usize },
    #[error("{0}: {1}")]
    Config(String, SessionError),
    #[error("the model has nothing to say to {0}")]
    NoAnswer(String),
    #[error("{0}: ctx-size leaves no full cache to search for C* in; leave it out, or use max-cells")]
    CtxSize(String),
}

/// A piece of text to continue.
pub struct Continuation<'a> {
    pub item: String,
    pub prompt: &'a [Token],
    /// The actual continuation of the prompt; comparisons start after its first token.
    pub next: &'a [Token],
}

/// Evaluates configurations on one model.
pub struct Runner {
    session: Session,
    template: Option<ChatTemplate>,
    configs: Vec<Config>,
    seeds: Vec<u64>,
    journal: Journal,
    done: HashSet<String>,
    model: String,
    cache_type: String,
}

/// The state that every configuration starts from.
struct Prompt {
    tokens: Vec<Token>,
    /// Number of tokens of the system message.
    system: usize,
    /// Position at which the answer at the end of the prompt begins, if there is one.
    answer: Option<Pos>,
    /// The saved session with all of the tokens.
    saved: Vec<u8>,
}

/// Tokenizes the context and the rest separately, so that both orders of compression and question use the same tokens.
fn parts_of(model: &Model, template: Option<&ChatTemplate>, sample: &Sample) -> Result<[Vec<Token>; 2], EvalError> {
    let (turn, context) = (sample.full_turn(), sample.context.trim_end());
    let Some(template) = template else {
        return Ok(Rendered::plain(turn + &sample.answer_prefix).tokens_split(model, context.len())?);
    };
    let end = end_of_context(template, &turn, context)?;
    let text = template.render_answer(&[Message::new(Role::User, turn)], sample.answer_prefix.trim_start())?;
    Ok(text.tokens_split(model, end)?)
}

/// Returns the length in bytes of a rendered turn up to the end of the context at its start.
fn end_of_context(template: &ChatTemplate, turn: &str, context: &str) -> Result<usize, TemplateError> {
    /// A private-use character of Unicode, which no text contains.
    const CUT: char = '\u{F8FF}';
    let render = |turn: &str| template.render(&[Message::new(Role::User, turn)], true);
    let (whole, cut) = (render(turn)?, render(&turn.replacen(context, &format!("{context}{CUT}"), 1))?);
    let head = cut.text().split_once(CUT).filter(|(head, tail)| whole.text() == [*head, *tail].concat());
    // A template that searches messages may react to the cut character.
    let found = || whole.text().find(context.trim_start()).map(|at| at + context.trim_start().len());
    Ok(head.map(|(head, _)| head.len()).or_else(found).unwrap_or(0))
}

/// Continuation of a prompt with the full cache.
struct Reference {
    prompt: Prompt,
    tokens: Vec<Token>,
    /// The predictions after earlier tokens are not compared.
    from: usize,
    /// Next-token logits after each of `tokens[from..]` except the last, `[n_vocab]` each.
    full: Vec<Vec<f32>>,
}

/// Returns a key that identifies a measurement.
fn key(kind: &str, suite: &str, run: &Run) -> String {
    let Run { model, cache_type, config, seed, item, blind, .. } = run;
    format!("{kind}\t{model}\t{cache_type}\t{suite}\t{item}\t{config}\t{seed}\t{blind}")
}

fn key_of(record: &Record) -> Option<String> {
    match record {
        Record::Start(_) => None,
        Record::Fidelity(r) => Some(key("fidelity", "", &r.run)),
        Record::Task(r) => Some(key("task", &r.suite, &r.run)),
        Record::Adaptivity(r) => Some(key("adaptivity", &r.target.to_string(), &r.run)),
    }
}

impl Runner {
    /// Creates a runner. `params`: settings of the context; the policy is ignored. `raw`: use prompts without the chat
    /// template.
    ///
    /// # Errors
    /// [`EvalError::Mixed`] for configurations that need different sessions, or the error of creating the session.
    pub fn new(
        path: &Path,
        model: &Model,
        params: &SessionParams,
        configs: Vec<Config>,
        seeds: Vec<u64>,
        raw: bool,
        journal: Journal,
    ) -> Result<Self, EvalError> {
        let voting = || configs.iter().filter(|c| !c.is_full()).map(|c| &c.params);
        let mut params = params.clone();
        // A configuration with a replay first, because the session reserves cells for it.
        if let Some(first) = voting().find(|p| p.replay).or(voting().next()) {
            if voting().any(|p| p.window != first.window) {
                return Err(EvalError::Mixed("window"));
            }
            if voting().any(|p| p.sinks != first.sinks) {
                return Err(EvalError::Mixed("sinks"));
            }
            params.policy = first.clone();
            // The session reserves cells for the most demanding configuration.
            params.policy.samples = voting().map(|p| p.samples).max().unwrap_or(first.samples);
            params.policy.draft = voting().map(|p| p.draft).max().unwrap_or(first.draft);
        }
        let template = ChatTemplate::of(model);
        Ok(Self {
            session: Session::new(model, &params)?,
            template: (!raw && !template.is_fallback()).then_some(template),
            done: journal.records.iter().filter_map(key_of).collect(),
            configs,
            seeds,
            journal,
            model: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            cache_type: format!("{}/{}", params.context.type_k.name(), params.context.type_v.name()),
        })
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    pub fn records(&self) -> &[Record] {
        &self.journal.records
    }

    fn run(&self, config: &Config, seed: u64, item: &str, blind: bool) -> Run {
        Run {
            model: self.model.clone(),
            cache_type: self.cache_type.clone(),
            config: config.name.clone(),
            policy: config.params.policy,
            seed,
            item: item.into(),
            tokens: 0,
            cells: 0,
            exact: config.params.exact,
            ragged: None,
            blind,
        }
    }

    /// Returns the remaining measurements of this request: configurations with their seeds.
    fn missing(&self, kind: &str, suite: &str, item: &str, blind: bool) -> Vec<(Config, Run)> {
        let mut out = Vec::new();
        for config in &self.configs {
            // The full cache does not depend on the seed.
            let seeds = if config.is_full() { &self.seeds[..1] } else { &self.seeds[..] };
            for &seed in seeds {
                let run = self.run(config, seed, item, blind);
                if !self.done.contains(&key(kind, suite, &run)) {
                    out.push((config.clone(), run));
                }
            }
        }
        out
    }

    fn add(&mut self, record: Record) -> Result<(), EvalError> {
        self.done.extend(key_of(&record));
        Ok(self.journal.add(record)?)
    }

    fn prefill(&mut self, tokens: &[Token]) -> Result<(), EvalError> {
        self.session.prefill(tokens, |_, _| ControlFlow::Continue(()))?;
        Ok(())
    }

    /// Clears the session and reads a prompt without compression.
    fn read_prompt(&mut self, tokens: Vec<Token>, system: usize) -> Result<Prompt, EvalError> {
        self.session.limit_cells(usize::MAX);
        self.session.clear();
        self.prefill(&tokens)?;
        Ok(Prompt { tokens, system, answer: None, saved: self.session.save() })
    }

    /// Restores the full cache, or reads the prompt again with the limited cells of a configuration, and compresses it.
    /// `recall`: handling of evicted rows if the configuration does not set it. Returns the attempts of a trial.
    fn compress(
        &mut self,
        prompt: &Prompt,
        config: &Config,
        recall: Recall,
        run: &mut Run,
    ) -> Result<Vec<(usize, f32)>, EvalError> {
        self.session.set_recall(config.recall.clone().unwrap_or(recall));
        (run.tokens, run.cells) = (prompt.tokens.len(), prompt.tokens.len());
        self.session.limit_cells(config.ctx_size.unwrap_or(usize::MAX));
        if config.is_full() {
            self.session.load(&prompt.saved)?;
            return Ok(Vec::new());
        }
        let mut params = config.params.clone();
        params.seed = run.seed;
        let named = |error| match error {
            SessionError::CacheTooSmall { least, .. } => EvalError::TooFew { config: config.name.clone(), least },
            error => EvalError::Config(config.name.clone(), error),
        };
        self.session.set_policy(params, config.account_error).map_err(named)?;
        self.session.set_system_tokens(prompt.system);
        if config.ctx_size.is_some() {
            self.session.clear();
            self.session.prefill_long(&prompt.tokens, |_, _| ControlFlow::Continue(())).map_err(named)?;
        } else {
            self.session.load(&prompt.saved)?;
        }
        let report = match prompt.answer {
            Some(start) => self.session.compress_answer(start),
            None => self.session.compress(),
        };
        let report = report.map_err(named)?;
        (run.cells, run.ragged) = (report.cells_after, report.ragged);
        Ok(report.tried)
    }

    /// Answers a sample under every configuration that is missing in the journal. Returns the number of added records.
    ///
    /// # Errors
    /// [`EvalError`]; earlier measurements are in the journal.
    pub fn task(&mut self, sample: &Sample, blind: bool) -> Result<usize, EvalError> {
        let missing = self.missing("task", &sample.suite, &sample.item, blind);
        if missing.is_empty() {
            return Ok(0);
        }
        let [mut context, rest] = self.tokens_of(sample)?;
        let system = self.system_of(sample, &context)?;
        if !blind {
            context.extend(&rest);
        }
        let prompt = self.read_prompt(context, system)?;
        let added = missing.len();
        for (config, mut run) in missing {
            self.compress(&prompt, &config, Recall::Off, &mut run)?;
            if blind {
                self.session.prefill_long(&rest, |_, _| ControlFlow::Continue(()))?;
                if config.recall == Some(Recall::Auto) && !config.is_full() {
                    // As in a chat, all rows return before the question, which votes on them.
                    run.cells = self.session.compress()?.cells_after;
                    run.tokens = self.session.n_past() as usize;
                }
            }
            let answer = self.answer(sample.max_tokens)?;
            let answer = self.session.model().detokenize(&answer, false);
            let score = sample.metric.score(&answer, &sample.references);
            self.add(Record::Task(TaskScore {
                run,
                suite: sample.suite.clone(),
                task: sample.task.clone(),
                score,
                answer,
                depth: sample.depth,
            }))?;
        }
        Ok(added)
    }

    fn tokens_of(&self, sample: &Sample) -> Result<[Vec<Token>; 2], EvalError> {
        parts_of(self.session.model(), self.template.as_ref(), sample)
    }

    /// Returns the number of a context's tokens that the template wrote before it; a task has no system message of its
    /// own.
    fn system_of(&self, sample: &Sample, tokens: &[Token]) -> Result<usize, EvalError> {
        let Some(template) = &self.template else { return Ok(0) };
        let messages = [Message::new(Role::User, sample.full_turn())];
        template.system_tokens(self.session.model(), &messages, tokens)
    }

    fn greedy(&self) -> Result<Sampler, LlamaError> {
        Sampler::new(self.session.model(), &SamplerParams { temp: 0.0, ..SamplerParams::default() }, 0)
    }

    /// Returns the greedy answer, without the token that ends it.
    fn answer(&mut self, max_tokens: i32) -> Result<Vec<Token>, EvalError> {
        let mut sampler = self.greedy()?;
        let mut tokens = Vec::new();
        let report = self.session.generate(&mut sampler, max_tokens, |token| {
            tokens.push(token);
            ControlFlow::Continue(())
        })?;
        // An incomplete answer does not count.
        if report.stop == Stop::Cancelled { Err(LlamaError::Cancelled.into()) } else { Ok(tokens) }
    }

    /// Compares continuations of a compressed prompt with those of the full cache. Returns the number of added records.
    ///
    /// # Errors
    /// [`EvalError`]; earlier measurements are in the journal.
    pub fn continuation(&mut self, text: &Continuation) -> Result<usize, EvalError> {
        let mut missing = self.missing("fidelity", "", &text.item, false);
        missing.retain(|(config, _)| config.params.policy != Kind::Full);
        if missing.is_empty() {
            return Ok(0);
        }
        let prompt = self.read_prompt(text.prompt.to_vec(), 0)?;
        let reference = self.reference(prompt, text.next.to_vec(), 0)?;
        let added = missing.len();
        for (config, mut run) in missing {
            let (distance, _) = self.drift(&reference, &config, &mut run)?;
            self.add(Record::Fidelity(Fidelity {
                run,
                steps: distance.steps,
                kl_mean: distance.mean_kl(),
                kl_median: distance.median_kl(),
                kl_p90: distance.p90_kl(),
                log_perplexity_ratio: distance.log_perplexity_ratio(),
                same_top: distance.same_top(),
            }))?;
        }
        Ok(added)
    }

    /// Computes the full cache's predictions after `tokens[from..]` except the last.
    fn reference(&mut self, prompt: Prompt, tokens: Vec<Token>, from: usize) -> Result<Reference, EvalError> {
        self.session.load(&prompt.saved)?;
        let mut full = Vec::with_capacity(tokens.len());
        self.session.follow(&tokens[..tokens.len() - 1], |i, logits| {
            if i >= from {
                full.push(logits.to_vec());
            }
        })?;
        Ok(Reference { prompt, tokens, from, full })
    }

    /// Measures the drift of a compressed cache from the full one. Returns it with the attempts of a trial.
    fn drift(
        &mut self,
        reference: &Reference,
        config: &Config,
        run: &mut Run,
    ) -> Result<(Distance, Vec<(usize, f32)>), EvalError> {
        let Reference { prompt, tokens, from, full } = reference;
        let recall = if config.renew.is_some() { Recall::Auto } else { Recall::Off };
        let tried = self.compress(prompt, config, recall, run)?;
        // The continuation is not part of the budget, so it always has room.
        self.session.limit_cells(usize::MAX);
        let mut distance = Distance::default();
        let mut add = |i: usize, logits: &[f32]| {
            if i >= *from {
                distance.add(&full[i - from], logits, tokens[i + 1] as usize);
            }
        };
        let tokens_read = &tokens[..tokens.len() - 1];
        let Some(every) = config.renew else {
            self.session.follow(tokens_read, add)?;
            return Ok((distance, tried));
        };
        for (i, &token) in tokens_read.iter().enumerate() {
            if i > 0 && i % every == 0 {
                let share = run.cells as f64 / run.tokens as f64;
                self.session.renew((share * f64::from(self.session.n_past())) as usize)?;
            }
            self.session.decode(token)?;
            add(i, self.session.logits());
        }
        Ok((distance, tried))
    }
}
