//! Context size if `-c` is not given: enough cells for the current text, growing as the text grows.

use gvote::SessionParams;
use gvote::llama::Model;

use super::args::ContextArgs;

/// Tokens reserved for an answer of unknown length.
const ANSWER: usize = 1024;
/// Initial cells of a chat, whose length is unknown.
const CHAT: usize = 4096;
/// Minimum context length, even if the file claims a shorter training context.
const LEAST: usize = 512;

/// Initial number of cells, and the limit for growing.
#[derive(Clone, Copy)]
pub struct Cells {
    first: usize,
    most: usize,
}

impl Cells {
    /// Returns the cells for `prompt` tokens and an answer of `predict` tokens (negative: unknown length), at most the training context.
    pub fn for_answer(model: &Model, prompt: usize, predict: i32) -> Self {
        let answer = usize::try_from(predict).ok();
        let most = longest(model).min(answer.map_or(usize::MAX, |n| prompt + n));
        Self { first: most.min(prompt + answer.unwrap_or(ANSWER).min(ANSWER)), most }
    }

    /// Returns the cells for a conversation.
    pub fn for_chat(model: &Model) -> Self {
        let most = longest(model);
        Self { first: most.min(CHAT), most }
    }

    /// Returns the initial number of cells.
    pub fn first(self) -> usize {
        self.first
    }

    /// Lets the session's cache grow up to the limit, unless `-c` fixes its size.
    pub fn given_to(self, session: SessionParams, context: &ContextArgs) -> SessionParams {
        let grow_to = if context.ctx_size == 0 { u32::try_from(self.most).unwrap_or(u32::MAX) } else { 0 };
        SessionParams { grow_to, ..session }
    }
}

fn longest(model: &Model) -> usize {
    model.n_ctx_train().max(LEAST)
}
