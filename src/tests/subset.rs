//! A different random subset in every head equals naive attention over that subset, at every layer.

use rand::SeedableRng;

use super::fixture::*;
use crate::cache::Layout;
use crate::compact::compact;
use crate::llama::Context;
use crate::policy::{Kept, Selection};

const N: usize = 300;
const C: usize = 130;

/// Largest difference between an attention output and its float64 reference, relative to the largest output of the layer.
fn worst_error(setup: Setup) -> f64 {
    let model = model();
    let tokens = tokens(&model, N + 1);
    let mut ctx = context(&model, setup, 1024, 128);
    decode(&mut ctx, &tokens[..N], 0, 0);

    let layout = Layout::of(&ctx, 0).unwrap();
    let before = cells(&ctx);
    let selection = random_heads(&layout, N, C, 7);
    // [head][c] rows of K and V as they are before anything moves
    let rows = |is_v: bool| -> Vec<Vec<Vec<f32>>> {
        (0..n_heads(&layout))
            .map(|head| {
                let n_kv = layout.layers[0].n_head_kv as usize;
                let kept = selection.kept_by(head).unwrap();
                kept.iter().map(|&c| row(&layout, head / n_kv, is_v, head % n_kv, &before[c as usize])).collect()
            })
            .collect()
    };
    let (mut k, mut v) = (rows(false), rows(true));

    compact(&mut ctx, 0, &selection).unwrap();
    let attention = record(&mut ctx, &layout, |ctx| decode(ctx, &tokens[N..], N as i32, 0));
    let newest = *cells(&ctx).last().unwrap();

    let mut worst = 0f64;
    for (il, layer) in layout.layers.iter().enumerate() {
        let (n_head, n_kv) = (layer.n_head as usize, layer.n_head_kv as usize);
        let d = layer.n_embd_head_k as usize;
        let largest = attention[il].out.iter().fold(0f32, |m, x| m.max(x.abs()));
        for h in 0..n_head {
            let kv = h / (n_head / n_kv);
            let head = il * n_kv + kv;
            if h % (n_head / n_kv) == 0 {
                k[head].push(row(&layout, il, false, kv, &newest));
                v[head].push(row(&layout, il, true, kv, &newest));
            }
            let q = rounded(&layout, il, &attention[il].q[h * d..][..d]);
            let logits: Vec<f64> = k[head].iter().map(|k| dot(&q, k) / (d as f64).sqrt()).collect();
            let p = softmax(&logits);
            for (j, out) in attention[il].out[h * d..][..d].iter().enumerate() {
                let expected: f64 = p.iter().zip(&v[head]).map(|(p, v)| p * f64::from(v[j])).sum();
                worst = worst.max((f64::from(*out) - expected).abs() / f64::from(largest));
            }
        }
    }
    worst
}

#[test]
fn random_heads_equal_naive_attention() {
    // what is left is the kernels' own rounding: probabilities in f16 without flash attention, f16 sums with it
    for (setup, tolerance) in [(F16, 2e-3), (F16_FLASH, 1e-2), (Q8_0, 1e-5), (Q4_0, 1e-5)] {
        let error = worst_error(setup);
        println!("{setup:?}: {error:.1e}");
        assert!(error < tolerance, "{setup:?}: {error}");
    }
}

#[test]
fn the_reference_notices_a_wrong_row() {
    // the tolerance above must be far below what one misplaced head would cause
    let model = model();
    let tokens = tokens(&model, N + 1);
    let out = |seed| {
        let mut ctx = context(&model, F16, 1024, 128);
        decode(&mut ctx, &tokens[..N], 0, 0);
        let layout = Layout::of(&ctx, 0).unwrap();
        compact(&mut ctx, 0, &random_heads(&layout, N, C, seed)).unwrap();
        record(&mut ctx, &layout, |ctx| decode(ctx, &tokens[N..], N as i32, 0))[0].out.clone()
    };
    let (a, b) = (out(1), out(2));
    let largest = a.iter().fold(0f32, |m, x| m.max(x.abs()));
    let difference = a.iter().zip(&b).fold(0f32, |m, (x, y)| m.max((x - y).abs()));
    assert!(difference / largest > 2e-2, "{difference} of {largest}");
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

    // llama.cpp's own removal leaves holes, so that the sums run in another order: equal up to rounding where nothing has
    // amplified it yet, in the first layer
    let (_, removed) = run(&|ctx, _| {
        for pos in 0..N as u32 {
            if !kept.contains(&pos) {
                ctx.remove(0, pos as i32, pos as i32 + 1);
            }
        }
    });
    let largest = removed[0].out.iter().fold(0f32, |m, x| m.max(x.abs()));
    let worst = attention[0].out.iter().zip(&removed[0].out).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(worst / largest < 4e-3, "{worst} of {largest}");
}
