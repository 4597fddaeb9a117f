//! `gvote serve`: runs llama.cpp's own server with the gvote plugin preloaded.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueHint};

use super::with::{self, PluginArgs};

const EXAMPLES: &str = "\
Examples:
  gvote serve -m model.gguf -c 32768 -np 4
  gvote serve --preset safe --stats votes.jsonl -m model.gguf

gvote's own flags come first; the first one that is not gvote's, and all behind it, are llama-server's.";

/// Run llama.cpp's llama-server with its slots compressed by gvote
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    #[command(flatten)]
    plugin: PluginArgs,

    /// llama-server to run [default: the one beside gvote, or else in PATH]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::ExecutablePath)]
    llama_server: Option<PathBuf>,

    /// Arguments for llama-server
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "LLAMA-SERVER ARGUMENTS")]
    rest: Vec<OsString>,
}

pub fn run(args: &ServeArgs) -> Result<()> {
    let server = match &args.llama_server {
        Some(path) => {
            // a relative name is a file of the current folder, not one in PATH
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let Some(server) = with::in_path(&path) else {
                bail!("there is no llama-server {} that can be run (--llama-server)", path.display());
            };
            server
        }
        // places of `make install`, and of `make server` beside the programs in the target folder
        None => with::beside(&["../lib/gvote/server/llama-server", "../server/bin/llama-server"])
            .or_else(|| with::in_path(Path::new("llama-server")))
            .context(
                "there is no llama-server beside gvote or in PATH: `make server` builds it, and --llama-server names another one",
            )?,
    };
    with::start(&args.plugin, &server, &args.rest)
}
