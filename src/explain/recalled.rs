//! What left the cache while a prompt was read, and what of it is back.

use serde::Serialize;

use super::Bits;
use crate::vote::Way;

/// What left the cache before the vote that is explained, and what came back.
#[derive(Debug, Clone, Serialize)]
pub struct Recalled {
    /// Tokens of each head that had left, mean over the heads.
    pub left: f64,
    /// `[head][position]` what had left, and is in the cache after the vote.
    pub came_back: Bits,
    /// `[position]` heads of which that is so.
    pub came_back_by: Vec<u32>,
    /// The votes before it, in order.
    pub votes: Vec<EarlierVote>,
}

/// A vote before the one that is explained.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct EarlierVote {
    /// Tokens that were read so far.
    pub tokens: usize,
    pub cells_before: usize,
    pub cells_after: usize,
    /// Tokens of each head that came back before it.
    pub back: usize,
    /// How many of these are in the cache after the last vote; mean over the heads.
    pub back_kept: f64,
    /// How many of those that it set aside are in the cache after the last vote; mean over the heads.
    pub dropped_kept: f64,
}

impl Recalled {
    /// `kept`: what is in the cache after the last vote of `n` tokens. None where no vote came before it.
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

    /// Tokens of each head that came back and are in the cache; mean over the heads.
    pub fn back(&self) -> f64 {
        f64::from(self.came_back_by.iter().sum::<u32>()) / self.came_back.n_rows() as f64
    }
}
