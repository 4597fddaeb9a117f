//! How near an automatic choice of C comes to the fewest cells that would have done.

use serde::Serialize;

use super::stats::{group_by, natural, quantile};
use super::{Config, Place, by_config};
use crate::eval::Adaptivity;

/// One target under one model and cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdaptivityTable {
    #[serde(flatten)]
    pub place: Place,
    /// Mean KL that was to be reached, in nats.
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

/// Cells chosen over cells needed: C / C*.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spending {
    /// Records.
    pub n: usize,
    /// Quartiles of C / C*.
    pub overspend_q1: f64,
    pub overspend_median: f64,
    pub overspend_q3: f64,
    /// Share of the records that failed the target, 0 to 1.
    pub misses: f64,
    /// Median share of the cells kept, 0 to 1.
    pub share_median: f64,
}

/// One request, in cells.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub config: String,
    /// C
    pub cells: usize,
    /// C*
    pub oracle: usize,
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
        let missed = records.iter().filter(|r| r.missed()).count();
        Self {
            n: records.len(),
            overspend_q1: quantile(&overspend, 0.25),
            overspend_median: quantile(&overspend, 0.5),
            overspend_q3: quantile(&overspend, 0.75),
            misses: missed as f64 / records.len() as f64,
            share_median: quantile(&shares, 0.5),
        }
    }
}

impl Choice {
    fn new(record: &Adaptivity) -> Self {
        Self {
            config: record.run.config.clone(),
            cells: record.run.cells,
            oracle: record.oracle_cells,
            missed: record.missed(),
        }
    }
}
