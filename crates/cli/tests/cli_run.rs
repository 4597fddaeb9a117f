//! Tests of `gvote run`, through the built program.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/zeros.rs"]
mod zeros;

use std::fs;
use std::io::{Read, Write};
use std::thread::sleep;
use std::time::Duration;

use cli::{Done, document, finish, finish_with, gvote, hang_up, interrupt, model};
use serde_json::Value;
use zeros::Zeros;
use zeros::file::Value::{Bool, Text};

/// Characters of a document long enough for a vote: about 650 tokens.
const CHARS: usize = 2600;

fn run(args: &[&str]) -> Done {
    finish(&mut gvote("run", args))
}

fn json(args: &[&str]) -> Value {
    let done = run(&[args, &["--json"]].concat()).ok();
    let mut records = done.json();
    assert_eq!(records.len(), 1, "one object and nothing else: {}", done.stdout);
    records.remove(0)
}

fn on_document(args: &[&str]) -> Value {
    let document = document(CHARS);
    let file = document.path().to_str().unwrap();
    // so short a text is at the limit of what a trial gives up: with some seeds all of it stays
    json(&[&["-f", file, "-n", "8", "--temp", "0", "--gvote-seed", "4"], args].concat())
}

/// Runs on the document with the vote before the answer.
fn voted_first(args: &[&str]) -> Value {
    on_document(&[&["--vote", "prompt"], args].concat())
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a number: {value}"))
}

#[test]
fn an_answer_that_may_go_past_the_trained_context_is_announced() {
    let args = ["-p", "Say hello.", "-c", "256", "--temp", "0"];
    let note = "that the model was trained for";
    let done = run(&[&args[..], &["-n", "9000"]].concat()).ok();
    assert!(done.stderr.contains("an answer of 9,000 tokens may go past the 8,192 that"), "{}", done.stderr);
    for n in ["8", "-1"] {
        assert!(!run(&[&args[..], &["-n", n]].concat()).ok().stderr.contains(note), "-n {n}");
    }
}

#[test]
fn answers_on_stdout_and_reports_on_stderr() {
    let document = document(CHARS);
    let file = document.path().to_str().unwrap();
    let args = ["-f", file, "-p", "What is this about?", "-n", "8", "--temp", "0"];
    let done = run(&[&args[..], &["--vote", "prompt"]].concat()).ok();
    assert!(!done.stdout.trim().is_empty());
    assert!(done.stdout.ends_with('\n'));
    assert!(!done.stdout.contains("What is this about?"), "the prompt is not repeated");
    for part in ["prompt    ", " -> ", "% kept, fewest of ", "of KV", " compaction (", "answer    8 tokens"] {
        assert!(done.stderr.contains(part), "{part:?} is not in {}", done.stderr);
    }
    assert!(!done.stderr.contains('\x1b'), "colours only on a terminal");
    let short = run(&args).ok().stderr;
    assert!(short.contains("vote      none: the answer was too short for one to pay"), "{short}");
    let full = run(&[&args[..], &["--policy", "full"]].concat()).ok().stderr;
    assert!(full.contains("cache     ") && !full.contains("vote"), "{full}");
}

#[test]
fn unequal_heads_cost_the_cells_of_the_greediest() {
    let document = document(CHARS);
    let args =
        ["-f", document.path().to_str().unwrap(), "-n", "1", "--temp", "0", "--policy", "adakv", "--ratio", "0.3"];
    let vote = json(&args)["vote"].take();
    let mean = vote["ragged"]["mean"].as_f64().unwrap() / vote["cells_before"].as_f64().unwrap();
    assert!((mean - 0.3).abs() < 0.01, "{vote}");
    assert_eq!(vote["cells_after"], vote["ragged"]["max"]);
    assert!(vote["ragged"]["max"].as_f64() > vote["ragged"]["mean"].as_f64(), "{vote}");
    let said = run(&args).ok().stderr;
    assert!(said.contains("as many as the greediest head takes; the heads by themselves"), "{said}");
}

fn answer(report: &Value) -> String {
    report["answer"].as_str().unwrap().to_owned()
}

#[test]
fn a_short_answer_is_the_full_cache_s_and_pays_for_no_vote() {
    let long = |args: &[&str]| {
        let document = document(CHARS);
        json(&[&["-f", document.path().to_str().unwrap(), "-n", "32", "--temp", "0", "--ignore-eos"], args].concat())
    };
    let (report, full) = (long(&[]), long(&["--policy", "full"]));
    assert!(report["vote"].is_null() && report["unvoted"].is_null(), "{report}");
    assert_eq!(number(&report["decode"]["tokens"]), 32);
    assert_eq!(number(&report["cache"]["cells"]), number(&report["prefill"]["tokens"]) + 32);
    assert_eq!(answer(&report), answer(&full));
}

#[test]
fn what_asks_for_cells_or_a_second_reading_votes_before_the_answer() {
    for args in
        [&["--ratio", "0.5"][..], &["--replay"], &["--max-cells", "300"], &["--vote", "auto", "--max-cells", "300"]]
    {
        let report = on_document(args);
        assert_eq!(number(&report["vote"]["after_tokens"]), 0, "{args:?}");
        assert_eq!(report["vote"]["cells_before"], report["prefill"]["tokens"], "{args:?}");
    }
    for args in [&["--max-cells", "4000"][..], &["--vote", "auto", "--ratio", "0.5"]] {
        assert!(on_document(args)["vote"].is_null(), "{args:?}");
    }
}

/// If there is no cell for the next token, the vote comes early and the answer continues with fewer cells.
#[test]
fn a_full_cache_brings_the_vote_forward() {
    let document = document(CHARS);
    let file = document.path().to_str().unwrap();
    let tokens = number(&json(&["-f", file, "-n", "1"])["prefill"]["tokens"]);
    let cells = (tokens + 5).to_string();
    let args = ["-f", file, "-n", "12", "--temp", "0", "--ignore-eos", "--target-kl", "0.5", "-c", &cells];
    let report = json(&args);
    assert_eq!(number(&report["vote"]["after_tokens"]), 5, "{report}");
    assert!(number(&report["vote"]["cells_after"]) < tokens, "{report}");
    assert_eq!(number(&report["decode"]["tokens"]), 12);
    assert_eq!(number(&report["decode"]["squeezes"]["count"]), 0);
}

#[test]
fn the_times_of_an_answer_are_told() {
    let report = on_document(&["--ignore-eos"]);
    let timeline = report["decode"]["timeline"].as_array().unwrap();
    let tokens: Vec<_> = timeline.iter().map(|point| number(&point["tokens"])).collect();
    assert_eq!(tokens, [1, 2, 4, 8]);
    let seconds = timeline.iter().map(|point| point["seconds"].as_f64().unwrap());
    assert!(seconds.clone().is_sorted());
    assert!(seconds.min_by(f64::total_cmp).unwrap() >= report["prefill"]["seconds"].as_f64().unwrap());
}

/// The answer before the vote is the full cache's, and an answer that ends before the vote has none.
#[test]
fn an_answer_may_be_voted_on_once_it_has_begun() {
    let full = on_document(&["--policy", "full"]);
    let report = on_document(&["--vote", "4"]);
    let vote = &report["vote"];
    assert_eq!(number(&vote["after_tokens"]), 4);
    assert_eq!(number(&vote["cells_before"]), number(&report["prefill"]["tokens"]) + 4);
    let same = answer(&report).chars().zip(answer(&full).chars()).take_while(|(a, b)| a == b).count();
    assert!(same >= 4, "{report}");
    let short = on_document(&["--vote", "auto"]);
    assert!(short["vote"].is_null());
    assert_eq!(answer(&short), answer(&full));

    let refused = gvote("run", &["-p", "Hi", "--vote", "soon"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--vote"));
}

#[test]
fn json_is_consistent() {
    let report = voted_first(&["--target-kl", "0.5"]);
    let (vote, cache) = (&report["vote"], &report["cache"]);
    let (before, after) = (number(&vote["cells_before"]), number(&vote["cells_after"]));
    let per_cell = number(&cache["bytes_per_cell"]);
    assert_eq!(before, number(&report["prefill"]["tokens"]));
    assert!(after < before, "{after} of {before}");
    assert_eq!(vote["bound"], "trial");
    assert_eq!(number(&vote["kv_bytes_before"]), before * per_cell);
    assert_eq!(number(&vote["kv_bytes_after"]), after * per_cell);
    assert!((vote["share_kept"].as_f64().unwrap() - after as f64 / before as f64).abs() < 1e-9);
    let answered = number(&report["decode"]["tokens"]);
    assert!(answered <= 8);
    assert_eq!(number(&cache["cells"]), after + answered);
    assert_eq!(number(&cache["kv_bytes"]), (after + answered) * per_cell);
    assert_eq!(number(&cache["tokens"]), before + answered);
    assert!(vote["vote_seconds"].as_f64().unwrap() > 0.0);
    assert!(!report["answer"].as_str().unwrap().is_empty());
}

#[test]
fn json_leaves_stderr_alone() {
    let done = run(&["-p", "Hi", "-n", "2", "--json"]).ok();
    assert_eq!(done.stderr, "");
}

#[test]
fn the_same_seed_gives_the_same_answer() {
    let answer = |seed| json(&["-p", "Tell me a story.", "-n", "24", "--temp", "1.5", "-s", seed])["answer"].clone();
    let first = answer("7");
    assert_eq!(first, answer("7"));
    assert_ne!(first, answer("8"));
}

#[test]
fn a_random_seed_is_reported_and_repeats() {
    let args = ["-p", "Tell me a story.", "-n", "16", "--temp", "1.5", "-s"];
    let first = json(&[&args[..], &["-1"]].concat());
    let seed = number(&first["seed"]).to_string();
    assert_eq!(json(&[&args[..], &[&seed]].concat())["answer"], first["answer"]);
}

#[test]
fn policy_full_keeps_every_cell() {
    let vote = &voted_first(&["--policy", "full"])["vote"];
    assert_eq!(vote["cells_after"], vote["cells_before"]);
    assert_eq!(vote["kv_bytes_after"], vote["kv_bytes_before"]);
    assert_eq!(vote["bound"], "all");
}

#[test]
fn max_cells_is_never_exceeded() {
    for evict in ["composite", "cells"] {
        let vote = &on_document(&["--max-cells", "150", "--evict", evict])["vote"];
        assert!(number(&vote["cells_after"]) <= 150, "{vote}");
        assert_eq!(vote["bound"], "max-cells");
    }
}

#[test]
fn presets_and_target_kl_set_the_same_thing() {
    let safe = voted_first(&["--preset", "safe"]);
    assert_eq!(safe["vote"]["cells_after"], voted_first(&["--target-kl", "0.005"])["vote"]["cells_after"]);
    let aggressive = voted_first(&["--preset", "aggressive"]);
    assert!(number(&aggressive["vote"]["cells_after"]) <= number(&safe["vote"]["cells_after"]));
    let target = |report: &Value| report["policy"]["target_kl"].as_f64().unwrap();
    assert!(target(&aggressive) > target(&safe), "{aggressive}");
}

#[test]
fn lost_mass_takes_the_place_of_the_trial() {
    let vote = &voted_first(&["--lost-mass", "0.05"])["vote"];
    assert_eq!((&vote["bound"], &vote["tried"]), (&"lost-mass".into(), &Value::Array(Vec::new())));
    assert!(vote["lost_mass"].as_f64().unwrap() <= 0.05, "{vote}");
}

#[test]
fn the_prompt_may_be_piped_in() {
    let tokens = |done: Done| number(&done.json()[0]["prefill"]["tokens"]);
    let args = ["-n", "2", "--json"];
    let given = tokens(run(&[&["-p", "Name three colours."], &args[..]].concat()));
    let piped = finish_with(&mut gvote("run", &args), "Name three colours.\n").ok();
    assert_eq!(tokens(piped), given);
    let both = [&["-f", "-", "-p", "Which one is warm?"], &args[..]].concat();
    let both = finish_with(&mut gvote("run", &both), "Name three colours.\n").ok();
    assert!(tokens(both) > given, "the question stands below what is piped in");
}

#[test]
fn a_raw_prompt_is_printed_before_the_answer() {
    let args = ["--raw", "-e", "-p", r"One\n\x54wo", "-n", "2", "--temp", "0"];
    let with = run(&args).ok().stdout;
    let without = run(&[&args[..], &["--no-display-prompt"]].concat()).ok().stdout;
    assert!(with.starts_with("One\nTwo"), "{with}");
    assert_eq!(with.strip_prefix("One\nTwo"), Some(&without[..]));
}

#[test]
fn escapes_are_left_alone_without_e() {
    let with = run(&["--raw", "-p", r"One\nTwo", "-n", "1"]).ok().stdout;
    assert!(with.starts_with(r"One\nTwo"), "{with}");
}

#[test]
fn the_system_message_and_the_template_reach_the_model() {
    let tokens = |args: &[&str]| number(&json(&[&["-p", "Hi", "-n", "1"], args].concat())["prefill"]["tokens"]);
    let plain = tokens(&["--raw"]);
    let own = tokens(&[]);
    assert!(tokens(&["--chat-template", "chatml"]) > plain);
    assert!(own > tokens(&["--chat-template", "chatml"]), "the model's own template adds a system message");
    let long =
        "Answer like a pirate who has been at sea for far too long and misses his parrot more than words can say.";
    assert!(tokens(&["-sys", long]) > own);
}

#[test]
fn templates_and_system_messages_may_come_from_files_and_flags() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let tokens = |args: &[&str]| number(&json(&[&["-n", "1"], args].concat())["prefill"]["tokens"]);
    let pirate = "Answer like a pirate.";
    assert_eq!(
        tokens(&["-p", "Hi", "-sysf", &file("s", &format!("{pirate}\n"))]),
        tokens(&["-p", "Hi", "-sys", pirate])
    );

    let whole = tokens(&["--raw", "-p", "One two three four five"]);
    let template = "{{ start }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let kwargs = r#"{"start": "One two", "messages": []}"#;
    let rest = ["-p", " three four five", "--chat-template-kwargs", kwargs];
    assert_eq!(tokens(&[&rest[..], &["--chat-template", template]].concat()), whole);
    assert_eq!(tokens(&[&rest[..], &["--chat-template-file", &file("t.jinja", template)]].concat()), whole);

    for (args, status, hint) in [
        (["--chat-template-kwargs", "[1]"], 2, "--chat-template-kwargs"),
        (["--chat-template", "llama3"], 2, "chatml"),
        (["--chat-template-file", "/no/such.jinja"], 1, "/no/such.jinja"),
        (["--system-prompt-file", "/no/such.txt"], 1, "/no/such.txt"),
        (["--chat-template", "{% endfor %}"], 1, "chat template"),
    ] {
        let done = run(&[&["-p", "Hi"], &args[..]].concat());
        assert_eq!((done.status, done.stderr.lines().count()), (status, 1), "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(hint), "{args:?}: {}", done.stderr);
    }
}

#[test]
fn a_reverse_prompt_ends_the_answer_and_is_no_part_of_it() {
    let args = ["-p", "Count from one to ten in words.", "-n", "24", "--temp", "0"];
    let whole = json(&args)["answer"].as_str().unwrap().to_owned();
    let word = whole.split_whitespace().nth(3).unwrap();
    let report = json(&[&args[..], &["-r", "no such text", "-r", word]].concat());
    assert_eq!(report["answer"], whole[..whole.find(word).unwrap()]);
    assert_eq!(report["decode"]["stop"], "reverse-prompt");
    let line = run(&[&args[..], &["-r", r"\n"]].concat()).ok();
    assert_eq!(line.stdout.trim_end_matches('\n'), whole.lines().next().unwrap());
    assert!(line.stderr.contains("stopped by -r") || !whole.contains('\n'), "{}", line.stderr);
}

#[test]
fn a_cap_below_what_is_protected_names_the_flag() {
    let document = document(CHARS);
    let args = ["-f", document.path().to_str().unwrap(), "-n", "1", "--temp", "0", "--max-cells", "75"];
    let system = ["-sys", "Answer like a pirate who has been at sea for far too long and misses his parrot."];
    let done = run(&[&args, &system[..], &["--protect"]].concat());
    assert_eq!(done.status, 1, "{}", done.stderr);
    assert!(done.stderr.contains("--max-cells is 75") && done.stderr.contains("--protect"), "{}", done.stderr);
    run(&[&args, &system[..]].concat()).ok();
}

#[test]
fn nonsense_flags_are_a_usage_error() {
    let cases: [(&[&str], &str); 16] = [
        (&["--polcy", "full"], "--policy"),
        (&["--policy", "best"], "gvote-paper"),
        (&["--lost-mass", "1.5"], "--lost-mass"),
        (&["--lost-mass", "nan"], "--lost-mass"),
        (&["--preset", "safe", "--lost-mass", "0.1"], "--lost-mass"),
        (&["--max-cells", "10"], "--max-cells"),
        (&["--policy", "full", "--max-cells", "500"], "--max-cells"),
        (&["--span", "3"], "--span"),
        (&["--recent", "8"], "--window"),
        (&["-ctk", "q9"], "q8_0"),
        (&["-fa", "maybe"], "auto"),
        (&["-ub", "0"], "1.."),
        (&["-ngl", "some"], "auto"),
        (&["--temp", "hot"], "--temp"),
        (&["--max-cells", "-5"], "--max-cells"),
        (&["--top-p", "2"], "0 to 1"),
    ];
    for (args, hint) in cases {
        let done = run(&[&["-p", "Hi"], args].concat());
        assert_eq!(done.status, 2, "{args:?}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(hint), "{args:?}: {}", done.stderr);
        assert_eq!(done.stdout, "");
    }
}

#[test]
fn llama_cpps_variables_count_where_the_command_line_says_nothing() {
    let with = |variables: &[(&str, &str)], args: &[&str]| {
        let args = [&["run", "-t", "1", "-p", "Hi", "--temp", "0", "--json"], args].concat();
        finish(cli::bare(&args).env("LLAMA_ARG_MODEL", model()).envs(variables.iter().copied()))
    };
    let tokens = |done: Done| number(&done.ok().json()[0]["decode"]["tokens"]);
    let three = [("LLAMA_ARG_N_PREDICT", "3"), ("LLAMA_ARG_CHAT_TEMPLATE", "chatml")];
    assert_eq!(tokens(with(&three, &[])), 3);
    assert_eq!(tokens(with(&three, &["-n", "2", "--raw"])), 2, "a flag beside --raw would be refused");
    let many = [("LLAMA_ARG_N_PREDICT", "many")];
    assert_eq!(tokens(with(&many, &["--n-predict=2"])), 2);
    let done = with(&many, &[]);
    assert_eq!((done.status, done.stderr.lines().count()), (2, 1), "{}", done.stderr);
    assert!(done.stderr.contains("many") && done.stderr.contains("LLAMA_ARG_N_PREDICT"), "{}", done.stderr);
}

#[test]
fn a_prompt_is_asked_for() {
    let done = run(&[]);
    assert_eq!(done.status, 2);
    assert!(done.stderr.contains("-p TEXT"), "{}", done.stderr);
}

#[test]
fn bad_files_fail_with_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (text, cut, binary) = (path("text.gguf"), path("cut.gguf"), path("prompt"));
    fs::write(&text, "not a model at all").unwrap();
    let mut head = vec![0; 3 << 20];
    fs::File::open(model()).unwrap().read_exact(&mut head).unwrap();
    fs::write(&cut, head).unwrap();
    fs::write(&binary, [0xff, 0xfe, 0x00]).unwrap();

    let (none, here, model) = (path("none"), path(""), model().to_str().unwrap().to_owned());
    let cases: [(&[&str], &str); 6] = [
        (&["-m", &none, "-p", "Hi"], "no such file"),
        (&["-m", &here, "-p", "Hi"], "folder"),
        (&["-m", &text, "-p", "Hi"], "not a GGUF"),
        (&["-m", &cut, "-p", "Hi"], "cut short"),
        (&["-m", &model, "-f", &none], "No such file"),
        (&["-m", &model, "-f", &binary], "not UTF-8"),
    ];
    for (args, why) in cases {
        let done = finish(std::process::Command::new(cli::PROGRAM).arg("run").args(args));
        assert_eq!(done.status, 1, "{args:?}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(why), "{args:?}: {}", done.stderr);
        assert_eq!(done.stdout, "");
    }
}

/// The file requests a BOS token that does not exist; llama.cpp notices when it tokenizes a prompt.
#[test]
fn an_assertion_of_llama_cpp_is_one_line_that_names_the_file() {
    let made = Zeros { extra: &[("tokenizer.ggml.add_bos_token", Bool(true))], ..Zeros::default() }.write();
    let path = made.path().to_str().unwrap();
    let done = finish(&mut cli::bare(&["run", "-m", path, "--raw", "-p", "ab", "-n", "1"]));
    assert_eq!((done.status, done.stdout.as_str(), done.stderr.lines().count()), (1, "", 1), "{}", done.stderr);
    for part in [path, "llama.cpp gave up while it made tokens", "llama-vocab.cpp:", "GGML_ASSERT"] {
        assert!(done.stderr.contains(part), "{part} is not in {}", done.stderr);
    }
    assert!(!done.stderr.contains("/llama-vocab.cpp"), "no folder of a machine that built it: {}", done.stderr);
}

#[cfg(unix)]
#[test]
fn a_fault_is_one_line_that_names_the_file() {
    for (signal, name) in [("SEGV", "SIGSEGV"), ("FPE", "SIGFPE"), ("ABRT", "SIGABRT")] {
        let child = gvote("run", &["-p", "Tell me a long story.", "-n", "4000"]).spawn().unwrap();
        let mut child = child;
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let sent = std::process::Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
        assert!(sent.unwrap().success());
        let done: Done = child.wait_with_output().unwrap().into();
        assert_eq!((done.status, done.stderr.lines().count()), (1, 1), "{}", done.stderr);
        let line = format!("gvote: {}: llama.cpp crashed while it wrote the answer ({name}", model().display());
        assert!(done.stderr.starts_with(&line), "{}", done.stderr);
    }
}

/// std::regex recurses for each character of a word.
#[test]
fn a_word_of_a_mebibyte_does_not_end_the_stack() {
    let extra = &[("tokenizer.ggml.pre", Text("deepseek-llm"))];
    let made = Zeros { tokens: &["a", "b", "\u{120}"], extra, ..Zeros::default() }.write();
    let path = made.path().to_str().unwrap();
    for letter in ["a", " "] {
        let mut text = tempfile::NamedTempFile::new().unwrap();
        text.write_all(letter.repeat(1 << 20).as_bytes()).unwrap();
        let args = ["run", "-m", path, "--raw", "-c", "64", "--policy", "full", "-f", text.path().to_str().unwrap()];
        let done = finish(&mut cli::bare(&args));
        assert_eq!((done.status, done.stdout.as_str()), (1, ""), "{}", done.stderr);
        assert!(done.stderr.contains("the prompt has 1048576 tokens"), "{}", done.stderr);
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_read_in_the_cells_there_are() {
    let document = document(CHARS);
    let report = json(&["-f", document.path().to_str().unwrap(), "-c", "300", "-n", "8", "--temp", "0"]);
    let squeezes = &report["prefill"]["squeezes"];
    assert!(number(&report["prefill"]["tokens"]) > 300, "{report}");
    assert!(number(&squeezes["count"]) > 0 && squeezes["lost_mass"].as_f64().unwrap() > 0.0, "{squeezes}");
    assert!(number(&report["cache"]["cells"]) <= 300, "{report}");
}

/// Uses batches that are longer than the number of cells that can be freed at once.
#[test]
fn a_context_with_no_cell_to_spare_is_refused_by_the_least_that_would_do() {
    let document = document(CHARS);
    let args = ["-f", document.path().to_str().unwrap(), "-n", "1", "--temp", "0", "-b", "512", "-ub", "512", "-c"];
    // 4 sinks and 64 recent tokens
    for n_ctx in ["1", "90"] {
        let done = run(&[&args[..], &[n_ctx]].concat());
        assert_eq!((done.status, done.stdout.as_str()), (1, ""), "{}", done.stderr);
        let said = format!("{n_ctx} cells are too few to go on in: 91 is the least");
        assert!(done.stderr.contains(&said) && done.stderr.trim_end().lines().count() == 1, "{}", done.stderr);
    }
    let least = json(&[&args[..], &["91"]].concat());
    assert!(number(&least["cache"]["cells"]) <= 91 && number(&least["prefill"]["squeezes"]["count"]) > 10, "{least}");
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_where_nothing_can_be_dropped() {
    let document = document(CHARS);
    let document = document.path().to_str().unwrap();
    let done = run(&["-f", document, "-c", "80"]);
    assert_eq!(done.status, 1);
    assert!(done.stderr.contains("raise -c") && done.stderr.contains("--recent"), "{}", done.stderr);
    let done = run(&["-f", document, "-c", "200", "--policy", "full"]);
    assert_eq!(done.status, 1);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    assert!(done.stderr.contains("raise -c"), "{}", done.stderr);
}

#[test]
fn the_context_ends_the_answer() {
    let report = json(&["-p", "Tell me a story.", "-c", "48", "--temp", "0"]);
    assert_eq!(report["decode"]["stop"], "context-full");
    assert_eq!(number(&report["cache"]["cells"]), 48);
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let done = hang_up(gvote("run", &["-p", "Tell me a long story.", "-n", "2000"]).spawn().unwrap());
    assert_eq!((done.status, &done.stderr[..]), (0, ""));
}

#[test]
fn ctrl_c_while_reading_the_prompt_ends_at_once() {
    // reading takes about a minute
    let document = document(28_000);
    let child = gvote("run", &["-f", document.path().to_str().unwrap()]).spawn().unwrap();
    sleep(Duration::from_secs(2));
    let (done, took) = interrupt(child);
    assert_eq!((done.status, done.stderr.trim()), (130, "gvote: cancelled"));
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn ctrl_c_stops_an_answer_and_reports() {
    let mut child = gvote("run", &["-p", "Tell me a long story.", "-n", "4000"]).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let (done, _) = interrupt(child);
    assert_eq!(done.status, 130);
    assert!(done.stderr.contains("stopped with Ctrl-C"), "{}", done.stderr);
}

#[test]
fn the_help_teaches() {
    // the help wraps lines anywhere
    let help = |args: &[&str]| {
        let text = finish(std::process::Command::new(cli::PROGRAM).args(args)).ok().stdout;
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let text = help(&["run", "--help"]);
    for part in [
        "Prompt:",
        "Model:",
        "Context and KV cache:",
        "Cache policy:",
        "Sampling:",
        "Output:",
        "Examples:",
        "[also: -sys]",
        "[also: -ub]",
        "[also: -tb]",
        "[also: -ngl]",
        "[also: -fa]",
        "[also: -ctk]",
        "[also: -ctv]",
        "gvote-paper",
        "[default: 2048]",
        "--lost-mass",
        "--max-cells",
        "--json",
        "Repetition:",
        "Grammar:",
        "LLAMA_ARG_CTX_SIZE",
    ] {
        assert!(text.contains(part), "{part:?} is not in the help");
    }
    assert!(help(&["chat", "--help"]).contains("[also: -st]"));
    let overview = help(&["--help"]);
    assert!(overview.contains("run") && overview.contains("chat") && overview.contains("Exit status"));
    assert!(help(&["--version"]).starts_with("gvote "));
}

/// Returns the report and stderr for a model whose answers do not end.
fn endless(made: &tempfile::NamedTempFile, args: &[&str]) -> (Value, String) {
    let path = made.path().to_str().unwrap();
    let fixed = ["run", "-m", path, "--raw", "--json", "--temp", "0", "-t", "1"];
    let done = finish(&mut cli::bare(&[&fixed[..], args].concat())).ok();
    (done.json().remove(0), done.stderr)
}

#[test]
fn a_prompt_longer_than_the_training_is_answered() {
    let made = Zeros { n_ctx: 256, ..Zeros::default() }.write();
    let (report, said) = endless(&made, &["-p", &"ab".repeat(200)]);
    assert!(said.contains("the prompt has 400 tokens and the model was trained for 256"), "{said}");
    assert_eq!((&report["prefill"]["tokens"], &report["decode"]["tokens"]), (&400.into(), &512.into()), "{report}");
    assert_eq!(report["decode"]["stop"], "context-full");
    assert_eq!(endless(&made, &["-p", &"ab".repeat(200), "-n", "3"]).0["decode"]["tokens"], 3);
    // the limit is the same near the end of the training context, and with cells for more
    let (report, _) = endless(&made, &["-p", &"a".repeat(250)]);
    assert_eq!(report["decode"]["tokens"], 512, "{report}");
    let (report, _) = endless(&made, &["-p", "ab", "-c", "4096"]);
    assert_eq!(report["decode"]["tokens"], 512, "{report}");
}

#[test]
fn a_short_prompt_takes_little_memory_whatever_the_training_was() {
    let made = Zeros { n_ctx: 131_072, ..Zeros::default() }.write();
    for n in ["2", "100000"] {
        let path = made.path().to_str().unwrap();
        let mut child = cli::bare(&["run", "-m", path, "--raw", "-p", "ab", "-n", n, "-v", "-t", "1"]).spawn().unwrap();
        let log = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
        let cells = log.map(Result::unwrap).find(|line| line.contains("n_ctx_seq ") && line.contains('=')).unwrap();
        let cells: usize = cells.rsplit('=').next().unwrap().trim().parse().unwrap();
        assert!(cells <= 2048, "{cells} cells for -n {n}");
        let _ = (child.kill(), child.wait());
    }
}

/// The tokens equal those of a cache that has all cells from the start, and nothing is dropped.
#[test]
fn an_answer_that_outgrows_its_cells_loses_nothing() {
    let made = Zeros { n_ctx: 8192, ..Zeros::default() }.write();
    let (report, _) = endless(&made, &["-p", "ab", "-n", "3000"]);
    assert_eq!(report["decode"]["tokens"], 3000, "{report}");
    assert_eq!(report["decode"]["squeezes"]["count"], 0, "{report}");
    assert_eq!(report["cache"]["cells"], 3002, "{report}");
    // a requested size stays fixed
    let (report, _) = endless(&made, &["-p", "ab", "-n", "600", "-c", "512"]);
    assert_eq!(report["cache"]["size"], 512, "{report}");
    assert_eq!(number(&report["decode"]["tokens"]), 600, "{report}");
    assert!(number(&report["vote"]["cells_before"]) == 512 && number(&report["cache"]["cells"]) <= 512, "{report}");
}

#[test]
fn a_context_that_the_machine_cannot_hold_is_refused_before_it_is_allocated() {
    let document = document(CHARS);
    let file = document.path().to_str().unwrap();
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("runs.jsonl");
    let eval = ["text", "-f", file, "-p", "100", "-n", "4", "-o", out.to_str().unwrap()];
    for (command, args) in
        [("run", &["-p", "Hi"][..]), ("chat", &[]), ("explain", &["-p", "Hi"]), ("bench", &[]), ("eval", &eval)]
    {
        let mut program = gvote(command, &[]);
        if command == "eval" {
            program = cli::bare(&["eval"]);
            program.args(args).arg("-m").arg(model());
        } else {
            program.args(args);
        }
        let done = finish(program.args(["-c", "2000000000"]));
        assert_eq!(
            (done.status, done.stdout.as_str(), done.stderr.lines().count()),
            (1, "", 1),
            "{command}: {}",
            done.stderr
        );
        for part in ["a context of 2,000,000,000 cells takes", "GiB", "are available: lower -c", "gvote plan"] {
            assert!(done.stderr.contains(part), "{command}: {part} is not in {}", done.stderr);
        }
    }
}

/// The shell limits the address space: the cache would take 30 GiB, and less is available.
#[cfg(target_os = "linux")]
#[test]
fn a_cache_that_memory_does_not_hold_is_refused_with_what_to_do() {
    let limited = "ulimit -v 4000000; exec \"$@\"";
    let mut program = std::process::Command::new("sh");
    program
        .args(["-c", limited, "sh", cli::PROGRAM, "run", "-t", "1", "-p", "Hi!", "-c", "1400000", "-m"])
        .arg(model());
    let done = finish(program.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()));
    assert_eq!((done.status, &done.stdout[..]), (1, ""), "{}", done.stderr);
    assert!(done.stderr.contains("lower -c"), "{}", done.stderr);
}
