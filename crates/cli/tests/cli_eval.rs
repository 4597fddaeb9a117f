//! Tests of `gvote eval`, through the built program: needles that need no data, a text, a stopped run that continues, and reports.

#[path = "../../../tests/common/cli.rs"]
mod cli;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use cli::{Done, PROGRAM, document, finish, interrupt, model};
use serde_json::{Value, json};

fn gvote(args: &[&str]) -> Done {
    finish(Command::new(PROGRAM).args(args))
}

/// Three questions in one chat: rows dropped for one question are available for the next one, unless recall is off.
#[test]
fn the_turns_of_a_chat_meet_all_that_was_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("runs.jsonl");
    let model = model();
    let common = ["-t", "1", "-m", model.to_str().unwrap(), "--needle", "--needle-words", "250", "--limit", "1"];
    let configs = ["--config", "full", "--config", "half:ratio=0.5", "--config", "lossy:ratio=0.5,recall=off"];
    let out = ["-o", runs.to_str().unwrap()];
    let args = [&["eval", "turns"][..], &common, &configs, &out].concat();
    gvote(&args).ok();
    let measured = records(&runs);
    assert_eq!(measured.len(), 9);
    let of = |config: &str| -> Vec<[f64; 2]> {
        let turns: Vec<_> = measured.iter().filter(|record| record["config"] == config).collect();
        assert!((1..=3).all(|turn| turns[turn - 1]["task"] == format!("250 words, question {turn}")), "{turns:?}");
        turns.iter().map(|turn| ["tokens", "cells"].map(|field| turn[field].as_f64().unwrap())).collect()
    };
    assert!(of("full").iter().all(|[tokens, cells]| tokens == cells));
    // each vote on everything keeps half of the cells; without recall, half of those that earlier votes left
    assert!(of("half").iter().all(|[tokens, cells]| (cells / tokens - 0.5).abs() < 0.01), "{:?}", of("half"));
    assert!(of("lossy")[2][1] < 0.4 * of("half")[2][1], "{:?}", of("lossy"));

    let before = fs::read_to_string(&runs).unwrap();
    gvote(&args).ok();
    assert_eq!(fs::read_to_string(&runs).unwrap(), before, "there is nothing left to do");
    let few = [&["eval", "turns", "--questions", "9"][..], &common, &out].concat();
    let refused = gvote(&few);
    assert!(refused.status == 2 && refused.stderr.contains("--questions 9"), "{}", refused.stderr);
}

/// Rows that leave the cache of a task are lost as in `gvote run`, unless recall brings them back for the question.
#[test]
fn a_task_meets_what_was_set_aside_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let model = model();
    let of = |name: &str, more: &[&str]| -> Vec<Value> {
        let runs = folder.path().join(name);
        let args = ["eval", "tasks", "-t", "1", "-m", model.to_str().unwrap(), "--needle", "--needle-words", "250"];
        gvote(&[&args[..], &["--limit", "1", "-o", runs.to_str().unwrap()], more].concat()).ok();
        records(&runs)
    };
    let number = |record: &Value, field: &str| record[field].as_u64().unwrap();

    let few = ["plain:", "off:recall=off,", "auto:recall=auto,"].map(|name| format!("{name}ctx-size=200,ratio=1"));
    let few = of("few", &["--config", &few[0], "--config", &few[1], "--config", &few[2]]);
    assert_eq!([&few[0]["cells"], &few[0]["answer"]], [&few[1]["cells"], &few[1]["answer"]]);
    // the choice among all rows leaves a quarter of the cells free
    assert!(number(&few[2], "cells") <= 150 && number(&few[0], "cells") > 150, "{few:?}");

    let blind = of("blind", &["--blind", "--config", "off:ratio=0.5", "--config", "auto:ratio=0.5,recall=auto"]);
    let [off, auto] = [&blind[0], &blind[1]].map(|record| ["tokens", "cells"].map(|field| number(record, field)));
    assert!(
        auto[0] > off[0] && auto[1] > off[1],
        "a vote on the context, and one with the question: {off:?}, {auto:?}"
    );
    assert!(auto[1].abs_diff(auto[0] / 2) <= 1, "{auto:?}");
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
    let lines = fs::read_to_string(runs).unwrap();
    let measured = records(Path::new(runs));
    assert_eq!((measured.len(), lines.lines().count()), (3, 4));
    for record in &measured {
        let share = record["cells"].as_f64().unwrap() / record["tokens"].as_f64().unwrap();
        let expected = if record["config"] == "full" { 1.0 } else { 0.5 };
        assert!((share - expected).abs() < 0.01, "{record}");
    }

    let start: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(
        (&start["kind"], &start["seeds"], &start["command"][0]),
        (&"start".into(), &json!([0]), &"gvote".into())
    );
    assert!(
        start["command"].as_array().unwrap().iter().all(|word| !word.as_str().unwrap().starts_with('/')),
        "{start}"
    );
    assert_eq!(start["configs"][2], json!({"name": "keys", "settings": "policy=keydiff"}));

    // a second run has nothing left to do
    gvote(&args).ok();
    assert_eq!(std::fs::read_to_string(runs).unwrap(), lines);

    let page = folder.path().join("page.html");
    gvote(&["eval", "report", runs, "-o", page.to_str().unwrap()]).ok();
    assert!(std::fs::read_to_string(page).unwrap().contains("<svg"));
    let table = gvote(&["eval", "report", runs]).ok().stdout;
    assert!(["full", "half", "keys"].iter().all(|name| table.contains(name)), "{table}");

    // a killed run continues where it stopped, and a name keeps its settings
    let last = lines.trim_end().rfind('\n').unwrap() + 1;
    fs::write(runs, &lines[..last + 20]).unwrap();
    let done = gvote(&args).ok();
    assert!(done.stderr.contains("cut off"), "{}", done.stderr);
    assert_eq!(fs::read_to_string(runs).unwrap(), lines);
    let configs = ["--config", "half:ratio=0.4", "-o", runs];
    let refused = gvote(&[&args[..9], &configs].concat());
    assert!(
        refused.status == 1 && refused.stderr.contains("configuration half had other settings"),
        "{}",
        refused.stderr
    );
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
        "replayed:ratio=0.5,replay=true",
        "-o",
        runs.to_str().unwrap(),
    ])
    .ok();
    let kl = |name: &str| {
        let lines = std::fs::read_to_string(&runs).unwrap();
        let records = lines.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        records.filter(|r| r["config"] == name).map(|r| r["kl_mean"].as_f64().unwrap()).next().unwrap()
    };
    // a restored cache equals the original up to the order of sums
    assert!(kl("all") < 1e-4, "{}", kl("all"));
    assert!(kl("half") > kl("all"));
    assert!(kl("replayed") > kl("all"));
}

#[test]
fn unequal_budgets_are_compared_at_the_mean_and_at_what_they_cost() {
    let folder = tempfile::tempdir().unwrap();
    let (runs, file) = (folder.path().join("runs.jsonl"), document(4000));
    let text = ["-f", file.path().to_str().unwrap(), "-p", "256", "-n", "8", "--texts", "1", "-fa", "off"];
    let configs = ["real:policy=adakv", "mean:policy=adakv,exact=true", "paper:policy=gvote-paper,exact=true"];
    let configs = configs.iter().flat_map(|config| ["--config", config]);
    let args: Vec<&str> = text.into_iter().chain(configs).collect();
    let table = finish(&mut eval("text", &args, &runs)).ok().stdout;
    assert!(table.contains("mean (exact)") && !table.contains("real (exact)"), "{table}");
    let all = records(&runs);
    let number = |record: &Value, name: &str| record[name].as_f64().unwrap();
    let ragged = |record: &Value, name: &str| record["ragged"][name].as_f64().unwrap();
    let [real, mean, paper] = &all[..] else { panic!("three records") };
    assert_eq!((&real["exact"], &mean["exact"], &paper["exact"]), (&Value::Null, &true.into(), &true.into()));
    // the budgets are equal; a cache needs as many cells as the head that keeps most
    assert_eq!(real["ragged"], mean["ragged"]);
    assert_eq!((number(mean, "cells"), ragged(mean, "mean")), (128.0, 128.0));
    assert_eq!(number(real, "cells"), ragged(real, "max"));
    assert_eq!(number(paper, "cells"), ragged(paper, "mean").ceil());
    assert!(all.iter().all(|record| number(record, "kl_mean") > 0.0));

    // the mask also applies to the question, which is read after the vote
    let runs = folder.path().join("answers.jsonl");
    let needle =
        ["--needle", "--needle-words", "150", "--limit", "1", "--blind", "--config", "a:policy=adakv,exact=true"];
    let done = finish(&mut eval("tasks", &[&needle[..], &["-fa", "on"]].concat(), &runs));
    assert!(done.status == 1 && done.stderr.contains("-fa off"), "{}", done.stderr);
    finish(&mut eval("tasks", &[&needle[..], &["-fa", "off"]].concat(), &runs)).ok();
    assert_eq!(records(&runs).len(), 1);

    // unions of votes have no ranking in which to search for C*
    let paper = ["--needle", "--config", "paper:policy=gvote-paper,exact=true"];
    let done = finish(&mut eval("adaptivity", &[&paper[..], &["-fa", "off"]].concat(), &runs));
    assert!(done.status == 1 && done.stderr.contains("gvote-paper"), "{}", done.stderr);
}

#[test]
fn a_row_that_cannot_be_used_is_named_and_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let (ruler, runs) = (folder.path().join("4096"), folder.path().join("runs.jsonl"));
    fs::create_dir(&ruler).unwrap();
    let list = (1..80).map(|i| format!("{i}. {}", ["oak", "elm", "fir"][i % 3])).collect::<Vec<_>>().join(" ");
    let row = |input: String| json!({"input": input, "outputs": ["oak"], "answer_prefix": " Answer:"}).to_string();
    let cwe =
        row(format!("Memorize the words.\n{list}\nQuestion: What are the 10 most common words in the above list?"));
    let qa = row(format!(
        "Answer the question based on the given documents.\n\nDocument 1:\n{list}\n\nQuestion: Which tree?"
    ));
    fs::write(ruler.join("cwe.jsonl"), format!("{cwe}\n")).unwrap();
    fs::write(ruler.join("qa_1.jsonl"), format!("\u{feff}{qa}\r\n{{\"input\": 3}}\r\n")).unwrap();
    let args = ["--ruler", ruler.to_str().unwrap(), "--config", "full", "--blind"];
    let done = finish(&mut eval("tasks", &args, &runs)).ok();
    let tasks: Vec<_> = records(&runs).iter().map(|record| record["task"].clone()).collect();
    assert_eq!(tasks, ["cwe", "qa_1"]);
    for part in ["qa_1.jsonl:2: `input` is not a string", "1 row could not be used"] {
        assert!(done.stderr.contains(part), "{}", done.stderr);
    }

    fs::write(ruler.join("qa_1.jsonl"), "{}\n[]\n").unwrap();
    let args = ["--ruler", ruler.to_str().unwrap(), "--tasks", "qa_1"];
    let done = finish(&mut eval("tasks", &args, &runs));
    assert!(done.status == 1 && done.stderr.contains("none of the 2 rows can be used"), "{}", done.stderr);
}

/// Returns the records except the one for the start of the run.
fn records(runs: &Path) -> Vec<Value> {
    let lines = fs::read_to_string(runs).unwrap();
    lines.lines().map(|l| serde_json::from_str(l).unwrap()).filter(|r: &Value| r["kind"] != "start").collect()
}

/// `gvote eval SUB -m MODEL -t 1 ARGS -o RUNS`
fn eval(sub: &str, args: &[&str], runs: &Path) -> Command {
    let mut program = Command::new(PROGRAM);
    program.args(["eval", sub, "-t", "1", "-m"]).arg(model()).args(args).arg("-o").arg(runs);
    program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    program
}

#[test]
fn a_choice_is_measured_beside_the_fewest_cells_that_would_have_done() {
    let folder = tempfile::tempdir().unwrap();
    let (runs, file) = (folder.path().join("runs.jsonl"), document(4000));
    let text = ["--text", file.path().to_str().unwrap(), "-p", "300", "-n", "16", "--limit", "1"];
    let targets = ["--needle", "--needle-words", "150", "--target-kl", "0.01", "--target-ppl", "1.5"];
    let args = [&text[..], &targets, &["--config", "all:ratio=1", "--config", "bold:lost-mass=0.3"]].concat();
    finish(&mut eval("adaptivity", &args, &runs)).ok();
    let first = records(&runs);
    // two requests, two configurations, two targets
    assert_eq!(first.len(), 8);
    for r in &first {
        let number = |name: &str| r[name].as_f64().unwrap();
        let kept_all = r["config"] == "all";
        assert_eq!((number("cells") == number("tokens"), number("kl_mean") == 0.0), (kept_all, kept_all), "{r}");
        assert!(["narrative", "needle"].contains(&r["family"].as_str().unwrap()), "{r}");
        // C* and all larger measured numbers of cells reach the target; the next smaller one does not
        let curve: Vec<(f64, f64)> = serde_json::from_value(r["curve"].clone()).unwrap();
        let at = curve.iter().position(|(cells, _)| *cells == number("oracle_cells")).unwrap();
        assert!(curve[at..].iter().all(|(_, kl)| *kl <= number("target")), "{r}");
        assert!(at == 0 || curve[at - 1].1 > number("target"), "{r}");
        assert_eq!(*curve.last().unwrap(), (number("tokens"), 0.0));
    }
    // a looser target needs no more cells, and both configurations share the search
    for (i, strict) in first.iter().enumerate().step_by(2) {
        assert!(first[i + 1]["oracle_cells"].as_u64() <= strict["oracle_cells"].as_u64());
    }
    assert_eq!(first[0]["oracle_cells"], first[2]["oracle_cells"]);

    // another configuration reuses C*; nothing is measured twice
    let more = [&args[..], &["--config", "half:ratio=0.5"]].concat();
    let table = finish(&mut eval("adaptivity", &more, &runs)).ok().stdout;
    let all = records(&runs);
    assert_eq!((all.len(), &all[..8]), (12, &first[..]));
    assert_eq!(all[8]["oracle_cells"], first[0]["oracle_cells"]);
    assert!(table.contains("C/C*") && table.contains("half") && table.contains("by family"), "{table}");
}

#[test]
fn a_blind_request_is_compared_from_its_first_answered_token() {
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("runs.jsonl");
    let needle = ["--needle", "--needle-words", "150", "--limit", "1", "-n", "4", "--config", "half:ratio=0.5"];
    finish(&mut eval("adaptivity", &needle, &runs)).ok();
    finish(&mut eval("adaptivity", &[&needle[..], &["--blind"]].concat(), &runs)).ok();
    let all = records(&runs);
    assert_eq!((&all[0]["blind"], &all[1]["blind"]), (&false.into(), &true.into()));
    // with the question in sight, the full cache itself predicts the first token
    assert_eq!((&all[0]["steps"], &all[1]["steps"]), (&4.into(), &5.into()));
    assert!(all[1]["tokens"].as_u64() < all[0]["tokens"].as_u64());
}

#[test]
fn ctrl_c_leaves_whole_measurements_only() {
    let folder = tempfile::tempdir().unwrap();
    let (runs, file) = (folder.path().join("runs.jsonl"), document(8000));
    let text = ["--text", file.path().to_str().unwrap(), "-p", "300", "-n", "16", "--limit", "4"];
    let child = eval("adaptivity", &text, &runs).spawn().unwrap();
    while !fs::read_to_string(&runs).is_ok_and(|lines| lines.contains('\n')) {
        sleep(Duration::from_millis(20));
    }
    let (done, took) = interrupt(child);
    assert_eq!((done.status, done.stderr.trim()), (130, "gvote: cancelled"));
    assert!(took < Duration::from_secs(5), "{took:?}");
    let before = records(&runs);
    assert!(before.len() < 4);
    finish(&mut eval("adaptivity", &text, &runs)).ok();
    let after = records(&runs);
    assert_eq!((after.len(), &after[..before.len()]), (4, &before[..]));

    // a truncated answer is not scored
    let (story, runs) = (folder.path().join("story.jsonl"), folder.path().join("answers.jsonl"));
    fs::write(&story, r#"{"context": "Tell me a very long story in many chapters.", "answers": ["x"]}"#).unwrap();
    let args = ["--longbench", story.to_str().unwrap(), "--config", "full"];
    let child = eval("tasks", &args, &runs).spawn().unwrap();
    sleep(Duration::from_secs(3));
    let (done, _) = interrupt(child);
    assert_eq!((done.status, fs::read_to_string(&runs).unwrap().as_str()), (130, ""));
}

#[test]
fn nonsense_is_one_line() {
    for (args, status, part) in [
        (&["eval", "tasks", "-m", "x.gguf", "-o", "y"][..], 2, "--needle"),
        (&["eval", "text", "-m", "x.gguf", "-f", "/nowhere", "-o", "y"], 1, "/nowhere"),
        (&["eval", "tasks", "-m", "x.gguf", "--needle", "--config", "a:b", "-o", "y"], 2, "KEY=VALUE"),
        (&["eval", "adaptivity", "-m", "x.gguf", "-o", "y"], 2, "--text"),
        (&["eval", "adaptivity", "-m", "x.gguf", "--code", "/nowhere", "-o", "y"], 1, "/nowhere"),
        (&["eval", "adaptivity", "-m", "x.gguf", "--needle", "--target-kl", "0", "-o", "y"], 2, "above 0"),
        (&["eval", "adaptivity", "-m", "x.gguf", "--needle", "--target-ppl", "1", "-o", "y"], 2, "above 1"),
        (&["eval", "report", "/nowhere"], 1, "/nowhere"),
    ] {
        let Done { status: got, stderr, .. } = gvote(args);
        assert_eq!(got, status, "{stderr}");
        assert!(stderr.contains(part) && stderr.trim_end().lines().count() == 1, "{stderr}");
    }
}

/// The model's template adds a system message, and no task has its own.
#[test]
fn the_system_message_is_protected_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("runs.jsonl");
    let needle = ["--needle", "--needle-words", "150", "--limit", "1", "--config"];
    let with = |config: &str| finish(&mut eval("tasks", &[&needle[..], &[config]].concat(), &runs));
    // 4 sinks, 64 recent tokens, and the markers
    with("markers:protect=true,max-cells=100").ok();
    with("none:max-cells=75").ok();
    let refused = with("system:protect=true,max-cells=75");
    assert_eq!(refused.status, 1, "{}", refused.stderr);
    let number = |at: &str, text: &str| -> usize {
        let rest = &text[text.find(at).unwrap_or_else(|| panic!("{text}")) + at.len()..];
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    let protected = number("recent tokens and ", &refused.stderr);
    assert!(refused.stderr.contains("system: --max-cells is 75") && protected > 15, "{}", refused.stderr);
    // with so few cells, reading cannot start
    let refused = with("short:protect=true,ctx-size=100,ratio=1");
    assert_eq!(refused.status, 1);
    assert!(number("short: ctx-size is too few cells to go on in: ", &refused.stderr) > 100, "{}", refused.stderr);
}

#[test]
fn a_prompt_is_read_in_fewer_cells_than_it_has_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let [runs, other] = ["runs.jsonl", "adaptivity.jsonl"].map(|name| folder.path().join(name));
    let args = ["--needle", "--needle-words", "150", "--limit", "1", "--config", "small:ctx-size=192,ratio=1"];
    finish(&mut eval("tasks", &args, &runs)).ok();
    let measured = records(&runs);
    assert_eq!(measured.len(), 1);
    let number = |key: &str| measured[0][key].as_u64().unwrap();
    assert!(number("tokens") > 192 && (68..=192).contains(&number("cells")), "{}", measured[0]);

    // C* is searched in the full cache
    let done = finish(&mut eval("adaptivity", &args, &other));
    assert!(done.status == 1 && done.stderr.contains("small: ctx-size"), "{}", done.stderr);
}
