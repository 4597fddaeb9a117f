//! Renders a report as one HTML page.

use std::collections::BTreeSet;

use minijinja::context;
use minijinja::value::Serde;
use serde::Serialize;

use super::plot::{Palette, Panel, bars, heat, pareto, scatter};
use super::table::{Kind, Section, sections};
use super::{FULL, FidelityTable, Report, TaskTable};
use crate::page;
use crate::plot::Key;

const PAGE: &str = include_str!("page.html");

const FIDELITY: &str = "Lower and further left is better: less drift from the full cache with fewer cells. On a linear axis \
                        the full cache is the dashed line at 0; on a logarithmic one it lies below the plot. A bar is the \
                        spread between seeds.";
const TASKS: &str = "Higher and further left is better: look for the leftmost point that still touches the dashed line of \
                     the full cache. A bar is one standard error.";
const BARS: &str = "Look for tasks where a bar falls short of the full cache by more than the thin lines, one standard error \
                    to each side. A task without a bar was not run.";
const MAPS: &str = "Scores in percent. Look for dark fields: lengths and depths at which the needle was thrown away.";
const SCATTER: &str = "A point on the dashed line spent exactly what was needed, one above it too much. A method that adapts \
                       follows the line; a fixed budget lies flat. Hollow points failed the target.";

/// A section with its plots.
#[derive(Serialize)]
struct Part {
    #[serde(flatten)]
    section: Section,
    figures: Vec<Figure>,
}

/// Plots of one kind.
#[derive(Serialize)]
struct Figure {
    /// Explanation of how to read the plots.
    caption: &'static str,
    keys: Vec<Key>,
    panels: Vec<Panel>,
    /// True for heat maps, in which the colour is the score.
    is_map: bool,
}

pub fn render(report: &Report) -> String {
    let mut parts: Vec<Part> =
        sections(report).into_iter().map(|section| Part { figures: figures(report, section.kind), section }).collect();
    // On a page, plots come before the runs.
    parts.sort_by_key(|part| part.section.kind == Kind::Runs);
    let models: BTreeSet<&str> = models(report).collect();
    let models = models.into_iter().collect::<Vec<_>>().join(", ");
    let context = context! { parts => Serde(parts), records => report.records, models => models, ramp => heat::ramp() };
    page::render(PAGE, &[], context)
}

fn models(report: &Report) -> impl Iterator<Item = &str> {
    let fidelity = report.fidelity.iter().map(|t| &t.place);
    let tasks = report.tasks.iter().map(|t| &t.place);
    let adaptivity = report.adaptivity.iter().map(|t| &t.place);
    fidelity.chain(tasks).chain(adaptivity).map(|place| place.model.as_str())
}

fn figures(report: &Report, kind: Kind) -> Vec<Figure> {
    let palette = Palette(&report.configs);
    let figures = match kind {
        Kind::Runs | Kind::Ablation => Vec::new(),
        Kind::Fidelity => fidelity(report, palette),
        Kind::Tasks => tasks(report, palette),
        Kind::Adaptivity => adaptivity(report, palette),
    };
    figures.into_iter().filter(|figure| !figure.panels.is_empty()).collect()
}

fn fidelity(report: &Report, palette: Palette) -> Vec<Figure> {
    let shown = report.fidelity.iter().flat_map(|t| &t.rows).map(|r| r.config.as_str());
    let keys = pareto::keys(shown.chain([FULL]), palette);
    let has_points = |t: &&FidelityTable| t.rows.iter().any(|r| r.config != FULL);
    let panels = report.fidelity.iter().filter(has_points).map(|t| pareto::fidelity(t, palette)).collect();
    vec![Figure { caption: FIDELITY, keys, panels, is_map: false }]
}

fn tasks(report: &Report, palette: Palette) -> Vec<Figure> {
    let shown = || report.tasks.iter().flat_map(|t| &t.rows).map(|r| r.config.as_str());
    let has_points = |t: &&TaskTable| t.rows.iter().any(|r| r.config != FULL);
    let quality = report.tasks.iter().filter(has_points).map(|t| pareto::tasks(t, palette)).collect();
    let bars = report.tasks.iter().map(|t| bars::panel(t, palette)).collect();
    let maps = heat::panels(&report.tasks, palette);
    vec![
        Figure { caption: TASKS, keys: pareto::keys(shown(), palette), panels: quality, is_map: false },
        Figure { caption: BARS, keys: bars::keys(shown(), palette), panels: bars, is_map: false },
        Figure { caption: MAPS, keys: Vec::new(), panels: maps, is_map: true },
    ]
}

fn adaptivity(report: &Report, palette: Palette) -> Vec<Figure> {
    let shown = report.adaptivity.iter().flat_map(|t| &t.rows).map(|r| r.config.as_str());
    let panels = report.adaptivity.iter().map(|t| scatter::panel(t, palette)).collect();
    vec![Figure { caption: SCATTER, keys: scatter::keys(shown, palette), panels, is_map: false }]
}
