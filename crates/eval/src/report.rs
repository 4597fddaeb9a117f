//! Tables and plots of a run, aggregated from [`Record`]s.
//!
//! Records that differ in model, cache type, or in whether the question was known are never averaged. Shares and scores
//! are 0 to 1 in the data, JSON and CSV, and percent in tables and plots.
//!
//! # Modules
//! [`fidelity`](FidelityTable), [`tasks`](TaskTable), [`adaptivity`](AdaptivityTable) and [`ablation`](Ablation)
//! aggregate the records; [`runs`](Runs) describes their provenance. `table` formats each as text cells, which `text`,
//! `markdown` and `html` lay out; `plot` draws the plots; `csv` lists every figure once.

mod ablation;
mod adaptivity;
mod changes;
mod csv;
mod fidelity;
mod html;
mod markdown;
mod plot;
mod runs;
mod stats;
mod table;
mod tasks;
#[cfg(test)]
mod tests;
mod text;

use std::io;

use serde::Serialize;

use super::{Record, Run};
use gvote::policy::Kind;

pub use ablation::{Ablation, Comparison, ComparisonRow, Difference, Measure};
pub use adaptivity::{AdaptivityRow, AdaptivityTable, Choice, FEW_MISSES, FamilyRow, Fixed, Spending};
pub use fidelity::{FidelityRow, FidelityTable};
pub use runs::{Meaning, Runs};
pub use tasks::{Needle, NeedleMap, Score, TaskRow, TaskTable};

/// Name of the reference configuration.
pub const FULL: &str = "full";

/// Aggregates of a set of records.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Number of measurements.
    pub records: usize,
    /// Provenance of the records, as far as known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<Runs>,
    /// Settings of the configurations; empty if no run is known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub meanings: Vec<Meaning>,
    /// [`FULL`] first, the others in the order of the records.
    pub configs: Vec<Config>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fidelity: Vec<FidelityTable>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskTable>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adaptivity: Vec<AdaptivityTable>,
    /// Comparison with a baseline, if one was named: see [`Self::compare_with`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ablation: Option<Ablation>,
}

/// A configuration and the policy of its first record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    pub name: String,
    pub policy: Kind,
    /// Unequal budgets behind a mask: the number of cells is a mean that no cache can hold.
    pub exact: bool,
}

/// Properties that records must share to be compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Place {
    /// File name of the model.
    pub model: String,
    /// Type of the K and V cache.
    pub cache_type: String,
    /// The context was compressed before the question was known.
    pub blind: bool,
}

impl Report {
    /// Aggregates the records.
    pub fn new(records: &[Record]) -> Self {
        let mut configs: Vec<Config> = Vec::new();
        let (mut starts, mut fidelity, mut tasks, mut adaptivity) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for record in records {
            match record {
                Record::Start(r) => starts.push(r),
                Record::Fidelity(r) => fidelity.push(r),
                Record::Task(r) => tasks.push(r),
                Record::Adaptivity(r) => adaptivity.push(r),
            }
            let Some(run) = record.run() else { continue };
            let name = run.label();
            if !configs.iter().any(|config| config.name == name) {
                configs.push(Config { name, policy: run.policy, exact: run.exact });
            }
        }
        configs.sort_by_key(|config| config.name != FULL);
        let named = stats::group_by(records.iter().filter_map(Record::run), |run| run.config.as_str());
        let named: Vec<&str> = named.into_iter().map(|(name, _)| name).collect();
        Self {
            records: records.len() - starts.len(),
            runs: Runs::all(&starts),
            meanings: Meaning::all(&starts, &named),
            fidelity: FidelityTable::all(&fidelity, &configs),
            tasks: TaskTable::all(&tasks, &configs),
            adaptivity: AdaptivityTable::all(&adaptivity, &configs),
            ablation: None,
            configs,
        }
    }

    /// Adds the differences of every other configuration from a named baseline, paired by request and seed. `records`:
    /// those of the report.
    #[must_use]
    pub fn compare_with(self, baseline: &str, records: &[Record]) -> Self {
        Self { ablation: Some(Ablation::new(records, &self.configs, baseline)), ..self }
    }

    /// Renders tables for a terminal.
    pub fn to_text(&self) -> String {
        text::render(self)
    }

    /// Renders a Markdown document. `notes`: Markdown to put first; `made_by`: the words of the command that generates
    /// the document.
    pub fn to_markdown(&self, title: &str, notes: &str, made_by: &[String]) -> String {
        markdown::render(self, title, notes, made_by)
    }

    /// Returns the aggregates as indented JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report has string keys only")
    }

    /// Renders one HTML page without external resources.
    pub fn to_html(&self) -> String {
        html::render(self)
    }

    /// Writes one long table with one figure in each line.
    ///
    /// The columns are `section,model,cache_type,suite,blind,config,task_or_metric,n,share,value,spread`. `suite` is the
    /// length of the prompts for fidelity, and `TARGET/all` or `TARGET/FAMILY` for adaptivity. `spread` is the standard
    /// deviation between seeds for fidelity and the standard error for tasks and ablation.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_csv(&self, to: impl io::Write) -> io::Result<()> {
        csv::write(self, to)
    }
}

impl Place {
    fn of(run: &Run) -> Self {
        Self { model: run.model.clone(), cache_type: run.cache_type.clone(), blind: run.blind }
    }

    fn sight(&self) -> &'static str {
        if self.blind { "blind" } else { "question in sight" }
    }

    fn of_model(&self) -> String {
        format!("{}, {} cache", self.model, self.cache_type)
    }
}

/// Splits records by configuration, in the order of `configs`.
fn by_config<'a, T>(records: Vec<&'a T>, configs: &[Config], run: fn(&T) -> &Run) -> Vec<(String, Vec<&'a T>)> {
    let rank = |name: &str| configs.iter().position(|config| config.name == name);
    let mut groups = stats::group_by(records, |r| run(r).label());
    groups.sort_by_key(|(name, _)| rank(name));
    groups
}
