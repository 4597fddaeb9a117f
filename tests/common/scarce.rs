//! Compiles `scarce.cpp`, which makes C++ allocations fail.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// Returns the compiled `scarce.cpp`.
pub fn library() -> &'static Path {
    static MADE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = MADE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("scarce.cpp");
        std::fs::write(&source, include_str!("scarce.cpp")).unwrap();
        let mut compiler = Command::new("g++");
        compiler.args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]);
        assert!(compiler.arg(dir.path().join("scarce.so")).arg(source).status().unwrap().success());
        dir
    });
    Box::leak(dir.path().join("scarce.so").into_boxed_path())
}
