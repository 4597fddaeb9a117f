//! Commands and flags listed by the program's help.
#![allow(dead_code)] // each test program uses only a part of it

use super::cli::{bare, finish};

/// A flag as listed by the help.
pub struct Flag {
    pub command: String,
    /// The complete help text of the flag.
    pub entry: String,
    /// All spellings, the long one first.
    pub spellings: Vec<String>,
    /// Name of the value in the help, if the flag takes one.
    pub value: Option<String>,
}

pub fn help_of(command: &str) -> String {
    let words: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
    finish(&mut bare(&words)).ok().stdout
}

/// Returns the commands below one, or the command itself if there are none.
pub fn commands(above: &str) -> Vec<String> {
    let help = help_of(above);
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // the continuation lines of longer descriptions are indented further
    let names = listed.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    let below: Vec<String> = names.filter(|&name| name != "help").map(|name| format!("{above} {name}")).collect();
    if below.is_empty() {
        return vec![above.trim().to_owned()];
    }
    below.iter().flat_map(|command| commands(command)).collect()
}

/// Parses `  -c, --ctx-size <N>  What it does [also: -c]`, and the lines after it, up to the next flag.
pub fn flags_of(command: &str) -> Vec<Flag> {
    let help = help_of(command);
    let mut entries: Vec<String> = Vec::new();
    for line in help.lines() {
        if line.starts_with("  -") || line.starts_with("      --") {
            entries.push(line.trim().to_owned());
        } else if let Some(entry) = entries.last_mut() {
            *entry += " ";
            *entry += line.trim();
        }
    }
    let flags = entries.iter().map(|entry| {
        let head = entry.split("  ").next().unwrap_or_default();
        let (names, value) = head.split_once(['<', '[']).map_or((head, None), |(names, value)| (names, Some(value)));
        let own = names.split([',', ' ']).filter(|word| word.starts_with('-')).rev();
        let others = entry.split('[').filter_map(|part| part.strip_prefix("al")?.split_once(": "));
        let others = others.flat_map(|(_, names)| names.split(']').next().unwrap_or_default().split(", "));
        Flag {
            command: command.to_owned(),
            entry: entry.clone(),
            spellings: own.chain(others).map(str::to_owned).collect(),
            value: value
                .map(|value| value.trim_start_matches('<').split(['>', ']']).next().unwrap_or_default().to_owned()),
        }
    });
    flags.filter(|flag| !["--help", "--version"].contains(&flag.spellings[0].as_str())).collect()
}
