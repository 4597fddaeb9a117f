//! How the records came about.

use serde::Serialize;

use super::stats::group_by;
use crate::eval::Start;

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
    /// Words of each command line, quoted for a shell.
    pub commands: Vec<Vec<String>>,
}

/// A configuration's name, and what runs said that it stands for: one text, or the reader is warned.
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
            let mut commands: Vec<Vec<String>> = Vec::new();
            for words in starts.iter().map(|start| start.command_words()) {
                if !commands.contains(&words) {
                    commands.push(words);
                }
            }
            Self { model, cache_type, machine, version, llama_cpp, seeds, commands }
        });
        runs.collect()
    }

    /// All but the commands, in a sentence.
    pub fn about(&self) -> String {
        let Self { model, cache_type, machine, version, llama_cpp, seeds, .. } = self;
        let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
        let (plural, seeds) = (if seeds.len() == 1 { "" } else { "s" }, seeds.join(", "));
        format!("{model}, {cache_type} cache, seed{plural} {seeds}; {machine}; gvote {version}, llama.cpp {llama_cpp}")
    }
}

impl Meaning {
    /// Of configurations by name.
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
