//! Threads for what must come to its end: where the system starts no more of them, fewer do the work, or one alone.

use std::io;
use std::sync::Mutex;
use std::thread::{self, Scope, ScopedJoinHandle};

#[cfg(test)]
thread_local! {
    /// Tests set it to be a system that starts no more threads.
    pub(crate) static PRETEND_NONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Starts a thread of `scope`.
///
/// # Errors
/// The system's.
pub(crate) fn start<'s, T: Send + 's>(
    scope: &'s Scope<'s, '_>,
    work: impl FnOnce() -> T + Send + 's,
) -> io::Result<ScopedJoinHandle<'s, T>> {
    #[cfg(test)]
    if PRETEND_NONE.get() {
        return Err(io::Error::other("no threads in this test"));
    }
    thread::Builder::new().spawn_scoped(scope, work)
}

/// Does `work` to each of `parts` in at most `n_threads` threads, of which this is one that does something else first.
pub(crate) fn share_out<T>(
    n_threads: usize,
    parts: impl Iterator<Item = T> + Send,
    work: impl Fn(T) + Sync,
    first: impl FnOnce(),
) {
    let parts = Mutex::new(parts);
    let work_on = || {
        let next = || parts.lock().expect("taking a part does not panic").next();
        while let Some(part) = next() {
            work(part);
        }
    };
    thread::scope(|scope| {
        for _ in 1..n_threads {
            let _ = start(scope, work_on);
        }
        first();
        work_on();
    });
}
