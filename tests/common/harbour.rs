//! A document with a few facts in it, and questions that a model of 135 million weights can answer.
#![allow(dead_code)] // each test program uses only a part of it

use std::path::Path;
use std::sync::OnceLock;

/// Facts of the document, spread among meaningless sentences.
const FACTS: [&str; 4] = [
    "The harbour of Lindal was built by the engineer Ada Moss.",
    "The ferry is called Juniper and leaves at noon.",
    "The lighthouse on the pier is painted green.",
    "The inn beside the pier is famous for its plum cake.",
];
/// Questions about the document, each with a word of the answer.
pub const FERRY: (&str, &str) = ("What is the ferry called?", "Juniper");
pub const LIGHTHOUSE: (&str, &str) = ("Which colour is the lighthouse painted?", "green");

/// Returns a document of about 800 tokens.
pub fn document() -> &'static Path {
    static FILE: OnceLock<tempfile::NamedTempFile> = OnceLock::new();
    FILE.get_or_init(|| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text(3200)).unwrap();
        file
    })
    .path()
}

/// Returns a text of about `chars` characters with the facts in it.
pub fn text(chars: usize) -> String {
    let filler = crate::cli::text(chars);
    let mut sentences: Vec<&str> = filler.split_inclusive(". ").collect();
    for (i, fact) in FACTS.iter().enumerate() {
        sentences.insert((i + 1) * sentences.len() / 5, fact);
    }
    sentences.join(" ")
}
