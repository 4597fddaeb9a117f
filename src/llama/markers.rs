//! Markers such as `<|im_end|>`: texts that a vocabulary always turns into one token, regardless of context.

use std::ffi::CStr;

use super::{Model, Token};
use crate::sys;

/// A text that becomes one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marker {
    pub text: String,
    pub token: Token,
    /// True for user-defined tokens: whole words that are ordinary text.
    pub is_text: bool,
    /// Strip white space before the marker.
    pub lstrip: bool,
    /// Strip white space after the marker.
    pub rstrip: bool,
}

impl Model {
    /// Returns the markers of the vocabulary in token order; empty if the vocabulary has no texts.
    pub fn markers(&self) -> Vec<Marker> {
        if !self.has_tokenizer() {
            return Vec::new();
        }
        let vocab = self.vocab();
        let marker = |token: Token| {
            // SAFETY: a token of a vocabulary with texts.
            let attr = unsafe { sys::llama_vocab_get_attr(vocab, token) };
            let is = |flag| attr & flag != 0;
            let is_text = !is(sys::LLAMA_TOKEN_ATTR_CONTROL) && !is(sys::LLAMA_TOKEN_ATTR_UNKNOWN);
            if is_text && !is(sys::LLAMA_TOKEN_ATTR_USER_DEFINED) {
                return None;
            }
            // SAFETY: as above; the text is a string owned by the vocabulary.
            let text = unsafe { CStr::from_ptr(sys::llama_vocab_get_text(vocab, token)) };
            let text = text.to_str().ok()?.to_owned();
            let (lstrip, rstrip) = (is(sys::LLAMA_TOKEN_ATTR_LSTRIP), is(sys::LLAMA_TOKEN_ATTR_RSTRIP));
            Some(Marker { text, token, is_text, lstrip, rstrip })
        };
        (0..self.n_vocab() as Token).filter_map(marker).collect()
    }
}
