//! Runs the built program, and creates its input.
#![allow(dead_code)] // each test program uses only a part of it

use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "model.rs"]
mod models;

#[allow(unused_imports)] // each test program uses only a part of it
pub use models::{model, optional};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_gvote");

/// Returns `chars` characters of English (4.5 per token), the same on every machine: meaningless sentences with a few numbers of animals
/// among them.
pub fn text(chars: usize) -> String {
    // the mean length of a word with its space is larger
    let words = chars / 4;
    let text = gvote_eval::tasks::needle::generate(words, 0.5, 1).context;
    text.chars().take(chars).collect()
}

/// Returns a file of [`text`] that exists as long as the value.
pub fn document(chars: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text(chars).as_bytes()).unwrap();
    file
}

/// Returns a sub-command with the model, on one thread because tests run in parallel.
pub fn gvote(command: &str, args: &[&str]) -> Command {
    let mut program = Command::new(PROGRAM);
    program.arg(command).arg("-m").arg(model()).args(["-t", "1"]).args(args);
    program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    program
}

/// Returns the program with only these arguments.
pub fn bare(args: &[&str]) -> Command {
    let mut program = Command::new(PROGRAM);
    program.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    program
}

/// Result of a finished program.
pub struct Done {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code().expect("no signal ended the program"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Done {
    /// Asserts success.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.status, 0, "{}", self.stderr);
        self
    }

    /// Returns the JSON objects on stdout, one per line.
    pub fn json(&self) -> Vec<Value> {
        self.stdout.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
    }
}

pub fn finish(program: &mut Command) -> Done {
    program.output().unwrap().into()
}

/// Runs the program with this standard input.
pub fn finish_with(program: &mut Command, input: impl AsRef<[u8]>) -> Done {
    let mut child = program.stdin(Stdio::piped()).spawn().unwrap();
    // a program that fails early does not read its input
    let _ = child.stdin.take().unwrap().write_all(input.as_ref());
    child.wait_with_output().unwrap().into()
}

/// Reads the first byte of a program's output and closes the pipe. Returns the program's result.
pub fn hang_up(mut child: Child) -> Done {
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    drop(stdout);
    child.wait_with_output().unwrap().into()
}

/// Sends SIGINT. Returns the program's result, and how long it took to end.
pub fn interrupt(child: Child) -> (Done, Duration) {
    let start = Instant::now();
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let done = child.wait_with_output().unwrap().into();
    (done, start.elapsed())
}
