//! Error message for the case that llama.cpp ends the program by an assertion, an exception or a fault.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::anyhow;
use gvote::llama::{self, rpc};

use super::{STATUS_FAILED, print_error};

/// What the program is currently doing.
#[derive(Clone, Copy)]
pub enum Step {
    Load,
    Open,
    Tokenize,
    Read,
    Vote,
    Answer,
}

/// Description of each step, and advice for a failure in it.
const STEPS: [(&str, &str); 6] = [
    (" while it loaded the model", "the file contradicts itself, or is meant for another llama.cpp: see gvote inspect"),
    (" while it made the context", "the file contradicts itself (see gvote inspect), or -c or -ub is too large"),
    (" while it made tokens of the prompt", "the tokenizer of the file does not work on this text: see gvote inspect"),
    (" while it read the prompt", "-v shows llama.cpp's log"),
    (" during the vote", "--policy full does without; -v shows llama.cpp's log"),
    (" while it wrote the answer", "-v shows llama.cpp's log"),
];
const NO_STEP: (&str, &str) = ("", "-v shows llama.cpp's log");

static MODEL: OnceLock<String> = OnceLock::new();
/// Index into [`STEPS`].
static STEP: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Installs handlers that report an end of the program inside llama.cpp in one line, with exit status 1.
pub fn install() {
    llama::on_abort(aborted);
    llama::on_crash(|signal, write| {
        let (step, advice) = step();
        for part in ["gvote: ", model(), "llama.cpp crashed", step, " (", signal, "): ", advice, "\n"] {
            write(part);
        }
        STATUS_FAILED
    });
}

/// Sets the model that errors name.
pub fn about(path: &Path) {
    MODEL.get_or_init(|| format!("{}: ", path.display()));
}

/// Sets the current step.
pub fn at(step: Step) {
    STEP.store(step as usize, Ordering::Relaxed);
}

fn model() -> &'static str {
    MODEL.get().map_or("", String::as_str)
}

fn step() -> (&'static str, &'static str) {
    STEPS.get(STEP.load(Ordering::Relaxed)).copied().unwrap_or(NO_STEP)
}

/// Handles an assertion of ggml, a lost worker or an uncaught exception.
fn aborted(message: &str) -> Option<u8> {
    if io::stderr().is_terminal() {
        // an answer or a progress bar may have left the cursor in the middle of a line
        let _ = writeln!(io::stderr());
    }
    let (step, advice) = step();
    print_error(&match rpc::lost(message) {
        Some(error) => error.into(),
        None => anyhow!("{}llama.cpp gave up{step} ({}): {advice}", model(), without_folder(message)),
    });
    Some(STATUS_FAILED)
}

/// Removes the folder from the source location at the start of a ggml message, such as `/build/ggml/src/ggml.c:12: `.
fn without_folder(message: &str) -> &str {
    let place = message.split_once(": ").map_or("", |(place, _)| place);
    &message[place.rfind(['/', '\\']).map_or(0, |slash| slash + 1)..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_an_assertion_has_no_folder() {
        assert_eq!(without_folder("/a/b/ggml.c:12: GGML_ASSERT(a / b) failed"), "ggml.c:12: GGML_ASSERT(a / b) failed");
        assert_eq!(without_folder("std::bad_alloc"), "std::bad_alloc");
    }
}
