//! Output formats for rows. Each row is printed when it is measured, because a long run may end early.

use std::io::{self, Stdout};
use std::str::FromStr;

use anyhow::Result;
use serde::Serialize;

use super::markdown::Markdown;
use super::plan::Plan;
use super::row::{Facts, Row};
use crate::report::print_json;
use crate::turn::print;

/// Prints rows on stdout.
pub trait Output {
    fn row(&mut self, row: &Row) -> Result<()>;

    /// Completes the output after the last row; called however the program ends.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Md,
    Csv,
    Json,
    Jsonl,
}

impl Format {
    pub const ALL: &'static [Self] = &[Self::Md, Self::Csv, Self::Json, Self::Jsonl];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Md => "md",
            Self::Csv => "csv",
            Self::Json => "json",
            Self::Jsonl => "jsonl",
        }
    }

    pub fn start(self, facts: &Facts, plan: &Plan) -> Box<dyn Output> {
        match self {
            Self::Md => Box::new(Markdown::new(facts, plan)),
            Self::Csv => Box::new(Csv(csv::Writer::from_writer(io::stdout()))),
            Self::Json => Box::new(Json { rows: 0 }),
            Self::Jsonl => Box::new(Jsonl),
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("unknown format")]
pub struct UnknownFormat;

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        Self::ALL.iter().copied().find(|format| format.name() == text).ok_or(UnknownFormat)
    }
}

/// A header line, then one line per row.
struct Csv(csv::Writer<Stdout>);

impl Output for Csv {
    fn row(&mut self, row: &Row) -> Result<()> {
        self.0.serialize(row)?;
        Ok(self.0.flush()?)
    }
}

/// A row with the result of every repetition.
#[derive(Serialize)]
struct Record<'a> {
    #[serde(flatten)]
    row: &'a Row,
    samples_ns: &'a [u64],
    samples_ts: &'a [f64],
}

impl<'a> From<&'a Row> for Record<'a> {
    fn from(row: &'a Row) -> Self {
        Self { row, samples_ns: &row.samples_ns, samples_ts: &row.samples_ts }
    }
}

/// One object per line.
struct Jsonl;

impl Output for Jsonl {
    fn row(&mut self, row: &Row) -> Result<()> {
        print_json(&Record::from(row))
    }
}

/// An array of objects; valid even if the program is stopped early.
struct Json {
    rows: usize,
}

impl Output for Json {
    fn row(&mut self, row: &Row) -> Result<()> {
        let before = if self.rows == 0 { "[\n" } else { ",\n" };
        self.rows += 1;
        Ok(print(&format!("{before}{}", serde_json::to_string_pretty(&Record::from(row))?))?)
    }

    fn finish(&mut self) -> Result<()> {
        if self.rows > 0 { Ok(print("\n]\n")?) } else { Ok(()) }
    }
}
