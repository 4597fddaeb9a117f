//! What each crate may be made of, by what cargo says that it compiles.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// What draws, speaks with a terminal or renders templates: no part of what a C program is linked with.
const TOOLS: [&str; 8] =
    ["clap", "comfy-table", "indicatif", "jiff", "minijinja", "minijinja-contrib", "plotters", "rustyline"];

/// Names of the packages that are compiled for one, its build script included, on any system.
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
fn only_the_library_may_be_unsafe() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates");
    let mut n = 0;
    for folder in std::fs::read_dir(crates).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        let root = ["src/lib.rs", "src/main.rs"].map(|file| folder.join(file)).into_iter().find(|file| file.exists());
        let text = std::fs::read_to_string(root.expect("a crate has a root")).unwrap();
        assert!(text.lines().any(|line| line == "#![forbid(unsafe_code)]"), "{} may be unsafe", folder.display());
        n += 1;
    }
    assert!(n >= 5, "{n} crates were looked at");
}
