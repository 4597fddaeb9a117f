//! Tests of the program's messages when llama.cpp runs out of memory.

#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::process::Command;

use gvote::llama;

#[path = "../../../tests/common/scarce.rs"]
mod scarce;
#[allow(dead_code)] // also used by other tests
#[path = "../../../src/tests/tiny.rs"]
mod tiny;

use scarce::library;

/// Includes exceptions that nothing catches.
#[test]
fn the_program_says_in_one_line_that_memory_has_run_out() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny::recurrent(dir.path(), "jamba");
    let run = |after: usize| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_gvote"));
        program.args(["run", "--policy", "full", "-p", "Hello", "-n", "2", "-t", "1", "--temp", "0", "-m"]).arg(&model);
        program.env("LD_PRELOAD", library()).env("SCARCE_AFTER", after.to_string());
        let done = program.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (done.status.code(), text(done.stdout), text(done.stderr))
    };
    let (mut after, mut said) = (1, BTreeSet::new());
    loop {
        let (status, stdout, stderr) = run(after);
        if status == Some(0) {
            break;
        }
        let mut errors = stderr.lines().filter(|line| !line.starts_with("this model has no chat template"));
        let (first, more) = (errors.next(), errors.next());
        let error = first.filter(|line| line.starts_with("gvote: ")).unwrap_or_else(|| panic!("{after}: {stderr}"));
        assert!(status == Some(1) && stdout.is_empty() && more.is_none(), "{after}: {status:?}, {stdout:?}, {stderr}");
        said.insert(error.to_owned());
        after += after / 2 + 1;
    }
    assert!(said.len() > 2, "{said:#?}");
}
