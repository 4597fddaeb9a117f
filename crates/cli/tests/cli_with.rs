//! Tests of `gvote with` and `gvote serve`: starting programs. The plugin itself is tested separately.

#[path = "../../../tests/common/cli.rs"]
mod cli;

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;

use cli::{Done, bare, finish};

/// An arbitrary file: the dynamic linker reports that it is not a library, and continues.
const PLUGIN: &str = concat!("--plugin=", env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");

/// Runs a script in a clean environment.
fn with(flags: &[&str], script: &str) -> Done {
    let mut command = bare(&[&["with", PLUGIN], flags, &["--", "sh", "-c", script]].concat());
    finish(command.env_clear().env("PATH", "/usr/bin:/bin"))
}

#[test]
fn the_program_gets_the_plugin_and_the_settings() {
    let dir = tempfile::tempdir().unwrap();
    let stats = dir.path().join("votes.jsonl");
    let flag = format!("--stats={}", stats.display());
    let flags = ["--preset=safe", "--vote=12", "--recall=off", "--sinks=5", "--recent=70", "--window=9", &flag];
    let mut variables: Vec<String> =
        with(&flags, "env | grep -E '^(GVOTE|LD_PRELOAD)'").ok().stdout.lines().map(str::to_owned).collect();
    variables.sort();
    let expected = [
        "GVOTE_PRESET=safe".into(),
        "GVOTE_RECALL=off".into(),
        "GVOTE_RECENT=70".into(),
        "GVOTE_SINKS=5".into(),
        format!("GVOTE_STATS={}", stats.display()),
        "GVOTE_VOTE=12".into(),
        "GVOTE_WINDOW=9".into(),
        format!("LD_PRELOAD={}/Cargo.toml", env!("CARGO_MANIFEST_DIR")),
    ];
    assert_eq!(variables, expected);
    assert!(stats.exists(), "what cannot be written is told before the program starts");
}

#[test]
fn other_preloaded_libraries_stay() {
    let mut command = bare(&["with", PLUGIN, "--", "sh", "-c", "echo $LD_PRELOAD"]);
    let done = finish(command.env("LD_PRELOAD", "libc.so.6")).ok();
    assert_eq!(done.stdout, format!("{}/Cargo.toml:libc.so.6\n", env!("CARGO_MANIFEST_DIR")));
}

#[test]
fn a_library_that_a_program_opens_itself_gets_the_plugin_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real");
    fs::create_dir_all(dir.path().join("gvote/python")).unwrap();
    fs::create_dir(&real).unwrap();
    let plugin = dir.path().join("libgvote-plugin.so");
    fs::write(&plugin, "").unwrap();
    let start = || {
        let flag = format!("--plugin={}", plugin.display());
        let mut command = bare(&["with", &flag, "--", "sh", "-c", "echo $LLAMA_CPP_LIB_PATH $LD_LIBRARY_PATH"]);
        finish(command.env("LLAMA_CPP_LIB_PATH", &real).env("LD_LIBRARY_PATH", "/other"))
    };
    let done = start().ok();
    assert_eq!(done.stdout, format!("{} /other\n", real.display()));
    assert!(done.stderr.contains("LLAMA_CPP_LIB_PATH stays as it is"), "{}", done.stderr);

    fs::write(dir.path().join("gvote/python/libllama.so"), "").unwrap();
    fs::write(real.join("libllama.so.0"), "").unwrap();
    let front = dir.path().canonicalize().unwrap().join("gvote/python");
    assert_eq!(start().ok().stdout, format!("{} {}:/other\n", front.display(), real.display()));

    fs::remove_file(real.join("libllama.so.0")).unwrap();
    fs::write(real.join("libllama.so.0.0.1"), "").unwrap();
    symlink("libllama.so.0.0.1", real.join("libllama.so.0")).unwrap();
    let done = start();
    assert_eq!(done.status, 1);
    assert!(done.stderr.contains("uses llama.cpp 0.0.1"), "{}", done.stderr);

    // a plugin that was built for that version
    symlink(real.join("libllama.so.0.0.1"), dir.path().join("gvote/libllama.so.0")).unwrap();
    start().ok();
}

#[test]
fn exit_status_and_signals_are_the_programs() {
    assert_eq!(with(&[], "exit 7").status, 7);
    let status = bare(&["with", PLUGIN, "--", "sh", "-c", "kill -TERM $$"]).status().unwrap();
    assert_eq!(status.signal(), Some(15));
}

#[test]
fn arguments_behind_the_program_are_its_own() {
    let done = finish(&mut bare(&["with", PLUGIN, "--", "echo", "-ngl", "--ratio", "7", "--", "-fa"])).ok();
    assert_eq!(done.stdout, "-ngl --ratio 7 -- -fa\n");
    let done = finish(&mut bare(&["serve", PLUGIN, "--llama-server=/bin/echo", "-m", "x", "-np", "4", "--ratio", "7"]));
    assert_eq!(done.ok().stdout, "-m x -np 4 --ratio 7\n");
}

#[test]
fn what_cannot_work_is_refused_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let none = format!("--plugin={}", dir.path().join("none.so").display());
    for (args, status, says) in [
        (&["with", "--", "true"][..], 1, "libgvote-plugin.so is not beside gvote"),
        (&["with", &none, "--", "true"], 1, "(--plugin)"),
        (&["with", PLUGIN], 2, "<PROGRAM>"),
        (&["with", PLUGIN, "--", "no-such-program"], 1, "no-such-program"),
        (&["with", PLUGIN, "--ratio=7", "--", "true"], 2, "--ratio is 7"),
        (&["with", PLUGIN, "--vote=soon", "--", "true"], 2, "--vote"),
        (&["with", PLUGIN, "--stats=/", "--", "true"], 1, "(--stats)"),
        (&["serve", PLUGIN, "--llama-server=/no/such/server"], 1, "(--llama-server)"),
        (&["serve", PLUGIN, "--llama-server=/etc/passwd"], 1, "(--llama-server)"),
    ] {
        // a copy in another folder has no libraries beside it
        let program = dir.path().join("gvote");
        fs::copy(cli::PROGRAM, &program).unwrap();
        let done = finish(std::process::Command::new(&program).args(args).env("PATH", "/usr/bin:/bin"));
        assert_eq!(done.status, status, "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(says), "{args:?}: {}", done.stderr);
        assert_eq!(done.stdout, "");
    }
}

#[test]
fn serve_finds_the_server_beside_gvote_or_in_the_path_or_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let [bin, server, path] = ["bin", "lib/gvote/server", "path"].map(|name| dir.path().join(name));
    for folder in [&bin, &server, &path] {
        fs::create_dir_all(folder).unwrap();
    }
    let program = bin.join("gvote");
    fs::copy(cli::PROGRAM, &program).unwrap();
    let start = || {
        let mut command = std::process::Command::new(&program);
        finish(command.args(["serve", PLUGIN, "hello"]).env("PATH", format!("{}:/usr/bin:/bin", path.display())))
    };
    let done = start();
    assert_eq!(done.status, 1);
    assert!(done.stderr.contains("`make server` builds it"), "{}", done.stderr);
    symlink("/bin/echo", path.join("llama-server")).unwrap();
    assert_eq!(start().ok().stdout, "hello\n");
    symlink("/bin/false", server.join("llama-server")).unwrap();
    assert_eq!(start().status, 1, "the one beside gvote comes first");
}
