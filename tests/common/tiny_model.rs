//! Writes a tiny random model into the folder named on the command line, and prints where.

use std::path::Path;

use gvote::llama;

#[allow(dead_code)] // it serves tests too
#[path = "../../src/tests/tiny.rs"]
mod tiny;

fn main() {
    let folder = std::env::args_os().nth(1).expect("a folder");
    println!("{}", tiny::Tiny::new(Path::new(&folder), tiny::SPECS[0]).path.display());
}
