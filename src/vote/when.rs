//! When an answer is voted on: before it, or once it has shown that it is long.
//!
//! A vote takes as long as some 100 tokens of an answer, most of it for the trial, which only a long answer earns back; and nobody knows
//! beforehand how long an answer will be. [`When::Auto`] rents before it buys, as the ski-rental rule has it: it votes as soon as the
//! time that fewer cells would have saved so far has reached what the vote will take, or where the cache is full. Until then the answer
//! is the full cache's own, bit for bit, and one that ends early has paid nothing. Queries of the answer vote then.

#![forbid(unsafe_code)]

use std::str::FromStr;
use std::time::Duration;

use super::{CompressReport, trial};
use crate::policy;
#[cfg(doc)]
use crate::session::Session;

/// When an answer is voted on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum When {
    /// Before it: the caller does, with [`Session::compress`] or `gvote_compress()`.
    #[default]
    Prompt,
    /// After so many of its tokens.
    After(usize),
    /// When that pays.
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

/// Tokens of an answer that are always the full cache's: with so many nothing is drafted for the trial.
const FIRST: usize = 64;
/// Share of the cells that a vote is expected to leave, as long as there was none.
const KEPT: f64 = 0.4;
/// Readings of a trial, as long as there was no vote that could be timed: what the full cache expects, rounding, and the counts.
const READINGS: f64 = 6.0;
/// A reading takes as long as a step, and so many times what its tokens took in a prompt: small batches at the end of the text.
const DEEP: f64 = 1.3;
/// Of the time that reading all cells' tokens took, what scores take.
const SCORED: f64 = 0.03;
/// A prompt of fewer tokens says nothing about how fast a long one is read.
const LEAST_READ: usize = 128;

/// What this context has shown of what it takes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Known {
    /// Seconds to read a token of a prompt.
    read: Option<f64>,
    /// Of the last vote: seconds for each cell that there was, and the share that it left.
    vote: Option<(f64, f64)>,
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

    /// Seconds that a vote on `n` cells will take where a step of the answer takes `step`.
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

/// What a vote has to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// Tokens of its trial; 0 without one.
    pub tried: usize,
    /// Tokens that are read again.
    pub observed: usize,
}

impl Work {
    /// For a vote on `n` cells.
    pub fn of(policy: &policy::Params, n: usize) -> Self {
        let reread = if policy.replay { n } else { 0 };
        Self { tried: if policy.tries() { trial::most_tokens(policy) } else { 0 }, observed: policy.window + reread }
    }
}

/// Counts what an answer could have saved so far.
#[derive(Debug)]
pub(crate) struct Meter {
    when: When,
    known: Known,
    work: Work,
    /// Of a step's time, what it takes to read a cell: the bytes of K and V in one, of all bytes that a step reads.
    cell: f64,
    weights: f64,
    steps: usize,
    /// Seconds of all steps, and what they could have saved of it.
    time: f64,
    saved: f64,
}

impl Meter {
    /// `cell`, `weights`: bytes that a step reads of each.
    pub fn new(when: When, known: Known, work: Work, cell: usize, weights: u64) -> Self {
        let (cell, weights) = (cell as f64, weights as f64);
        Self { when, known, work, cell, weights, steps: 0, time: 0.0, saved: 0.0 }
    }

    /// Notes a step that took `time` with `n` cells.
    pub fn step(&mut self, n: usize, time: Duration) {
        let cells = n as f64 * self.cell;
        let share = cells / (cells + self.weights).max(1.0);
        self.steps += 1;
        self.time += time.as_secs_f64();
        self.saved += time.as_secs_f64() * share * (1.0 - self.known.kept());
    }

    /// Whether it is time to vote on `n` cells, after so many tokens of the answer; `is_full`: the next one has no cell.
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

    /// There is no vote any more.
    pub fn stop(&mut self) {
        self.when = When::Prompt;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Kind;

    /// After 4,000 tokens that were read in 0.005 s each, with half of a step's bytes in the cache.
    fn meter(when: When) -> Meter {
        let mut known = Known::default();
        known.has_read(4000, Duration::from_secs(20));
        Meter::new(when, known, Work { tried: 32, observed: 64 }, 1000, 4_000_000)
    }

    /// Tokens of an answer after which it is voted on, of at most 10,000.
    fn due(mut meter: Meter, step: Duration) -> Option<usize> {
        (0..10_000).find(|&tokens| {
            let is_due = meter.is_due(tokens, 4000, false);
            meter.step(4000, step);
            is_due
        })
    }

    #[test]
    fn a_vote_comes_when_what_it_takes_could_have_been_saved() {
        // 7 steps and (6 * 1.3 * 32 + 1.3 * 64 + 0.03 * 4000) * 0.005 s, where 0.3 of each step are saved
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
