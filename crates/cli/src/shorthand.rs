//! llama.cpp's flags with one dash and several letters, which clap would read as clusters of one-letter flags.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};

use clap::{Arg, Command};

/// Spelling on the command line, and the long flag for it.
pub const SHORTHANDS: [(&str, &str); 19] = [
    ("-sys", "system-prompt"),
    ("-sysf", "system-prompt-file"),
    ("-ub", "ubatch-size"),
    ("-tb", "threads-batch"),
    ("-ngl", "n-gpu-layers"),
    ("-dev", "device"),
    ("-sm", "split-mode"),
    ("-ts", "tensor-split"),
    ("-mg", "main-gpu"),
    ("-ot", "override-tensor"),
    ("-cmoe", "cpu-moe"),
    ("-ncmoe", "n-cpu-moe"),
    ("-nkvo", "no-kv-offload"),
    ("-lm", "load-mode"),
    ("-npl", "n-parallel"),
    ("-fa", "flash-attn"),
    ("-ctk", "cache-type-k"),
    ("-ctv", "cache-type-v"),
    ("-st", "single-turn"),
];

/// Adds the shorthands to the help of their flags.
pub fn describe(command: Command) -> Command {
    command.mut_subcommands(|sub| {
        describe(sub).mut_args(|arg| {
            let Some((short, _)) = SHORTHANDS.iter().find(|(_, long)| arg.get_long() == Some(long)) else {
                return arg;
            };
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            arg.help(format!("{help} [also: {short}]"))
        })
    })
}

/// Returns the shortest spelling of a flag.
pub fn shortest(long: &str) -> String {
    SHORTHANDS.iter().find(|entry| entry.1 == long).map_or_else(|| format!("--{long}"), |entry| entry.0.to_owned())
}

/// Replaces the shorthands in a command line by their long flags. Leaves values of flags unchanged, so that `-p -st` asks about "-st", and
/// everything after `--`.
pub fn expand(command: &Command, args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let with_value = spellings_with_value(command);
    let mut args = args.into_iter();
    let mut out = Vec::new();
    while let Some(arg) = args.next() {
        if arg == "--" {
            out.push(arg);
            break;
        }
        let arg = expand_one(&arg).unwrap_or(arg);
        let takes_value = arg.to_str().is_some_and(|a| with_value.contains(a));
        out.push(arg);
        if takes_value {
            out.extend(args.next());
        }
    }
    out.extend(args);
    out
}

fn expand_one(arg: &OsStr) -> Option<OsString> {
    let (_, long) = SHORTHANDS.iter().find(|(short, _)| arg == *short)?;
    Some(format!("--{long}").into())
}

/// Returns `-x` and `--xyz` of every flag that takes a value, in any sub-command.
fn spellings_with_value(command: &Command) -> HashSet<String> {
    let own = command.get_arguments().filter(|arg| arg.get_action().takes_values()).flat_map(spellings);
    own.chain(command.get_subcommands().flat_map(spellings_with_value)).collect()
}

pub fn spellings(arg: &Arg) -> Vec<String> {
    let long = arg.get_long_and_visible_aliases().unwrap_or_default();
    let short = arg.get_short_and_visible_aliases().unwrap_or_default();
    long.iter().map(|l| format!("--{l}")).chain(short.iter().map(|s| format!("-{s}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn expanded(line: &str) -> String {
        let command = crate::Cli::command();
        let args = expand(&command, line.split(' ').map(OsString::from));
        args.iter().map(|a| a.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn every_shorthand_stands_for_a_flag_that_exists() {
        let command = crate::Cli::command();
        for (short, long) in SHORTHANDS {
            let mut args = command.get_subcommands().flat_map(Command::get_arguments);
            assert!(args.any(|a| a.get_long() == Some(long)), "{short} -> --{long}");
        }
    }

    #[test]
    fn shorthands_become_long_flags() {
        assert_eq!(
            expanded("gvote chat -m a.gguf -ngl 99 -ub 256 -fa on -st"),
            "gvote chat -m a.gguf --n-gpu-layers 99 --ubatch-size 256 --flash-attn on --single-turn"
        );
    }

    #[test]
    fn values_are_not_flags() {
        assert_eq!(expanded("gvote run -p -st -sys -fa"), "gvote run -p -st --system-prompt -fa");
        assert_eq!(expanded("gvote run --prompt -ub"), "gvote run --prompt -ub");
        assert_eq!(expanded("gvote run -e -ub 8"), "gvote run -e --ubatch-size 8");
        assert_eq!(expanded("gvote run -- -st"), "gvote run -- -st");
    }

    #[test]
    fn other_flags_stay() {
        assert_eq!(expanded("gvote run -s 42 -t 4 -stx"), "gvote run -s 42 -t 4 -stx");
    }

    #[test]
    fn the_help_names_both_spellings() {
        let mut command = describe(crate::Cli::command());
        let help = command.find_subcommand_mut("run").unwrap().render_long_help().to_string();
        // the help wraps lines anywhere
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        // flags of `chat` and `bench`
        for (short, _) in SHORTHANDS.iter().filter(|s| !["-st", "-npl"].contains(&s.0)) {
            assert!(help.contains(&format!("[also: {short}]")), "{short}");
        }
    }
}
