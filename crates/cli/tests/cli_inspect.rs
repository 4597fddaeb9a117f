//! Tests of `gvote inspect`, through the built program.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/gguf.rs"]
mod file;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cli::{Done, bare, finish, model, optional};
use file::Value::{self, *};
use file::{Tensor, borrowed, decoder, head, tensor};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

const QWEN: &str = "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf";

fn inspect(path: &Path, args: &[&str]) -> Done {
    finish(&mut bare(&[&["inspect", path.to_str().unwrap()], args].concat()))
}

fn json(path: &Path, args: &[&str]) -> Json {
    let done = inspect(path, &[&["--json"], args].concat()).ok();
    assert_eq!(done.stderr, "");
    let mut values = done.json();
    assert_eq!(values.len(), 1);
    values.remove(0)
}

/// Creates a folder that contains a model of this architecture.
fn made(name: &str, extra: &[(&str, Value)], tensors: &[Tensor]) -> (TempDir, PathBuf) {
    let entries = decoder(name, extra);
    let (bytes, size) = head(&borrowed(&entries), tensors);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made.gguf");
    fs::write(&path, bytes).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
    (folder, path)
}

const WEIGHT: Tensor = Tensor { name: "output.weight", shape: &[256], kind: 12, bytes: 144, offset: None };

#[test]
fn the_default_model_is_described() {
    let found = json(&model(), &[]);
    let expected = json!({
        "architecture": "llama", "name": "Smollm2 135M 8k Lc100K Mix1 Ep2", "license": "apache-2.0", "file_type": "Q4_1",
        "gguf_version": 3, "alignment": 32, "n_params": 134_515_008, "n_tensors": 272, "n_bytes": 96_576_768,
        "n_ctx_train": 8192, "n_layer": 30, "n_embd": 576, "n_head": 9, "n_head_kv": vec![3; 30],
        "n_embd_head_k": 64, "n_embd_head_v": 64, "n_expert": 0, "sliding_window": null, "windowed_layers": [],
        "rope": {"dims": 64, "base": 100_000.0, "scaling": null, "factor": null, "original_context": null},
        "tokenizer": "gpt2", "n_vocab": 49_152, "support": "composite", "refused": null,
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&found[key], value, "{key}");
    }
    let types: Vec<_> =
        found["types"].as_array().unwrap().iter().map(|t| (t["type"].clone(), t["tensors"].clone())).collect();
    assert_eq!(types, [("Q4_1", 210), ("Q8_0", 1), ("F32", 61)].map(|(name, n)| (json!(name), json!(n))));
    let shares: f64 = found["types"].as_array().unwrap().iter().map(|t| t["share"].as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{shares}");
    let cells = &found["kv_bytes_per_cell"];
    assert_eq!([&cells["f32"], &cells["f16"], &cells["q8_0"], &cells["q4_0"]], [46_080, 23_040, 12_240, 6_480]);
    assert!(found["chat_template"].as_str().unwrap().contains("<|im_start|>"));
}

#[test]
fn qwen_is_described() {
    let Some(path) = optional(QWEN) else {
        return;
    };
    let found = json(&path, &[]);
    let expected = json!({
        "architecture": "qwen2", "file_type": "Q4_K_M", "n_params": 1_777_088_000, "n_tensors": 339, "n_bytes": 1_111_370_240,
        "n_ctx_train": 32_768, "n_layer": 28, "n_embd": 1536, "n_head": 12, "n_embd_head_k": 128, "n_vocab": 151_936,
        "support": "composite",
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&found[key], value, "{key}");
    }
    assert_eq!(found["kv_bytes_per_cell"]["f16"], 28_672);
    assert_eq!(found["types"][0]["type"], "Q4_K");
    assert_eq!(found["rope"]["base"], 1e6);
}

#[test]
fn the_summary_says_it_in_words() {
    let text = inspect(&model(), &[]).ok().stdout;
    for line in [
        "file        SmolLM2-135M-Instruct.Q4_1.gguf, 93.8 MiB, GGUF 3",
        "model       Smollm2 135M 8k Lc100K Mix1 Ep2 (llama)",
        "license     apache-2.0",
        "parameters  134,515,008 in 272 tensors",
        "weights     92.1 MiB, Q4_1, 5.74 bits a parameter",
        "context     8,192 tokens",
        "heads       9, 3 KV heads of 64",
        "RoPE        64 dimensions, base 100000",
        "window      none",
        "vocabulary  49,152 tokens (gpt2)",
        "support     composite: all 30 layers are compressed",
    ] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line:?} is not in\n{text}");
    }
    assert!(
        text.contains("ChatML (<|im_start|>)") && !text.contains("{% for message"),
        "a summary of the template\n{text}"
    );
    let row = |name: &str| {
        text.lines().find(|l| l.trim_start().starts_with(name)).unwrap().split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(row("Q4_1 "), ["Q4_1", "210", "63.3", "MiB", "68.7", "%"]);
    assert_eq!(row("f16 "), ["f16", "23,040", "180.0", "MiB"]);
    assert_eq!(row("q8_0 "), ["q8_0", "12,240", "95.6", "MiB"]);
}

#[test]
fn metadata_is_listed_and_printed_whole() {
    let list = inspect(&model(), &["--metadata"]).ok().stdout;
    assert_eq!(list.lines().count(), 1 + 33, "{list}");
    let tokens = list.lines().find(|l| l.contains("tokenizer.ggml.tokens ")).unwrap();
    assert!(tokens.contains("string[49152]") && tokens.contains("\"<|endoftext|>\", \"<|im_start|>\""), "{tokens}");
    assert!(list.contains("0.00001\n"), "a 32-bit float as it was meant\n{list}");

    let value = |key| inspect(&model(), &["--metadata", key]).ok().stdout;
    assert_eq!(value("general.license"), "apache-2.0\n");
    assert_eq!(value("llama.block_count"), "30\n");
    assert_eq!(value("llama.rope.freq_base"), "100000.0\n");
    let template = value("tokenizer.chat_template");
    assert!(
        template.starts_with("{% for message in messages %}") && template.trim_end().ends_with("{% endif %}"),
        "{template}"
    );
    let tokens: Vec<String> = serde_json::from_str(&value("tokenizer.ggml.tokens")).unwrap();
    assert_eq!((tokens.len(), &*tokens[1]), (49_152, "<|im_start|>"));

    let wrong = inspect(&model(), &["--metadata", "general.licence"]);
    assert_eq!(wrong.status, 1);
    assert!(wrong.stderr.contains("--metadata without a key"), "{}", wrong.stderr);
    let both = json(&model(), &["--metadata"]);
    assert_eq!(both["metadata"]["tokenizer.ggml.tokens"]["elements"], 49_152);
    assert_eq!(both["metadata"]["llama.block_count"]["value"], 30);
    assert_eq!(both["architecture"], "llama");
}

#[test]
fn tensors_are_listed() {
    let text = inspect(&model(), &["--tensors"]).ok().stdout;
    assert_eq!(text.lines().count(), 1 + 272);
    let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..6], ["token_embd.weight", "Q8_0", "576", "x", "49152", "30,081,024"]);
    let tensors = json(&model(), &["--tensors"])["tensors"].take();
    let tensors = tensors.as_array().unwrap();
    let end = tensors.iter().map(|t| t["offset"].as_u64().unwrap() + t["bytes"].as_u64().unwrap()).max().unwrap();
    assert_eq!(end, fs::metadata(model()).unwrap().len(), "the last tensor ends with the file");
}

#[test]
fn support_is_explained() {
    type Extra = &'static [(&'static str, Value<'static>)];
    let cases: [(&str, Extra, &str, &str); 5] = [
        ("llama", &[], "composite", "composite: all 4 layers are compressed"),
        ("gemma2", &[], "base-only", "base cache only: the 2 layers that keep the whole context"),
        ("mamba", &[], "refused", "refused: it is recurrent and keeps no attention cache"),
        (
            "deepseek2",
            &[(".attention.key_length_mla", U32(192))],
            "refused",
            "refused: it uses multi-head latent attention",
        ),
        (
            "deci",
            &[(".attention.head_count_kv", Array(&[1, 2, 2, 4]))],
            "refused",
            "refused: its layers differ in their number of heads",
        ),
    ];
    for (name, extra, support, words) in cases {
        let (_folder, path) = made(name, extra, &[WEIGHT]);
        let text = inspect(&path, &[]).ok().stdout;
        assert!(text.contains(&format!("support     {words}")), "{name}: {text}");
        let found = json(&path, &[]);
        assert_eq!(found["support"], support);
        assert_eq!(found["refused"].is_string(), support == "refused");
    }
}

#[test]
fn windows_experts_and_scaled_positions_are_described() {
    let extra = [
        (".attention.sliding_window", U32(128)),
        (".attention.sliding_window_pattern", U32(2)),
        (".expert_count", U32(32)),
        (".expert_used_count", U32(4)),
        (".rope.freq_base", F32(150_000.0)),
        (".rope.scaling.type", Text("yarn")),
        (".rope.scaling.factor", F32(32.0)),
        (".rope.scaling.original_context_length", U32(4096)),
    ];
    let (_folder, path) = made("gpt-oss", &extra, &[tensor("blk.0.ffn.weight", &[64, 4], 39, 136)]);
    let text = inspect(&path, &[]).ok().stdout;
    assert!(text.contains("window      128 tokens in 2 of 4 layers"), "{text}");
    assert!(text.contains("4 of 32 experts"), "{text}");
    assert!(text.contains("base 150000, scaling yarn, factor 32, 4,096 tokens before scaling"), "{text}");
    assert!(text.contains("MXFP4        1"), "gguf-rs takes it for three times its size\n{text}");
    let found = json(&path, &[]);
    assert_eq!(found["windowed_layers"], json!([0, 2]));
    assert_eq!((&found["n_bytes"], &found["types"][0]["bytes"]), (&json!(136), &json!(136)));
    assert_eq!(found["kv_bytes_per_cell"]["f16"], 2 * 2 * (32 + 32) * 2);
    assert_eq!(found["kv_bytes_per_window_cell"]["f16"], 2 * 2 * (32 + 32) * 2);
}

#[test]
fn types_whose_blocks_cross_heads_are_left_out() {
    let extra = [(".attention.key_length", U32(80)), (".attention.value_length", U32(80))];
    let (_folder, path) = made("llama", &extra, &[WEIGHT]);
    let cells = json(&path, &[])["kv_bytes_per_cell"].take();
    assert_eq!(cells, json!({"f32": 4 * 2 * 160 * 4, "f16": 4 * 2 * 160 * 2, "bf16": 4 * 2 * 160 * 2}));
    assert!(inspect(&path, &[]).ok().stdout.contains("heads do not fit its blocks"));
}

#[test]
fn forty_gigabytes_are_described_at_once() {
    let (_folder, path) = made("llama", &[], &[tensor("output.weight", &[10 << 30], 0, 40 << 30)]);
    let start = Instant::now();
    let found = json(&path, &[]);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(found["n_bytes"], 40_u64 << 30);
    assert_eq!(found["files"][0]["size"], fs::metadata(&path).unwrap().len());
}

#[test]
fn a_split_model_is_described_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |part| folder.path().join(format!("m-0000{part}-of-00002.gguf"));
    for part in 1..=2 {
        let mut entries = if part == 1 { decoder("llama", &[]) } else { Vec::new() };
        entries.extend([("split.no".into(), U16(part - 1)), ("split.count".into(), U16(2))]);
        let name = format!("blk.{part}.weight");
        let (bytes, size) = head(&borrowed(&entries), &[Tensor { name: &name, ..WEIGHT }]);
        fs::write(path(part), bytes).unwrap();
        File::options().write(true).open(path(part)).unwrap().set_len(size).unwrap();
    }
    let found = json(&path(1), &["--tensors"]);
    assert_eq!((&found["n_tensors"], &found["n_bytes"]), (&json!(2), &json!(288)));
    assert_eq!(found["tensors"].as_array().unwrap().iter().map(|t| t["file"].clone()).collect::<Vec<_>>(), [0, 1]);
    assert!(inspect(&path(1), &[]).ok().stdout.contains("m-00001-of-00002.gguf and 1 more"));
    let second = inspect(&path(2), &[]);
    assert_eq!(second.status, 1);
    assert!(
        second.stderr.contains("part 2 of 2") && second.stderr.contains("m-00001-of-00002.gguf"),
        "{}",
        second.stderr
    );
}

#[test]
fn bad_files_fail_with_one_line_and_a_place() {
    let (folder, path) = made("llama", &[("general.name", Text("good"))], &[WEIGHT]);
    let good = fs::read(&path).unwrap();
    let name = good.windows(4).position(|w| w == b"good").unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let cases = [
        (b"not a model at all".to_vec(), "not a GGUF file".to_owned()),
        (good[..good.len() - 1].to_vec(), "cut short".into()),
        (good[..name].to_vec(), format!("more was promised at byte {name}")),
        (with(16, &[0xff; 8]), "damaged at byte 16: it counts".into()),
        (with(name - 8, &[0xff; 8]), format!("damaged at byte {}: a string is said to have a length", name - 8)),
    ];
    for (bytes, why) in cases {
        fs::write(&path, bytes).unwrap();
        for args in [&[][..], &["--json"], &["--tensors"], &["--metadata"]] {
            let done = inspect(&path, args);
            assert_eq!((done.status, done.stdout.as_str()), (1, ""), "{why}");
            assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
            assert!(done.stderr.contains(&why), "{why} is not in {}", done.stderr);
        }
    }
    assert!(inspect(folder.path(), &[]).stderr.contains("folder"));
    assert!(inspect(&folder.path().join("none"), &[]).stderr.contains("no such file"));
    assert_eq!(finish(&mut bare(&["inspect"])).status, 2);
}

/// Each of these files makes llama.cpp fail an assertion or run endlessly.
#[test]
fn what_llama_cpp_would_not_survive_is_said_before_it_is_loaded() {
    let twins = ["a", "b", "c", "b"];
    type Case<'a> = (&'a str, &'a [(&'a str, Value<'a>)], &'a str);
    let cases: [Case; 13] = [
        ("llama", &[("tokenizer.ggml.tokens", Texts(&twins))], "two entries \"b\", the tokens 1 and 3"),
        ("llama", &[(".block_count", U32(0)), (".attention.head_count_kv", U32(2))], "0 layers (block_count)"),
        ("llama", &[(".attention.head_count_kv", U32(3))], "4 heads cannot share 3 KV heads"),
        ("llama", &[(".attention.head_count_kv", Array(&[2, 2, 3, 2]))], "4 heads cannot share 3 KV heads"),
        ("llama", &[(".attention.layer_norm_rms_epsilon", F32(-1.0))], "llama.attention.layer_norm_rms_epsilon"),
        ("llama", &[(".attention.layer_norm_rms_epsilon", F32(f32::NAN))], "llama.attention.layer_norm_rms_epsilon"),
        ("llama", &[(".rope.scaling.type", Text("mystery"))], "scaled by \"mystery\""),
        ("qwen3moe", &[(".expert_count", U32(4))], "meets 0 of 4 experts"),
        ("qwen3moe", &[(".expert_count", U32(4)), (".expert_used_count", U32(5))], "meets 5 of 4 experts"),
        ("qwen3moe", &[(".expert_count", U32(1025)), (".expert_used_count", U32(5))], "1025 experts"),
        ("gemma3", &[(".rope.dimension_count", U32(0))], "rotates 0 of the 32 values"),
        ("gemma3", &[(".rope.dimension_count", U32(31))], "rotates 31 of the 32 values"),
        ("gemma3", &[(".rope.dimension_count", U32(34))], "rotates 34 of the 32 values"),
    ];
    for (architecture, extra, why) in cases {
        let (_folder, path) = made(architecture, extra, &[WEIGHT]);
        let shown = inspect(&path, &[]).ok();
        assert!(shown.stderr.starts_with("warning: llama.cpp cannot load this model: "), "{why}: {}", shown.stderr);
        assert!(shown.stderr.contains(why) && shown.stdout.contains(architecture), "{why}: {}", shown.stderr);
        let found = inspect(&path, &["--json"]).ok().json().remove(0);
        assert!(found["faults"][0].as_str().unwrap().contains(why), "{found}");
        let file = path.to_str().unwrap();
        for args in [&["run", "-p", "Hi", "-m", file][..], &["chat", "-m", file], &["plan", file]] {
            let done = finish(&mut bare(args));
            assert_eq!((done.status, done.stdout.as_str(), done.stderr.lines().count()), (1, "", 1), "{}", done.stderr);
            assert!(done.stderr.contains(file) && done.stderr.contains(why), "{}", done.stderr);
        }
    }
}

#[test]
fn a_sound_file_has_no_faults() {
    assert_eq!(json(&model(), &[])["faults"], json!([]));
    // 0 is not a valid token id, and an entry without text is shown by its number
    let (_folder, path) =
        made("gpt2", &[("tokenizer.ggml.tokens", Texts(&["", "a", ""])), (".rope.dimension_count", U32(0))], &[WEIGHT]);
    assert_eq!(json(&path, &[])["faults"], json!([]));
}

#[test]
fn names_from_a_file_cannot_drive_the_terminal() {
    let (_folder, path) =
        made("llama", &[("general.name", Text("evil\x1b[2J\nname"))], &[Tensor { name: "a\x07b", ..WEIGHT }]);
    for args in [&[][..], &["--tensors"], &["--metadata"]] {
        let text = inspect(&path, args).ok().stdout;
        assert!(!text.contains(['\x1b', '\x07']), "{text:?}");
    }
    assert!(inspect(&path, &[]).ok().stdout.contains(r"evil\u{1b}[2J\nname"));
}

#[test]
fn run_tells_of_damage_before_it_loads() {
    let (_folder, path) = made("llama", &[("general.name", Text("good"))], &[WEIGHT]);
    let mut bytes = fs::read(&path).unwrap();
    bytes[16] = 0xff;
    bytes[20] = 0xff;
    fs::write(&path, bytes).unwrap();
    let done = finish(&mut bare(&["run", "-m", path.to_str().unwrap(), "-p", "Hi"]));
    assert_eq!(done.status, 1);
    assert!(done.stderr.starts_with("gvote: -m ") && done.stderr.contains("damaged at byte 16"), "{}", done.stderr);
}
