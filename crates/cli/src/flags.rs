//! Tests that docs/flags.md and the environment variables match the flags of this program and of llama-cli.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};

use super::env::VARIABLES;
use super::shorthand::{SHORTHANDS, spellings};

const DOCS: &str = include_str!("../../../docs/flags.md");
/// Names the llama.cpp version that the docs describe.
const PIN: &str = include_str!("../../../vendor/README.md");

/// Flag that llama.cpp has removed, and that has another meaning here.
const DRAFT: &str = "draft";

/// A flag of llama.cpp's programs.
struct Flag {
    /// Spellings such as `-c`, `--ctx-size`, and of the negation, `--no-...`.
    spellings: Vec<String>,
    variable: Option<String>,
}

/// Returns the flags of llama-cli, from the source of the linked llama.cpp. None: the docs describe another version.
fn llama_cli() -> Option<Vec<Flag>> {
    let version = env!("GVOTE_LLAMA_VERSION");
    if !PIN.contains(&format!("\n- llama.cpp {version},")) {
        return None;
    }
    let file = Path::new(env!("GVOTE_LLAMA_SOURCE")).join("common/arg.cpp");
    let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let calls = text.split("\n    add_opt(common_arg(").skip(1);
    Some(calls.filter(|call| is_for_cli(call)).map(flag).collect())
}

/// Selects options as `common_params_parser_init` does.
fn is_for_cli(call: &str) -> bool {
    let list = |name: &str| call.split_once(name).map(|(_, rest)| rest.split(')').next().unwrap_or_default());
    let all = ["LLAMA_EXAMPLE_COMMON", "LLAMA_EXAMPLE_CLI", "mmproj_examples"];
    let names = |list: &str| all.iter().any(|name| list.contains(name));
    list(".set_examples(").is_none_or(names)
        && !list(".set_excludes(").is_some_and(|list| list.contains("LLAMA_EXAMPLE_CLI"))
}

fn flag(call: &str) -> Flag {
    let quoted = |text: &str| text.split('"').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let start = call.find('{').expect("the spellings stand in braces");
    let (first, rest) = call[start..].split_once('}').expect("the brace is closed");
    let rest = rest.trim_start_matches([',', ' ', '\n']);
    let contrary = rest.strip_prefix('{').and_then(|rest| rest.split('}').next());
    let variable = call.split_once(".set_env(").map(|(_, rest)| quoted(rest).remove(0));
    Flag { spellings: [quoted(first), contrary.map(quoted).unwrap_or_default()].concat(), variable }
}

/// Returns the rows of the docs: whether the flags exist here, and their spellings.
fn rows() -> impl Iterator<Item = (bool, Vec<&'static str>)> {
    DOCS.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        let spellings = cells.next()?.split(['`', ',', ' ']).filter(|word| word.starts_with('-')).collect();
        let is_here = match cells.next()? {
            "here" => true,
            "not here" => false,
            other => panic!("{other:?} in {line}"),
        };
        Some((is_here, spellings))
    })
}

fn listed(here: bool) -> BTreeSet<&'static str> {
    rows().filter(|&(is_here, _)| is_here == here).flat_map(|(_, spellings)| spellings).collect()
}

/// Returns all spellings that `run` and `chat` accept.
fn taken() -> BTreeSet<String> {
    let mut program = super::Cli::command();
    program.build();
    let commands = program.get_subcommands().filter(|sub| ["run", "chat"].contains(&sub.get_name())).chain([&program]);
    let own: BTreeSet<String> = commands.flat_map(Command::get_arguments).flat_map(spellings).collect();
    let short =
        SHORTHANDS.iter().filter(|(_, long)| own.contains(&format!("--{long}"))).map(|(short, _)| short.to_string());
    own.iter().cloned().chain(short).collect()
}

#[test]
fn the_docs_list_every_flag_that_is_taken() {
    let (taken, here) = (taken(), listed(true));
    let missing: Vec<_> = taken.iter().filter(|flag| !here.contains(&flag[..])).collect();
    let invented: Vec<_> = here.iter().filter(|&&flag| !taken.contains(flag)).collect();
    assert!(missing.is_empty() && invented.is_empty(), "not listed: {missing:?}; listed, but not taken: {invented:?}");
}

#[test]
fn the_docs_list_every_flag_of_llama_cli() {
    let Some(flags) = llama_cli() else { return };
    assert!(flags.len() > 200, "{}", flags.len());
    let all: Vec<&str> = rows().flat_map(|(_, spellings)| spellings).collect();
    let unique: BTreeSet<&str> = all.iter().copied().collect();
    assert_eq!(all.len(), unique.len(), "no flag is listed twice");
    let missing: Vec<_> =
        flags.iter().flat_map(|flag| &flag.spellings).filter(|flag| !unique.contains(&flag[..])).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn flags_that_are_here_have_the_variables_of_llama_cli() {
    let Some(flags) = llama_cli() else { return };
    let here = listed(true);
    let theirs: BTreeSet<(&str, &str)> = flags
        .iter()
        .filter_map(|flag| {
            // a flag may have several names; any of them may be the one used here
            let names = || {
                flag.spellings.iter().filter_map(|spelling| spelling.strip_prefix("--")).filter(|&name| name != DRAFT)
            };
            let name = names().find(|name| VARIABLES.iter().any(|(long, _)| long == name));
            let name = name.or_else(|| names().find(|name| here.contains(&format!("--{name}")[..])))?;
            Some((name, flag.variable.as_deref()?))
        })
        .collect();
    let ours = VARIABLES.iter().copied().collect();
    assert_eq!(theirs, ours);
}
