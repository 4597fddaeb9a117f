//! Texts that a vocabulary has one token for, whatever stands around them: markers such as `<|im_end|>`.

use std::ffi::CStr;

use super::{Model, Token};
use crate::sys;

/// A text that becomes one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marker {
    pub text: String,
    pub token: Token,
    /// Words that a vocabulary has whole are text like any other (user-defined tokens).
    pub is_text: bool,
    /// White space before it goes.
    pub lstrip: bool,
    /// White space after it goes.
    pub rstrip: bool,
}

impl Model {
    /// The markers of the vocabulary, in the order of their tokens; none where it has no texts.
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
            // SAFETY: as above; the text is a string of the vocabulary's.
            let text = unsafe { CStr::from_ptr(sys::llama_vocab_get_text(vocab, token)) };
            let text = text.to_str().ok()?.to_owned();
            let (lstrip, rstrip) = (is(sys::LLAMA_TOKEN_ATTR_LSTRIP), is(sys::LLAMA_TOKEN_ATTR_RSTRIP));
            Some(Marker { text, token, is_text, lstrip, rstrip })
        };
        (0..self.n_vocab() as Token).filter_map(marker).collect()
    }
}
