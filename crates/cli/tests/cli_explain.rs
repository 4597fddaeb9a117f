//! Tests of `gvote explain`, through the built program: the page, the terminal and the JSON show what is in the cache.

#[path = "../../../tests/common/cli.rs"]
mod cli;

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cli::{Done, document, finish, finish_with, gvote, text};
use serde_json::Value;

/// Characters of a document long enough for a vote: about 650 tokens.
const CHARS: usize = 2600;
const QUESTION: &str = "Which animals are there?";
/// Layers of SmolLM2-135M.
const LAYERS: usize = 30;
const HEADS_PER_LAYER: usize = 3;
const HEADS: usize = LAYERS * HEADS_PER_LAYER;
/// Entries that always stay.
const SINKS: usize = 4;
const RECENT: usize = 64;

fn explain(args: &[&str]) -> Done {
    finish(&mut gvote("explain", args))
}

fn on_document(args: &[&str]) -> Value {
    let document = document(CHARS);
    let args = [&["-f", document.path().to_str().unwrap(), "-p", QUESTION, "--json"], args].concat();
    let mut records = explain(&args).ok().json();
    assert_eq!(records.len(), 1);
    records.remove(0)
}

/// Returns one vote as JSON and as a page.
fn both() -> &'static (Value, String) {
    static BOTH: OnceLock<(Value, String)> = OnceLock::new();
    BOTH.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("page.html");
        let json = on_document(&["--target-kl", "0.5", "-o", page.to_str().unwrap()]);
        (json, fs::read_to_string(page).unwrap())
    })
}

/// Returns the tokens of a prompt, and their concatenated texts.
fn tokens(args: &[&str]) -> (Vec<usize>, String) {
    let done = explain(&[args, &["--ratio", "0.9", "--json"]].concat()).ok().json().remove(0);
    (done["tokens"].as_array().unwrap().iter().map(number).collect(), strings(&done["texts"]).concat())
}

#[test]
fn a_marker_in_a_prompt_is_text() {
    /// Tokens of `<|im_start|>` and `<|im_end|>`.
    const MARKERS: [usize; 2] = [1, 2];
    let prompt = "What does <|im_end|> mean in ChatML? <|im_start|>system";
    for args in [&["-p", prompt][..], &["-p", prompt, "-sys", "Say <|im_end|>"], &["-p", prompt, "--protect"]] {
        let (tokens, texts) = tokens(args);
        // three turns: the system's, the user's and the start of the assistant's
        assert_eq!(tokens.iter().filter(|token| MARKERS.contains(token)).count(), 5, "{texts}");
        assert!(texts.contains(prompt), "{texts}");
    }
    let (raw, _) = tokens(&["-p", prompt, "--raw"]);
    assert_eq!(
        raw.iter().filter(|token| MARKERS.contains(token)).count(),
        2,
        "who writes all of it writes its markers, too"
    );
}

/// Writes a template to a file for `--chat-template-file`.
fn template(source: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), source).unwrap();
    file
}

#[test]
fn the_date_of_a_template_is_that_of_the_clock() {
    let file = template("It is {{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}");
    let args = ["-p", "Hi", "--chat-template-file", file.path().to_str().unwrap(), "--ratio", "0.9", "--json"];
    let at = |clock: &str| finish(gvote("explain", &args).env("SOURCE_DATE_EPOCH", clock));
    assert_eq!(strings(&at("951868799").ok().json()[0]["texts"]).concat(), "It is 29 Feb 2000: Hi");
    let done = at("yesterday");
    assert!(done.status == 1 && done.stderr.contains("SOURCE_DATE_EPOCH=yesterday"), "{}", done.stderr);
    assert_eq!(done.stderr.trim_end().lines().count(), 1, "{}", done.stderr);
}

#[test]
fn a_system_message_that_the_template_refuses_goes_into_the_first_user_message() {
    let file = template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
         {% for m in messages %}[{{ m.role }}] {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    );
    let args = ["-p", "Hi", "-sys", "Be brief.", "--chat-template-file", file.path().to_str().unwrap()];
    assert_eq!(tokens(&args).1, "[user] Be brief.\n\nHi");
    let chat = finish(gvote("chat", &args).args(["-st", "-n", "2"])).ok();
    assert!(chat.stderr.contains("takes no system message"), "{}", chat.stderr);
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    let name = file.to_str().unwrap();
    let text = "Hello\r\nworld, how are you?";
    let plain = tokens(&["-p", text, "--raw"]);
    fs::write(&file, format!("\u{feff}{text}\r\n")).unwrap();
    assert_eq!(tokens(&["-f", name, "--raw"]), plain);
    assert_eq!(tokens(&["-p", &format!("\u{feff}{text}"), "--raw"]), plain);
    let piped = finish_with(&mut gvote("explain", &["--raw", "--ratio", "0.9", "--json"]), format!("\u{feff}{text}"));
    assert_eq!(piped.ok().json()[0]["tokens"].as_array().unwrap().len(), plain.0.len());
    // a document followed by a question equals a prompt with both
    let asked = tokens(&["-p", &format!("{text}\n\nWho?")]);
    assert_eq!(tokens(&["-f", name, "-p", "Who?"]), asked);
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("not a number: {value}")) as usize
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

/// Unpacks the positions that each head keeps.
fn kept(packed: &str, n: usize) -> Vec<Vec<usize>> {
    let bytes = STANDARD.decode(packed).unwrap();
    let stride = n.div_ceil(8);
    assert_eq!(bytes.len(), HEADS * stride);
    let row = |row: &[u8]| {
        assert!(
            (n..8 * stride).all(|position| row[position / 8] >> (position % 8) & 1 == 0),
            "no position past the end"
        );
        (0..n).filter(|position| row[position / 8] >> (position % 8) & 1 == 1).collect()
    };
    bytes.chunks(stride).map(row).collect()
}

fn kept_of(json: &Value) -> Vec<Vec<usize>> {
    kept(json["kept"].as_str().unwrap(), json["tokens"].as_array().unwrap().len())
}

/// Counts the heads that keep each position.
fn kept_by(kept: &[Vec<usize>], n: usize) -> Vec<usize> {
    let mut counts = vec![0; n];
    kept.iter().flatten().for_each(|&position| counts[position] += 1);
    counts
}

/// Returns the data of the page's script.
fn data(page: &str) -> Value {
    let (_, rest) = page.split_once(r#"id="data">"#).unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

/// Returns the number of heads and the text of each token on the page.
fn tokens_of(page: &str) -> Vec<(usize, String)> {
    let (_, rest) = page.split_once(r#"<div id="text""#).unwrap();
    let (_, rest) = rest.split_once('>').unwrap();
    let spans = rest.split_once("</div>").unwrap().0;
    let token = |span: &str| {
        let (attributes, text) = span.split_once('>').unwrap();
        let heads = attributes.strip_prefix(r#" style="--k:"#).map_or(0, number_in_front);
        (heads, unescaped(text.strip_suffix("</i>").unwrap()))
    };
    spans.split("<i").skip(1).map(token).collect()
}

fn number_in_front(text: &str) -> usize {
    text.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

fn unescaped(html: &str) -> String {
    let pairs = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#x27;", "'"), ("&#x2f;", "/"), ("&amp;", "&")];
    pairs.iter().fold(html.to_owned(), |text, (escape, c)| text.replace(escape, c))
}

#[test]
fn every_head_keeps_as_many_tokens_as_there_are_cells() {
    let (json, _) = both();
    let n = number(&json["vote"]["cells_before"]);
    let after = number(&json["vote"]["cells_after"]);
    assert!(after < n && n == number(&json["prefill"]["tokens"]), "{}", json["vote"]);
    assert_eq!(json["layers"], Value::from((0..LAYERS).collect::<Vec<_>>()));
    assert_eq!(number(&json["n_head_kv"]), HEADS_PER_LAYER);
    let kept = kept_of(json);
    for (head, positions) in kept.iter().enumerate() {
        assert_eq!(positions.len(), after, "head {head}");
        assert!((0..SINKS).chain(n - RECENT..n).all(|position| positions.contains(&position)), "head {head}");
    }
    assert!(kept.windows(2).any(|heads| heads[0] != heads[1]), "each head has its own choice");
    let counts: Vec<usize> = numbers(&json["kept_by"]).into_iter().map(|k| k as usize).collect();
    assert_eq!(counts, kept_by(&kept, n));
    let shown = strings(&json["texts"]).concat();
    assert!(shown.contains(text(CHARS).trim_end()) && shown.contains(QUESTION), "{shown}");
}

#[test]
fn the_system_message_and_the_markers_stay_where_that_is_asked_for() {
    let system = "Answer like a pirate who misses his parrot.";
    // positions before the document, and those of the markers, and whether all heads keep them
    let held = |more: &[&str]| {
        let json = on_document(&[&["-sys", system, "--ratio", "0.2"], more].concat());
        let texts = strings(&json["texts"]);
        let document = texts.iter().scan(String::new(), |read, text| {
            read.push_str(text);
            Some(read.contains("user\n"))
        });
        let before = document.take_while(|is_past| !is_past).count();
        assert!(texts[..before].concat().contains(system), "{texts:?}");
        let is_marker = |text: &str| text.starts_with("<|im_");
        assert!(texts[before..].iter().any(|text| is_marker(text)));
        let counts = numbers(&json["kept_by"]);
        (0..texts.len()).filter(|&at| at < before || is_marker(texts[at])).all(|at| counts[at] as usize == HEADS)
    };
    assert!(held(&["--protect"]));
    assert!(!held(&[]), "they would have stayed anyway");
}

#[test]
fn what_the_heads_give_up_is_what_the_report_says() {
    let (json, _) = both();
    let (n, after) = (number(&json["vote"]["cells_before"]), number(&json["vote"]["cells_after"]));
    let heads = json["heads"].as_array().unwrap();
    assert_eq!(heads.len(), HEADS);
    let lost = json["vote"]["lost_mass"].as_f64().unwrap();
    let mean = heads.iter().map(|head| head["lost_mass"].as_f64().unwrap()).sum::<f64>() / HEADS as f64;
    assert!((mean - lost).abs() < 1e-3, "{mean} is the mean of the heads, {lost} is reported");
    let curve = numbers(&json["curve"]);
    assert_eq!(curve.len(), n + 1);
    assert!(curve.windows(2).all(|c| c[0] >= c[1]) && (curve[0] - 1.0).abs() < 1e-2 && curve[n] == 0.0);
    assert!((curve[after] - lost).abs() < 1e-6);
    // a head that gives up more than the mean would need more cells than it has, and vice versa
    for head in heads {
        let (own, needs) = (head["lost_mass"].as_f64().unwrap(), number(&head["needs"]));
        assert!(if own > mean { needs > after } else { needs <= after }, "{head}");
    }
}

#[test]
fn whoever_would_have_kept_it_adds_up() {
    let (json, _) = both();
    let free = number(&json["vote"]["cells_after"]) - SINKS - RECENT;
    for head in json["heads"].as_array().unwrap() {
        let part = |name: &str| number(&head["agreement"][name]);
        assert_eq!(part("both") + part("real") + part("synthetic") + part("neither"), free, "{head}");
        assert!(part("both") <= part("common") && part("common") <= free, "{head}");
    }
    let along = |name: &str| numbers(&json[name]);
    let sum = |values: &[f64]| values.iter().sum::<f64>();
    let (real, synthetic) = (along("real"), along("synthetic"));
    assert!((sum(&real) - 1.0).abs() < 1e-3 && (sum(&synthetic) - 1.0).abs() < 1e-3);
    assert_eq!(sum(&real[real.len() - RECENT..]), 0.0, "the observation window does not judge itself");
}

#[test]
fn the_trial_is_told_as_it_went() {
    let (json, page) = both();
    let vote = &json["vote"];
    let bar = json["bar"].as_f64().unwrap();
    assert!((bar - 0.15 * 0.5).abs() < 1e-6, "{bar}");
    let fits = |tried: &&Value| tried[1].as_f64().unwrap() <= bar;
    let fewest = vote["tried"].as_array().unwrap().iter().filter(fits).map(|tried| number(&tried[0])).min();
    assert_eq!(fewest, Some(number(&vote["cells_after"])), "{vote}");
    assert!(!strings(&json["draft"]).is_empty());
    assert!(page.contains("What the trial measured") && page.contains("The bar is 0.075 nats, 15 % of the 0.5 that"));
    assert!(unescaped(page).contains(&strings(&json["draft"]).concat()), "the continuation is on the page");
}

#[test]
fn explaining_changes_nothing() {
    let (json, _) = both();
    let document = document(CHARS);
    let file = document.path().to_str().unwrap();
    let args = ["-f", file, "-p", QUESTION, "--target-kl", "0.5", "-n", "1", "--vote", "prompt", "--json"];
    let run = finish(&mut gvote("run", &args)).ok().json().remove(0);
    for key in ["cells_before", "cells_after", "bound", "lost_mass", "tried", "kv_bytes_after"] {
        assert_eq!(run["vote"][key], json["vote"][key], "{key}");
    }
}

#[test]
fn the_page_shows_the_same_vote() {
    let (json, page) = both();
    let n = json["tokens"].as_array().unwrap().len();
    let data = data(page);
    assert_eq!((number(&data["n"]), &data["layers"]), (n, &json["layers"]));
    let kept = kept(data["kept"].as_str().unwrap(), n);
    assert_eq!(kept, kept_of(json));
    let shaded = tokens_of(page);
    let counts: Vec<usize> = shaded.iter().map(|(heads, _)| *heads).collect();
    assert_eq!(counts, kept_by(&kept, n), "the shades are the counts of the map");
    let shown: String = shaded.into_iter().map(|(_, text)| text.replace("⏎\n", "\n")).collect();
    assert_eq!(shown, strings(&json["texts"]).concat());
    assert!(page.contains(&format!("--heads:{HEADS}")));
    for (name, of_page) in [("real", &data["real"]), ("synthetic", &data["synthetic"])] {
        for (exact, shown) in numbers(&json[name]).into_iter().zip(numbers(of_page)) {
            assert!((exact - shown).abs() <= 0.005 * exact, "{name}: {exact} is shown as {shown}");
        }
    }
    let (before, after) = (number(&json["vote"]["cells_before"]), number(&json["vote"]["cells_after"]));
    assert!(unescaped(page).contains(&format!("{before} -> {after} cells")), "the report is on the page");
    for title in [
        "Which tokens each head kept",
        "The text",
        "What the trial measured",
        "What fewer cells give up",
        "Cells by layer",
        "Attention given up by layer",
        "Real and synthetic queries",
        "Memory and time",
    ] {
        assert!(page.contains(&format!(">{title}</h")), "{title}");
    }
    assert_eq!(page.matches("<svg").count() - page.matches(r#"width="24""#).count(), 5, "a plot each");
}

#[test]
fn the_page_stands_alone() {
    let (_, page) = both();
    assert!(page.contains("default-src 'none'"), "the browser is told to fetch nothing");
    for outside in ["src=", "href=", "url(", "@import", "fetch(", "XMLHttpRequest"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("width=device-width"));
    assert!(page.len() < 400_000, "{} bytes", page.len());
}

#[test]
fn other_rules_and_policies_show_what_they_have() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("page.html");
    let out = out.to_str().unwrap();
    let json = on_document(&["--lost-mass", "0.05", "-o", out]);
    let page = fs::read_to_string(out).unwrap();
    assert!(json["bar"].is_null() && !page.contains("What the trial measured"));
    assert!(numbers(&json["curve"])[number(&json["vote"]["cells_after"])] <= 0.05);
    assert!(page.contains("What fewer cells give up"));

    let json = on_document(&["--ratio", "0.4", "--evict", "cells"]);
    let kept = kept_of(&json);
    assert!(kept.iter().all(|head| *head == kept[0] && head.len() == number(&json["vote"]["cells_after"])));

    let json = on_document(&["--policy", "snapkv", "--ratio", "0.4", "-o", out]);
    let page = fs::read_to_string(out).unwrap();
    let after = number(&json["vote"]["cells_after"]);
    assert!(kept_of(&json).iter().all(|head| head.len() == after));
    assert!(numbers(&json["curve"]).is_empty() && json["heads"].as_array().unwrap().is_empty());
    assert!(!page.contains("How many cells") && !page.contains("Layer by layer") && page.contains("Memory and time"));
}

#[test]
fn what_was_freed_while_reading_is_not_on_the_map() {
    let json = on_document(&["-c", "300", "--target-kl", "0.5"]);
    assert!(number(&json["prefill"]["squeezes"]["count"]) > 0, "{}", json["prefill"]);
    let tokens = json["tokens"].as_array().unwrap().len();
    assert!(tokens > 300 && tokens == number(&json["prefill"]["tokens"]));
    let after = number(&json["vote"]["cells_after"]);
    for (head, positions) in kept_of(&json).iter().enumerate() {
        assert_eq!(positions.len(), after, "head {head}");
        assert_eq!(positions[after - 1], tokens - 1, "head {head}");
    }
    assert_eq!(numbers(&json["curve"]).len(), number(&json["vote"]["cells_before"]) + 1);
    assert_eq!(numbers(&json["synthetic"]).len(), tokens);
    assert!(json["recall"].is_null(), "it is lost, as in `gvote run`");
}

#[test]
fn what_came_back_for_the_question_is_told_from_what_stayed_all_along() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("page.html");
    let args = ["-c", "300", "--ratio", "0.5", "--recall", "auto"];
    let json = on_document(&[&args[..], &["-o", out.to_str().unwrap()]].concat());
    let n = json["tokens"].as_array().unwrap().len();
    let recall = &json["recall"];
    let (stay, back) = (kept_of(&json), kept(recall["came_back"].as_str().unwrap(), n));
    for (head, (stay, back)) in stay.iter().zip(&back).enumerate() {
        assert!(back.iter().all(|position| stay.contains(position)), "head {head}: what came back is what stays of it");
        let always = |position: &usize| *position < SINKS || *position >= n - RECENT;
        assert!(!back.iter().any(always), "head {head}: the first and last tokens never leave");
    }
    let counts = kept_by(&back, n);
    assert_eq!(numbers(&recall["came_back_by"]), counts.iter().map(|&count| count as f64).collect::<Vec<_>>());
    let mean = counts.iter().sum::<usize>() as f64 / HEADS as f64;
    assert!(mean > 0.0 && mean < recall["left"].as_f64().unwrap(), "{recall}");

    // votes that freed cells while reading, then those of the choice among all rows
    let votes = recall["votes"].as_array().unwrap();
    assert_eq!(votes.len(), number(&json["prefill"]["squeezes"]["count"]));
    let reading = votes.iter().take_while(|vote| number(&vote["tokens"]) < n).count();
    assert!(reading > 1 && votes[..reading].iter().all(|vote| number(&vote["back"]) == 0), "{recall}");
    assert!(votes[reading..].iter().any(|vote| number(&vote["back"]) > 0), "{recall}");
    let dropped_kept: f64 = votes.iter().map(|vote| vote["dropped_kept"].as_f64().unwrap()).sum();
    assert!((dropped_kept - mean).abs() < 1e-9, "each of them left in one of the votes: {recall}");

    let page = fs::read_to_string(out).unwrap();
    assert_eq!(data(&page)["back"], recall["came_back"]);
    assert_eq!(tokens_of(&page).iter().map(|(heads, _)| *heads).collect::<Vec<_>>(), kept_by(&stay, n));
    assert!(page.contains(">What left, and what came back</h"));
    let told = |text: &str| number_in_front(text.split_once(";--b:").unwrap().1);
    assert_eq!(told(&page), *counts.iter().find(|&&count| count > 0).unwrap());

    let document = document(CHARS);
    let asked = ["-f", document.path().to_str().unwrap(), "-p", QUESTION, "--terminal"];
    let done = explain(&[&asked[..], &args].concat()).ok();
    assert!(done.stdout.lines().nth(2).unwrap().starts_with(" back"), "{}", done.stdout);
    assert!(done.stderr.contains("tokens had left each head"), "{}", done.stderr);
}

#[test]
fn a_short_prompt_is_shown_whole() {
    let folder = tempfile::tempdir().unwrap();
    let done = finish(gvote("explain", &["-p", "Hi"]).current_dir(folder.path())).ok();
    assert_eq!(done.stdout, "");
    assert!(done.stderr.contains("all kept") && done.stderr.contains("explain.html"), "{}", done.stderr);
    let page = fs::read_to_string(folder.path().join("explain.html")).unwrap();
    assert!(tokens_of(&page).iter().all(|(heads, _)| *heads == HEADS));
    assert!(!page.contains("How many cells"));
}

#[test]
fn hostile_text_stays_text() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("page.html");
    let prompt = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \" ' {{ 7 * 7 }} \u{202e}txet\u{2066} \
                  \u{1b}[2J\u{1b}]0;title\u{7} \u{85} שלום مرحبا 🦜👩\u{200d}🚀 日本語 \u{fffd}";
    let args = ["--raw", "-f", "-", "--terminal", "-o", out.to_str().unwrap()];
    let done = finish_with(&mut gvote("explain", &args), prompt).ok();
    let page = fs::read_to_string(&out).unwrap();
    assert_eq!(page.matches("<script").count(), 2, "the data and the script");
    assert_eq!(page.matches("<img").count(), 0);
    let steering = |c: char| c.is_control() && c != '\n' || "\u{202e}\u{2066}".contains(c);
    for shown in [&page, &done.stdout] {
        assert_eq!(shown.chars().find(|c| steering(*c)), None);
    }
    let tokens = tokens_of(&page);
    assert_eq!(tokens.len(), number(&data(&page)["n"]));
    let shown: String = tokens.iter().map(|(_, text)| text.as_str()).collect();
    for part in [
        "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \" ' {{ 7 * 7 }}",
        r"\u{202e}txet\u{2066}",
        r"␛[2J␛]0;title␇ \u{85}",
        "שלום مرحبا 🦜👩\u{200d}🚀 日本語 \u{fffd}",
    ] {
        assert!(shown.contains(part), "{part:?} is not in {shown:?}");
    }
    assert!(tokens.iter().any(|(_, text)| text.is_empty()), "characters that are split over tokens are shown once");
}

#[test]
fn the_terminal_gets_a_compact_view() {
    let (json, _) = both();
    let document = document(CHARS);
    let args = ["-f", document.path().to_str().unwrap(), "-p", QUESTION, "--target-kl", "0.5", "--terminal"];
    let done = explain(&args).ok();
    assert!(!done.stdout.contains('\x1b'), "colours only on a terminal");
    let lines: Vec<&str> = done.stdout.lines().collect();
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{}", done.stdout);
    // layers, needs and shares as in the JSON
    let heads = json["heads"].as_array().unwrap();
    for (layer, line) in lines[2..2 + LAYERS].iter().enumerate() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let own = &heads[layer * HEADS_PER_LAYER..][..HEADS_PER_LAYER];
        let mean = |name: &str| own.iter().map(|head| head[name].as_f64().unwrap()).sum::<f64>() / own.len() as f64;
        assert_eq!(words[0], layer.to_string());
        assert_eq!(words[1].replace(',', ""), format!("{:.0}", mean("needs").round()), "{line}");
        assert_eq!(words[2], format!("{:.1}%", 100.0 * mean("lost_mass")), "{line}");
    }
    // recomputes the strip of all heads
    let counts = numbers(&json["kept_by"]);
    let strip: Vec<char> = lines[1].chars().skip(24).collect();
    assert_eq!(strip.len(), 80 - 24);
    let edge = |column: usize| column * counts.len() / strip.len();
    for (column, block) in strip.iter().enumerate() {
        let tokens = &counts[edge(column)..edge(column + 1)];
        let share = tokens.iter().sum::<f64>() / (tokens.len() * HEADS) as f64;
        assert_eq!(*block, " ▁▂▃▄▅▆▇█".chars().nth((8.0 * share).ceil() as usize).unwrap(), "column {column}");
    }
    assert!(done.stdout.contains("kept by most heads"), "{}", done.stdout);
    assert!(done.stderr.contains("% kept, fewest of") && !done.stderr.contains("page "), "{}", done.stderr);
}

#[test]
fn what_cannot_be_written_is_noticed_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    // the model does not exist: the error about the page comes before the search for the model
    for out in [path("no/such/folder.html"), path("")] {
        let done = finish(&mut cli::bare(&["explain", "-m", &path("none"), "-p", "Hi", "-o", &out]));
        assert_eq!((done.status, done.stderr.lines().count()), (1, 1), "{}", done.stderr);
        assert!(done.stderr.contains("cannot write the page to") && done.stderr.contains("(-o)"), "{}", done.stderr);
    }
    let old = path("old.html");
    fs::write(&old, "old").unwrap();
    for out in [&old, &path("new.html")] {
        let done = finish(&mut cli::bare(&["explain", "-m", &path("none"), "-p", "Hi", "-o", out]));
        assert!(done.status == 1 && done.stderr.contains("no such file"), "{}", done.stderr);
    }
    assert_eq!(fs::read_to_string(&old).unwrap(), "old", "a failure leaves what was there");
    assert!(!Path::new(&path("new.html")).exists(), "and leaves nothing else");
}

#[test]
fn nonsense_is_a_usage_error() {
    for (args, hint) in [
        (&[][..], "-p TEXT"),
        (&["-p", ""], "-p TEXT"),
        (&["-p", "Hi", "--policy", "full"], "--policy full"),
        (&["-p", "Hi", "--json", "--terminal"], "--terminal"),
        (&["-p", "Hi", "-n", "5"], "-n"),
        (&["-p", "Hi", "--recall", "rows"], "--recall"),
        (&["-p", "Hi", "--max-cells", "10"], "--max-cells"),
    ] {
        let done = explain(args);
        assert_eq!((done.status, done.stdout.as_str()), (2, ""), "{args:?}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(hint), "{args:?}: {}", done.stderr);
    }
}

#[test]
fn the_help_teaches() {
    let help = finish(&mut cli::bare(&["explain", "--help"])).ok().stdout;
    for part in ["--terminal", "--out", "--json", "Prompt:", "Cache policy:", "Output:", "Examples:", "explain.html"] {
        assert!(help.contains(part), "{part:?} is not in the help");
    }
    assert!(!help.contains("--predict"), "nothing is answered");
}
