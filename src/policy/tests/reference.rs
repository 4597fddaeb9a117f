//! The policies once more, from their description, in plain float64 loops. Slow on purpose: nothing
//! here shares code or a trick with what it checks.

use super::{Head, Params, Request, Shape};

/// Per head (or once, for one ranking of all): a score for each entry, higher is better, sinks and
/// recent infinite; and the mass of each entry, summing to 1.
pub struct Ranked {
    pub score: Vec<Vec<f64>>,
    pub mass: Vec<Vec<f64>>,
}

impl Ranked {
    /// Mean over heads of the mass outside each head's `count` best entries; ties to the older.
    pub fn lost(&self, count: usize) -> f64 {
        let lost = self
            .score
            .iter()
            .zip(&self.mass)
            .map(|(score, mass)| best(score, score.len())[count..].iter().map(|&j| mass[j]).sum::<f64>());
        lost.sum::<f64>() / self.score.len() as f64
    }
}

/// The `count` best entries; the older one of two equal ones.
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

/// `score'` and `m` of one head.
fn gvote_head(params: &Params, n: usize, head: &Head) -> (Vec<f64>, Vec<f64>) {
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
    let s = nz(&s);
    let mut spanned = vec![0.0_f64; n];
    for hit in 0..n {
        // A hit keeps `back` entries before it and `forward` after it.
        let (first, last) = (hit.saturating_sub(params.span.back), hit + params.span.forward);
        for (j, score) in spanned.iter_mut().enumerate() {
            if first <= j && j <= last {
                *score = score.max(s[hit] + m[hit]);
            }
        }
    }
    (spanned, m)
}

pub fn gvote_composite(params: &Params, shape: &Shape, request: &Request) -> Ranked {
    let heads = request.heads.iter();
    let (own, mass): (Vec<_>, Vec<_>) = heads.map(|head| gvote_head(params, shape.n, head)).unzip();
    let final_score = |score: &Vec<f64>| {
        let mixed = |j: usize| score[j] + f64::from(params.head_mix) * mean(&own, j);
        let infinite = |j| {
            if forced(params, shape.n, j) { f64::INFINITY } else { mixed(j) }
        };
        (0..shape.n).map(infinite).collect()
    };
    Ranked { score: own.iter().map(final_score).collect(), mass }
}

pub fn gvote_cells(params: &Params, shape: &Shape, request: &Request) -> Ranked {
    let heads = request.heads.iter();
    let (own, mass): (Vec<_>, Vec<_>) = heads.map(|head| gvote_head(params, shape.n, head)).unzip();
    let score = |j| {
        if forced(params, shape.n, j) { f64::INFINITY } else { mean(&own, j) }
    };
    Ranked {
        score: vec![(0..shape.n).map(score).collect()],
        mass: vec![(0..shape.n).map(|j| mean(&mass, j)).collect()],
    }
}

fn mean(rows: &[Vec<f64>], j: usize) -> f64 {
    rows.iter().map(|row| row[j]).sum::<f64>() / rows.len() as f64
}

/// What one KV head votes for.
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
