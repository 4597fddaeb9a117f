//! Tables of an ablation.

use super::stats::{group_by, mean};
use super::table::{NOTHING, Table, figures, percent, points, words};
use super::{Ablation, Comparison, Difference, Measure};

/// Returns an overview with all differences of each configuration in a row, then a table for each suite.
pub fn tables(ablation: &Ablation) -> Vec<Table> {
    let by_model = group_by(&ablation.comparisons, |c| c.place.of_model());
    let mut tables: Vec<Table> = by_model.iter().map(|(model, all)| overview(ablation, model, all)).collect();
    tables.extend(ablation.comparisons.iter().map(|c| table(ablation, c)));
    tables
}

fn overview(ablation: &Ablation, model: &str, comparisons: &[&Comparison]) -> Table {
    let mut configs: Vec<&str> = Vec::new();
    for row in comparisons.iter().flat_map(|c| &c.rows) {
        if !configs.contains(&row.config.as_str()) {
            configs.push(&row.config);
        }
    }
    let rows = configs.iter().map(|config| {
        let found: Vec<Option<&Difference>> = comparisons
            .iter()
            .map(|c| c.rows.iter().find(|row| row.config == *config).map(|row| &row.difference))
            .collect();
        let kept = mean(&found.iter().flatten().map(|d| d.share_difference).collect::<Vec<_>>());
        let cells = comparisons.iter().zip(&found).map(|(c, d)| d.map_or(NOTHING.into(), |d| change(c.measure, d)));
        [(*config).to_owned(), points(kept, None)].into_iter().chain(cells).collect()
    });
    let head = words(&["config", "kept"]).into_iter().chain(comparisons.iter().map(|c| name(c))).collect();
    let title = format!("Differences to {}", ablation.baseline);
    Table { title, place: model.to_owned(), rows: rows.collect(), head, is_words: false }
}

fn table(ablation: &Ablation, c: &Comparison) -> Table {
    let [quality, change_of] = match c.measure {
        Measure::Score => ["score %", "score diff"],
        Measure::Kl => ["KL", "KL diff"],
        Measure::Gap => ["|ln C/C*|", "diff"],
    };
    let rows = c.rows.iter().map(|row| {
        let d = &row.difference;
        let value = if c.measure == Measure::Score { percent(d.value) } else { figures(d.value) };
        let kept = [percent(d.share), points(d.share_difference, None)];
        [&[row.config.clone(), d.n.to_string()][..], &kept, &[value, change(c.measure, d)]].concat()
    });
    let head = words(&["config", "n", "kept %", "kept diff", quality, change_of]);
    let title = format!("{}, against {}", name(c), ablation.baseline);
    Table { title, place: c.place.of_model(), head, rows: rows.collect(), is_words: false }
}

fn name(c: &Comparison) -> String {
    let kind = match c.measure {
        Measure::Score => "",
        Measure::Kl => "KL, text of ",
        Measure::Gap => "|ln C/C*|, KL ",
    };
    format!("{kind}{}{}", c.suite, if c.place.blind { ", blind" } else { "" })
}

fn change(measure: Measure, d: &Difference) -> String {
    match (measure, d.standard_error) {
        (Measure::Score, error) => points(d.difference, error),
        (Measure::Kl | Measure::Gap, Some(error)) => format!("{} ± {}", signed(d.difference), figures(error)),
        (Measure::Kl | Measure::Gap, None) => signed(d.difference),
    }
}

fn signed(value: f64) -> String {
    if value > 0.0 { format!("+{}", figures(value)) } else { figures(value) }
}
