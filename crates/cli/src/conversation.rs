//! A conversation and the session that holds its cache.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Error, Result, bail};
use gvote::llama::{Pos, Sampler, SamplerParams, Token};
use gvote::policy::Kind;
use gvote::session::{AnswerVote, CompressReport, PrefillReport, When};
use gvote::{CompactError, Session, SessionError, VoteError};
use gvote_chat::{ChatTemplate, Message, Role};
use serde::{Deserialize, Serialize};

use super::crash::{self, Step};
use super::prompt::LengthArgs;
use super::report::{Totals, TurnReport};
use super::turn::Steps;
use super::words::{count, note};

/// Share of the context above which every turn votes, to free cells for the next message.
const NEARLY_FULL: f64 = 0.75;

pub struct Conversation {
    session: Session,
    sampling: SamplerParams,
    template: ChatTemplate,
    predict: i32,
    reverse_prompts: Vec<String>,
    revote_share: f64,
    when: When,
    /// Time of the newest request.
    asked: Instant,
    state: State,
    /// File that holds the conversation in its current state, if any.
    file: Option<PathBuf>,
    pub totals: Totals,
}

/// State of a conversation apart from its cache. Stored as the note in a session file.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    messages: Vec<Message>,
    /// Text whose tokens the cache holds; empty if the cache is empty.
    rendered: String,
    /// Time when this text was begun, in seconds since 1970; keeps the date in the template's text constant.
    #[serde(default)]
    begun: Option<i64>,
    /// The newest turn, if the cache holds it.
    turn: Option<Turn>,
    /// Number of cells that the last vote left; None before the first vote.
    cells_after_vote: Option<usize>,
    /// Number of answers generated so far.
    drawn: u32,
}

/// Places in a turn that the session has marked.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Turn {
    /// Start of the user's message.
    start: Place,
    /// Start of the answer.
    answer: Place,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Place {
    pos: Pos,
    /// Bytes of the rendered text before this place.
    text: usize,
}

impl State {
    /// Checks that the places lie in the text; the session checks the positions.
    fn checked(self) -> Result<Self, String> {
        let places = self.turn.iter().flat_map(|turn| [turn.start.text, turn.answer.text]);
        match places.into_iter().find(|&place| !self.rendered.is_char_boundary(place)) {
            Some(place) => Err(format!("no turn can begin at byte {place} of the text")),
            None => Ok(self),
        }
    }
}

impl Conversation {
    pub fn new(
        session: Session,
        sampling: SamplerParams,
        template: ChatTemplate,
        length: &LengthArgs,
        revote_share: f64,
        when: When,
    ) -> Self {
        let (state, totals) = (State::default(), Totals::default());
        let (predict, reverse_prompts) = (length.predict, length.reverse_prompts());
        Self {
            session,
            sampling,
            template,
            predict,
            reverse_prompts,
            revote_share,
            when,
            asked: Instant::now(),
            state,
            file: None,
            totals,
        }
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Returns the system message, if there is one.
    pub fn system(&self) -> Option<&Message> {
        self.state.messages.first().filter(|message| message.role == Role::System)
    }

    /// Whether this file holds the conversation in its current state.
    pub fn is_in(&self, path: &Path) -> bool {
        self.file.as_deref() == Some(path)
    }

    /// Adds a user message and generates the answer.
    ///
    /// # Errors
    /// Any error of the steps; the conversation is then unchanged.
    pub fn ask(&mut self, text: String, steps: &Steps, show: impl FnMut(&str) -> io::Result<()>) -> Result<TurnReport> {
        self.attempt(|conversation| {
            conversation.state.messages.push(Message::new(Role::User, text));
            let (prefill, vote) = conversation.read(steps)?;
            conversation.answer(prefill, vote, steps, show)
        })
    }

    /// Generates the last answer again. Starts where that answer began if the cache still holds that place exactly; otherwise reads the
    /// conversation again.
    ///
    /// # Errors
    /// Any error of the steps; the conversation is then unchanged.
    pub fn regenerate(&mut self, steps: &Steps, show: impl FnMut(&str) -> io::Result<()>) -> Result<TurnReport> {
        if self.state.messages.last().is_none_or(|m| m.role != Role::Assistant) {
            bail!("there is no answer to make again");
        }
        self.attempt(|conversation| {
            conversation.state.messages.pop();
            let place = conversation.state.turn.map(|turn| turn.answer);
            let is_back = conversation.go_back(place) && !conversation.session.logits().is_empty();
            let (prefill, vote) = if is_back { Default::default() } else { conversation.read(steps)? };
            conversation.answer(prefill, vote, steps, show)
        })
    }

    /// Replaces the last message and generates the answer. Starts where that message began if the cache still holds that place exactly;
    /// otherwise reads the conversation again.
    ///
    /// # Errors
    /// Any error of the steps; the conversation is then unchanged.
    pub fn edit(
        &mut self,
        text: String,
        steps: &Steps,
        show: impl FnMut(&str) -> io::Result<()>,
    ) -> Result<TurnReport> {
        let Some(last) = self.state.messages.iter().rposition(|message| message.role == Role::User) else {
            bail!("there is no message to replace");
        };
        self.attempt(|conversation| {
            conversation.state.messages.truncate(last);
            conversation.go_back(conversation.state.turn.map(|turn| turn.start));
            conversation.state.messages.push(Message::new(Role::User, text));
            let (prefill, vote) = conversation.read(steps)?;
            conversation.answer(prefill, vote, steps, show)
        })
    }

    /// Removes all messages except the system message.
    pub fn clear(&mut self) {
        self.state.messages.retain(|m| m.role == Role::System);
        self.file = None;
        self.forget_cache();
    }

    /// Sets or removes the system message, and starts a new conversation.
    pub fn set_system(&mut self, message: Option<Message>) {
        self.state.messages = message.into_iter().collect();
        self.file = None;
        self.forget_cache();
    }

    /// Saves the conversation with its cache.
    pub fn save(&mut self, path: &Path) -> Result<()> {
        let state = serde_json::to_vec(&self.state)?;
        self.session.save_to(path, &state).with_context(|| format!("cannot save to {}", path.display()))?;
        self.file = Some(path.into());
        Ok(())
    }

    /// Loads a saved conversation. Returns its number of messages.
    ///
    /// # Errors
    /// If the file is damaged, or does not fit this model or these flags; the conversation is then unchanged.
    pub fn load(&mut self, path: &Path) -> Result<usize> {
        let read =
            |note: &[u8]| serde_json::from_slice(note).map_err(|error| error.to_string()).and_then(State::checked);
        self.state = match self.session.load_from(path, read) {
            Ok(state) => state,
            Err(error) => {
                // restoring the old cache may have failed for lack of memory: the next message then reads everything again
                if self.session.n_past() == 0 {
                    self.forget_cache();
                }
                return Err(error).with_context(|| format!("cannot load {}", path.display()));
            }
        };
        self.file = Some(path.into());
        self.template.stop_clock(self.state.begun);
        let tokens = self.session.sequence().tokens().to_vec();
        self.protect_system(&tokens)?;
        Ok(self.state.messages.len())
    }

    /// Runs `work`, and restores the previous state if it fails. A cache that cannot be restored is read again with the next message.
    fn attempt(&mut self, work: impl FnOnce(&mut Self) -> Result<TurnReport>) -> Result<TurnReport> {
        let (state, n_past) = (self.state.clone(), self.session.n_past());
        self.asked = Instant::now();
        self.session.set_vote(self.when);
        let report = work(self);
        if report.is_ok() {
            self.file = None;
            return report;
        }
        let extends = self.state.rendered.starts_with(&state.rendered) && self.session.n_past() >= n_past;
        let cells_after_vote = self.state.cells_after_vote;
        self.state = state;
        if extends && self.session.truncate(n_past).is_ok() {
            self.state.cells_after_vote = cells_after_vote;
        } else {
            self.forget_cache();
        }
        report
    }

    /// Truncates the cache at a place, or clears it if that is impossible. Returns false if it was cleared.
    fn go_back(&mut self, place: Option<Place>) -> bool {
        if let Some(place) = place
            && self.session.truncate(place.pos).is_ok()
        {
            self.state.rendered.truncate(place.text);
            return true;
        }
        if !self.state.rendered.is_empty() {
            note("what is to be replaced was compressed since, or is no longer whole: the conversation is read again");
        }
        self.forget_cache();
        false
    }

    /// Reads the new messages into the cache, and votes if a vote is due.
    fn read(&mut self, steps: &Steps) -> Result<(PrefillReport, Option<CompressReport>)> {
        if self.state.rendered.is_empty() {
            self.state.begun = ChatTemplate::clock().ok();
        }
        self.template.stop_clock(self.state.begun);
        let text = self.template.render(&self.state.messages, true)?;
        if !text.text().starts_with(&self.state.rendered) {
            // some templates rewrite earlier messages
            self.forget_cache();
        }
        let start = self.place();
        crash::at(Step::Tokenize);
        let tokens = if start.text == 0 {
            let tokens = text.tokens(self.session.model())?;
            self.protect_system(&tokens)?;
            tokens
        } else {
            text.tokens_from(self.session.model(), start.text)?
        };
        let (before, trained) = (self.session.n_past() as usize, self.session.model().n_ctx_train());
        if (before..before + tokens.len()).contains(&trained) {
            let trained = count(trained);
            note(&format!(
                "the model was trained for {trained} tokens; past them it may talk nonsense: /clear starts over"
            ));
        }
        let prefill = steps.prefill_long(&mut self.session, &tokens)?;
        self.state.rendered = text.text().to_owned();
        let vote = if self.vote_is_due() { self.vote(steps)? } else { None };
        if let Some(vote) = &vote
            && !self.session.policy().leaves_alone(vote.cells_before)
        {
            self.state.cells_after_vote = Some(vote.cells_after);
        }
        self.state.turn = Some(Turn { start, answer: self.place() });
        Ok((prefill, vote))
    }

    /// Votes. Without room to set aside the rows that would leave the cache, keeps all of them; the answer then uses the cache as it is.
    fn vote(&mut self, steps: &Steps) -> Result<Option<CompressReport>> {
        match steps.compress(&mut self.session) {
            Err(error) if lacks_room_aside(&error) => {
                note(&format!("{error:#}; nothing was dropped"));
                Ok(None)
            }
            vote => vote.map(Some),
        }
    }

    /// Tells the session where the system message ends in a conversation that begins with `tokens`.
    fn protect_system(&mut self, tokens: &[Token]) -> Result<()> {
        let n = if self.session.policy().protect && !self.template.is_fallback() {
            self.template.system_tokens::<Error>(self.session.model(), &self.state.messages, tokens)?
        } else {
            0
        };
        self.session.set_system_tokens(n);
        Ok(())
    }

    /// Marks the current place, so that the session can return to it.
    fn place(&mut self) -> Place {
        self.session.mark();
        Place { pos: self.session.n_past(), text: self.state.rendered.len() }
    }

    fn vote_is_due(&self) -> bool {
        let cells = self.session.cells_used();
        let policy = self.session.policy();
        let grown =
            self.state.cells_after_vote.is_none_or(|after| cells as f64 >= after as f64 * (1.0 + self.revote_share));
        let over_cap = policy.max_cells.is_some_and(|cap| cells > cap);
        let nearly_full = cells as f64 > NEARLY_FULL * self.session.n_ctx_most() as f64;
        // an answer that is voted on later needs no vote before it, unless cells are needed
        let grown = grown && self.when == When::Prompt;
        policy.policy != Kind::Full && (grown || over_cap || nearly_full)
    }

    fn answer(
        &mut self,
        prefill: PrefillReport,
        vote: Option<CompressReport>,
        steps: &Steps,
        show: impl FnMut(&str) -> io::Result<()>,
    ) -> Result<TurnReport> {
        let mut sampler = self.sampler()?;
        self.state.drawn = self.state.drawn.wrapping_add(1);
        // at most one vote per turn
        self.session.set_vote(if vote.is_some() { When::Prompt } else { self.when });
        let (predict, ends) = (self.predict, &self.reverse_prompts);
        let answer = steps.answer(&mut self.session, &mut sampler, predict, ends, self.asked, show)?;
        if let Some(AnswerVote { report, .. }) = &answer.report.vote {
            self.state.cells_after_vote = Some(report.cells_after);
        }
        self.state.rendered.push_str(&answer.cached);
        self.state.messages.push(Message::new(Role::Assistant, &answer.text));
        let report = TurnReport::new(&self.session, prefill, vote, answer);
        self.totals.add(&report);
        Ok(report)
    }

    /// Returns a sampler for the next answer. Its draws depend on the seed, the number of answers so far and the newest tokens, so a loaded
    /// conversation continues exactly as if it had never been saved.
    fn sampler(&self) -> Result<Sampler> {
        let seed = seed_of_answer(self.sampling.seed, self.state.drawn);
        Ok(self.session.sampler(&SamplerParams { seed, ..self.sampling.clone() }, self.predict)?)
    }

    fn forget_cache(&mut self) {
        self.session.clear();
        self.state.rendered.clear();
        self.state.turn = None;
        self.state.cells_after_vote = None;
    }
}

/// Whether a vote failed for lack of room for the rows that leave the cache.
fn lacks_room_aside(error: &Error) -> bool {
    let Some(SessionError::Vote(VoteError::Compact(error))) = error.downcast_ref() else { return false };
    matches!(error, CompactError::Archive { .. } | CompactError::ArchiveFile { .. })
}

/// Returns consecutive seeds, skipping the value that means a random seed in llama.cpp.
fn seed_of_answer(seed: u32, drawn: u32) -> u32 {
    ((u64::from(seed) + u64::from(drawn)) % u64::from(SamplerParams::RANDOM)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_answer_of_a_conversation_has_a_random_seed() {
        assert_eq!([0, 1, 2].map(|drawn| seed_of_answer(u32::MAX - 2, drawn)), [u32::MAX - 2, u32::MAX - 1, 0]);
    }
}
