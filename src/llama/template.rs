#![forbid(unsafe_code)]

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use super::model::Special;
use super::{Model, Token};

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

/// The model's chat template does not render.
#[derive(Debug, thiserror::Error)]
#[error("the model's chat template fails: {0}; use --chat-template chatml, or --raw for a plain prompt")]
pub struct TemplateError(String);

/// Turns a conversation into the text the model was trained on, with the GGUF's own Jinja template.
pub struct ChatTemplate {
    source: String,
    bos: String,
    eos: String,
    is_fallback: bool,
}

/// What a model without a template gets: ChatML, the most common format among instruction-tuned models.
const CHATML: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
    {%- endfor -%}\
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

impl ChatTemplate {
    /// The template of the model, or ChatML if it has none (see [`Self::is_fallback`]).
    pub fn of(model: &Model) -> Self {
        let own = model.chat_template();
        Self {
            is_fallback: own.is_none(),
            source: own.unwrap_or_else(|| CHATML.into()),
            bos: model.special_text(Special::Bos),
            eos: model.special_text(Special::Eos),
        }
    }

    /// ChatML, whatever the model says.
    pub fn chatml() -> Self {
        Self { source: CHATML.into(), bos: String::new(), eos: String::new(), is_fallback: false }
    }

    /// Whether the model brought no template of its own.
    pub fn is_fallback(&self) -> bool {
        self.is_fallback
    }

    /// Renders the conversation. `add_generation_prompt`: end with the opening of the assistant's turn.
    ///
    /// # Errors
    /// [`TemplateError`] with the line of the template that fails.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let mut env = Environment::new();
        // as Hugging Face's tokenizers render chat templates
        env.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .expect("whitespace options alone are always valid"),
        );
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        env.add_function("strftime_now", |_format: String| -> Value {
            // The date would make the same prompt differ from day to day; templates treat an empty one as unknown.
            Value::from("")
        });
        let render = || {
            env.render_str(
                &self.source,
                context! {
                    messages => Serde(messages),
                    add_generation_prompt => add_generation_prompt,
                    bos_token => &self.bos,
                    eos_token => &self.eos,
                },
            )
        };
        render().map_err(|e| TemplateError(format!("{e:#}").lines().next().unwrap_or("").to_owned()))
    }

    /// How many of `tokens`, which begin with `messages` as rendered here and made tokens of by `tokenize`, stand before what the
    /// user says first: the system message and the markup around it. A template that has none of its own, or writes one that
    /// nobody gave, is no exception: what counts is where another message from the user would make a difference.
    ///
    /// # Errors
    /// [`TemplateError`], and those of `tokenize`.
    pub fn system_tokens<E: From<TemplateError>>(
        &self,
        messages: &[Message],
        tokens: &[Token],
        tokenize: impl FnOnce(&str) -> Result<Vec<Token>, E>,
    ) -> Result<usize, E> {
        let user = messages.iter().position(|message| message.role == Role::User);
        let said = user.map_or("", |user| &messages[user].content);
        let other = if said.trim_start().starts_with('A') { "B" } else { "A" };
        let mut others = messages[..user.unwrap_or(messages.len())].to_vec();
        others.push(Message::new(Role::User, other));
        let others = tokenize(&self.render(&others, true)?)?;
        Ok(tokens.iter().zip(&others).take_while(|(a, b)| a == b).count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate { source: source.into(), bos: "<s>".into(), eos: "</s>".into(), is_fallback: false }
    }

    #[test]
    fn chatml_renders_a_conversation() {
        let messages = [Message::new(Role::System, "Be brief."), Message::new(Role::User, "Hi")];
        assert_eq!(
            ChatTemplate::chatml().render(&messages, true).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn python_methods_and_exceptions_work() {
        let t = template(
            "{{ bos_token }}{% for m in messages %}{{ m['content'].strip().upper() }}{{ eos_token }}{% endfor %}",
        );
        let messages = [Message::new(Role::User, "  hi ")];
        assert_eq!(t.render(&messages, false).unwrap(), "<s>HI</s>");

        let t = template("{{ raise_exception('roles must alternate') }}");
        let error = t.render(&messages, false).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
    }
}
