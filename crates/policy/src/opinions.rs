//! What the queries that voted say of a selection, for whoever wants it explained: what each head gives up, how many entries
//! it would need by itself, and whether real and synthetic queries would have chosen the same.

use serde::Serialize;

use super::rank::{self, Forced};
use super::{HeadScores, Params, Protected, Ranking, Selection, Shape};

/// The scores of all heads. Takes 8 bytes for each head and entry.
pub struct Opinions {
    params: Params,
    shape: Shape,
    forced: Forced,
    /// `[head][n]` what the lost mass is measured in, each head's normalised to sum 1.
    mass: Vec<f32>,
    /// `[head][n]` what real queries look at, pooled, 0 in the observation window; each head's sums to 1. Empty unless both
    /// kinds of queries voted.
    real: Vec<f32>,
    padded: Vec<f32>,
}

/// What a selection means to one KV head.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HeadOpinion {
    /// Attention mass that the head gives up, under the queries that the policy measures it with; 0 to 1.
    pub lost_mass: f32,
    /// The fewest entries, best first, with which the head would give up no more than all heads do on average. None where
    /// the policy has no ranking.
    pub needs: Option<u32>,
    /// None unless both real and synthetic queries voted.
    pub agreement: Option<Agreement>,
}

/// Who of the queries would have kept what a head keeps: each kind is given as many entries of its own choice as the head
/// keeps, beside those that always stay. The four numbers add up to that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Agreement {
    pub both: u32,
    pub real: u32,
    pub synthetic: u32,
    /// Kept for what stands around them, or for other heads.
    pub neither: u32,
    /// Entries that both kinds would have chosen, kept or not.
    pub common: u32,
}

impl Opinions {
    pub fn new(params: &Params, shape: Shape, protected: &Protected) -> Self {
        let forced = Forced::new(params, shape.n, protected);
        Self { params: params.clone(), shape, forced, mass: Vec::new(), real: Vec::new(), padded: Vec::new() }
    }

    /// Takes in one KV head, in order.
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

    /// `[n]` for each head what real queries look at, and what the lost mass is measured in; empty where it was not seen.
    pub fn of_head(&self, head: usize) -> [&[f32]; 2] {
        let n = self.shape.n;
        [&self.real, &self.mass].map(|all| all.get(head * n..(head + 1) * n).unwrap_or_default())
    }

    /// What a selection means to each head; empty where nothing was measured, or where all stays. `ranking`: what it was cut
    /// from.
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

    /// Whether each entry is among the best `count` of those that need not stay.
    fn best(&self, head: usize, scores: &[f32], count: usize) -> Vec<bool> {
        let free = (self.forced.head..self.forced.tail).filter(|&entry| !self.forced.contains(head, entry));
        let mut keys: Vec<u64> = free.map(|entry| rank::key(rank::clean(scores[entry]), entry)).collect();
        keys.sort_unstable();
        let mut best = vec![false; scores.len()];
        keys.iter().take(count).for_each(|&key| best[rank::entry(key) as usize] = true);
        best
    }
}

/// The fewest entries of `order` beside which at most `lost` of the mass is left.
fn needed(order: &[u32], mass: &[f32], lost: f64) -> u32 {
    let mut left = 0.0;
    // from the small end, as the curve of all heads is summed
    let dropped = order.iter().rev().take_while(|&&entry| {
        left += f64::from(mass[entry as usize]);
        left <= lost
    });
    (order.len() - dropped.count()) as u32
}
