//! `gvote inspect`: describes a model file without reading its weights.

mod json;
mod summary;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use gvote_gguf::{Entry, Gguf};
use serde_json::Value;

use super::report::print_json;
use super::table::{plain, table};
use super::turn::print;
use super::words::{count, note};

const EXAMPLES: &str = "\
Examples:
  gvote inspect model.gguf
  gvote inspect model.gguf --tensors
  gvote inspect model.gguf --metadata tokenizer.chat_template
  gvote inspect model-00001-of-00003.gguf --json | jq .kv_bytes_per_cell.q8_0

Only the head of the file is read, so that the size of the model does not matter. Of a split model the first file is named; the \
others are found beside it.";

/// Show what a model file holds, how large its KV cache is, and whether gvote can compress it
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct InspectArgs {
    /// Model file (GGUF; the first part of a split model)
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// List all tensors: type, shape, bytes, and offset of their data
    #[arg(long)]
    tensors: bool,

    /// List the metadata; with a KEY after MODEL, print the complete value of that key
    #[arg(long, value_name = "KEY", num_args = 0..=1, default_missing_value = "")]
    metadata: Option<String>,

    /// Print one JSON object on stdout; --tensors and --metadata add to it
    #[arg(long)]
    json: bool,
}

pub fn run(args: &InspectArgs) -> Result<()> {
    let file = Gguf::open(&args.model)?;
    for what in &file.faults {
        note(&format!("warning: llama.cpp cannot load this model: {}", plain(what)));
    }
    match &args.metadata {
        Some(key) if !key.is_empty() => return print_value(&file, key, args.json),
        _ if args.json => {
            return print_json(&json::Report::new(&file, args.tensors, args.metadata.is_some()));
        }
        _ => {}
    }
    let mut out = String::new();
    if !args.tensors && args.metadata.is_none() {
        out = summary::of(&file);
    }
    if args.metadata.is_some() {
        out += &metadata(&file);
    }
    if args.tensors {
        out += &tensors(&file);
    }
    Ok(print(&out)?)
}

fn print_value(file: &Gguf, key: &str, as_json: bool) -> Result<()> {
    let Some(value) = file.value(key)? else {
        bail!("the file has no metadata key {key:?}: --metadata without a key lists those it has");
    };
    match value {
        Value::String(text) if !as_json => Ok(print(&format!("{text}\n"))?),
        value => print_json(&value),
    }
}

fn metadata(file: &Gguf) -> String {
    let rows = file.entries.iter().map(|entry| [plain(&entry.key), entry.type_name(), shortened(entry)]);
    table(["key", "type", "value"], rows, 3)
}

fn tensors(file: &Gguf) -> String {
    let rows = file.tensors.iter().map(|tensor| {
        let shape: Vec<_> = tensor.shape.iter().map(u64::to_string).collect();
        let bytes = tensor.bytes.map_or_else(|| "?".into(), |n| count(n as usize));
        let part = (tensor.part + 1).to_string();
        [plain(&tensor.name), tensor.type_name(), shape.join(" x "), bytes, count(tensor.offset as usize), part]
    });
    table(["tensor", "type", "shape", "bytes", "at byte", "file"], rows, 3)
}

/// Characters of a value, and elements of an array, shown in a list.
const SHOWN_CHARS: usize = 60;
const SHOWN_ELEMENTS: usize = 4;

fn shortened(entry: &Entry) -> String {
    let Some(value) = &entry.value else {
        return "(too long to show)".into();
    };
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => {
            let shown: Vec<_> = values.iter().take(SHOWN_ELEMENTS).map(Value::to_string).collect();
            let rest = entry.elements.is_some_and(|n| n > shown.len() as u64);
            format!("[{}{}]", shown.join(", "), if rest { ", ..." } else { "" })
        }
        other => other.to_string(),
    };
    let text = plain(&text);
    if text.chars().count() <= SHOWN_CHARS {
        return text;
    }
    text.chars().take(SHOWN_CHARS - 3).collect::<String>() + "..."
}
