//! What is being measured, on stderr.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar that is redrawn between runs only: nothing should work beside a run that is timed.
pub struct Progress(ProgressBar);

impl Progress {
    /// Shown where stderr is a terminal, and not torn apart by llama.cpp's log.
    pub fn new(runs: u64, verbose: bool) -> Self {
        if verbose || !io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let style = ProgressStyle::with_template("{bar:20} {pos}/{len} runs, {elapsed}: {msg}");
        let bar = ProgressBar::with_draw_target(Some(runs), ProgressDrawTarget::stderr());
        bar.set_style(style.expect("the template is a constant").progress_chars("=> "));
        Self(bar)
    }

    /// Says what comes next.
    pub fn show(&self, what: impl FnOnce() -> String) {
        if !self.0.is_hidden() {
            self.0.set_message(what());
        }
    }

    /// A run is done.
    pub fn advance(&self) {
        self.0.inc(1);
    }

    /// Takes the bar away while something is printed.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.0.suspend(print)
    }

    pub fn end(&self) {
        self.0.finish_and_clear();
    }
}
