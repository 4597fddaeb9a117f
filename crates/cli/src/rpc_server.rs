//! `gvote rpc-server`: serves this machine's devices to clients on other machines.

use std::env;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::thread::available_parallelism;

use anyhow::{Context as _, Result};
use clap::Args;
use gvote::llama::rpc::{RpcError, Server, ServerParams};
use gvote::llama::{Device, exit, log};

use super::args::THREADS_MAX;
use super::table::labelled;
use super::turn::print;
use super::words::{bytes, note};
use super::{Exit, STATUS_CANCELLED};

const EXAMPLES: &str = "\
Examples:
  gvote rpc-server
  gvote rpc-server -H 192.168.1.7 -p 50052 -c
  gvote chat -m model.gguf --rpc 192.168.1.7:50052,192.168.1.8:50052

The server is llama.cpp's own and speaks with its programs too. It serves one client after another, until Ctrl-C.

WARNING: it has no password and no encryption, and whoever reaches the port can take over this
process. Never let it listen on an open network.";

/// Serve this machine's devices to gvote and llama.cpp on other machines (--rpc)
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct RpcServerArgs {
    /// IPv4 address to listen on; 0.0.0.0 = all networks of this machine
    #[arg(short = 'H', long, value_name = "HOST", default_value_t = Ipv4Addr::LOCALHOST)]
    host: Ipv4Addr,

    /// Port to listen on; 0 = any free port
    #[arg(short, long, value_name = "PORT", default_value_t = 50052)]
    port: u16,

    /// Devices to serve [default: the GPUs, or the CPU where there is none]
    #[arg(short, long, value_name = "DEVICE,...", value_delimiter = ',')]
    device: Vec<String>,

    /// Number of threads of the CPU device [default: half the cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=THREADS_MAX))]
    threads: Option<u16>,

    /// Cache large tensors in a folder, so that a model is not sent again: rpc in $LLAMA_CACHE or ~/.cache/llama.cpp
    #[arg(short, long)]
    cache: bool,
}

pub fn run(args: &RpcServerArgs) -> Result<()> {
    if !args.host.is_loopback() {
        warn(args.host);
    }
    let cache = args.cache.then(cache_folder).transpose()?;
    let n_threads = args.threads.map_or_else(half_the_cores, usize::from);
    let server = Server::new(&ServerParams {
        host: args.host,
        port: args.port,
        devices: args.device.clone(),
        n_threads,
        cache: cache.clone(),
    })
    .map_err(|error| match error {
        RpcError::Device { .. } => Exit::Usage(format!("--device: {error}")).into(),
        error => anyhow::Error::from(error),
    })?;
    ctrlc::set_handler(|| {
        note("stopped");
        exit(STATUS_CANCELLED);
    })?;
    let mut about = String::new();
    for device in server.devices() {
        about += &labelled("device", &in_words(device));
    }
    about += &labelled("threads", &n_threads.to_string());
    about += &labelled("cache", &cache.map_or_else(|| "none".into(), |path| path.display().to_string()));
    print(&about)?;
    let endpoint = labelled("endpoint", &server.address().to_string());
    let ended = server.run(move || {
        // stdout may be closed
        let _ = print(&endpoint);
        log::set_verbose(true);
    });
    Err(ended.into())
}

fn warn(host: Ipv4Addr) {
    let frame = "!".repeat(80);
    for line in [
        &frame,
        &format!("WARNING: listening on {host}, where other machines can connect."),
        "Never expose this server to an open network: it has no password and no",
        "encryption, and whoever reaches the port can take over this process.",
        &frame,
    ] {
        note(line);
    }
}

fn in_words(device: &Device) -> String {
    let memory = device.memory().map_or_else(String::new, |memory| {
        format!(" ({}, {} free)", bytes(memory.total, memory.total), bytes(memory.free, memory.free))
    });
    format!("{}: {}{memory}", device.name, device.description)
}

fn half_the_cores() -> usize {
    available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}

/// Returns llama.cpp's folder for cached tensors; creates it if necessary.
fn cache_folder() -> Result<PathBuf> {
    let by_name = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let by_home = || {
        let caches = if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" };
        let home = || Some(env::home_dir()?.join(caches));
        let caches = if cfg!(target_os = "macos") { home() } else { by_name("XDG_CACHE_HOME").or_else(home) };
        Some(caches?.join("llama.cpp"))
    };
    let folder = by_name("LLAMA_CACHE").or_else(by_home).context("there is no home folder: set LLAMA_CACHE")?;
    let folder = folder.join("rpc");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {} (-c)", folder.display()))?;
    Ok(folder)
}
