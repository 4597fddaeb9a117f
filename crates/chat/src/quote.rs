//! Replaces characters of a text so that nothing looks like a marker, and restores them.

/// Private-use characters of Unicode that replace others.
const STAND_INS: std::ops::RangeInclusive<u32> = 0xF_0000..=0xF_FFFD;

/// The replaced characters; the index selects the stand-in.
#[derive(Default)]
pub(super) struct StandIns(Vec<char>);

impl StandIns {
    /// Replaces the character at each of the sorted `places` in `content` by a stand-in.
    pub fn quote(&mut self, content: &str, places: impl IntoIterator<Item = usize>) -> String {
        let mut places = places.into_iter().peekable();
        let mut quoted = String::with_capacity(content.len());
        for (at, c) in content.char_indices() {
            let is_asked = std::iter::from_fn(|| places.next_if_eq(&at)).count() > 0;
            // A private-use character in the content is replaced, too.
            let stand_in = if is_asked || STAND_INS.contains(&c.into()) { self.stand_in(c) } else { None };
            quoted.push(stand_in.unwrap_or(c));
        }
        quoted
    }

    fn stand_in(&mut self, c: char) -> Option<char> {
        let i = self.0.iter().position(|&known| known == c).unwrap_or(self.0.len());
        let stand_in = char::from_u32(STAND_INS.start() + i as u32).filter(|&c| STAND_INS.contains(&c.into()))?;
        if i == self.0.len() {
            self.0.push(c);
        }
        Some(stand_in)
    }

    /// Restores the original characters. Returns the text and the places of the restored characters.
    pub fn undo(&self, text: &str) -> (String, Vec<usize>) {
        let (mut out, mut places) = (String::with_capacity(text.len()), Vec::new());
        for c in text.chars() {
            let i = u32::from(c).checked_sub(*STAND_INS.start());
            match i.and_then(|i| self.0.get(i as usize)) {
                Some(&original) => {
                    places.push(out.len());
                    out.push(original);
                }
                None => out.push(c),
            }
        }
        (out, places)
    }
}
