//! Table like llama-bench's, printed row by row, and therefore with fixed column widths.

use anyhow::Result;
use gvote::llama::ContextParams;

use super::output::Output;
use super::plan::Plan;
use super::row::{Facts, Row};
use crate::turn::print;
use crate::words::{bytes, count, number_of_bytes};

struct Column {
    title: &'static str,
    /// Width in characters.
    width: usize,
    is_text: bool,
    cell: fn(&Row) -> String,
}

const fn text(title: &'static str, width: usize, cell: fn(&Row) -> String) -> Column {
    Column { title, width, is_text: true, cell }
}

const fn number(title: &'static str, width: usize, cell: fn(&Row) -> String) -> Column {
    Column { title, width, is_text: false, cell }
}

pub struct Markdown {
    columns: Vec<Column>,
    is_started: bool,
}

impl Markdown {
    /// Creates the table. As llama-bench does, leaves out columns for settings at their default and for figures that were not measured.
    pub fn new(facts: &Facts, plan: &Plan) -> Self {
        let (given, default) = (&facts.context, ContextParams::default());
        let mut columns = vec![
            text("model", 30, |r| r.model_type.clone()),
            number("size", 10, |r| size(r.model_size)),
            number("params", 10, |r| params(r.model_n_params)),
            number("threads", 7, |r| r.n_threads.to_string()),
        ];
        let mut unless_default = |is_default: bool, column: Column| {
            if !is_default {
                columns.push(column);
            }
        };
        unless_default(given.n_batch == default.n_batch, number("n_batch", 7, |r| r.n_batch.to_string()));
        unless_default(given.n_ubatch == default.n_ubatch, number("n_ubatch", 8, |r| r.n_ubatch.to_string()));
        unless_default(given.type_k == default.type_k, number("type_k", 6, |r| r.type_k.into()));
        unless_default(given.type_v == default.type_v, number("type_v", 6, |r| r.type_v.into()));
        unless_default(given.flash_attn == default.flash_attn, number("fa", 3, |r| r.flash_attn.to_string()));
        columns.extend([
            text("policy", 11, |r| r.policy.into()),
            number("test", 15, |r| r.test.clone()),
            number("t/s", 20, |r| format!("{:.2} ± {:.2}", r.avg_ts, r.stddev_ts)),
        ]);
        if plan.is_batched() {
            columns.push(number("t/s each", 9, |r| format!("{:.2}", r.avg_ts_sequence)));
        }
        if plan.compares() {
            columns.push(number("vs full", 7, |r| r.ratio_to_full.map_or_else(String::new, |x| format!("{x:.3}"))));
        }
        if plan.votes() {
            columns.extend([
                number("cells", 16, cells),
                number("KV", 20, kv),
                number("vote ms", 8, |r| milliseconds(r.vote_ms)),
                number("compact ms", 10, |r| milliseconds(r.compact_ms)),
                number("of prefill", 10, |r| r.share_of_prefill.map_or_else(String::new, percent)),
                number("RSS growth", 10, |r| r.peak_rss_growth.map_or_else(String::new, |n| bytes(n, n))),
            ]);
        }
        if plan.is_batched() {
            columns.push(number("KV of all", 10, |r| bytes(r.kv_bytes_total, r.kv_bytes_total)));
        }
        if facts.memory.is_some() {
            let fit = |r: &Row| r.sequences_fit.map_or_else(String::new, count);
            columns.push(number("fit", 6, fit));
        }
        Self { columns, is_started: false }
    }

    fn line(&self, cell: impl Fn(&Column) -> String) -> String {
        let cells = self.columns.iter().map(|column| {
            let (text, width) = (cell(column), column.width);
            if column.is_text { format!(" {text:<width$} |") } else { format!(" {text:>width$} |") }
        });
        format!("|{}\n", cells.collect::<String>())
    }
}

impl Output for Markdown {
    fn row(&mut self, row: &Row) -> Result<()> {
        let mut lines = String::new();
        if !self.is_started {
            self.is_started = true;
            lines += &self.line(|column| column.title.into());
            lines += &self.line(|column| "-".repeat(column.width - 1) + if column.is_text { "-" } else { ":" });
        }
        lines += &self.line(|column| (column.cell)(row));
        Ok(print(&lines)?)
    }
}

/// Formats a size with two decimal places, as llama-bench does.
fn size(n: u64) -> String {
    let mib = n as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.2} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

fn params(n: u64) -> String {
    let millions = n as f64 / 1e6;
    if millions < 1e3 { format!("{millions:.2} M") } else { format!("{:.2} B", millions / 1e3) }
}

fn cells(row: &Row) -> String {
    row.share_kept.map_or_else(String::new, |share| format!("{} ({})", count(row.cells), percent(share)))
}

fn kv(row: &Row) -> String {
    let (before, after) = (row.kv_bytes_before, row.kv_bytes);
    match row.n_depth {
        0 => String::new(),
        _ if before == after => bytes(after, after),
        _ => format!("{} -> {}", number_of_bytes(before, before), bytes(after, before)),
    }
}

fn milliseconds(ms: Option<f64>) -> String {
    ms.map_or_else(String::new, |ms| format!("{ms:.1}"))
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
