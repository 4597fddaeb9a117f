//! Explains a selection by the queries that voted: the mass that each head gives up, the number of entries it would
//! need alone, and whether real and synthetic queries would have chosen the same entries.

use serde::Serialize;

use super::rank::{self, Forced};
use super::{HeadScores, Params, Protected, Ranking, Selection, Shape};

/// Scores of all heads. Takes 8 bytes for each head and entry.
pub struct Opinions {
    params: Params,
    shape: Shape,
    forced: Forced,
    /// `[head][n]` the attention mass by which the lost mass is measured, normalised to sum 1 in each head.
    mass: Vec<f32>,
    /// `[head][n]` pooled attention of the real queries, 0 in the observation window, normalised to sum 1 in each head.
    /// Empty unless both kinds of queries voted.
    real: Vec<f32>,
    padded: Vec<f32>,
}

/// Effect of a selection on one KV head.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HeadOpinion {
    /// Attention mass that the head gives up, under the queries by which the policy measures it; 0 to 1.
    pub lost_mass: f32,
    /// The fewest entries, best first, with which the head would give up no more mass than the mean over all heads.
    /// None if the policy has no ranking.
    pub needs: Option<u32>,
    /// None unless both real and synthetic queries voted.
    pub agreement: Option<Agreement>,
}

/// Number of kept entries that each kind of query would have chosen. Each kind may choose as many entries as the head
/// keeps beside the forced ones. `both`, `real`, `synthetic` and `neither` add up to that number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Agreement {
    pub both: u32,
    pub real: u32,
    pub synthetic: u32,
    /// Kept because of neighbouring entries or other heads.
    pub neither: u32,
    /// Entries that both kinds would have chosen, whether kept or not.
    pub common: u32,
}

impl Opinions {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        let forced = Forced::new(params, shape.n, protected);
        Self { params: params.clone(), shape, forced, mass: Vec::new(), real: Vec::new(), padded: Vec::new() }
    }

    /// Reads the scores of one KV head. Heads arrive in order.
    pub fn observe(&mut self, scores: &HeadScores<'_>) {
        let n = self.shape.n;
        let mass = if scores.replayed.is_empty() { scores.future } else { scores.replayed };
        if mass.len() != n {
            return;
        }
        let start = self.mass.len();
        self.mass.resize(start + n, 0.0);
        rank::normalise(mass, &mut self.mass[start..]);
        if scores.observed.len() == n && scores.replayed.is_empty() {
            let older = n.saturating_sub(self.params.window);
            let mut pooled = vec![0.0; n];
            rank::average_pool(&scores.observed[..older], self.params.pool, 0, &mut self.padded, &mut pooled[..older]);
            self.real.resize(start + n, 0.0);
            rank::normalise(&pooled, &mut self.real[start..]);
        }
    }

    /// Returns the pooled attention of the real queries and the mass of one head, each `[n]`, or empty if not observed.
    pub fn of_head(&self, head: usize) -> [&[f32]; 2] {
        let n = self.shape.n;
        [&self.real, &self.mass].map(|all| all.get(head * n..(head + 1) * n).unwrap_or_default())
    }

    /// Returns the effect of a selection on each head; empty if nothing was measured or everything is kept. `ranking`
    /// is the ranking that the selection was cut from.
    pub fn on(&self, selection: &Selection, ranking: Option<&Ranking>) -> Vec<HeadOpinion> {
        let (n, heads) = (self.shape.n, self.shape.heads());
        let kept: Vec<&[u32]> = (0..heads).filter_map(|head| selection.kept_by(head)).collect();
        if self.mass.len() != heads * n || kept.len() != heads {
            return Vec::new();
        }
        let mut heads: Vec<_> = (0..heads).map(|head| self.on_head(head, kept[head])).collect();
        let mean = heads.iter().map(|head| f64::from(head.lost_mass)).sum::<f64>() / heads.len() as f64;
        if let Some(ranking) = ranking {
            for (index, head) in heads.iter_mut().enumerate() {
                let [_, mass] = self.of_head(index);
                head.needs = Some(needed(ranking.of_head(index), mass, mean));
            }
        }
        heads
    }

    fn on_head(&self, head: usize, kept: &[u32]) -> HeadOpinion {
        let [real, mass] = self.of_head(head);
        let mut stays = vec![false; mass.len()];
        kept.iter().for_each(|&entry| stays[entry as usize] = true);
        let lost: f64 = mass.iter().zip(&stays).filter(|(_, stays)| !**stays).map(|(mass, _)| f64::from(*mass)).sum();
        let agreement = (!real.is_empty()).then(|| {
            let free = |entry: &usize| !self.forced.contains(head, *entry);
            let count = (0..stays.len()).filter(free).filter(|&entry| stays[entry]).count();
            let [by_real, by_synthetic] = [real, mass].map(|scores| self.best(head, scores, count));
            let mut agreement = Agreement::default();
            for entry in (0..stays.len()).filter(free) {
                let (real, synthetic) = (by_real[entry], by_synthetic[entry]);
                agreement.common += u32::from(real && synthetic);
                if stays[entry] {
                    *match (real, synthetic) {
                        (true, true) => &mut agreement.both,
                        (true, false) => &mut agreement.real,
                        (false, true) => &mut agreement.synthetic,
                        (false, false) => &mut agreement.neither,
                    } += 1;
                }
            }
            agreement
        });
        HeadOpinion { lost_mass: lost as f32, needs: None, agreement }
    }

    /// Marks the best `count` entries among those that are not forced.
    fn best(&self, head: usize, scores: &[f32], count: usize) -> Vec<bool> {
        let free = (self.forced.head..self.forced.tail).filter(|&entry| !self.forced.contains(head, entry));
        let mut keys: Vec<u64> = free.map(|entry| rank::key(rank::clean(scores[entry]), entry)).collect();
        keys.sort_unstable();
        let mut best = vec![false; scores.len()];
        keys.iter().take(count).for_each(|&key| best[rank::entry(key) as usize] = true);
        best
    }
}

/// Returns the fewest first entries of `order` such that the remaining entries hold at most `lost` of the mass.
fn needed(order: &[u32], mass: &[f32], lost: f64) -> u32 {
    let mut left = 0.0;
    // Sums from the smallest values up, like the curve of all heads.
    let dropped = order.iter().rev().take_while(|&&entry| {
        left += f64::from(mass[entry as usize]);
        left <= lost
    });
    (order.len() - dropped.count()) as u32
}
