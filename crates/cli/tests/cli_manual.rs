//! Tests of `gvote completions` and `gvote man`, through the built program.

#[path = "../../../tests/common/cli.rs"]
mod cli;

use std::fs;
use std::process::Command;

use cli::{bare, finish};

const COMMANDS: [&str; 12] =
    ["run", "chat", "explain", "eval", "bench", "inspect", "plan", "with", "serve", "rpc-server", "completions", "man"];

fn output(args: &[&str]) -> String {
    finish(&mut bare(args)).ok().stdout
}

/// Returns bash's completions for these words, the last of which is incomplete.
fn complete(words: &[&str]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("gvote.bash");
    fs::write(&script, output(&["completions", "bash"])).unwrap();
    let list = words.join(" ");
    let (last, before) = (words[words.len() - 1], words[words.len() - 2]);
    let ask = format!(
        "source {}; COMP_WORDS=({list}); COMP_CWORD={}; _gvote gvote '{last}' '{before}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script.display(),
        words.len() - 1
    );
    let done = Command::new("bash").args(["--norc", "-c", &ask]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap().lines().map(Into::into).collect()
}

#[test]
fn bash_completes_commands_and_flags() {
    assert_eq!(complete(&["gvote", "ins"]), ["inspect"]);
    assert_eq!(complete(&["gvote", "inspect", "--met"]), ["--metadata"]);
    assert_eq!(complete(&["gvote", "plan", "--mem"]), ["--memory"]);
    assert_eq!(complete(&["gvote", "rpc"]), ["rpc-server"]);
    assert_eq!(complete(&["gvote", "chat", "--rp"]), ["--rpc"]);
    let presets = complete(&["gvote", "run", "--preset", ""]);
    assert_eq!(presets, ["safe", "balanced", "aggressive"]);
}

#[test]
fn every_shell_has_a_script_that_knows_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = output(&["completions", shell]);
        for word in COMMANDS.iter().chain(&["max-cells", "metadata", "target-kl"]) {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
    }
    let wrong = finish(&mut bare(&["completions", "tcsh"]));
    assert_eq!(wrong.status, 2);
    assert!(wrong.stderr.contains("bash") && wrong.stderr.lines().count() == 1, "{}", wrong.stderr);
}

#[test]
fn there_is_a_page_for_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("man1");
    output(&["man", "--out", out.to_str().unwrap()]);
    for command in COMMANDS {
        let page = fs::read_to_string(out.join(format!("gvote-{command}.1"))).unwrap();
        assert!(page.contains(&format!(".TH gvote-{command} 1")), "{page}");
        assert!(page.contains("Examples:") || command == "eval", "{command}: {page}");
    }
    let all = fs::read_to_string(out.join("gvote.1")).unwrap();
    assert_eq!(all, output(&["man"]));
    assert!(
        COMMANDS.iter().all(|command| all.contains(&format!("gvote\\-{}(1)", command.replace('-', "\\-")))),
        "{all}"
    );
    assert!(all.contains("Exit status: 0 done, 1 failed, 2 wrong flags"), "{all}");
    assert!(out.join("gvote-eval-tasks.1").exists());
}

#[test]
fn a_page_describes_every_flag() {
    let page = output(&["man", "run"]);
    let help = output(&["run", "--help"]);
    let flags: Vec<&str> = help
        .lines()
        // lines that are indented further are text of a description
        .filter(|line| line.find(|c| c != ' ').is_some_and(|indent| indent <= 6) && line.trim_start().starts_with('-'))
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with("--")))
        .collect();
    for flag in &flags {
        assert!(page.contains(&flag.replace('-', "\\-")), "{flag} is not in the page");
    }
    assert!(flags.len() > 40, "{flags:?}");
    assert!(page.contains("also: \\-ctk"), "the short spellings of llama.cpp");
    assert_eq!(output(&["man", "eval", "tasks"]).lines().nth(2).unwrap().split(' ').nth(1), Some("gvote-eval-tasks"));
}

#[test]
fn a_page_for_nothing_is_a_usage_error() {
    let done = finish(&mut bare(&["man", "dance"]));
    assert_eq!(done.status, 2);
    assert!(done.stderr.contains("\"dance\""), "{}", done.stderr);
    let done = finish(&mut bare(&["man", "--out", "/dev/null/here"]));
    assert_eq!(done.status, 1);
    assert!(done.stderr.contains("--out"), "{}", done.stderr);
}
