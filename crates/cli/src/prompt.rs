//! Sources of the prompt, and its conversion to tokens.

use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error, Result};
use clap::Args;
use gvote::llama::{Model, Token};
use gvote_chat::{ChatTemplate, Message, Rendered, Role};
use gvote_eval::text;

use super::Exit;
use super::crash::{self, Step};
use super::words::{count, note};

#[derive(Args)]
#[command(next_help_heading = "Prompt")]
pub struct PromptArgs {
    /// Prompt text, or the question about the document of -f
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,

    /// Text file with the prompt; - is standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// System message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system_prompt: Option<String>,

    /// Text file with the system message
    #[arg(long, value_name = "FILE", conflicts_with = "system_prompt")]
    system_prompt_file: Option<PathBuf>,

    /// Interpret the escapes \n, \r, \t, \\, \", \' and \xHH in -p and -sys
    #[arg(short, long)]
    escape: bool,

    /// Use this chat template instead of the model's own: `chatml`, or the text of a Jinja template
    #[arg(long, value_name = "NAME|JINJA", value_parser = template_text, conflicts_with = "chat_template_file")]
    chat_template: Option<String>,

    /// File with a Jinja template to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template_file: Option<PathBuf>,

    /// Additional variables for the chat template, such as {"enable_thinking": false}
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    chat_template_kwargs: Option<Values>,
}

/// Names and values for a chat template.
type Values = serde_json::Map<String, serde_json::Value>;

#[derive(Args)]
#[command(next_help_heading = "Prompt")]
pub struct LengthArgs {
    /// Maximum number of tokens of the answer, even beyond the training context (a note says so); negative = until the model ends the
    /// answer or the training context is full
    #[arg(short = 'n', long, visible_alias = "n-predict", value_name = "N", default_value_t = -1)]
    pub predict: i32,

    /// End the answer before this text, and leave the text out. Can be repeated; escapes such as \n are read as with -e
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    reverse_prompt: Vec<String>,
}

impl LengthArgs {
    /// Returns the texts that end an answer, with escapes replaced.
    pub fn reverse_prompts(&self) -> Vec<String> {
        self.reverse_prompt.iter().map(|text| unescape(text)).filter(|text| !text.is_empty()).collect()
    }
}

/// Flags for the prompt of a single request.
#[derive(Args)]
#[command(next_help_heading = "Prompt")]
pub struct RequestArgs {
    #[command(flatten)]
    prompt: PromptArgs,

    /// Use the prompt as it is, without the chat template; markers such as <|im_end|> are then read as special tokens
    #[arg(long, conflicts_with_all = ["chat_template", "chat_template_file", "chat_template_kwargs", "system_prompt", "system_prompt_file"])]
    raw: bool,
}

/// Prompt as the model receives it.
pub struct Request {
    pub text: String,
    pub tokens: Vec<Token>,
    /// Number of tokens before the user's message.
    pub system: usize,
    pub is_raw: bool,
}

impl RequestArgs {
    /// Returns the text of the prompt.
    ///
    /// # Errors
    /// [`Exit::Usage`] if there is none.
    pub fn text(&self) -> Result<String> {
        let text = self.prompt.text_or_stdin()?.filter(|t| !t.is_empty());
        text.ok_or_else(|| Exit::Usage("there is no prompt: give -p TEXT, -f FILE, or pipe one in".into()).into())
    }

    /// Applies the chat template to the text of [`Self::text`], and tokenizes it.
    pub fn request(&self, model: &Model, text: String) -> Result<Request> {
        let (template, system) = (self.prompt.template(model)?, self.prompt.system()?);
        if template.is_fallback() && !self.raw {
            let unused = system.as_ref().map_or("", |_| ", without the system message");
            note(&format!(
                "this model has no chat template: the prompt is taken as it is{unused}; \
                 --chat-template chatml changes that"
            ));
        } else if !self.raw {
            tell_of_system(&template, system.as_ref());
        }
        let is_raw = self.raw || template.is_fallback();
        let user = Message::new(Role::User, text);
        let messages: Vec<_> = system.into_iter().chain([user]).collect();
        let rendered = match messages.last() {
            Some(user) if is_raw => Rendered::plain(user.content.clone()),
            _ => template.render(&messages, true)?,
        };
        crash::at(Step::Tokenize);
        let tokens = rendered.tokens(model)?;
        let system = if is_raw { 0 } else { template.system_tokens::<Error>(model, &messages, &tokens)? };
        let trained = model.n_ctx_train();
        if tokens.len() > trained {
            note(&format!(
                "the prompt has {} tokens and the model was trained for {}; past them it may talk nonsense",
                count(tokens.len()),
                count(trained)
            ));
        }
        Ok(Request { text: rendered.text().to_owned(), tokens, system, is_raw })
    }
}

impl PromptArgs {
    /// Returns the document followed by the question; None if neither flag was given. Also reads the other files that the flags name, so
    /// that an unreadable file is reported before a model is loaded.
    pub fn text(&self) -> Result<Option<String>> {
        self.system()?;
        self.template_source()?;
        let document = self.file.as_deref().map(read_file).transpose()?;
        let question = self.prompt.as_deref().map(|p| self.unescape(p));
        Ok(match (document, question) {
            (Some(document), Some(question)) => {
                Some(format!("{}\n\n{question}", document.trim_end_matches(['\n', '\r'])))
            }
            (document, question) => document.or(question),
        })
    }

    /// Returns [`Self::text`], or else the text piped into standard input.
    pub fn text_or_stdin(&self) -> Result<Option<String>> {
        match self.text()? {
            None if !io::stdin().is_terminal() => read_file(Path::new("-")).map(Some),
            text => Ok(text),
        }
    }

    pub fn system(&self) -> Result<Option<Message>> {
        let text = match (&self.system_prompt, &self.system_prompt_file) {
            (Some(text), _) => self.unescape(text),
            (None, Some(path)) => without_last_newline(read_text(path, "--system-prompt-file")?),
            (None, None) => return Ok(None),
        };
        Ok(Some(Message::new(Role::System, text)))
    }

    pub fn template(&self, model: &Model) -> Result<ChatTemplate> {
        let template = match self.template_source()?.as_deref() {
            Some(CHATML) => ChatTemplate::chatml(model),
            Some(source) => ChatTemplate::new(model, source.to_owned()),
            None => ChatTemplate::of(model),
        };
        Ok(template.with_values(self.chat_template_kwargs.clone().unwrap_or_default()))
    }

    /// Returns the template that replaces the model's: [`CHATML`], or its text.
    fn template_source(&self) -> Result<Option<String>> {
        match (&self.chat_template, &self.chat_template_file) {
            (Some(source), _) => Ok(Some(source.clone())),
            (None, Some(path)) => read_text(path, "--chat-template-file").map(Some),
            (None, None) => Ok(None),
        }
    }

    fn unescape(&self, text: &str) -> String {
        let text = text::without_mark(text);
        if self.escape { unescape(text) } else { text.to_owned() }
    }
}

/// Reads a text file, without the newline that editors put at the end.
pub fn read_file(path: &Path) -> Result<String> {
    let (name, bytes) = if path == Path::new("-") {
        let mut bytes = Vec::new();
        let read = io::stdin().lock().read_to_end(&mut bytes);
        ("standard input".to_owned(), read.map(|_| bytes))
    } else {
        (path.display().to_string(), std::fs::read(path))
    };
    let bytes = bytes.with_context(|| format!("cannot read the prompt from {name} (-f)"))?;
    Ok(without_last_newline(text_of(&bytes, &name, "-f")?))
}

fn without_last_newline(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        text.truncate(text.strip_suffix('\r').unwrap_or(&text).len());
    }
    text
}

/// llama.cpp's name for ChatML, the only template with a name.
const CHATML: &str = "chatml";

fn template_text(text: &str) -> Result<String, &'static str> {
    let is_jinja = text.contains("{{") || text.contains("{%");
    if text == CHATML || is_jinja { Ok(text.into()) } else { Err("use chatml, or the text of a Jinja template") }
}

fn json_object(text: &str) -> Result<Values, String> {
    serde_json::from_str(text).map_err(|e| format!("use a JSON object: {e}"))
}

/// Reads the text file that `flag` names, unchanged.
pub fn read_text(path: &Path, flag: &str) -> Result<String> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {name} ({flag})"))?;
    text_of(&bytes, &name, flag)
}

fn text_of(bytes: &[u8], name: &str, flag: &str) -> Result<String> {
    text::of_bytes(bytes).with_context(|| format!("{name} ({flag}) is not UTF-8 text"))
}

/// Notes where the system message goes if the template has no place for one.
pub fn tell_of_system(template: &ChatTemplate, system: Option<&Message>) {
    if system.is_some() && !template.takes_system() {
        note("the model's chat template takes no system message: it goes into the first user message");
    }
}

/// Replaces escapes by the characters they stand for; leaves unknown ones unchanged.
pub fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let (replacement, used) = match (byte, tail) {
            (b'\\', [b'n', ..]) => (b'\n', 2),
            (b'\\', [b'r', ..]) => (b'\r', 2),
            (b'\\', [b't', ..]) => (b'\t', 2),
            (b'\\', [c @ (b'\\' | b'"' | b'\''), ..]) => (*c, 2),
            (b'\\', [b'x', a, b, ..]) if a.is_ascii_hexdigit() && b.is_ascii_hexdigit() => (hex(*a) << 4 | hex(*b), 4),
            _ => (byte, 1),
        };
        bytes.push(replacement);
        rest = &rest[used..];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(digit: u8) -> u8 {
    (digit as char).to_digit(16).map_or(0, |d| d as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_become_what_they_stand_for() {
        assert_eq!(unescape(r#"a\nb\tc\\d\"e\'f\r"#), "a\nb\tc\\d\"e'f\r");
        assert_eq!(unescape(r"\x41\xc3\xa9"), "Aé");
    }

    #[test]
    fn other_backslashes_stay() {
        for text in [r"\q", r"\x4", r"\xzz", "\\", r"C:\Users", "é"] {
            assert_eq!(unescape(text), text);
        }
        assert_eq!(unescape(r"\\n"), r"\n");
    }
}
