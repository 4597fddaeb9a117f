//! Several sequences that decode together, as a server's requests do.
//!
//! They have the same context, each in cells of its own: what one of them holds is loaded once and copied by llama.cpp. A vote on
//! each would keep the same cells, since the text and the seed are the same; so it is taken once, and its time is that of one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gvote::llama::{Batch, Context, ContextParams, LlamaError, Model, Pos, SeqId, Token};

/// Steps before those that are timed: the first one makes the copies, and on a GPU the second one is recorded.
const WARM_UP: usize = 2;
/// Cells come in groups of so many.
const CELLS_STEP: usize = 256;

/// Cells of a sequence, as [`gvote::Session::copy_cells`] gives them.
pub struct Cells<'a> {
    /// Empty where there are none.
    pub state: &'a [u8],
    pub count: usize,
    /// The position that comes next.
    pub n_past: Pos,
}

/// Sequences in one context, each with its part of the cache.
pub struct Together {
    ctx: Context,
    sequences: usize,
    pos: Pos,
}

impl Together {
    /// Room for as many sequences with these cells and `tokens` more in each.
    ///
    /// # Errors
    /// [`LlamaError::Context`] where the memory is too small; those of [`Context::adopt_sequence`].
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

    /// Decodes `n` of the tokens, going round, in every sequence, and says how long that took. The sequences begin at different ones of them.
    ///
    /// # Errors
    /// [`LlamaError::Cancelled`] once the flag is set, or those of [`Context::decode`].
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
            // any caller reads the logits, and waits for them
            self.ctx.logits().map(drop)
        };
        (0..WARM_UP).try_for_each(&mut step)?;
        let start = Instant::now();
        (0..n).try_for_each(step)?;
        Ok(start.elapsed())
    }
}
