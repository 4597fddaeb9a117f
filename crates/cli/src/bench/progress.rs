//! Progress display on stderr.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Progress bar that is redrawn only between runs, so that nothing runs beside a timed run.
pub struct Progress(ProgressBar);

impl Progress {
    /// Shows the bar if stderr is a terminal and llama.cpp's log does not interfere with it.
    pub fn new(runs: u64, verbose: bool) -> Self {
        if verbose || !io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let style = ProgressStyle::with_template("{bar:20} {pos}/{len} runs, {elapsed}: {msg}");
        let bar = ProgressBar::with_draw_target(Some(runs), ProgressDrawTarget::stderr());
        bar.set_style(style.expect("the template is a constant").progress_chars("=> "));
        Self(bar)
    }

    /// Shows a description of the next run.
    pub fn show(&self, what: impl FnOnce() -> String) {
        if !self.0.is_hidden() {
            self.0.set_message(what());
        }
    }

    /// Counts a finished run.
    pub fn advance(&self) {
        self.0.inc(1);
    }

    /// Hides the bar while `print` runs.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.0.suspend(print)
    }

    pub fn end(&self) {
        self.0.finish_and_clear();
    }
}
