//! `gvote with`: runs any program that uses llama.cpp's shared library, with the plugin preloaded.

use std::env;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueHint};
use gvote::policy::{Kind, Params, Preset};
use rustix::fs::{Access, access};

use super::Exit;
use super::args::named;
use super::words::note;

const EXAMPLES: &str = "\
Examples:
  gvote with -- llama-server -m model.gguf -c 32768 -np 4
  gvote with --preset safe --stats votes.jsonl -- llama-server -m model.gguf

The program is not changed: it finds libgvote-plugin.so before its own libllama.so. Each flag can be given as an environment
variable, too, to whatever starts the program: GVOTE_PRESET, GVOTE_STATS and so on. GVOTE=off switches gvote off.";

/// Run a program that uses llama.cpp with its contexts compressed by gvote
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct WithArgs {
    #[command(flatten)]
    plugin: PluginArgs,

    /// Program and its arguments, after --
    #[arg(last = true, required = true, value_name = "PROGRAM", value_hint = ValueHint::CommandWithArguments)]
    command: Vec<OsString>,
}

/// Settings passed to the plugin.
#[derive(Args)]
#[command(next_help_heading = "gvote")]
pub struct PluginArgs {
    /// Allowed deviation from the full cache in a trial: safe, balanced or aggressive [default: balanced]
    #[arg(long, value_name = "NAME", conflicts_with = "target_kl", value_parser = named(Preset::ALL, Preset::name))]
    preset: Option<Preset>,

    /// The same limit as a number: mean KL divergence from the full cache, in nats per token
    #[arg(long, value_name = "NATS")]
    target_kl: Option<f32>,

    /// Keep this share of the cells instead of the number a trial finds
    #[arg(long, value_name = "SHARE", conflicts_with_all = ["preset", "target_kl"])]
    ratio: Option<f32>,

    /// Number of first tokens that always stay (attention sinks)
    #[arg(long, value_name = "N")]
    sinks: Option<u32>,

    /// Number of last tokens that always stay; at least --window
    #[arg(long, value_name = "N")]
    recent: Option<u32>,

    /// Observation window: number of most recent real queries that vote
    #[arg(long, value_name = "N")]
    window: Option<u32>,

    /// When to vote. auto: once the answer is so long that fewer cells would have saved the time a vote takes; prompt: before the answer;
    /// N: after N tokens of the answer; never [default: auto]
    #[arg(long, value_name = "auto|prompt|never|N")]
    vote: Option<PluginVote>,

    /// What happens to rows that leave the cache. auto and ram: keep them in memory; FILE: in a new file of that name, deleted when the
    /// program ends; off: drop them [default: auto]
    #[arg(long, value_name = "auto|ram|off|FILE", value_hint = ValueHint::FilePath)]
    recall: Option<PathBuf>,

    /// Append one JSON object per vote to this file
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,

    /// Plugin library [default: libgvote-plugin.so beside gvote]
    #[arg(long, value_name = "FILE", env = "GVOTE_PLUGIN", hide_env_values = true)]
    plugin: Option<PathBuf>,
}

/// When the plugin votes, as the text that the plugin parses.
#[derive(Clone, Debug)]
struct PluginVote(String);

impl FromStr for PluginVote {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_known = ["auto", "prompt", "never"].contains(&text) || text.parse::<u32>().is_ok();
        if is_known { Ok(Self(text.into())) } else { Err("auto, prompt, never or a number of tokens is needed") }
    }
}

pub fn run(args: &WithArgs) -> Result<()> {
    let (program, rest) = args.command.split_first().context("name a program behind --")?;
    start(&args.plugin, Path::new(program), rest)
}

/// Replaces this process by the program, with the plugin preloaded.
///
/// # Errors
/// [`Exit::Usage`] for settings that cannot work. Also fails if the program or the plugin does not exist, or the program uses another
/// llama.cpp.
pub fn start(args: &PluginArgs, program: &Path, rest: &[OsString]) -> Result<()> {
    if !cfg!(target_os = "linux") {
        bail!("a library can be put before a program's own on Linux only");
    }
    args.check()?;
    let plugin = args.find()?;
    let path = in_path(program).with_context(|| format!("there is no program {}", program.display()))?;
    check_version(&path, &plugin)?;
    let mut command = Command::new(&path);
    command.args(rest).arg0(program).envs(args.variables()).envs(before_opened(&plugin)?);
    let mut libraries = plugin.into_os_string();
    if let Some(others) = env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        libraries.push(":");
        libraries.push(others);
    }
    let error = command.env("LD_PRELOAD", libraries).exec();
    Err(error).with_context(|| format!("cannot run {}", path.display()))
}

impl PluginArgs {
    /// Checks the settings as the library will read them.
    fn check(&self) -> Result<()> {
        let defaults = Params::new(Kind::Gvote);
        let number = |n: Option<u32>, default| n.map_or(default, |n| n as usize);
        let params = Params {
            target_kl: self.target_kl.or(defaults.target_kl),
            ratio: self.ratio,
            sinks: number(self.sinks, defaults.sinks),
            recent: number(self.recent, defaults.recent),
            window: number(self.window, defaults.window),
            ..defaults
        };
        params.validate().map_err(|e| Exit::Usage(e.to_string()))?;
        if let Some(path) = &self.stats {
            let opened = OpenOptions::new().create(true).append(true).open(path);
            opened.with_context(|| format!("cannot write {} (--stats)", path.display()))?;
        }
        Ok(())
    }

    /// Returns the environment variables for the given settings.
    fn variables(&self) -> Vec<(&'static str, OsString)> {
        let text = |value: &dyn ToString| OsString::from(value.to_string());
        let all = [
            ("GVOTE_PRESET", self.preset.map(|preset| text(&preset.name()))),
            ("GVOTE_TARGET_KL", self.target_kl.map(|x| text(&x))),
            ("GVOTE_RATIO", self.ratio.map(|x| text(&x))),
            ("GVOTE_SINKS", self.sinks.map(|n| text(&n))),
            ("GVOTE_RECENT", self.recent.map(|n| text(&n))),
            ("GVOTE_WINDOW", self.window.map(|n| text(&n))),
            ("GVOTE_VOTE", self.vote.as_ref().map(|vote| text(&vote.0))),
            ("GVOTE_RECALL", self.recall.as_ref().map(|path| path.clone().into_os_string())),
            ("GVOTE_STATS", self.stats.as_ref().map(|path| absolute(path).into_os_string())),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    fn find(&self) -> Result<PathBuf> {
        if let Some(path) = &self.plugin {
            return path
                .canonicalize()
                .with_context(|| format!("cannot open the plugin {} (--plugin)", path.display()));
        }
        // places of `make install`, and of `make plugin` beside the programs in the target folder
        beside(&["../lib/libgvote-plugin.so", "../plugin/libgvote-plugin.so"]).context(
            "libgvote-plugin.so is not beside gvote: `make plugin` builds it, and --plugin names another place",
        )
    }
}

/// Makes the path absolute, since a program may change its folder.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Returns the first of these files that exists, relative to the folder of this program.
pub fn beside(names: &[&str]) -> Option<PathBuf> {
    let exe = env::current_exe().and_then(|path| path.canonicalize()).ok()?;
    names.iter().filter_map(|name| exe.parent()?.join(name).canonicalize().ok()).find(|path| path.is_file())
}

/// Finds a program as a shell does.
pub fn in_path(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return is_program(program).then(|| program.to_owned());
    }
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders).map(|folder| folder.join(program)).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

/// Checks that the program loads the llama.cpp that the plugin was built for. A program that loads none itself cannot be checked; the
/// plugin checks the programs that it starts.
fn check_version(program: &Path, plugin: &Path) -> Result<()> {
    let listed = Command::new("ldd").arg(program).output().map(|output| output.stdout).unwrap_or_default();
    let Some(library) = llama_of(&String::from_utf8_lossy(&listed)) else {
        note(&format!(
            "{} loads no libllama.so itself: gvote can look after programs that it starts, and not after a llama.cpp that is built in",
            program.display()
        ));
        return Ok(());
    };
    check_library(&program.display().to_string(), &library, plugin)
}

fn check_library(user: &str, library: &Path, plugin: &Path) -> Result<()> {
    // beside the plugin lies the llama.cpp that it was built for
    let ours = version_of(&plugin.with_file_name("gvote").join(LIBRARY));
    let ours = ours.unwrap_or_else(|| env!("GVOTE_LLAMA_VERSION").into());
    match version_of(library) {
        Some(theirs) if theirs != ours => bail!(
            "{user} uses llama.cpp {theirs}, and the plugin was built for {ours}: `make plugin LLAMA=DIR` builds one for the llama.cpp in DIR"
        ),
        // if the file name has no version, the plugin asks the library
        _ => Ok(()),
    }
}

/// File name that programs are linked with.
const LIBRARY: &str = "libllama.so.0";

/// Returns the environment variables for programs that open `libllama.so` themselves. llama-cpp-python opens the one in the folder
/// `LLAMA_CPP_LIB_PATH`; it gets a library that puts the plugin before that one.
fn before_opened(plugin: &Path) -> Result<Vec<(&'static str, OsString)>> {
    const NAME: &str = "LLAMA_CPP_LIB_PATH";
    let Some(folder) = env::var_os(NAME).filter(|folder| !folder.is_empty()) else { return Ok(Vec::new()) };
    let library = Path::new(&folder).join(LIBRARY);
    let front = plugin.with_file_name("gvote").join("python");
    if !front.join("libllama.so").is_file() || !library.is_file() {
        note(&format!("{NAME} stays as it is: there is no {}, or nothing to put before it", library.display()));
        return Ok(Vec::new());
    }
    check_library(NAME, &library, plugin)?;
    let mut folders = vec![absolute(Path::new(&folder))];
    if let Some(others) = env::var_os("LD_LIBRARY_PATH") {
        folders.extend(env::split_paths(&others));
    }
    Ok(vec![("LD_LIBRARY_PATH", env::join_paths(folders)?), (NAME, front.into_os_string())])
}

/// Finds llama.cpp's library in the output of `ldd`.
fn llama_of(listed: &str) -> Option<PathBuf> {
    let line = listed.lines().map(str::trim).find(|line| line.starts_with("libllama.so"))?;
    let path = line.split_once(" => ")?.1.split(" (").next()?;
    path.starts_with('/').then(|| path.into())
}

/// Returns the version of a library: that in the name of the file behind all links, such as libllama.so.1.2.3.
fn version_of(library: &Path) -> Option<String> {
    let file = library.canonicalize().unwrap_or_else(|_| library.to_owned());
    let version = file.file_name()?.to_str()?.strip_prefix("libllama.so.")?;
    (version.split('.').count() == 3).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_and_its_version_are_read_from_ldd() {
        let listed = "\tlinux-vdso.so.1 (0x1)\n\tlibllama.so.0 => /opt/lib/libllama.so.0 (0x2)\n\tlibc.so.6 => /lib/libc.so.6 (0x3)\n";
        assert_eq!(llama_of(listed).as_deref(), Some(Path::new("/opt/lib/libllama.so.0")));
        assert_eq!(llama_of("\tlibllama.so.0 => not found\n"), None);
        assert_eq!(llama_of("\tnot a dynamic executable\n"), None);
        assert_eq!(version_of(Path::new("/opt/lib/libllama.so.1.2.3")).as_deref(), Some("1.2.3"));
        assert_eq!(version_of(Path::new("/opt/lib/libllama.so")), None);
        assert_eq!(version_of(Path::new("/opt/lib/libllama.so.0")), None);
    }
}
