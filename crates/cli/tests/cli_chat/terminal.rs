//! Tests of a conversation in a terminal.

use super::*;
use expectrl::process::unix::WaitStatus;
use expectrl::session::OsSession;
use expectrl::{ControlCode, Eof, Expect, Regex};

/// The line that ends a turn, and the next prompt, with colours and the editor's control codes between them.
const TURN_ENDS: &str = r"\[[^\x1b]* tokens[^\x1b]*\](.|\n)*> ";

struct Terminal {
    session: OsSession,
    state: tempfile::TempDir,
}

impl Terminal {
    fn start(args: &[&str]) -> Self {
        let state = tempfile::tempdir().unwrap();
        let pipes = gvote("chat", args);
        // a pseudo-terminal replaces the pipes
        let mut program = Command::new(pipes.get_program());
        program.args(pipes.get_args()).env("XDG_STATE_HOME", state.path()).env("TERM", "xterm");
        program.env_remove("NO_COLOR");
        let mut session = OsSession::spawn(program).unwrap();
        session.set_expect_timeout(Some(Duration::from_secs(120)));
        Self { session, state }
    }

    #[track_caller]
    fn sees(&mut self, pattern: &str) -> String {
        let found = self.session.expect(Regex(pattern));
        let found = found.unwrap_or_else(|e| panic!("{pattern:?} did not appear: {e}"));
        String::from_utf8_lossy(found.get(0).unwrap()).into_owned()
    }

    fn types(&mut self, line: &str) {
        // Enter, as a keyboard sends it
        self.session.send(format!("{line}\r")).unwrap();
    }

    fn presses(&mut self, key: ControlCode) {
        self.session.send(key).unwrap();
    }

    #[track_caller]
    fn ends_well(mut self) {
        self.session.expect(Eof).unwrap();
        let status = self.session.get_process().wait().unwrap();
        assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
    }

    fn history(&self) -> String {
        fs::read_to_string(self.state.path().join("gvote/history")).unwrap()
    }
}

#[test]
fn a_conversation_about_a_document() {
    let document = document(CHARS);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chat");
    let file_name = document.path().to_str().unwrap();
    let vote = ["--lost-mass", "0.1", "--vote", "prompt"];
    let mut chat = Terminal::start(&[&["-f", file_name, "-n", "6", "-c", "2048"][..], &vote].concat());
    chat.sees("/help lists the commands");
    let first = chat.sees(TURN_ENDS);
    assert!(first.contains(" -> "), "the document was voted on: {first}");

    chat.types("And who wrote it?");
    chat.sees(TURN_ENDS);
    chat.types("/stats");
    let stats = chat.sees(r"now(.|\n)*KV(.|\n)*> ");
    assert!(stats.contains("2,048 cells"), "{stats}");

    chat.types("/regen");
    chat.sees(TURN_ENDS);
    chat.types(&format!("/save {}", file.display()));
    chat.sees("saved to(.|\n)*> ");
    chat.types("/clear");
    chat.sees("forgotten(.|\n)*> ");
    chat.types("/stats");
    chat.sees("now.*0 of 2,048 cells(.|\n)*> ");
    chat.types(&format!("/load {}", file.display()));
    chat.sees("loaded 4 messages(.|\n)*> ");
    chat.types("Go\\");
    chat.types("on.");
    chat.sees(TURN_ENDS);
    assert!(Path::new(&file).exists());
    assert!(chat.history().contains("And who wrote it?"));

    chat.types("/exit");
    chat.sees("4 answers");
    chat.ends_well();
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let mut chat = Terminal::start(&["-p", "Tell me a long story about a fox.", "--temp", "0"]);
    chat.sees("ends the chat");
    chat.sees("[a-z]+ [a-z]+ [a-z]+ [a-z]+");
    chat.presses(ControlCode::EndOfText);
    let end = chat.sees(TURN_ENDS);
    assert!(end.contains("stopped with Ctrl-C"), "{end}");

    chat.types("/stats");
    chat.sees("1 answer,(.|\n)*> ");
    chat.session.send("half a line").unwrap();
    chat.sees("half a line");
    chat.presses(ControlCode::EndOfText);
    chat.sees("> ");
    chat.types("/system Be brief.");
    chat.sees("starts over(.|\n)*> ");
    chat.presses(ControlCode::EndOfTransmission);
    chat.ends_well();
}

#[test]
fn ctrl_c_while_reading_keeps_the_conversation() {
    let document = document(28_000);
    let mut chat = Terminal::start(&["-f", document.path().to_str().unwrap(), "-n", "4"]);
    chat.sees("reading");
    chat.presses(ControlCode::EndOfText);
    chat.sees("cancelled(.|\n)*> ");
    chat.types("Hi!");
    chat.sees(TURN_ENDS);
    chat.presses(ControlCode::EndOfTransmission);
    chat.ends_well();
}
