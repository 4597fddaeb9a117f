//! Tests of the samplers. `completion.rs` compares their draws with those of llama.cpp's own programs.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/gguf.rs"]
mod gguf;

use std::ffi::CString;
use std::fs;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ::gvote::llama::{LlamaError, Mirostat, Model, ModelParams, Sampler, SamplerKind, SamplerParams, Token};
use cli::{Done, bare, document, finish, gvote};
use gguf::Value::{F32, I32, Text};
use serde_json::Value;

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| Model::load(&cli::model(), &ModelParams::default(), |_| true).unwrap())
}

fn run(args: &[&str]) -> Done {
    finish(&mut gvote("run", args))
}

/// Returns the continuation of a text at temperature 0.
fn continued(text: &str, args: &[&str]) -> String {
    let common = ["--raw", "--no-display-prompt", "-p", text, "--temp", "0", "-c", "256"];
    run(&[&common, args].concat()).ok().stdout
}

fn json(args: &[&str]) -> Value {
    run(&[args, &["--json"]].concat()).ok().json().remove(0)
}

/// A text with an obvious continuation.
const COUNT: &str = "one two three one two three one two three one two three one two";
const FLOUR: &str = "The ingredients are: flour, sugar, flour,";

#[test]
fn the_prompt_counts_for_every_penalty() {
    let next = |args: &[&str]| continued(COUNT, &[&["-n", "1"], args].concat());
    assert!(next(&[]).contains("three"));
    for penalty in [
        &["--repeat-penalty", "100"][..],
        &["--presence-penalty", "50"],
        &["--frequency-penalty", "50"],
        &["--dry-multiplier", "50"],
    ] {
        assert!(!next(penalty).contains("three"), "{penalty:?}");
    }
}

#[test]
fn minus_one_looks_back_at_the_whole_context() {
    for (on, last_n) in
        [(["--repeat-penalty", "100"], "--repeat-last-n"), (["--dry-multiplier", "50"], "--dry-penalty-last-n")]
    {
        let last = |n| continued(COUNT, &[&on[..], &[last_n, n, "-n", "24"]].concat());
        assert_eq!(last("-1"), last("1000"), "{last_n}");
        assert_ne!(last("-1"), last("0"), "{last_n}");
    }
}

#[test]
fn the_number_that_means_random_is_refused_as_a_seed() {
    let done = run(&["-p", "Hi", "-s", "4294967295"]);
    assert_eq!((done.status, done.stderr.lines().count()), (2, 1), "{}", done.stderr);
    assert!(done.stderr.contains("--seed") && done.stderr.contains("-1"), "{}", done.stderr);
}

#[test]
fn a_sampler_that_draws_its_own_seed_tells_it() {
    let logits: Vec<f32> = (0..model().n_vocab()).map(|i| (i % 7) as f32).collect();
    let drawn = |seed| {
        let params = SamplerParams { seed, top_k: 0, temp: 5.0, ..SamplerParams::default() };
        let mut sampler = Sampler::new(model(), &params, 0).unwrap();
        let tokens: Vec<Token> = (0..8).map(|_| sampler.sample(&logits).unwrap()).collect();
        (sampler.seed(), tokens)
    };
    let (seed, tokens) = drawn(SamplerParams::RANDOM);
    assert_ne!(seed, SamplerParams::RANDOM);
    assert_eq!(drawn(seed), (seed, tokens));
}

#[test]
fn an_answer_goes_on_where_its_end_is_ignored() {
    let stop = |args: &[&str]| {
        json(
            &[&["-p", "Answer with one word: what is the capital of France?", "-n", "24", "--temp", "0"], args]
                .concat(),
        )["decode"]["stop"]
            .take()
    };
    assert_eq!(stop(&[]), "end-of-generation");
    assert_eq!(stop(&["--ignore-eos"]), "limit");
}

#[test]
fn a_bias_forbids_and_forces_tokens() {
    let id = |text: &str| model().tokenize(text, false, false).unwrap()[0];
    let next = |bias: &str| continued(FLOUR, &["-n", "1", "-l", bias]);
    let first = continued(FLOUR, &["-n", "1"]);
    let first = first.trim_end_matches('\n');
    assert_ne!(next(&format!("{}-inf", id(first))).trim_end_matches('\n'), first);
    assert_eq!(next(&format!("{}+100", id(" butter"))).trim(), "butter");
    let done = run(&["-p", "Hi", "-l", "49152+1"]);
    assert_eq!(done.status, 2);
    assert!(done.stderr.contains("--logit-bias") && done.stderr.contains("49151"), "{}", done.stderr);
}

const YES_OR_NO: &str = r#"root ::= "yes" | "no""#;

#[test]
fn an_answer_keeps_to_the_grammar() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, YES_OR_NO.as_bytes()).unwrap();
    let args = ["-p", "Is the sky blue?", "-n", "16", "--temp", "1.5", "-s", "3"];
    let answers = [["--grammar", YES_OR_NO], ["--grammar-file", file.path().to_str().unwrap()]]
        .map(|grammar| json(&[&args[..], &grammar].concat()));
    for answer in &answers {
        assert!(["yes", "no"].contains(&answer["answer"].as_str().unwrap()), "{answer}");
        assert_eq!(answer["decode"]["stop"], "end-of-generation");
    }
    assert_eq!(answers[0]["answer"], answers[1]["answer"]);
}

#[test]
fn a_vote_does_not_advance_the_grammar() {
    let document = document(2600);
    let args = ["-f", document.path().to_str().unwrap(), "-p", "Is this about animals?", "-n", "8", "--temp", "0"];
    let report =
        json(&[&args[..], &["--ratio", "0.5", "--grammar", r#"root ::= "The answer is " ("yes" | "no")"#]].concat());
    assert!(report["vote"]["cells_after"].as_u64() < report["vote"]["cells_before"].as_u64());
    let answer = report["answer"].as_str().unwrap();
    assert!(answer.starts_with("The answer is "), "{answer}");
}

fn check(grammar: &str) -> Result<(), LlamaError> {
    let grammar = Some(CString::new(grammar).unwrap());
    SamplerParams { grammar, ..SamplerParams::default() }.check(model())
}

#[test]
fn what_is_wrong_with_a_grammar_is_said() {
    let parentheses = format!("root ::= {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000));
    let chain: String = (0..100_000).map(|i| format!("r{i} ::= r{}\n", i + 1)).collect();
    let chain = format!("root ::= r0\n{chain}r100000 ::= \"a\"");
    let upwards: String = (0..100_000).rev().map(|i| format!("r{i} ::= r{}\n", i + 1)).collect();
    let upwards = format!("{upwards}r100000 ::= \"a\"\nroot ::= r0");
    let ways: String = (0..60).map(|i| format!("r{i} ::= r{0} \"x\" | r{0} \"y\"\n", i + 1)).collect();
    let ways = format!("root ::= r0\n{ways}r60 ::= \"a\"");
    for (grammar, reason) in [
        ("root ::= (", "expecting ')'"),
        ("root = \"a\"", "expecting ::="),
        ("root ::= \"a", "unexpected end"),
        ("root ::= [\\q]", "unknown escape"),
        ("root ::= <nosuchtoken>", "invalid token"),
        ("start ::= \"a\"", "no rule root"),
        ("root ::= missing", "no rule missing"),
        ("# nothing\n", "no rule root"),
        ("root ::= \"a\"{99999}", "repetitions"),
        ("root ::= root \"a\" | \"b\"", "left recursion"),
        ("root ::= a\na ::= b \"x\"\nb ::= a | \"b\"", "left recursion"),
        // llama.cpp does not detect these, and expands them endlessly or aborts
        ("root ::= x root x | \"a\"\nx ::= y\ny ::= \"\"", "left recursion"),
        ("root ::= x root\nx ::= y\ny ::= \"\"", "never ends"),
        ("root ::= \"a\" b\nb ::= \"c\" b", "never ends"),
        (&parentheses, "nested too deep"),
        (&chain, "nested too deep"),
        (&upwards, "nested too deep"),
        (&ways, "nested too deep"),
    ] {
        let start = Instant::now();
        let name = &grammar[..grammar.len().min(40)];
        match check(grammar) {
            Err(LlamaError::Grammar(why)) => assert!(why.contains(reason), "{name}: {why}"),
            other => panic!("{name}: {other:?}"),
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{name}");
    }
}

#[test]
fn grammars_that_llama_cpp_takes_are_taken() {
    let digits = format!("root ::= {}\"1\"{}", "(".repeat(200), ")".repeat(200));
    for grammar in [
        YES_OR_NO,
        "root ::= (\"a\"*)*",
        "root ::= \"a\" root | \"a\"",
        "root ::= \"a\"{0,2000}",
        "root ::= list # a comment with \" and (\nlist ::= item (\",\" item)*\r\nitem ::= [^,\\]\"]+ | \"\"",
        "# first\n\nroot ::= <|im_end|> | !<[2]>",
        "root ::= x x x \"z\"\nx ::= \"a\"?",
        &digits,
    ] {
        check(grammar).unwrap_or_else(|e| panic!("{grammar}: {e}"));
    }
    let folder = std::path::Path::new(env!("GVOTE_LLAMA_SOURCE")).join("grammars");
    for file in fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()) {
        if file.extension().is_some_and(|extension| extension == "gbnf") {
            check(&fs::read_to_string(&file).unwrap()).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
    }
}

#[test]
fn a_bad_grammar_names_its_flag_or_its_file() {
    let done = run(&["-p", "Hi", "--grammar", "root ::= ("]);
    assert_eq!((done.status, done.stderr.lines().count(), &done.stdout[..]), (2, 1, ""), "{}", done.stderr);
    assert!(done.stderr.starts_with("gvote: --grammar: "), "{}", done.stderr);
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [("bad.gbnf", &b"root ::= ("[..]), ("nul.gbnf", b"root ::= \"\0\""), ("latin.gbnf", b"\xe9")] {
        let file = dir.path().join(name);
        fs::write(&file, bytes).unwrap();
        let done = run(&["-p", "Hi", "--grammar-file", file.to_str().unwrap()]);
        assert_eq!((done.status, done.stderr.lines().count(), &done.stdout[..]), (1, 1, ""), "{}", done.stderr);
        assert!(done.stderr.contains(name), "{}", done.stderr);
    }
    let done = run(&["-p", "Hi", "--grammar-file", "/no/such/file"]);
    assert_eq!(done.status, 1);
    assert!(done.stderr.contains("/no/such/file") && done.stderr.contains("--grammar-file"), "{}", done.stderr);
}

/// A grammar may leave no token if another setting forbids the rest.
#[test]
fn a_grammar_that_leaves_no_token_is_an_error_and_no_abort() {
    let grammar = Some(CString::new("root ::= \"a\"").unwrap());
    let params = SamplerParams { grammar, ignore_eos: true, ..SamplerParams::default() };
    let mut sampler = Sampler::new(model(), &params, 0).unwrap();
    let logits = vec![0.0; model().n_vocab()];
    let token = sampler.sample(&logits).unwrap();
    assert_eq!(model().detokenize(&[token], false), "a");
    assert!(matches!(sampler.sample(&logits), Err(LlamaError::Sampling(_))));
}

#[test]
fn no_logits_and_hopeless_logits_are_an_error() {
    let mut sampler = Sampler::new(model(), &SamplerParams::default(), 0).unwrap();
    assert!(matches!(sampler.sample(&[]), Err(LlamaError::NoLogits)));
    for logit in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let logits = vec![logit; model().n_vocab()];
        assert!(matches!(sampler.sample(&logits), Err(LlamaError::NotANumber)), "{logit}");
    }
}

#[test]
fn the_model_file_recommends_settings_that_flags_override() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    let entries = [
        ("general.sampling.temp", F32(1.5)),
        ("general.sampling.top_k", I32(3)),
        ("general.sampling.penalty_repeat", F32(f32::NAN)),
        ("general.sampling.mirostat", I32(9)),
        ("general.sampling.sequence", Text("top_k;nonsense;temperature")),
    ];
    fs::write(&file, gguf::with_entries(&fs::read(cli::model()).unwrap(), &entries)).unwrap();
    let own = SamplerParams::of(&Model::load(&file, &ModelParams::default(), |_| true).unwrap());
    assert_eq!((own.temp, own.top_k, own.top_p), (1.5, 3, SamplerParams::default().top_p));
    assert_eq!(own.samplers, [SamplerKind::TopK, SamplerKind::Temperature]);
    // invalid recommendations are ignored
    assert_eq!((own.repeat_penalty, own.mirostat), (1.0, Mirostat::Off));

    let answer = |args: &[&str]| {
        let mut program = bare(&["run", "-t", "1", "--raw", "-p", FLOUR, "-n", "16", "-m", file.to_str().unwrap()]);
        finish(program.args(args)).ok().stdout
    };
    assert_ne!(answer(&["-s", "1"]), answer(&["-s", "2"]));
    assert_eq!(answer(&["-s", "1", "--temp", "0"]), answer(&["-s", "2", "--temp", "0"]));
}

#[test]
fn nonsense_is_a_usage_error() {
    for (flag, value, hint) in [
        ("--samplers", "top_k;best", "best"),
        ("--sampler-seq", "kz", "'z'"),
        ("--mirostat", "3", "0, 1 or 2"),
        ("--logit-bias", "7", "--logit-bias"),
        ("--logit-bias", "7+nan", "--logit-bias"),
        ("--repeat-penalty", "0", "above 0"),
        ("--repeat-penalty", "1e-45", "above 0"),
        ("--repeat-last-n", "-2", "-1"),
        ("--dry-base", "0.5", "from 1"),
        ("--dry-allowed-length", "-1", "--dry-allowed-length"),
        ("--xtc-probability", "2", "0 to 1"),
        ("--typical", "-1", "0 to 1"),
        ("--adaptive-decay", "1", "0.99"),
        ("--dynatemp-range", "inf", "--dynatemp-range"),
        ("--presence-penalty", "nan", "--presence-penalty"),
    ] {
        let done = run(&["-p", "Hi", &format!("{flag}={value}")]);
        assert_eq!((done.status, done.stderr.lines().count()), (2, 1), "{flag} {value}: {}", done.stderr);
        assert!(done.stderr.contains(hint), "{flag} {value}: {}", done.stderr);
    }
}
