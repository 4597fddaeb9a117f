//! Tests of `gvote bench`, through the built program.

#[path = "../../../tests/common/cli.rs"]
mod cli;

use std::collections::HashMap;
use std::io::{BufReader, Read};

use cli::{Done, document, finish, gvote, interrupt};
use serde_json::Value;

/// Characters of a text for the longest test: about 400 tokens.
const CHARS: usize = 1600;
/// Bytes of K and V in a cell of SmolLM2-135M: 30 layers, 3 KV heads, 64 values of two bytes.
const BYTES_PER_CELL: u64 = 30 * 3 * 64 * 2 * 2;

const TESTS: [&str; 4] = ["pp32", "tg4", "pp32 @ d160", "tg4 @ d160"];
const POLICIES: [&str; 2] = ["full", "gvote"];

fn bench(args: &[&str]) -> Done {
    finish(&mut gvote("bench", args))
}

/// Runs a small benchmark on a real text.
fn small(format: &str) -> Done {
    let text = document(CHARS);
    let file = text.path().to_str().unwrap();
    let args = ["-p", "32", "-n", "4", "-d", "0,160", "-r", "2", "--policies", "full,gvote", "-f", file, "-o", format];
    let done = bench(&args).ok();
    assert_eq!(done.stderr, "", "nothing is left to say where there is no terminal");
    done
}

/// Returns every test under every policy, in llama-bench's order.
fn expected() -> Vec<(String, String)> {
    let pairs = TESTS.iter().flat_map(|test| POLICIES.map(|policy| (test.to_string(), policy.to_string())));
    pairs.collect()
}

fn names(rows: &[Value]) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    rows.iter().map(|row| (text(&row["test"]), text(&row["policy"]))).collect()
}

fn float(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(float).collect()
}

#[track_caller]
fn assert_close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-6 * b.abs().max(1e-3), "{a} is not {b}");
}

fn check(rows: &[Value]) {
    assert_eq!(names(rows), expected());
    for pair in rows.chunks(2) {
        let (full, gvote) = (&pair[0], &pair[1]);
        let rates = [full, gvote].map(|row| floats(&row["samples_ts"]));
        let ratios: Vec<f64> = rates[1].iter().zip(&rates[0]).map(|(gvote, full)| gvote / full).collect();
        // the median of two is their mean
        assert_close(float(&gvote["ratio_to_full"]), (ratios[0] + ratios[1]) / 2.0);
        assert_close(float(&full["ratio_to_full"]), 1.0);
    }
    for row in rows {
        let tokens = float(&row["n_prompt"]) + float(&row["n_gen"]);
        let (rates, times) = (floats(&row["samples_ts"]), floats(&row["samples_ns"]));
        assert_eq!((rates.len(), times.len()), (2, 2));
        for (rate, time) in rates.iter().zip(&times) {
            assert_close(*rate, 1e9 * tokens / time);
        }
        assert_close(float(&row["avg_ts"]), (rates[0] + rates[1]) / 2.0);
        assert_close(float(&row["stddev_ts"]), (rates[0] - rates[1]).abs() / 2_f64.sqrt());
        assert_eq!(row["n_threads"], 1);
        assert_eq!((&row["type_k"], &row["flash_attn"]), (&"f16".into(), &(-1).into()));
        assert!(row["model_type"].as_str().unwrap().contains("Q4_1"), "{row}");
        assert!(float(&row["model_n_params"]) > 1.3e8 && float(&row["model_size"]) > 8e7, "{row}");
        check_cells(row);
    }
}

fn check_cells(row: &Value) {
    let (depth, cells) = (row["n_depth"].as_u64().unwrap(), row["cells"].as_u64().unwrap());
    assert_eq!(row["kv_bytes_before"], depth * BYTES_PER_CELL);
    assert_eq!(row["kv_bytes"], cells * BYTES_PER_CELL);
    if depth == 0 {
        assert_eq!((cells, row["share_kept"].is_null(), row["vote_ms"].is_null()), (0, true, true), "{row}");
        return;
    }
    assert_close(float(&row["share_kept"]), cells as f64 / depth as f64);
    let read = float(&row["context_ms"]);
    assert!(read > 0.0);
    if row["policy"] == "full" {
        assert_eq!((cells, row["vote_ms"].is_null()), (depth, true), "{row}");
    } else {
        assert!(cells < depth, "{row}");
        let (vote, compaction) = (float(&row["vote_ms"]), float(&row["compact_ms"]));
        assert!(vote > 0.0 && compaction > 0.0, "{row}");
        assert_close(float(&row["share_of_prefill"]), (vote + compaction) / read);
    }
}

#[test]
fn jsonl_is_consistent() {
    check(&small("jsonl").json());
}

#[test]
fn json_is_an_array_of_the_same() {
    check(&serde_json::from_str::<Vec<Value>>(&small("json").stdout).unwrap());
}

#[test]
fn csv_has_a_row_a_test_and_policy() {
    let done = small("csv");
    let mut reader = csv::Reader::from_reader(done.stdout.as_bytes());
    let rows: Vec<HashMap<String, String>> = reader.deserialize().map(Result::unwrap).collect();
    let names: Vec<_> = rows.iter().map(|row| (row["test"].clone(), row["policy"].clone())).collect();
    assert_eq!(names, expected());
    for row in &rows {
        let number = |name: &str| row[name].parse::<f64>().unwrap();
        assert!(number("avg_ts") > 0.0 && number("ratio_to_full") > 0.0);
        assert!(number("cells") <= number("n_depth"));
        assert_eq!(row["vote_ms"].is_empty(), row["policy"] == "full" || number("n_depth") == 0.0);
    }
}

#[test]
fn the_table_has_llama_benchs_columns_and_more() {
    let done = small("md");
    let lines: Vec<Vec<&str>> =
        done.stdout.lines().map(|line| line.trim_matches('|').split('|').map(str::trim).collect()).collect();
    let column = |title: &str| lines[0].iter().position(|&t| t == title).unwrap_or_else(|| panic!("no column {title}"));
    for title in ["model", "size", "params", "threads", "vs full", "KV", "vote ms", "compact ms", "of prefill"] {
        column(title);
    }
    assert!(lines[1].iter().all(|cell| cell.trim_matches(['-', ':']).is_empty()));
    assert!(lines.iter().all(|line| line.len() == lines[0].len()), "{}", done.stdout);
    let (test, policy) = (column("test"), column("policy"));
    let names: Vec<_> = lines[2..].iter().map(|line| (line[test].to_owned(), line[policy].to_owned())).collect();
    assert_eq!(names, expected());
    for line in &lines[2..] {
        assert!(line[column("t/s")].contains(" ± "), "{line:?}");
        let is_deep = line[test].contains("@");
        assert_eq!(line[column("cells")].ends_with(" %)"), is_deep, "{line:?}");
        assert_eq!(line[column("KV")].contains(" -> "), is_deep && line[policy] == "gvote", "{line:?}");
    }
}

#[test]
fn the_table_of_full_alone_is_llama_benchs() {
    let done = bench(&["-p", "16", "-n", "0", "-r", "1", "--policies", "full"]).ok();
    let titles: Vec<_> = done.stdout.lines().next().unwrap().trim_matches('|').split('|').map(str::trim).collect();
    assert_eq!(titles, ["model", "size", "params", "threads", "policy", "test", "t/s"]);
    assert_eq!(done.stdout.lines().count(), 3, "-n 0 is no test: {}", done.stdout);
    assert!(done.stdout.contains(" pp16 "), "{}", done.stdout);
}

#[test]
fn lists_multiply() {
    let done = bench(&["-p", "8,16", "-n", "1,2", "-d", "0,8", "-r", "1", "--policies", "full", "-o", "jsonl"]).ok();
    let names: Vec<_> = names(&done.json()).into_iter().map(|name| name.0).collect();
    let expected = ["pp8", "pp16", "tg1", "tg2", "pp8 @ d8", "pp16 @ d8", "tg1 @ d8", "tg2 @ d8"];
    assert_eq!(names, expected);
}

#[test]
fn the_settings_of_a_vote_count() {
    let args = ["-p", "0", "-n", "1", "-d", "200", "-r", "1", "-o", "jsonl"];
    let capped = bench(&[&args[..], &["--max-cells", "100"]].concat()).ok();
    let rows = capped.json();
    assert_eq!(rows[0]["cells"], 200, "full has no cap");
    assert!(rows[1]["cells"].as_u64().unwrap() <= 100);
    assert_eq!(capped.stderr.lines().count(), 1, "{}", capped.stderr);
    assert!(capped.stderr.contains("-f"), "votes on random tokens: {}", capped.stderr);
}

#[test]
fn sequences_generate_together() {
    const MEMORY: u64 = 64 << 20;
    let text = document(CHARS);
    let file = text.path().to_str().unwrap();
    let args = ["-p", "0", "-n", "3", "-d", "160", "-npl", "1,3", "-r", "1", "-f", file, "--memory", "64M"];
    let rows = bench(&[&args[..], &["-o", "jsonl"]].concat()).ok().json();
    let expected =
        ["tg3 x1 @ d160", "tg3 x3 @ d160"].map(|test| POLICIES.map(|policy| (test.to_owned(), policy.to_owned())));
    assert_eq!(names(&rows), expected.concat());
    for row in &rows {
        let number = |name: &str| row[name].as_u64().unwrap_or_else(|| panic!("{name}: {row}"));
        let (sequences, cells) = (number("n_parallel"), number("cells"));
        assert_eq!(number("kv_bytes_total"), sequences * cells * BYTES_PER_CELL);
        assert_close(float(&row["avg_ts"]), 1e9 * (3 * sequences) as f64 / float(&row["avg_ns"]));
        assert_close(float(&row["avg_ts_sequence"]), float(&row["avg_ts"]) / sequences as f64);
        // one sequence needs 160 cells before its vote, the others the cells that are left plus those they generate
        let (all, most) = (MEMORY / BYTES_PER_CELL, (cells + 3).max(160));
        assert_eq!(number("sequences_fit"), 1 + (all - most) / (cells + 3));
        assert_eq!(cells < 160, row["policy"] == "gvote", "{row}");
    }
    let table = bench(&args).ok().stdout;
    for title in ["t/s each", "KV of all", "fit"] {
        assert!(table.lines().next().unwrap().contains(title), "{title}: {table}");
    }
}

#[test]
fn what_does_not_fit_is_told_and_the_rest_is_measured() {
    // 256 sequences of 256 cells take 1.4 GiB
    let mut program = std::process::Command::new("sh");
    program.args(["-c", "ulimit -v 1500000 && exec \"$@\"", "sh", cli::PROGRAM, "bench", "-m"]).arg(cli::model());
    program.args([
        "-t",
        "1",
        "-p",
        "0",
        "-n",
        "2",
        "-d",
        "32",
        "-npl",
        "256,2",
        "-r",
        "2",
        "--policies",
        "full",
        "-o",
        "jsonl",
    ]);
    let done = finish(&mut program).ok();
    assert_eq!(names(&done.json()), [("tg2 x2 @ d32".to_owned(), "full".to_owned())]);
    assert!(done.stderr.starts_with("tg2 x256 @ d32, full: llama.cpp cannot create a context"), "{}", done.stderr);
}

#[test]
fn nonsense_flags_are_a_usage_error() {
    let cases: [(&[&str], &str); 15] = [
        (&["--policies", "full,best"], "gvote-paper"),
        (&["--policies", "gvote,full,gvote"], "twice"),
        (&["-r", "0"], "--repetitions"),
        (&["-p", "0", "-n", "0"], "nothing to measure"),
        (&["-p", "many"], "--n-prompt"),
        (&["-n", "-4"], "--n-gen"),
        (&["-d", "1,,2"], "--n-depth"),
        (&["-d", "9000"], "-c 9512"),
        (&["-d", "100", "-c", "200"], "-c 612"),
        (&["-npl", "0"], "--n-parallel"),
        (&["-npl", "257"], "256"),
        (&["--memory", "8G"], "--n-parallel"),
        (&["-o", "xml"], "jsonl"),
        (&["--lost-mass", "2"], "--lost-mass"),
        (&["--policies", "full", "-ctk", "q9"], "q8_0"),
    ];
    for (args, hint) in cases {
        let done = bench(args);
        assert_eq!(done.status, 2, "{args:?}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(hint), "{args:?}: {}", done.stderr);
        assert_eq!(done.stdout, "", "{args:?}");
    }
}

#[test]
fn failures_are_one_line() {
    let text = document(40);
    let cases: [(&[&str], &str); 3] = [
        (&["-f", text.path().to_str().unwrap()], "give a longer one"),
        (&["-f", "/nowhere"], "No such file"),
        (&["-ctv", "q8_0", "-fa", "off", "-o", "json"], "flash attention"),
    ];
    for (args, why) in cases {
        let done = bench(args);
        assert_eq!(done.status, 1, "{args:?}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(why), "{args:?}: {}", done.stderr);
        assert_eq!(done.stdout, "", "{args:?}");
    }
}

#[test]
fn ctrl_c_leaves_the_rows_measured_so_far() {
    // the first test is short, the second would take minutes
    let args = ["-p", "8", "-n", "8000", "-r", "1", "--policies", "full", "--no-warmup", "-o", "json"];
    let mut child = gvote("bench", &args).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while !text.ends_with('}') {
        let mut byte = [0];
        stdout.read_exact(&mut byte).unwrap();
        text.push(byte[0] as char);
    }
    let (done, _) = interrupt(child);
    stdout.read_to_string(&mut text).unwrap();
    assert_eq!((done.status, done.stderr.trim()), (130, "gvote: cancelled"));
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(names(&rows), [("pp8".to_owned(), "full".to_owned())]);
}

#[test]
fn the_help_teaches() {
    let help = finish(std::process::Command::new(cli::PROGRAM).args(["bench", "--help"])).ok().stdout;
    let parts = [
        "Tests:",
        "Cache policy:",
        "Context and KV cache:",
        "Output:",
        "Examples:",
        "--policies",
        "[also: -fa]",
        "vs full",
    ];
    for part in parts {
        assert!(help.contains(part), "{part:?} is not in the help");
    }
}
