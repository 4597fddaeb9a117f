//! Handling of Ctrl-C.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::Result;
use gvote::llama::exit;

use super::STATUS_CANCELLED;

/// A Ctrl-C within this time after the end of an answer was meant for the answer, and is ignored.
const TOO_LATE: Duration = Duration::from_millis(300);

/// Handler of Ctrl-C. During work, the first Ctrl-C requests a stop and the second ends the program; between work, the first one ends it.
pub struct Interrupt(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    working: bool,
    pressed: bool,
    ended: Option<Instant>,
    /// The session's cancel flag, which stops llama.cpp within a batch.
    cancel: Arc<AtomicBool>,
}

impl Interrupt {
    /// Installs the handler.
    ///
    /// # Errors
    /// If the process already has a handler.
    pub fn install() -> Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        // the handler runs in its own thread, so it may lock and exit
        ctrlc::set_handler(move || on_signal(&mut lock(&shared)))?;
        Ok(Self(state))
    }

    /// Makes Ctrl-C during work also set this flag.
    pub fn cancels(&self, cancel: Arc<AtomicBool>) {
        let mut state = lock(&self.0);
        cancel.store(state.pressed, Ordering::Relaxed);
        state.cancel = cancel;
    }

    /// Marks the start of work that can be stopped.
    pub fn begin(&self) {
        let mut state = lock(&self.0);
        state.working = true;
        state.pressed = false;
        state.cancel.store(false, Ordering::Relaxed);
    }

    /// Marks the end of the work.
    pub fn end(&self) {
        let mut state = lock(&self.0);
        state.working = false;
        state.ended = Some(Instant::now());
    }

    /// Whether Ctrl-C was pressed since the last [`Self::begin`].
    pub fn pressed(&self) -> bool {
        lock(&self.0).pressed
    }
}

fn on_signal(state: &mut State) {
    if state.working && !state.pressed {
        state.pressed = true;
        state.cancel.store(true, Ordering::Relaxed);
    } else if state.working || state.ended.is_none_or(|at| at.elapsed() > TOO_LATE) {
        exit(STATUS_CANCELLED);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|e| e.into_inner())
}
