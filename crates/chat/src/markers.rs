//! Finds the markers of a vocabulary in a text.

use std::collections::HashMap;
use std::ops::Range;

use gvote::llama::{Marker, Model};

/// The markers of a vocabulary.
#[derive(Default)]
pub(super) struct Markers {
    /// Longest first, the order in which llama.cpp searches for them.
    all: Vec<Marker>,
    /// First character of markers -> indices into `all`.
    by_start: HashMap<char, Vec<usize>>,
}

impl Markers {
    /// Returns the markers of a model.
    pub fn of(model: &Model) -> Self {
        Self::new(model.markers())
    }

    fn new(mut all: Vec<Marker>) -> Self {
        all.sort_by_key(|marker| std::cmp::Reverse(marker.text.len()));
        let mut by_start = HashMap::<char, Vec<usize>>::new();
        for (i, marker) in all.iter().enumerate() {
            if let Some(start) = marker.text.chars().next() {
                by_start.entry(start).or_default().push(i);
            }
        }
        Self { all, by_start }
    }

    /// Returns the markers that begin with the first character of `text`, with their indices.
    fn like<'a>(&'a self, text: &str) -> impl Iterator<Item = (usize, &'a Marker)> {
        let start = text.chars().next().and_then(|c| self.by_start.get(&c));
        start.into_iter().flatten().map(|&i| (i, &self.all[i]))
    }

    /// Finds the places in `content` where a non-text marker begins, or could begin together with text that a template
    /// adds before or after the content. Returns each place with the index of the marker, sorted by place.
    pub fn in_content(&self, content: &str) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        let end = content.trim_end().len();
        for (at, _) in content.char_indices() {
            let rest = &content[at..];
            // Text that a template adds after the content could complete a marker that begins here.
            let begins = |marker: &Marker| at < end && marker.text.starts_with(&content[at..end]);
            let here = self.like(rest).filter(|(_, marker)| !marker.is_text);
            found.extend(here.filter(|(_, m)| rest.starts_with(&m.text) || begins(m)).map(|(i, _)| (at, i)));
        }
        // Text that a template adds before the content could begin a marker that ends here.
        let start = content.len() - content.trim_start().len();
        if start < end {
            let core = &content[start..end];
            let ends = |marker: &Marker| {
                let mut tails = marker.text.char_indices().skip(1).map(|(at, _)| &marker.text[at..]);
                !marker.is_text && tails.any(|tail| core.starts_with(tail) || tail.starts_with(core))
            };
            found.extend(self.all.iter().enumerate().filter(|(_, m)| ends(m)).map(|(i, _)| (start, i)));
        }
        found.sort_unstable();
        found
    }

    /// Finds the markers in a text that contain none of the `quoted` places, searching in llama.cpp's order. Sorted by
    /// place; text markers are left out.
    pub fn find(&self, text: &str, quoted: &[usize]) -> Vec<(Range<usize>, &Marker)> {
        let mut places = Vec::new();
        for (at, _) in text.char_indices() {
            let rest = &text[at..];
            let here = self.like(rest).filter(|(_, marker)| rest.starts_with(&marker.text));
            places.extend(here.map(|(i, marker)| (i, at..at + marker.text.len())));
        }
        places.sort_by_key(|(i, range)| (*i, range.start));
        let is_quoted = |range: &Range<usize>| {
            quoted.get(quoted.partition_point(|&at| at < range.start)).is_some_and(|&at| at < range.end)
        };
        let mut taken = std::collections::BTreeMap::<usize, (usize, usize)>::new();
        for (i, range) in places {
            let before = taken.range(..range.end).next_back().is_none_or(|(_, &(end, _))| end <= range.start);
            if before && !is_quoted(&range) {
                taken.insert(range.start, (range.end, i));
            }
        }
        let markers = taken.into_iter().map(|(start, (end, i))| (start..end, &self.all[i]));
        markers.filter(|(_, marker)| !marker.is_text).collect()
    }

    /// Creates non-text markers from texts.
    #[cfg(test)]
    pub fn of_texts(texts: &[&str]) -> Self {
        let marker = |(token, text): (usize, &&str)| Marker {
            text: (*text).to_owned(),
            token: token as gvote::llama::Token,
            is_text: false,
            lstrip: false,
            rstrip: false,
        };
        Self::new(texts.iter().enumerate().map(marker).collect())
    }
}
