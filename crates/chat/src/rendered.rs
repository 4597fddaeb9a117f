//! What a template makes of a conversation, and its tokens.

use std::ops::Range;

use gvote::llama::{LlamaError, Marker, Model, Token};

use super::markers::Markers;

/// What a chat template makes of a conversation. The text of a marker, such as `<|im_end|>`, is that marker only where the
/// template wrote it: in a message it is text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    text: String,
    /// The markers, where a message has text that looks like one. None: all that look like one are.
    markers: Option<Vec<Place>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    range: Range<usize>,
    token: Token,
    lstrip: bool,
    rstrip: bool,
}

impl Rendered {
    /// A text as it is: whatever looks like a marker is one.
    pub fn plain(text: String) -> Self {
        Self { text, markers: None }
    }

    /// A text in which no marker holds a character at one of the places `quoted`.
    pub(super) fn quoting(text: String, quoted: &[usize], markers: &Markers) -> Self {
        let place = |(range, marker): (Range<usize>, &Marker)| Place {
            range,
            token: marker.token,
            lstrip: marker.lstrip,
            rstrip: marker.rstrip,
        };
        let markers = markers.find(&text, quoted).into_iter().map(place).collect();
        Self { text, markers: Some(markers) }
    }

    /// This and more, in which nothing is a marker.
    pub(super) fn followed_by(mut self, text: &str, markers: &Markers) -> Self {
        if self.markers.is_none() && !markers.in_content(text).is_empty() {
            self = Self::quoting(self.text, &[], markers);
        }
        self.text.push_str(text);
        self
    }

    /// Where the markers are; None: wherever a text looks like one.
    #[cfg(test)]
    pub(super) fn markers(&self) -> Option<impl Iterator<Item = Range<usize>>> {
        Some(self.markers.as_ref()?.iter().map(|place| place.range.clone()))
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// The tokens of a sequence that begins with this text, with a BOS token where the model wants one: a template that wrote
    /// it does not make it two.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`].
    pub fn tokens(&self, model: &Model) -> Result<Vec<Token>, LlamaError> {
        self.tokens_of(model, self.start(model)..self.text.len(), true)
    }

    /// The tokens of what follows the first `from` bytes.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`].
    pub fn tokens_from(&self, model: &Model, from: usize) -> Result<Vec<Token>, LlamaError> {
        self.tokens_of(model, from..self.text.len(), false)
    }

    /// [`Self::tokens`] of the first `at` bytes, and [`Self::tokens_from`] there.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`].
    pub fn tokens_split(&self, model: &Model, at: usize) -> Result<[Vec<Token>; 2], LlamaError> {
        let start = self.start(model).min(at);
        Ok([self.tokens_of(model, start..at, true)?, self.tokens_from(model, at)?])
    }

    /// Bytes up to the end of the BOS token that the tokenizer adds as well.
    fn start(&self, model: &Model) -> usize {
        let bos = model.bos_text();
        let blank = self.text.len() - self.text.trim_start().len();
        let range = blank..blank + bos.len();
        let is_marker = |places: &Vec<Place>| places.iter().any(|place| place.range == range);
        let is_bos = !bos.is_empty() && self.text[blank..].starts_with(&bos);
        let is_doubled = model.adds_bos() && is_bos && self.markers.as_ref().is_none_or(is_marker);
        if is_doubled { range.end } else { 0 }
    }

    fn tokens_of(&self, model: &Model, range: Range<usize>, add_special: bool) -> Result<Vec<Token>, LlamaError> {
        let Some(markers) = &self.markers else { return model.tokenize(&self.text[range], add_special, true) };
        // BOS, EOS, or both
        let mut tokens = if add_special { model.tokenize("", true, false)? } else { Vec::new() };
        let last = tokens.split_off(tokens.len().min(model.adds_bos().into()));
        let (mut from, mut rstrip) = (range.start, false);
        let add_text = |range: Range<usize>, (rstrip, lstrip), tokens: &mut Vec<Token>| {
            let text = &self.text[range];
            let text = if rstrip { text.trim_ascii_start() } else { text };
            let text = if lstrip { text.trim_ascii_end() } else { text };
            // some vocabularies put a space before it, as they do behind each marker
            tokens.extend(text_tokens(model, text)?);
            Ok::<_, LlamaError>(())
        };
        for place in markers.iter().filter(|place| range.start <= place.range.start && place.range.end <= range.end) {
            add_text(from..place.range.start, (rstrip, place.lstrip), &mut tokens)?;
            tokens.push(place.token);
            (from, rstrip) = (place.range.end, place.rstrip);
        }
        add_text(from..range.end, (rstrip, false), &mut tokens)?;
        tokens.extend(last);
        Ok(tokens)
    }
}

/// The tokens of a text, none of which is a marker.
fn text_tokens(model: &Model, text: &str) -> Result<Vec<Token>, LlamaError> {
    let tokens = model.tokenize(text, false, false)?;
    let Some(&marker) = tokens.iter().find(|&&token| model.is_control(token)) else { return Ok(tokens) };
    // the pieces of a marker's text may make up the marker: then they are read apart
    let marker = String::from_utf8_lossy(&model.piece(marker, true)).into_owned();
    let Some(at) = text.find(&marker).filter(|_| marker.len() > 1) else { return Ok(tokens) };
    let (head, tail) = text.split_at(at + marker.chars().next().map_or(0, char::len_utf8));
    Ok([text_tokens(model, head)?, more_tokens(model, tail)?].concat())
}

/// [`text_tokens`] of a text that goes on: without the space that some vocabularies put before a text.
fn more_tokens(model: &Model, text: &str) -> Result<Vec<Token>, LlamaError> {
    /// No word goes past it.
    const END: &str = "\n";
    let (end, tokens) = (model.tokenize(END, false, false)?, text_tokens(model, &[END, text].concat())?);
    match tokens.strip_prefix(&end[..]) {
        Some(tokens) => Ok(tokens.to_vec()),
        None => text_tokens(model, text),
    }
}
