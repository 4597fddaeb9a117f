//! The library as an app in C or C++ meets it: installed, linked with the shared llama.cpp.

#[path = "common/cli.rs"]
mod cli;
#[path = "common/installed.rs"]
mod installed;

use std::process::Command;

use cli::model;
use installed::{prefix, run, source};

/// Compiles a program with warnings as errors and runs it.
fn keeps_its_promises(compiler: &str, standard: &str, name: &str) {
    let (lib, llama) = (prefix().join("lib"), prefix().join("lib/gvote"));
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    run(Command::new(compiler)
        .args([standard, "-Wall", "-Wextra", "-pedantic", "-Werror", "-g", "-o"])
        .arg(&program)
        .arg(source("tests/c").join(name))
        .arg(format!("-I{}", source("ffi").display()))
        // llama.cpp's own headers warn
        .arg("-isystem")
        .arg(prefix().join("include/gvote"))
        .args([&lib, &llama].map(|dir| format!("-L{}", dir.display())))
        .args(["-lgvote", "-lllama", "-lggml-base"])
        .args([&lib, &llama].map(|dir| format!("-Wl,-rpath,{}", dir.display()))));
    let text = source("src/tests/text.txt");
    // both programs run at once
    assert_eq!(run(Command::new(&program).arg(model()).arg(text).env("OMP_THREAD_LIMIT", "1")), "all kept\n");
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
    let nm = run(Command::new("nm").args(["-D", "--defined-only"]).arg(prefix().join("lib/libgvote.so")));
    let mut exported: Vec<&str> = nm.lines().filter_map(|line| line.split_whitespace().next_back()).collect();
    exported.sort_unstable();
    let header = std::fs::read_to_string(source("ffi/gvote.h")).unwrap();
    let declarations = header.lines().filter_map(|line| line.strip_prefix("GVOTE_API "));
    let mut declared: Vec<&str> =
        declarations.filter_map(|line| line.split('(').next()?.split([' ', '*']).next_back()).collect();
    declared.sort_unstable();
    assert_eq!(exported, declared);
}
