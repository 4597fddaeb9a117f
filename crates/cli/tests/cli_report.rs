//! Tests of `gvote eval report`, through the built program: every figure is recomputed from the records, in every format.

#[path = "../../../tests/common/cli.rs"]
mod cli;

use std::fs;
use std::path::Path;
use std::process::Command;

use cli::{Done, PROGRAM, finish};
use serde_json::{Value, json};
use tempfile::TempDir;

fn report(folder: &TempDir, args: &[&str]) -> Done {
    finish(Command::new(PROGRAM).current_dir(folder).args(["eval", "report"]).args(args))
}

fn read(folder: &TempDir, name: &str) -> String {
    fs::read_to_string(folder.path().join(name)).unwrap()
}

/// Returns numbers that look measured and are the same in every run.
fn noise(of: &str) -> f64 {
    let hash = of.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    (hash >> 11) as f64 / (1_u64 << 53) as f64
}

const TASKS: [&str; 3] = ["niah_single_1", "qa", "vt"];
const CONFIGS: [(&str, &str, f64); 3] = [("full", "full", 1.0), ("balanced", "gvote", 0.6), ("snap", "snapkv", 0.25)];
const ITEMS: usize = 7;
const SEEDS: usize = 2;

fn common(config: (&str, &str, f64), seed: usize, item: &str, tokens: usize, blind: bool) -> Value {
    let (name, policy, share) = config;
    let cells = (share * tokens as f64).round() as usize;
    json!({"model": "m.gguf", "cache_type": "f16/f16", "config": name, "policy": policy, "seed": seed, "item": item,
           "tokens": tokens, "cells": cells, "blind": blind})
}

fn with(mut record: Value, more: Value) -> Value {
    record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    record
}

/// Returns records of tasks in sight and blind, of texts, and of requests with a target.
fn records() -> Vec<Value> {
    let mut all = Vec::new();
    for config in CONFIGS {
        let seeds = if config.0 == "full" { 1 } else { SEEDS };
        for (seed, i) in (0..seeds).flat_map(|seed| (0..ITEMS).map(move |i| (seed, i))) {
            let tokens = 1000 + 37 * i;
            for (task, blind) in TASKS.iter().flat_map(|task| [(task, false), (task, true)]) {
                let item = format!("{task} {i}");
                let score = (4.0 * noise(&format!("{config:?}{seed}{item}{blind}"))).round() / 4.0;
                let answer =
                    json!({"kind": "task", "suite": "ruler/1024", "task": task, "score": score, "answer": "|<b>"});
                all.push(with(common(config, seed, &item, tokens, blind), answer));
            }
            if config.0 == "full" {
                continue;
            }
            let item = format!("text {i}");
            let kl = noise(&format!("{config:?}{seed}{item}")) / 20.0;
            let fidelity = json!({"kind": "fidelity", "steps": 64, "kl_mean": kl, "kl_median": kl / 2.0, "kl_p90": 2.0 * kl,
                                  "log_perplexity_ratio": kl - 0.02, "same_top": 1.0 - kl});
            all.push(with(common(config, seed, &item, tokens, false), fidelity));
            let needed = (tokens as f64 * (0.2 + 0.7 * noise(&item))) as usize;
            let spent = json!({"kind": "adaptivity", "family": "code", "steps": 64, "target": 0.02, "kl_mean": kl,
                               "log_perplexity_ratio": 0.0, "oracle_cells": needed});
            all.push(with(common(config, seed, &item, tokens, false), spent));
        }
    }
    all
}

fn start(settings: &str) -> Value {
    json!({"kind": "start", "command": ["gvote", "eval", "tasks", "-m", "m.gguf", "--config", "it's:ratio=0.5"],
           "version": "0.1.0", "llama_cpp": "0.9", "model": "m.gguf", "cache_type": "f16/f16", "cpu": "A CPU",
           "cpu_threads": 8, "threads": 4, "gpus": ["A GPU"], "seeds": [0, 1],
           "configs": [{"name": "balanced", "settings": settings}]})
}

fn write(path: &Path, records: &[Value]) {
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    fs::write(path, lines).unwrap();
}

fn fixture() -> (TempDir, Vec<Value>) {
    let (folder, records) = (tempfile::tempdir().unwrap(), records());
    write(&folder.path().join("a.jsonl"), &records);
    (folder, records)
}

/// Returns the samples of a configuration on RULER: task, item and the mean of a value over the seeds.
fn samples(records: &[Value], config: &str, blind: bool, value: fn(&Value) -> f64) -> Vec<(String, String, f64)> {
    let mut found: Vec<(String, String, Vec<f64>)> = Vec::new();
    for r in records.iter().filter(|r| r["kind"] == "task" && r["config"] == config && r["blind"] == blind) {
        let [task, item] = ["task", "item"].map(|name| r[name].as_str().unwrap().to_owned());
        match found.iter_mut().find(|(_, known, _)| *known == item) {
            Some((.., values)) => values.push(value(r)),
            None => found.push((task, item, vec![value(r)])),
        }
    }
    found.into_iter().map(|(task, item, values)| (task, item, mean(&values))).collect()
}

fn number(record: &Value, name: &str) -> f64 {
    record[name].as_f64().unwrap_or_else(|| panic!("{name} of {record}"))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn standard_error(values: &[f64]) -> f64 {
    let (n, mean) = (values.len() as f64, mean(values));
    (values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0) / n).sqrt()
}

#[track_caller]
fn close(reported: &Value, expected: f64) {
    let reported = reported.as_f64().unwrap_or_else(|| panic!("{reported} is no number"));
    assert!((reported - expected).abs() < 1e-9, "{reported} is reported, {expected} follows from the records");
}

#[test]
fn scores_and_differences_follow_from_the_records() {
    let (folder, records) = fixture();
    report(&folder, &["a.jsonl", "-o", "r.json"]).ok();
    report(&folder, &["a.jsonl", "-o", "r.csv"]).ok();
    report(&folder, &["a.jsonl", "-o", "r.md"]).ok();
    let (json, csv, md) = (read(&folder, "r.json"), read(&folder, "r.csv"), read(&folder, "r.md"));
    let json: Value = serde_json::from_str(&json).unwrap();
    let share = |r: &Value| number(r, "cells") / number(r, "tokens");
    for (table, blind) in [(&json["tasks"][0], false), (&json["tasks"][1], true)] {
        assert_eq!((&table["blind"], &table["tasks"]), (&blind.into(), &json!(TASKS)));
        for (place, (config, ..)) in CONFIGS.iter().enumerate() {
            let row = &table["rows"][place];
            assert_eq!((&row["config"], &row["n"]), (&json!(config), &json!(ITEMS * TASKS.len())));
            let score = |config: &str| samples(&records, config, blind, |r| number(r, "score"));
            let (mine, full) = (score(config), score("full"));
            let all: Vec<f64> = mine.iter().map(|(.., score)| *score).collect();
            let by_task = TASKS.map(|task| {
                mean(&mine.iter().filter(|(t, ..)| t == task).map(|(.., score)| *score).collect::<Vec<_>>())
            });
            close(&row["mean"], mean(&by_task));
            close(&row["standard_error"], standard_error(&all));
            let shares = samples(&records, config, blind, share).into_iter().map(|(.., share)| share);
            close(&row["share"], mean(&shares.collect::<Vec<_>>()));
            for (task, of_task) in by_task.iter().enumerate() {
                close(&row["scores"][task]["mean"], *of_task);
            }
            let differences: Vec<f64> = mine
                .iter()
                .map(|(_, item, score)| score - full.iter().find(|(_, other, _)| other == item).unwrap().2)
                .collect();
            if *config == "full" {
                assert!(row["difference"].is_null());
                continue;
            }
            let (mean_difference, error) = (mean(&differences), standard_error(&differences));
            close(&row["difference"]["mean"], mean_difference);
            close(&row["difference"]["standard_error"], error);
            let cell = format!("{:+.1} ± {:.1} |", 100.0 * mean_difference, 100.0 * error);
            let line = |line: &&str| line.starts_with(&format!("| {config}")) && line.contains(&cell);
            assert_eq!(md.lines().filter(line).count(), 1, "{cell}\n{md}");
            let start = format!("task,m.gguf,f16/f16,ruler/1024,{blind},{config},difference_to_full,");
            let line = csv.lines().find(|line| line.starts_with(&start)).unwrap();
            let value: f64 = line.split(',').nth(9).unwrap().parse().unwrap();
            close(&json!(value), mean_difference);
        }
    }
}

#[test]
fn fidelity_and_adaptivity_follow_from_the_records() {
    let (folder, records) = fixture();
    report(&folder, &["a.jsonl", "-o", "r.json"]).ok();
    let json: Value = serde_json::from_str(&read(&folder, "r.json")).unwrap();
    for (place, config) in ["balanced", "snap"].iter().enumerate() {
        let of = |kind: &str, value: &dyn Fn(&Value) -> f64| -> Vec<f64> {
            records.iter().filter(|r| r["kind"] == kind && r["config"] == *config).map(value).collect()
        };
        let row = &json["fidelity"][0]["rows"][place];
        assert_eq!((&row["config"], &row["n"]), (&json!(config), &json!(ITEMS * SEEDS)));
        for name in ["kl_mean", "kl_median", "kl_p90", "same_top"] {
            close(&row[name], mean(&of("fidelity", &|r| number(r, name))));
        }
        close(&row["perplexity_ratio"], mean(&of("fidelity", &|r| number(r, "log_perplexity_ratio"))).exp());

        let row = &json["adaptivity"][0]["rows"][place];
        let mut spent = of("adaptivity", &|r| number(r, "cells") / number(r, "oracle_cells"));
        spent.sort_by(f64::total_cmp);
        close(&row["overspend_median"], (spent[ITEMS - 1] + spent[ITEMS]) / 2.0);
        let missed = of("adaptivity", &|r| f64::from(number(r, "kl_mean") > number(r, "target")));
        close(&row["misses"], mean(&missed));
        // no smaller share has at most as many misses as the policy
        let needed = of("adaptivity", &|r| number(r, "oracle_cells") / number(r, "tokens"));
        let misses = |ratio: f64| needed.iter().filter(|needed| **needed > ratio).count();
        let allowed = missed.iter().sum::<f64>() as usize;
        let best = needed.iter().copied().filter(|ratio| misses(*ratio) <= allowed).fold(f64::MAX, f64::min);
        close(&row["fixed_same_misses"]["ratio"], best);
    }
}

#[test]
fn an_ablation_pairs_by_request_and_seed() {
    let (folder, records) = fixture();
    report(&folder, &["a.jsonl", "--baseline", "balanced", "-o", "r.json"]).ok();
    let json: Value = serde_json::from_str(&read(&folder, "r.json")).unwrap();
    let ablation = &json["ablation"];
    assert_eq!(ablation["baseline"], "balanced");
    let found: Vec<_> =
        ablation["comparisons"].as_array().unwrap().iter().map(|c| (&c["measure"], &c["blind"])).collect();
    let (score, kl, gap, no) = (json!("score"), json!("kl"), json!("gap"), json!(false));
    assert_eq!(found, [(&score, &no), (&score, &json!(true)), (&kl, &no), (&gap, &no)]);
    let of = |config: &str, item: &str, seed: usize, kind: &str, name: &str| {
        let is = |r: &&Value| {
            r["config"] == config && r["item"] == item && r["seed"] == seed && r["kind"] == kind && r["blind"] == false
        };
        number(records.iter().find(is).unwrap(), name)
    };
    let check = |row: &Value, items: &[String], value: &dyn Fn(&str, &str, usize) -> f64| {
        let difference =
            |item: &String| mean(&[0, 1].map(|seed| value("snap", item, seed) - value("balanced", item, seed)));
        let differences: Vec<f64> = items.iter().map(difference).collect();
        assert_eq!((&row["config"], &row["n"]), (&json!("snap"), &json!(items.len())));
        close(&row["difference"], mean(&differences));
        close(&row["standard_error"], standard_error(&differences));
    };
    let items: Vec<String> = TASKS.iter().flat_map(|task| (0..ITEMS).map(move |i| format!("{task} {i}"))).collect();
    check(&ablation["comparisons"][0]["rows"][1], &items, &|config, item, seed| {
        of(config, item, seed, "task", "score")
    });
    let texts: Vec<String> = (0..ITEMS).map(|i| format!("text {i}")).collect();
    check(&ablation["comparisons"][2]["rows"][0], &texts, &|config, item, seed| {
        of(config, item, seed, "fidelity", "kl_mean")
    });
    check(&ablation["comparisons"][3]["rows"][0], &texts, &|config, item, seed| {
        let number = |name: &str| of(config, item, seed, "adaptivity", name);
        (number("cells") / number("oracle_cells")).ln().abs()
    });
    // the full cache has one seed, which is compared with each of the baseline's
    let full = &ablation["comparisons"][0]["rows"][0];
    assert_eq!((&full["config"], &full["n"]), (&json!("full"), &json!(items.len())));

    let text = report(&folder, &["a.jsonl", "--baseline", "balanced"]).ok().stdout;
    assert!(text.contains("ABLATION") && text.contains("Differences to balanced (m.gguf"), "{text}");
    for out in ["r.md", "r.html", "r.csv"] {
        report(&folder, &["a.jsonl", "--baseline", "balanced", "-o", out]).ok();
    }
    assert!(read(&folder, "r.md").contains("\n## Ablation\n") && read(&folder, "r.html").contains("<h2>Ablation</h2>"));
    assert_eq!(read(&folder, "r.csv").lines().filter(|line| line.starts_with("ablation,")).count(), 6);
    let wrong = report(&folder, &["a.jsonl", "--baseline", "nobody"]);
    assert!(wrong.status == 2 && wrong.stderr.contains("full, balanced, snap"), "{}", wrong.stderr);
}

#[test]
fn several_files_are_one_and_what_is_known_of_the_runs_is_told() {
    let (folder, records) = fixture();
    let half = records.len() / 2;
    let path = |name: &str| folder.path().join(name);
    write(&path("first.jsonl"), &[&[start("policy=gvote,lost-mass=0.03")], &records[..half]].concat());
    write(&path("second.jsonl"), &[&[start("policy=gvote,lost-mass=0.03")], &records[half..]].concat());
    let both = [read(&folder, "first.jsonl"), read(&folder, "second.jsonl")].concat();
    fs::write(path("both.jsonl"), both).unwrap();
    let of = |files: &[&str]| report(&folder, files).ok().stdout;
    let apart = of(&["first.jsonl", "second.jsonl"]);
    assert_eq!(apart, of(&["both.jsonl"]));
    assert_eq!(apart, of(&["both.jsonl", "first.jsonl"]), "the same record twice is one record");
    assert!(apart.ends_with(&of(&["a.jsonl"])), "an old file says the same but for the runs");
    for told in ["seeds 0, 1; A CPU, 4 of 8 threads; A GPU; gvote 0.1.0, llama.cpp 0.9", r"'it'\''s:ratio=0.5'"] {
        assert!(apart.contains(told), "{told}: {apart}");
    }
    assert!(apart.contains("policy=gvote,lost-mass=0.03"), "{apart}");

    write(&path("other.jsonl"), &[start("policy=gvote,lost-mass=0.1")]);
    let warned = of(&["both.jsonl", "other.jsonl"]);
    assert!(
        warned.contains("differs between runs: policy=gvote,lost-mass=0.03; policy=gvote,lost-mass=0.1"),
        "{warned}"
    );

    fs::write(path("notes.md"), "## What did not work\n\nNothing.\n").unwrap();
    let args = ["both.jsonl", "--title", "A title", "--notes", "notes.md", "-o", "r.md"];
    report(&folder, &args).ok();
    let md = read(&folder, "r.md");
    assert!(md.starts_with("# A title\n\n## What did not work\n\nNothing.\n\n"), "{md}");
    assert!(md.contains("gvote eval report both.jsonl --title 'A title' --notes notes.md -o r.md\n"), "{md}");
    assert!(md.lines().all(|line| line.chars().count() <= 120), "{md}");
    let pipes = |line: &str| line.matches('|').count();
    let tables: Vec<Vec<&str>> =
        md.split("\n\n").map(|part| part.lines().filter(|l| l.starts_with('|')).collect()).collect();
    assert!(tables.iter().any(|table| table.len() > 2));
    assert!(tables.iter().all(|table| table.iter().all(|line| pipes(line) == pipes(table[0]))), "{md}");
}

#[test]
fn a_cut_off_last_line_is_left_out_with_a_note_and_a_broken_one_is_named() {
    let (folder, _) = fixture();
    let whole = read(&folder, "a.jsonl");
    let before = report(&folder, &["a.jsonl"]).ok();
    assert_eq!(before.stderr, "");
    fs::write(folder.path().join("a.jsonl"), format!("{whole}{}", &whole[..100])).unwrap();
    let after = report(&folder, &["a.jsonl"]).ok();
    assert_eq!(after.stdout, before.stdout);
    assert!(after.stderr.starts_with("a.jsonl: the last line is cut off"), "{}", after.stderr);
    fs::write(folder.path().join("a.jsonl"), format!("{whole}\n{}\n{whole}", &whole[..100])).unwrap();
    let broken = report(&folder, &["a.jsonl"]);
    let line = whole.lines().count() + 2;
    assert!(broken.status == 1 && broken.stderr.contains(&format!("a.jsonl:{line}: ")), "{}", broken.stderr);
}
