//! Chat templates, which turn a conversation into the text format that a model was trained on.

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

/// The author of a message.
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
    /// Creates a message of `role`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// The chat template cannot be rendered.
#[derive(Debug, thiserror::Error)]
#[error("the chat template fails: {0}; use `chat_template` chatml, or `raw` for a plain prompt")]
pub struct TemplateError(String);

/// Turns a conversation into the text format that the model was trained on, with a Jinja template, by default the
/// GGUF's own.
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

/// Template for models without one: ChatML, the most common format among instruction-tuned models.
const CHATML: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
    {%- endfor -%}\
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// Separator between the system message and the user's first message, if a template takes no system message.
const BETWEEN: &str = "\n\n";

impl ChatTemplate {
    /// Returns the model's template, or ChatML if it has none (see [`Self::is_fallback`]).
    pub fn of(model: &Model) -> Self {
        match model.chat_template() {
            Some(source) => Self::new(model, source),
            None => Self { is_fallback: true, ..Self::chatml(model) },
        }
    }

    /// Returns ChatML, regardless of the model's own template.
    pub fn chatml(model: &Model) -> Self {
        Self::new(model, CHATML.into())
    }

    /// Creates a template from Jinja source, rendered as in transformers.
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

    /// Sets additional variables for the template, such as `enable_thinking`.
    pub fn with_values(mut self, values: Map<String, serde_json::Value>) -> Self {
        self.values = values;
        self
    }

    /// Returns true if the model has no template of its own.
    pub fn is_fallback(&self) -> bool {
        self.is_fallback
    }

    /// Returns the current time of `strftime_now`, in seconds since 1970: the environment variable `SOURCE_DATE_EPOCH`,
    /// or else the system clock.
    ///
    /// # Errors
    /// [`TemplateError`] if `SOURCE_DATE_EPOCH` is not a valid time.
    pub fn clock() -> Result<i64, TemplateError> {
        engine::clock().map_err(TemplateError)
    }

    /// Fixes the clock at a time, so that a conversation keeps its date. None: the clock runs again.
    pub fn stop_clock(&mut self, now: Option<i64>) {
        self.now = now;
    }

    /// Returns true if the template supports a system message. If it refuses or ignores system messages, the text
    /// becomes part of the user's first message.
    pub fn takes_system(&self) -> bool {
        *self.takes_system.get_or_init(|| {
            /// A text that no template contains or changes.
            const PROBE: &str = "qzsystemqz";
            let (system, user) = (Message::new(Role::System, PROBE), Message::new(Role::User, "Hi"));
            match self.fill(&[system, user.clone()], true) {
                Ok(text) => text.contains(PROBE),
                // A template that always fails reports the reason by itself.
                Err(_) => self.fill(&[user], true).is_err(),
            }
        })
    }

    /// Renders the conversation. `add_generation_prompt`: end with the opening of the assistant's turn.
    ///
    /// Text in a message that looks like a marker of the template is rendered as text. The exception is text that the
    /// template itself searches for in messages of that kind, such as the end of a model's thoughts.
    ///
    /// [`TemplateError`] with the failing line of the template.
    /// [`TemplateError`] with the line of the template that fails.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered, TemplateError> {
        let messages = self.fitted(messages);
        let text = self.fill(&messages, add_generation_prompt)?;
        let found: Vec<_> = messages.iter().map(|message| self.markers.in_content(&message.content)).collect();
        // Returns the places that can be quoted without changing the rendered text; None if quoting changes it.
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
        // The template searches for at least one of them: find out which ones can be quoted.
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

    /// Renders the conversation with an answer that begins with `answer`.
    ///
    /// # Errors
    /// [`TemplateError`] with the failing line of the template.
    pub fn render_answer(&self, messages: &[Message], answer: &str) -> Result<Rendered, TemplateError> {
        Ok(self.render(messages, true)?.followed_by(answer, &self.markers))
    }

    /// Merges the system message into the user's first one if the template does not support system messages.
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
        // Later values override earlier ones with the same name.
        let values = merge_maps([
            context! { bos_token => &self.bos, eos_token => &self.eos, tools => (), documents => () },
            Value::from(Serde(&self.values)),
            context! { messages => Serde(messages), add_generation_prompt },
        ]);
        let rendered = engine::render(&self.source, self.now, values);
        rendered.map_err(|e| TemplateError(format!("{e:#}").lines().next().unwrap_or("").to_owned()))
    }

    /// Returns the number of `tokens` before the user's first words: the system message and the markup around it.
    /// `tokens` must be those of `messages`, rendered by this template.
    ///
    /// The boundary is the first token that would change with another user message. This also works for a template
    /// without system messages, and for one that adds a system message by itself.
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
