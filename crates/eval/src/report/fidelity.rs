//! Distance from the full cache, by configuration.

use serde::Serialize;

use super::stats::{deviation, group_by, mean};
use super::{Config, Place, by_config};
use crate::Fidelity;

/// Prompts of similar length with one model and cache type.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FidelityTable {
    #[serde(flatten)]
    pub place: Place,
    /// Length of the prompts in tokens, rounded to the nearest power of two.
    pub tokens: usize,
    pub rows: Vec<FidelityRow>,
}

/// One configuration. KL is in nats; means are over the records.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FidelityRow {
    pub config: String,
    /// Number of records.
    pub n: usize,
    /// Mean share of the cells kept, 0 to 1.
    pub share: f64,
    pub kl_mean: f64,
    /// Mean of the records' medians.
    pub kl_median: f64,
    /// Mean of the records' 90th percentiles.
    pub kl_p90: f64,
    /// Perplexity divided by that of the full cache: exp of the mean logarithm of the ratio.
    pub perplexity_ratio: f64,
    /// Mean share of the steps with the same most likely token, 0 to 1.
    pub same_top: f64,
    /// Standard deviation of the seeds' mean KL; None with one seed.
    pub seed_spread: Option<f64>,
}

impl FidelityTable {
    pub(super) fn all(records: &[&Fidelity], configs: &[Config]) -> Vec<Self> {
        let groups = group_by(records.iter().copied(), |r| (Place::of(&r.run), length(r.run.tokens)));
        let mut tables: Vec<Self> = groups
            .into_iter()
            .map(|((place, tokens), group)| {
                let rows = by_config(group, configs, |r| &r.run);
                let rows = rows.into_iter().map(|(config, group)| FidelityRow::new(config, &group)).collect();
                Self { place, tokens, rows }
            })
            .collect();
        tables.sort_by(|a, b| a.place.cmp(&b.place).then(a.tokens.cmp(&b.tokens)));
        tables
    }
}

impl FidelityRow {
    fn new(config: String, records: &[&Fidelity]) -> Self {
        let over = |value: fn(&Fidelity) -> f64| mean(&records.iter().map(|r| value(r)).collect::<Vec<_>>());
        let seeds = group_by(records, |r| r.run.seed);
        let of_seed = |group: &[&&Fidelity]| mean(&group.iter().map(|r| r.kl_mean).collect::<Vec<_>>());
        let seeds: Vec<f64> = seeds.iter().map(|(_, group)| of_seed(group)).collect();
        Self {
            config,
            n: records.len(),
            share: over(|r| r.run.share()),
            kl_mean: over(|r| r.kl_mean),
            kl_median: over(|r| r.kl_median),
            kl_p90: over(|r| r.kl_p90),
            perplexity_ratio: over(|r| r.log_perplexity_ratio).exp(),
            same_top: over(|r| r.same_top),
            seed_spread: deviation(&seeds),
        }
    }
}

/// Returns the power of two nearest to a number of tokens, by ratio.
pub(super) fn length(tokens: usize) -> usize {
    1 << (tokens.max(1) as f64).log2().round() as u32
}
