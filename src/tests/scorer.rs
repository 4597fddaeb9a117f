//! Compares the scorer with a naive float64 softmax over dequantized keys.

use half::f16;
use rand::{RngExt, SeedableRng};

use super::fixture::*;
use crate::backend::ComputeError;
use crate::cache::{self, Layout};
use crate::capture::{LogitScale, Queries};
use crate::llama::{CacheType, Context, Pos};
use crate::policy::{HeadScores, Needs};
use crate::score::{LayerQueries, Scorer};

const N: usize = 200;
const SCALE: LogitScale = LogitScale { pre: 1.0, post: 0.125, softcap: false };

fn random_queries(layout: &Layout, layer: usize, pos: &[Pos]) -> Queries {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(layer as u64);
    let l = &layout.layers[layer];
    let n_q = (l.n_head * l.n_embd_head_k) as usize;
    Queries {
        data: (0..pos.len() * n_q).map(|_| f16::from_f32(rng.random_range(-3.0..3.0))).collect(),
        pos: pos.to_vec(),
    }
}

struct Scores {
    observed: Vec<f32>,
    future: Vec<f32>,
    each: Vec<f32>,
}

fn run(ctx: &Context, layout: &Layout, scale: LogitScale, account_error: bool) -> Vec<Scores> {
    let mut out: Vec<Scores> = Vec::new();
    Scorer::new(2, 1)
        .score(
            layout,
            &cache::cells(ctx, 0),
            Needs { future: true, observed: true, each: true, ..Needs::default() },
            account_error,
            |il| {
                Ok::<_, ComputeError>(LayerQueries::new(
                    random_queries(layout, il, &observed_pos()),
                    random_queries(layout, il, &[N as Pos; 5]),
                    scale,
                ))
            },
            |first, heads: &[HeadScores]| {
                assert_eq!(first, out.len(), "heads arrive in order");
                out.extend(heads.iter().map(|s| Scores {
                    observed: s.observed.to_vec(),
                    future: s.future.to_vec(),
                    each: s.each.to_vec(),
                }));
            },
        )
        .unwrap();
    out
}

/// Positions of more than one chunk of queries, the last of them inside the prompt.
fn observed_pos() -> Vec<Pos> {
    (N as Pos - 40..N as Pos).collect()
}

/// Probabilities of one query head's queries over the cells of the sequence, in float64. `[n_query][n]`
fn naive(
    ctx: &Context,
    layout: &Layout,
    layer: usize,
    head: usize,
    pos: &[Pos],
    logit: &dyn Fn(f64) -> f64,
) -> Vec<Vec<f64>> {
    let l = &layout.layers[layer];
    let (d, n_head) = (l.n_embd_head_k as usize, l.n_head as usize);
    let kv = head / (n_head / l.n_head_kv as usize);
    let cells = cache::cells(ctx, 0);
    let keys: Vec<_> = cells.iter().map(|c| row(layout, layer, false, kv, c)).collect();
    let queries = random_queries(layout, layer, pos);
    pos.iter()
        .enumerate()
        .map(|(i, &p)| {
            let q: Vec<f32> = queries.data[(i * n_head + head) * d..][..d].iter().map(|x| x.to_f32()).collect();
            let logits: Vec<f64> = keys
                .iter()
                .zip(&cells)
                .map(|(k, c)| if c.pos <= p { logit(dot(&q, k)) } else { f64::NEG_INFINITY })
                .collect();
            softmax(&logits)
        })
        .collect()
}

/// Largest difference to the naive scores, relative to the largest probability.
fn worst_error(ctx: &Context, layout: &Layout, scale: LogitScale) -> f64 {
    let logit = |x: f64| {
        let x = x * f64::from(scale.pre);
        f64::from(scale.post) * if scale.softcap { x.tanh() } else { x }
    };
    let scores = run(ctx, layout, scale, false);
    let n = cells(ctx).len();
    let (n_head, n_kv) = (layout.layers[0].n_head as usize, layout.layers[0].n_head_kv as usize);
    let group = n_head / n_kv;
    let mut errors = Vec::new();
    for layer in [0, 13, 29] {
        for kv in 0..n_kv {
            let scores = &scores[layer * n_kv + kv];
            let mut observed = vec![0f64; n];
            let mut future = vec![0f64; n];
            let mut each = Vec::new();
            for head in kv * group..(kv + 1) * group {
                let pos = observed_pos();
                for p in naive(ctx, layout, layer, head, &pos, &logit) {
                    for (sum, p) in observed.iter_mut().zip(&p) {
                        *sum += p / (pos.len() * group) as f64;
                    }
                }
                for p in naive(ctx, layout, layer, head, &[N as Pos; 5], &logit) {
                    for (sum, p) in future.iter_mut().zip(&p) {
                        *sum += p / (5 * group) as f64;
                    }
                    each.extend(p);
                }
            }
            for (got, expected) in [(&scores.observed, &observed), (&scores.future, &future), (&scores.each, &each)] {
                errors.push(apart(got, expected));
            }
        }
    }
    largest(errors)
}

/// A quantized K is multiplied with q as q8 (or as f16), as in the decoder; a bf16 K on the CPU with q as bf16. A GPU rounds the terms of
/// sums over the queries, probabilities and weights, to 10 bits (cuBLAS's TF32). Its kernel for a few queries (ggml-cuda/mmvq.cu)
/// multiplies the zero point of a block with the sum of q before q is rounded: with q4_0 this causes up to 2e-2 on these queries, where
/// rounding alone causes 8e-3.
fn tolerance(layout: &Layout, k: CacheType) -> f64 {
    match k {
        CacheType::F16 if is_on_gpu(layout) => 5e-3,
        CacheType::F16 => 2e-3,
        _ if is_on_gpu(layout) => 5e-2,
        _ => 2e-2,
    }
}

#[test]
fn equals_naive_softmax_for_every_cache_type() {
    let model = model();
    let tokens = tokens(&model, N);
    let mut all_hold = true;
    for setup in [F16, F16_FLASH, BF16, Q8_0, Q4_0, Q5_1, IQ4_NL] {
        let mut ctx = context(&model, setup, 512, 64);
        decode(&mut ctx, &tokens, 0, 0);
        let layout = Layout::of(&ctx, 0).unwrap();
        let error = worst_error(&ctx, &layout, SCALE);
        all_hold &= is_within(format_args!("scores, {setup}"), error, tolerance(&layout, setup.k));
    }
    assert!(all_hold, "a score is not that of float64: see what was measured");
}

#[test]
fn honours_the_softcap() {
    let model = model();
    let mut ctx = context(&model, F16, 512, 512);
    decode(&mut ctx, &tokens(&model, N), 0, 0);
    let layout = Layout::of(&ctx, 0).unwrap();
    let capped = LogitScale { pre: 0.125 / 5.0, post: 5.0, softcap: true };
    let error = worst_error(&ctx, &layout, capped);
    assert!(is_within("scores with a softcap", error, tolerance(&layout, F16.k)), "{error}");
}

#[test]
fn sees_only_its_own_sequence_in_any_cell_order() {
    let model = model();
    let tokens = tokens(&model, N);
    let mut ctx = context(&model, F16, 512, 512);
    // sequence 0 fills the holes that sequence 1 left, out of order
    decode(&mut ctx, &tokens[..60], 0, 0);
    decode(&mut ctx, &tokens[..80], 0, 1);
    decode(&mut ctx, &tokens[60..120], 60, 0);
    ctx.remove(1, 10, 40);
    decode(&mut ctx, &tokens[120..], 120, 0);
    let cells = cells(&ctx);
    assert!(cells.windows(2).any(|w| w[0].index > w[1].index), "the cells are out of order");
    let layout = Layout::of(&ctx, 0).unwrap();
    let error = worst_error(&ctx, &layout, SCALE);
    assert!(is_within("scores of one of two sequences", error, tolerance(&layout, F16.k)), "{error}");
}

/// Computes v/2 of the module's docs from the stored blocks.
#[test]
fn raises_logits_by_half_the_variance_of_a_rounded_key() {
    let model = model();
    let mut ctx = context(&model, Q4_0, 512, 512);
    decode(&mut ctx, &tokens(&model, N), 0, 0);
    let layout = Layout::of(&ctx, 0).unwrap();
    let scores = run(&ctx, &layout, SCALE, true);
    let cells = cells(&ctx);
    let l = &layout.layers[3];
    let (d, n_head, kv) = (l.n_embd_head_k as usize, l.n_head as usize, 1);
    let group = n_head / l.n_head_kv as usize;
    let queries = random_queries(&layout, 3, &[N as Pos; 5]);
    let q: Vec<f32> = queries.data[kv * group * d..][..d].iter().map(|x| x.to_f32()).collect();
    let logits: Vec<f64> = cells
        .iter()
        .map(|cell| {
            let mut variance = 0.0;
            for block in 0..d / 32 {
                // SAFETY: the storage lives as long as the context.
                let k = unsafe { &*l.k };
                // a q4_0 block of this cell and head starts with its scale
                let scale = bytes(k, cell.index as usize * k.nb[1] + (kv * d / 32 + block) * 18, 2);
                let delta = f64::from(f16::from_le_bytes([scale[0], scale[1]]));
                let q2: f64 = q[block * 32..][..32].iter().map(|x| f64::from(x * x)).sum();
                variance += delta * delta / 12.0 * q2;
            }
            let s = f64::from(SCALE.post);
            s * dot(&q, &row(&layout, 3, false, kv, cell)) + s * s * variance / 2.0
        })
        .collect();
    let expected = softmax(&logits);
    let got = &scores[3 * l.n_head_kv as usize + kv].each[..cells.len()];
    let error = apart(got, &expected);
    assert!(is_within("scores that allow for rounding", error, tolerance(&layout, Q4_0.k)), "{error}");
    let plain = run(&ctx, &layout, SCALE, false);
    assert!(plain[3].future != scores[3].future, "the correction changes something");
}
