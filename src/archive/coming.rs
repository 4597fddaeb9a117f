//! Rows that a thread is transferring into memory while the cache is in use.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, Once, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::backend;

/// Number of transfers in progress. The process waits for them when it exits, because their threads use drivers.
static ON_THE_WAY: Mutex<usize> = Mutex::new(0);
static ARRIVED: Condvar = Condvar::new();
/// Longest wait at exit. In a child made by `fork()` the transfer threads do not exist, so the count never reaches
/// zero.
const PATIENCE: Duration = Duration::from_secs(2);

struct Journey;

impl Journey {
    fn begin() -> Self {
        static WAITS: Once = Once::new();
        WAITS.call_once(|| backend::before_exit(wait_for_all));
        *ON_THE_WAY.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Self
    }
}

impl Drop for Journey {
    fn drop(&mut self) {
        *ON_THE_WAY.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ARRIVED.notify_all();
    }
}

extern "C" fn wait_for_all() {
    let n = ON_THE_WAY.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = ARRIVED.wait_timeout_while(n, PATIENCE, |n| *n > 0);
}

/// Bytes in transfer. Both access and drop wait until the thread has ended.
pub(super) struct Coming {
    thread: Mutex<Option<JoinHandle<Vec<u8>>>>,
    rows: OnceLock<Vec<u8>>,
    len: usize,
}

impl Coming {
    /// Runs `fill` on a thread, or at once where no thread can be started.
    pub fn new(rows: Vec<u8>, fill: impl FnOnce(&mut [u8]) + Send + 'static) -> Self {
        let (len, journey) = (rows.len(), Journey::begin());
        let work = backend::elsewhere(move || {
            let mut rows = rows;
            fill(&mut rows);
            drop(journey);
            rows
        });
        // shared, because a failed spawn does not return its closure
        let work = Arc::new(Mutex::new(Some(work)));
        let take = |work: &Mutex<Option<_>>| work.lock().unwrap_or_else(PoisonError::into_inner).take();
        let theirs = work.clone();
        let started = thread::Builder::new()
            .name("gvote".into())
            .spawn(move || take(&theirs).map_or_else(Vec::new, |work| work()));
        let filled = if started.is_err() { take(&work).map(|work| work()) } else { None };
        Self { thread: Mutex::new(started.ok()), rows: filled.map_or_else(OnceLock::new, OnceLock::from), len }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn wait(&self) -> &Vec<u8> {
        self.rows.get_or_init(|| join(&mut self.thread.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    pub fn wait_mut(&mut self) -> &mut Vec<u8> {
        self.wait();
        self.rows.get_mut().expect("it was waited for")
    }
}

/// Joins the thread and returns its bytes; empty if it was joined before.
fn join(thread: &mut Option<JoinHandle<Vec<u8>>>) -> Vec<u8> {
    match thread.take().map(JoinHandle::join) {
        Some(Ok(rows)) => rows,
        Some(Err(panic)) => std::panic::resume_unwind(panic),
        None => Vec::new(),
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        // a panic was already reported by its thread
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner);
        thread.take().map(JoinHandle::join);
    }
}

impl fmt::Debug for Coming {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Coming({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn who_asks_waits_for_what_is_on_its_way() {
        let (begin, may_begin) = mpsc::channel();
        let mut coming = Coming::new(vec![0; 3], move |rows| {
            may_begin.recv().unwrap();
            rows.copy_from_slice(&[1, 2, 3]);
        });
        assert_eq!((coming.len(), coming.rows.get()), (3, None), "nobody waits for its length");
        begin.send(()).unwrap();
        assert_eq!(coming.wait(), &[1, 2, 3]);
        coming.wait_mut()[0] = 9;
        assert_eq!(coming.wait(), &[9, 2, 3]);
    }

    #[test]
    fn what_is_given_up_has_ended() {
        let (done, is_done) = mpsc::channel();
        drop(Coming::new(vec![0; 3], move |_| done.send(()).unwrap()));
        is_done.try_recv().expect("the thread has ended");
        wait_for_all();
    }
}
