//! Tests of `make install`: the installed tree can be moved, and programs in C, C++ and Python find gvote and its llama.cpp in it.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/harbour.rs"]
mod harbour;
#[path = "../../../tests/common/installed.rs"]
mod installed;

use std::fs;
use std::process::Command;

use cli::model;
use harbour::{FERRY, LIGHTHOUSE, document};
use installed::{built_with_cmake, built_with_pkg_config, guide_program, make, prefix, run, source};

/// Limits OpenMP to one thread: tests run in parallel, and threads that compete for a core are slow.
const ONE_THREAD: &str = "1";

/// Returns what a program printed: stdout, and the numbers of its lines `cells: before -> after`.
fn answers(command: &mut Command) -> (String, Vec<(u32, u32)>) {
    // only libraries of the installed tree may be used
    let command = command.env_remove("LD_LIBRARY_PATH").env("OMP_THREAD_LIMIT", ONE_THREAD);
    let output = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{stdout}{stderr}");
    let cells = stderr.lines().filter_map(|line| line.split_once("cells: ")?.1.split_once(" -> "));
    let cells = cells.map(|(before, after)| (before.parse().unwrap(), after.parse().unwrap())).collect();
    (stdout.into_owned(), cells)
}

#[track_caller]
fn is_smaller(&(before, after): &(u32, u32)) {
    assert!(after > 64 && f64::from(after) < 0.9 * f64::from(before), "{before} -> {after}");
}

#[test]
fn an_example_in_c_is_built_with_pkg_config() {
    let dir = tempfile::tempdir().unwrap();
    let (question, word) = FERRY;
    let program = built_with_pkg_config(prefix(), &source("ffi/examples/simple.c"), dir.path());
    let ask = |more: &[&str]| answers(Command::new(&program).arg(model()).arg(document()).arg(question).args(more));
    let (answer, cells) = ask(&["4"]);
    assert!(answer.contains(word), "{answer}");
    assert_eq!(cells.len(), 1);
    is_smaller(&cells[0]);
    let (answer, cells) = ask(&[]);
    assert!(answer.contains(word) && cells.is_empty(), "a short answer: {answer}, {cells:?}");
}

#[test]
fn the_program_of_the_guide_runs() {
    let dir = tempfile::tempdir().unwrap();
    let code = guide_program(dir.path());
    assert!(fs::read_to_string(&code).unwrap().lines().count() <= 33, "a guide starts small");
    let program = built_with_pkg_config(prefix(), &code, dir.path());
    let (output, _) = answers(Command::new(program).arg(model()).stdin(fs::File::open(document()).unwrap()));
    let (before, after) = output.trim_end().strip_suffix(" cells").unwrap().split_once(" -> ").unwrap();
    let (before, after): (u32, u32) = (before.parse().unwrap(), after.parse().unwrap());
    assert!(before > 150 && after > 0 && after <= before, "{output}");
}

#[test]
fn an_example_reads_a_document_longer_than_its_cache() {
    let dir = tempfile::tempdir().unwrap();
    let code = source("ffi/examples/long.c");
    assert!(fs::read_to_string(&code).unwrap().lines().count() <= 60, "an example is read at a glance");
    let (question, word) = LIGHTHOUSE;
    let (answer, cells) = answers(
        Command::new(built_with_pkg_config(prefix(), &code, dir.path())).arg(model()).arg(document()).arg(question),
    );
    assert!(answer.contains(word), "{answer}");
    assert!(cells.len() >= 3, "{cells:?}");
    for (before, after) in cells {
        assert!(before <= 512 && after > 64 && f64::from(after) < 0.8 * 512.0, "{before} -> {after}");
    }
}

#[test]
fn four_sequences_share_a_cache() {
    let dir = tempfile::tempdir().unwrap();
    let asked = [FERRY, LIGHTHOUSE, LIGHTHOUSE, FERRY];
    let questions = asked.map(|(question, _)| question);
    let (answer, cells) = answers(
        Command::new(built_with_pkg_config(prefix(), &source("ffi/examples/batched.c"), dir.path()))
            .arg(model())
            .arg(document())
            .args(questions),
    );
    for (i, (_, word)) in asked.iter().enumerate() {
        let begin = answer.find(&format!("{i}: ")).unwrap();
        let end = answer.find(&format!("\n{}: ", i + 1)).unwrap_or(answer.len());
        assert!(answer[begin..end].contains(word), "{word}: {answer}");
    }
    assert_eq!(cells.len(), 4);
    cells.iter().for_each(is_smaller);
}

#[test]
fn an_example_in_cpp_is_built_with_cmake_and_votes_every_turn() {
    let dir = tempfile::tempdir().unwrap();
    let program = built_with_cmake(prefix(), &source("ffi/examples/chat.cpp"), "gvote::gvote", dir.path());
    let turns = dir.path().join("turns");
    fs::write(&turns, format!("{}\n{}\n", FERRY.0, LIGHTHOUSE.0)).unwrap();
    let (answer, cells) =
        answers(Command::new(program).arg(model()).arg(document()).arg("4").stdin(fs::File::open(&turns).unwrap()));
    let lines: Vec<&str> = answer.lines().collect();
    assert!(lines[0].contains(FERRY.1), "{answer}");
    assert!(lines.len() == 2 && !lines[1].is_empty(), "{answer}");
    is_smaller(&cells[0]);
    // the second turn starts with everything read before, and adds its own text
    assert!(cells[1].0 > cells[0].0, "{cells:?}");
    is_smaller(&cells[1]);
}

#[test]
fn an_example_in_python_needs_no_compiler() {
    let (question, word) = FERRY;
    let library = prefix().join("lib/libgvote.so");
    let mut program = Command::new("python3");
    program.arg(source("ffi/examples/simple.py")).arg(library).arg(model()).arg(document()).arg(question);
    let (answer, cells) = answers(&mut program);
    assert!(answer.contains(word), "{answer}");
    is_smaller(&cells[0]);
}

#[test]
fn the_static_library_links_through_cmakes_other_target() {
    let dir = tempfile::tempdir().unwrap();
    let code = "#include <gvote.h>\n#include <stdio.h>\nint main(void) { gvote_t * g = gvote_new(NULL, NULL); \
        printf(\"%d %s\\n\", g != NULL, gvote_version()); gvote_free(g); return 0; }\n";
    fs::write(dir.path().join("version.c"), code).unwrap();
    let program = built_with_cmake(prefix(), &dir.path().join("version.c"), "gvote::gvote_static", dir.path());
    assert_eq!(run(&mut Command::new(&program)), format!("1 {}\n", env!("CARGO_PKG_VERSION")));
    let needs = run(Command::new("readelf").arg("-d").arg(&program));
    assert!(!needs.contains("libgvote.so") && needs.contains("libllama.so"), "{needs}");
}

#[test]
fn the_library_has_a_soname_and_finds_llama_relative_to_itself() {
    let lib = prefix().join("lib");
    for name in ["libgvote.so", "libgvote.so.0"] {
        assert_eq!(fs::canonicalize(lib.join(name)).unwrap(), fs::canonicalize(lib.join("libgvote.so.0.1.0")).unwrap());
    }
    let dynamic = run(Command::new("readelf").arg("-d").arg(lib.join("libgvote.so")));
    let value = |tag: &str| -> Vec<&str> {
        let lines = dynamic.lines().filter(|line| line.contains(tag));
        lines.filter_map(|line| line.split_once('[')?.1.strip_suffix(']')).collect()
    };
    assert_eq!(value("(SONAME)"), ["libgvote.so.0"]);
    assert_eq!(value("(RUNPATH)"), ["$ORIGIN/gvote"]);
    assert!(value("(NEEDED)").iter().any(|name| name.starts_with("libllama.so")), "{dynamic}");
    assert!(lib.join("gvote/libllama.so").exists() && !lib.join("libllama.so").exists());
}

#[test]
fn uninstall_takes_away_what_install_brought_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let foreign = image.join("opt/lib/libother.so");
    fs::create_dir_all(foreign.parent().unwrap()).unwrap();
    fs::write(&foreign, "").unwrap();
    make("install", &image, "/opt");
    assert!(image.join("opt/bin/gvote").exists() && image.join("opt/share/man/man1/gvote.1").exists());
    // installing again updates
    make("install", &image, "/opt");
    make("uninstall", &image, "/opt");
    let left = run(Command::new("find").arg(&image).args(["!", "-type", "d"]));
    assert_eq!(left.lines().collect::<Vec<_>>(), [foreign.to_str().unwrap()]);
    assert!(!image.join("opt/lib/gvote").exists() && !image.join("opt/include/gvote").exists());
}
