//! Text to tokens.

use std::thread;

use super::{LlamaError, Model, Token};
use crate::sys;

/// Bytes of the stack for each byte of a text: the tokenizers of many models are regular expressions of C++, whose matching
/// calls itself for every character of a word. Words of a mebibyte are read with it; memory is taken only as far as it is used.
const STACK_A_BYTE: usize = 1 << 10;
/// Texts up to here, bytes, are read on the caller's own stack.
const SHORT: usize = 1 << 9;
/// Of a thread that does not recurse, bytes; and what it has to get to be of use.
const STACK_LEAST: usize = 1 << 20;

impl Model {
    /// Text to tokens. `add_special`: add BOS/EOS as the model wants; `parse_special`: `<|im_start|>` and the like in the
    /// text become their tokens.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`] when the model has no tokenizer, or its tokenizer fails; [`LlamaError::Memory`].
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, LlamaError> {
        // llama.cpp would end the process
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
                // where the system has no such stack, hardly any text needs all of it
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
            // SAFETY: pointers and lengths belong together.
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
