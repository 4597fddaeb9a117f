//! Provenance of records: the command, the machine, the seeds, and the settings behind the configurations' names.

use std::path::Path;
use std::thread::available_parallelism;

use serde::{Deserialize, Serialize};

use super::config::Config;
use gvote::llama::{self, ContextParams, Device};

/// The start of a run, written to a file before the records of the run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The command as typed, except that an absolute path is reduced to its last part: a machine's folders are
    /// irrelevant.
    pub command: Vec<String>,
    /// Version of this crate.
    pub version: String,
    /// Commit or tag of llama.cpp.
    pub llama_cpp: String,
    /// File name of the model.
    pub model: String,
    /// Type of the K and V cache.
    pub cache_type: String,
    /// Model of the CPU.
    pub cpu: String,
    /// Threads that the CPU can run, and threads that computed prompts and answers.
    pub cpu_threads: usize,
    pub threads: i32,
    /// Accelerators, whether or not they held layers; the command tells whether they did.
    #[serde(default)]
    pub gpus: Vec<String>,
    pub seeds: Vec<u64>,
    pub configs: Vec<Settings>,
}

/// A configuration's name and its settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub name: String,
    /// See [`Config::settings`].
    pub settings: String,
}

impl Start {
    /// Describes a run that starts on this machine now. `command`: the program and its arguments.
    pub fn now(
        command: impl IntoIterator<Item = String>,
        model: &Path,
        context: &ContextParams,
        configs: &[Config],
        seeds: &[u64],
    ) -> Self {
        let (gpus, cpus): (Vec<_>, Vec<_>) = llama::devices().into_iter().partition(|device| device.is_gpu);
        Self {
            command: command.into_iter().map(|word| without_folders(&word)).collect(),
            version: env!("CARGO_PKG_VERSION").into(),
            llama_cpp: env!("GVOTE_LLAMA_VERSION").into(),
            model: model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            cache_type: format!("{}/{}", context.type_k.name(), context.type_v.name()),
            cpu: cpus.into_iter().next().map(|device| device.description).unwrap_or_default(),
            cpu_threads: available_parallelism().map_or(1, usize::from),
            threads: context.n_threads,
            gpus: gpus.into_iter().map(in_words).collect(),
            seeds: seeds.to_vec(),
            configs: configs.iter().map(|c| Settings { name: c.name.clone(), settings: c.settings() }).collect(),
        }
    }

    /// Returns the words of the command, quoted for a shell.
    pub fn command_words(&self) -> Vec<String> {
        command_words(&self.command)
    }

    /// Describes the machine, for example `AMD EPYC 7763, 8 of 8 threads; NVIDIA H100 80GB HBM3`.
    pub fn machine(&self) -> String {
        let cpu = format!("{}, {} of {} threads", self.cpu, self.threads, self.cpu_threads);
        [&[cpu][..], &self.gpus].concat().join("; ")
    }

    /// Returns a configuration that has other settings in another run.
    pub fn contradiction(&self, other: &Self) -> Option<&str> {
        let differs = |c: &&Settings| other.configs.iter().any(|o| o.name == c.name && o.settings != c.settings);
        self.configs.iter().find(differs).map(|c| c.name.as_str())
    }
}

fn in_words(gpu: Device) -> String {
    // The description of a worker's device is the worker's endpoint.
    if gpu.name.starts_with("RPC") { format!("worker {}", gpu.description) } else { gpu.description }
}

/// Quotes words for a shell, without the folders of absolute paths.
pub fn command_words(words: &[String]) -> Vec<String> {
    words.iter().map(|word| quoted(&without_folders(word))).collect()
}

/// Removes folders: `/a/b.gguf` -> `b.gguf`, also in `--model=/a/b.gguf`.
fn without_folders(word: &str) -> String {
    let (flag, path) = match word.split_once('=') {
        Some((flag, path)) if flag.starts_with('-') => (&word[..=flag.len()], path),
        _ => ("", word),
    };
    let last = Path::new(path).file_name().filter(|_| path.starts_with('/'));
    last.map_or_else(|| word.to_owned(), |last| flag.to_owned() + &last.to_string_lossy())
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+:,./@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_can_be_pasted_and_names_no_folder_of_the_machine() {
        let words = ["/opt/bin/gvote", "eval", "-m", "/models/m.gguf", "--ruler=/data/ruler/4096", "../data/a b.txt"];
        let line = command_words(&words.map(str::to_owned)).join(" ");
        assert_eq!(line, "gvote eval -m m.gguf --ruler=4096 '../data/a b.txt'");
        assert_eq!(command_words(&["a:b=/c".into(), "it's".into(), String::new()]), ["a:b=/c", r"'it'\''s'", "''"]);
    }

    #[test]
    fn a_start_knows_this_machine_and_its_settings() {
        let configs = ["balanced", "half:ratio=0.5"].map(|c| c.parse().unwrap());
        let start = Start::now(["gvote".into()], Path::new("/a/m.gguf"), &ContextParams::default(), &configs, &[1, 2]);
        assert_eq!((start.model.as_str(), start.seeds.as_slice()), ("m.gguf", &[1, 2][..]));
        assert!(!start.cpu.is_empty() && start.cpu_threads > 0 && start.machine().contains(&start.cpu));
        assert_eq!(start.configs[1].settings, "policy=gvote,ratio=0.5");
        let line = serde_json::to_string(&start).unwrap();
        assert_eq!(serde_json::from_str::<Start>(&line).unwrap(), start);
    }

    #[test]
    fn one_name_with_two_settings_is_a_contradiction() {
        let of = |config: &str| {
            let configs = [config, "full"].map(|c| c.parse().unwrap());
            Start::now([], Path::new("m.gguf"), &ContextParams::default(), &configs, &[0])
        };
        assert_eq!(of("half:ratio=0.5").contradiction(&of("half:ratio=0.4")), Some("half"));
        assert_eq!(of("half:ratio=0.5").contradiction(&of("other:ratio=0.4")), None);
        assert_eq!(of("half:ratio=0.5").contradiction(&of("half:ratio=0.5")), None);
    }
}
