//! Formats figures as text in rows and columns, independent of the layout.

use serde::Serialize;

use super::{AdaptivityTable, FidelityTable, Fixed, Place, Report, Score, Spending, TaskTable, changes};

/// A table whose first column names the row.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    pub title: String,
    /// Model and cache type of its records.
    pub place: String,
    /// Column headings.
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
    /// True if the columns after the first hold words instead of numbers.
    pub is_words: bool,
}

/// The subject of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Kind {
    Runs,
    Fidelity,
    Tasks,
    Adaptivity,
    Ablation,
}

/// Tables of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct Section {
    pub kind: Kind,
    pub title: &'static str,
    /// How to read the tables.
    pub lead: &'static str,
    /// Commands, only for the section about runs.
    pub runs: Vec<Commands>,
    pub tables: Vec<Table>,
}

/// Commands and their common description.
#[derive(Debug, Clone, Serialize)]
pub struct Commands {
    pub about: String,
    /// Words of each command.
    pub commands: Vec<Vec<String>>,
}

impl Table {
    fn new(about: &str, place: &Place, head: Vec<String>, rows: Vec<Vec<String>>) -> Self {
        Self { title: format!("{about}, {}", place.sight()), place: place.of_model(), head, rows, is_words: false }
    }

    /// Splits the columns into groups that fit into `width` characters with `gap` between columns. Each group starts
    /// with the first column.
    pub fn split(&self, width: usize, gap: usize) -> Vec<Vec<usize>> {
        let needed = |column: usize| {
            let cells = self.rows.iter().map(|row| &row[column]).chain([&self.head[column]]);
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0) + gap
        };
        let mut groups = vec![vec![0]];
        let mut used = needed(0);
        for column in 1..self.head.len() {
            let last = groups.last_mut().expect("there is a first group");
            if used + needed(column) > width && last.len() > 1 {
                groups.push(vec![0, column]);
                used = needed(0) + needed(column);
            } else {
                last.push(column);
                used += needed(column);
            }
        }
        groups
    }
}

/// Placeholder for a missing figure.
pub const NOTHING: &str = "–";

/// Returns the sections that have records.
pub fn sections(report: &Report) -> Vec<Section> {
    let runs = Section {
        kind: Kind::Runs,
        title: "Runs",
        lead: "The commands that measured all this. An absolute path is given by its last part; {1,2} stands for one command \
               with each.",
        runs: report.runs.iter().map(|r| Commands { about: r.about(), commands: r.commands.clone() }).collect(),
        tables: configurations(report),
    };
    let fidelity = Section {
        kind: Kind::Fidelity,
        title: "Fidelity",
        lead: "How far the next-token distributions of a continuation drift from those of the full cache. KL is in nats \
               per token; ppl ratio is the perplexity over that of the full cache; seed sd is the spread of the mean KL \
               between seeds; kept % of an (exact) configuration is the mean over its heads, which no cache can hold.",
        runs: Vec::new(),
        tables: report.fidelity.iter().map(fidelity).collect(),
    };
    let tasks = Section {
        kind: Kind::Tasks,
        title: "Tasks",
        lead: "Scores in percent ± standard error. Mean is over tasks, its error over samples, with the number of tasks where \
               some are missing; vs full is the mean \
               difference on the samples that both have; kept % of an (exact) configuration is the mean over its heads, \
               which no cache can hold.",
        runs: Vec::new(),
        tables: report.tasks.iter().map(tasks).collect(),
    };
    let adaptivity = Section {
        kind: Kind::Adaptivity,
        title: "Adaptivity",
        lead: "Cells chosen, C, over the fewest that reach the target, C*; C/C* and kept % are medians. A request whose KL is above the target is a \
               miss, whatever it spent. Correlation is Spearman's, of the shares kept and needed: 1 if more is kept where \
               more is needed. Fixed is the best fixed share of the cells in hindsight, in percent, and its median C/C*: the \
               smallest with no more misses than the configuration, and with at most 20 % misses. Adapting pays where C/C* \
               is below that of the fixed share with the same misses.",
        runs: Vec::new(),
        tables: report.adaptivity.iter().flat_map(|table| [adaptivity(table), families(table)]).collect(),
    };
    let ablation = Section {
        kind: Kind::Ablation,
        title: "Ablation",
        lead: "Every configuration against the baseline, on the requests that both have, with the same seeds: the mean \
               difference ± its standard error over the requests. Scores are in percent, and more is better; KL is in nats, \
               |ln C/C*| is how far a choice of cells is from what was needed, on either side, and less is better. A difference of less than two standard errors may be noise. Mind the cells: fewer \
               are kept where kept is below 0.",
        runs: Vec::new(),
        tables: report.ablation.iter().flat_map(changes::tables).collect(),
    };
    [runs, fidelity, tasks, adaptivity, ablation].into_iter().filter(|section| !section.tables.is_empty()).collect()
}

/// Formats a number of tokens: 8192 -> 8k
pub fn tokens(n: usize) -> String {
    if n >= 1024 && n.is_multiple_of(1024) { format!("{}k", n / 1024) } else { n.to_string() }
}

/// Formats a share as percent with one decimal.
pub fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

/// Formats a value with three significant digits.
pub fn figures(value: f64) -> String {
    const DIGITS: i32 = 3;
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let exponent = value.abs().log10().floor() as i32;
    if exponent < -5 {
        return format!("{value:.1e}");
    }
    format!("{value:.*}", (DIGITS - 1 - exponent).max(0) as usize)
}

fn configurations(report: &Report) -> Vec<Table> {
    if report.meanings.is_empty() {
        return Vec::new();
    }
    let settings = |all: &[String]| match all {
        [] => NOTHING.to_owned(),
        [one] => one.clone(),
        several => format!("differs between runs: {}", several.join("; ")),
    };
    let rows = report.meanings.iter().map(|m| vec![m.config.clone(), settings(&m.settings)]).collect();
    let title = "Configurations".into();
    vec![Table { title, place: String::new(), head: words(&["config", "settings"]), rows, is_words: true }]
}

fn fidelity(table: &FidelityTable) -> Table {
    let head = ["config", "n", "kept %", "KL", "median", "p90", "ppl ratio", "same top %", "seed sd"];
    let rows = table.rows.iter().map(|r| {
        vec![
            r.config.clone(),
            r.n.to_string(),
            percent(r.share),
            figures(r.kl_mean),
            figures(r.kl_median),
            figures(r.kl_p90),
            format!("{:.4}", r.perplexity_ratio),
            percent(r.same_top),
            r.seed_spread.map_or(NOTHING.into(), figures),
        ]
    });
    let about = format!("Prompts of about {} tokens", tokens(table.tokens));
    Table::new(&about, &table.place, words(&head), rows.collect())
}

fn tasks(table: &TaskTable) -> Table {
    let mut head = words(&["config", "n", "kept %", "mean", "vs full"]);
    // The mean of a suite with one task equals that task's score.
    let tasks = if table.tasks.len() > 1 { &table.tasks[..] } else { &[] };
    head.extend(tasks.iter().cloned());
    let rows = table.rows.iter().map(|r| {
        let difference = r.difference.map(|d| points(d.mean, d.standard_error));
        let mut row = vec![r.config.clone(), r.n.to_string(), percent(r.share)];
        row.push(with_error(r.mean, r.standard_error) + &unequal(r.scores.iter().flatten().count(), r.scores.len()));
        row.push(difference.unwrap_or(NOTHING.into()));
        row.extend(
            r.scores[..tasks.len()]
                .iter()
                .map(|s| s.map_or(NOTHING.into(), |s: Score| with_error(s.mean, s.standard_error))),
        );
        row
    });
    Table::new(&table.suite, &table.place, head, rows.collect())
}

fn adaptivity(table: &AdaptivityTable) -> Table {
    let rows = table.rows.iter().map(|r| [vec![r.config.clone()], spending(&r.spending)].concat());
    Table::new(&at_most(table), &table.place, spending_head("config"), rows.collect())
}

fn families(table: &AdaptivityTable) -> Table {
    let families = table.rows.iter().flat_map(|r| r.families.iter().map(|f| (&r.config, f)));
    let rows = families.map(|(config, f)| [vec![format!("{config}, {}", f.family)], spending(&f.spending)].concat());
    Table::new(&format!("{}, by family", at_most(table)), &table.place, spending_head("config, family"), rows.collect())
}

/// Formats a target as given if that is short.
pub fn target(kl: f64) -> String {
    const SHORT: usize = 6;
    Some(kl.to_string()).filter(|text| text.len() <= SHORT).unwrap_or_else(|| figures(kl))
}

fn at_most(table: &AdaptivityTable) -> String {
    format!("Mean KL at most {}", target(table.target))
}

fn spending_head(first: &str) -> Vec<String> {
    words(&[
        first,
        "n",
        "C/C*",
        "quartiles",
        "misses %",
        "kept %",
        "correlation",
        "fixed, same misses",
        "fixed, few misses",
    ])
}

fn spending(s: &Spending) -> Vec<String> {
    let fixed = |f: &Fixed| format!("{}: {:.2}", percent(f.ratio), f.overspend_median);
    vec![
        s.n.to_string(),
        format!("{:.2}", s.overspend_median),
        format!("{:.2} to {:.2}", s.overspend_q1, s.overspend_q3),
        percent(s.misses),
        percent(s.share_median),
        s.rank_correlation.map_or(NOTHING.into(), |r| format!("{r:.2}")),
        fixed(&s.fixed_same_misses),
        fixed(&s.fixed_few_misses),
    ]
}

/// Formats a difference of scores in percent.
pub fn points(difference: f64, error: Option<f64>) -> String {
    let error = error.map_or(String::new(), |e| format!(" ± {}", percent(e)));
    format!("{:+.1}{error}", 100.0 * difference)
}

fn with_error(score: f64, error: Option<f64>) -> String {
    error.map_or_else(|| percent(score), |error| format!("{} ± {}", percent(score), percent(error)))
}

/// Marks a mean over fewer tasks than others have, which must not be compared with theirs.
fn unequal(found: usize, all: usize) -> String {
    if found == all { String::new() } else { format!(" ({found}/{all})") }
}

pub fn words(head: &[&str]) -> Vec<String> {
    head.iter().map(|&word| word.to_owned()).collect()
}
