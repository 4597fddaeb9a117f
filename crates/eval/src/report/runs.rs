//! Provenance of the records.

use serde::Serialize;

use super::stats::group_by;
use crate::Start;

/// Runs with the same model on the same machine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Runs {
    /// File name of the model, and type of the K and V cache.
    pub model: String,
    pub cache_type: String,
    pub machine: String,
    /// Versions of gvote and llama.cpp.
    pub version: String,
    pub llama_cpp: String,
    pub seeds: Vec<u64>,
    /// Words of each command line, quoted for a shell. Commands that measured parts of the same run are merged: `{1,2}`
    /// holds their different values.
    pub commands: Vec<Vec<String>>,
}

/// Flags whose values split one measurement into parts for several machines or processes.
const PARTS: &[&str] = &["--offset", "--limit", "--tasks", "-o", "--out"];

/// A configuration's name and its settings in the runs. More than one entry causes a warning to the reader.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Meaning {
    pub config: String,
    pub settings: Vec<String>,
}

impl Runs {
    pub(super) fn all(starts: &[&Start]) -> Vec<Self> {
        let facts = |s: &&Start| {
            (
                s.model.clone(),
                s.cache_type.clone(),
                s.machine(),
                s.version.clone(),
                s.llama_cpp.clone(),
                s.seeds.clone(),
            )
        };
        let groups = group_by(starts.iter().copied(), facts);
        let runs = groups.into_iter().map(|((model, cache_type, machine, version, llama_cpp, seeds), starts)| {
            let whole = |words: &Vec<String>| -> Vec<String> {
                let is_part = |i: usize| i > 0 && PARTS.contains(&words[i - 1].as_str());
                (0..words.len()).filter(|&i| !is_part(i)).map(|i| words[i].clone()).collect()
            };
            let parts = group_by(starts.iter().map(|start| start.command_words()), whole);
            let commands = parts.into_iter().map(|(_, parts)| joined(&parts)).collect();
            Self { model, cache_type, machine, version, llama_cpp, seeds, commands }
        });
        runs.collect()
    }

    /// Describes everything except the commands in one sentence.
    pub fn about(&self) -> String {
        let Self { model, cache_type, machine, version, llama_cpp, seeds, .. } = self;
        let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
        let (plural, seeds) = (if seeds.len() == 1 { "" } else { "s" }, seeds.join(", "));
        format!("{model}, {cache_type} cache, seed{plural} {seeds}; {machine}; gvote {version}, llama.cpp {llama_cpp}")
    }
}

/// Merges command lines of equal length into one; different words become `{one,other}`.
fn joined(parts: &[Vec<String>]) -> Vec<String> {
    let word = |i: usize| {
        let mut values: Vec<&str> = Vec::new();
        for value in parts.iter().map(|words| words[i].as_str()) {
            if !values.contains(&value) {
                values.push(value);
            }
        }
        if values.len() == 1 { values[0].to_owned() } else { format!("{{{}}}", values.join(",")) }
    };
    let is_file = |i: usize| i > 0 && ["-o", "--out"].contains(&parts[0][i - 1].as_str());
    (0..parts[0].len()).map(|i| if is_file(i) && parts.len() > 1 { "FILE".to_owned() } else { word(i) }).collect()
}

impl Meaning {
    /// Collects the settings of configurations by name.
    pub(super) fn all(starts: &[&Start], configs: &[&str]) -> Vec<Self> {
        let of = |config: &&str| {
            let mut settings: Vec<String> = Vec::new();
            for known in starts.iter().flat_map(|start| &start.configs).filter(|known| known.name == *config) {
                if !settings.contains(&known.settings) {
                    settings.push(known.settings.clone());
                }
            }
            Self { config: (*config).to_owned(), settings }
        };
        if starts.is_empty() { Vec::new() } else { configs.iter().map(of).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_measurement_are_one_line() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let parts =
            ["eval --tasks vt --offset 0 -o a", "eval --tasks fwe --offset 0 -o b", "eval --tasks vt --offset 9 -o c"];
        let parts: Vec<_> = parts.map(words).into();
        assert_eq!(joined(&parts).join(" "), "eval --tasks {vt,fwe} --offset {0,9} -o FILE");
        assert_eq!(joined(&parts[..1]), parts[0]);
    }
}
