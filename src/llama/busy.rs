//! Adapts the number of threads on a machine that other processes share.
//!
//! ggml's threads wait for each other after every node of a graph, hundreds of times a token, and spin while they wait.
//! On an idle machine nothing is faster. If another process has taken a core, the thread that should run there is late
//! every time, and the others burn their cores meanwhile: with one of two cores taken, decoding falls to a quarter of
//! its speed.
//!
//! Spinning threads use processor time at the same rate as time passes, so the process can measure how many cores it
//! lacks. If cores are lacking,
//! - single tokens are decoded with as many threads as there are cores left;
//! - other batches keep their threads, and waiting threads sleep: see [`Crowd`].
//!
//! The number of threads never exceeds the number of cores, whatever the caller asked for.
//!
//! ggml computes a row identically in every thread, with one exception: flash attention of a single token splits the
//! cells of an f16 or f32 cache into one part for each thread, and the sums of parts round differently. In that case
//! the number of threads stays as well, unless [`ContextParams::yields_threads`](super::ContextParams::yields_threads)
//! gives up the last bits for speed.
//!
//! After a while all threads spin again, to test whether the cores are free.

use std::mem::MaybeUninit;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, available_parallelism};
use std::time::{Duration, Instant};

use crate::sys;

/// The shortest time over which cores are measured: several scheduler time slices.
const WINDOW: Duration = Duration::from_millis(50);

/// Number of lacking cores from which other processes count as busy. Background load on an idle machine is smaller.
const LACK: f64 = 0.25;

/// Largest number of times a second that a thread may fall asleep by itself. A thread that waits for a disk or a lock
/// uses no time either.
const SLEEPS: f64 = 20.0;

/// Wait before the first retry, as a multiple of the window that caused it; the next constant limits how often it
/// doubles.
const FIRST_WAIT: u32 = 4;
const MOST_DOUBLINGS: u32 = 3;

/// The longest wait before a retry, however long a window was.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Largest number of threads that may sleep. More threads take longer to wake each other after every node than a
/// spinning thread waits for its core.
const MOST_ASLEEP: usize = 4;

/// Resource usage of the threads over some time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Usage {
    wall: Duration,
    cpu: Duration,
    /// Number of times that a thread fell asleep.
    sleeps: u64,
}

/// Tracks the number of cores available to spinning threads.
#[derive(Debug)]
struct Pace {
    /// Cores that the process may use.
    most: usize,
    /// Cores that the process gets while others run, and the time of the next retry.
    taken: Option<(usize, Instant)>,
    /// Number of consecutive windows of all threads that lacked cores.
    lacking: u32,
    /// Threads being measured, and their usage so far.
    n: usize,
    window: Usage,
}

impl Pace {
    fn new(most: usize) -> Self {
        Self { most, taken: None, lacking: 0, n: 0, window: Usage::default() }
    }

    /// Returns the number of cores for `asked` threads.
    fn cores(&self, asked: usize, now: Instant) -> usize {
        let free = match self.taken {
            Some((left, retry)) if now < retry => left,
            _ => self.most,
        };
        asked.min(free)
    }

    /// Records the usage of `n` spinning threads. Returns true if they lacked cores.
    fn note(&mut self, n: usize, usage: Usage, now: Instant) -> bool {
        if n != self.n {
            (self.n, self.window) = (n, Usage::default());
        }
        self.window.wall += usage.wall;
        self.window.cpu += usage.cpu;
        self.window.sleeps += usage.sleeps;
        if self.window.wall < WINDOW {
            return false;
        }
        let Usage { wall, cpu, sleeps } = std::mem::take(&mut self.window);
        let got = cpu.as_secs_f64() / wall.as_secs_f64();
        let lacks = n as f64 - got >= LACK && sleeps as f64 <= SLEEPS * n as f64 * wall.as_secs_f64();
        let left = (got as usize).max(1);
        match self.taken {
            // Fewer threads than before ran: the time of the retry does not change.
            Some((_, retry)) if now < retry => {
                if lacks {
                    self.taken = Some((left, retry));
                }
            }
            _ if lacks => {
                let wait = wall * (FIRST_WAIT << self.lacking.min(MOST_DOUBLINGS));
                self.taken = Some((left, now + wait.min(LONGEST_WAIT)));
                self.lacking += 1;
            }
            _ => (self.taken, self.lacking) = (None, 0),
        }
        lacks
    }
}

/// Makes waiting threads sleep instead of spin for as long as this value lives.
///
/// An OpenMP runtime lets waiting threads sleep at once if there are more of them than cores (libgomp: see
/// GOMP_SPINCOUNT in its manual). A `Crowd` therefore keeps another team of idle threads.
struct Crowd {
    /// Dropped to end the team.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Crowd {
    /// Starts a team large enough for `n` threads. None without OpenMP, or if the system starts no more threads.
    fn gather(n: usize) -> Option<Self> {
        Self::gather_as(n, "gvote-crowd")
    }

    fn gather_as(n: usize, name: &str) -> Option<Self> {
        let (end, ended) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let stand_by = move || {
            // SAFETY: any number is valid.
            let _ = tell.send(unsafe { sys::gvote_shim_crowd(n as i32) });
            // The team lives until the thread it belongs to ends.
            let _ = ended.recv();
        };
        let thread = thread::Builder::new().name(name.into()).spawn(stand_by).ok()?;
        // If there is no team, dropping this value ends the thread.
        let crowd = Self { end: Some(end), thread: Some(thread) };
        told.recv().is_ok_and(|gathered| gathered).then_some(crowd)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // The thread does not panic.
            let _ = thread.join();
        }
    }
}

/// Resource usage of the process up to one moment.
#[derive(Clone, Copy)]
struct Reading {
    at: Instant,
    cpu: Duration,
    sleeps: u64,
}

impl Reading {
    fn take() -> Self {
        let mut raw = MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: writes to the struct, which is plain numbers, all zero before.
        let raw = unsafe {
            libc::getrusage(libc::RUSAGE_SELF, raw.as_mut_ptr());
            raw.assume_init()
        };
        let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
        Self { at: Instant::now(), cpu: time(raw.ru_utime) + time(raw.ru_stime), sleeps: raw.ru_nvcsw as u64 }
    }

    fn since(&self, before: &Self) -> Usage {
        Usage {
            wall: self.at.duration_since(before.at),
            cpu: self.cpu.saturating_sub(before.cpu),
            sleeps: self.sleeps.saturating_sub(before.sleeps),
        }
    }
}

/// Adjusts the threads of a context to the load of the machine.
pub(super) struct Busy {
    state: Mutex<State>,
    /// Decode tokens with fewer threads even if their number changes the last bits of a token.
    yields: bool,
}

struct State {
    pace: Pace,
    crowd: Option<Crowd>,
    /// Spinning threads of the current call, and the last reading.
    watched: Option<(usize, Reading)>,
}

impl State {
    /// Measures the watched threads.
    fn look(&mut self) {
        let Some((n, before)) = self.watched else { return };
        let now = Reading::take();
        self.watched = Some((n, now));
        if self.pace.note(n, now.since(&before), now.at) {
            self.sleep(n);
        }
    }

    /// Makes the waiting threads of `n` sleep, if that is possible and useful.
    fn sleep(&mut self, n: usize) {
        if n <= MOST_ASLEEP && self.crowd.is_none() {
            self.crowd = Crowd::gather(n);
        }
        if self.crowd.is_some() {
            // Sleeping threads do not show how many cores are available.
            self.watched = None;
        }
    }
}

impl Busy {
    /// For `yields`, see [`ContextParams::yields_threads`](super::ContextParams::yields_threads).
    pub fn new(yields: bool) -> Self {
        let most = available_parallelism().map_or(usize::MAX, Into::into);
        Self { state: Mutex::new(State { pace: Pace::new(most), crowd: None, watched: None }), yields }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the number of threads for the next decode call. Dropping the returned value restores it.
    ///
    /// # Safety
    /// `ctx` must stay valid until the returned value is dropped.
    pub unsafe fn enter(&self, ctx: *mut sys::llama_context, n_tokens: usize) -> Entered<'_> {
        let mut entered = Entered { busy: self, ctx, restore: None };
        // SAFETY: valid context.
        let (single, batch, waits) =
            unsafe { (sys::llama_n_threads(ctx), sys::llama_n_threads_batch(ctx), sys::gvote_shim_uses_devices(ctx)) };
        let asked = if n_tokens == 1 { single } else { batch };
        // Threads that wait for a device lack work, not a core.
        if asked < 2 || waits {
            return entered;
        }
        let asked = asked as usize;
        let mut state = self.state();
        let (most, cores) = (state.pace.most, state.pace.cores(asked, Instant::now()));
        // SAFETY: valid context.
        let yields = n_tokens == 1 && (self.yields || !unsafe { sys::gvote_shim_token_in_parts(ctx) });
        // More threads than cores would only wait for each other.
        let n = if yields { cores } else { asked.min(most) };
        if n < asked {
            let (single_now, batch_now) = if n_tokens == 1 { (n as i32, batch) } else { (single, n as i32) };
            // SAFETY: valid context, and numbers of threads that are above 0.
            unsafe { sys::llama_set_n_threads(ctx, single_now, batch_now) };
            entered.restore = Some((single, batch));
        }
        state.watched = (n > 1).then(|| (n, Reading::take()));
        if cores < n {
            state.sleep(n);
        } else {
            state.crowd = None;
        }
        entered
    }

    /// Measures between two nodes of a graph, because a graph may take minutes.
    pub fn tick(&self) {
        let mut state = self.state();
        if state.watched.is_some_and(|(_, last)| last.at.elapsed() >= WINDOW) {
            state.look();
        }
    }

    /// Ends the idle team of threads, if any.
    pub fn rest(&self) {
        self.state().crowd = None;
    }
}

/// A decode call with an adjusted number of threads.
pub(super) struct Entered<'a> {
    busy: &'a Busy,
    ctx: *mut sys::llama_context,
    /// The context's own numbers of threads, for single tokens and for batches.
    restore: Option<(i32, i32)>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut state = self.busy.state();
        state.look();
        state.watched = None;
        if let Some((single, batch)) = self.restore {
            // SAFETY: see `Busy::enter`.
            unsafe { sys::llama_set_n_threads(self.ctx, single, batch) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A window of threads that got this many cores.
    fn window(cores: f64) -> Usage {
        Usage { wall: WINDOW, cpu: WINDOW.mul_f64(cores), sleeps: 0 }
    }

    #[test]
    fn threads_stay_where_each_has_its_core() {
        let (mut pace, now) = (Pace::new(2), Instant::now());
        assert!((0..100).all(|_| !pace.note(2, window(1.9), now)));
        assert_eq!(pace.cores(2, now), 2);
        assert_eq!(pace.cores(4, now), 2, "more threads than there are cores");
    }

    #[test]
    fn threads_go_where_their_core_is_taken() {
        for (n, got, left) in [(2, 1.5, 1), (2, 0.6, 1), (4, 3.5, 3), (16, 15.5, 15), (16, 10.7, 10)] {
            let (mut pace, now) = (Pace::new(16), Instant::now());
            assert!(pace.note(n, window(got), now));
            assert_eq!(pace.cores(n, now), left);
        }
    }

    #[test]
    fn fewer_threads_may_lack_cores_too() {
        let (mut pace, now) = (Pace::new(16), Instant::now());
        pace.note(16, window(10.7), now);
        pace.note(10, window(8.9), now);
        assert_eq!(pace.cores(16, now), 8);
        pace.note(8, window(8.0), now);
        assert_eq!(pace.cores(16, now), 8, "until all are tried again");
    }

    #[test]
    fn a_moment_is_nothing_to_judge_by() {
        let (mut pace, now) = (Pace::new(2), Instant::now());
        let moment = Usage { wall: WINDOW / 5, cpu: WINDOW / 5, sleeps: 0 };
        assert!((0..4).all(|_| !pace.note(2, moment, now)));
        assert!(pace.note(2, moment, now));
    }

    #[test]
    fn who_sleeps_lacks_no_core() {
        let (mut pace, now) = (Pace::new(2), Instant::now());
        assert!(!pace.note(2, Usage { sleeps: 100, ..window(0.5) }, now));
        assert_eq!(pace.cores(2, now), 2);
    }

    #[test]
    fn all_threads_are_tried_again_ever_more_seldom() {
        let (mut pace, mut now) = (Pace::new(2), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..6 {
            pace.note(2, window(1.2), now);
            let begun = now;
            while pace.cores(2, now) == 1 {
                now += WINDOW;
            }
            waits.push((now - begun).as_millis() / WINDOW.as_millis());
        }
        assert_eq!(waits, [4, 8, 16, 32, 32, 32]);
        pace.note(2, window(2.0), now);
        assert_eq!(pace.cores(2, now), 2);
        pace.note(2, window(1.2), now);
        assert_eq!(pace.cores(2, now + 4 * WINDOW), 2, "a moment of work does not count");
    }

    #[test]
    fn a_long_window_does_not_keep_threads_away_for_long() {
        let (mut pace, now) = (Pace::new(2), Instant::now());
        let long = Duration::from_secs(60);
        assert!(pace.note(2, Usage { wall: long, cpu: long, sleeps: 0 }, now));
        assert_eq!(pace.cores(2, now + LONGEST_WAIT), 2);
    }

    #[test]
    fn a_process_sees_what_it_uses() {
        let before = Reading::take();
        while before.at.elapsed() < WINDOW {}
        thread::sleep(WINDOW);
        let usage = Reading::take().since(&before);
        assert!(usage.wall >= 2 * WINDOW && usage.cpu > WINDOW / 10 && usage.sleeps > 0, "{usage:?}");
    }

    #[test]
    fn a_crowd_stands_by_as_long_as_it_is_needed() {
        // contexts of other tests have teams of their own
        const NAME: &str = "crowd-of-a-test";
        let there = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path().join("comm"));
            tasks.filter(|name| std::fs::read_to_string(name).is_ok_and(|name| name.trim() == NAME)).count()
        };
        let crowd = Crowd::gather_as(1, NAME).unwrap();
        assert!(there() > available_parallelism().unwrap().get());
        drop(crowd);
        // OpenMP's own threads end by themselves
        let begun = Instant::now();
        while there() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "{} are left", there());
            thread::sleep(WINDOW);
        }
    }
}
