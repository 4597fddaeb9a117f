//! Reverse prompts: texts that end an answer and are not part of it.

/// Searches for the texts in an answer that arrives in pieces. Holds back text that may be the beginning of one of them.
pub struct Reverse<'a> {
    texts: &'a [String],
    held: String,
}

impl<'a> Reverse<'a> {
    pub fn new(texts: &'a [String]) -> Self {
        Self { texts, held: String::new() }
    }

    /// Takes a piece and returns the text that is certain to be part of the answer. True: the answer has ended.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let found = self.texts.iter().filter_map(|text| self.held.find(text.as_str())).min();
        let end = found
            .unwrap_or_else(|| self.held.len() - self.texts.iter().map(|text| self.begun(text)).max().unwrap_or(0));
        let rest = self.held.split_off(end);
        (std::mem::replace(&mut self.held, rest), found.is_some())
    }

    /// Returns the text held back when the answer ends for another reason.
    pub fn finish(self) -> String {
        self.held
    }

    /// Returns the length in bytes of the end of the held text that `text` begins with.
    fn begun(&self, text: &str) -> usize {
        let parts = text.char_indices().rev();
        parts.map(|(n, _)| n).find(|&n| self.held.ends_with(&text[..n])).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the text shown for some pieces, and whether a reverse prompt was found.
    fn shown(texts: &[&str], pieces: &[&str]) -> (String, bool) {
        let texts: Vec<String> = texts.iter().map(|&text| text.into()).collect();
        let mut reverse = Reverse::new(&texts);
        let mut shown = String::new();
        for piece in pieces {
            let (text, is_end) = reverse.push(piece);
            shown += &text;
            if is_end {
                return (shown, true);
            }
        }
        (shown + &reverse.finish(), false)
    }

    #[test]
    fn an_answer_ends_before_the_first_text_however_it_is_split() {
        for pieces in [&["one User: two"][..], &["one", " Us", "er", ":", " two"], &["one U", "Us", "er: "]] {
            let (text, is_end) = shown(&["User:", "two"], pieces);
            assert!(is_end && text.starts_with("one ") && !text.contains("User:"), "{text}");
        }
        assert_eq!(shown(&["two", "one"], &["one two"]), (String::new(), true));
        assert_eq!(shown(&["aab"], &["aa", "aab"]), ("aa".into(), true));
    }

    #[test]
    fn what_only_begins_like_a_text_is_part_of_the_answer() {
        assert_eq!(shown(&["User:"], &["Us", "ual"]), ("Usual".into(), false));
        assert_eq!(shown(&["User:"], &["one Use"]), ("one Use".into(), false));
        assert_eq!(shown(&["é!"], &["caf", "é", "?"]), ("café?".into(), false));
        assert_eq!(shown(&[], &["one", " two"]), ("one two".into(), false));
    }

    #[test]
    fn nothing_is_held_back_without_need() {
        let texts = ["User:".to_owned()];
        let mut reverse = Reverse::new(&texts);
        assert_eq!(reverse.push("one U").0, "one ");
        assert_eq!(reverse.push("nit").0, "Unit");
    }
}
