//! Tests of the kit for CUDA machines: `make cuda-kit` and its scripts.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/installed.rs"]
mod installed;

use std::fs;
use std::path::Path;
use std::process::Command;

use cli::{Done, finish, model};
use installed::{run, source};
use serde_json::Value;

const SCRIPTS: [&str; 4] = ["all", "build", "check", "measure"];

fn script(name: &str, args: &[&str]) -> Done {
    finish(Command::new(source("benches/gpu").join(name)).args(args))
}

fn first_line(file: &Path) -> String {
    fs::read_to_string(file).unwrap().lines().next().unwrap().to_owned()
}

/// Parses a script without running it.
fn parses(file: &Path) {
    if first_line(file).ends_with("python3") {
        run(Command::new("python3").args(["-c", "import ast, sys; ast.parse(open(sys.argv[1]).read())"]).arg(file));
    } else {
        run(Command::new("bash").arg("-n").arg(file));
        run(Command::new("dash").arg("-n").arg(file));
    }
}

#[test]
fn the_scripts_are_well_formed_and_have_help() {
    parses(&source("scripts/cuda-kit"));
    for (name, hint) in [("all", "-m MODEL"), ("build", "--arch"), ("check", "--model"), ("measure", "--bandwidth")] {
        parses(&source("benches/gpu").join(name));
        let help = script(name, &["--help"]).ok().stdout;
        assert!(help.contains(hint), "{name}: {help}");
    }
}

#[test]
fn outside_a_kit_the_scripts_say_what_is_missing() {
    for (name, args) in [("build", &[][..]), ("check", &["-m", "model.gguf"]), ("measure", &["-m", "model.gguf"])] {
        let done = script(name, args);
        assert_eq!((done.status, done.stderr.lines().count()), (1, 1), "{name}: {}", done.stderr);
        assert!(done.stderr.contains("make cuda-kit"), "{name}: {}", done.stderr);
    }
    assert_eq!(script("all", &["-m"]).status, 2);
    let done = script("build", &["--gpu"]);
    assert!(done.status == 1 && done.stderr.contains("--gpu"), "{}", done.stderr);
}

#[test]
fn the_list_of_packed_files_is_complete() {
    let list = run(Command::new(source("scripts/cuda-kit")).arg("--list"));
    let packed: Vec<&str> = list.lines().collect();
    for file in &packed {
        assert!(source(file).is_file(), "{file}");
    }
    for name in SCRIPTS.iter().chain(&["README.md"]) {
        assert!(packed.contains(&format!("benches/gpu/{name}").as_str()), "{name}: {list}");
    }
    // programs that the script `check` runs
    let check = fs::read_to_string(source("benches/gpu/check")).unwrap();
    for program in ["promises.c", "refused.c", "threads.c", "wrapper.cpp"] {
        assert!(packed.contains(&format!("tests/c/{program}").as_str()), "{program}: {list}");
        assert!(check.contains(&format!("\"{}\"", program.split('.').next().unwrap())), "{program}");
    }
}

/// Uses CPU libraries instead of those for CUDA.
#[test]
#[ignore = "builds gvote in release and llama.cpp twice: about half an hour on two cores"]
fn a_kit_builds_checks_and_measures_wherever_it_lies() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let archive = dir.path().join("kit.tar.xz");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-kit");
    run(Command::new(source("scripts/cuda-kit")).arg(&archive).env("CARGO_TARGET_DIR", target));
    run(Command::new("tar").arg("xf").arg(&archive).current_dir(&dir));
    let kit = dir.path().join("gvote-cuda-kit");
    let kit_script = |name: &str, args: &[&str]| {
        finish(Command::new(kit.join(name)).args(args).env("OMP_WAIT_POLICY", "passive").env_remove("LD_LIBRARY_PATH"))
    };

    kit_script("build", &["--cpu"]).ok();
    let loaded = run(Command::new("ldd").arg(kit.join("bin/gvote")));
    for line in loaded.lines().filter(|line| line.contains("libllama") || line.contains("libggml")) {
        assert!(line.contains(kit.to_str().unwrap()), "{line}");
    }

    let model = model();
    let done = kit_script("check", &["-m", model.to_str().unwrap(), "-ngl", "0", "-s", "1", "--chars", "2000"]);
    assert!(done.status == 0 && done.stdout.ends_with("all checks hold\n"), "{}{}", done.stdout, done.stderr);
    assert!(done.stdout.contains("| q8_0, flash attention on | 1 | CPU | 1.0000 | 1.0000 |"), "{}", done.stdout);

    let tiny = dir.path().join("tiny.gguf");
    let shape = "--n-layer 2 --n-embd 256 --n-head 4 --n-head-kv 2 --n-ff 512 --n-vocab 512";
    run(Command::new(kit.join("bin/random-model")).arg(&tiny).args(shape.split(' ')));
    let args = "-ngl 0 -p 512,768 -n 4 -r 1 -d 512 -npl 1,2 -t 2 --bandwidth 50 --memory 1G";
    let args = [&["-m", tiny.to_str().unwrap()], &args.split(' ').collect::<Vec<_>>()[..]].concat();
    let done = kit_script("measure", &args).ok();
    for part in [
        "| 512 | prefill, -fa on | capture, vote and compaction / prefill |",
        "| 768 | decode, -fa on | time compressed / full of as many cells |",
        "| 2 | 512 | gvote | 256 |",
    ] {
        assert!(done.stdout.contains(part), "{part}\n{}", done.stdout);
    }
    let figures = fs::read_to_string(kit.join("measure.jsonl")).unwrap();
    assert!(figures.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{figures}");
}
