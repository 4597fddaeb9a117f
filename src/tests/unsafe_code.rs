//! Where `unsafe` may stand. The compiler keeps it out of every other module: `#![forbid(unsafe_code)]`.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

/// Modules that call C, or are called by it, and their tests.
const MAY_BE_UNSAFE: [&str; 11] =
    ["backend", "cache", "capi", "capture", "compact", "guest", "llama", "memory", "score", "sys", "tests"];

fn source_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let files = files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    files.chain(folders.iter().flat_map(|folder| source_files(folder))).collect()
}

/// The files of the modules that a file lies in, and itself.
fn with_parents(src: &Path, file: &Path) -> Vec<PathBuf> {
    let folders = file.ancestors().skip(1).take_while(|folder| *folder != src);
    let parents = folders.flat_map(|folder| [folder.with_extension("rs"), folder.join("mod.rs")]);
    // the program's modules lie in its own root
    let root = file.starts_with(src.join("cli")).then(|| src.join("main.rs"));
    [file.to_owned()].into_iter().chain(parents).chain(root).filter(|path| path.exists()).collect()
}

fn forbids(file: &Path) -> bool {
    fs::read_to_string(file).unwrap().lines().any(|line| line == "#![forbid(unsafe_code)]")
}

/// Whether there is unsafe code in a file, or in a module below it.
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
