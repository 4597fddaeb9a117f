//! Tests of `gvote plan`, through the built program and against llama.cpp's real allocations.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/zeros.rs"]
mod zeros;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use cli::{Done, bare, finish, gvote, model, optional};
use gvote::SessionParams;
use gvote::llama::{CacheType, Context, ContextParams, FlashAttention, Model, ModelParams};
use serde_json::Value;
use zeros::{Zeros, file};

const QWEN: &str = "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf";

fn plan(path: &Path, args: &[&str]) -> Done {
    finish(&mut bare(&[&["plan", path.to_str().unwrap()], args].concat()))
}

fn json(args: &[&str]) -> Value {
    let done = plan(&model(), &[&["--json"], args].concat()).ok();
    assert_eq!(done.json().len(), 1);
    done.json().remove(0)
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("not a number: {value}")) as usize
}

fn of_type<'a>(plan: &'a Value, name: &str) -> &'a Value {
    plan["types"].as_array().unwrap().iter().find(|t| t["type"] == name).unwrap()
}

/// Compares a plan with a model that is actually loaded and contexts that are actually created.
fn assert_real(path: &Path, cells: u32, n_ubatch: u32, types: &[CacheType]) {
    let args = [
        "--prompt",
        &(cells - 100).to_string(),
        "-n",
        "100",
        "-ub",
        &n_ubatch.to_string(),
        "-ngl",
        "0",
        "-fa",
        "on",
        "--json",
    ];
    let plan = plan(path, &args).ok().json().remove(0);
    let model = Model::load(path, &ModelParams { n_gpu_layers: 0, ..ModelParams::default() }, |_| true).unwrap();
    for &cache_type in types {
        let context = ContextParams {
            n_ubatch,
            flash_attn: FlashAttention::On,
            type_k: cache_type,
            type_v: cache_type,
            ..Default::default()
        };
        let session = SessionParams { context, ..Default::default() };
        let real = Context::new(&model, &session.with_spare_cells(cells as usize)).unwrap().buffers();
        let planned = of_type(&plan, cache_type.name());
        assert_eq!(number(&planned["kv_cache"]), real.host.cache, "{cache_type:?}");
        assert_eq!(number(&planned["compute"]), real.host.compute, "{cache_type:?}");
        // the mapped and the repacked part of the weights may differ by some padding
        let (planned, real) = (number(&planned["total"]), real.host.total());
        assert!(planned.abs_diff(real) * 100 <= real, "{planned} of {real}");
    }
    assert!(number(&plan["weights"]).abs_diff(model.size() as usize) * 100 <= model.size() as usize);
}

#[test]
fn the_sizes_are_those_that_llama_cpp_allocates() {
    assert_real(&model(), 2000, 512, &[CacheType::F16, CacheType::Q8_0, CacheType::Q4_0, CacheType::F32]);
    assert_real(&model(), 700, 64, &[CacheType::F16, CacheType::Q5_1]);
}

#[test]
fn so_they_are_for_a_larger_model() {
    if let Some(path) = optional(QWEN) {
        assert_real(&path, 3000, 256, &[CacheType::F16, CacheType::Q8_0]);
    }
}

#[test]
fn they_are_what_llama_cpp_logs_in_a_run() {
    let plan = json(&["--prompt", "1500", "-n", "36"]);
    let command = plan["command"].as_str().unwrap();
    assert!(command.contains("-c 1536") && !command.contains("-ctk"), "{command}");
    // the cells of the plan, as requested by the command that it suggests
    let log = finish(&mut gvote("run", &["-p", "Hi", "-c", "1536", "-n", "1", "-v"])).ok().stderr;
    let sum = |what: &str| {
        let lines: Vec<&str> = log.lines().filter(|l| l.contains(what)).collect();
        assert!(!lines.is_empty(), "{what} is not in the log");
        let mib =
            |line: &&str| line.rsplit('=').next().unwrap().trim().trim_end_matches(" MiB").parse::<f64>().unwrap();
        lines.iter().map(mib).sum::<f64>()
    };
    let mib = |bytes: &Value| number(bytes) as f64 / f64::from(1 << 20);
    let f16 = of_type(&plan, "f16");
    for (logged, planned) in [
        (sum("KV buffer size"), mib(&f16["kv_cache"])),
        (sum("compute buffer size ="), mib(&f16["compute"])),
        (sum("model buffer size"), mib(&plan["weights"])),
    ] {
        assert!((logged - planned).abs() < 0.01 * planned, "{logged} MiB logged, {planned} planned");
    }
}

/// Cache of Gemma 3 270M: a window of 512 in 15 of 18 layers.
#[test]
fn a_window_takes_the_cells_that_it_needs() {
    let extra = &[(".attention.sliding_window", file::Value::U32(512))];
    let made = Zeros {
        architecture: "gemma3",
        n_layer: 18,
        n_head_kv: 1,
        head: 256,
        n_ctx: 32_768,
        extra,
        ..Zeros::default()
    };
    let made = made.write();
    let path = made.path();
    let args = ["--prompt", "30000", "-n", "512", "-v"];
    let kv_cache = |more: &[&str]| {
        let done = plan(path, &[&args[..], more, &["--json"]].concat()).ok();
        (number(&of_type(&done.json()[0], "f16")["kv_cache"]) >> 20, done.stderr)
    };
    // 30,720 cells of 3 layers, and 1,024 of 15
    let (size, log) = kv_cache(&[]);
    assert_eq!(size, 90 + 15);
    assert!(!log.contains("full-size SWA cache"), "{log}");
    assert_eq!(kv_cache(&["--swa-full"]).0, 540);
    let command = plan(path, &[&args[..], &["--swa-full"]].concat()).ok().stdout;
    assert!(command.contains(" --swa-full"), "{command}");
    assert_real(path, 30_512, 512, &[CacheType::F16]);
    // inspect counts the cells of the training context
    let shown = finish(&mut bare(&["inspect", path.to_str().unwrap()])).ok().stdout;
    let row = shown.lines().find(|line| line.trim_start().starts_with("f16 ")).unwrap();
    assert!(row.contains("111.0 MiB"), "{shown}");
    // and so does llama.cpp in a run
    let done =
        finish(&mut bare(&["run", "-m", path.to_str().unwrap(), "--raw", "-p", "ab", "-n", "1", "-c", "30512", "-v"]));
    let sizes = done.ok().stderr;
    let sizes =
        sizes.lines().filter(|line| line.contains("KV buffer size")).map(|line| line.rsplit('=').next().unwrap());
    let sizes: f64 = sizes.map(|mib| mib.trim().trim_end_matches(" MiB").parse::<f64>().unwrap()).sum();
    assert!((sizes - 105.0).abs() < 0.01, "{sizes}");
}

#[test]
fn the_most_exact_type_that_fits_is_chosen() {
    let all = json(&["--prompt", "7000"]);
    let total = |name| number(&of_type(&all, name)["total"]);
    for (memory, expected) in [(total("f16"), "f16"), (total("f16") - 1, "q8_0"), (total("q8_0") - 1, "q5_1")] {
        let plan = json(&["--prompt", "7000", "--memory", &memory.to_string()]);
        assert_eq!(plan["chosen"], expected);
        let flags = if expected == "f16" { String::new() } else { format!(" -ctk {expected} -ctv {expected}") };
        let expected = format!("gvote run -m {} -f FILE -c 7512 -n 512{flags}", model().display());
        assert_eq!(plan["command"], expected);
        for t in plan["types"].as_array().unwrap() {
            assert_eq!(t["fits"], number(&t["total"]) <= memory, "{t}");
        }
    }
}

#[test]
fn the_largest_context_fits_and_the_next_does_not() {
    let memory = 350 << 20;
    let plan = json(&["--prompt", "1000", "--memory", &memory.to_string()]);
    for name in ["f16", "q4_0"] {
        let most = number(&of_type(&plan, name)["most_cells"]);
        let total = |cells: usize| {
            let plan = json(&["--prompt", &(cells - 10).to_string(), "-n", "10"]);
            number(&of_type(&plan, name)["total"])
        };
        assert!(total(most) <= memory, "{name}: {most} cells");
        assert!(total(most + 1) > memory, "{name}: {most} cells");
    }
}

#[test]
fn what_a_vote_may_keep_is_called_an_example() {
    let plan_of = json(&["--prompt", "4000", "-n", "96"]);
    let kept = plan_of["after_vote"].as_array().unwrap();
    let found: Vec<_> = kept.iter().map(|k| ["cells", "free_cells", "kv_bytes"].map(|key| number(&k[key]))).collect();
    assert_eq!(found, [[4000, 96, 92_160_000], [2000, 2096, 46_080_000], [1000, 3096, 23_040_000]]);
    let text = plan(&model(), &["--prompt", "4000", "-n", "96", "--memory", "1G"]).ok().stdout;
    for part in
        ["cannot be known beforehand", "the buffer stays as large as -c makes it", "(an estimate)", "as examples"]
    {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[test]
fn what_does_not_fit_names_the_way_out() {
    let done = plan(&model(), &["--prompt", "8000", "-n", "100", "--memory", "250M"]);
    assert_eq!(done.status, 1);
    let error = done.stderr.lines().find(|l| l.starts_with("gvote: ")).unwrap();
    for part in ["8,100 cells do not fit into 250.0 MiB", "--prompt ", "-ctk q4_0 -ctv q4_0", "(-c ", "--memory", "-ub"]
    {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
    // following the advice works
    let words: Vec<&str> = error.split_whitespace().collect();
    let prompt = words[words.iter().position(|w| *w == "--prompt").unwrap() + 1];
    let advised =
        plan(&model(), &["--prompt", prompt, "-n", "100", "--memory", "250M", "--json"]).ok().json().remove(0);
    assert_eq!(of_type(&advised, "q4_0")["fits"], true);
    let hopeless = plan(&model(), &["--memory", "50M"]);
    assert_eq!(hopeless.status, 1);
    assert!(hopeless.stderr.contains("take a smaller model"), "{}", hopeless.stderr);
}

#[test]
fn smaller_batches_take_smaller_buffers() {
    let compute = |ub: &str| number(&of_type(&json(&["--prompt", "4000", "-ub", ub]), "f16")["compute"]);
    assert!(compute("64") < compute("512") / 4);
}

#[test]
fn without_flash_attention_there_is_no_quantized_cache() {
    let plan = json(&["--prompt", "1000", "-fa", "off"]);
    let names: Vec<_> = plan["types"].as_array().unwrap().iter().map(|t| t["type"].as_str().unwrap()).collect();
    assert_eq!(names, ["f32", "f16", "bf16"]);
    assert!(plan["command"].as_str().unwrap().ends_with("-fa off"));
}

#[test]
fn a_prompt_past_the_training_is_remarked_on() {
    let done = plan(&model(), &["--prompt", "9000"]).ok();
    assert!(done.stderr.contains("trained for 8,192 tokens"), "{}", done.stderr);
    assert_eq!(number(&json(&[])["cells"]), 8192, "the default is what the model was trained for");
}

#[test]
fn nonsense_is_a_usage_error() {
    for (args, hint) in [
        (&["--memory", "8X"][..], "8G"),
        (&["--memory", "-1G"], "--memory"),
        (&["--prompt", "0"], "--prompt"),
        (&["--prompt", "many"], "--prompt"),
        (&["-ub", "0"], "--ubatch-size"),
    ] {
        let done = plan(&model(), args);
        assert_eq!((done.status, done.stdout.as_str()), (2, ""), "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(hint), "{args:?}: {}", done.stderr);
    }
}

#[test]
fn a_file_that_is_no_model_is_refused_before_llama_cpp_sees_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file::handwritten(&[("general.architecture", file::Value::Text("llama"))], 0)).unwrap();
    // the file is well-formed, but lacks metadata that llama.cpp needs for a llama model
    let done = plan(&path, &["--prompt", "100"]);
    assert_eq!((done.status, done.stderr.lines().count()), (1, 1), "{}", done.stderr);
    assert!(done.stderr.contains("llama.cpp cannot load this model"), "{}", done.stderr);
    fs::write(&path, "text").unwrap();
    assert!(plan(&path, &[]).stderr.contains("not a GGUF file"));
}

#[test]
fn a_refused_model_is_planned_without_a_vote_and_without_its_weights() {
    // SmolLM2's head, with a hole for its weights, in a file whose type is not a model: llama.cpp accepts it
    let mut head = vec![0; 2 << 20];
    File::open(model()).unwrap().read_exact(&mut head).unwrap();
    let kind = head.windows(12).position(|w| w == b"general.type").unwrap() + 12 + 4 + 8;
    assert_eq!(&head[kind..kind + 5], b"model");
    head[kind..kind + 5].copy_from_slice(b"other");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("it's a model.gguf");
    fs::write(&path, head).unwrap();
    let size = fs::metadata(model()).unwrap().len();
    File::options().write(true).open(&path).unwrap().set_len(size).unwrap();

    let args = ["--prompt", "1000", "-n", "24"];
    let found = plan(&path, &[&args[..], &["--json"]].concat()).ok().json().remove(0);
    assert_eq!(found["after_vote"], serde_json::json!([]));
    assert_eq!(found["vote_bytes"], 0);
    // no spare cells for a vote
    assert_eq!(number(&of_type(&found, "f16")["kv_cache"]), 1024 * 23_040);
    let command = found["command"].as_str().unwrap();
    assert!(command.contains(r"/it'\''s a model.gguf'") && command.ends_with("--policy full"), "{command}");
    let text = plan(&path, &args).ok().stdout;
    assert!(text.contains("policy      full, for nothing can be compressed: it is an adapter"), "{text}");
    assert!(!text.contains("a vote"), "{text}");
}
