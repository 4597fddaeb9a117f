//! The built program, and what to feed it.
#![allow(dead_code)] // each test program uses its own part of it

use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "model.rs"]
mod models;

#[allow(unused_imports)] // each test program uses its own part of it
pub use models::{model, optional};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_gvote");

/// Some characters of English (four and a half a token), the same on every machine: sentences that say nothing, with a few
/// numbers of animals among them.
pub fn text(chars: usize) -> String {
    // no word with its space is that short on average
    let words = chars / 4;
    let text = gvote_eval::tasks::needle::generate(words, 0.5, 1).context;
    text.chars().take(chars).collect()
}

/// A file of [`text`], which lasts as long as the value.
pub fn document(chars: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text(chars).as_bytes()).unwrap();
    file
}

/// A sub-command with the model, on one thread: tests run side by side.
pub fn gvote(command: &str, args: &[&str]) -> Command {
    let mut program = Command::new(PROGRAM);
    program.arg(command).arg("-m").arg(model()).args(["-t", "1"]).args(args);
    program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    program
}

/// The program with nothing but these arguments.
pub fn bare(args: &[&str]) -> Command {
    let mut program = Command::new(PROGRAM);
    program.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    program
}

/// What a finished program left.
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

    /// The JSON objects on stdout, one a line.
    pub fn json(&self) -> Vec<Value> {
        self.stdout.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
    }
}

pub fn finish(program: &mut Command) -> Done {
    program.output().unwrap().into()
}

/// Runs with this standard input.
pub fn finish_with(program: &mut Command, input: impl AsRef<[u8]>) -> Done {
    let mut child = program.stdin(Stdio::piped()).spawn().unwrap();
    // a program that fails early does not read it
    let _ = child.stdin.take().unwrap().write_all(input.as_ref());
    child.wait_with_output().unwrap().into()
}

/// Reads the first byte of what a program prints and closes the pipe; tells what it left.
pub fn hang_up(mut child: Child) -> Done {
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    drop(stdout);
    child.wait_with_output().unwrap().into()
}

/// Sends SIGINT and tells what the program left, and how long that took.
pub fn interrupt(child: Child) -> (Done, Duration) {
    let start = Instant::now();
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let done = child.wait_with_output().unwrap().into();
    (done, start.elapsed())
}
