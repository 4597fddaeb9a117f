//! The replay: reads the context a second time. Cells that its own repetition attends to are those that any later question may need.
//!
//! After KVzip (Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416). While the sequence
//! is parked, the model is told that the text follows once more, and reads it chunk by chunk. Each repeated token attends to the place
//! where it, or its successor, stood: the context can be rebuilt without a key that no repetition attends to. The cost is about one more
//! prefill, and scoring one query for each token.

use std::ops::Range;

use super::{Vote, VoteError, Voter, chunk};
use crate::cache::{self, Cell, Parked};
use crate::capture::Queries;
use crate::llama::{Batch, Pos, Token};
use crate::policy::Needs;
use crate::score::LayerQueries;

/// Tokens repeated in one chunk. Their cells come on top of the context's.
const CHUNK: usize = 256;
/// Tokens before a chunk that are repeated with it, as context for its first token.
const LEAD: usize = 8;
/// Cells that a chunk takes, including the announcement in any tokenizer: it has no more tokens than bytes.
pub(super) const CELLS: usize = CHUNK + LEAD + ANNOUNCEMENT.len();
const ANNOUNCEMENT: &str = "\n\nThe same text once more:\n\n";

/// Attention of the repeated tokens to each cell; each list is `[head][n]`.
pub(crate) struct Replayed {
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

impl Vote<'_> {
    /// Reads the whole sequence again. The cache is unchanged afterwards.
    pub fn replay(&mut self, cells: &[Cell]) -> Result<Replayed, VoteError> {
        let announcement = self.ctx.model().tokenize(ANNOUNCEMENT, false, false)?;
        self.reread_tokens(cells, 0..self.sequence.tokens.len(), &announcement)
    }

    /// Reads some of the tokens again, as if they came next. The cache is unchanged afterwards.
    pub fn read_again(&mut self, cells: &[Cell], tokens: Range<usize>) -> Result<Replayed, VoteError> {
        self.reread_tokens(cells, tokens, &[])
    }

    /// Reads tokens that are still to come. The cache is unchanged afterwards.
    pub fn read_ahead(&mut self, cells: &[Cell], tokens: &[Token]) -> Result<Replayed, VoteError> {
        self.read_chunks(cells.len(), tokens, 0..tokens.len(), &[])
    }

    fn reread_tokens(
        &mut self,
        cells: &[Cell],
        tokens: Range<usize>,
        announcement: &[Token],
    ) -> Result<Replayed, VoteError> {
        if !self.is_whole(cells) {
            return Err(VoteError::ReplayCompressed);
        }
        let known = self.sequence.tokens.clone();
        self.read_chunks(cells.len(), &known, tokens, announcement)
    }

    /// Whether every token is known and still in the cache.
    pub fn is_whole(&self, cells: &[Cell]) -> bool {
        let tokens = &self.sequence.tokens;
        cells.len() == tokens.len() && tokens.iter().all(|&token| token >= 0)
    }

    /// `n`: cells of the sequence. `range`: indices into `tokens`.
    fn read_chunks(
        &mut self,
        n: usize,
        tokens: &[Token],
        range: Range<usize>,
        announcement: &[Token],
    ) -> Result<Replayed, VoteError> {
        let chunk = chunk(self.ctx);
        let Self { ctx, voter, sequence, .. } = self;
        let Voter { layout, capture, scorer, .. } = &mut **voter;
        let (seq, n_past) = (sequence.id, sequence.n_past);
        let heads: usize = layout.n_head_kv().sum();
        let mut out = Replayed { n, fourth_powers: vec![0.0; heads * n], mean: vec![0.0; heads * n] };
        // the chunk must fit into one ubatch; in a very small one the announcement is left out
        let announcement = if 2 * announcement.len() < chunk { announcement } else { &[] };
        let room = chunk - announcement.len();
        let lead = LEAD.min(room / 2);
        let step = CHUNK.min(room - lead);
        let mut batch = Batch::new(announcement.len() + lead + step);
        let mut parked = Parked::new(ctx, seq, announcement.len() + lead + step)?;
        for start in range.clone().step_by(step) {
            let end = range.end.min(start + step);
            batch.clear();
            let repeated = &tokens[start.saturating_sub(lead).max(range.start)..end];
            for (i, &token) in announcement.iter().chain(repeated).enumerate() {
                batch.add(token, n_past + i as Pos, seq, false)?;
            }
            let queries = capture.replay(&mut parked, seq, &batch)?;
            let visible = cache::cells(&parked, seq);
            let weight = (end - start) as f32 / range.len() as f32;
            // the announcement's own queries carry no information about the text
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
                    Ok::<_, VoteError>(LayerQueries::new(observed, Queries::default(), capture.logit_scale(il)))
                },
                |first, heads| {
                    for (head, scores) in (first..).zip(heads) {
                        // the context's cells come first: the repeated tokens have larger positions
                        for (to, p) in out.mean[head * n..][..n].iter_mut().zip(scores.observed) {
                            *to += weight * p;
                        }
                        for (to, p) in out.fourth_powers[head * n..][..n].iter_mut().zip(scores.fourth_powers) {
                            *to += p;
                        }
                    }
                },
            )?;
            parked.reset()?;
        }
        Ok(out)
    }
}
