//! Where the markers of a vocabulary stand in a text.

use std::collections::HashMap;
use std::ops::Range;

use gvote::llama::{Marker, Model};

/// The markers of a vocabulary.
#[derive(Default)]
pub(super) struct Markers {
    /// The longest first, as llama.cpp looks for them.
    all: Vec<Marker>,
    /// Those that begin with a character: indices into `all`.
    by_start: HashMap<char, Vec<usize>>,
}

impl Markers {
    /// The markers of a model.
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

    /// Those that begin with the first character of `text`, and their indices.
    fn like<'a>(&'a self, text: &str) -> impl Iterator<Item = (usize, &'a Marker)> {
        let start = text.chars().next().and_then(|c| self.by_start.get(&c));
        start.into_iter().flatten().map(|&i| (i, &self.all[i]))
    }

    /// Where markers begin in `content` that are no text, or where one would if something stood before or behind it that is not
    /// part of the content. Of each the index. Sorted by place.
    pub fn in_content(&self, content: &str) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        let end = content.trim_end().len();
        for (at, _) in content.char_indices() {
            let rest = &content[at..];
            // what a template puts behind it could end what begins here
            let begins = |marker: &Marker| at < end && marker.text.starts_with(&content[at..end]);
            let here = self.like(rest).filter(|(_, marker)| !marker.is_text);
            found.extend(here.filter(|(_, m)| rest.starts_with(&m.text) || begins(m)).map(|(i, _)| (at, i)));
        }
        // and what it puts before it could begin what ends here
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

    /// The markers in a text that hold no character of `quoted`, places in it: found in the order that llama.cpp looks for them
    /// in. Sorted by place; without those that are text.
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

    /// The texts of markers that are no text.
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
