//! Writes a tiny random model to the folder named on the command line, and prints its path.

use std::path::Path;

use gvote::llama;

#[allow(dead_code)] // also used by tests
#[path = "../../src/tests/tiny.rs"]
mod tiny;

fn main() {
    let folder = std::env::args_os().nth(1).expect("a folder");
    println!("{}", tiny::Tiny::new(Path::new(&folder), tiny::SPECS[0]).path.display());
}
