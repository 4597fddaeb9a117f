//! Tables and labelled lines for stdout.

use comfy_table::{CellAlignment, ContentArrangement, presets};

/// Width of the label column, as in the reports on stderr.
const LABEL: usize = 12;

/// Returns a labelled line.
pub fn labelled(label: &str, text: &str) -> String {
    format!("{label:<LABEL$}{text}\n")
}

/// Returns a table without lines, indented like the text of [`labelled`]. Columns are right-aligned except the first `n_text`.
pub fn table<const N: usize>(titles: [&str; N], rows: impl IntoIterator<Item = [String; N]>, n_text: usize) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(titles).add_rows(rows);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        column.set_cell_alignment(if i < n_text { CellAlignment::Left } else { CellAlignment::Right });
    }
    let lines = table.lines().map(|line| format!("{}{}\n", " ".repeat(LABEL), line.trim_end()));
    lines.collect()
}

/// Escapes control characters of text from a file, so that printing it cannot move the cursor or break the line.
pub fn plain(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if c.is_control() {
            out.extend(c.escape_default())
        } else {
            out.push(c)
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned() {
        let rows = [["a".into(), "1".into()], ["bcd".into(), "1,000".into()]];
        assert_eq!(
            table(["name", "n"], rows, 1),
            "            name      n\n            a         1\n            bcd   1,000\n"
        );
    }

    #[test]
    fn what_a_file_says_cannot_drive_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
    }
}
