//! Decides when to vote on an answer: before it begins, or once it has proved to be long.
//!
//! A vote takes as long as some 100 tokens of an answer; the trial dominates this cost, and only a long answer earns it back. The length of
//! an answer is not known beforehand. [`When::Auto`] therefore follows the ski-rental rule: it votes as soon as the time that fewer cells
//! would have saved so far reaches the cost of a vote, or when the cache is full. Until then the answer equals that of the full cache, bit
//! for bit, and an answer that ends early has cost nothing. A later vote also uses queries of the answer.

#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use super::{CompressReport, trial};
use crate::policy;
#[cfg(doc)]
use crate::session::Session;

/// When to vote on an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum When {
    /// Before the answer: the caller votes, with [`Session::compress`] or `gvote_compress()`.
    #[default]
    Prompt,
    /// After this many tokens of the answer.
    After(usize),
    /// As soon as the vote is expected to pay for itself, or when the cache is full.
    Auto,
}

impl FromStr for When {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "prompt" => Ok(Self::Prompt),
            "auto" => Ok(Self::Auto),
            n => n.parse().map(Self::After).map_err(|_| "prompt, auto or a number of tokens is needed"),
        }
    }
}

/// Tokens at the start of an answer that always come from the full cache: with this many, the trial needs no drafted tokens.
const FIRST: usize = 64;
/// Share of the cells that the first vote is expected to leave.
const KEPT: f64 = 0.4;
/// Test readings that the first trial is expected to need: the full cache, the rounding, and each count.
const READINGS: f64 = 6.0;
/// Cost of a reading is one step plus this factor times what its tokens took in the prompt: small batches at the end of the text are
/// slower.
const DEEP: f64 = 1.3;
/// Cost of scoring, as a share of the time that reading the tokens of all cells took.
const SCORED: f64 = 0.03;
/// Steps after a vote before its gain is measured.
const TELLING: usize = 32;
/// Bounds on the measured gain relative to the expected one. Values outside are noise, and a context without any gain still measures again.
const WORTH: RangeInclusive<f64> = 0.05..=2.0;
/// Shortest prompt whose reading speed is used as an estimate for a long one.
const LEAST_READ: usize = 128;

/// Measured costs and gains in this context.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Known {
    /// Seconds to read one token of a prompt.
    read: Option<f64>,
    /// Last vote: seconds for each cell before it, and the share of cells that it left.
    vote: Option<(f64, f64)>,
    /// Measured gain of a vote divided by the gain that the bytes predict.
    worth: Option<f64>,
}

impl Known {
    pub fn has_read(&mut self, n: usize, time: Duration) {
        if n >= LEAST_READ {
            self.read = Some(time.as_secs_f64() / n as f64);
        }
    }

    pub fn has_voted(&mut self, report: &CompressReport) {
        if report.cells_after < report.cells_before {
            self.vote = Some((report.time().as_secs_f64() / report.cells_before as f64, report.share()));
        }
    }

    /// Learns the gain of a vote from a finished answer. The gain is below the prediction where steps are not bound by reading the cache,
    /// as on a large GPU.
    pub fn has_answered(&mut self, meter: &Meter) {
        self.worth = meter.worth().or(self.worth);
    }

    /// Returns the seconds that a vote on `n` cells is expected to take, where one step of the answer takes `step` seconds.
    fn price(&self, n: usize, step: f64, work: Work) -> Option<f64> {
        let (n, Work { tried, observed }) = (n as f64, work);
        let first = |token| {
            let reading = |tokens: usize| if tokens > 0 { step + DEEP * tokens as f64 * token } else { 0.0 };
            READINGS * reading(tried) + reading(observed) + SCORED * token * n
        };
        self.vote.map(|(cell, _)| cell * n).or(self.read.map(first))
    }

    fn kept(&self) -> f64 {
        self.vote.map_or(KEPT, |(_, share)| share)
    }
}

/// Work that a vote has to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// Tokens of the trial; 0 without one.
    pub tried: usize,
    /// Tokens that are read again.
    pub observed: usize,
}

impl Work {
    /// Work of a vote on `n` cells.
    pub fn of(policy: &policy::Params, n: usize) -> Self {
        let reread = if policy.replay { n } else { 0 };
        Self { tried: if policy.tries() { trial::most_tokens(policy) } else { 0 }, observed: policy.window + reread }
    }
}

/// Adds up the time that an answer could have saved so far.
#[derive(Debug)]
pub(crate) struct Meter {
    when: When,
    known: Known,
    work: Work,
    /// Bytes of K and V in one cell, and bytes of weights that a step reads; their ratio gives a cell's share of a step's time.
    cell: f64,
    weights: f64,
    steps: usize,
    /// Seconds of all steps, and the seconds that fewer cells could have saved.
    time: f64,
    saved: f64,
    /// Seconds of the quickest step since the answer began, or since its vote.
    quickest: f64,
    vote: Option<Voted>,
}

/// A vote on an answer.
#[derive(Debug)]
struct Voted {
    /// Seconds of the quickest step before the vote, and the seconds that the vote should save on each step.
    quickest: f64,
    saves: f64,
    /// Steps before the vote.
    steps: usize,
}

impl Meter {
    /// `cell`: bytes of K and V in one cell. `weights`: bytes of weights that a step reads.
    pub fn new(when: When, known: Known, work: Work, cell: usize, weights: u64) -> Self {
        let (cell, weights) = (cell as f64, weights as f64);
        let (steps, time, saved, quickest, vote) = (0, 0.0, 0.0, f64::INFINITY, None);
        Self { when, known, work, cell, weights, steps, time, saved, quickest, vote }
    }

    /// Records a step that took `time` with `n` cells.
    pub fn step(&mut self, n: usize, time: Duration) {
        let time = time.as_secs_f64();
        self.steps += 1;
        self.time += time;
        self.saved += time * self.share(n) * (1.0 - self.known.kept()) * self.known.worth.unwrap_or(1.0);
        self.quickest = self.quickest.min(time);
    }

    /// Share of the bytes of a step that belong to `n` cells.
    fn share(&self, n: usize) -> f64 {
        let cells = n as f64 * self.cell;
        cells / (cells + self.weights).max(1.0)
    }

    /// Records a vote that left `after` of `before` cells.
    pub fn has_voted(&mut self, before: usize, after: usize) {
        let freed = before.saturating_sub(after) as f64 / before.max(1) as f64;
        let saves = self.quickest * self.share(before) * freed;
        let quickest = std::mem::replace(&mut self.quickest, f64::INFINITY);
        self.vote = (saves > 0.0 && saves.is_finite()).then_some(Voted { quickest, saves, steps: self.steps });
    }

    /// Returns the measured gain of the vote divided by the expected one; None without a vote, or with too few steps since.
    fn worth(&self) -> Option<f64> {
        let vote = self.vote.as_ref().filter(|vote| self.steps >= vote.steps + TELLING)?;
        Some(((vote.quickest - self.quickest) / vote.saves).clamp(*WORTH.start(), *WORTH.end()))
    }

    /// Whether to vote now on `n` cells, after `tokens` tokens of the answer. `is_full`: no cell is left for the next token.
    pub fn is_due(&self, tokens: usize, n: usize, is_full: bool) -> bool {
        match self.when {
            When::Prompt => false,
            When::After(after) => tokens >= after,
            When::Auto => is_full || tokens >= FIRST && self.price(n).is_some_and(|price| self.saved >= price),
        }
    }

    fn price(&self, n: usize) -> Option<f64> {
        self.known.price(n, self.time / self.steps.max(1) as f64, self.work)
    }

    /// Turns further votes on this answer off.
    pub fn stop(&mut self) {
        self.when = When::Prompt;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Kind;

    /// A meter after 4,000 prompt tokens at 0.005 s each; half of a step's bytes belong to the cache.
    fn meter(when: When) -> Meter {
        let mut known = Known::default();
        known.has_read(4000, Duration::from_secs(20));
        Meter::new(when, known, Work { tried: 32, observed: 64 }, 1000, 4_000_000)
    }

    /// Returns the number of answer tokens after which the vote is due, of at most 10,000.
    fn due(mut meter: Meter, step: Duration) -> Option<usize> {
        (0..10_000).find(|&tokens| {
            let is_due = meter.is_due(tokens, 4000, false);
            meter.step(4000, step);
            is_due
        })
    }

    #[test]
    fn a_vote_comes_when_what_it_takes_could_have_been_saved() {
        // 7 steps and (6 * 1.3 * 32 + 1.3 * 64 + 0.03 * 4000) * 0.005 s, where 0.3 of each step could be saved
        assert_eq!(due(meter(When::Auto), Duration::from_millis(20)), Some(401));
        assert_eq!(due(meter(When::Auto), Duration::from_millis(100)), Some(99));
        let cheap = Meter { work: Work { tried: 0, observed: 64 }, ..meter(When::Auto) };
        assert_eq!(due(cheap, Duration::from_millis(30)), Some(117), "without a trial");
        let cheap = Meter { work: Work { tried: 0, observed: 64 }, ..meter(When::Auto) };
        assert_eq!(due(cheap, Duration::from_secs(2)), Some(FIRST), "the first are the full cache's");
        assert_eq!(due(meter(When::Prompt), Duration::from_secs(2)), None);
        assert_eq!(due(meter(When::After(7)), Duration::ZERO), Some(7));
    }

    #[test]
    fn a_cache_that_is_small_beside_the_weights_is_never_voted_on_for_speed() {
        let small = Meter { weights: 4e9, ..meter(When::Auto) };
        assert_eq!(due(small, Duration::from_millis(20)), None);
        let unknown = Meter { known: Known::default(), ..meter(When::Auto) };
        assert_eq!(due(unknown, Duration::from_secs(2)), None);
    }

    #[test]
    fn a_vote_that_saved_little_makes_the_next_one_wait() {
        let answered = |after: Duration, n: usize| {
            let mut meter = meter(When::Auto);
            (0..40).for_each(|_| meter.step(4000, Duration::from_millis(20)));
            meter.has_voted(4000, 1000);
            (0..n).for_each(|_| meter.step(1000, after));
            let mut known = meter.known;
            known.has_answered(&meter);
            known
        };
        // half of a step is the cache, and the vote dropped three quarters of it: 7.5 ms of 20
        assert_eq!(answered(Duration::from_micros(12_500), 31).worth, None);
        let near = |known: Known, worth: f64| assert!((known.worth.unwrap() - worth).abs() < 1e-9, "{known:?}");
        near(answered(Duration::from_micros(12_500), 32), 1.0);
        near(answered(Duration::from_micros(18_500), 40), 0.2);
        near(answered(Duration::from_millis(30), 40), 0.05);
        let next = Meter { known: answered(Duration::from_micros(18_500), 40), ..meter(When::Auto) };
        assert_eq!(due(next, Duration::from_millis(20)), Some(2004));
    }

    #[test]
    fn the_last_vote_says_what_the_next_one_takes() {
        let mut known = Known::default();
        let mut report = CompressReport::untouched(Kind::Gvote, 1000, 1);
        let work = Work { tried: 32, observed: 64 };
        known.has_voted(&report);
        assert_eq!(known.price(1000, 0.02, work), None, "one that left all says nothing");
        (report.cells_after, report.score_time) = (250, Duration::from_secs(2));
        known.has_voted(&report);
        known.has_read(4000, Duration::from_secs(20));
        assert_eq!((known.price(2000, 0.02, work), known.kept()), (Some(4.0), 0.25));
        known.has_read(LEAST_READ - 1, Duration::from_secs(20));
        assert_eq!(known.read, Some(0.005));
    }
}
