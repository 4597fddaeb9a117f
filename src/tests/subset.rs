//! A different random subset in every head gives naive attention over that subset, at every layer.

#![forbid(unsafe_code)]

use rand::SeedableRng;

use super::fixture::*;
use crate::cache::Layout;
use crate::llama::Context;
use crate::policy::{Kept, Selection};

const N: usize = 300;
const C: usize = 130;

/// Differences between attention outputs and a float64 reference, relative to the largest output of the layer.
struct Differences {
    /// The largest difference.
    error: f64,
    /// The difference that swapping heads would cause: each head is compared with the output for its neighbour's rows, and the smallest of
    /// the heads' largest differences counts.
    misplaced: f64,
}

fn differences(ctx: &mut Context, layout: &Layout) -> Differences {
    let tokens = tokens(ctx.model(), N + 1);
    let before = cells(ctx);
    let selection = random_heads(layout, N, C, 7);
    let n_kv = layout.layers[0].n_head_kv as usize;
    // `[head][c]` rows of K and V before anything moves
    let rows = |is_v: bool| -> Vec<Vec<Vec<f32>>> {
        (0..n_heads(layout))
            .map(|head| {
                let kept = selection.kept_by(head).unwrap();
                kept.iter().map(|&c| row(layout, head / n_kv, is_v, head % n_kv, &before[c as usize])).collect()
            })
            .collect()
    };
    let (mut k, mut v) = (rows(false), rows(true));

    compact(ctx, 0, &selection).unwrap();
    let attention = record(ctx, layout, |ctx| decode(ctx, &tokens[N..], N as i32, 0));
    let newest = *cells(ctx).last().unwrap();
    for head in 0..n_heads(layout) {
        k[head].push(row(layout, head / n_kv, false, head % n_kv, &newest));
        v[head].push(row(layout, head / n_kv, true, head % n_kv, &newest));
    }

    let mut out = Differences { error: 0.0, misplaced: f64::INFINITY };
    for (il, (layer, attention)) in layout.layers.iter().zip(&attention).enumerate() {
        let (n_head, d) = (layer.n_head as usize, layer.n_embd_head_k as usize);
        let scale = largest(attention.out.iter().map(|x| f64::from(*x)));
        for h in 0..n_head {
            let kv = h / (n_head / n_kv);
            let q = rounded(layout, il, &attention.q[h * d..][..d]);
            let apart_from = |head: usize| {
                let logits: Vec<f64> = k[head].iter().map(|k| dot(&q, k) / (d as f64).sqrt()).collect();
                let p = softmax(&logits);
                let expected = |j: usize| p.iter().zip(&v[head]).map(|(p, v)| p * f64::from(v[j])).sum::<f64>();
                let out = &attention.out[h * d..][..d];
                largest(out.iter().enumerate().map(|(j, out)| f64::from(*out) - expected(j))) / scale
            };
            out.error = largest([out.error, apart_from(il * n_kv + kv)]);
            out.misplaced = out.misplaced.min(apart_from(il * n_kv + (kv + 1) % n_kv));
        }
    }
    out
}

/// Limit on the kernels' own rounding. On the CPU probabilities are f16 without flash attention, and sums are f16 with it.
///
/// On a GPU (ggml-cuda) without flash attention p·v and its sums are f16, all else is f32. With flash attention all is f32 for one token on
/// newer cards (fattn-vec.cuh); older ones have f16 sums (fattn-mma-f16.cuh). With q8_0 a value of q that lies between two of the 255 steps
/// may be rounded the other way because CUDA divides less exactly: one such value moves an output by up to 3e-2, mostly by a tenth of that.
fn tolerance(layout: &Layout, setup: Setup) -> f64 {
    match (is_on_gpu(layout), setup.flash, setup.k.is_quantized()) {
        (false, false, _) => 2e-3,
        (true, false, _) => 5e-3,
        (_, true, false) => 1e-2,
        (false, true, true) => 1e-5,
        (true, true, true) => 1e-2,
    }
}

#[test]
fn random_heads_equal_naive_attention() {
    let model = model();
    let mut all_hold = true;
    for setup in [F16, F16_FLASH, Q8_0, Q4_0] {
        let mut ctx = context(&model, setup, 1024, 128);
        let layout = Layout::of(&ctx, 0).unwrap();
        // CUDA's kernel subtracts the zero point of q4_0 times the sum of q before q is rounded, which moves outputs by a sixth
        if is_on_gpu(&layout) && setup.k == Q4_0.k {
            continue;
        }
        decode(&mut ctx, &tokens(&model, N), 0, 0);
        let Differences { error, misplaced } = differences(&mut ctx, &layout);
        let tolerance = tolerance(&layout, setup);
        all_hold &= is_within(format_args!("random heads, {setup}"), error, tolerance);
        // far below the effect of one misplaced head
        assert!(misplaced > 20.0 * tolerance, "{setup}: a head with the rows of another one is only {misplaced} apart");
    }
    assert!(all_hold, "an output is not what attention over the kept rows gives: see what was measured");
}

#[test]
fn composite_cells_and_removed_cells_agree() {
    let model = model();
    let tokens = tokens(&model, N + 1);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let kept = random_subset(N, C, &mut rng);
    let run = |how: &dyn Fn(&mut Context, &Layout)| {
        let mut ctx = context(&model, F16, 1024, 512);
        decode(&mut ctx, &tokens[..N], 0, 0);
        let layout = Layout::of(&ctx, 0).unwrap();
        how(&mut ctx, &layout);
        let attention = record(&mut ctx, &layout, |ctx| decode(ctx, &tokens[N..], N as i32, 0));
        (ctx.logits().unwrap().to_vec(), attention)
    };
    let (heads, attention) = run(&|ctx, layout| {
        compact(ctx, 0, &composite(N, C, kept.repeat(n_heads(layout)))).unwrap();
    });
    let (same, _) = run(&|ctx, _| {
        let selection = Selection { kept: Kept::Tokens(kept.clone()), ..composite(N, C, Vec::new()) };
        compact(ctx, 0, &selection).unwrap();
    });
    assert!(heads == same, "the same tokens in every head are the same cells");

    // llama.cpp's own removal leaves holes, so sums run in another order: results are equal up to rounding in the first layer, where
    // nothing has amplified it yet
    let (_, removed) = run(&|ctx, _| {
        for pos in 0..N as u32 {
            if !kept.contains(&pos) {
                ctx.remove(0, pos as i32, pos as i32 + 1);
            }
        }
    });
    let removed: Vec<f64> = removed[0].out.iter().map(|x| f64::from(*x)).collect();
    let error = apart(&attention[0].out, &removed);
    assert!(is_within("composite and removed cells", error, 4e-3), "{error}");
}
