//! Reference implementations of the policies from their descriptions, in simple float64 loops. Deliberately slow: they
//! share no code and no optimisation with the tested policies.

use super::{Head, Params, Request, Shape};

/// For each head (or once, for one ranking of all): two opinions on each entry, higher is better, and its mass, summing
/// to 1.
pub struct Ranked {
    pub opinions: Vec<[Vec<f64>; 2]>,
    pub mass: Vec<Vec<f64>>,
}

/// A list in order, and the progress of the turns in each opinion's own order at each count.
pub struct Turns {
    pub order: Vec<usize>,
    pub reached: Vec<[usize; 2]>,
}

impl Ranked {
    /// Returns forced and protected entries, then the best remaining entry of either opinion, in turns; among equal
    /// scores, the older.
    pub fn turns(&self, params: &Params, list: usize, protected: &[u32]) -> Turns {
        let n = self.mass[list].len();
        let stays = |&j: &usize| forced(params, n, j) || protected.contains(&(j as u32));
        let mut order: Vec<usize> = (0..n).filter(stays).collect();
        let own = self.opinions[list].each_ref().map(|score| best(score, n));
        let mut reached = vec![[0, 0]; order.len() + 1];
        for turn in 0..n - order.len() {
            let side = turn % 2;
            let at = (0..n).find(|&i| !order.contains(&own[side][i])).unwrap();
            order.push(own[side][at]);
            let mut now = *reached.last().unwrap();
            now[side] = at + 1;
            reached.push(now);
        }
        Turns { order, reached }
    }

    /// Mean over the lists of the mass that is not kept.
    pub fn lost(&self, kept: impl Fn(usize) -> Vec<usize>) -> f64 {
        let lost = self.mass.iter().enumerate().map(|(list, mass)| {
            let kept = kept(list);
            (0..mass.len()).filter(|j| !kept.contains(j)).map(|j| mass[j]).sum::<f64>()
        });
        lost.sum::<f64>() / self.mass.len() as f64
    }
}

/// Returns the `count` best entries; among equal scores, the older.
pub fn best(score: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..score.len()).collect();
    order.sort_by(|&a, &b| score[b].partial_cmp(&score[a]).unwrap().then(a.cmp(&b)));
    order.truncate(count);
    order
}

pub fn forced(params: &Params, n: usize, j: usize) -> bool {
    j < params.sinks || j + params.recent >= n
}

fn nz(x: &[f64]) -> Vec<f64> {
    let sum: f64 = x.iter().sum();
    x.iter().map(|v| if sum > 0.0 { v / sum } else { 0.0 }).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// Returns both opinions of one head, without the other heads' part, and its mass.
fn gvote_head(params: &Params, n: usize, head: &Head) -> ([Vec<f64>; 2], Vec<f64>) {
    let m = nz(&wide(&head.future));
    let older = n as isize - params.window as isize;
    let half = (params.pool / 2) as isize;
    let mut s = vec![0.0; n];
    for j in 0..older {
        for k in j - half..=j + half {
            if (0..older).contains(&k) {
                s[j as usize] += f64::from(head.observed[k as usize]) / params.pool as f64;
            }
        }
    }
    let long = |x: &[f64]| nz(&x.iter().zip(&head.value_norm).map(|(x, &v)| x * f64::from(v)).collect::<Vec<_>>());
    let looked_at = long(&s).into_iter().zip(long(&m)).map(|(s, m)| s + m);
    let single = looked_at.zip(&head.key_similarity).map(|(b, &cosine)| b * (1.0 - f64::from(cosine))).collect();
    let s = nz(&s);
    let mut passages = vec![0.0_f64; n];
    for (hit, &height) in s.iter().enumerate() {
        // A hit keeps `back` entries before it and `forward` after it.
        let (first, last) = (hit.saturating_sub(params.span.back), hit + params.span.forward);
        for (j, score) in passages.iter_mut().enumerate() {
            if first <= j && j <= last {
                *score = score.max(height);
            }
        }
    }
    ([passages, single], m)
}

/// Rounds to the precision at which scores are stored and compared, 11 bits.
fn stored(x: f64) -> f64 {
    half::f16::from_f64(x * 32768.0).to_f64() / 32768.0
}

pub fn gvote_composite(params: &Params, shape: &Shape, request: &Request) -> Ranked {
    let heads = request.heads.iter();
    let (own, mass): (Vec<_>, Vec<_>) = heads.map(|head| gvote_head(params, shape.n, head)).unzip();
    let all: Vec<Vec<f64>> = own.iter().map(|[passages, _]| passages.clone()).collect();
    let mix = f64::from(params.head_mix);
    let mixed = |[passages, single]: [Vec<f64>; 2]| {
        let passages =
            passages.iter().enumerate().map(|(j, &a)| stored((stored(a) + mix * mean(&all, j)) / (1.0 + mix)));
        [passages.collect(), single.iter().map(|&b| stored(b / 4.0)).collect()]
    };
    Ranked { opinions: own.into_iter().map(mixed).collect(), mass }
}

pub fn gvote_cells(params: &Params, shape: &Shape, request: &Request) -> Ranked {
    let heads = request.heads.iter();
    let (own, mass): (Vec<_>, Vec<_>) = heads.map(|head| gvote_head(params, shape.n, head)).unzip();
    let (passages, single): (Vec<_>, Vec<_>) = own.into_iter().map(|[a, b]| (a, b)).unzip();
    let over_heads = |rows: &[Vec<f64>]| (0..shape.n).map(|j| mean(rows, j)).collect::<Vec<_>>();
    let passages = over_heads(&passages).into_iter().map(stored).collect();
    let single = over_heads(&single).into_iter().map(|b| stored(b / 4.0)).collect();
    Ranked { opinions: vec![[passages, single]], mass: vec![over_heads(&mass)] }
}

fn mean(rows: &[Vec<f64>], j: usize) -> f64 {
    rows.iter().map(|row| row[j]).sum::<f64>() / rows.len() as f64
}

/// The votes of one KV head.
pub struct Votes {
    pub votes: Vec<usize>,
    pub sum: Vec<f64>,
    pub union: usize,
}

pub fn paper_head(params: &Params, shape: &Shape, head: &Head) -> Votes {
    let n = shape.n;
    let query = |g: usize, s: usize| wide(&head.each[(g * (params.samples + 1) + s) * n..][..n]);
    let mut votes = vec![0; n];
    let mut sum = vec![0.0; n];
    for g in 0..shape.group {
        let current = query(g, params.samples);
        let whole: f64 = current.iter().sum();
        let mut b = 0;
        while best(&current, b).iter().map(|&j| current[j]).sum::<f64>() < f64::from(params.p_nuc) * whole {
            b += 1;
        }
        for s in 0..=params.samples {
            let p = query(g, s);
            best(&p, b).iter().for_each(|&j| votes[j] += 1);
            (0..n).for_each(|j| sum[j] += p[j]);
        }
    }
    let union = (0..n).filter(|&j| votes[j] > 0 || forced(params, n, j)).count();
    Votes { votes, sum, union }
}
