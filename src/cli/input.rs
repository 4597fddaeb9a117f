//! What a user types: an editor with history on a terminal, plain lines otherwise.

use std::env;
use std::io::{self, Lines, StdinLock};
use std::path::PathBuf;

use anyhow::Result;
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
/// A line of this begins and ends a block.
const FENCE: &str = "\"\"\"";

pub enum Input {
    Editor { editor: Box<Editor<Assistant, FileHistory>>, history: Option<PathBuf> },
    Lines(Lines<StdinLock<'static>>),
}

pub enum Entry {
    Text(String),
    /// Ctrl-C at the prompt.
    Cleared,
    End,
}

impl Input {
    pub fn lines() -> Self {
        Self::Lines(io::stdin().lines())
    }

    /// An editor that completes these commands.
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

    /// The next message or command.
    pub fn next(&mut self) -> Result<Entry> {
        match self {
            Self::Editor { editor, history } => match editor.readline(PROMPT) {
                Ok(text) => {
                    remember(editor, history, &text);
                    Ok(Entry::Text(unwrap(&text)))
                }
                Err(ReadlineError::Interrupted) => Ok(Entry::Cleared),
                Err(ReadlineError::Eof) => Ok(Entry::End),
                Err(error) => Err(error.into()),
            },
            Self::Lines(lines) => {
                let mut text: Option<String> = None;
                for line in lines {
                    let line = line?;
                    text = Some(match text {
                        Some(text) => text + "\n" + &line,
                        None => line,
                    });
                    if text.as_deref().is_some_and(is_complete) {
                        break;
                    }
                }
                Ok(text.map_or(Entry::End, |t| Entry::Text(unwrap(&t))))
            }
        }
    }
}

/// Saved at once, so that a crash loses nothing. A history that cannot be saved is reported once.
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

/// `$XDG_STATE_HOME/gvote/history`, its folder made.
fn history_file() -> Option<PathBuf> {
    let given = env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let state = given.or_else(|| Some(env::home_dir()?.join(".local/state")))?;
    let folder = state.join("gvote");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}

/// Whether no further line belongs to this text.
fn is_complete(text: &str) -> bool {
    let in_block = text.lines().filter(|l| l.trim() == FENCE).count() % 2 == 1;
    !in_block && !text.ends_with('\\')
}

/// The text without the marks that joined its lines.
fn unwrap(text: &str) -> String {
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
    lines.join("\n")
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

    #[test]
    fn a_backslash_continues_a_line() {
        assert!(!is_complete("first\\"));
        assert!(is_complete("first\\\nsecond"));
        assert_eq!(unwrap("first\\\nsecond"), "first\nsecond");
    }

    #[test]
    fn a_block_lasts_until_its_second_mark() {
        let text = "\"\"\"\nfn main() {\n    a \\\n}";
        assert!(!is_complete(text));
        let text = format!("{text}\n\"\"\"");
        assert!(is_complete(&text));
        assert_eq!(unwrap(&text), "fn main() {\n    a \\\n}");
    }

    #[test]
    fn one_line_is_a_message() {
        assert!(is_complete("say \"\"\" to me"));
        assert_eq!(unwrap("say \"\"\" to me"), "say \"\"\" to me");
    }
}
