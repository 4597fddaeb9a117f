//! Renders a report as a Markdown document.

use std::fmt::Write;

use super::Report;
use super::table::{Table, sections};
use super::text::{fold, fold_command};

/// Characters in a line. A wider table continues below, with its first column repeated.
const WIDTH: usize = 110;
/// Characters between two columns.
const GAP: usize = 3;

/// Renders the document. `notes`: Markdown to put first; `made_by`: the words of the command that generates the
/// document.
pub fn render(report: &Report, title: &str, notes: &str, made_by: &[String]) -> String {
    let mut out = format!("# {title}\n\n");
    if !notes.trim().is_empty() {
        let _ = writeln!(out, "{}\n", notes.trim());
    }
    let _ = writeln!(out, "{} records, put together by\n", report.records);
    shell(&mut out, [made_by]);
    for section in sections(report) {
        let _ = writeln!(out, "\n## {}\n\n{}", section.title, fold(section.lead.split_whitespace(), WIDTH, "\n"));
        for runs in &section.runs {
            let _ = writeln!(out, "\n{}:\n", fold(runs.about.split_whitespace(), WIDTH, "\n"));
            shell(&mut out, runs.commands.iter().map(Vec::as_slice));
        }
        for table in &section.tables {
            let _ = writeln!(out, "\n### {}\n", table.title);
            if !table.place.is_empty() {
                let _ = writeln!(out, "{}\n", table.place);
            }
            let parts: Vec<String> = table.split(WIDTH, GAP).iter().map(|columns| lay_out(table, columns)).collect();
            out += &parts.join("\n");
        }
    }
    out
}

fn shell<'a>(out: &mut String, commands: impl IntoIterator<Item = &'a [String]>) {
    *out += "```sh\n";
    for words in commands {
        let _ = writeln!(out, "{}", fold_command(words, WIDTH));
    }
    *out += "```\n";
}

/// Lays out a table with padded cells, so that the source is readable, too.
fn lay_out(table: &Table, columns: &[usize]) -> String {
    let escape = |cell: &str| cell.replace('|', "\\|").replace('<', "&lt;");
    let rows: Vec<Vec<String>> = [&table.head]
        .into_iter()
        .chain(&table.rows)
        .map(|row| columns.iter().map(|&c| escape(&row[c])).collect())
        .collect();
    let widths: Vec<usize> = (0..columns.len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3))
        .collect();
    let is_left = |column: usize| column == 0 || table.is_words;
    let mut out = String::new();
    for (number, row) in rows.iter().enumerate() {
        out.push('|');
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let _ = if is_left(column) { write!(out, " {cell:width$} |") } else { write!(out, " {cell:>width$} |") };
        }
        out.push('\n');
        if number == 0 {
            out.push('|');
            for (column, width) in widths.iter().enumerate() {
                let _ = write!(out, " {}{} |", "-".repeat(width - 1), if is_left(column) { '-' } else { ':' });
            }
            out.push('\n');
        }
    }
    out
}
