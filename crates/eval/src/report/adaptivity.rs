//! Compares an automatic choice of C with the fewest cells that reach the target.

use serde::Serialize;

use super::stats::{group_by, natural, quantile, rank_correlation};
use super::{Config, Place, by_config};
use crate::Adaptivity;

/// One target with one model and cache type.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdaptivityTable {
    #[serde(flatten)]
    pub place: Place,
    /// Target for the mean KL, in nats.
    pub target: f64,
    pub rows: Vec<AdaptivityRow>,
    /// Every record.
    #[serde(skip)]
    pub points: Vec<Choice>,
}

/// One configuration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdaptivityRow {
    pub config: String,
    #[serde(flatten)]
    pub spending: Spending,
    pub families: Vec<FamilyRow>,
}

/// One kind of request.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FamilyRow {
    pub family: String,
    #[serde(flatten)]
    pub spending: Spending,
}

/// Cells chosen, divided by cells needed: C / C*.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spending {
    /// Number of records.
    pub n: usize,
    /// Quartiles of C / C*.
    pub overspend_q1: f64,
    pub overspend_median: f64,
    pub overspend_q3: f64,
    /// Share of the records that failed the target, 0 to 1.
    pub misses: f64,
    /// Median share of the cells kept, 0 to 1.
    pub share_median: f64,
    /// Spearman's correlation between the shares C/n and C*/n in whole percent, so that single cells do not change
    /// ranks. None if either is the same for all records.
    pub rank_correlation: Option<f64>,
    /// The smallest fixed ratio that misses no more requests than the policy.
    pub fixed_same_misses: Fixed,
    /// The smallest fixed ratio that misses at most [`FEW_MISSES`] of the requests.
    pub fixed_few_misses: Fixed,
}

/// Share of requests that a fixed ratio may miss if it is safe enough to choose: one in this many, 20 %.
pub const FEW_MISSES: usize = 5;

/// The best fixed share of the cells in hindsight: the same for every request, with the configuration's own ranking.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Fixed {
    /// Share of the cells, 0 to 1.
    pub ratio: f64,
    pub overspend_median: f64,
    /// Share of the requests that need more cells, 0 to 1.
    pub misses: f64,
}

/// One request, with shares of its cells.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub config: String,
    /// C/n
    pub share: f64,
    /// C*/n
    pub oracle: f64,
    pub missed: bool,
}

impl AdaptivityTable {
    pub(super) fn all(records: &[&Adaptivity], configs: &[Config]) -> Vec<Self> {
        let groups = group_by(records.iter().copied(), |r| (Place::of(&r.run), r.target));
        let mut tables: Vec<Self> =
            groups.into_iter().map(|((place, target), group)| Self::new(place, target, group, configs)).collect();
        tables.sort_by(|a, b| a.place.cmp(&b.place).then(a.target.total_cmp(&b.target)));
        tables
    }

    fn new(place: Place, target: f64, records: Vec<&Adaptivity>, configs: &[Config]) -> Self {
        let points = records.iter().map(|r| Choice::new(r)).collect();
        let rows = by_config(records, configs, |r| &r.run);
        let rows = rows.into_iter().map(|(config, group)| AdaptivityRow::new(config, &group)).collect();
        Self { place, target, rows, points }
    }
}

impl AdaptivityRow {
    fn new(config: String, records: &[&Adaptivity]) -> Self {
        let mut families = group_by(records.iter().copied(), |r| r.family.as_str());
        families.sort_by_key(|(family, _)| natural(family));
        let row = |(family, group): (&str, Vec<_>)| FamilyRow { family: family.into(), spending: Spending::of(&group) };
        Self { config, spending: Spending::of(records), families: families.into_iter().map(row).collect() }
    }
}

impl Spending {
    fn of(records: &[&Adaptivity]) -> Self {
        let overspend: Vec<f64> = records.iter().map(|r| r.overspend()).collect();
        let shares: Vec<f64> = records.iter().map(|r| r.run.share()).collect();
        let needed: Vec<f64> = records.iter().map(|r| r.oracle_share()).collect();
        let missed = records.iter().filter(|r| r.missed()).count();
        let percents = |shares: &[f64]| shares.iter().map(|share| (100.0 * share).round()).collect::<Vec<_>>();
        Self {
            n: records.len(),
            overspend_q1: quantile(&overspend, 0.25),
            overspend_median: quantile(&overspend, 0.5),
            overspend_q3: quantile(&overspend, 0.75),
            misses: missed as f64 / records.len() as f64,
            share_median: quantile(&shares, 0.5),
            rank_correlation: rank_correlation(&percents(&shares), &percents(&needed)),
            fixed_same_misses: Fixed::best(&needed, missed),
            fixed_few_misses: Fixed::best(&needed, records.len() / FEW_MISSES),
        }
    }
}

impl Fixed {
    /// Returns the smallest ratio that is below C*/n for at most `misses` requests.
    fn best(needed: &[f64], misses: usize) -> Self {
        let mut sorted = needed.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let ratio = sorted[sorted.len().saturating_sub(1 + misses)];
        let overspend: Vec<f64> = sorted.iter().map(|needed| ratio / needed).collect();
        let missed = sorted.iter().filter(|needed| **needed > ratio).count();
        Self { ratio, overspend_median: quantile(&overspend, 0.5), misses: missed as f64 / sorted.len() as f64 }
    }
}

impl Choice {
    fn new(record: &Adaptivity) -> Self {
        Self {
            config: record.run.label(),
            share: record.run.share(),
            oracle: record.oracle_share(),
            missed: record.missed(),
        }
    }
}
