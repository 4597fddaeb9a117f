//! A document with a few facts in it, and questions that a model of 135 million weights can answer.
#![allow(dead_code)] // each test program uses its own part of it

use std::path::Path;
use std::sync::OnceLock;

/// What the document says among sentences without a meaning, far apart.
const FACTS: [&str; 4] = [
    "The harbour of Lindal was built by the engineer Ada Moss.",
    "The ferry is called Juniper and leaves at noon.",
    "The lighthouse on the pier is painted green.",
    "The inn beside the pier is famous for its plum cake.",
];
/// A question about it, and a word of the answer.
pub const FERRY: (&str, &str) = ("What is the ferry called?", "Juniper");
pub const LIGHTHOUSE: (&str, &str) = ("Which colour is the lighthouse painted?", "green");

/// Some 800 tokens.
pub fn document() -> &'static Path {
    static FILE: OnceLock<tempfile::NamedTempFile> = OnceLock::new();
    FILE.get_or_init(|| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text(3200)).unwrap();
        file
    })
    .path()
}

/// The facts among so many letters.
pub fn text(chars: usize) -> String {
    let filler = crate::cli::text(chars);
    let mut sentences: Vec<&str> = filler.split_inclusive(". ").collect();
    for (i, fact) in FACTS.iter().enumerate() {
        sentences.insert((i + 1) * sentences.len() / 5, fact);
    }
    sentences.join(" ")
}
