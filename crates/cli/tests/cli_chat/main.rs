//! Tests of `gvote chat`, in a terminal and with messages piped in.

#[path = "../../../../tests/common/cli.rs"]
mod cli;
#[cfg(unix)]
mod terminal;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cli::{Done, document, finish_with, gvote, hang_up, interrupt, text};
use serde_json::Value;

/// Characters of a document long enough for a vote: about 650 tokens.
const CHARS: usize = 2600;

/// Sends lines to a chat and returns its output. Answers are too short to trigger a vote by themselves.
fn talk(args: &[&str], lines: &[&str]) -> Done {
    let when: &[&str] = if args.contains(&"--vote") { &[] } else { &["--vote", "prompt"] };
    let args = [&["-n", "6", "--temp", "0", "--json"], when, args].concat();
    finish_with(&mut gvote("chat", &args), lines.join("\n") + "\n")
}

fn about_document(args: &[&str], lines: &[&str]) -> Done {
    let document = document(CHARS);
    let file = document.path().to_str().unwrap();
    talk(&[&["-c", "2048", "-f", file], args].concat(), lines)
}

/// Returns a text of about `chars` characters in one line.
fn long_line(chars: usize) -> String {
    text(CHARS + chars).chars().skip(CHARS).collect::<String>().replace('\n', " ")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a number: {value}"))
}

fn tokens_in_turn(turn: &Value) -> u64 {
    number(&turn["prefill"]["tokens"]) + number(&turn["decode"]["tokens"])
}

mod piped {
    use super::*;

    #[test]
    fn every_line_is_a_message() {
        let done = talk(&[], &["Hi!", "", "Name a colour."]).ok();
        let turns = done.json();
        assert_eq!(turns.len(), 2);
        assert_eq!((&turns[0]["turn"], &turns[1]["turn"]), (&1.into(), &2.into()));
        assert_eq!(number(&turns[1]["cache"]["tokens"]), turns.iter().map(tokens_in_turn).sum::<u64>());
        assert!(
            number(&turns[1]["prefill"]["tokens"]) < number(&turns[0]["prefill"]["tokens"]),
            "only what is new is read"
        );
    }

    #[test]
    fn the_system_message_is_protected_where_that_is_asked_for_after_a_load_too() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("talk.gvote");
        let session = ["--session", file.to_str().unwrap()];
        let system = ["-sys", &long_line(300)];
        let line = long_line(1500);
        about_document(&[&session[..], &system, &["--protect"]].concat(), &["Go on."]).ok();
        let again =
            |more: &[&str]| talk(&[&session[..], &["-c", "2048", "--max-cells", "90"], more].concat(), &[&line]);
        let refused = again(&["--protect"]);
        assert!(
            refused.stderr.contains("--max-cells is 90") && refused.stderr.contains("--protect"),
            "{}",
            refused.stderr
        );
        again(&[]).ok();
    }

    #[test]
    fn answers_are_plain_text_without_json() {
        let done = finish_with(&mut gvote("chat", &["-n", "6", "--temp", "0"]), "Hi!\nName a colour.\n").ok();
        assert_eq!(done.stdout.lines().count(), 2, "{}", done.stdout);
        assert!(done.stderr.contains("2 answers"), "{}", done.stderr);
    }

    #[test]
    fn a_block_is_one_message() {
        let turns = talk(&[], &["\"\"\"", "Name", "a colour.", "\"\"\"", "And\\", "a shape."]).ok().json();
        assert_eq!(turns.len(), 2);
    }

    #[test]
    fn a_replay_is_refused_before_it_could_fail_halfway_through() {
        let done = talk(&["--replay"], &["Hi!"]);
        assert!(done.status == 2 && done.stderr.contains("--replay"), "{}", done.stderr);
    }

    #[test]
    fn one_turn_with_a_prompt_asks_nothing() {
        let done = talk(&["-st", "-p", "Hi!"], &["never read"]).ok();
        assert_eq!(done.json().len(), 1);
    }

    #[test]
    fn it_votes_again_once_the_cache_has_grown() {
        let args = ["--lost-mass", "0.1", "--recall", "off"];
        let turns = about_document(&args, &["Hm.", &long_line(1600)]).ok().json();
        let [first, short, long] = &turns[..] else { panic!("{turns:?}") };
        assert!(number(&first["vote"]["cells_after"]) < number(&first["vote"]["cells_before"]));
        assert_eq!(short["vote"], Value::Null, "a few tokens are no reason to vote");
        let before = number(&short["cache"]["cells"]) + number(&long["prefill"]["tokens"]);
        assert_eq!(number(&long["vote"]["cells_before"]), before, "composite cells included");
        assert!(number(&long["vote"]["cells_after"]) < before);
        assert_eq!(number(&long["cache"]["tokens"]), turns.iter().map(tokens_in_turn).sum::<u64>());
    }

    /// A short answer cannot earn back a vote, so there is none: all cells stay, and every answer is the full cache's.
    #[test]
    fn short_answers_cost_no_vote() {
        let lines = ["Hm.", "Go on."];
        let turns = |args: &[&str]| about_document(args, &lines).ok().json();
        let (turns, full) = (turns(&["--vote", "auto"]), turns(&["--policy", "full"]));
        assert_eq!(turns.len(), 3);
        let mut tokens = 0;
        for (turn, full) in turns.iter().zip(full) {
            tokens += tokens_in_turn(turn);
            assert!(turn["vote"].is_null(), "{turn}");
            assert_eq!((number(&turn["cache"]["cells"]), number(&turn["cache"]["rows_aside"])), (tokens, 0));
            assert_eq!(turn["answer"], full["answer"]);
        }
    }

    #[test]
    fn what_a_vote_within_an_answer_drops_comes_back_for_the_next_message() {
        let args = ["--vote", "3", "--lost-mass", "0.1"];
        let turns = about_document(&args, &["Hm."]).ok().json();
        let [first, second] = &turns[..] else { panic!("{turns:?}") };
        for turn in [first, second] {
            assert_eq!(number(&turn["vote"]["after_tokens"]), 3, "{turn}");
            assert!(number(&turn["vote"]["cells_after"]) < number(&turn["vote"]["cells_before"]), "{turn}");
        }
        let expanded = &second["prefill"]["expanded"];
        assert_eq!(number(&expanded["cells_after"]), tokens_in_turn(first));
        assert_eq!(
            number(&second["vote"]["cells_before"]),
            tokens_in_turn(first) + number(&second["prefill"]["tokens"]) + 3
        );
    }

    #[test]
    fn every_message_is_read_and_voted_on_with_all_that_was_set_aside() {
        let turns = about_document(&["--lost-mass", "0.1"], &["Hm.", "Go on."]).ok().json();
        assert_eq!(turns.len(), 3);
        let mut tokens = 0;
        for turn in turns {
            let before = tokens + number(&turn["prefill"]["tokens"]);
            assert_eq!(number(&turn["vote"]["cells_before"]), before, "{turn}");
            assert!(number(&turn["vote"]["cells_after"]) < before, "{turn}");
            tokens += tokens_in_turn(&turn);
            let cache = &turn["cache"];
            assert_eq!(number(&cache["cells"]) + number(&cache["rows_aside"]), tokens, "{turn}");
            assert!(number(&cache["bytes_aside"]) > 0, "{turn}");
        }
    }

    #[test]
    fn the_cap_holds_after_every_turn() {
        let turns = about_document(&["--max-cells", "200"], &["Hm.", "Go on.", &long_line(800)]).ok().json();
        assert_eq!(turns.len(), 4);
        for turn in turns {
            let answer = number(&turn["decode"]["tokens"]);
            assert!(number(&turn["cache"]["cells"]) <= 200 + answer, "{turn}");
        }
    }

    #[test]
    fn a_message_that_is_too_long_changes_nothing() {
        let done =
            talk(&["-c", "300", "--policy", "full"], &["Hi!", &text(CHARS).replace('\n', " "), "Name a colour."]);
        assert_eq!(done.status, 1, "a script learns of it");
        assert!(done.stderr.contains("/clear") && done.stderr.contains("raise -c"), "{}", done.stderr);
        let records = done.json();
        let [first, failed, second] = &records[..] else { panic!("{}", done.stdout) };
        assert!(failed["error"].is_string());
        assert_eq!(number(&second["cache"]["tokens"]), tokens_in_turn(first) + tokens_in_turn(second));
    }

    #[test]
    fn the_last_answer_can_be_made_again() {
        let done = about_document(&[], &["/regen", "/clear", "/regen"]);
        let records = done.json();
        let [first, again, refused] = &records[..] else { panic!("{}", done.stdout) };
        assert_eq!(again["answer"], first["answer"], "greedily it is the same");
        assert_eq!(number(&again["prefill"]["tokens"]), 0, "nothing is read again");
        assert_eq!(again["cache"], first["cache"]);
        assert!(refused["error"].as_str().unwrap().contains("no answer"));
        assert_eq!(done.status, 1);
    }

    #[test]
    fn a_saved_conversation_goes_on_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("chat").to_str().unwrap().to_owned();
        let (save, load) = (format!("/save {file}"), format!("/load {file}"));
        let here = about_document(&[], &[&save, "/clear", "Hi!", &load, "Who wrote it?"]).ok().json();
        let [first, cleared, here] = &here[..] else { panic!("{here:?}") };
        assert!(number(&cleared["cache"]["tokens"]) < 100);
        assert_eq!(number(&here["cache"]["tokens"]), tokens_in_turn(first) + tokens_in_turn(here));

        let there = talk(&["-c", "2048"], &[&load, "Who wrote it?"]).ok().json();
        assert_eq!(there[0]["answer"], here["answer"]);
        assert_eq!(there[0]["cache"]["cells"], here["cache"]["cells"]);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_file_that_does_not_fit_is_refused_and_the_chat_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (good, bad, none) = (path("good"), path("bad"), path("none"));
        talk(&["-p", "Hi!"], &[&format!("/save {good}")]).ok();
        let mut bytes = fs::read(&good).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&bad, bytes).unwrap();

        for (args, file, why) in [
            (&[][..], &bad, "damaged"),
            (&[], &none, "No such file"),
            (&["--window", "16"], &good, "--window"),
            (&["-ctk", "q8_0", "-fa", "on"], &good, "start with -ctk f16"),
        ] {
            let done = talk(args, &["Hello.", &format!("/load {file}"), "Name a colour."]);
            assert_eq!(done.status, 1);
            assert!(done.stderr.contains("cannot load") && done.stderr.contains(why), "{}", done.stderr);
            let turns = done.json();
            assert_eq!(number(&turns[1]["cache"]["tokens"]), turns.iter().map(tokens_in_turn).sum::<u64>());
        }
    }

    #[test]
    fn a_cache_with_no_cell_to_spare_refuses_a_long_message_and_the_chat_goes_on() {
        let done = talk(&["-c", "80"], &["Hi!", &long_line(600), "Well?"]);
        assert_eq!(done.status, 1, "a script learns of it");
        let records = done.json();
        let [first, failed, second] = &records[..] else { panic!("{}", done.stdout) };
        assert!(failed["error"].as_str().unwrap().contains("80 cells are too few to go on in"), "{failed}");
        assert_eq!(number(&second["cache"]["tokens"]), tokens_in_turn(first) + tokens_in_turn(second));
        // the cap is checked before the model is loaded
        let done = talk(&["--max-cells", "68"], &["Hi!"]);
        assert!(done.status == 2 && done.stderr.contains("set --max-cells to 69 or more"), "{}", done.stderr);
    }

    #[test]
    fn a_message_longer_than_the_cache_is_read_and_answered() {
        let turns = talk(&["-c", "300"], &["Hi!", &text(CHARS).replace('\n', " "), "Name a colour."]).ok().json();
        let [_, long, last] = &turns[..] else { panic!("{turns:?}") };
        assert!(number(&long["prefill"]["squeezes"]["count"]) > 0, "{long}");
        assert_eq!(number(&last["cache"]["tokens"]), turns.iter().map(tokens_in_turn).sum::<u64>());
        assert!(number(&last["cache"]["cells"]) <= 300, "{last}");
    }

    /// Samples tokens instead of always taking the most likely one.
    const DRAWN: [&str; 8] = ["-s", "7", "--temp", "0.9", "--repeat-penalty", "1.1", "-n", "8"];

    #[test]
    fn a_session_goes_on_where_it_ended_as_if_it_never_had() {
        let document = document(CHARS);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("talk").to_str().unwrap().to_owned();
        let first = ["-f", document.path().to_str().unwrap()];
        let lines = ["Who wrote it?", "Hm.", "And why?", "Name a colour.", "Another one."];
        let args = [&["-c", "2048", "--json", "--lost-mass", "0.1", "--vote", "prompt"], &DRAWN[..]].concat();
        let run = |args: &[&str], lines: &[&str]| finish_with(&mut gvote("chat", args), lines.join("\n")).ok().json();

        let expected = run(&[&args[..], &first].concat(), &lines);
        let args = [&args[..], &["--session", &file]].concat();
        let mut got = run(&[&args[..], &first].concat(), &[]);
        for line in lines {
            got.extend(run(&args, &[line]));
        }
        assert_eq!(expected.len(), 6);
        assert!(number(&expected[0]["vote"]["cells_after"]) < number(&expected[0]["vote"]["cells_before"]));
        for (got, expected) in got.iter().zip(&expected) {
            for part in ["answer", "cache"] {
                assert_eq!(got[part], expected[part]);
            }
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_session_that_cannot_be_used_ends_the_chat_before_it_begins() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (good, bad) = (path("good"), path("bad"));
        let session = |file: &str, args: &[&str]| talk(&[&["--session", file], args].concat(), &["Hi!"]);
        session(&good, &["-sys", "Be brief."]).ok();
        let mut bytes = fs::read(&good).unwrap();
        bytes.pop();
        fs::write(&bad, &bytes).unwrap();
        for (file, args, why) in [
            (&*bad, &[][..], "damaged or cut off"),
            (&good, &["-sys", "Be a pirate."], "-sys"),
            (&good, &["--sinks", "8"], "start with --sinks 4"),
            ("/nowhere/at/all", &[], "cannot save to /nowhere/at/all: No such file"),
        ] {
            let done = session(file, args);
            assert_eq!((done.status, &done.stdout[..]), (1, ""), "{}", done.stderr);
            assert!(done.stderr.contains(why), "{why}: {}", done.stderr);
        }
        assert!(fs::read(&bad).unwrap() == bytes, "left as it is");
        let turn = &session(&good, &["-sys", "Be brief."]).ok().json()[0];
        assert!(number(&turn["cache"]["tokens"]) > tokens_in_turn(turn), "the right ones are gone on with");
    }

    /// The checksum is correct, so only the file's numbers show that it was made by hand.
    #[test]
    fn a_session_made_to_do_harm_is_refused_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("talk.gvote");
        let args = ["--session", path.to_str().unwrap(), "--protect", "--revote-share", "0"];
        talk(&args, &["Hi!"]).ok();
        let sound = fs::read(&path).unwrap();
        let find = |what: &[u8]| sound.windows(what.len()).position(|bytes| bytes == what).unwrap();
        // after the magic: n_past, exact_from, the length of the labels, the labels, the length of the tokens
        let known = find(b"gvote\0\0\x02") + 16;
        let labels = u64::from_le_bytes(sound[known..][..8].try_into().unwrap()) as usize;
        let token = known + 8 + labels + 8 + 4 * 5;
        // a place after the end of the conversation's text
        let answer = find(b"\"answer\":");
        let place = answer + sound[answer..].windows(7).position(|bytes| bytes == b"\"text\":").unwrap() + 7;
        let digits = sound[place..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        for (at, value) in [(token, 2_000_000_000_u32.to_le_bytes().to_vec()), (place, vec![b'9'; digits])] {
            let mut bytes = sound[..sound.len() - blake3::OUT_LEN].to_vec();
            bytes[at..at + value.len()].copy_from_slice(&value);
            bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
            fs::write(&path, &bytes).unwrap();
            let done = talk(&args, &["And?"]);
            assert_eq!((done.status, done.stdout.as_str()), (1, ""), "{}", done.stderr);
            assert!(done.stderr.contains(args[1]) && done.stderr.lines().count() == 1, "{}", done.stderr);
            assert!(fs::read(&path).unwrap() == bytes, "the file stays");
        }
    }

    #[test]
    fn quantized_caches_are_voted_on_saved_and_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("talk").to_str().unwrap().to_owned();
        for cache_type in ["q8_0", "q4_0"] {
            let args = ["-ctk", cache_type, "-ctv", cache_type, "--max-cells", "300"];
            let turns = about_document(&args, &[&format!("/save {file}"), "Who?", "/regen"]).ok().json();
            let [first, next, again] = &turns[..] else { panic!("{turns:?}") };
            assert!(number(&first["cache"]["cells"]) <= 306, "{cache_type}: {first}");
            assert_eq!(again["answer"], next["answer"], "{cache_type}");
            let loaded = talk(&[&args[..], &["-c", "2048"]].concat(), &[&format!("/load {file}"), "Who?"]).ok().json();
            assert_eq!(loaded[0]["answer"], next["answer"], "{cache_type}");
            assert_eq!(loaded[0]["cache"], next["cache"], "{cache_type}");
        }
    }

    #[test]
    fn save_without_a_name_takes_that_of_the_session() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("talk").to_str().unwrap().to_owned();
        let done = talk(&["--session", &file], &["Hi!", "/save"]).ok();
        assert!(done.stderr.contains(&format!("saved to {file}")), "{}", done.stderr);
        assert!(talk(&[], &["/save"]).stderr.contains("name of a file"));
    }

    #[test]
    fn an_edited_message_leaves_no_trace_of_the_first() {
        let args = &["-s", "3"];
        let edited = talk(args, &["Hi!", "Name a colour.", "/edit Name an animal.", "Why?"]).ok().json();
        let straight = talk(args, &["Hi!", "Name an animal.", "Why?"]).ok().json();
        for (got, expected) in edited[2..].iter().zip(&straight[1..]) {
            for part in ["answer", "cache"] {
                assert_eq!(got[part], expected[part]);
            }
        }
        // also for the first message
        let again = talk(args, &["Hi!", "/edit Name an animal."]).ok().json();
        let straight = talk(args, &["Name an animal."]).ok().json();
        assert_eq!(again[1]["answer"], straight[0]["answer"]);
        let done = talk(args, &["/edit Hi!"]);
        assert!(done.status == 1 && done.stderr.contains("no message"), "{}", done.stderr);
    }

    #[test]
    fn after_a_reverse_prompt_the_chat_goes_on_without_reading_again() {
        let talk = |args: &[&str], lines: &str| {
            let args = [&["-n", "24", "--temp", "0", "--json"], args].concat();
            finish_with(&mut gvote("chat", &args), lines).ok().json()
        };
        let whole = talk(&[], "Name three animals.\n").remove(0);
        let whole = whole["answer"].as_str().unwrap();
        // the text begins and ends within tokens
        let letters: Vec<usize> =
            whole.char_indices().filter(|(_, c)| c.is_ascii_alphabetic()).map(|(i, _)| i).collect();
        let middle = letters.len() / 2;
        let end = &whole[letters[middle]..=letters[middle + 2]];
        let turns = talk(&["-r", end], "Name three animals.\nAnd three plants?\n");
        assert_eq!(turns[0]["answer"], whole[..whole.find(end).unwrap()]);
        assert_eq!(turns[0]["decode"]["stop"], "reverse-prompt");
        assert!(number(&turns[1]["prefill"]["tokens"]) < number(&turns[0]["prefill"]["tokens"]), "{}", turns[1]);
    }

    #[test]
    fn what_was_compressed_meanwhile_comes_back_for_an_edit_or_is_read_again() {
        let edit = format!("/edit {}", long_line(400));
        for recall in ["auto", "off"] {
            let args = ["--max-cells", "200", "--recall", recall];
            let done = about_document(&args, &[&long_line(600), &edit, "/regen"]).ok();
            let is_lost = recall == "off";
            assert_eq!(done.stderr.contains("is read again"), is_lost, "{}", done.stderr);
            let turns = done.json();
            let [first, long, edited, again] = &turns[..] else { panic!("{turns:?}") };
            let read_all = number(&edited["prefill"]["tokens"]) > number(&first["prefill"]["tokens"]);
            assert_eq!(read_all, is_lost, "{edited}");
            assert!(number(&edited["cache"]["tokens"]) < number(&long["cache"]["tokens"]), "and nothing else");
            assert_eq!(again["answer"], edited["answer"]);
        }
    }

    #[test]
    fn what_leaves_the_cache_can_lie_in_a_file_that_has_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let file = path.to_str().unwrap();
        let edit = format!("/edit {}", long_line(400));
        let answers = |recall: &str| {
            let args = ["--max-cells", "200", "--recall", recall];
            let done = about_document(&args, &[&long_line(600), &edit, "/stats"]).ok();
            let place = if recall == file { "set aside in the file of --recall" } else { "set aside in memory" };
            assert!(done.stderr.contains(place), "{}", done.stderr);
            let place = if recall == file { "file" } else { "memory" };
            let turns = done.json().into_iter();
            let cells = |turn: Value| {
                assert_eq!(turn["cache"]["aside_in"], place);
                (turn["answer"].clone(), turn["cache"]["cells"].clone(), turn["cache"]["bytes_aside"].clone())
            };
            turns.map(cells).collect::<Vec<_>>()
        };
        let expected = answers("auto");
        assert_eq!(expected.len(), 3);
        assert!(answers("ram") == expected && answers(file) == expected);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_of_recall_that_cannot_be_made_is_an_error_before_anything_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("notes");
        fs::write(&there, "mine").unwrap();
        for (path, why) in [(&there, "name one that is not there"), (&folder.path().join("no/rows"), "No such file")] {
            let done = talk(&["--recall", path.to_str().unwrap()], &["Hi!"]);
            assert!(done.status == 1 && done.stdout.is_empty(), "{}", done.stdout);
            let line = done.stderr.lines().last().unwrap();
            assert!(
                line.contains("--recall: ") && line.contains(path.to_str().unwrap()) && line.contains(why),
                "{line}"
            );
        }
        assert_eq!(fs::read(&there).unwrap(), b"mine");
    }

    /// A limit of the shell stands in for a full disk.
    #[cfg(unix)]
    #[test]
    fn on_a_full_disk_the_answer_is_written_with_all_cells_and_a_line_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let (path, document) = (folder.path().join("rows"), document(CHARS));
        let chat = gvote("chat", &["-n", "6", "--temp", "0", "--json", "-c", "2048", "--vote", "prompt"]);
        let mut limited = Command::new("sh");
        limited
            .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "sh"])
            .arg(chat.get_program())
            .args(chat.get_args());
        limited.args(["--max-cells", "200"]).arg("--recall").arg(&path).arg("-f").arg(document.path());
        limited.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let done = finish_with(&mut limited, "Hm.\n").ok();
        let line = done.stderr.lines().find(|line| line.contains("nothing was dropped")).expect("a line says so");
        assert!(line.contains("no room on the disk") && line.contains(path.to_str().unwrap()), "{line}");
        for turn in done.json() {
            assert_eq!(turn["vote"], Value::Null);
            assert_eq!((&turn["cache"]["cells"], &turn["cache"]["bytes_aside"]), (&turn["cache"]["tokens"], &0.into()));
        }
    }

    /// Compares with the full cache, all of whose cells are in memory: the difference must be that of the cells freed by the vote.
    #[cfg(target_os = "linux")]
    #[test]
    fn with_a_file_resident_memory_falls_by_what_a_vote_frees() {
        /// Share of the full cache that stays allocated: statistics and the newest queries of every head, and the positions of rows set
        /// aside. The working memory of the vote and the capture is freed.
        const KEPT: f64 = 0.05;
        let folder = tempfile::tempdir().unwrap();
        let document = document(7 * CHARS);
        let resident = |args: &[&str]| {
            let common = ["-n", "2", "--temp", "0", "--json", "-c", "6144", "-f", document.path().to_str().unwrap()];
            let mut chat = gvote("chat", &[&common, args].concat()).stdin(Stdio::piped()).spawn().unwrap();
            let mut line = String::new();
            BufReader::new(chat.stdout.take().unwrap()).read_line(&mut line).unwrap();
            let status = fs::read_to_string(format!("/proc/{}/status", chat.id())).unwrap();
            drop(chat.stdin.take());
            chat.wait().unwrap();
            let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            let kib: f64 = resident.split_whitespace().next().unwrap().parse().unwrap();
            (1024.0 * kib, serde_json::from_str::<Value>(&line).unwrap()["cache"].clone())
        };
        let (full, _) = resident(&["--policy", "full"]);
        let file = folder.path().join("rows");
        let (now, cache) = resident(&[
            "--vote",
            "prompt",
            "--lost-mass",
            "0.1",
            "--max-cells",
            "600",
            "--recall",
            file.to_str().unwrap(),
        ]);
        let bytes_of = |cells: u64| (cells * number(&cache["bytes_per_cell"])) as f64;
        let (size, cells) = (number(&cache["size"]), number(&cache["cells"]));
        let free = bytes_of(size - cells);
        let aside = number(&cache["bytes_aside"]) as f64;
        assert!(aside > 0.5 * free, "{aside} of {free} bytes were set aside: too few to tell");
        assert!(full - now > free - KEPT * bytes_of(size), "{} of {free} bytes", full - now);
    }

    #[test]
    fn what_is_set_aside_as_q8_0_takes_half_and_a_saved_chat_wants_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let session = folder.path().join("talk.gvote");
        let bytes = |args: &[&str]| {
            let args = [&["--max-cells", "200"], args].concat();
            let turn = about_document(&args, &["Hm."]).ok().json().pop().unwrap();
            number(&turn["cache"]["bytes_aside"]) as f64 / number(&turn["cache"]["rows_aside"]) as f64
        };
        let half = bytes(&["--recall-type", "q8_0", "--session", session.to_str().unwrap()]);
        let share = half / bytes(&[]);
        assert!((0.5..0.56).contains(&share), "{share}");
        let done = talk(&["-c", "2048", "--session", session.to_str().unwrap()], &["Hm."]);
        assert!(done.status == 1 && done.stderr.contains("start with --recall-type q8_0"), "{}", done.stderr);
    }

    #[test]
    fn a_save_that_fails_says_so() {
        let done = talk(&["-p", "Hi!"], &["/save /nowhere/at/all"]);
        assert_eq!(done.status, 1);
        assert!(done.stderr.contains("cannot save to /nowhere/at/all: No such file"), "{}", done.stderr);
    }

    #[test]
    fn a_system_message_starts_over() {
        let turns = talk(&[], &["Hi!", "/system Answer like a pirate.", "Hi!", "/system", "Hi!"]).ok().json();
        let [plain, pirate, again] = &turns[..] else { panic!("{turns:?}") };
        assert_eq!(number(&pirate["cache"]["tokens"]), tokens_in_turn(pirate));
        assert_eq!(again["answer"], plain["answer"]);
    }

    /// A different date would change the prompt and make the cache useless.
    #[test]
    fn a_conversation_keeps_the_date_it_was_begun_with() {
        const DAY: u64 = 24 * 60 * 60;
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (template, session) = (path("t.jinja"), path("s.gvote"));
        let source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}\
                      {% if add_generation_prompt %}[assistant]{% endif %}";
        fs::write(&template, source).unwrap();
        let turns = |day: u64, lines: &str| {
            let args = ["-n", "4", "--temp", "0", "--json", "--chat-template-file", &template, "--session", &session];
            finish_with(gvote("chat", &args).env("SOURCE_DATE_EPOCH", (day * DAY).to_string()), lines).ok().json()
        };
        let first = number(&turns(1, "Hi! Tell me about ships, boats and all that swims.\n")[0]["prefill"]["tokens"]);
        let next = turns(9, "And?\n/clear\nHi! Tell me about ships, boats and all that swims.\n");
        assert!(number(&next[0]["prefill"]["tokens"]) < first, "only what is new is read: {next:?}");
        assert_eq!(number(&next[1]["prefill"]["tokens"]), first);
    }

    #[test]
    fn what_begins_with_a_slash_is_a_message_unless_it_is_a_command() {
        let block = ["\"\"\"", "/exit", "\"\"\""];
        let lines = [
            "/etc/passwd is what?",
            block[0],
            block[1],
            block[2],
            "/sats",
            "/clear the table",
            "/stats ",
            "/exit",
            "no",
        ];
        let done = talk(&[], &lines).ok();
        assert_eq!(done.json().len(), 4, "{}", done.stdout);
        assert_eq!(done.stderr.matches("now ").count(), 1, "/stats is one: {}", done.stderr);
    }

    #[test]
    fn a_line_that_is_not_utf8_is_named_and_the_next_one_answered() {
        let input = b"Hi!\nH\xe9!\n\"\"\"\none\n\xff\n/exit\n\"\"\"\nName a colour.\n";
        let done = finish_with(&mut gvote("chat", &["-n", "2", "--temp", "0", "--json"]), input);
        let turns = done.json();
        let [first, second, third, last] = &turns[..] else { panic!("{}", done.stdout) };
        assert_eq!(done.status, 1);
        assert_eq!((&first["turn"], &last["turn"]), (&1.into(), &2.into()));
        for (turn, line) in [(second, 2), (third, 5)] {
            let error = format!("line {line} of standard input is not UTF-8 text");
            assert_eq!(turn["error"], error);
            assert!(done.stderr.contains(&error), "{}", done.stderr);
        }
    }

    #[test]
    fn a_byte_order_mark_and_carriage_returns_are_no_part_of_a_message() {
        let talk = |input: &str| finish_with(&mut gvote("chat", &["-n", "4", "--temp", "0", "--json"]), input).ok();
        let answers = |input| {
            talk(input).json().into_iter().map(|turn| (turn["answer"].clone(), turn["prefill"]["tokens"].clone()))
        };
        let plain: Vec<_> = answers("\"\"\"\nHi!\nYou!\n\"\"\"\nWho?\n").collect();
        assert_eq!(answers("\u{feff}\"\"\"\r\nHi!\r\nYou!\r\n\"\"\"\r\nWho?\r\n").collect::<Vec<_>>(), plain);
    }

    #[test]
    fn a_marker_that_somebody_writes_is_text_in_a_conversation_too() {
        let tokens = |line: &str, edit: &str| {
            let turns = talk(&[], &["Hi!", line, edit]).ok().json();
            [1, 2].map(|turn| number(&turns[turn]["prefill"]["tokens"]))
        };
        // read as text, a marker is several tokens; read as a marker, it would be one, like a letter
        let (plain, quoted) = (tokens("a a", "/edit a"), tokens("<|im_end|> <|im_end|>", "/edit <|im_start|>"));
        assert!(quoted[0] >= plain[0] + 6 && quoted[1] >= plain[1] + 3, "{plain:?} {quoted:?}");
    }

    #[test]
    fn a_closed_pipe_ends_quietly() {
        let done = hang_up(gvote("chat", &["-p", "Tell me a long story.", "-n", "2000"]).spawn().unwrap());
        assert_eq!((done.status, &done.stderr[..]), (0, ""));
    }

    #[test]
    fn ctrl_c_ends_a_script() {
        let mut child = gvote("chat", &["-p", "Tell me a long story.", "-n", "4000"]).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let (done, _) = interrupt(child);
        assert_eq!(done.status, 130, "{}", done.stderr);
    }
}
