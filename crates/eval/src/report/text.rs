//! Renders a report for a terminal.

use std::fmt::Write;

use comfy_table::{CellAlignment, ContentArrangement, presets};

use super::Report;
use super::table::{Table, sections};

/// Characters in a line. A wider table continues below, with its first column repeated.
const WIDTH: usize = 120;
/// Characters between two columns.
const GAP: usize = 2;

pub fn render(report: &Report) -> String {
    let mut out = String::new();
    for section in sections(report) {
        let lead = fold(section.lead.split_whitespace(), WIDTH, "\n");
        let _ = writeln!(out, "{}\n{lead}\n", section.title.to_uppercase());
        for runs in &section.runs {
            let _ = writeln!(out, "{}", fold(runs.about.split_whitespace(), WIDTH, "\n"));
            for words in &runs.commands {
                let _ = writeln!(out, "  {}", fold_command(words, WIDTH));
            }
            out.push('\n');
        }
        for table in &section.tables {
            let place = if table.place.is_empty() { String::new() } else { format!(" ({})", table.place) };
            let _ = writeln!(out, "{}{place}", table.title);
            for columns in table.split(WIDTH, GAP) {
                let _ = writeln!(out, "{}\n", lay_out(table, &columns));
            }
        }
    }
    out
}

fn lay_out(table: &Table, columns: &[usize]) -> String {
    let mut out = comfy_table::Table::new();
    out.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let choose = |row: &[String]| columns.iter().map(|&column| row[column].clone()).collect::<Vec<_>>();
    out.set_header(choose(&table.head));
    out.add_rows(table.rows.iter().map(|row| choose(row)));
    for (place, column) in out.column_iter_mut().enumerate() {
        column.set_padding((0, GAP as u16));
        if place > 0 && !table.is_words {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    out.trim_fmt()
}

/// Wraps a command line without separating a flag from its value.
pub fn fold_command(words: &[String], width: usize) -> String {
    let mut parts: Vec<String> = Vec::new();
    for word in words {
        match parts.last_mut() {
            Some(flag) if flag.starts_with('-') && !flag.contains(' ') && !word.starts_with('-') => {
                *flag = format!("{flag} {word}");
            }
            _ => parts.push(word.clone()),
        }
    }
    fold(parts.iter().map(String::as_str), width, " \\\n    ")
}

/// Wraps a paragraph into lines of at most `width` characters; longer words stay whole.
pub fn fold<'a>(words: impl IntoIterator<Item = &'a str>, width: usize, line_break: &str) -> String {
    // Characters that a line break takes at the end of a line and at the start of the next.
    let (end, start) = line_break.split_once('\n').map_or((0, 0), |(end, start)| (end.len(), start.len()));
    let mut out = String::new();
    let mut used = 0;
    for word in words {
        let length = word.chars().count();
        if used > 0 && used + 1 + length + end > width {
            out.push_str(line_break);
            used = start;
        } else if used > 0 {
            out.push(' ');
            used += 1;
        }
        out.push_str(word);
        used += length;
    }
    out
}
