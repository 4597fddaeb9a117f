//! Tests with an unmodified program: llama.cpp's llama-completion, built with an installed gvote and the lines of the guide.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/harbour.rs"]
mod harbour;
#[path = "../../../tests/common/installed.rs"]
mod installed;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use cli::{Done, finish, finish_with, model};
use harbour::{FERRY, LIGHTHOUSE};
use installed::{llama_tools, make, run, source};

/// Number of added lines that the guide promises.
const MOST_ADDED_LINES: usize = 10;

/// Text length at which the trial's result is clear. At other lengths it is so close to the bound that the CPU's rounding decides.
const LETTERS: usize = 4500;

/// Returns the folder with both programs. The folder and its build tree stay between runs.
fn programs() -> &'static Path {
    static BUILD: OnceLock<PathBuf> = OnceLock::new();
    BUILD.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("completion");
        make("install", &dir.join("image"), "/usr/local");
        let build = dir.join("build");
        // tokens are computed by llama.cpp's libraries, so the code compiled here need not be fast, and compiles faster unoptimised
        let mut command = Command::new(source("scripts/build-completion"));
        run(command.arg(dir.join("image/usr/local")).arg("--build").arg(&build).args(["--build-type", "None"]));
        build
    })
}

/// Returns the program with the document, a question, and a context with room for more than both.
fn completion(name: &str, flags: &[&str]) -> (Command, tempfile::NamedTempFile) {
    let prompt = tempfile::NamedTempFile::new().unwrap();
    fs::write(&prompt, format!("{}\n\n{}", harbour::text(LETTERS), LIGHTHOUSE.0)).unwrap();
    let mut command = Command::new(programs().join(name));
    command.arg("-m").arg(model()).arg("-f").arg(prompt.path());
    command.args(["-c", "2048", "-n", "24", "-t", "1", "-fa", "off", "--temp", "0", "--no-display-prompt"]).args(flags);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_remove("LD_LIBRARY_PATH");
    (command, prompt)
}

/// Returns one answer.
fn answer(name: &str, flags: &[&str]) -> Done {
    let (mut command, _prompt) = completion(name, flags);
    finish(command.arg("--single-turn")).ok()
}

const PLAIN: &str = "llama-completion";
const WITH_GVOTE: &str = "llama-completion-gvote";

/// Returns the numbers in lines such as `gvote: before -> after cells`.
fn votes(done: &Done) -> Vec<(u32, u32)> {
    let lines = done.stderr.lines().filter_map(|line| line.split_once("gvote: ")?.1.strip_suffix(" cells"));
    lines.filter_map(|line| line.split_once(" -> ")).map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap())).collect()
}

#[test]
fn ten_lines_are_enough() {
    let original = fs::read_to_string(llama_tools().join("tools/completion/completion.cpp")).unwrap();
    let changed = fs::read_to_string(programs().join("completion-gvote.cpp")).unwrap();
    let mut expected = original.lines().peekable();
    let added = changed.lines().filter(|line| expected.next_if_eq(line).is_none()).count();
    assert_eq!(expected.next(), None, "every line of the original is there, in its order");
    assert!((1..=MOST_ADDED_LINES).contains(&added), "{added} lines");
}

#[test]
fn it_answers_from_fewer_cells() {
    let (without, with) = (answer(PLAIN, &[]), answer(WITH_GVOTE, &[]));
    assert!(without.stdout.contains(LIGHTHOUSE.1), "{}", without.stdout);
    assert!(with.stdout.contains(LIGHTHOUSE.1), "{}", with.stdout);
    assert!(!without.stderr.contains("gvote"), "{}", without.stderr);
    let votes = votes(&with);
    assert_eq!(votes.len(), 1, "{}", with.stderr);
    let (before, after) = votes[0];
    assert!(before > 600 && after > 64 && after < before, "{before} -> {after}");
}

#[test]
fn every_turn_of_a_chat_is_voted_on() {
    let (mut command, _prompt) = completion(WITH_GVOTE, &[]);
    let done = finish_with(&mut command, format!("{}\n", FERRY.0)).ok();
    let votes = votes(&done);
    assert_eq!(votes.len(), 2, "{}", done.stderr);
    // the second turn starts with the cells left by the first one, and adds a short answer and a question
    let new = votes[1].0 - votes[0].1;
    assert!((10..100).contains(&new), "{votes:?}");
    assert!(done.stdout.contains(LIGHTHOUSE.1), "{}", done.stdout);
}

#[test]
fn a_context_shift_behind_its_back_ends_the_votes_and_nothing_else() {
    let (tokens, _) = votes(&answer(WITH_GVOTE, &["-n", "1"]))[0];
    // an answer that does not fit: positions run out, however few cells are used
    let (n_ctx, n_predict) = ((tokens + 40).next_multiple_of(256).to_string(), "300");
    let flags = ["-c", &n_ctx, "-n", n_predict, "--ignore-eos", "--keep", "4"];
    let stopped = answer(WITH_GVOTE, &[&flags[..], &["--no-context-shift"]].concat());
    assert!(stopped.stderr.contains("context full and context shift is disabled"), "{}", stopped.stderr);

    let (mut command, _prompt) = completion(WITH_GVOTE, &[&flags[..], &["--context-shift"]].concat());
    let done = finish_with(&mut command, format!("{}\n", FERRY.0)).ok();
    assert_eq!(votes(&done).len(), 1, "{}", done.stderr);
    // the vote decides which of the two messages appears
    let refusals = ["gvote: nothing is known of sequence 0: ", "gvote: sequence 0 was changed without gvote: "];
    assert!(refusals.iter().any(|refusal| done.stderr.contains(refusal)), "{}", done.stderr);
    let (first, second) = done.stdout.split_once("\n> ").unwrap();
    assert!(first.len() > stopped.stdout.len(), "it went on after the shift: {}", done.stdout);
    assert!(second.split_whitespace().count() > 20, "and answered again: {}", done.stdout);
}

#[test]
fn a_session_file_of_the_prompt_holds_all_of_it_and_is_not_voted_on_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("session");
    let flags = ["--prompt-cache", file.to_str().unwrap()];
    assert_eq!(votes(&answer(WITH_GVOTE, &flags)).len(), 1);
    let (with, without) = (answer(WITH_GVOTE, &flags), answer(PLAIN, &flags));
    assert!(with.stderr.contains("gvote: nothing is known of sequence 0: "), "{}", with.stderr);
    assert_eq!(with.stdout, without.stdout, "saved before the vote, and so complete");
}

#[test]
fn a_session_file_of_everything_is_written_from_the_full_cache() {
    let dir = tempfile::tempdir().unwrap();
    let files = [PLAIN, WITH_GVOTE].map(|name| {
        let file = dir.path().join(name);
        let done = answer(name, &["--prompt-cache", file.to_str().unwrap(), "--prompt-cache-all"]);
        assert!(votes(&done).is_empty(), "{}", done.stderr);
        fs::read(file).unwrap()
    });
    assert!(files[0] == files[1], "both programs save the same");
}

#[test]
fn another_version_of_the_program_is_refused_with_the_line_that_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let tool = dir.path().join("tools/completion");
    fs::create_dir_all(&tool).unwrap();
    let original = fs::read_to_string(llama_tools().join("tools/completion/completion.cpp")).unwrap();
    let anchor = "auto llama_init = common_init_from_params(params);";
    fs::write(tool.join("completion.cpp"), original.replace(anchor, "")).unwrap();
    // the folder that distinguishes a source with programs from one without
    let bench = dir.path().join("tools/llama-bench");
    fs::create_dir(&bench).unwrap();
    fs::write(bench.join("CMakeLists.txt"), "").unwrap();
    let mut command = Command::new(source("scripts/build-completion"));
    let done = finish(command.arg(dir.path()).arg("--build").arg(dir.path()).env("LLAMA_CPP_DIR", dir.path()));
    assert_eq!(done.status, 1);
    assert!(done.stderr.contains(&format!("has 0 lines `{anchor}`")), "{}", done.stderr);
}

/// Returns the continuations of a prompt by the original program and by gvote, which share llama.cpp's libraries.
fn continued(flags: &[&str]) -> [String; 2] {
    let prompt = "A shopping list:\n- two apples\n- two pears\n- two";
    let common = ["-p", prompt, "-n", "16", "-c", "256", "-t", "1", "-fa", "off", "--no-display-prompt"];
    let gvote = programs().with_file_name("image/usr/local/bin/gvote");
    let texts =
        [(programs().join(PLAIN), &["-no-cnv", "--no-warmup"][..]), (gvote, &["run", "--raw", "--policy", "full"])];
    texts.map(|(program, own)| {
        let mut command = Command::new(program);
        command.args(own).args(["-m".as_ref(), model().as_os_str()]).args(common).args(flags);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_remove("LD_LIBRARY_PATH");
        let done = finish(&mut command).ok();
        done.stdout.replace(" [end of text]", "").trim_end().to_owned()
    })
}

#[test]
fn gvote_draws_what_llama_completion_draws() {
    let mut texts = Vec::new();
    for flags in [
        "",
        "--top-k 0 --top-p 0.8 --min-p 0.1",
        "--temp 0 --repeat-penalty 1.4 --repeat-last-n 20 --presence-penalty 0.5 --frequency-penalty 0.7",
        "--temp 0 --dry-multiplier 3 --dry-base 1.5 --dry-allowed-length 1 --dry-penalty-last-n 30",
        "--dry-multiplier 3 --dry-allowed-length 1 --dry-sequence-breaker \\n --dry-sequence-breaker pp",
        "--xtc-probability 0.8 --xtc-threshold 0.02",
        "--typical 0.6 --top-k 0 --top-p 1",
        "--top-nsigma 0.8 --top-k 0",
        "--mirostat 1 --mirostat-lr 0.2 --mirostat-ent 4",
        "--mirostat 2 --temp 1.2",
        "--dynatemp-range 0.7 --dynatemp-exp 1.3 --temp 1.2",
        "--samplers top_k;temp;penalties --repeat-penalty 2 --temp 1.5",
        "--sampler-seq kta --adaptive-target 0.3 --adaptive-decay 0.5",
        "--temp 0 -l 30-inf -l 29+2.5 --ignore-eos",
        "--grammar-file GRAMMAR --temp 1.2",
    ] {
        let mut grammar = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut grammar, b"root ::= (\" \" [a-z]+ \"\\n\" \"-\")+").unwrap();
        let flags = flags.replace("GRAMMAR", grammar.path().to_str().unwrap());
        let flags: Vec<&str> = flags.split_whitespace().chain(["-s", "7"]).collect();
        let [theirs, ours] = continued(&flags);
        assert_eq!(ours, theirs, "{flags:?}");
        texts.push(ours);
    }
    texts.sort();
    texts.dedup();
    assert!(texts.len() > 12, "the flags make a difference: {texts:?}");
}
