//! The program `gvote`: one file per sub-command, and the code they share. See `gvote --help`.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod cells;
mod chat;
mod conversation;
mod crash;
mod env;
mod eval;
mod explain;
mod fits;
#[cfg(test)]
mod flags;
mod given;
mod input;
mod inspect;
mod interrupt;
mod manual;
mod plan;
mod prompt;
mod report;
mod reverse;
mod rpc_server;
mod run;
mod serve;
mod shorthand;
mod spelling;
mod table;
mod turn;
mod with;
mod words;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

const CLOSING: &str = "\
Exit status: 0 done, 1 failed, 2 wrong flags, 130 stopped with Ctrl-C.
`gvote COMMAND --help` explains the flags of a command; their names and meanings are llama.cpp's where it has them.
A flag that is not given takes the value of llama.cpp's environment variable for it (LLAMA_ARG_...), if that is set.";

/// Adaptive KV cache for llama.cpp: keeps the part of the cache that a prompt turns out to need and frees the rest
#[derive(Parser)]
#[command(name = "gvote", version, after_help = CLOSING, arg_required_else_help = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    Chat(chat::ChatArgs),
    Explain(explain::ExplainArgs),
    Eval(eval::EvalArgs),
    Bench(bench::BenchArgs),
    Inspect(inspect::InspectArgs),
    Plan(plan::PlanArgs),
    With(with::WithArgs),
    Serve(serve::ServeArgs),
    RpcServer(rpc_server::RpcServerArgs),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
}

/// Errors with their own exit status.
#[derive(Debug, thiserror::Error)]
enum Exit {
    /// Invalid command line.
    #[error("{0}")]
    Usage(String),
    /// Stopped with Ctrl-C.
    #[error("cancelled")]
    Cancelled,
}

const STATUS_FAILED: u8 = 1;
const STATUS_USAGE: u8 = 2;
/// The status that a shell reports for a program killed by SIGINT.
const STATUS_CANCELLED: u8 = 128 + 2;

fn main() -> ExitCode {
    match run(std::env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_error(&error),
    }
}

/// Parses a command line, whose first word is the program's name, and runs the command.
fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    crash::install();
    let command = described();
    let args = shorthand::expand(&command, args);
    let command = env::attach(command, &args);
    let parsed = command.clone().try_get_matches_from(&args).and_then(|m| Cli::from_arg_matches(&m));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => return Ok(error.print()?),
        Err(error) => return Err(usage_error(&error, env::origin(&command, &error, &args))),
    };
    match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::With(args) => with::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::RpcServer(args) => rpc_server::run(&args),
        Command::Completions(args) => manual::completions(command, &args),
        Command::Man(args) => manual::man(command, &args),
    }
}

/// Returns the command line parser with the complete help texts.
fn described() -> clap::Command {
    shorthand::describe(Cli::command())
}

/// Prints an error as one line and returns the exit status. A closed pipe (`gvote ... | head`) is not an error.
fn report_error(error: &anyhow::Error) -> ExitCode {
    if is_closed_pipe(error) {
        return ExitCode::SUCCESS;
    }
    print_error(error);
    ExitCode::from(match error.downcast_ref() {
        Some(Exit::Usage(_)) => STATUS_USAGE,
        Some(Exit::Cancelled) => STATUS_CANCELLED,
        None => STATUS_FAILED,
    })
}

fn print_error(error: &anyhow::Error) {
    let line = spelling::with_flags(&format!("{error:#}")).split_whitespace().collect::<Vec<_>>().join(" ");
    // If stderr is closed too, the error cannot be reported anywhere.
    let _ = writeln!(io::stderr(), "gvote: {line}");
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|e| e.downcast_ref::<io::Error>());
    causes.any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Joins clap's multi-line error message into one line. `origin`: the environment variable that holds the wrong value.
fn usage_error(error: &clap::Error, origin: Option<&str>) -> anyhow::Error {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Exit::Usage(
            "name a command: gvote run, chat, explain, eval, bench, inspect, plan, with, serve, rpc-server; see gvote --help".into(),
        )
        .into();
    }
    let text = spelling::with_flags(&error.render().to_string());
    let mut line = String::new();
    for part in text.lines().map(str::trim).take_while(|l| !l.starts_with("Usage:")) {
        let part = part.strip_prefix("error: ").unwrap_or(part);
        if part.is_empty() || part.starts_with("For more information") {
            continue;
        }
        if !line.is_empty() {
            line.push_str(if part.starts_with("tip:") { "; " } else { " " });
        }
        line.push_str(part);
    }
    let origin = origin.map_or_else(String::new, |variable| format!(" (from the environment: {variable})"));
    Exit::Usage(format!("{line}{origin}; see --help")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        shorthand::describe(Cli::command()).debug_assert();
    }
}
