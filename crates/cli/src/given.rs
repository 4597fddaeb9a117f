//! Flags together with the words that gave them, to repeat them in a suggested command line.

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::shorthand;

/// Parsed flags, and the words that gave them.
pub struct Given<T> {
    pub flags: T,
    /// Words as typed in a shell, with llama.cpp's short spellings where they exist.
    pub words: Vec<String>,
}

impl<T: Args> FromArgMatches for Given<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self { flags: T::from_arg_matches(matches)?, words: words::<T>(matches) })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.words = words::<T>(matches);
        self.flags.update_from_arg_matches(matches)
    }
}

impl<T: Args> Args for Given<T> {
    fn augment_args(command: Command) -> Command {
        T::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        T::augment_args_for_update(command)
    }
}

fn words<T: Args>(matches: &ArgMatches) -> Vec<String> {
    let mut out = Vec::new();
    for flag in T::augment_args(Command::new("")).get_arguments() {
        let id = flag.get_id().as_str();
        let Some(long) =
            flag.get_long().filter(|_| matches.value_source(id).is_some_and(|s| s != ValueSource::DefaultValue))
        else {
            continue;
        };
        let name = shorthand::shortest(long);
        if !flag.get_action().takes_values() {
            out.push(name);
            continue;
        }
        for values in matches.get_raw_occurrences(id).into_iter().flatten() {
            let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
            out.extend([name.clone(), quoted(&values.join(","))]);
        }
    }
    out
}

/// Quotes a word for a shell.
pub fn quoted(word: &str) -> String {
    let is_simple = !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+=@%:,".contains(c));
    if is_simple { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}
