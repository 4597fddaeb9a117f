//! Tests of the program with a model that has recurrent layers.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[allow(dead_code)] // also used by other tests
#[path = "../../../src/tests/tiny.rs"]
mod tiny;

use std::path::Path;

use cli::{Done, bare, finish, finish_with};
use gvote::llama;

/// Returns a sub-command with these arguments and the model for `-m`.
fn with(command: &str, model: &Path, args: &[&str]) -> std::process::Command {
    bare(&[&[command, "-m", model.to_str().unwrap(), "-c", "256"], args].concat())
}

fn refused(done: &Done, reason: &str) {
    assert_eq!((done.status, done.stdout.as_str()), (1, ""), "{}", done.stderr);
    assert!(done.stderr.contains(reason) && done.stderr.contains("--policy full"), "{}", done.stderr);
}

#[test]
fn it_is_refused_with_the_reason_and_runs_as_it_is_under_the_full_policy() {
    const ANSWER: [&str; 5] = ["-n", "5", "--temp", "0", "--json"];
    let dir = tempfile::tempdir().unwrap();
    for (arch, reason) in [
        ("mamba", "it is recurrent and keeps no attention cache"),
        ("jamba", "it mixes recurrent and attention layers, a layout that is not supported yet"),
    ] {
        let model = tiny::recurrent(dir.path(), arch);
        let inspected = finish(&mut bare(&["inspect", model.to_str().unwrap()])).ok().stdout;
        assert!(inspected.contains(&format!("support     refused: {reason}")), "{inspected}");

        let prompt = ["-p", "What the thunder said"];
        for policy in [&[][..], &["--policy", "snapkv"]] {
            refused(&finish(&mut with("run", &model, &[&prompt, policy].concat())), reason);
        }
        let full = [&ANSWER[..], &["--policy", "full"]].concat();
        let done = finish(&mut with("run", &model, &[&prompt, &full[..]].concat())).ok().json();
        let cache =
            |record: &serde_json::Value| (record["cache"]["tokens"].as_u64(), record["cache"]["cells"].as_u64());
        assert_eq!(done[0]["decode"]["tokens"], 5, "{arch}: {}", done[0]);
        let tokens = prompt[1].len() as u64 + 5;
        assert_eq!(cache(&done[0]), (Some(tokens), Some(tokens)), "{arch}: {}", done[0]);

        // an answer cannot be removed from a recurrent state: the conversation is read again
        let said = "Hello.\n/regen\nAnd then?\n";
        refused(&finish_with(&mut with("chat", &model, &ANSWER), said), reason);
        let chat = [&full[..], &["--chat-template", "chatml"]].concat();
        let done = finish_with(&mut with("chat", &model, &chat), said).ok();
        assert!(done.stderr.contains("is read again"), "{arch}: {}", done.stderr);
        let turns = done.json();
        assert_eq!(turns.len(), 3, "{arch}: {turns:?}");
        assert_eq!(cache(&turns[0]), cache(&turns[1]), "{arch}");
        assert!(cache(&turns[2]) > cache(&turns[1]), "{arch}");
    }
}
