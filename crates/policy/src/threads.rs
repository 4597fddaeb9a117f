//! Threads for work that must be completed: if the system starts no more threads, fewer threads, or only the caller's,
//! do the work.
//!
//! On some systems starting a thread takes a tenth of a millisecond, which is longer than the thread's work in a vote
//! on a device. A [`Pool`] keeps threads waiting for work.

use std::cell::Cell;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle, Scope, ScopedJoinHandle};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Thread limit: additional threads would only wait for memory.
const MOST: usize = 16;

thread_local! {
    static IS_ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` in this thread as on a system that starts no more threads.
pub fn alone<T>(work: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            IS_ALONE.set(self.0);
        }
    }
    let _before = Before(IS_ALONE.replace(true));
    work()
}

/// Returns the largest number of threads that work well together on this machine.
pub fn at_most() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get()).min(MOST)
}

/// Touches pages of zeros before several threads write to them. Otherwise each thread would fault in a large page by
/// itself.
pub fn touch<T: Copy + Default>(zeros: &mut [T]) {
    /// The smallest page size of any system.
    const STEP: usize = 4096;
    zeros.iter_mut().step_by(STEP / size_of::<T>()).for_each(|x| *x = T::default());
}

/// Starts a thread in `scope`.
///
/// # Errors
/// Returns the system's error if the thread cannot be started.
pub fn start<'s, T: Send + 's>(
    scope: &'s Scope<'s, '_>,
    work: impl FnOnce() -> T + Send + 's,
) -> io::Result<ScopedJoinHandle<'s, T>> {
    if IS_ALONE.get() {
        return Err(io::Error::other("no other thread may do it"));
    }
    thread::Builder::new().spawn_scoped(scope, work)
}

/// Threads that wait for work from [`scope`]. They are joined when the last `Arc` drops, so that the library can be
/// unloaded.
pub struct Pool {
    /// None while the threads end.
    pool: Option<ThreadPool>,
    threads: Vec<JoinHandle<()>>,
}

/// The pool of this process.
static POOL: Mutex<Weak<Pool>> = Mutex::new(Weak::new());

impl Pool {
    /// Returns the pool of the process, which lives as long as any `Arc` to it. None if the system does not start its
    /// threads.
    pub fn keep() -> Option<Arc<Self>> {
        let mut shared = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = shared.upgrade() {
            return Some(kept);
        }
        let kept = Arc::new(Self::start()?);
        *shared = Arc::downgrade(&kept);
        Some(kept)
    }

    fn start() -> Option<Self> {
        let mut started = Self { pool: None, threads: Vec::new() };
        let n = (at_most() - 1).max(1);
        let builder = ThreadPoolBuilder::new().num_threads(n).spawn_handler(|thread| {
            started.threads.push(thread::Builder::new().name("gvote".into()).spawn(|| thread.run())?);
            Ok(())
        });
        started.pool = Some(builder.build().ok()?);
        Some(started)
    }

    fn at_hand() -> Option<Arc<Self>> {
        if IS_ALONE.get() {
            return None;
        }
        POOL.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.pool = None;
        for thread in self.threads.drain(..) {
            // No thread has work, so none can have panicked.
            let _ = thread.join();
        }
    }
}

/// Source of additional threads: a pool, or threads started for one scope.
pub enum Crew<'s, 'env> {
    Pool(&'s rayon::Scope<'env>),
    Started(&'s Scope<'s, 'env>),
}

impl<'env> Crew<'_, 'env> {
    /// Runs `work` in another thread, or drops it if the system starts no more threads. The work may begin after all
    /// others have ended.
    pub fn start(&self, work: impl FnOnce() + Send + 'env) {
        match self {
            Self::Pool(scope) => scope.spawn(|_| work()),
            Self::Started(scope) => _ = start(scope, work),
        }
    }
}

/// Runs `work`, which may pass parts of it to other threads, and waits for them.
pub fn scope<'env>(work: impl FnOnce(&Crew<'_, 'env>)) {
    let kept = Pool::at_hand();
    match kept.as_ref().and_then(|kept| kept.pool.as_ref()) {
        Some(pool) => pool.in_place_scope(|scope| work(&Crew::Pool(scope))),
        None => thread::scope(|scope| work(&Crew::Started(scope))),
    }
}

/// Applies `work` to each of `parts` in at most `n_threads` threads. One of them is the calling thread, which runs
/// `first` before.
pub fn share_out<T>(
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
    let work_on = &work_on;
    scope(|crew| {
        for _ in 1..n_threads {
            crew.start(work_on);
        }
        first();
        work_on();
    });
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Returns how often each of some parts was worked on.
    fn counts(n_threads: usize) -> Vec<usize> {
        let counts: Vec<_> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        let here = thread::current().id();
        let mut is_here = false;
        let work = |part: &AtomicUsize| _ = part.fetch_add(1, Ordering::Relaxed);
        share_out(n_threads, counts.iter(), work, || is_here = thread::current().id() == here);
        assert!(is_here);
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_part_is_worked_on_once_by_whomever() {
        let all = || [1, 2, 3, 100].map(counts).iter().all(|counts| counts.iter().all(|&n| n == 1));
        assert!(all());
        let kept = Pool::keep().unwrap();
        assert!(Arc::ptr_eq(&kept, &Pool::keep().unwrap()));
        assert!(all());
        assert!(alone(all));
        drop(kept);
        assert!(all());
    }

    #[test]
    fn threads_have_ended_when_nobody_keeps_them() {
        thread_local!(static OF_THREAD: RefCell<Option<Arc<()>>> = const { RefCell::new(None) });
        let (pool, shared) = (Pool::start().unwrap(), Arc::new(()));
        let n = pool.threads.len();
        pool.pool.as_ref().unwrap().broadcast(|_| OF_THREAD.replace(Some(shared.clone())));
        assert_eq!((n, Arc::strong_count(&shared)), ((at_most() - 1).max(1), n + 1));
        drop(pool);
        assert_eq!(Arc::strong_count(&shared), 1);
    }

    #[test]
    fn kept_threads_outlive_a_panic() {
        let _kept = Pool::keep().unwrap();
        let fails = || share_out(3, 0..100, |part| assert_ne!(part, 60), || ());
        assert!(catch_unwind(AssertUnwindSafe(fails)).is_err());
        assert!(counts(3).iter().all(|&n| n == 1));
    }

    #[test]
    fn nobody_needs_more_threads_than_there_are() {
        let _kept = Pool::keep().unwrap();
        // nested calls ask for more threads than there are
        let done = AtomicUsize::new(0);
        let inner = |_| share_out(4, 0..10, |_| _ = done.fetch_add(1, Ordering::Relaxed), || ());
        share_out(4 * MOST, 0..4 * MOST, inner, || ());
        assert_eq!(done.into_inner(), 40 * MOST);
    }
}
