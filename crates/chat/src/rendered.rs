//! The rendered text of a conversation, and its tokens.

use std::ops::Range;

use gvote::llama::{LlamaError, Marker, Model, Token};

use super::markers::Markers;

/// A conversation rendered by a chat template. The text of a marker, such as `<|im_end|>`, is a marker only where the
/// template wrote it; in a message it is text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    text: String,
    /// The markers, if a message contains text that looks like one. None: everything that looks like a marker is one.
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
    /// Wraps a text in which everything that looks like a marker is one.
    pub fn plain(text: String) -> Self {
        Self { text, markers: None }
    }

    /// Wraps a text in which no marker contains one of the `quoted` places.
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

    /// Appends a text that contains no markers.
    pub(super) fn followed_by(mut self, text: &str, markers: &Markers) -> Self {
        if self.markers.is_none() && !markers.in_content(text).is_empty() {
            self = Self::quoting(self.text, &[], markers);
        }
        self.text.push_str(text);
        self
    }

    /// Returns the ranges of the markers; None: everything that looks like a marker is one.
    #[cfg(test)]
    pub(super) fn markers(&self) -> Option<impl Iterator<Item = Range<usize>>> {
        Some(self.markers.as_ref()?.iter().map(|place| place.range.clone()))
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the tokens of a sequence that begins with this text, with a BOS token if the model requires one. A BOS
    /// written by the template is not doubled.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`].
    pub fn tokens(&self, model: &Model) -> Result<Vec<Token>, LlamaError> {
        self.tokens_of(model, self.start(model)..self.text.len(), true)
    }

    /// Returns the tokens of the text after the first `from` bytes.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`].
    pub fn tokens_from(&self, model: &Model, from: usize) -> Result<Vec<Token>, LlamaError> {
        self.tokens_of(model, from..self.text.len(), false)
    }

    /// Returns [`Self::tokens`] of the first `at` bytes and [`Self::tokens_from`] of the rest.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`].
    pub fn tokens_split(&self, model: &Model, at: usize) -> Result<[Vec<Token>; 2], LlamaError> {
        let start = self.start(model).min(at);
        Ok([self.tokens_of(model, start..at, true)?, self.tokens_from(model, at)?])
    }

    /// Returns the end of a BOS token in the text that the tokenizer adds as well, in bytes; 0 if there is none.
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
        // BOS, EOS, or both.
        let mut tokens = if add_special { model.tokenize("", true, false)? } else { Vec::new() };
        let last = tokens.split_off(tokens.len().min(model.adds_bos().into()));
        let (mut from, mut rstrip) = (range.start, false);
        let add_text = |range: Range<usize>, (rstrip, lstrip), tokens: &mut Vec<Token>| {
            let text = &self.text[range];
            let text = if rstrip { text.trim_ascii_start() } else { text };
            let text = if lstrip { text.trim_ascii_end() } else { text };
            // Some vocabularies put a space before the text, as after each marker.
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

/// Tokenizes a text without any markers.
fn text_tokens(model: &Model, text: &str) -> Result<Vec<Token>, LlamaError> {
    let tokens = model.tokenize(text, false, false)?;
    let Some(&marker) = tokens.iter().find(|&&token| model.is_control(token)) else { return Ok(tokens) };
    // The pieces of a marker's text may combine into the marker. In that case they are tokenized separately.
    let marker = String::from_utf8_lossy(&model.piece(marker, true)).into_owned();
    let Some(at) = text.find(&marker).filter(|_| marker.len() > 1) else { return Ok(tokens) };
    let (head, tail) = text.split_at(at + marker.chars().next().map_or(0, char::len_utf8));
    Ok([text_tokens(model, head)?, more_tokens(model, tail)?].concat())
}

/// Works like [`text_tokens`] for the continuation of a text: without the space that some vocabularies put before a
/// text.
fn more_tokens(model: &Model, text: &str) -> Result<Vec<Token>, LlamaError> {
    /// No word extends across a line break.
    const END: &str = "\n";
    let (end, tokens) = (model.tokenize(END, false, false)?, text_tokens(model, &[END, text].concat())?);
    match tokens.strip_prefix(&end[..]) {
        Some(tokens) => Ok(tokens.to_vec()),
        None => text_tokens(model, text),
    }
}
