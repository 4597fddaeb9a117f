//! Makes bindings to llama.h and gvote.h whose functions are looked up at run time: the plugin links neither library.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use bindgen::{Abi, Builder};

/// What the plugin stands in front of, or calls.
const LLAMA: &str = "llama_(version|init_from_model|free|get_memory|decode|process|pooling_type\
    |memory_clear|memory_seq_(rm|cp|keep|add|div|pos_min|pos_max)\
    |state_(get_size|get_data|set_data|load_file|save_file)\
    |state_seq_(get_size|get_data|set_data)(_ext)?|state_seq_(load|save)_file)";
const GVOTE: &str = "gvote_(version|llama_version|params_init|new|free|last_error|set_log_callback|attach|detach\
    |vote_if_due|expand|seq_cells|seq_exact_from|seq_truncate|state_size|state_get|state_set)";

fn main() {
    let root = Path::new("../..").canonicalize().expect("the workspace lies two folders up");
    for file in
        ["build.rs", "src/batch.cpp", "../../ffi/gvote.h", "../../scripts/find-llama", "../../vendor/Cargo.toml"]
    {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=LLAMA_CPP_DIR");
    let found = Command::new(root.join("scripts/find-llama")).output().expect("sh runs scripts/find-llama");
    assert!(
        found.status.success(),
        "the source of llama.cpp was not found: {}",
        String::from_utf8_lossy(&found.stderr)
    );
    let source = PathBuf::from(String::from_utf8(found.stdout).expect("a path").trim());
    let includes = ["include", "src", "ggml/include"].map(|dir| source.join(dir));

    println!("cargo:rustc-env=GVOTE_PLUGIN_LLAMA_VERSION={}", version(&source));

    let mut llama = Builder::default().header(source.join("include/llama.h").to_string_lossy());
    for dir in &includes {
        llama = llama.clang_arg(format!("-I{}", dir.display()));
    }
    bind(llama.allowlist_function(LLAMA).allowlist_var("LLAMA_STATE_SEQ_FLAGS_.*"), "Llama", "llama.rs");
    let gvote = Builder::default().header(root.join("ffi/gvote.h").to_string_lossy());
    let gvote = gvote.allowlist_function(GVOTE).allowlist_var("GVOTE_.*").allowlist_type("gvote_.*");
    let gvote = gvote.blocklist_type("llama_context").raw_line("use super::llama::llama_context;");
    bind(gvote.derive_default(true), "Gvote", "gvote.rs");

    let mut shim = cc::Build::new();
    shim.cpp(true).std("c++17").warnings(false).includes(&includes).file("src/batch.cpp").compile("gvote_plugin_batch");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        // the library lies beside the plugin
        println!("cargo:rustc-cdylib-link-arg=-Wl,-rpath,$ORIGIN");
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libgvote-plugin.so");
    }
}

/// Functions become fields of a struct, looked up one by one; C++ exceptions pass through them.
fn bind(builder: Builder, name: &str, file: &str) {
    let bindings = builder
        .dynamic_library_name(name)
        .override_abi(Abi::CUnwind, ".*")
        .prepend_enum_name(false)
        .generate_comments(false)
        .layout_tests(false)
        .wrap_unsafe_ops(true)
        .generate()
        .unwrap_or_else(|error| panic!("bindgen cannot read the header: {error}"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    bindings.write_to_file(out.join(file)).expect("OUT_DIR can be written");
}

/// The version that llama.cpp's own build gives it.
fn version(source: &Path) -> String {
    let file = source.join("CMakeLists.txt");
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let part = |name: &str| {
        let line = text.lines().find(|line| line.contains(&format!("set(LLAMA_VERSION_{name} ")));
        let number = line.and_then(|line| line.split_whitespace().nth(1)).expect("it names its version");
        number.trim_end_matches(')').to_owned()
    };
    ["MAJOR", "MINOR", "PATCH"].map(part).join(".")
}
