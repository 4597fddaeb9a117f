//! Records what left the cache and what came back before a vote that is to be explained. Other votes record nothing.

use super::Sequence;
use crate::archive::Batch;

/// The votes before the explained one, in order.
#[derive(Debug, Default)]
pub(crate) struct Way {
    pub votes: Vec<Step>,
    back: Vec<Batched>,
}

/// One of these votes.
#[derive(Debug)]
pub(crate) struct Step {
    /// Tokens read so far.
    pub tokens: usize,
    pub cells_before: usize,
    pub cells_after: usize,
    /// Rows that came back before this vote, and rows that it set aside.
    pub back: Vec<Batched>,
    pub left: Option<Batched>,
}

/// Positions of rows that moved together, equally many in each head: `[head][n]`.
#[derive(Debug)]
pub(crate) struct Batched(Vec<Vec<u32>>);

impl Batched {
    fn of(batch: &Batch, n_heads: usize) -> Self {
        Self((0..n_heads).map(|head| batch.positions(head).to_vec()).collect())
    }

    /// Rows per head.
    pub fn len(&self) -> usize {
        self.0.first().map_or(0, Vec::len)
    }

    /// Each row as its head and position.
    pub fn rows(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.0.iter().enumerate().flat_map(|(head, positions)| positions.iter().map(move |&pos| (head, pos as usize)))
    }
}

impl Way {
    /// Records rows that are in the cache again.
    pub fn came_back(&mut self, batch: &Batch, n_heads: usize) {
        self.back.push(Batched::of(batch, n_heads));
    }

    /// Records a vote that left `cells_after` of `cells_before` cells and set aside the rows that it dropped.
    pub fn voted(&mut self, sequence: &Sequence, cells_before: usize, cells_after: usize, n_heads: usize) {
        let dropped = sequence.archive.as_ref().and_then(|archive| archive.batches().last());
        let left = dropped.filter(|_| cells_after < cells_before).map(|batch| Batched::of(batch, n_heads));
        let (tokens, back) = (sequence.tokens.len(), std::mem::take(&mut self.back));
        self.votes.push(Step { tokens, cells_before, cells_after, back, left });
    }
}
