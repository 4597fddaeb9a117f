//! A conversation, and the cache that holds it.

use std::io;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use gvote::Session;
use gvote::llama::{ChatTemplate, Message, Pos, Role, Sampler, Token};
use gvote::policy::{Kind, Params};
use gvote::session::{CompressReport, PrefillReport};
use serde::{Deserialize, Serialize};

use super::chat_file;
use super::prompt::{tokenize_more, tokenize_start};
use super::report::{Totals, TurnReport};
use super::turn::Steps;

/// Above this share of the context every turn votes: what a vote frees may be what the next message needs.
const NEARLY_FULL: f64 = 0.75;

pub struct Conversation {
    session: Session,
    sampler: Sampler,
    template: ChatTemplate,
    predict: i32,
    revote_share: f64,
    state: State,
    pub totals: Totals,
}

/// What a conversation is beside its cache.
#[derive(Clone, Default, Serialize, Deserialize)]
struct State {
    messages: Vec<Message>,
    /// The text whose tokens the cache holds. Empty when the cache is.
    rendered: String,
    /// Where the answer to the last message begins.
    prompt_end: Option<PromptEnd>,
    /// Cells that the last vote left; None before the first.
    cells_after_vote: Option<usize>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct PromptEnd {
    /// Of the token before the answer.
    pos: Pos,
    token: Token,
}

/// The head of a saved conversation.
#[derive(Serialize, Deserialize)]
struct Saved {
    model: String,
    n_vocab: usize,
    policy: Params,
    state: State,
}

impl Conversation {
    pub fn new(session: Session, sampler: Sampler, template: ChatTemplate, predict: i32, revote_share: f64) -> Self {
        Self { session, sampler, template, predict, revote_share, state: State::default(), totals: Totals::default() }
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Says something and lets the model answer.
    ///
    /// # Errors
    /// Whatever goes wrong; the conversation is then as before.
    pub fn ask(&mut self, text: String, steps: &Steps, show: impl FnMut(&str) -> io::Result<()>) -> Result<TurnReport> {
        let before = self.checkpoint();
        self.state.messages.push(Message::new(Role::User, text));
        let report = self.read(steps).and_then(|(prefill, vote)| self.answer(prefill, vote, steps, show));
        report.inspect_err(|_| self.roll_back(before))
    }

    /// Makes the last answer again.
    ///
    /// # Errors
    /// Whatever goes wrong; the conversation is then as before.
    pub fn regenerate(&mut self, steps: &Steps, show: impl FnMut(&str) -> io::Result<()>) -> Result<TurnReport> {
        if self.state.messages.last().is_none_or(|m| m.role != Role::Assistant) {
            bail!("there is no answer to make again");
        }
        let before = self.checkpoint();
        self.state.messages.pop();
        let prefill = match self.state.prompt_end {
            Some(end) if !self.state.rendered.is_empty() => self.rewind(end, steps).map(|p| (p, None)),
            _ => self.read(steps),
        };
        let report = prefill.and_then(|(prefill, vote)| self.answer(prefill, vote, steps, show));
        report.inspect_err(|_| self.roll_back(before))
    }

    /// Forgets everything but the system message.
    pub fn clear(&mut self) {
        self.state.messages.retain(|m| m.role == Role::System);
        self.forget_cache();
    }

    /// Sets the system message, or none, and starts over.
    pub fn set_system(&mut self, message: Option<Message>) {
        self.state.messages = message.into_iter().collect();
        self.forget_cache();
    }

    /// Saves the conversation with its cache.
    pub fn save(&mut self, path: &Path) -> Result<()> {
        let head = Saved {
            model: self.session.model().description(),
            n_vocab: self.session.model().n_vocab(),
            policy: self.session.policy().clone(),
            state: self.state.clone(),
        };
        let cache = if self.session.n_past() == 0 { Vec::new() } else { self.session.save() };
        chat_file::write(path, &head, &cache).with_context(|| format!("cannot save to {}", path.display()))
    }

    /// Goes on with a saved conversation. Answers how many messages it has.
    ///
    /// # Errors
    /// When the file is damaged or does not fit this model or these flags; the conversation is then as before.
    pub fn load(&mut self, path: &Path) -> Result<usize> {
        self.try_load(path).with_context(|| format!("cannot load {}", path.display()))?;
        Ok(self.state.messages.len())
    }

    fn try_load(&mut self, path: &Path) -> Result<()> {
        let (saved, cache): (Saved, _) = chat_file::read(path)?;
        let model = self.session.model();
        if (&saved.model, saved.n_vocab) != (&model.description(), model.n_vocab()) {
            bail!("it was saved with another model ({}); start with that one (-m)", saved.model);
        }
        if cache.is_empty() {
            self.session.clear();
        } else {
            self.session.load(&cache)?;
        }
        self.state = saved.state;
        Ok(())
    }

    /// Brings the cache up to date with the messages, and votes where it is time to.
    fn read(&mut self, steps: &Steps) -> Result<(PrefillReport, Option<CompressReport>)> {
        let text = self.template.render(&self.state.messages, true)?;
        if !text.starts_with(&self.state.rendered) {
            // some templates rewrite what was said before
            self.forget_cache();
        }
        let rest = &text[self.state.rendered.len()..];
        let tokens = if self.state.rendered.is_empty() {
            tokenize_start(self.session.model(), rest)?
        } else {
            tokenize_more(self.session.model(), rest)?
        };
        let prefill = steps.prefill(&mut self.session, &tokens)?;
        self.state.rendered = text;
        self.state.prompt_end = tokens.last().map(|&token| PromptEnd { pos: self.session.n_past() - 1, token });
        let vote = self.vote_is_due().then(|| steps.compress(&mut self.session)).transpose()?;
        if let Some(vote) = &vote
            && !self.session.policy().leaves_alone(vote.cells_before)
        {
            self.state.cells_after_vote = Some(vote.cells_after);
        }
        Ok((prefill, vote))
    }

    fn vote_is_due(&self) -> bool {
        let cells = self.session.cells_used();
        let policy = self.session.policy();
        let grown =
            self.state.cells_after_vote.is_none_or(|after| cells as f64 >= after as f64 * (1.0 + self.revote_share));
        let over_cap = policy.max_cells.is_some_and(|cap| cells > cap);
        let nearly_full = cells as f64 > NEARLY_FULL * self.session.n_ctx() as f64;
        policy.policy != Kind::Full && (grown || over_cap || nearly_full)
    }

    /// Takes the last answer out of the cache.
    fn rewind(&mut self, end: PromptEnd, steps: &Steps) -> Result<PrefillReport> {
        self.state.rendered = self.template.render(&self.state.messages, true)?;
        // the last token of the prompt is read again for its logits
        self.session.truncate(end.pos)?;
        steps.prefill(&mut self.session, &[end.token])
    }

    fn answer(
        &mut self,
        prefill: PrefillReport,
        vote: Option<CompressReport>,
        steps: &Steps,
        show: impl FnMut(&str) -> io::Result<()>,
    ) -> Result<TurnReport> {
        let answer = steps.answer(&mut self.session, &mut self.sampler, self.predict, show)?;
        self.state.rendered.push_str(&answer.0);
        self.state.messages.push(Message::new(Role::Assistant, &answer.0));
        let report = TurnReport::new(&self.session, prefill, vote, answer);
        self.totals.add(&report);
        Ok(report)
    }

    fn forget_cache(&mut self) {
        self.session.clear();
        self.state.rendered.clear();
        self.state.prompt_end = None;
        self.state.cells_after_vote = None;
    }

    fn checkpoint(&self) -> (State, Pos) {
        (self.state.clone(), self.session.n_past())
    }

    /// Back to a checkpoint. What the cache can no longer give back is read again with the next message.
    fn roll_back(&mut self, (state, n_past): (State, Pos)) {
        let extends = self.state.rendered.starts_with(&state.rendered) && self.session.n_past() >= n_past;
        let cells_after_vote = self.state.cells_after_vote;
        self.state = state;
        if extends && self.session.truncate(n_past).is_ok() {
            self.state.cells_after_vote = cells_after_vote;
        } else {
            self.forget_cache();
        }
    }
}
