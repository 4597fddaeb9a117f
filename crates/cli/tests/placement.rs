//! Tests of the flags that say how a model is loaded and changed while loading.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[allow(dead_code)] // also used by other tests
#[path = "../../../src/tests/tiny.rs"]
mod tiny;

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use cli::{Done, bare, document, finish, text};
use gvote::llama;
use serde_json::Value;
use tiny::Tiny;

/// Returns a small model with a vocabulary, and an adapter for it.
fn files() -> &'static (tempfile::TempDir, Tiny, tiny::Adapter) {
    static FILES: OnceLock<(tempfile::TempDir, Tiny, tiny::Adapter)> = OnceLock::new();
    FILES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let model = Tiny::new(folder.path(), tiny::Spec { vocabulary: true, ..tiny::SPECS[0] });
        let adapter = model.adapter(folder.path());
        (folder, model, adapter)
    })
}

fn run_with(model: &Path, flags: &[&str]) -> Done {
    let prompt = text(600);
    let common = ["run", "-m", model.to_str().unwrap(), "-p", &prompt, "-n", "12", "--temp", "0", "-t", "1", "--raw"];
    finish(&mut bare(&[&common, flags].concat()))
}

/// Returns the model's report on a text, with these flags.
fn said(flags: &[&str]) -> Value {
    run_with(&files().1.path, &[flags, &["--json"]].concat()).ok().json().remove(0)
}

fn answer(flags: &[&str]) -> Value {
    let mut said = said(flags);
    assert!(!said["answer"].is_null(), "{said}");
    said["answer"].take()
}

#[test]
fn an_adapter_changes_the_answer_and_is_voted_with() {
    let lora = files().2.path.to_str().unwrap();
    let plain = answer(&[]);
    let adapted = said(&["--lora", lora]);
    assert_ne!(adapted["answer"], plain);
    assert_eq!(answer(&["--lora-scaled", &format!("{lora}:1")]), adapted["answer"]);
    assert_eq!(answer(&["--lora-scaled", &format!("{lora}:0")]), plain);
    let vote = |flags: &[&str]| {
        let mut said = said(&[flags, &["--max-cells", "80"]].concat());
        assert!(said["vote"]["cells_after"].as_u64() < said["vote"]["cells_before"].as_u64(), "{said}");
        said["vote"]["lost_mass"].take()
    };
    assert_ne!(vote(&["--lora", lora]), vote(&[]));
}

#[test]
fn a_file_that_is_no_adapter_is_named() {
    let text = document(100);
    let model = files().1.path.to_str().unwrap();
    for path in [text.path().to_str().unwrap(), model, "nowhere.gguf"] {
        let done = run_with(&files().1.path, &["--lora", path]);
        assert_eq!((done.status, done.stderr.lines().count()), (1, 1), "{}", done.stderr);
        assert!(done.stderr.contains("--lora") && done.stderr.contains(path), "{}", done.stderr);
    }
}

#[test]
fn a_value_in_place_of_the_files_counts_before_it_is_loaded() {
    let (folder, model, _) = files();
    let key = b"llama.attention.head_count_kv";
    let mut bytes = fs::read(&model.path).unwrap();
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    let right = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    bytes[at..at + 4].copy_from_slice(&77u32.to_le_bytes());
    let broken = folder.path().join("broken.gguf");
    fs::write(&broken, bytes).unwrap();
    assert_eq!(run_with(&broken, &[]).status, 1);
    let mended = format!("llama.attention.head_count_kv=int:{right}");
    let mended = run_with(&broken, &["--json", "--override-kv", &mended]).ok().json().remove(0);
    assert_eq!(mended["answer"], answer(&[]));
    // conversely, an override that makes the model invalid is refused as if the file said so
    let done = run_with(&model.path, &["--override-kv", "llama.attention.head_count=int:0"]);
    assert_eq!((done.status, done.stderr.lines().count()), (1, 1), "{}", done.stderr);
}

#[test]
fn how_it_is_read_and_where_it_lies_changes_nothing() {
    let plain = answer(&[]);
    for flags in [
        "--no-mmap",
        "-lm mmap",
        "--device none",
        "-ot .*=CPU",
        "--cpu-moe",
        "-ncmoe 1",
        "-sm none",
        "-sm row",
        "-ts 3,1",
        "-nkvo",
        "--poll 0",
        "--poll 100",
        "--prio -1",
    ] {
        let flags: Vec<&str> = flags.split(' ').collect();
        assert_eq!(answer(&flags), plain, "{flags:?}");
    }
}

#[test]
fn a_context_is_stretched_in_one_way_or_the_other() {
    let [plain, scaled, factor, base] =
        [&[][..], &["--rope-scale", "4"], &["--rope-freq-scale", "0.25"], &["--rope-freq-base", "500"]].map(answer);
    assert_eq!(scaled, factor);
    assert!(plain != scaled && plain != base && scaled != base);
    let yarn = ["--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "64"];
    assert!(![plain, scaled].contains(&answer(&yarn)));
}
