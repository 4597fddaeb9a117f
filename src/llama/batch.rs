use super::{LlamaError, Pos, SeqId, Token};
use crate::sys;

/// Tokens to decode together. Holds at most the capacity it was made with.
pub struct Batch {
    raw: sys::llama_batch,
    capacity: usize,
}

// SAFETY: the batch owns plain arrays.
unsafe impl Send for Batch {}

impl Batch {
    /// A batch for up to `capacity` tokens, each in one sequence.
    pub fn new(capacity: usize) -> Self {
        // SAFETY: allocates plain arrays; freed in drop.
        let raw = unsafe { sys::llama_batch_init(capacity as i32, 0, 1) };
        Self { raw, capacity }
    }

    /// Tokens in the batch.
    pub fn len(&self) -> usize {
        self.raw.n_tokens as usize
    }

    /// Whether the batch holds no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Empties the batch.
    pub fn clear(&mut self) {
        self.raw.n_tokens = 0;
    }

    /// Appends a token at a position of a sequence; `logits`: its next-token logits are wanted.
    ///
    /// # Errors
    /// [`LlamaError::BatchFull`].
    pub fn add(&mut self, token: Token, pos: Pos, seq: SeqId, logits: bool) -> Result<(), LlamaError> {
        let i = self.len();
        if i == self.capacity {
            return Err(LlamaError::BatchFull(self.capacity));
        }
        // SAFETY: llama_batch_init allocated `capacity` entries of each array and one sequence id a token.
        unsafe {
            *self.raw.token.add(i) = token;
            *self.raw.pos.add(i) = pos;
            *self.raw.n_seq_id.add(i) = 1;
            **self.raw.seq_id.add(i) = seq;
            *self.raw.logits.add(i) = i8::from(logits);
        }
        self.raw.n_tokens += 1;
        Ok(())
    }

    /// The largest position.
    pub(super) fn last_pos(&self) -> Option<Pos> {
        // SAFETY: the array has an entry for every token.
        (0..self.len()).map(|i| unsafe { *self.raw.pos.add(i) }).max()
    }

    pub(crate) fn raw(&self) -> sys::llama_batch {
        self.raw
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // SAFETY: made by llama_batch_init, freed once.
        unsafe { sys::llama_batch_free(self.raw) };
    }
}
