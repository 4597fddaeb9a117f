//! Tests of gvote built against a llama.cpp built elsewhere: `LLAMA_CPP_DIR` and `LLAMA_LIB_DIR`.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/harbour.rs"]
mod harbour;
#[path = "../../../tests/common/installed.rs"]
mod installed;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use cli::{finish, model};
use installed::{built_with_cmake, built_with_pkg_config, guide_program, llama_source, make_from, prefix, root, run};

/// Returns the folder for everything made here; it stays between runs.
fn scratch() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("own-llama")
}

/// Returns the libraries that the other tests use, standing in for a user's own.
fn libraries() -> PathBuf {
    let dir = scratch().join("build/bin");
    fs::create_dir_all(&dir).unwrap();
    run(Command::new("cp").arg("-a").arg(prefix().join("lib/gvote/.")).arg(&dir));
    dir
}

/// The code compiled here is tested elsewhere: it need not be fast, and compiles faster unoptimised.
const UNOPTIMISED: [(&str, &str); 2] = [("CARGO_PROFILE_DEV_OPT_LEVEL", "0"), ("CARGO_PROFILE_DEV_DEBUG", "none")];

/// Returns cargo's message for a build that must fail.
fn refusal(source: Option<&Path>, libraries: &Path) -> String {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).args(["build", "--locked", "--lib", "-p", "gvote", "--target-dir"]);
    cargo.arg(scratch().join("target")).envs(UNOPTIMISED).env_remove("LLAMA_CPP_DIR");
    cargo.envs(source.map(|source| ("LLAMA_CPP_DIR", source))).env("LLAMA_LIB_DIR", libraries);
    let done = finish(&mut cargo);
    assert_ne!(done.status, 0, "{}", done.stderr);
    done.stderr
}

fn wrong_combinations_are_refused(source: &Path, libraries: &Path) {
    let dir = tempfile::tempdir().unwrap();
    assert!(refusal(None, libraries).contains("LLAMA_LIB_DIR needs LLAMA_CPP_DIR beside it"));
    assert!(refusal(Some(source), dir.path()).contains("there is no libllama.so in LLAMA_LIB_DIR="));
    assert!(refusal(Some(dir.path()), libraries).contains("is not a llama.cpp checkout (no include/llama.h)"));
    fs::write(dir.path().join("libllama.so.0.7.3"), "").unwrap();
    symlink("libllama.so.0.7.3", dir.path().join("libllama.so")).unwrap();
    let text = refusal(Some(source), dir.path());
    assert!(text.contains("is llama.cpp 0.7.3, but the source in LLAMA_CPP_DIR is "), "{text}");
}

/// Returns a copy of `source` in which `added` stands before one line of one file.
fn changed(source: &Path, file: &str, line: &str, added: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("src")).unwrap();
    for name in ["CMakeLists.txt", "include", "ggml"] {
        symlink(source.join(name), dir.path().join(name)).unwrap();
    }
    for header in fs::read_dir(source.join("src")).unwrap().map(|entry| entry.unwrap()) {
        if header.path().extension().is_some_and(|ending| ending == "h") {
            fs::copy(header.path(), dir.path().join("src").join(header.file_name())).unwrap();
        }
    }
    let text = fs::read_to_string(source.join(file)).unwrap();
    assert_eq!(text.matches(line).count(), 1, "{line}");
    // remove the link first, since writing would follow it
    let _ = fs::remove_file(dir.path().join(file));
    fs::write(dir.path().join(file), text.replacen(line, &format!("{added}\n{line}"), 1)).unwrap();
    dir
}

/// A member that upstream adds must not compile until gvote has been adapted, even if it lies in padding.
fn other_structures_are_refused(source: &Path, libraries: &Path) {
    let (context, cache) = ("src/llama-context.h", "src/llama-kv-cache.h");
    for (file, line, added, reason) in [
        (context, "    bool graph_reuse_disable = false;", "bool added = false;", "does with llama_context::added"),
        (cache, "    const uint32_t n_seq_max = 1;", "int64_t added = 0;", "llama_kv_cache has changed"),
        ("CMakeLists.txt", "set(LLAMA_VERSION_MAJOR 0)", "set(LLAMA_VERSION_MAJOR 77)", "does not know this version"),
    ] {
        let other = changed(source, file, line, added);
        // no version in the name, so that only the source is checked
        let unnamed = tempfile::tempdir().unwrap();
        fs::copy(libraries.join("libllama.so"), unnamed.path().join("libllama.so")).unwrap();
        let text = refusal(Some(other.path()), unnamed.path());
        assert!(text.contains(reason), "{reason}: {text}");
    }
}

/// Checks that all libraries are loaded from the user's own folder.
fn uses(program: &Path, libraries: &Path) {
    let loaded = run(Command::new("ldd").arg(program).env_remove("LD_LIBRARY_PATH"));
    for name in ["libllama.so", "libggml.so", "libggml-base.so"] {
        let line = loaded.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{name}: {loaded}"));
        assert!(line.contains(libraries.to_str().unwrap()), "{line}");
    }
}

#[test]
fn a_users_own_llama_serves_gvote_and_apps_and_is_not_copied() {
    let (source, libraries) = (llama_source(), libraries());
    // first, since cargo rebuilds after them
    wrong_combinations_are_refused(&source, &libraries);
    other_structures_are_refused(&source, &libraries);

    let target = scratch().join("target");
    let [level, debug] = UNOPTIMISED.map(|(name, value)| (name, Path::new(value)));
    let env = [("LLAMA_CPP_DIR", &*source), ("LLAMA_LIB_DIR", &*libraries), level, debug];
    make_from(&target, &env, "install", &scratch().join("image"), "/usr/local");
    let installed = scratch().join("image/usr/local");
    assert!(!installed.join("lib/gvote").exists() && !installed.join("include/gvote").exists());

    let dir = tempfile::tempdir().unwrap();
    let code = guide_program(dir.path());
    for program in [
        built_with_pkg_config(&installed, &code, dir.path()),
        built_with_cmake(&installed, &code, "gvote::gvote", dir.path()),
    ] {
        uses(&program, &libraries);
        let mut command = Command::new(&program);
        command.arg(model()).stdin(fs::File::open(harbour::document()).unwrap()).env("OMP_THREAD_LIMIT", "1");
        let done = finish(command.env_remove("LD_LIBRARY_PATH")).ok();
        assert!(done.stdout.trim_end().ends_with(" cells"), "{}", done.stdout);
    }
    let program = installed.join("bin/gvote");
    uses(&program, &libraries);
    // the RPC back end of these libraries is found at run time
    let done = finish(Command::new(program).args(["rpc-server", "-d", "none"]).env_remove("LD_LIBRARY_PATH"));
    assert!(done.stderr.contains("there is no device \"none\": there are CPU"), "{}", done.stderr);
}
