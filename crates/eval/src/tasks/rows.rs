//! Rows of JSONL files, with errors that state the line.

use std::path::{Path, PathBuf};

use serde_json::error::Category;
use serde_json::{Map, Value};

use super::TaskError;
use crate::text;

/// One object of a JSONL file.
pub(super) struct Row {
    path: PathBuf,
    /// Index of the line, counted from 0, including empty lines.
    pub index: usize,
    fields: Map<String, Value>,
}

/// Converts the rows of a file with `make`, in order. Skips empty lines, and adds errors of unusable rows to `refused`.
pub(super) fn read<T>(
    path: &Path,
    refused: &mut Vec<TaskError>,
    mut make: impl FnMut(Row) -> Result<T, TaskError>,
) -> Result<Vec<T>, TaskError> {
    let bytes = std::fs::read(path).map_err(|error| TaskError::Io(path.to_owned(), error))?;
    let lines = text::bytes_without_mark(&bytes).split(|byte| *byte == b'\n');
    let rows = lines.enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let mut made = Vec::new();
    for (index, line) in rows {
        match Row::of(path, index, line).and_then(&mut make) {
            Ok(row) => made.push(row),
            Err(error) => refused.push(error),
        }
    }
    Ok(made)
}

impl Row {
    fn of(path: &Path, index: usize, line: &[u8]) -> Result<Self, TaskError> {
        let row = Self { path: path.to_owned(), index, fields: Map::new() };
        match serde_json::from_slice(line) {
            Ok(Value::Object(fields)) => Ok(Self { fields, ..row }),
            Ok(_) => Err(row.wrong("not a JSON object")),
            Err(error) if error.classify() == Category::Eof => Err(row.wrong("the JSON object is cut off")),
            Err(error) => Err(row.wrong(format!("not JSON from column {} on", error.column()))),
        }
    }

    /// Returns an error for this line.
    pub fn wrong(&self, what: impl Into<String>) -> TaskError {
        TaskError::Line { path: self.path.clone(), line: self.index + 1, what: what.into() }
    }

    /// Returns a required field.
    fn field(&self, name: &str) -> Result<&Value, TaskError> {
        self.fields.get(name).ok_or_else(|| self.wrong(format!("`{name}` is missing")))
    }

    pub fn text(&self, name: &str) -> Result<&str, TaskError> {
        self.field(name)?.as_str().ok_or_else(|| self.wrong(format!("`{name}` is not a string")))
    }

    /// Returns a non-empty list of strings.
    pub fn texts(&self, name: &str) -> Result<Vec<String>, TaskError> {
        let list = self.field(name)?.as_array();
        let texts = list.and_then(|list| list.iter().map(|text| text.as_str().map(str::to_owned)).collect());
        match texts {
            None => Err(self.wrong(format!("`{name}` is not a list of strings"))),
            Some(texts) if Vec::is_empty(&texts) => Err(self.wrong(format!("`{name}` is empty"))),
            Some(texts) => Ok(texts),
        }
    }

    /// Returns a field if it is a number.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.fields.get(name)?.as_f64()
    }
}
