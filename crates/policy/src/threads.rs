//! Threads for what must come to its end: where the system starts no more of them, fewer do the work, or one alone.
//!
//! To start a thread takes some systems a tenth of a millisecond, which is more than it has to do in a vote on a device. So threads
//! may be kept that wait for work: see [`Pool`].

use std::cell::Cell;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle, Scope, ScopedJoinHandle};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// More threads than this wait for memory.
const MOST: usize = 16;

thread_local! {
    static IS_ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Does `work`, started by this thread, as on a system that starts no more threads.
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

/// How many work well together here, at most.
pub fn at_most() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get()).min(MOST)
}

/// Has pages of zeros made ready before several threads write to them at once, each of which would make a large one ready by itself.
pub fn touch<T: Copy + Default>(zeros: &mut [T]) {
    /// The least that any system makes ready at once.
    const STEP: usize = 4096;
    zeros.iter_mut().step_by(STEP / size_of::<T>()).for_each(|x| *x = T::default());
}

/// Starts a thread of `scope`.
///
/// # Errors
/// The system's.
pub fn start<'s, T: Send + 's>(
    scope: &'s Scope<'s, '_>,
    work: impl FnOnce() -> T + Send + 's,
) -> io::Result<ScopedJoinHandle<'s, T>> {
    if IS_ALONE.get() {
        return Err(io::Error::other("no other thread may do it"));
    }
    thread::Builder::new().spawn_scoped(scope, work)
}

/// Threads that wait for what [`scope`] has for them, until nobody has this any more. They have ended then: a library may be unloaded.
pub struct Pool {
    /// None while they end.
    pool: Option<ThreadPool>,
    threads: Vec<JoinHandle<()>>,
}

/// That of the process.
static POOL: Mutex<Weak<Pool>> = Mutex::new(Weak::new());

impl Pool {
    /// The process's pool, as long as somebody has it; None where the system does not start its threads.
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
            // none has work, so none can have panicked
            let _ = thread.join();
        }
    }
}

/// Who helps with some work: threads that were kept, or are started for it.
pub enum Crew<'s, 'env> {
    Pool(&'s rayon::Scope<'env>),
    Started(&'s Scope<'s, 'env>),
}

impl<'env> Crew<'_, 'env> {
    /// Has another thread do `work`, or nobody, where the system starts no more threads. It may begin when all others have ended.
    pub fn start(&self, work: impl FnOnce() + Send + 'env) {
        match self {
            Self::Pool(scope) => scope.spawn(|_| work()),
            Self::Started(scope) => _ = start(scope, work),
        }
    }
}

/// Does `work`, some of it in other threads, and waits for them.
pub fn scope<'env>(work: impl FnOnce(&Crew<'_, 'env>)) {
    let kept = Pool::at_hand();
    match kept.as_ref().and_then(|kept| kept.pool.as_ref()) {
        Some(pool) => pool.in_place_scope(|scope| work(&Crew::Pool(scope))),
        None => thread::scope(|scope| work(&Crew::Started(scope))),
    }
}

/// Does `work` to each of `parts` in at most `n_threads` threads, of which this is one that does something else first.
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

    /// How often each of some parts was worked on.
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
        // each of more than there are has others do some of its work
        let done = AtomicUsize::new(0);
        let inner = |_| share_out(4, 0..10, |_| _ = done.fetch_add(1, Ordering::Relaxed), || ());
        share_out(4 * MOST, 0..4 * MOST, inner, || ());
        assert_eq!(done.into_inner(), 40 * MOST);
    }
}
