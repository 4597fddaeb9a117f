use super::{LlamaError, Pos, SeqId, Token};
use crate::sys;

/// Tokens to decode together, up to a fixed capacity.
pub struct Batch {
    capacity: usize,
    tokens: Vec<Token>,
    pos: Vec<Pos>,
    /// Number of sequences of each token: always one.
    n_seq: Vec<i32>,
    /// `[token]` pointer to one of `seq_ids`.
    seq: Vec<*mut SeqId>,
    /// The sequence ids that `seq` points to.
    #[allow(clippy::vec_box)] // keeps addresses stable while the vector grows
    seq_ids: Vec<Box<SeqId>>,
    logits: Vec<i8>,
}

// SAFETY: the pointers point to memory owned by the batch.
unsafe impl Send for Batch {}

impl Batch {
    /// Creates a batch for up to `capacity` tokens, each in one sequence. Memory is allocated as tokens are added.
    pub fn new(capacity: usize) -> Self {
        Self {
            // llama.cpp counts tokens in an i32
            capacity: capacity.min(i32::MAX as usize),
            tokens: Vec::new(),
            pos: Vec::new(),
            n_seq: Vec::new(),
            seq: Vec::new(),
            seq_ids: Vec::new(),
            logits: Vec::new(),
        }
    }

    /// Number of tokens in the batch.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Returns true if the batch holds no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Empties the batch.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.pos.clear();
        self.n_seq.clear();
        self.seq.clear();
        self.logits.clear();
    }

    /// Appends a token at a position of a sequence. `logits`: compute the next-token logits after this token.
    ///
    /// # Errors
    /// [`LlamaError::BatchFull`]; [`LlamaError::NoPositions`] for a negative position, which means that the sequence is
    /// too long.
    pub fn add(&mut self, token: Token, pos: Pos, seq: SeqId, logits: bool) -> Result<(), LlamaError> {
        if self.len() == self.capacity {
            return Err(LlamaError::BatchFull(self.capacity));
        }
        if pos < 0 {
            return Err(LlamaError::NoPositions { pos, n: Pos::MAX as usize });
        }
        let known = self.seq_ids.iter().position(|id| **id == seq);
        let known = known.unwrap_or_else(|| {
            self.seq_ids.push(Box::new(seq));
            self.seq_ids.len() - 1
        });
        self.seq.push(&raw mut *self.seq_ids[known]);
        self.tokens.push(token);
        self.pos.push(pos);
        self.n_seq.push(1);
        self.logits.push(i8::from(logits));
        Ok(())
    }

    /// Returns the position and the sequence of each token.
    pub(super) fn places(&self) -> impl Iterator<Item = (Pos, SeqId)> + '_ {
        // SAFETY: points to one of `seq_ids`.
        self.pos.iter().zip(&self.seq).map(|(&pos, &seq)| (pos, unsafe { *seq }))
    }

    /// Returns the batch in llama.cpp's form, valid while the batch does not change.
    pub(crate) fn raw(&self) -> sys::llama_batch {
        sys::llama_batch {
            n_tokens: self.len() as i32, // at most the capacity
            token: self.tokens.as_ptr().cast_mut(),
            embd: std::ptr::null_mut(),
            pos: self.pos.as_ptr().cast_mut(),
            n_seq_id: self.n_seq.as_ptr().cast_mut(),
            seq_id: self.seq.as_ptr().cast_mut(),
            logits: self.logits.as_ptr().cast_mut(),
        }
    }
}
