//! Tests of the library as a C or C++ application uses it: installed, and linked with the shared llama.cpp.

#[path = "common/installed.rs"]
mod installed;
#[path = "common/model.rs"]
mod models;
#[allow(dead_code)] // also used by other tests
#[path = "../src/tests/tiny.rs"]
mod tiny;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use gvote::llama;
use installed::{prefix, run, source};
use models::model;

/// Compiles a program with warnings as errors.
fn built(compiler: &str, standard: &str, name: &str, dir: &Path) -> PathBuf {
    let (lib, llama) = (prefix().join("lib"), prefix().join("lib/gvote"));
    let program = dir.join("program");
    run(Command::new(compiler)
        .args([standard, "-Wall", "-Wextra", "-pedantic", "-Werror", "-pthread", "-g", "-o"])
        .arg(&program)
        .arg(source("tests/c").join(name))
        .arg(format!("-I{}", source("ffi").display()))
        // llama.cpp's own headers cause warnings
        .arg("-isystem")
        .arg(prefix().join("include/gvote"))
        .args([&lib, &llama].map(|dir| format!("-L{}", dir.display())))
        .args(["-lgvote", "-lllama", "-lggml-base"])
        .args([&lib, &llama].map(|dir| format!("-Wl,-rpath,{}", dir.display()))));
    program
}

/// Returns the output of a program that gets a model and a text.
fn printed(program: &mut Command, model: &Path) -> String {
    // tests run in parallel
    run(program.arg(model).arg(source("src/tests/text.txt")).env("OMP_THREAD_LIMIT", "1"))
}

fn keeps_its_promises(compiler: &str, standard: &str, name: &str, model: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let program = built(compiler, standard, name, dir.path());
    assert_eq!(printed(&mut Command::new(program), model), "all kept\n");
}

/// Returns a model that is quick to run.
fn tiny_model() -> &'static Path {
    static DIR: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let made = DIR.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = tiny::Tiny::new(dir.path(), tiny::SPECS[0]).path;
        (dir, path)
    });
    &made.1
}

#[test]
fn an_app_in_c_is_served() {
    keeps_its_promises("gcc", "-std=c11", "promises.c", &model());
}

#[test]
fn an_app_in_cpp_is_served_by_the_wrapper() {
    keeps_its_promises("g++", "-std=c++17", "wrapper.cpp", &model());
}

#[test]
fn contexts_in_threads_are_served_side_by_side() {
    keeps_its_promises("gcc", "-std=c11", "threads.c", tiny_model());
}

#[test]
fn an_exception_in_llama_cpp_becomes_a_status_and_changes_nothing() {
    keeps_its_promises("g++", "-std=c++17", "no_memory.cpp", tiny_model());
}

/// Returns an application's output when `sources` replace parts of the llama.cpp that gvote was built for.
fn told_with(sources: &[(&str, String)]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (program, other) = (built("gcc", "-std=c11", "refused.c", dir.path()), dir.path().join("other.so"));
    for (name, code) in sources {
        fs::write(dir.path().join(name), code).unwrap();
    }
    let llama = Path::new(env!("GVOTE_LLAMA_SOURCE"));
    run(Command::new("g++")
        .args(["-std=c++17", "-O0", "-shared", "-fPIC", "-o"])
        .arg(&other)
        .arg(dir.path().join(sources[0].0))
        .args(["include", "src", "ggml/include", "ggml/src"].map(|part| format!("-I{}", llama.join(part).display()))));
    printed(Command::new(program).env("LD_PRELOAD", other), tiny_model())
}

#[test]
fn another_version_of_llama_cpp_or_ggml_is_refused() {
    for (function, name) in [("llama_version", "llama.cpp"), ("ggml_version", "ggml")] {
        let code = format!("extern \"C\" const char * {function}(void) {{ return \"0.7.99-dev\"; }}\n");
        let told = told_with(&[("version.cpp", code)]);
        assert!(told.starts_with(&format!("gvote_new: gvote was built for {name} ")), "{told}");
        assert!(told.contains(&format!("has loaded {name} 0.7.99-dev")), "{told}");
    }
}

/// Adds members to llama.cpp's own code, which is compiled and replaces the installed code.
#[test]
fn a_llama_cpp_of_the_same_version_with_other_structures_is_refused() {
    let read = |name: &str| fs::read_to_string(Path::new(env!("GVOTE_LLAMA_SOURCE")).join("src").join(name)).unwrap();
    let (code, header) = (read("llama-context.cpp"), read("llama-context.h"));
    let same = [("llama-context.cpp", code.clone()), ("llama-context.h", header.clone())];
    assert_eq!(told_with(&same), "attached\n");
    for (before, moved) in [
        ("llama_cparams cparams;", "llama_context::cparams"),
        ("buffer_view<float> logits = {", "llama_context::sched"),
        ("mutable int64_t t_start_us ", "a counter of llama_context"),
        ("mutable int32_t n_eval ", "a counter of llama_context"),
    ] {
        assert_eq!(header.matches(before).count(), 1, "{before}");
        let changed = header.replacen(before, &format!("int64_t another[3] = {{7, 7, 7}};\n    {before}"), 1);
        let told = told_with(&[("llama-context.cpp", code.clone()), ("llama-context.h", changed)]);
        assert!(told.starts_with("gvote_attach: the llama.cpp in this process was built from other sources"), "{told}");
        assert!(told.contains(moved), "{told}");
    }
}

/// Compiles a program that includes only this header, with warnings as errors.
fn stands_by_itself(header: &str, compiler: &str, language: &str, standard: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("only.h");
    let code = format!("#include \"{header}\"\nint only(void);\nint only(void) {{ return GVOTE_OK; }}\n");
    fs::write(&file, code).unwrap();
    run(Command::new(compiler)
        .args(["-x", language, standard, "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only"])
        .arg(format!("-I{}", source("ffi").display()))
        .arg(&file));
}

#[test]
fn the_header_is_c_and_cpp_by_itself() {
    for (c, cpp) in [("gcc", "g++"), ("clang", "clang++")] {
        stands_by_itself("gvote.h", c, "c", "-std=c11");
        stands_by_itself("gvote.h", cpp, "c++", "-std=c++11");
        stands_by_itself("gvote.h", cpp, "c++", "-std=c++17");
        stands_by_itself("gvote.hpp", cpp, "c++", "-std=c++17");
    }
}

#[test]
fn the_library_exports_what_the_header_declares_and_nothing_else() {
    let nm = run(Command::new("nm").args(["-D", "--defined-only"]).arg(prefix().join("lib/libgvote.so")));
    let mut exported: Vec<&str> = nm.lines().filter_map(|line| line.split_whitespace().next_back()).collect();
    exported.sort_unstable();
    let header = fs::read_to_string(source("ffi/gvote.h")).unwrap();
    let declarations = header.lines().filter_map(|line| line.strip_prefix("GVOTE_API "));
    let mut declared: Vec<&str> =
        declarations.filter_map(|line| line.split('(').next()?.split([' ', '*']).next_back()).collect();
    declared.sort_unstable();
    assert_eq!(exported, declared);
}
