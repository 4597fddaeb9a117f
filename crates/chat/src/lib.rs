//! Chat templates: what turns a conversation into the text that a model was trained on.

#![forbid(unsafe_code)]

mod engine;
mod json;
mod markers;
mod methods;
mod quote;
mod rendered;
mod source;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::OnceLock;

#[cfg(test)]
use gvote::llama;
use gvote::llama::{LlamaError, Model, Token};
use minijinja::value::{Serde, merge_maps};
use minijinja::{Value, context};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use self::markers::Markers;
use self::quote::StandIns;
pub use self::rendered::Rendered;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// A chat template does not render.
#[derive(Debug, thiserror::Error)]
#[error("the chat template fails: {0}; use `chat_template` chatml, or `raw` for a plain prompt")]
pub struct TemplateError(String);

/// Turns a conversation into the text the model was trained on, with a Jinja template, by default the GGUF's own.
pub struct ChatTemplate {
    source: String,
    bos: String,
    eos: String,
    markers: Markers,
    is_fallback: bool,
    values: Map<String, serde_json::Value>,
    now: Option<i64>,
    takes_system: OnceLock<bool>,
}

/// What a model without a template gets: ChatML, the most common format among instruction-tuned models.
const CHATML: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
    {%- endfor -%}\
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// Between a system message and the user's first one, where a template takes no system message.
const BETWEEN: &str = "\n\n";

impl ChatTemplate {
    /// The template of the model, or ChatML if it has none (see [`Self::is_fallback`]).
    pub fn of(model: &Model) -> Self {
        match model.chat_template() {
            Some(source) => Self::new(model, source),
            None => Self { is_fallback: true, ..Self::chatml(model) },
        }
    }

    /// ChatML, whatever the model says.
    pub fn chatml(model: &Model) -> Self {
        Self::new(model, CHATML.into())
    }

    /// A template in Jinja, as transformers renders them.
    pub fn new(model: &Model, source: String) -> Self {
        Self {
            source,
            bos: model.bos_text(),
            eos: model.eos_text(),
            markers: Markers::of(model),
            is_fallback: false,
            values: Map::new(),
            now: None,
            takes_system: OnceLock::new(),
        }
    }

    /// Further variables for the template, such as `enable_thinking`.
    pub fn with_values(mut self, values: Map<String, serde_json::Value>) -> Self {
        self.values = values;
        self
    }

    /// Whether the model brought no template of its own.
    pub fn is_fallback(&self) -> bool {
        self.is_fallback
    }

    /// What the clock of `strftime_now` says, in seconds since 1970: the environment variable `SOURCE_DATE_EPOCH`, or else the
    /// system.
    ///
    /// # Errors
    /// [`TemplateError`] if `SOURCE_DATE_EPOCH` is no time.
    pub fn clock() -> Result<i64, TemplateError> {
        engine::clock().map_err(TemplateError)
    }

    /// Stops the clock at a time: a conversation keeps its date. None: it goes again.
    pub fn stop_clock(&mut self, now: Option<i64>) {
        self.now = now;
    }

    /// Whether the template has a place for a system message. Where it has none, because it refuses or ignores them, the text
    /// goes into the user's first message.
    pub fn takes_system(&self) -> bool {
        *self.takes_system.get_or_init(|| {
            /// Letters that no template writes or changes.
            const PROBE: &str = "qzsystemqz";
            let (system, user) = (Message::new(Role::System, PROBE), Message::new(Role::User, "Hi"));
            match self.fill(&[system, user.clone()], true) {
                Ok(text) => text.contains(PROBE),
                // one that always fails says why by itself
                Err(_) => self.fill(&[user], true).is_err(),
            }
        })
    }

    /// Renders the conversation. `add_generation_prompt`: end with the opening of the assistant's turn.
    ///
    /// What a message says that reads like a marker of the template's is text, except where the template itself looks for it in
    /// messages of that kind, as some do for the end of a model's thoughts.
    ///
    /// # Errors
    /// [`TemplateError`] with the line of the template that fails.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered, TemplateError> {
        let messages = self.fitted(messages);
        let text = self.fill(&messages, add_generation_prompt)?;
        let found: Vec<_> = messages.iter().map(|message| self.markers.in_content(&message.content)).collect();
        // places where it makes no difference to the text that they are quoted
        let quoted = |choice: &dyn Fn(usize, usize) -> bool| {
            let mut stand_ins = StandIns::default();
            let quote = |(i, message): (usize, &Message)| {
                let places = found[i].iter().filter(|(_, marker)| choice(i, *marker)).map(|(at, _)| *at);
                Message::new(message.role, stand_ins.quote(&message.content, places))
            };
            let messages: Vec<_> = messages.iter().enumerate().map(quote).collect();
            let rendered = self.fill(&messages, add_generation_prompt).ok()?;
            let (same, places) = stand_ins.undo(&rendered);
            (same == text).then_some(places)
        };
        let choices: BTreeSet<_> =
            (0..).zip(&found).flat_map(|(i, all)| all.iter().map(move |(_, m)| (i, *m))).collect();
        if choices.is_empty() {
            return Ok(Rendered::plain(text));
        }
        if let Some(places) = quoted(&|_, _| true) {
            return Ok(Rendered::quoting(text, &places, &self.markers));
        }
        // the template looks for one of them
        let (mut chosen, mut places) = (BTreeSet::new(), Vec::new());
        for choice in choices {
            chosen.insert(choice);
            match quoted(&|i, marker| chosen.contains(&(i, marker))) {
                Some(more) => places = more,
                None => _ = chosen.remove(&choice),
            }
        }
        Ok(Rendered::quoting(text, &places, &self.markers))
    }

    /// The conversation with an answer that begins with `answer`.
    ///
    /// # Errors
    /// [`TemplateError`] with the line of the template that fails.
    pub fn render_answer(&self, messages: &[Message], answer: &str) -> Result<Rendered, TemplateError> {
        Ok(self.render(messages, true)?.followed_by(answer, &self.markers))
    }

    /// The messages as the template takes them.
    fn fitted<'a>(&self, messages: &'a [Message]) -> Cow<'a, [Message]> {
        match messages {
            [system, user, rest @ ..]
                if (system.role, user.role) == (Role::System, Role::User) && !self.takes_system() =>
            {
                let first = Message::new(Role::User, [&*system.content, BETWEEN, &user.content].concat());
                Cow::Owned([&[first], rest].concat())
            }
            messages => Cow::Borrowed(messages),
        }
    }

    fn fill(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        // the last that has a name counts
        let values = merge_maps([
            context! { bos_token => &self.bos, eos_token => &self.eos, tools => (), documents => () },
            Value::from(Serde(&self.values)),
            context! { messages => Serde(messages), add_generation_prompt },
        ]);
        let rendered = engine::render(&self.source, self.now, values);
        rendered.map_err(|e| TemplateError(format!("{e:#}").lines().next().unwrap_or("").to_owned()))
    }

    /// How many of `tokens`, which are those of `messages` as rendered here, stand before what the user says first: the system
    /// message and the markup around it. A template that has none of its own, or writes one that nobody gave, is no exception:
    /// what counts is where another message from the user would make a difference.
    ///
    /// # Errors
    /// [`TemplateError`], or [`LlamaError::Tokenize`].
    pub fn system_tokens<E>(&self, model: &Model, messages: &[Message], tokens: &[Token]) -> Result<usize, E>
    where
        E: From<TemplateError> + From<LlamaError>,
    {
        let user = messages.iter().position(|message| message.role == Role::User);
        let said = user.map_or("", |user| &messages[user].content);
        let other = if said.trim_start().starts_with('A') { "B" } else { "A" };
        let mut others = messages[..user.unwrap_or(messages.len())].to_vec();
        others.push(Message::new(Role::User, other));
        let others = self.render(&others, true)?.tokens(model)?;
        Ok(tokens.iter().zip(&others).take_while(|(a, b)| a == b).count())
    }
}
