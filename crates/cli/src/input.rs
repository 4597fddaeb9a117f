//! User input: an editor with history on a terminal, plain lines otherwise.

use std::env;
use std::io::{self, BufRead as _, ErrorKind, StdinLock};
use std::path::PathBuf;

use anyhow::{Error, Result, anyhow};
use gvote_eval::text;
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Config, Context, Editor, Helper};

use super::words::note;

const PROMPT: &str = "> ";
const HISTORY_LEN: usize = 1000;
/// Line that begins and ends a block.
const FENCE: &str = "\"\"\"";

pub enum Input {
    Editor { editor: Box<Editor<Assistant, FileHistory>>, history: Option<PathBuf> },
    Lines { stdin: StdinLock<'static>, read: usize },
}

pub enum Entry {
    Text {
        text: String,
        /// The text begins with a block, and so is a message even if it looks like a command.
        is_block: bool,
    },
    /// The text cannot be read; the next one may be valid.
    Refused(Error),
    /// Ctrl-C at the prompt.
    Cleared,
    End,
}

impl Input {
    pub fn lines() -> Self {
        Self::Lines { stdin: io::stdin().lock(), read: 0 }
    }

    /// Creates an editor that completes these commands.
    pub fn editor(commands: Vec<&'static str>) -> Result<Self> {
        let config = Config::builder().max_history_size(HISTORY_LEN)?.history_ignore_dups(true)?.build();
        let mut editor = Editor::with_config(config)?;
        editor.set_helper(Some(Assistant { commands, files: FilenameCompleter::new() }));
        let history = history_file();
        if let Some(path) = &history
            && path.exists()
            && let Err(error) = editor.load_history(path)
        {
            note(&format!("the history {} cannot be read: {error}", path.display()));
        }
        Ok(Self::Editor { editor: Box::new(editor), history })
    }

    /// Reads the next message or command.
    pub fn next(&mut self) -> Result<Entry> {
        match self {
            Self::Editor { editor, history } => match editor.readline(PROMPT) {
                Ok(text) => {
                    remember(editor, history, &text);
                    Ok(unwrap(&text))
                }
                Err(ReadlineError::Interrupted) => Ok(Entry::Cleared),
                Err(ReadlineError::Eof) => Ok(Entry::End),
                Err(ReadlineError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
                    Ok(Entry::Refused(anyhow!("what was typed is not UTF-8 text")))
                }
                Err(error) => Err(error.into()),
            },
            Self::Lines { stdin, read } => next_of_lines(stdin, read),
        }
    }
}

/// Reads the next message from `stdin`. `read`: number of lines read so far.
fn next_of_lines(stdin: &mut StdinLock, read: &mut usize) -> Result<Entry> {
    let mut text: Option<String> = None;
    let mut refused = None;
    let mut line = Vec::new();
    while text.as_deref().is_none_or(|text| !is_complete(text)) {
        line.clear();
        if stdin.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        *read += 1;
        let bytes = line.strip_suffix(b"\n").unwrap_or(&line);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        let bytes = if *read == 1 { text::bytes_without_mark(bytes) } else { bytes };
        // read up to the end of the block even if the block cannot be used
        let line = String::from_utf8_lossy(bytes);
        if str::from_utf8(bytes).is_err() {
            refused.get_or_insert_with(|| anyhow!("line {read} of standard input is not UTF-8 text"));
        }
        text = Some(text.map_or_else(|| line.to_string(), |text| text + "\n" + &line));
    }
    Ok(match (refused, text) {
        (Some(error), _) => Entry::Refused(error),
        (None, Some(text)) => unwrap(&text),
        (None, None) => Entry::End,
    })
}

/// Adds an entry to the history and saves it at once, so that a crash loses nothing. Reports only the first failure to save.
fn remember(editor: &mut Editor<Assistant, FileHistory>, history: &mut Option<PathBuf>, text: &str) {
    if text.trim().is_empty() || !editor.add_history_entry(text).unwrap_or(false) {
        return;
    }
    if let Some(path) = history
        && let Err(error) = editor.append_history(path)
    {
        note(&format!("the history {} cannot be saved: {error}", path.display()));
        *history = None;
    }
}

/// Returns `$XDG_STATE_HOME/gvote/history`, or `~/.local/state/gvote/history`; creates the folder.
fn history_file() -> Option<PathBuf> {
    let given = env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let state = given.or_else(|| Some(env::home_dir()?.join(".local/state")))?;
    let folder = state.join("gvote");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}

/// Whether the text is complete, so that no further line belongs to it.
fn is_complete(text: &str) -> bool {
    let in_block = text.lines().filter(|l| l.trim() == FENCE).count() % 2 == 1;
    !in_block && !text.ends_with('\\')
}

/// Removes the marks that joined the lines of a text.
fn unwrap(text: &str) -> Entry {
    let is_block = text.lines().next().is_some_and(|line| line.trim() == FENCE);
    let mut in_block = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.trim() == FENCE {
            in_block = !in_block;
        } else if in_block {
            lines.push(line);
        } else {
            lines.push(line.strip_suffix('\\').unwrap_or(line));
        }
    }
    Entry::Text { text: lines.join("\n"), is_block }
}

pub struct Assistant {
    commands: Vec<&'static str>,
    files: FilenameCompleter,
}

impl Helper for Assistant {}
impl Hinter for Assistant {
    type Hint = String;
}
impl Highlighter for Assistant {}

impl Validator for Assistant {
    fn validate(&self, context: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        Ok(if is_complete(context.input()) { ValidationResult::Valid(None) } else { ValidationResult::Incomplete })
    }
}

impl Completer for Assistant {
    type Candidate = Pair;

    fn complete(&self, line: &str, pos: usize, context: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let typed = &line[..pos];
        if !typed.starts_with('/') {
            return Ok((pos, Vec::new()));
        }
        if typed.contains(' ') {
            return self.files.complete(line, pos, context);
        }
        let fitting = self.commands.iter().filter(|c| c.starts_with(typed));
        let pairs = fitting.map(|c| Pair { display: (*c).into(), replacement: (*c).into() });
        Ok((0, pairs.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unwrapped(text: &str) -> (String, bool) {
        match unwrap(text) {
            Entry::Text { text, is_block } => (text, is_block),
            _ => panic!("{text:?} is text"),
        }
    }

    #[test]
    fn a_backslash_continues_a_line() {
        assert!(!is_complete("first\\"));
        assert!(is_complete("first\\\nsecond"));
        assert_eq!(unwrapped("first\\\nsecond"), ("first\nsecond".into(), false));
    }

    #[test]
    fn a_block_lasts_until_its_second_mark() {
        let text = "\"\"\"\nfn main() {\n    a \\\n}";
        assert!(!is_complete(text));
        let text = format!("{text}\n\"\"\"");
        assert!(is_complete(&text));
        assert_eq!(unwrapped(&text), ("fn main() {\n    a \\\n}".into(), true));
    }

    #[test]
    fn one_line_is_a_message() {
        assert!(is_complete("say \"\"\" to me"));
        assert_eq!(unwrapped("say \"\"\" to me"), ("say \"\"\" to me".into(), false));
    }
}
