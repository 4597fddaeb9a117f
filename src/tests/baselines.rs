//! Compares the scores that the baselines need with naive float64 over dequantized keys and values.

#![forbid(unsafe_code)]

use half::f16;
use rand::{RngExt, SeedableRng};

use super::fixture::*;
use crate::backend::ComputeError;
use crate::cache::{self, Layout};
use crate::capture::{LogitScale, Queries};
use crate::llama::Pos;
use crate::policy::{HeadScores, Needs};
use crate::score::{LayerQueries, Scorer};

/// Tokens of a short request, and of one with more cells than the scorer processes at once.
const SHORT: usize = 150;
const LONG: usize = 1100;
/// Synthetic queries: more than one chunk. The current query is added to them.
const SAMPLES: usize = 20;
const SCALE: LogitScale = LogitScale { pre: 1.0, post: 0.125, softcap: false };

fn queries(layout: &Layout, layer: usize) -> Queries {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(layer as u64);
    let l = &layout.layers[layer];
    let n_q = (l.n_head * l.n_embd_head_k) as usize;
    Queries {
        data: (0..(SAMPLES + 1) * n_q).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect(),
        // every query sees every cell
        pos: vec![LONG as Pos; SAMPLES + 1],
    }
}

struct Measured {
    expected: Vec<f32>,
    value_norm: Vec<f32>,
    key_similarity: Vec<f32>,
}

fn measure(ctx: &crate::llama::Context, layout: &Layout) -> Vec<Measured> {
    let mut out = Vec::new();
    Scorer::new(2, 1)
        .score(
            layout,
            &cache::cells(ctx, 0),
            Needs { expected: true, value_norm: true, key_similarity: true, ..Needs::default() },
            false,
            |il| {
                let observed = Queries::default();
                Ok::<_, ComputeError>(LayerQueries::new(observed, queries(layout, il), SCALE))
            },
            |_, heads: &[HeadScores]| {
                out.extend(heads.iter().map(|s| Measured {
                    expected: s.expected.to_vec(),
                    value_norm: s.value_norm.to_vec(),
                    key_similarity: s.key_similarity.to_vec(),
                }));
            },
        )
        .unwrap();
    out
}

#[test]
fn baseline_measures_equal_float64() {
    let model = model();
    let mut all_hold = true;
    for (setup, n) in [(F16, SHORT), (F16_FLASH, LONG), (Q8_0, SHORT)] {
        let tokens = tokens(&model, n);
        let mut ctx = context(&model, setup, n as u32 + 64, 64);
        // another sequence in between: its cells must not count
        decode(&mut ctx, &tokens[..50], 0, 0);
        decode(&mut ctx, &tokens[50..70], 0, 1);
        decode(&mut ctx, &tokens[50..], 50, 0);
        let layout = Layout::of(&ctx, 0).unwrap();
        let measured = measure(&ctx, &layout);
        let cells = cells(&ctx);
        let mut errors = [const { Vec::new() }; 3];
        for (layer, kv) in [(0, 0), (13, 2), (29, 1)] {
            let l = &layout.layers[layer];
            let (d, n_head) = (l.n_embd_head_k as usize, l.n_head as usize);
            let group = n_head / l.n_head_kv as usize;
            let got = &measured[layer * l.n_head_kv as usize + kv];
            let keys: Vec<Vec<f64>> = cells
                .iter()
                .map(|c| row(&layout, layer, false, kv, c).iter().map(|x| f64::from(*x)).collect())
                .collect();
            let norms: Vec<f64> = cells
                .iter()
                .map(|c| row(&layout, layer, true, kv, c).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt())
                .collect();
            errors[0].push(apart(&got.value_norm, &norms));

            let length = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
            let mut anchor = vec![0.0; d];
            for key in &keys {
                anchor.iter_mut().zip(key).for_each(|(a, k)| *a += k / length(key));
            }
            let cosine = |key: &Vec<f64>| {
                key.iter().zip(&anchor).map(|(k, a)| k * a).sum::<f64>() / length(key) / length(&anchor)
            };
            errors[1].push(apart(&got.key_similarity, &keys.iter().map(cosine).collect::<Vec<_>>()));

            let q = queries(&layout, layer);
            let mut expected = vec![0.0; cells.len()];
            for head in kv * group..(kv + 1) * group {
                let logits = |key: &Vec<f64>| -> Vec<f64> {
                    (0..SAMPLES)
                        .map(|s| {
                            let q = &q.data[(s * n_head + head) * d..][..d];
                            f64::from(SCALE.post) * q.iter().zip(key).map(|(q, k)| q.to_f64() * k).sum::<f64>()
                        })
                        .collect()
                };
                let exponents: Vec<f64> = keys
                    .iter()
                    .map(|key| {
                        let l = logits(key);
                        let mean = l.iter().sum::<f64>() / SAMPLES as f64;
                        mean + l.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / SAMPLES as f64 / 2.0
                    })
                    .collect();
                for (sum, p) in expected.iter_mut().zip(softmax(&exponents)) {
                    *sum += p / group as f64;
                }
            }
            errors[2].push(apart(&got.expected, &expected));
        }
        // the exponent of an expected weight comes from sums over the queries, whose terms a GPU rounds to 10 bits: see scorer.rs
        let quantized = setup.k.is_quantized();
        let sums = if is_on_gpu(&layout) || quantized { 3e-2 } else { 2e-3 };
        let plain = if quantized { 3e-2 } else { 2e-3 };
        let names = ["value norms", "key similarities", "expected weights"];
        for ((errors, name), tolerance) in errors.into_iter().zip(names).zip([plain, plain, sums]) {
            all_hold &= is_within(format_args!("{name}, {setup}"), largest(errors), tolerance);
        }
    }
    assert!(all_hold, "a measure is not that of float64: see what was measured");
}
