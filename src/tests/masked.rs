//! Unequal budgets behind a mask: no change if nothing is dropped, and otherwise the result of attention over the kept rows alone.

#![forbid(unsafe_code)]

use rand::{RngExt, SeedableRng};

use super::fixture::*;
use crate::cache::Layout;
use crate::capture::node::Node;
use crate::capture::watch::{Watch, during};
use crate::compact::{Mask, MaskError};
use crate::llama::{Batch, Context, Pos, Token};
use crate::policy::{Kept, Selection};
use crate::sys;

const N: usize = 300;

fn ragged(n: usize, kept: Vec<Vec<u32>>) -> Selection {
    let end = kept.iter().scan(0, |end, kept| {
        *end += kept.len();
        Some(*end)
    });
    Selection { kept: Kept::Ragged { end: end.collect(), index: kept.concat() }, ..composite(n, 0, Vec::new()) }
}

/// The same selection as composite cells and head by head: sinks, recent tokens and 60 entries of each head's own between them.
fn equal_budgets(layout: &Layout, seed: u64) -> [Selection; 2] {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut kept = || -> Vec<u32> {
        let own = random_subset(N - 68, 60, &mut rng).into_iter().map(|place| place + 4);
        (0..4).chain(own).chain(N as u32 - 64..N as u32).collect()
    };
    let heads: Vec<Vec<u32>> = (0..n_heads(layout)).map(|_| kept()).collect();
    [composite(N, heads[0].len(), heads.concat()), ragged(N, heads)]
}

/// A random subset of random size for every head; the last entry is always kept.
fn random_ragged(layout: &Layout, n: usize, seed: u64) -> Selection {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let sizes: Vec<usize> = (0..n_heads(layout)).map(|_| rng.random_range(2..n)).collect();
    ragged(n, sizes.into_iter().map(|size| random_subset(n, size, &mut rng)).collect())
}

fn batch(tokens: &[Token], first: usize) -> Batch {
    let mut batch = Batch::new(tokens.len());
    for (i, &token) in tokens.iter().enumerate() {
        batch.add(token, (first + i) as Pos, 0, i + 1 == tokens.len()).unwrap();
    }
    batch
}

/// Logits after one more token, and after a further batch.
fn go_on(ctx: &mut Context, tokens: &[Token], mut decode: impl FnMut(&mut Context, &Batch)) -> [Vec<f32>; 2] {
    [(N, N + 1), (N + 1, N + 40)].map(|(from, to)| {
        decode(ctx, &batch(&tokens[from..to], from));
        ctx.logits().unwrap().to_vec()
    })
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

#[test]
fn dropping_nothing_changes_no_bit() {
    let model = model();
    let tokens = tokens(&model, N + 40);
    let run = |masked: bool| {
        let mut ctx = context(&model, F16, 1024, 512);
        decode(&mut ctx, &tokens[..N], 0, 0);
        let layout = Layout::of(&ctx, 0).unwrap();
        let all = ragged(N, vec![(0..N as u32).collect(); n_heads(&layout)]);
        let mut mask = Mask::new(&ctx, 0, &all).unwrap();
        go_on(&mut ctx, &tokens, |ctx, batch| match masked {
            true => mask.decode(ctx, batch).unwrap(),
            false => ctx.decode(batch).unwrap(),
        })
    };
    assert!(run(true) == run(false));
}

#[test]
fn equal_budgets_are_what_compaction_leaves() {
    let model = model();
    let tokens = tokens(&model, N + 40);
    // One token only: other kernels compute a batch, and this model amplifies their rounding to half a logit. With an older sequence in the
    // first cells and a hole left by another one, cells are not positions.
    let mut straight = Vec::new();
    for crooked in [false, true] {
        let prepare = || {
            let mut ctx = context(&model, F16, 1024, 128);
            if crooked {
                decode(&mut ctx, &tokens[..50], 0, 1);
                decode(&mut ctx, &tokens[..100], 0, 0);
                ctx.remove(1, 10, -1);
                decode(&mut ctx, &tokens[100..N], 100, 0);
            } else {
                decode(&mut ctx, &tokens[..N], 0, 0);
            }
            let layout = Layout::of(&ctx, 0).unwrap();
            (ctx, layout)
        };
        let compacted = |seed| {
            let (mut ctx, layout) = prepare();
            compact(&mut ctx, 0, &equal_budgets(&layout, seed)[0]).unwrap();
            next_logits(&mut ctx, tokens[N], N as Pos)
        };
        let (mut ctx, layout) = prepare();
        let mut mask = Mask::new(&ctx, 0, &equal_budgets(&layout, 7)[1]).unwrap();
        mask.decode(&mut ctx, &batch(&tokens[N..=N], N)).unwrap();
        let masked = ctx.logits().unwrap();
        let (same, other) = (compacted(7), compacted(8));
        let (error, other) = (largest_difference(masked, &same), largest_difference(masked, &other));
        // a GPU adds up in the order of the cells, which a compaction changes if cells and positions differ in order
        let rounding = if straight.is_empty() { 0.0 } else { largest_difference(&straight, &same) };
        let limit = if is_on_gpu(&layout) { 0.02f32.max(1.5 * rounding / other) } else { 0.02 };
        println!("the same cells in another order: {rounding} of {other}");
        let name = format_args!("a mask, cells out of order: {crooked}");
        assert!(is_within(name, f64::from(error / other), f64::from(limit)), "{error} of {other}");
        straight = same;
    }
}

/// A mask, and the resulting attention probabilities.
struct Spy {
    mask: Mask,
    /// `[layer][n_head][n_tokens][n_kv]`
    probabilities: Vec<Vec<f32>>,
}

impl Watch for Spy {
    type Error = MaskError;

    fn ask(&mut self, node: &Node) -> Result<bool, MaskError> {
        Ok(self.mask.ask(node)? || node.layer_after("kq_soft_max").is_some())
    }

    fn read(&mut self, node: &Node) -> Result<bool, MaskError> {
        if node.0.op == sys::GGML_OP_SOFT_MAX {
            self.probabilities.push(floats(node.0.type_, &all_bytes(node.0)));
        }
        self.mask.read(node)
    }

    fn panicked(text: String) -> MaskError {
        MaskError::Panic(text)
    }
}

#[test]
fn a_head_spreads_its_attention_over_what_it_kept() {
    let model = model();
    let tokens = tokens(&model, N + 40);
    let mut ctx = context(&model, F16, 1024, 128);
    decode(&mut ctx, &tokens[..N], 0, 0);
    let layout = Layout::of(&ctx, 0).unwrap();
    let selection = random_ragged(&layout, N, 3);
    let all = ragged(N, vec![(0..N as u32).collect(); n_heads(&layout)]);
    let [full, masked] = [&all, &selection].map(|selection| {
        let mut spy = Spy { mask: Mask::new(&ctx, 0, selection).unwrap(), probabilities: Vec::new() };
        during(&mut spy, &mut ctx, |ctx| ctx.decode(&batch(&tokens[N..], N))).unwrap();
        ctx.remove(0, N as Pos, -1);
        spy.probabilities
    });
    assert_eq!(masked.len(), layout.n_layer());
    for (il, (layer, masked)) in layout.layers.iter().zip(&masked).enumerate() {
        let (n_head, n_kv) = (layer.n_head as usize, layer.n_head_kv as usize);
        let of_head = masked.len() / n_head;
        let row = of_head / (tokens.len() - N);
        for (h, p) in masked.chunks_exact(of_head).enumerate() {
            let kept = selection.kept_by(il * n_kv + h / (n_head / n_kv)).unwrap();
            // the new tokens, in the cells behind the prompt, stay visible
            let is_kept: Vec<bool> = (0..row).map(|j| j >= N || kept.binary_search(&(j as u32)).is_ok()).collect();
            for (t, p) in p.chunks_exact(row).enumerate() {
                assert!(p.iter().zip(&is_kept).all(|(p, kept)| *kept || *p == 0.0), "layer {il}, head {h}, token {t}");
                assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-4);
                // up to the first attention nothing differs: its weights are those of the full cache, rescaled
                if il == 0 {
                    let full = &full[0][h * of_head + t * row..][..row];
                    let full: Vec<f64> =
                        full.iter().zip(&is_kept).map(|(p, kept)| f64::from(*p) * f64::from(u8::from(*kept))).collect();
                    let sum: f64 = full.iter().sum();
                    for (j, (p, full)) in p.iter().zip(&full).enumerate() {
                        let expected = full / sum;
                        assert!((f64::from(*p) - expected).abs() < 1e-4 * expected + 1e-7, "head {h}, cell {j}");
                    }
                }
            }
        }
    }
}

#[test]
fn memory_of_a_device_is_masked_alike() {
    let model = model();
    let tokens = tokens(&model, N + 40);
    let run = || {
        let mut ctx = context(&model, F16, 1024, 128);
        decode(&mut ctx, &tokens[..N], 0, 0);
        let layout = Layout::of(&ctx, 0).unwrap();
        let mut mask = Mask::new(&ctx, 0, &random_ragged(&layout, N, 5)).unwrap();
        go_on(&mut ctx, &tokens, |ctx, batch| mask.decode(ctx, batch).unwrap())
    };
    assert!(run() == on_device(run));
}

#[test]
fn what_cannot_be_masked_or_compacted_is_refused() {
    let model = model();
    let tokens = tokens(&model, N);
    let mut ctx = context(&model, F16_FLASH, 512, 512);
    decode(&mut ctx, &tokens, 0, 0);
    let layout = Layout::of(&ctx, 0).unwrap();
    let unequal = random_ragged(&layout, N, 1);
    let error = Mask::new(&ctx, 0, &unequal).err().unwrap();
    assert!(matches!(error, MaskError::Flash) && error.to_string().contains("`flash_attn` off"), "{error}");
    let error = compact(&mut ctx, 0, &unequal).unwrap_err().to_string();
    assert!(error.contains("different numbers"), "{error}");
    assert_eq!(cells(&ctx).len(), N);

    let mut ctx = context(&model, F16, 512, 512);
    decode(&mut ctx, &tokens, 0, 0);
    let refused = |selection: &Selection| matches!(Mask::new(&ctx, 0, selection), Err(MaskError::Selection(_)));
    assert!(refused(&ragged(N, vec![vec![0, N as u32 - 1]])), "too few heads");
    assert!(refused(&ragged(N, vec![vec![3, 2, N as u32 - 1]; n_heads(&layout)])), "not ascending");
    assert!(refused(&random_ragged(&layout, N - 1, 1)), "made for another cache");
}
