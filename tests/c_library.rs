//! The library as an app in C or C++ meets it: built as a shared one, linked with the shared llama.cpp.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

struct Library {
    /// Folder of `libgvote.so`.
    gvote: PathBuf,
    /// Where llama.cpp was installed: `include`, `lib`.
    llama: PathBuf,
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{stdout}{stderr}");
    stdout.into_owned()
}

/// The shared library, built once, beside the target folder of the tests.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("shared");
        run(Command::new(env!("CARGO"))
            .args(["build", "--lib", "--locked", "--target-dir"])
            .arg(&target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("GVOTE_SHARED", "1"));
        let installed =
            |entry: &PathBuf| entry.to_string_lossy().ends_with("-shared") && entry.join("include").is_dir();
        let entries = target.read_dir().unwrap().map(|entry| entry.unwrap().path());
        let llama = entries.filter(installed).max_by_key(|path| path.metadata().unwrap().modified().unwrap());
        Library { gvote: target.join("debug"), llama: llama.expect("llama.cpp was installed") }
    })
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn model() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"), PathBuf::from);
    let path = cache.join("gvote/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run `make setup`", path.display());
    path
}

/// Compiles a program with warnings as errors and runs it.
fn keeps_its_promises(compiler: &str, standard: &str, name: &str) {
    let library = library();
    let (include, lib) = (library.llama.join("include"), library.llama.join("lib"));
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    run(Command::new(compiler)
        .args([standard, "-Wall", "-Wextra", "-pedantic", "-Werror", "-g", "-o"])
        .arg(&program)
        .arg(source("tests/c").join(name))
        .arg(format!("-I{}", source("ffi").display()))
        // llama.cpp's own headers warn
        .arg("-isystem")
        .arg(&include)
        .args([&library.gvote, &lib].map(|dir| format!("-L{}", dir.display())))
        .args(["-lgvote", "-lllama", "-lggml-base"])
        .args([&library.gvote, &lib].map(|dir| format!("-Wl,-rpath,{}", dir.display()))));
    let text = source("src/tests/text.txt");
    assert_eq!(run(Command::new(&program).arg(model()).arg(text)), "all kept\n");
}

#[test]
fn an_app_in_c_is_served() {
    keeps_its_promises("gcc", "-std=c11", "promises.c");
}

#[test]
fn an_app_in_cpp_is_served_by_the_wrapper() {
    keeps_its_promises("g++", "-std=c++17", "wrapper.cpp");
}

#[test]
fn the_header_is_c_and_cpp_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("only.h");
    std::fs::write(&file, "#include \"gvote.h\"\nint only(void);\nint only(void) { return GVOTE_OK; }\n").unwrap();
    for (compiler, language, standard) in
        [("gcc", "c", "-std=c11"), ("g++", "c++", "-std=c++11"), ("g++", "c++", "-std=c++17")]
    {
        run(Command::new(compiler)
            .args(["-x", language, standard, "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only"])
            .arg(format!("-I{}", source("ffi").display()))
            .arg(&file));
    }
}

#[test]
fn the_library_exports_what_the_header_declares_and_nothing_else() {
    let nm = run(Command::new("nm").args(["-D", "--defined-only"]).arg(library().gvote.join("libgvote.so")));
    let mut exported: Vec<&str> = nm.lines().filter_map(|line| line.split_whitespace().next_back()).collect();
    exported.sort_unstable();
    let header = std::fs::read_to_string(source("ffi/gvote.h")).unwrap();
    let declarations = header.lines().filter_map(|line| line.strip_prefix("GVOTE_API "));
    let mut declared: Vec<&str> =
        declarations.filter_map(|line| line.split('(').next()?.split([' ', '*']).next_back()).collect();
    declared.sort_unstable();
    assert_eq!(exported, declared);
}
