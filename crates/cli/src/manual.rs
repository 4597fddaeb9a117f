//! `gvote completions` and `gvote man`: shell completion scripts and manual pages.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, Command};
use clap_complete::Shell;

use super::Exit;
use super::turn::print;

const COMPLETIONS: &str = "\
Examples:
  gvote completions bash > ~/.local/share/bash-completion/completions/gvote
  gvote completions zsh > ~/.zfunc/_gvote
  gvote completions fish > ~/.config/fish/completions/gvote.fish

`make install` puts those of bash, zsh and fish into their places.";

/// Print a script for completing gvote's flags in a shell
#[derive(Args)]
#[command(after_help = COMPLETIONS)]
pub struct CompletionsArgs {
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

const PAGES: &str = "\
Examples:
  gvote man | man -l -
  gvote man run | man -l -
  gvote man --out ~/.local/share/man/man1

`make install` puts all pages into their place.";

/// Print a manual page, or write all of them
#[derive(Args)]
#[command(after_help = PAGES)]
pub struct ManArgs {
    /// Command to describe; without one, gvote as a whole
    #[arg(value_name = "COMMAND", num_args = 0.., conflicts_with = "out")]
    commands: Vec<String>,

    /// Write the pages of all commands to this folder
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

pub fn completions(mut command: Command, args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "gvote", &mut script);
    Ok(print(&String::from_utf8(script)?)?)
}

pub fn man(command: Command, args: &ManArgs) -> Result<()> {
    let mut command = command.disable_help_subcommand(true);
    if let Some(folder) = &args.out {
        let written =
            std::fs::create_dir_all(folder).and_then(|()| clap_mangen::generate_to(command, folder).map(|_| ()));
        return written.with_context(|| format!("cannot write manual pages into {} (--out)", folder.display()));
    }
    command.build();
    let mut found = &command;
    for name in &args.commands {
        let next = found.find_subcommand(name);
        found = next.ok_or_else(|| Exit::Usage(format!("gvote has no command {name:?}: see gvote --help")))?;
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(found.clone()).render(&mut page)?;
    Ok(print(&String::from_utf8(page)?)?)
}
