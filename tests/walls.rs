//! Tests of the packages that each crate may depend on, as listed by cargo.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Packages for plots, terminals and templates: a C program must not link with them.
const TOOLS: [&str; 8] =
    ["clap", "comfy-table", "indicatif", "jiff", "minijinja", "minijinja-contrib", "plotters", "rustyline"];

/// Returns the names of the packages compiled for a package, its build script included, on any system.
fn compiled_for(package: &str) -> BTreeSet<String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["tree", "--locked", "--offline", "-p", package]);
    let done = cargo.args(["-e", "normal,build", "--all-features", "--prefix", "none"]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let lines = String::from_utf8(done.stdout).unwrap();
    lines.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

fn own(packages: &BTreeSet<String>) -> Vec<&str> {
    packages.iter().map(String::as_str).filter(|name| name.starts_with("gvote")).collect()
}

#[test]
fn the_library_compiles_no_tools() {
    let packages = compiled_for("gvote");
    assert!(packages.contains("bindgen") && packages.contains("memmap2"), "{packages:?}");
    let tools: Vec<_> = TOOLS.iter().filter(|&&tool| packages.contains(tool)).collect();
    assert!(tools.is_empty(), "the library compiles {tools:?}");
    assert_eq!(own(&packages), ["gvote", "gvote-policy"]);
}

#[test]
fn the_policies_know_no_llama_cpp() {
    let packages = compiled_for("gvote-policy");
    assert!(packages.contains("rayon"), "{packages:?}");
    assert_eq!(own(&packages), ["gvote-policy"]);
}

#[test]
fn only_the_library_and_the_plugin_may_be_unsafe() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates");
    let mut n = 0;
    for folder in fs::read_dir(crates).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        // the plugin stands between C functions
        if folder.ends_with("plugin") {
            continue;
        }
        let root = ["src/lib.rs", "src/main.rs"].map(|file| folder.join(file)).into_iter().find(|file| file.exists());
        let text = fs::read_to_string(root.expect("a crate has a root")).unwrap();
        assert!(text.lines().any(|line| line == "#![forbid(unsafe_code)]"), "{} may be unsafe", folder.display());
        n += 1;
    }
    assert!(n >= 5, "{n} crates were looked at");
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_test = |path: &Path| path.file_stem().is_some_and(|name| name == "tests");
    let (folders, files): (Vec<_>, Vec<_>) = paths.filter(|path| !is_test(path)).partition(|path| path.is_dir());
    let files = files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    files.chain(folders.iter().flat_map(|folder| sources(folder))).collect()
}

/// Errors name settings; the program translates them into flags (`crates/cli/src/spelling.rs`).
#[test]
fn the_library_spells_no_flags() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut n = 0;
    for file in ["src", "crates/policy/src", "crates/gguf/src", "crates/chat/src"]
        .map(|name| sources(&root.join(name)))
        .concat()
    {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            let is_flag = |part: &str| part.starts_with(|c: char| c.is_ascii_lowercase());
            assert!(!line.split("--").skip(1).any(is_flag), "{}: {line}", file.display());
            n += 1;
        }
    }
    assert!(n > 10_000, "{n} lines were looked at");
}
