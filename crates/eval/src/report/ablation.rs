//! Ablation: compares every configuration with a baseline, on the same requests with the same seeds.

use serde::Serialize;

use super::fidelity::length;
use super::stats::{group_by, mean, natural, standard_error};
use super::table::{target, tokens};
use super::{Config, Place, by_config};
use crate::{Record, Run};
use gvote::policy::Kind;

/// All measurements that a configuration shares with the baseline.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ablation {
    /// Name of the configuration that the others are compared with.
    pub baseline: String,
    pub comparisons: Vec<Comparison>,
}

/// The compared quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Score of a task, 0 to 1: higher is better.
    Score,
    /// Mean KL in nats: lower is better.
    Kl,
    /// |ln C/C*|: the distance of the chosen cells from those needed, in either direction: lower is better.
    Gap,
}

/// One suite, texts of similar length, or one target, with one model and cache type.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    #[serde(flatten)]
    pub place: Place,
    pub measure: Measure,
    /// The suite, such as `ruler/4096`; `4k` for texts, `0.02` for a target.
    pub suite: String,
    pub rows: Vec<ComparisonRow>,
}

/// Differences of one configuration. The seeds of a request are averaged first, because they share its text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Difference {
    /// Number of requests that both have.
    pub n: usize,
    /// Mean share of the cells kept, and its difference from the baseline.
    pub share: f64,
    pub share_difference: f64,
    /// Mean value, and its difference from the baseline, with the standard error of the difference over the requests.
    pub value: f64,
    pub difference: f64,
    pub standard_error: Option<f64>,
}

/// A configuration and its difference from the baseline.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComparisonRow {
    pub config: String,
    #[serde(flatten)]
    pub difference: Difference,
}

/// One measurement.
struct Point<'a> {
    suite: String,
    measure: Measure,
    run: &'a Run,
    /// Task, item and depth in percent.
    request: (&'a str, &'a str, Option<u32>),
    value: f64,
}

impl Ablation {
    pub(super) fn new(records: &[Record], configs: &[Config], baseline: &str) -> Self {
        let points = records.iter().filter_map(Point::of);
        let mut groups = group_by(points, |p| (Place::of(p.run), p.measure, p.suite.clone()));
        groups.sort_by(|((a, m, s), _), ((b, n, t), _)| {
            let key = |p: &Place| (p.model.clone(), p.cache_type.clone());
            key(a).cmp(&key(b)).then(m.cmp(n)).then_with(|| natural(s).cmp(&natural(t))).then(a.blind.cmp(&b.blind))
        });
        let rows = |points: &[Point]| {
            let groups = by_config(points.iter().collect(), configs, |p| p.run);
            let (base, others): (Vec<_>, Vec<_>) = groups.into_iter().partition(|(config, _)| config == baseline);
            let base: Vec<&Point> = base.into_iter().flat_map(|(_, points)| points).collect();
            let row = |(config, points): (String, Vec<&Point>)| {
                Some(ComparisonRow { config, difference: Difference::new(&points, &base)? })
            };
            others.into_iter().filter_map(row).collect()
        };
        let groups = groups.into_iter();
        let comparisons =
            groups.map(|((place, measure, suite), group)| Comparison { place, measure, suite, rows: rows(&group) });
        let comparisons = comparisons.filter(|c| !c.rows.is_empty()).collect();
        Self { baseline: baseline.to_owned(), comparisons }
    }
}

impl<'a> Point<'a> {
    fn of(record: &'a Record) -> Option<Self> {
        let percent = |depth: f64| (100.0 * depth).round() as u32;
        match record {
            Record::Task(r) => Some(Self {
                suite: r.suite.clone(),
                measure: Measure::Score,
                run: &r.run,
                request: (&r.task, &r.run.item, r.depth.map(percent)),
                value: r.score,
            }),
            Record::Fidelity(r) => Some(Self {
                suite: tokens(length(r.run.tokens)),
                measure: Measure::Kl,
                run: &r.run,
                request: ("", &r.run.item, None),
                value: r.kl_mean,
            }),
            Record::Adaptivity(r) => Some(Self {
                suite: target(r.target),
                measure: Measure::Gap,
                run: &r.run,
                request: ("", &r.run.item, None),
                value: r.overspend().ln().abs(),
            }),
            Record::Start(_) => None,
        }
    }

    /// Returns true for the same request with the same seed; the full cache does not depend on the seed.
    fn pairs_with(&self, other: &Self) -> bool {
        let any_seed = [self, other].iter().any(|p| p.run.policy == Kind::Full);
        self.request == other.request && (any_seed || self.run.seed == other.run.seed)
    }
}

impl Difference {
    fn new(points: &[&Point], base: &[&Point]) -> Option<Self> {
        let pairs = points.iter().flat_map(|p| base.iter().filter(|b| p.pairs_with(b)).map(move |b| (p, b)));
        let requests: Vec<[f64; 4]> = group_by(pairs, |(p, _)| p.request)
            .into_iter()
            .map(|(_, pairs)| {
                let over = |value: &dyn Fn(&Point, &Point) -> f64| {
                    mean(&pairs.iter().map(|(p, b)| value(p, b)).collect::<Vec<_>>())
                };
                [
                    over(&|p, _| p.run.share()),
                    over(&|p, b| p.run.share() - b.run.share()),
                    over(&|p, _| p.value),
                    over(&|p, b| p.value - b.value),
                ]
            })
            .collect();
        let column = |i: usize| requests.iter().map(|figures| figures[i]).collect::<Vec<_>>();
        (!requests.is_empty()).then(|| Self {
            n: requests.len(),
            share: mean(&column(0)),
            share_difference: mean(&column(1)),
            value: mean(&column(2)),
            difference: mean(&column(3)),
            standard_error: standard_error(&column(3)),
        })
    }
}
