//! The replay: the context is read a second time, and what its own repetition looks at is what any later question could.
//!
//! After KVzip (Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416). In
//! a second sequence that shares the cells of the first, the model is told that the text follows once more, and gets it
//! chunk by chunk. Each repeated token attends to the place where it, or what follows it, stood: so a key that no
//! repetition looks at is one the context can be rebuilt without. Costs about one more prefill, and the scoring of as
//! many queries as there are tokens.

use super::{SEQ, Session, SessionError, Voter};
use crate::cache::{self, Cell};
use crate::capture::Queries;
use crate::llama::{Batch, Pos, Token};
use crate::policy::Needs;
use crate::score::LayerQueries;

/// Tokens repeated at once. Their cells come on top of the context's.
const CHUNK: usize = 256;
/// Tokens before a chunk that are repeated with it, so that its first one has something to follow.
const LEAD: usize = 8;
/// Cells that a chunk takes, with room for the announcement in any tokenizer: it has no more tokens than bytes.
pub(super) const CELLS: usize = CHUNK + LEAD + ANNOUNCEMENT.len();
const ANNOUNCEMENT: &str = "\n\nThe same text once more:\n\n";

/// What the repeated tokens looked at. `[head][n]` each
pub(super) struct Replayed {
    n: usize,
    /// Sum of p⁴ over the queries of the group: its fourth root is close to the largest p.
    fourth_powers: Vec<f32>,
    /// Mean probability.
    mean: Vec<f32>,
}

impl Replayed {
    pub fn mean_of(&self, head: usize) -> &[f32] {
        &self.mean[head * self.n..][..self.n]
    }

    pub fn fourth_powers_of(&self, head: usize) -> &[f32] {
        &self.fourth_powers[head * self.n..][..self.n]
    }
}

impl Session {
    /// Reads the sequence once more. The cache is as before afterwards.
    pub(super) fn replay(&mut self, cells: &[Cell]) -> Result<Replayed, SessionError> {
        if cells.len() != self.tokens.len() || self.voter.is_none() {
            return Err(SessionError::ReplayCompressed);
        }
        let announcement = self.model().tokenize(ANNOUNCEMENT, false, false)?;
        let scratch = super::N_SEQ as i32 - 1;
        self.ctx.copy(SEQ, scratch, -1, -1);
        let result = self.replay_chunks(cells, scratch, &announcement);
        self.ctx.remove(scratch, -1, -1);
        result
    }

    fn replay_chunks(
        &mut self,
        cells: &[Cell],
        scratch: i32,
        announcement: &[Token],
    ) -> Result<Replayed, SessionError> {
        let n = cells.len();
        let Self { ctx, voter: Some(Voter { layout, capture, scorer, .. }), tokens, n_past, chunk, .. } = self else {
            return Err(SessionError::ReplayCompressed);
        };
        let heads: usize = layout.n_head_kv().sum();
        let mut out = Replayed { n, fourth_powers: vec![0.0; heads * n], mean: vec![0.0; heads * n] };
        let step = CHUNK.min(chunk.saturating_sub(LEAD + announcement.len())).max(1);
        let mut batch = Batch::new(announcement.len() + LEAD + step);
        for start in (0..n).step_by(step) {
            let end = n.min(start + step);
            batch.clear();
            let repeated = &tokens[start.saturating_sub(LEAD)..end];
            for (i, &token) in announcement.iter().chain(repeated).enumerate() {
                batch.add(token, *n_past + i as Pos, scratch, false)?;
            }
            let queries = capture.replay(ctx, scratch, &batch)?;
            let visible = cache::cells(ctx, scratch);
            let weight = (end - start) as f32 / n as f32;
            // the announcement's own queries say nothing about the text
            let own = announcement.len();
            let mut layer_queries = queries.into_iter();
            let needs = Needs { observed: true, fourth_powers: true, ..Needs::default() };
            scorer.score(
                layout,
                &visible,
                needs,
                false,
                |il| {
                    let mut observed = layer_queries.next().unwrap_or_default();
                    let n_q = observed.data.len() / observed.pos.len().max(1);
                    observed.data.drain(..own * n_q);
                    observed.pos.drain(..own);
                    let scale = capture.logit_scale(il);
                    Ok::<_, SessionError>(LayerQueries { observed, future: Queries::default(), scale })
                },
                |head, scores| {
                    // the shared cells come first: the repeated tokens have larger positions
                    for (to, p) in out.mean[head * n..][..n].iter_mut().zip(scores.observed) {
                        *to += weight * p;
                    }
                    for (to, p) in out.fourth_powers[head * n..][..n].iter_mut().zip(scores.fourth_powers) {
                        *to += p;
                    }
                },
            )?;
            ctx.remove(scratch, *n_past, -1);
        }
        Ok(out)
    }
}
