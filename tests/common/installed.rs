//! The result of `make install`, from the build that the tests themselves use.
#![allow(dead_code)] // each test program uses only a part of it

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{stdout}{stderr}");
    stdout.into_owned()
}

/// Returns the root of the repository.
pub fn root() -> &'static Path {
    let mut folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    folders.find(|folder| folder.join("Makefile").exists()).expect("every package lies in it")
}

pub fn source(name: &str) -> PathBuf {
    root().join(name)
}

/// Runs `make` with this goal and these folders.
pub fn make(goal: &str, destdir: &Path, prefix: &str) {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    make_from(scratch.parent().expect("it lies in the target folder"), &[], goal, destdir, prefix);
}

/// Runs `make` with its own target folder and these environment variables for cargo.
pub fn make_from(target: &Path, env: &[(&str, &Path)], goal: &str, destdir: &Path, prefix: &str) {
    // all calls share the staging folder
    static STAGE: Mutex<()> = Mutex::new(());
    let _stage = STAGE.lock().unwrap_or_else(|e| e.into_inner());
    run(Command::new("make")
        .current_dir(root())
        .env("CARGO_TARGET_DIR", target)
        .envs(env.iter().copied())
        .arg(goal)
        .arg("PROFILE=dev")
        .arg(format!("STAGE={}", Path::new(env!("CARGO_TARGET_TMPDIR")).join("stage").display()))
        .arg(format!("DESTDIR={}", destdir.display()))
        .arg(format!("PREFIX={prefix}")));
}

/// Returns a folder with everything installed, moved after the installation: nothing may depend on its old path.
pub fn prefix() -> &'static Path {
    static PREFIX: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = PREFIX.get_or_init(|| {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        make("install", &dir.path().join("image"), "/usr/local");
        std::fs::rename(dir.path().join("image/usr/local"), dir.path().join("moved")).unwrap();
        dir
    });
    Box::leak(dir.path().join("moved").into_boxed_path())
}

/// Compiles a C program as the guide says.
pub fn built_with_pkg_config(prefix: &Path, code: &Path, dir: &Path) -> PathBuf {
    let flags = run(Command::new("pkg-config")
        .args(["--cflags", "--libs", "gvote"])
        .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")));
    let program = dir.join("program");
    run(Command::new("gcc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror"])
        .arg(code)
        .arg("-o")
        .arg(&program)
        .args(flags.split_whitespace()));
    program
}

/// Builds a one-file program, in C or C++, as a CMake project that links one of gvote's targets.
pub fn built_with_cmake(prefix: &Path, code: &Path, target: &str, dir: &Path) -> PathBuf {
    // a C application needs no C++ compiler
    let language = if code.extension().is_some_and(|ending| ending == "c") { "C" } else { "CXX" };
    let list = format!(
        "cmake_minimum_required(VERSION 3.16)\nproject(app {language})\nset(CMAKE_CXX_STANDARD 17)\n\
        find_package(gvote 0.1 REQUIRED)\nadd_executable(app {})\ntarget_link_libraries(app PRIVATE {target})\n",
        code.display()
    );
    std::fs::write(dir.join("CMakeLists.txt"), list).unwrap();
    let build = dir.join("build");
    run(Command::new("cmake")
        .arg("-S")
        .arg(dir)
        .arg("-B")
        .arg(&build)
        .arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display())));
    run(Command::new("cmake").arg("--build").arg(&build));
    build.join("app")
}

/// Writes the guide's first program to a file in `dir`.
pub fn guide_program(dir: &Path) -> PathBuf {
    let guide = std::fs::read_to_string(source("docs/c-api.md")).unwrap();
    let code = guide.split_once("```c\n").unwrap().1.split_once("```").unwrap().0;
    let file = dir.join("guide.c");
    std::fs::write(&file, code).unwrap();
    file
}

/// Returns the source of llama.cpp's own programs, of the version that gvote is built from.
pub fn llama_tools() -> PathBuf {
    run(Command::new(source("scripts/find-llama")).arg("--tools")).trim_end().into()
}

/// Returns the source of the llama.cpp that gvote is built from.
pub fn llama_source() -> PathBuf {
    run(&mut Command::new(source("scripts/find-llama"))).trim_end().into()
}
