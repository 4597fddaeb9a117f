//! Scores on tasks, by configuration.

use serde::Serialize;

use super::stats::{group_by, mean, natural, standard_error};
use super::{Config, FULL, Place, by_config};
use crate::TaskScore;

/// One suite with one model and cache type. Scores are 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskTable {
    #[serde(flatten)]
    pub place: Place,
    pub suite: String,
    pub tasks: Vec<String>,
    pub rows: Vec<TaskRow>,
    /// Scores by the needle's position, for suites with a grid of positions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub needle: Option<Needle>,
}

/// One configuration. A sample is an item; several seeds of an item are averaged first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskRow {
    pub config: String,
    /// Number of samples of all tasks.
    pub n: usize,
    /// Mean share of the cells kept, 0 to 1.
    pub share: f64,
    /// Mean over the tasks, with equal weights.
    pub mean: f64,
    /// Standard error of the mean over all samples.
    pub standard_error: Option<f64>,
    /// Difference from the full cache; None for the full cache itself, and without common samples.
    pub difference: Option<Score>,
    /// Scores in the order of [`TaskTable::tasks`]; None for tasks without samples.
    pub scores: Vec<Option<Score>>,
}

/// A mean over samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Score {
    /// Number of samples.
    pub n: usize,
    /// Mean share of the cells kept, 0 to 1.
    pub share: f64,
    pub mean: f64,
    pub standard_error: Option<f64>,
}

/// Scores by the position of the needle: `maps[config][depth][length]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Needle {
    /// Tasks, which are lengths of the context.
    pub lengths: Vec<String>,
    /// Depths in percent of the context, ascending.
    pub depths: Vec<u32>,
    pub maps: Vec<NeedleMap>,
}

/// Scores of one configuration: `scores[depth][length]`, None without samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NeedleMap {
    pub config: String,
    pub scores: Vec<Vec<Option<f64>>>,
}

/// Mean over the seeds of one item.
struct Sample<'a> {
    task: &'a str,
    item: &'a str,
    depth: Option<u32>,
    score: f64,
    share: f64,
}

impl TaskTable {
    pub(super) fn all(records: &[&TaskScore], configs: &[Config]) -> Vec<Self> {
        let groups = group_by(records.iter().copied(), |r| (Place::of(&r.run), r.suite.as_str()));
        let mut tables: Vec<Self> =
            groups.into_iter().map(|((place, suite), group)| Self::new(place, suite, group, configs)).collect();
        tables.sort_by(|a, b| {
            let key = |t: &Self| (t.place.model.clone(), t.place.cache_type.clone());
            let order = key(a).cmp(&key(b)).then_with(|| natural(&a.suite).cmp(&natural(&b.suite)));
            order.then(a.place.blind.cmp(&b.place.blind))
        });
        tables
    }

    fn new(place: Place, suite: &str, records: Vec<&TaskScore>, configs: &[Config]) -> Self {
        let mut tasks: Vec<&str> = records.iter().map(|r| r.task.as_str()).collect();
        tasks.sort_by_key(|task| natural(task));
        tasks.dedup();
        let by_config: Vec<(String, Vec<Sample>)> = by_config(records, configs, |r| &r.run)
            .into_iter()
            .map(|(config, group)| (config, samples(group)))
            .collect();
        let full = by_config.iter().find(|(config, _)| config == FULL).map_or(&[][..], |(_, samples)| samples);
        let rows = by_config.iter().map(|(config, samples)| TaskRow::new(config, samples, &tasks, full)).collect();
        let needle = Needle::new(&by_config, &tasks);
        let tasks = tasks.into_iter().map(str::to_owned).collect();
        Self { place, suite: suite.to_owned(), tasks, rows, needle }
    }
}

impl TaskRow {
    fn new(config: &str, samples: &[Sample], tasks: &[&str], full: &[Sample]) -> Self {
        let scores: Vec<_> =
            tasks.iter().map(|task| Score::new(samples.iter().filter(|s| s.task == *task), |s| s.score)).collect();
        let means: Vec<f64> = scores.iter().flatten().map(|score| score.mean).collect();
        let all = Score::new(samples, |s| s.score);
        let pairs = samples.iter().filter_map(|s| full.iter().find(|f| f.is_same_item(s)).map(|f| (s, f)));
        let differences: Vec<Sample> = pairs.map(|(s, f)| Sample { score: s.score - f.score, ..*s }).collect();
        Self {
            config: config.to_owned(),
            n: samples.len(),
            share: mean(&samples.iter().map(|s| s.share).collect::<Vec<_>>()),
            mean: mean(&means),
            standard_error: all.and_then(|score| score.standard_error),
            difference: Score::new(&differences, |s| s.score).filter(|_| config != FULL),
            scores,
        }
    }
}

impl Score {
    fn new<'a, 'b: 'a>(samples: impl IntoIterator<Item = &'a Sample<'b>>, value: fn(&Sample) -> f64) -> Option<Self> {
        let (scores, shares): (Vec<f64>, Vec<f64>) = samples.into_iter().map(|s| (value(s), s.share)).unzip();
        (!scores.is_empty()).then(|| Self {
            n: scores.len(),
            share: mean(&shares),
            mean: mean(&scores),
            standard_error: standard_error(&scores),
        })
    }
}

impl Sample<'_> {
    fn is_same_item(&self, other: &Self) -> bool {
        (self.task, self.item, self.depth) == (other.task, other.item, other.depth)
    }
}

/// Maximum number of depths in a grid. More are no grid: every sample of RULER has a depth of its own.
const MOST_DEPTHS: usize = 11;

impl Needle {
    fn new(by_config: &[(String, Vec<Sample>)], tasks: &[&str]) -> Option<Self> {
        let with_depth = || by_config.iter().flat_map(|(_, samples)| samples).filter(|s| s.depth.is_some());
        let mut depths: Vec<u32> = with_depth().filter_map(|s| s.depth).collect();
        depths.sort_unstable();
        depths.dedup();
        let lengths: Vec<&str> = tasks.iter().copied().filter(|task| with_depth().any(|s| s.task == *task)).collect();
        let score = |samples: &[Sample], depth: u32, length: &str| {
            let here = samples.iter().filter(|s| s.depth == Some(depth) && s.task == length);
            Score::new(here, |s| s.score).map(|score| score.mean)
        };
        let row = |samples: &[Sample], depth| lengths.iter().map(|length| score(samples, depth, length)).collect();
        let map = |(config, samples): &(String, Vec<Sample>)| NeedleMap {
            config: config.clone(),
            scores: depths.iter().map(|depth| row(samples, *depth)).collect(),
        };
        let maps = by_config.iter().map(map).filter(|map| map.scores.iter().flatten().any(Option::is_some)).collect();
        let lengths = lengths.iter().map(|length| (*length).to_owned()).collect();
        (1..=MOST_DEPTHS).contains(&depths.len()).then_some(Self { lengths, depths, maps })
    }
}

/// Averages the seeds of each item in the records of one configuration.
fn samples(records: Vec<&TaskScore>) -> Vec<Sample<'_>> {
    let percent = |depth: f64| (100.0 * depth).round() as u32;
    let items = group_by(records, |r| (r.task.as_str(), r.run.item.as_str(), r.depth.map(percent)));
    let sample = |((task, item, depth), seeds): (_, Vec<&TaskScore>)| Sample {
        task,
        item,
        depth,
        score: mean(&seeds.iter().map(|r| r.score).collect::<Vec<_>>()),
        share: mean(&seeds.iter().map(|r| r.run.share()).collect::<Vec<_>>()),
    };
    items.into_iter().map(sample).collect()
}
