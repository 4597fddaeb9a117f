//! Writes the files that fuzzing starts from into the folder named on the command line. Needs no crate: `rustc` builds it.

#[path = "../tests/common/gguf.rs"]
mod file;

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).expect("a folder"));
    std::fs::create_dir_all(&folder)?;
    for (i, seed) in file::seeds().into_iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{i}")), seed)?;
    }
    Ok(())
}
