use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;

/// Creates a folder with one file of lines.
fn file(name: &str, lines: &[&str]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, lines.join("\n")).unwrap();
    (folder, path)
}

/// Returns the path of evaluation data, if it exists.
fn data(what: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(what);
    if !path.exists() {
        eprintln!("skipped: {} is missing", path.display());
    }
    path.exists().then_some(path)
}

/// A wrong line, and the expected error message.
type Wrong = (&'static str, &'static str);

/// Lines that are wrong in any kind of file.
const WRONG_LINES: [Wrong; 4] = [
    ("{\"input\": \"a", "the JSON object is cut off"),
    ("hello", "not JSON from column 1 on"),
    ("[1, 2]", "not a JSON object"),
    ("{}", " is missing"),
];

/// Checks that every wrong line is found on line 3, after a good and an empty one, and reported with the path. All
/// other lines are used.
fn refuses(name: &str, good: &str, wrong: &[Wrong], load: impl Fn(&Path) -> Result<Loaded, TaskError>) {
    let (_folder, path) = file(name, &[good, "", good, good]);
    let all = load(&path).unwrap().samples.len();
    for (line, what) in WRONG_LINES.iter().chain(wrong) {
        let (_folder, path) = file(name, &[good, "", line, good]);
        let Loaded { samples, refused } = load(&path).unwrap();
        assert_eq!(samples.len(), all - 1, "{line}");
        let [error] = &refused[..] else { panic!("{line}: {refused:?}") };
        let message = error.to_string();
        assert!(message.starts_with(&format!("{}:3: ", path.display())), "{line}: {message}");
        assert!(message.contains(what), "{line}: {message}");
    }
    let message = load(Path::new("/nowhere/at.all")).unwrap_err().to_string();
    assert!(message.starts_with("/nowhere"), "{message}");
}

const NIAH: &str = r#"{"input": "Remember it.\nWhat is this? It is 7.\nThe end.\nWhat is the number?", "outputs": ["7"],
    "answer_prefix": " The number is", "length": 328, "token_position_answer": 50}"#;

fn one_line(json: &str) -> String {
    json.replace("\n    ", " ")
}

fn ruler_task(path: &Path, task: &str) -> Result<Loaded, TaskError> {
    ruler::load(path.parent().unwrap(), &[task.to_owned()])
}

#[test]
fn a_ruler_prompt_is_parted_before_its_last_question() {
    let (folder, _) = file("unused", &[]);
    let root = folder.path().join("4096");
    fs::create_dir(&root).unwrap();
    let vt = r#"{"input": "VAR A = 1\nWhat now?\nQuestion: Which are 1?", "outputs": ["A", "B"], "answer_prefix": ""}"#;
    fs::write(root.join("niah_single_1.jsonl"), format!("\n{}\r\n", one_line(NIAH))).unwrap();
    fs::write(root.join("vt.jsonl"), vt).unwrap();
    let samples = ruler::load(&root, &["vt".to_owned(), "niah_single_1".to_owned()]).unwrap().samples;
    let [vt, niah] = &samples[..] else { panic!("{samples:?}") };
    assert_eq!((vt.suite.as_str(), vt.task.as_str(), vt.item.as_str()), ("ruler/4096", "vt", "vt 0"));
    assert_eq!((vt.context.as_str(), vt.question.as_str()), ("VAR A = 1\nWhat now?\n", "Question: Which are 1?"));
    assert_eq!((vt.depth, vt.max_tokens, vt.score("it is a")), (None, 30, 0.5));
    assert_eq!((vt.family(), niah.family()), ("vt", "needle"));
    assert_eq!(niah.item, "niah_single_1 1");
    assert_eq!(niah.context, "Remember it.\nWhat is this? It is 7.\nThe end.\n");
    assert_eq!((niah.question.as_str(), niah.answer_prefix.as_str()), ("What is the number?", " The number is"));
    assert_eq!(niah.full_turn(), "Remember it.\nWhat is this? It is 7.\nThe end.\nWhat is the number?");
    assert_eq!((niah.depth, niah.max_tokens), (Some(0.25), 128), "50 of 328 - 128 tokens");
}

/// Prompts in the form of RULER's generator: the text before the question, and the start of the question.
const RULER: [(&[&str], &str, &str, i32); 5] = [
    (
        &[
            "niah_single_1",
            "niah_single_2",
            "niah_single_3",
            "niah_multikey_1",
            "niah_multikey_2",
            "niah_multikey_3",
            "niah_multivalue",
            "niah_multiquery",
        ],
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the \
         numbers afterwards.\nOne of the special magic numbers for big-ox is: 7.\nWhat is this?\n",
        "What are all the special magic numbers for big-ox mentioned in the provided text?",
        128,
    ),
    (
        &["vt"],
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\nVAR A = 1\nQuestion: Find all \
         variables that are assigned the value 1 in the text above. Answer: A\n\nVAR B = 2\n",
        "Question: Find all variables that are assigned the value 2 in the text above.",
        30,
    ),
    (
        &["cwe"],
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear \
         most often.\n1. oak 2. elm 3. oak\n",
        "Question: What are the 10 most common words in the above list?",
        120,
    ),
    (
        &["fwe"],
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared \
         coded words. ... uxk ... uxk ... pq\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared \
         words in the above coded text?",
        50,
    ),
    (
        &["qa_1", "qa_2"],
        "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe \
         following are given documents.\n\nDocument 1:\nNormandy\nQuestion: what is Normandy?\n\n",
        "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n\
         Question: In what country is Normandy located?",
        32,
    ),
];

#[test]
fn all_thirteen_tasks_of_ruler_are_parted_before_the_question() {
    let mut n = 0;
    for (tasks, context, question, max_tokens) in RULER {
        for task in tasks {
            n += 1;
            let row = serde_json::json!({"input": format!("{context}{question}"), "outputs": ["7", "B"], "answer_prefix": " A:"});
            let (_folder, path) = file(&format!("{task}.jsonl"), &[&row.to_string()]);
            let Loaded { samples, refused } = ruler_task(&path, task).unwrap();
            assert!(refused.is_empty(), "{task}: {refused:?}");
            assert_eq!((&*samples[0].context, &*samples[0].question), (context, question), "{task}");
            assert_eq!((samples[0].max_tokens, &*samples[0].answer_prefix), (max_tokens, " A:"), "{task}");
            // one of several spellings suffices
            let half = if task.starts_with("qa") { 1.0 } else { 0.5 };
            assert_eq!((samples[0].score("It is 7."), samples[0].score("8")), (half, 0.0), "{task}");
        }
    }
    assert_eq!(n, 13);
}

#[test]
fn a_question_about_documents_is_parted_without_an_instruction_too() {
    for (context, question) in [
        ("Document 1:\nRain.\n\n", "Question: What falls?"),
        ("Answer the question based on the given documents.\n\nDocument 1:\nRain.\n\n", "Question: What falls?"),
    ] {
        let row =
            serde_json::json!({"input": format!("{context}{question}"), "outputs": ["rain"], "answer_prefix": ""});
        let (_folder, path) = file("qa_2.jsonl", &[&row.to_string()]);
        let sample = &ruler_task(&path, "qa_2").unwrap().samples[0];
        assert_eq!((&*sample.context, &*sample.question), (context, question));
    }
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_row() {
    let (_folder, path) = file("multi_news.jsonl", &[&format!("\u{feff}{NEWS}\r"), &format!("{NEWS}\r")]);
    let Loaded { samples, refused } = longbench::load(&path).unwrap();
    assert!(samples.len() == 2 && refused.is_empty(), "{refused:?}");
}

#[test]
fn a_ruler_depth_that_is_no_number_is_left_out() {
    for (place, depth) in [("null", None), ("\"50\"", None), ("[50]", None), ("500", Some(1.0)), ("20.0", Some(0.1))] {
        let line = one_line(NIAH).replace("50}", &format!("{place}}}"));
        let (_folder, path) = file("niah_single_1.jsonl", &[&line]);
        assert_eq!(ruler_task(&path, "niah_single_1").unwrap().samples[0].depth, depth, "{place}");
    }
}

#[test]
fn a_wrong_ruler_line_is_named() {
    let wrong = [
        (r#"{"outputs": ["7"], "answer_prefix": ""}"#, "`input` is missing"),
        (r#"{"input": 3, "outputs": ["7"], "answer_prefix": ""}"#, "`input` is not a string"),
        (r#"{"input": "a\nWhat b?", "answer_prefix": ""}"#, "`outputs` is missing"),
        (r#"{"input": "a\nWhat b?", "outputs": "7", "answer_prefix": ""}"#, "`outputs` is not a list of strings"),
        (r#"{"input": "a\nWhat b?", "outputs": ["7", 8], "answer_prefix": ""}"#, "`outputs` is not a list of strings"),
        (r#"{"input": "a\nWhat b?", "outputs": [], "answer_prefix": ""}"#, "`outputs` is empty"),
        (r#"{"input": "a\nWhat b?", "outputs": ["7"]}"#, "`answer_prefix` is missing"),
        (r#"{"input": "a, What b?\nQuestion: b?", "outputs": ["7"], "answer_prefix": ""}"#, "starts with \"What \""),
        (r#"{"input": "What b?", "outputs": ["7"], "answer_prefix": ""}"#, "no context"),
    ];
    refuses("niah_single_1.jsonl", &one_line(NIAH), &wrong, |path| ruler_task(path, "niah_single_1"));
}

const SUM: &str = r#"{"question": "What is 1+1?", "answer": "It is 1+1=<<1+1=2>>2. Not <<3.\n#### 2"}"#;

#[test]
fn gsm8k_examples_come_from_the_end_and_are_not_scored() {
    let third = SUM.replace("What", "And what");
    let (_folder, path) = file("test.jsonl", &[SUM, SUM, &third, ""]);
    let samples = gsm8k::load(&path, 1, usize::MAX).unwrap().samples;
    let [first, second] = &samples[..] else { panic!("{samples:?}") };
    assert!(first.context.ends_with("alone.\n\nQuestion: And what is 1+1?\nAnswer: It is 1+1=2. Not <<3.\n#### 2\n\n"));
    assert_eq!(first.question, "Question: What is 1+1?\nAnswer:");
    assert_eq!((&first.references[..], first.max_tokens), (&["2".to_owned()][..], 256));
    assert_eq!((first.suite.as_str(), first.item.as_str(), second.item.as_str()), ("gsm8k", "gsm8k 0", "gsm8k 1"));
    assert_eq!(first.family(), "few-shot");
    assert_eq!((first.score(" 1+1=2\n#### 2"), first.score("3")), (1.0, 0.0));
    assert_eq!(gsm8k::load(&path, 1, 1).unwrap().samples, samples[..1]);
    assert_eq!(gsm8k::load(&path, 0, 9).unwrap().samples.len(), 3);
    let message = gsm8k::load(&path, 3, 1).unwrap_err().to_string();
    assert!(
        message.ends_with("test.jsonl: 3 problems (--gsm8k) are too few for 3 worked examples and one to score"),
        "{message}"
    );
}

#[test]
fn a_wrong_gsm8k_line_is_named() {
    let wrong = [
        (r#"{"answer": "2 #### 2"}"#, "`question` is missing"),
        (r#"{"question": "q", "answer": 2}"#, "`answer` is not a string"),
        (r#"{"question": "q", "answer": "2"}"#, "does not end in ####"),
        (r#"{"question": "q", "answer": "2 #### two"}"#, "does not end in ####"),
    ];
    refuses("test.jsonl", SUM, &wrong, |path| gsm8k::load(path, 1, usize::MAX));
}

const NEWS: &str = r#"{"context": "Passage 1:\nIt rained.\n", "answers": ["Rain fell.", "It rained."]}"#;

#[test]
fn multi_news_asks_for_a_summary_of_all_articles() {
    let (_folder, path) = file("multi_news.jsonl", &[NEWS]);
    let sample = &longbench::load(&path).unwrap().samples[0];
    assert!(sample.context.ends_with("\n\nPassage 1:\nIt rained.\n\n") && sample.question.contains("summary"));
    assert_eq!((sample.suite.as_str(), sample.item.as_str()), ("longbench", "multi_news 0"));
    assert_eq!((sample.metric, sample.max_tokens, sample.score("it rained")), (Metric::RougeL, 512, 1.0));
}

#[test]
fn a_wrong_multi_news_line_is_named() {
    let wrong = [
        (r#"{"answers": ["a"]}"#, "`context` is missing"),
        (r#"{"context": ["a"], "answers": ["a"]}"#, "`context` is not a string"),
        (r#"{"context": "a", "answers": []}"#, "`answers` is empty"),
        (r#"{"context": "a", "answers": {}}"#, "`answers` is not a list of strings"),
    ];
    refuses("multi_news.jsonl", NEWS, &wrong, longbench::load);
}

#[test]
fn text_that_is_not_utf8_is_named_too() {
    let (_folder, path) = file("multi_news.jsonl", &[NEWS]);
    fs::write(&path, [NEWS.as_bytes(), b"\n{\"context\": \"\xff\"}\n"].concat()).unwrap();
    let Loaded { samples, refused } = longbench::load(&path).unwrap();
    assert!(samples.len() == 1 && refused[0].to_string().contains(":2: not JSON"), "{refused:?}");
}

/// Returns the position of the needle in a sample's text (the context without the instruction), 0 to 1.
fn found_at(sample: &Sample) -> f64 {
    let (_, text) = sample.context.split_once("\n\n").unwrap();
    let needle = format!("{} {}.", sample.answer_prefix.trim_start(), sample.references[0]);
    assert_eq!(text.matches(&needle).count(), 1, "{needle}");
    assert_eq!(sample.full_turn().matches(&sample.references[0]).count(), 1, "{}", sample.references[0]);
    let (before, after) = text.split_once(&needle).unwrap();
    before.len() as f64 / (before.len() + after.len()) as f64
}

#[test]
fn a_needle_lies_once_at_the_asked_depth() {
    let depths = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0];
    let samples = needle::grid(&[400, 3000], &depths, 5);
    assert_eq!(samples.len(), 12);
    for (sample, (words, depth)) in samples.iter().zip([400, 3000].iter().flat_map(|w| depths.map(|d| (*w, d)))) {
        let off = (found_at(sample) - depth).abs();
        // At most half of a sentence; words differ in length.
        assert!(off < 0.02 + 20.0 / words as f64, "{}: off by {off}", sample.item);
        assert!(depth > 0.0 && depth < 1.0 || off < 1e-2, "{}: off by {off}", sample.item);
        assert_eq!((sample.depth, sample.task.clone()), (Some(depth), format!("{words} words")));
        let have = sample.context.split_whitespace().count();
        assert!((words..words + 40).contains(&have), "{have} words");
        assert_eq!(sample.score(&format!(" {}.", sample.references[0])), 1.0);
    }
}

#[test]
fn a_needle_has_others_beside_it_that_share_its_words() {
    let sample = needle::generate(500, 0.3, 2);
    let numbers: Vec<&str> =
        sample.context.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty()).collect();
    assert_eq!(numbers.len(), 5);
    assert!(numbers.iter().all(|number| number.len() == 7));
    let key =
        sample.question.strip_prefix("What is the magic number of the ").and_then(|k| k.strip_suffix('?')).unwrap();
    let (colour, animal) = key.split_once(' ').unwrap();
    assert_eq!((sample.context.matches(colour).count(), sample.context.matches(animal).count()), (2, 2));
}

#[test]
fn a_needle_is_a_function_of_its_arguments() {
    let of = |words, depth, seed| needle::generate(words, depth, seed);
    assert_eq!(of(300, 0.5, 1), of(300, 0.5, 1));
    for other in [of(300, 0.5, 2), of(300, 0.6, 1), of(301, 0.5, 1)] {
        assert_ne!(of(300, 0.5, 1).context, other.context);
        assert_ne!(of(300, 0.5, 1).item, other.item);
    }
    assert_eq!(needle::grid(&[200, 300], &[0.1, 0.5], 1)[3], of(300, 0.5, 1), "a cell does not depend on the others");
    // Scores of different versions can be compared only if this text stays the same.
    let pinned = of(70, 0.5, 1);
    assert!(
        pinned.context.ends_with(
            "\n\n\"The letter is handsome,\" said Bertha, and went back to work. The magic number of the olive badger is \
             7047001. The magic number of the violet beetle is 8750302. The magic number of the olive falcon is 2609649.\
             \n\nTowards evening, the surveyor painted the gate although it was hardly needed. The magic number of the \
             crimson raven is 4810902. A letter from Colin lay under the bench for several weeks. The magic number of the \
             indigo falcon is 2954686.\n\n"
        ),
        "{}",
        pinned.context
    );
}

#[test]
fn real_ruler_files_load() {
    let tasks =
        ["niah_single_1", "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "fwe"].map(str::to_owned);
    for length in [2048, 4096, 8192] {
        let Some(folder) = data(&format!("ruler/{length}")) else { return };
        let samples = ruler::load(&folder, &tasks).unwrap().samples;
        assert_eq!(samples.len(), 25 * tasks.len());
        for sample in samples {
            assert_eq!(sample.suite, format!("ruler/{length}"));
            assert!(!sample.question.contains('\n') && sample.question.len() < 250, "{}", sample.question);
            assert_eq!(sample.depth.is_some(), sample.task.starts_with("niah"), "{}", sample.item);
            if sample.task == "niah_single_1" {
                let at = sample.context.find(&sample.references[0]).unwrap() as f64 / sample.full_turn().len() as f64;
                assert!((at - sample.depth.unwrap()).abs() < 0.03, "{}: {at} {:?}", sample.item, sample.depth);
            }
        }
    }
}

#[test]
fn real_gsm8k_problems_load_and_solve_themselves() {
    let Some(path) = data("gsm8k/test.jsonl") else { return };
    let samples = gsm8k::load(&path, gsm8k::SHOTS, usize::MAX).unwrap().samples;
    assert_eq!(samples.len(), 1319 - gsm8k::SHOTS);
    assert_eq!(samples[0].context.matches("Question: ").count(), gsm8k::SHOTS);
    assert!(samples.iter().all(|s| !s.context.contains("<<") && s.score(&s.references[0]) == 1.0));
    assert!(samples.iter().any(|s| s.references[0].contains(',')));
}

#[test]
fn real_news_load() {
    let Some(path) = data("longbench/multi_news.jsonl") else { return };
    let samples = longbench::load(&path).unwrap().samples;
    assert_eq!(samples.len(), 200);
    assert!(samples.iter().all(|s| (s.score(&s.references[0]) - 1.0).abs() < 1e-12));
}
