//! Checks which modules contain `unsafe` code, and which functions they call. The compiler forbids it in all others:
//! `#![forbid(unsafe_code)]`.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

/// Modules that call C, or that C calls, and their tests.
const MAY_BE_UNSAFE: [&str; 12] =
    ["attach", "backend", "cache", "capi", "capture", "compact", "disk", "llama", "memory", "score", "sys", "tests"];

fn source_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let files = files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    files.chain(folders.iter().flat_map(|folder| source_files(folder))).collect()
}

/// The file itself, and the files of the modules that contain it.
fn with_parents(src: &Path, file: &Path) -> Vec<PathBuf> {
    let folders = file.ancestors().skip(1).take_while(|folder| *folder != src);
    let parents = folders.flat_map(|folder| [folder.with_extension("rs"), folder.join("mod.rs")]);
    [file.to_owned()].into_iter().chain(parents).filter(|path| path.exists()).collect()
}

fn forbids(file: &Path) -> bool {
    fs::read_to_string(file).unwrap().lines().any(|line| line == "#![forbid(unsafe_code)]")
}

/// Whether a file, or a module below it, contains unsafe code.
fn needs_unsafe(file: &Path) -> bool {
    let has_unsafe = |file: &PathBuf| {
        let text = fs::read_to_string(file).unwrap();
        let mut code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
        // only generated bindings are included
        code.any(|line| ["unsafe ", "[unsafe(", "include!("].iter().any(|word| line.contains(word)))
    };
    let folder = if file.ends_with("mod.rs") { file.with_file_name("") } else { file.with_extension("") };
    let below = if folder.is_dir() { source_files(&folder) } else { Vec::new() };
    below.iter().chain([&file.to_owned()]).any(has_unsafe)
}

#[test]
fn every_module_that_can_forbid_unsafe_code_does() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut n = 0;
    for file in source_files(&src).iter().filter(|file| !file.ends_with("src/lib.rs")) {
        n += 1;
        if with_parents(&src, file).iter().any(|file| forbids(file)) {
            continue;
        }
        let name = file.strip_prefix(&src).unwrap();
        let module = name.iter().next().map(|first| Path::new(first).file_stem().unwrap().to_str().unwrap()).unwrap();
        assert!(
            MAY_BE_UNSAFE.contains(&module) && needs_unsafe(file),
            "{} needs no unsafe code: write #![forbid(unsafe_code)] below its first comment",
            name.display()
        );
    }
    assert!(n > 100, "{n} files were looked at");
}

/// Functions that let C++ exceptions through. An exception that reached Rust would end the process, or worse.
const THROW: [&str; 22] = [
    "ggml_backend_buft_alloc_buffer",
    "ggml_backend_cpu_init",
    "ggml_backend_dev_init",
    "ggml_backend_graph_compute",
    "ggml_backend_graph_compute_async",
    "ggml_backend_synchronize",
    "ggml_backend_tensor_get",
    "ggml_backend_tensor_get_async",
    "ggml_backend_tensor_set",
    "ggml_backend_tensor_set_async",
    "ggml_gallocr_alloc_graph",
    "ggml_gallocr_reserve",
    "llama_decode",
    "llama_init_from_model",
    "llama_memory_seq_cp",
    "llama_memory_seq_rm",
    "llama_model_desc",
    "llama_model_load_from_file",
    "llama_sampler_accept",
    "llama_synchronize",
    "llama_token_to_piece",
    "llama_tokenize",
];

#[test]
fn what_throws_is_called_by_the_shim_alone() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let is_test = |file: &Path| file.iter().any(|part| part == "tests" || part == "tests.rs");
    for file in source_files(&src).iter().filter(|file| !is_test(file.strip_prefix(&src).unwrap())) {
        let text = fs::read_to_string(file).unwrap();
        for name in THROW {
            assert!(
                !text.contains(&format!("sys::{name}(")),
                "{}: {name} may throw: call it in ffi/shim.cpp",
                file.display()
            );
        }
    }
}
