//! What `make install` makes, of the build that the tests themselves use.
#![allow(dead_code)] // each test program uses its own part of it

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{stdout}{stderr}");
    stdout.into_owned()
}

pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// `make` with the goal and the place that are named.
pub fn make(goal: &str, destdir: &Path, prefix: &str) {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    run(Command::new("make")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("CARGO_TARGET_DIR", scratch.parent().expect("it lies in the target folder"))
        .arg(goal)
        .arg("PROFILE=dev")
        .arg(format!("STAGE={}", scratch.join("stage").display()))
        .arg(format!("DESTDIR={}", destdir.display()))
        .arg(format!("PREFIX={prefix}")));
}

/// A folder with everything installed, which was moved since: nothing may know where it was.
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
