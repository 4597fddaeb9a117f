//! Several sequences that decode together, like requests of a server.
//!
//! They have the same context, each in its own cells: the cells of one session are loaded once, and llama.cpp copies them. With the same
//! text and seed, a vote on each sequence would keep the same cells; so the vote is taken once, and its time is that of one vote.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gvote::llama::{Batch, Context, ContextParams, LlamaError, Model, Pos, SeqId, Token};

/// Untimed steps before the timed ones: the first one copies the cells, and on a GPU the second one is recorded.
const WARM_UP: usize = 2;
/// llama.cpp allocates cells in multiples of this.
const CELLS_STEP: usize = 256;

/// Cells of a sequence, as returned by [`gvote::Session::copy_cells`].
pub struct Cells<'a> {
    /// Empty if there are no cells.
    pub state: &'a [u8],
    pub count: usize,
    /// The next position.
    pub n_past: Pos,
}

/// Sequences in one context, each with its own part of the cache.
pub struct Together {
    ctx: Context,
    sequences: usize,
    pos: Pos,
}

impl Together {
    /// Creates a context with room for `sequences` copies of these cells and `tokens` more in each.
    ///
    /// # Errors
    /// [`LlamaError::Context`] if the memory is too small; errors of [`Context::adopt_sequence`].
    pub fn new(
        model: &Model,
        params: &ContextParams,
        sequences: usize,
        cells: &Cells,
        tokens: usize,
    ) -> Result<Self, LlamaError> {
        let each = (cells.count + tokens + WARM_UP).next_multiple_of(CELLS_STEP);
        let at_least = |n: u32| n.max(sequences as u32);
        let n_ctx = u32::try_from(each * sequences).map_err(|_| LlamaError::Memory)?;
        let mut ctx = Context::new(
            model,
            &ContextParams {
                n_ctx,
                n_batch: at_least(params.n_batch),
                n_ubatch: at_least(params.n_ubatch),
                n_seq_max: sequences as u32,
                kv_unified: false,
                ..params.clone()
            },
        )?;
        if !cells.state.is_empty() {
            ctx.adopt_sequence(0, cells.state)?;
            for seq in 1..sequences {
                ctx.copy(0, seq as SeqId)?;
            }
        }
        Ok(Self { ctx, sequences, pos: cells.n_past })
    }

    /// Decodes `n` of the tokens in every sequence, starting over at the end of the list. The sequences begin at different tokens. Returns
    /// the time it took.
    ///
    /// # Errors
    /// [`LlamaError::Cancelled`] once the flag is set; errors of [`Context::decode`].
    pub fn decode(&mut self, tokens: &[Token], n: usize, cancel: &AtomicBool) -> Result<Duration, LlamaError> {
        let mut batch = Batch::new(self.sequences);
        let mut step = |i: usize| {
            if cancel.load(Ordering::Relaxed) {
                return Err(LlamaError::Cancelled);
            }
            batch.clear();
            for seq in 0..self.sequences {
                batch.add(tokens[(i + seq) % tokens.len()], self.pos, seq as SeqId, true)?;
            }
            self.ctx.decode(&batch)?;
            self.pos += 1;
            // every caller reads the logits, which waits for the computation
            self.ctx.logits().map(drop)
        };
        (0..WARM_UP).try_for_each(&mut step)?;
        let start = Instant::now();
        (0..n).try_for_each(step)?;
        Ok(start.elapsed())
    }
}
