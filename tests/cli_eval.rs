//! `gvote eval` through the built program: needles that need no data, a text, a stopped run that goes on, and reports.

#[path = "common/cli.rs"]
mod cli;

use std::process::Command;

use cli::{Done, PROGRAM, document, finish, model};

fn gvote(args: &[&str]) -> Done {
    finish(Command::new(PROGRAM).args(args))
}

#[test]
fn needles_are_scored_once_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("runs.jsonl");
    let (runs, model) = (runs.to_str().unwrap(), model());
    let args = ["eval", "tasks", "-m", model.to_str().unwrap(), "--needle", "--needle-words", "150", "--limit", "1"];
    let configs = ["--config", "full", "--config", "half:ratio=0.5", "--config", "keys:policy=keydiff", "-o", runs];
    let args = [&args[..], &configs].concat();
    let first = gvote(&args);
    first.ok();
    let lines = std::fs::read_to_string(runs).unwrap();
    let records: Vec<serde_json::Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(records.len(), 3);
    for record in &records {
        let share = record["cells"].as_f64().unwrap() / record["tokens"].as_f64().unwrap();
        let expected = if record["config"] == "full" { 1.0 } else { 0.5 };
        assert!((share - expected).abs() < 0.01, "{record}");
    }

    // the second time there is nothing left to do
    gvote(&args).ok();
    assert_eq!(std::fs::read_to_string(runs).unwrap(), lines);

    let page = folder.path().join("page.html");
    gvote(&["eval", "report", runs, "-o", page.to_str().unwrap()]).ok();
    assert!(std::fs::read_to_string(page).unwrap().contains("<svg"));
    let table = gvote(&["eval", "report", runs]).ok().stdout;
    assert!(["full", "half", "keys"].iter().all(|name| table.contains(name)), "{table}");
}

#[test]
fn a_text_is_compared_with_the_full_cache() {
    let folder = tempfile::tempdir().unwrap();
    let (runs, file) = (folder.path().join("runs.jsonl"), document(4000));
    let model = model();
    gvote(&[
        "eval",
        "text",
        "-m",
        model.to_str().unwrap(),
        "-f",
        file.path().to_str().unwrap(),
        "-p",
        "256",
        "-n",
        "8",
        "--texts",
        "1",
        "--config",
        "all:ratio=1",
        "--config",
        "half:ratio=0.5",
        "--config",
        "replayed:ratio=0.5,replay=1",
        "-o",
        runs.to_str().unwrap(),
    ])
    .ok();
    let kl = |name: &str| {
        let lines = std::fs::read_to_string(&runs).unwrap();
        let records = lines.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        records.filter(|r| r["config"] == name).map(|r| r["kl_mean"].as_f64().unwrap()).next().unwrap()
    };
    // a restored cache is the same cache up to the order of sums
    assert!(kl("all") < 1e-4, "{}", kl("all"));
    assert!(kl("half") > kl("all"));
    assert!(kl("replayed") > kl("all"));
}

#[test]
fn nonsense_is_one_line() {
    for (args, status, part) in [
        (&["eval", "tasks", "-m", "x.gguf", "-o", "y"][..], 2, "--needle"),
        (&["eval", "text", "-m", "x.gguf", "-f", "/nowhere", "-o", "y"], 1, "/nowhere"),
        (&["eval", "tasks", "-m", "x.gguf", "--needle", "--config", "a:b", "-o", "y"], 2, "KEY=VALUE"),
        (&["eval", "report", "/nowhere"], 1, "/nowhere"),
    ] {
        let Done { status: got, stderr, .. } = gvote(args);
        assert_eq!(got, status, "{stderr}");
        assert!(stderr.contains(part) && stderr.trim_end().lines().count() == 1, "{stderr}");
    }
}
