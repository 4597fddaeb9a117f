//! A program in C that knows llama.h and nothing of gvote: what it gets with the plugin, and what without.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use common::{folder, model, plugin, run};

/// The program, linked with the shared llama.cpp that the plugin was built for.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("api");
        let libraries = folder().join("gvote");
        run(Command::new("gcc")
            .args(["-std=c11", "-Wall", "-Wextra", "-Werror"])
            .arg(format!("-I{}", folder().join("include").display()))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/api.c"))
            .arg("-o")
            .arg(&program)
            .arg(format!("-L{}", libraries.display()))
            .args(["-lllama", "-lggml", "-lggml-base"])
            .arg(format!("-Wl,-rpath,{}", libraries.display())));
        program
    })
}

/// What the program printed, and what of stderr is gvote's.
struct Done {
    is_ok: bool,
    stdout: String,
    gvote: Vec<String>,
}

fn start(cache: &str, variables: &[(&str, &str)]) -> Done {
    start_in(tempfile::tempdir().unwrap().path(), cache, variables)
}

/// The same with files in a folder that lasts.
fn start_in(dir: &Path, cache: &str, variables: &[(&str, &str)]) -> Done {
    let mut command = Command::new(program());
    command.arg(model()).arg(dir).arg(cache).envs(variables.iter().copied());
    done(command)
}

fn done(mut command: Command) -> Done {
    let output = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let is_ok = output.status.success();
    let gvote = stderr.lines().filter(|line| line.starts_with("gvote: ")).map(str::to_owned).collect();
    Done { is_ok, stdout: stdout.into_owned(), gvote }
}

fn without(cache: &str) -> String {
    let done = start(cache, &[]);
    assert!(done.is_ok && done.gvote.is_empty(), "{}", done.stdout);
    done.stdout
}

fn with(cache: &str, variables: &[(&str, &str)]) -> Done {
    let plugin = plugin();
    start(cache, &[&[("LD_PRELOAD", plugin.to_str().unwrap())], variables].concat())
}

/// Half of the cells go in the middle of each answer.
const VOTES: [(&str, &str); 2] = [("GVOTE_VOTE", "8"), ("GVOTE_RATIO", "0.5")];

#[test]
fn where_nothing_is_voted_on_every_byte_is_the_same() {
    let plain = without("unified");
    assert_eq!(with("unified", &[("GVOTE_VOTE", "never")]).stdout, plain);
    let off = with("unified", &[("GVOTE", "off")]);
    assert_eq!(off.stdout, plain);
    assert!(off.gvote.is_empty(), "{:?}", off.gvote);
}

#[test]
fn what_a_program_does_after_votes_gives_what_it_gives_without() {
    for cache in ["unified", "apart"] {
        let dir = tempfile::tempdir().unwrap();
        let stats = dir.path().join("stats");
        let done = with(cache, &[&VOTES[..], &[("GVOTE_STATS", stats.to_str().unwrap())]].concat());
        let votes = done.gvote.iter().filter(|line| line.contains(" -> ")).count();
        assert_eq!((votes, done.gvote.len()), (4, 5), "four answers, and the context: {:?}", done.gvote);
        let plain = without(cache);
        assert_ne!(done.stdout, plain, "the votes made a difference");
        let same = |text: &str| -> Vec<String> {
            text.lines().filter(|line| line.starts_with("same")).map(str::to_owned).collect()
        };
        assert_eq!(same(&done.stdout), same(&plain), "{cache}");
        assert!(same(&plain).len() > 25);

        let lines: Vec<serde_json::Value> =
            fs::read_to_string(stats).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), votes);
        assert_eq!(
            (&lines[0]["sequence"], &lines[0]["tokens"], &lines[0]["answer_tokens"]),
            (&0.into(), &608.into(), &8.into())
        );
        assert_eq!((&lines[0]["cells_before"], &lines[0]["cells_after"]), (&608.into(), &304.into()));
        assert_eq!(lines[3]["sequence"], 1);
    }
}

#[test]
fn a_saved_sequence_is_read_by_a_program_without_the_plugin() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = plugin();
    let done = start_in(dir.path(), "unified", &[&[("LD_PRELOAD", plugin.to_str().unwrap())], &VOTES[..]].concat());
    assert!(done.is_ok, "{}", done.stdout);
    assert_eq!(start_in(dir.path(), "read", &[]).stdout, "read: 1\nread: positions 0 to 624\n");
}

#[test]
fn without_recall_a_cut_inside_is_refused_and_the_first_position_that_can_be_cut_is_told() {
    let done = with("unified", &[&VOTES[..], &[("GVOTE_RECALL", "off")]].concat());
    let line = |label: &str| done.stdout.lines().find(|line| line.starts_with(label)).unwrap().to_owned();
    assert_eq!(line("same cut: positions"), "same cut: positions 544 to 599", "what of the prompt is still exact");
    assert!(!done.is_ok, "this program goes on as if nothing had been refused, and llama.cpp says no");
    assert_eq!(line("same cut inside:"), "same cut inside: 0", "{}", done.stdout);
    assert!(done.gvote.iter().any(|line| line.contains("not cut: position 300 lies inside")), "{:?}", done.gvote);
}

#[test]
fn a_setting_that_makes_no_sense_leaves_the_program_alone() {
    let plain = without("unified");
    for (variable, says) in [
        (("GVOTE_RATIO", "half"), "gvote: off: GVOTE_RATIO=half: use a number"),
        (("GVOTE_RATIO", "7"), "gvote: a context stays as it is: "),
    ] {
        let done = with("unified", &[variable]);
        assert_eq!(done.stdout, plain);
        assert_eq!(done.gvote.len(), 1, "{:?}", done.gvote);
        assert!(done.gvote[0].starts_with(says), "{:?}", done.gvote);
    }
}

/// A program that opens the library itself, and asks it alone.
fn python(library: &str, variables: &[(&str, &str)]) -> Done {
    let mut command = Command::new("python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/api.py")).arg(folder().join(library));
    command.arg(folder().join("include/llama.h")).arg(model()).envs(variables.iter().copied());
    done(command)
}

#[test]
fn a_library_that_is_opened_at_run_time_has_the_plugin_before_it() {
    let plain = python("gvote/libllama.so", &[]);
    assert!(plain.is_ok && plain.gvote.is_empty(), "{:?}", plain.gvote);
    assert_eq!(python("gvote/python/libllama.so", &[("GVOTE_VOTE", "never")]).stdout, plain.stdout);

    let voted = python("gvote/python/libllama.so", &VOTES);
    assert!(voted.gvote.last().is_some_and(|line| line.contains(" -> ")), "{:?}", voted.gvote);
    let (lines, plain_lines): (Vec<&str>, Vec<&str>) = (voted.stdout.lines().collect(), plain.stdout.lines().collect());
    assert_eq!(lines.len(), 4);
    for (line, plain) in lines.iter().zip(plain_lines) {
        assert_eq!(line == &plain, line.starts_with("same"), "{line}");
    }
}

#[test]
fn a_program_without_llama_cpp_does_not_notice() {
    let mut command = Command::new("sh");
    let output = command.args(["-c", "echo fine"]).env("LD_PRELOAD", plugin()).output().unwrap();
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"fine\n"[..], &b""[..]));
}
