//! How many cells a command asks for where -c leaves it open: what the text at hand needs, and more when it needs more.

use gvote::SessionParams;
use gvote::llama::Model;

use super::args::ContextArgs;

/// Of an answer whose length nobody knows, tokens that there is room for from the start.
const ANSWER: usize = 1024;
/// Of a chat, whose messages nobody knows.
const CHAT: usize = 4096;
/// A context is no shorter than this, whatever the file says of the model's training.
const LEAST: usize = 512;

/// Cells to begin with, and the most that there may be later.
#[derive(Clone, Copy)]
pub struct Cells {
    first: usize,
    most: usize,
}

impl Cells {
    /// For a prompt of so many tokens and an answer of `predict` (negative: nobody knows), as far as the model was trained for.
    pub fn for_answer(model: &Model, prompt: usize, predict: i32) -> Self {
        let answer = usize::try_from(predict).ok();
        let most = longest(model).min(answer.map_or(usize::MAX, |n| prompt + n));
        Self { first: most.min(prompt + answer.unwrap_or(ANSWER).min(ANSWER)), most }
    }

    /// For a conversation.
    pub fn for_chat(model: &Model) -> Self {
        let most = longest(model);
        Self { first: most.min(CHAT), most }
    }

    /// Cells to begin with.
    pub fn first(self) -> usize {
        self.first
    }

    /// A session that may grow, unless -c says how many cells it has.
    pub fn given_to(self, session: SessionParams, context: &ContextArgs) -> SessionParams {
        let grow_to = if context.ctx_size == 0 { u32::try_from(self.most).unwrap_or(u32::MAX) } else { 0 };
        SessionParams { grow_to, ..session }
    }
}

fn longest(model: &Model) -> usize {
    model.n_ctx_train().max(LEAST)
}
