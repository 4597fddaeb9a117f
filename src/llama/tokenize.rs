//! Tokenization.

use std::thread;

use super::{LlamaError, Model, Token};
use crate::sys;

/// Bytes of stack for each byte of text. The tokenizers of many models use C++ regular expressions, whose matching
/// recurses for every character of a word. This stack suffices for words of one mebibyte. Only the used part of it
/// takes up memory.
const STACK_A_BYTE: usize = 1 << 10;
/// Texts of up to this many bytes are tokenized on the caller's own stack.
const SHORT: usize = 1 << 9;
/// Smallest stack, in bytes: enough for a thread that does not recurse.
const STACK_LEAST: usize = 1 << 20;

impl Model {
    /// Converts text to tokens. `add_special`: add BOS/EOS as the model requires. `parse_special`: convert special
    /// tokens in the text, such as `<|im_start|>`, to their ids.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`] if the model has no tokenizer or the tokenizer fails; [`LlamaError::Memory`].
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, LlamaError> {
        // llama.cpp would end the process.
        if !self.has_tokenizer() {
            return Err(LlamaError::Tokenize);
        }
        if text.len() <= SHORT {
            return self.tokenize_here(text, add_special, parse_special);
        }
        let mut stack = text.len().saturating_mul(STACK_A_BYTE) + STACK_LEAST;
        loop {
            let tokens = thread::scope(|scope| {
                let here = || self.tokenize_here(text, add_special, parse_special);
                let thread = thread::Builder::new().stack_size(stack).spawn_scoped(scope, here);
                thread.ok().map(|thread| thread.join().unwrap_or(Err(LlamaError::Tokenize)))
            });
            match tokens {
                Some(tokens) => return tokens,
                // If the system refuses such a stack, try a smaller one: hardly any text needs all of it.
                None if stack > STACK_LEAST => stack = (stack / 2).max(STACK_LEAST),
                None => return Err(LlamaError::Memory),
            }
        }
    }

    fn tokenize_here(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, LlamaError> {
        let len = i32::try_from(text.len()).map_err(|_| LlamaError::Tokenize)?;
        let mut tokens = vec![0; text.len() + 8];
        loop {
            let n_max = i32::try_from(tokens.len()).map_err(|_| LlamaError::Tokenize)?;
            // SAFETY: each pointer and length belong to one buffer.
            let n = unsafe {
                sys::gvote_shim_tokenize(
                    self.vocab(),
                    text.as_ptr().cast(),
                    len,
                    tokens.as_mut_ptr(),
                    n_max,
                    add_special,
                    parse_special,
                )
            };
            if n >= 0 {
                tokens.truncate(n as usize);
                return Ok(tokens);
            }
            if n == i32::MIN {
                return Err(LlamaError::Tokenize);
            }
            tokens.resize(n.unsigned_abs() as usize, 0);
        }
    }
}
