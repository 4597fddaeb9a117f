//! Reports on a turn, as text and as JSON.

use std::time::Duration;

use anyhow::Result;
use gvote::Session;
use gvote::policy::{Bound, Kind, Params};
use gvote::session::{AnswerVote, CompressReport, ExpandReport, PrefillReport, Recall, Squeezes, Stop};
use serde::Serialize;

use super::spelling::with_flags;
use super::turn::{Reply, print};
use super::words::{bytes, count, line, number_of_bytes, plural, short};

/// Report on one prompt and its answer.
#[derive(Debug, Clone, Serialize)]
pub struct TurnReport {
    pub answer: String,
    pub prefill: Prefill,
    /// Absent if there was no vote in this turn.
    pub vote: Option<Vote>,
    /// Reason why a vote that was due failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unvoted: Option<String>,
    pub decode: Decode,
    pub cache: Cache,
    #[serde(skip)]
    policy: Params,
}

/// Report on reading the prompt. The rate is absent if nothing was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Prefill {
    pub tokens: usize,
    pub seconds: f64,
    pub tokens_per_second: Option<f64>,
    /// Rows brought back into the cache before reading.
    pub expanded: ExpandReport,
    pub squeezes: Squeezes,
}

#[derive(Debug, Clone, Serialize)]
pub struct Decode {
    pub tokens: usize,
    pub seconds: f64,
    pub tokens_per_second: Option<f64>,
    pub stop: Stop,
    /// Times until the answer had 1, 2, 4, 8 and so on tokens.
    pub timeline: Vec<Milestone>,
    pub squeezes: Squeezes,
    /// How often the cells were chosen anew, and the time for it.
    pub renewals: Squeezes,
}

/// A point in time of an answer.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Milestone {
    /// Tokens of the answer so far.
    pub tokens: usize,
    /// Time since reading the prompt began: reading, votes and answering.
    pub seconds: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Vote {
    /// The library's report, with the times of the single steps.
    #[serde(flatten)]
    pub report: CompressReport,
    /// Tokens of the answer generated before the vote; if any, the vote's time is part of the answer's.
    pub after_tokens: usize,
    /// Cells after the vote divided by cells before it, 0 to 1.
    pub share_kept: f64,
    /// Time of the vote, without the two steps below.
    pub vote_seconds: f64,
    /// Time to copy rows that can come back out of the cache.
    pub aside_seconds: f64,
    pub compaction_seconds: f64,
    /// Time of all three divided by the time of the prefill before them.
    pub share_of_prefill: Option<f64>,
}

/// State of the cache after the answer.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Cache {
    pub cells: usize,
    pub size: usize,
    /// Tokens that the cells stand for.
    pub tokens: usize,
    /// Absent if the layout of the cache is not known.
    pub bytes_per_cell: Option<usize>,
    pub kv_bytes: Option<usize>,
    /// Rows per head that left the cells and can come back, their bytes, and their place.
    pub rows_aside: usize,
    pub bytes_aside: usize,
    pub aside_in: Option<AsideIn>,
}

/// Where rows that left the cache are stored.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AsideIn {
    Memory,
    File,
}

impl Cache {
    pub fn of(session: &Session) -> Self {
        let cells = session.cells_used();
        let bytes_per_cell = session.bytes_per_cell();
        Self {
            cells,
            size: session.n_ctx(),
            tokens: session.n_past() as usize,
            bytes_per_cell,
            kv_bytes: bytes_per_cell.map(|b| b * cells),
            rows_aside: session.rows_aside(),
            bytes_aside: session.bytes_aside(),
            aside_in: match session.recall() {
                Recall::Off => None,
                Recall::Auto => Some(AsideIn::Memory),
                Recall::File(_) => Some(AsideIn::File),
            },
        }
    }
}

/// JSON object that `--json` prints for an answer.
#[derive(Serialize)]
pub struct Record<'a> {
    /// Number of the turn in a chat, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    turn: Option<usize>,
    #[serde(flatten)]
    report: &'a TurnReport,
    model: String,
    policy: &'a Params,
    seed: u32,
}

impl<'a> Record<'a> {
    pub fn new(report: &'a TurnReport, session: &'a Session, seed: u32, turn: Option<usize>) -> Self {
        Self { turn, report, model: session.model().description(), policy: session.policy(), seed }
    }
}

/// Sums over all turns of a conversation.
#[derive(Default)]
pub struct Totals {
    pub turns: usize,
    read: usize,
    answered: usize,
    votes: usize,
    dropped: usize,
}

impl Totals {
    pub fn add(&mut self, report: &TurnReport) {
        self.turns += 1;
        self.read += report.prefill.tokens;
        self.answered += report.decode.tokens;
        if let Some(vote) = &report.vote
            && !vote.was_skipped(&report.policy)
        {
            self.votes += 1;
            self.dropped += vote.report.cells_before - vote.report.cells_after;
        }
    }

    pub fn in_words(&self) -> String {
        format!(
            "{}, {} tokens read, {} answered, {}, {} freed",
            plural(self.turns, "answer"),
            count(self.read),
            count(self.answered),
            plural(self.votes, "vote"),
            plural(self.dropped, "cell"),
        )
    }
}

impl TurnReport {
    pub fn new(
        session: &Session,
        prefill: PrefillReport,
        vote: Option<CompressReport>,
        Reply { text: answer, report: decode, timeline, .. }: Reply,
    ) -> Self {
        let in_answer = decode.vote.map(|AnswerVote { after, report }| (report, after));
        let vote = vote.map(|report| (report, 0)).or(in_answer);
        Self {
            answer,
            prefill: Prefill::new(prefill),
            unvoted: decode.unvoted.map(|error| with_flags(&error)),
            vote: vote.map(|(report, after)| Vote { after_tokens: after, ..Vote::new(report, prefill.time) }),
            decode: Decode {
                tokens: decode.tokens,
                seconds: decode.time.as_secs_f64(),
                tokens_per_second: rate(decode.tokens, decode.time),
                stop: decode.stop,
                timeline: timeline.into_iter().map(Milestone::new).collect(),
                squeezes: decode.squeezes,
                renewals: decode.renewals,
            },
            cache: Cache::of(session),
            policy: session.policy().clone(),
        }
    }

    /// Prints the report as aligned lines on stderr.
    pub fn print(&self) {
        let prefill = self.prefill.lines(self.cache.size);
        let cache = match &self.vote {
            Some(vote) => vote.lines(&self.policy),
            None => self.lines_without_vote(),
        };
        prefill.into_iter().chain(cache).for_each(|(label, text)| line(label, &text));
        let decode = &self.decode;
        let answer = in_time(decode.tokens, decode.seconds, decode.tokens_per_second);
        line("answer", &format!("{answer}, {}", stop_in_words(decode.stop)));
        if decode.squeezes.count > 0 {
            line("", &squeezed(&decode.squeezes, self.cache.size));
        }
        if decode.renewals.count > 0 {
            let Squeezes { count, time, .. } = decode.renewals;
            line("", &format!("cells chosen anew {} in {:.2} s of it", plural(count, "time"), time.as_secs_f64()));
        }
    }

    fn lines_without_vote(&self) -> Vec<(&'static str, String)> {
        let why = match &self.unvoted {
            Some(error) => error.as_str(),
            None => "the answer was too short for one to pay",
        };
        let vote = (self.policy.policy != Kind::Full).then(|| ("vote", format!("none: {why}")));
        [("cache", self.cache.in_words())].into_iter().chain(vote).collect()
    }

    /// Returns the report in one line, for the end of a turn.
    pub fn summary(&self) -> String {
        let cache = match &self.vote {
            Some(vote) if vote.report.cells_after < vote.report.cells_before => {
                format!("{} -> {} cells", count(vote.report.cells_before), count(vote.report.cells_after))
            }
            _ => format!("{} cells", count(self.cache.cells)),
        };
        let speed = self.decode.tokens_per_second.map_or_else(String::new, |r| format!(", {} t/s", short(r)));
        let stop = match self.decode.stop {
            Stop::EndOfGeneration => String::new(),
            stop => format!(", {}", stop_in_words(stop)),
        };
        format!("{cache}, {} tokens{speed}{stop}", count(self.decode.tokens))
    }
}

impl Prefill {
    pub fn new(report: PrefillReport) -> Self {
        Self {
            tokens: report.tokens,
            seconds: report.time.as_secs_f64(),
            tokens_per_second: rate(report.tokens, report.time),
            expanded: report.expanded,
            squeezes: report.squeezes,
        }
    }

    /// Returns labels and lines. `size`: cells of the cache.
    pub fn lines(&self, size: usize) -> Vec<(&'static str, String)> {
        let mut lines = vec![("prompt", in_time(self.tokens, self.seconds, self.tokens_per_second))];
        let ExpandReport { cells_before, cells_after, time } = self.expanded;
        if cells_after > cells_before {
            let [before, after] = [cells_before, cells_after].map(count);
            lines.push((
                "",
                format!("{before} -> {after} cells: set aside before, and back in {:.2} s of it", time.as_secs_f64()),
            ));
        }
        if self.squeezes.count > 0 {
            lines.push(("", squeezed(&self.squeezes, size)));
        }
        lines
    }
}

impl Milestone {
    fn new((tokens, time): (usize, Duration)) -> Self {
        Self { tokens, seconds: time.as_secs_f64() }
    }
}

impl Vote {
    pub fn new(report: CompressReport, prefill: Duration) -> Self {
        let share_of_prefill = report.time().as_secs_f64() / prefill.as_secs_f64();
        Self {
            after_tokens: 0,
            share_kept: report.share(),
            vote_seconds: (report.time() - report.aside_time - report.compact_time).as_secs_f64(),
            aside_seconds: report.aside_time.as_secs_f64(),
            compaction_seconds: report.compact_time.as_secs_f64(),
            share_of_prefill: share_of_prefill.is_finite().then_some(share_of_prefill),
            report,
        }
    }

    /// Whether there was no vote because the policy keeps everything or the cache is small.
    fn was_skipped(&self, policy: &Params) -> bool {
        policy.leaves_alone(self.report.cells_before)
    }

    /// Returns labels and lines.
    pub fn lines(&self, policy: &Params) -> Vec<(&'static str, String)> {
        let mut lines = vec![("cache", self.cells(policy))];
        if !self.was_skipped(policy) {
            lines.push(("vote", self.times()));
        }
        lines
    }

    fn cells(&self, policy: &Params) -> String {
        let r = &self.report;
        let (before, after) = (r.cells_before, r.cells_after);
        let why = why(r, policy);
        if before == after {
            let size = bytes(r.kv_bytes_after, r.kv_bytes_after);
            return format!("{} cells, all kept ({why}), {size} of KV", count(before));
        }
        let unit = r.kv_bytes_before;
        format!(
            "{} -> {} cells ({:.1} % kept, {why}), {} -> {} of KV",
            count(before),
            count(after),
            100.0 * self.share_kept,
            number_of_bytes(r.kv_bytes_before, unit),
            bytes(r.kv_bytes_after, unit),
        )
    }

    fn times(&self) -> String {
        let share = self.share_of_prefill.map_or_else(String::new, |s| format!(" ({:.1} % of the prefill)", 100.0 * s));
        let CompressReport { replay_time, trial_time, aside_time, compact_time, .. } = self.report;
        let vote_time = self.report.time() - replay_time - trial_time - aside_time - compact_time;
        let step = |time: Duration, name: &str| format!("{:.2} s {name}", time.as_secs_f64());
        let steps = [
            (replay_time, "second reading"),
            (vote_time, "vote"),
            (trial_time, "trial"),
            (aside_time, "setting aside"),
        ];
        let steps = steps.into_iter().filter(|(time, _)| time.as_millis() > 0).map(|(time, name)| step(time, name));
        let steps: Vec<String> = steps.chain([step(compact_time, "compaction")]).collect();
        let after = match self.after_tokens {
            0 => String::new(),
            n => format!(", after {} of the answer", plural(n, "token")),
        };
        format!("{}{share}{after}", steps.join(" + "))
    }
}

impl Cache {
    pub fn in_words(&self) -> String {
        let size = self.kv_bytes.map_or_else(String::new, |b| format!(", {} of KV", bytes(b, b)));
        let aside = match self.bytes_aside {
            0 => String::new(),
            aside => {
                let place = match self.aside_in {
                    Some(AsideIn::File) => "in the file of --recall",
                    _ => "in memory",
                };
                format!(", {} set aside {place}", bytes(aside, aside))
            }
        };
        format!("{} of {} cells for {} tokens{size}{aside}", count(self.cells), count(self.size), count(self.tokens))
    }
}

/// Explains why the vote kept this number of cells.
fn why(report: &CompressReport, policy: &Params) -> String {
    let lost =
        report.lost_mass.map_or_else(String::new, |lost| format!(", giving up {:.1} % of the attention", 100.0 * lost));
    let rule = match report.bound {
        Bound::Trial => {
            format!("fewest of {} tried within a KL of {}", report.tried.len(), policy.target_kl.unwrap_or_default())
        }
        Bound::Blind if report.tried.is_empty() => "no question in sight: see --replay".into(),
        Bound::Blind => "the answer needs none of the text, which says nothing about later questions".into(),
        Bound::LostMass => format!("lost-mass rule at {}", policy.lost_mass),
        Bound::Budget => format!("the votes' budget{lost}"),
        Bound::Ratio if report.policy == Kind::AdaKv => "as many as the greediest head takes".into(),
        Bound::Ratio => format!("a share of {:.0} %{lost}", 100.0 * report.share()),
        Bound::MaxCells => format!("cut by --max-cells{lost}"),
        Bound::MinCells => format!("raised by --min-cells{lost}"),
        Bound::Forced => format!("first and last tokens only{lost}"),
        Bound::All if report.policy == Kind::Full => "policy full".into(),
        Bound::All if policy.leaves_alone(report.cells_before) => "too few to be worth a vote".into(),
        Bound::All => "none to spare".into(),
    };
    rule + &unequal(report)
}

/// Describes how many entries the heads would keep if each could have its own number.
fn unequal(report: &CompressReport) -> String {
    report.ragged.map_or_else(String::new, |heads| {
        let [least, most] = [heads.min, heads.max].map(|n| count(n as usize));
        format!("; the heads by themselves {least} to {most}, mean {}", count(heads.mean.round() as usize))
    })
}

fn stop_in_words(stop: Stop) -> &'static str {
    match stop {
        Stop::EndOfGeneration => "end of generation",
        Stop::Limit => "stopped by -n",
        Stop::ContextFull => "the context is full",
        Stop::ReversePrompt => "stopped by -r",
        Stop::Cancelled => "stopped with Ctrl-C",
    }
}

/// Prints one JSON object on stdout.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    Ok(print(&line)?)
}

fn rate(tokens: usize, time: Duration) -> Option<f64> {
    let rate = tokens as f64 / time.as_secs_f64();
    (tokens > 0 && rate.is_finite()).then_some(rate)
}

fn squeezed(squeezes: &Squeezes, size: usize) -> String {
    let lost = squeezes
        .lost_mass
        .map_or_else(String::new, |lost| format!(", each giving up at most {:.1} % of the attention", 100.0 * lost));
    let times = plural(squeezes.count, "time");
    format!("more than {} cells: squeezed {times} in {:.2} s of it{lost}", count(size), squeezes.time.as_secs_f64())
}

fn in_time(tokens: usize, seconds: f64, rate: Option<f64>) -> String {
    let rate = rate.map_or_else(String::new, |r| format!(" ({} t/s)", short(r)));
    format!("{} tokens in {seconds:.2} s{rate}", count(tokens))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_tokens_and_time() {
        assert_eq!(rate(0, Duration::from_secs(1)), None);
        assert_eq!(rate(5, Duration::ZERO), None);
        assert_eq!(rate(10, Duration::from_secs(2)), Some(5.0));
    }
}
