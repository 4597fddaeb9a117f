//! A report for a terminal.

use std::fmt::Write;

use comfy_table::{CellAlignment, ContentArrangement, presets};

use super::Report;
use super::table::{Table, sections};

/// Characters a line; a wider table goes on below, with its first column repeated.
const WIDTH: usize = 120;
/// Characters between two columns.
const GAP: usize = 2;

pub fn render(report: &Report) -> String {
    let mut out = String::new();
    for section in sections(report) {
        let _ = writeln!(out, "{}\n{}\n", section.title.to_uppercase(), fold(section.lead));
        for table in &section.tables {
            let _ = writeln!(out, "{} ({})", table.title, table.place);
            for columns in split(table) {
                let _ = writeln!(out, "{}\n", lay_out(table, &columns));
            }
        }
    }
    out
}

/// Columns that fit side by side; each group starts with the first.
fn split(table: &Table) -> Vec<Vec<usize>> {
    let width = |column: usize| {
        let cells = table.rows.iter().map(|row| &row[column]).chain([&table.head[column]]);
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0) + GAP
    };
    let mut groups = vec![vec![0]];
    let mut used = width(0);
    for column in 1..table.head.len() {
        let last = groups.last_mut().expect("there is a first group");
        if used + width(column) > WIDTH && last.len() > 1 {
            groups.push(vec![0, column]);
            used = width(0) + width(column);
        } else {
            last.push(column);
            used += width(column);
        }
    }
    groups
}

fn lay_out(table: &Table, columns: &[usize]) -> String {
    let mut out = comfy_table::Table::new();
    out.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let choose = |row: &[String]| columns.iter().map(|&column| row[column].clone()).collect::<Vec<_>>();
    out.set_header(choose(&table.head));
    out.add_rows(table.rows.iter().map(|row| choose(row)));
    for (place, column) in out.column_iter_mut().enumerate() {
        column.set_padding((0, GAP as u16));
        if place > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    out.trim_fmt()
}

/// Breaks a paragraph into lines.
fn fold(text: &str) -> String {
    let mut out = String::new();
    let mut used = 0;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if used > 0 && used + 1 + length > WIDTH {
            out.push('\n');
            used = 0;
        } else if used > 0 {
            out.push(' ');
            used += 1;
        }
        out.push_str(word);
        used += length;
    }
    out
}
