//! Renders an explanation for a terminal.

use anstyle::{AnsiColor, Effects, Style};
use gvote::explain::Explanation;

use super::super::table::plain;
use super::super::words::count;

/// Number of columns if the width is not known.
const WIDTH: usize = 80;
/// Columns of text, and the minimum columns of a strip; narrower terminals wrap the lines.
const LEFT: usize = 24;
const NARROWEST: usize = 16;
/// Blocks from nothing kept to everything kept.
const BLOCKS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const STRIP: Style = AnsiColor::Blue.on_default();
const BACK: Style = AnsiColor::Magenta.on_default();
const TITLE: Style = Style::new().effects(Effects::DIMMED);
/// Number of passages to quote.
const PASSAGES: usize = 5;

/// Returns the columns of the terminal on stdout.
pub fn width() -> usize {
    let size = terminal_size::terminal_size_of(std::io::stdout());
    size.map_or(WIDTH, |(width, _)| usize::from(width.0))
}

/// Renders strips along the text, for all heads together and for each layer, and the passages that most heads kept. `anstream` removes the
/// colours if they are not supported.
pub fn view(explanation: &Explanation, width: usize) -> String {
    let columns = width.saturating_sub(LEFT).max(NARROWEST).min(explanation.tokens.len().max(1));
    let mut out = format!(
        "{TITLE}{:>5}  {:>8}  {:>5}  kept along the text, {} tokens a column{TITLE:#}\n",
        "layer",
        "needs",
        "lost",
        count(explanation.tokens.len().div_ceil(columns)),
    );
    let all: Vec<u32> = explanation.kept_by.clone();
    out += &row("all", explanation, 0..explanation.n_heads(), &all, columns);
    if let Some(recall) = &explanation.recall {
        let strip = strip(&recall.came_back_by, explanation.n_heads(), columns);
        out += &format!("{:>5}  {:<17}{BACK}{strip}{BACK:#}\n", "back", "had left");
    }
    for (place, layer) in explanation.layers.iter().enumerate() {
        let heads = place * explanation.n_head_kv..(place + 1) * explanation.n_head_kv;
        let mut kept_by = vec![0; explanation.tokens.len()];
        for head in heads.clone() {
            explanation.kept.row(head).for_each(|position| kept_by[position] += 1);
        }
        out += &row(&layer.to_string(), explanation, heads, &kept_by, columns);
    }
    let end = count(explanation.tokens.len());
    out += &format!("{TITLE}{:LEFT$}0{end:>rest$}{TITLE:#}\n", "", rest = columns.saturating_sub(1));
    out += &passages(explanation, width);
    out
}

fn row(
    label: &str,
    explanation: &Explanation,
    heads: std::ops::Range<usize>,
    kept_by: &[u32],
    columns: usize,
) -> String {
    let n_heads = heads.len();
    let opinions = explanation.heads.get(heads).unwrap_or_default();
    let mean = |sum: f64| sum / opinions.len() as f64;
    let needs = opinions.iter().map(|head| head.needs.map(f64::from)).sum::<Option<f64>>().map(mean);
    let needs = needs.filter(|needs| needs.is_finite()).map_or_else(String::new, |needs| count(needs.round() as usize));
    let lost = mean(opinions.iter().map(|head| f64::from(head.lost_mass)).sum());
    let lost = if lost.is_finite() { format!("{:.1}%", 100.0 * lost) } else { String::new() };
    let strip = strip(kept_by, n_heads, columns);
    format!("{label:>5}  {needs:>8}  {lost:>5}  {STRIP}{strip}{STRIP:#}\n")
}

fn strip(kept_by: &[u32], n_heads: usize, columns: usize) -> String {
    (0..columns).map(|column| BLOCKS[level(kept_by, n_heads, column, columns)]).collect()
}

/// Returns the height of a column; at least 1 if anything was kept, so that it is visible.
fn level(kept_by: &[u32], n_heads: usize, column: usize, columns: usize) -> usize {
    let edge = |column: usize| column * kept_by.len() / columns;
    let tokens = &kept_by[edge(column)..edge(column + 1)];
    let kept: u64 = tokens.iter().map(|&kept| u64::from(kept)).sum();
    let share = kept as f64 / (tokens.len() * n_heads).max(1) as f64;
    (share * (BLOCKS.len() - 1) as f64).ceil() as usize
}

fn passages(explanation: &Explanation, width: usize) -> String {
    let passages = explanation.passages(PASSAGES);
    if passages.is_empty() {
        return String::new();
    }
    let mut out = format!("\n{TITLE}kept by most heads, beside the first and last tokens{TITLE:#}\n");
    for passage in passages {
        let label = format!("{:>7} {:>3.0} %  ", count(passage.start), 100.0 * passage.share);
        let text = explanation.texts[passage.start..passage.end].concat();
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let room = width.saturating_sub(label.chars().count() + 1);
        out += &format!("{label}{}\n", plain(&words).chars().take(room).collect::<String>());
    }
    out
}
