//! Rows that left the cache before the explained vote, and which of them are back.

use serde::Serialize;

use super::Bits;
use crate::vote::Way;

/// Rows that left the cache before the explained vote and came back.
#[derive(Debug, Clone, Serialize)]
pub struct Recalled {
    /// Rows of each head that had left, mean over the heads.
    pub left: f64,
    /// Rows that had left and are in the cache after the vote, `[head][position]`.
    pub came_back: Bits,
    /// Number of heads for which a token had left and is back, `[position]`.
    pub came_back_by: Vec<u32>,
    /// The votes before the explained one, in order.
    pub votes: Vec<EarlierVote>,
}

/// A vote before the explained one.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct EarlierVote {
    /// Number of tokens read by then.
    pub tokens: usize,
    pub cells_before: usize,
    pub cells_after: usize,
    /// Number of rows of each head that came back before the vote.
    pub back: usize,
    /// How many of these rows are in the cache after the explained vote; mean over the heads.
    pub back_kept: f64,
    /// How many of the rows that this vote set aside are in the cache after the explained vote; mean over the heads.
    pub dropped_kept: f64,
}

impl Recalled {
    /// `kept`: rows in the cache after the explained vote of `n` tokens. Returns None where no vote came before.
    pub(crate) fn new(way: &Way, kept: &Bits, n: usize) -> Option<Self> {
        let n_heads = kept.n_rows();
        if way.votes.is_empty() || n_heads == 0 {
            return None;
        }
        let holds: Vec<Vec<bool>> = (0..n_heads)
            .map(|head| {
                let mut holds = vec![false; n];
                kept.row(head).for_each(|pos| holds[pos] = true);
                holds
            })
            .collect();
        let mean = |count: usize| count as f64 / n_heads as f64;
        let kept_of =
            |rows: &mut dyn Iterator<Item = (usize, usize)>| mean(rows.filter(|&(head, pos)| holds[head][pos]).count());
        let mut had_left = vec![vec![false; n]; n_heads];
        way.votes.iter().flat_map(|vote| &vote.left).flat_map(|left| left.rows()).for_each(|(head, pos)| {
            had_left[head][pos] = true;
        });
        let came_back: Vec<Vec<i32>> = (0..n_heads)
            .map(|head| (0..n).filter(|&pos| had_left[head][pos] && holds[head][pos]).map(|pos| pos as i32).collect())
            .collect();
        let mut came_back_by = vec![0; n];
        came_back.iter().flatten().for_each(|&pos| came_back_by[pos as usize] += 1);
        let votes = way.votes.iter().map(|vote| EarlierVote {
            tokens: vote.tokens,
            cells_before: vote.cells_before,
            cells_after: vote.cells_after,
            back: vote.back.iter().map(|batch| batch.len()).sum(),
            back_kept: kept_of(&mut vote.back.iter().flat_map(|batch| batch.rows())),
            dropped_kept: kept_of(&mut vote.left.iter().flat_map(|batch| batch.rows())),
        });
        Some(Self {
            left: mean(had_left.iter().flatten().filter(|&&left| left).count()),
            votes: votes.collect(),
            came_back: Bits::new(n, came_back.into_iter()),
            came_back_by,
        })
    }

    /// Number of rows of each head that came back and are in the cache, mean over the heads.
    pub fn back(&self) -> f64 {
        f64::from(self.came_back_by.iter().sum::<u32>()) / self.came_back.n_rows() as f64
    }
}
