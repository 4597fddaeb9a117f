//! Runs the code for device memory on the host, and compares the results with those of the direct code.

#![forbid(unsafe_code)]

use half::f16;

use super::fixture::*;
use crate::backend::ComputeError;
use crate::cache::Layout;
use crate::capture::{Capture, CaptureError, PRETEND_SCATTERED};
use crate::compact::Reorder;
use crate::llama::{Batch, Context, ContextParams, LlamaError, Pos, SeqId, devices};
use crate::policy::threads::{self, Pool};
use crate::policy::{HeadScores, Needs};
use crate::score::{LayerQueries, Scorer};

const N: usize = 300;

#[test]
fn the_tests_use_a_gpu_where_there_is_one() {
    let ctx = context(&model(), F16, 512, 64);
    let layout = Layout::of(&ctx, 0).unwrap();
    println!("measured: the tests of the library use {}", place(&layout));
    assert_eq!(is_on_gpu(&layout), devices().iter().any(|device| device.is_gpu), "{:?}", devices());
}

#[test]
fn capture_and_probe_see_the_same() {
    let model = model();
    let tokens = tokens(&model, N);
    for setup in [F16, F16_FLASH, Q8_0] {
        let run = || {
            let mut ctx = context(&model, setup, 512, 64);
            let mut capture = captured(&mut ctx, &tokens);
            // more samples than fit into one ubatch
            let probe = capture.probe(&mut ctx, 0, N as Pos - 1, 70, 3).unwrap();
            let window = capture.window(0, 7, N as Pos - 1).unwrap().joined();
            (capture.statistics(0, 7), window.data, probe.layer(7).to_vec(), probe.layer(29).to_vec(), cells(&ctx))
        };
        let (host, device) = (run(), on_device(run));
        // a graph adds up in another order
        let close = |a: &f64, b: &f64| (a - b).abs() < 1e-5 * (1.0 + a.abs());
        let alike = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| close(a, b));
        assert!(alike(&host.0.0, &device.0.0) && alike(&host.0.1, &device.0.1), "{setup:?}: statistics");
        assert!(host.1 == device.1, "{setup:?}: window");
        assert!(host.4 == device.4, "{setup:?}: cells");
        for (host, device) in [(&host.2, &device.2), (&host.3, &device.3)] {
            let error: f64 = host.iter().zip(device).map(|(a, b)| (a.to_f64() - b.to_f64()).powi(2)).sum();
            let norm: f64 = host.iter().map(|a| a.to_f64().powi(2)).sum();
            assert!((error / norm).sqrt() < 1e-2, "{setup:?}: synthetic queries differ by {}", (error / norm).sqrt());
        }
    }
}

/// Statistics of all layers, and the windows up to `pos_last`, of some sequences.
fn seen(capture: &mut Capture, layout: &Layout, seqs: &[SeqId], pos_last: Pos) -> (Vec<f64>, Vec<f16>) {
    let (mut statistics, mut windows) = (Vec::new(), Vec::new());
    for &seq in seqs {
        for layer in 0..layout.layers.len() {
            let (mean, variance) = capture.statistics(seq, layer);
            statistics.extend([mean, variance].concat());
            windows.extend(capture.window(seq, layer, pos_last).unwrap().joined().data);
        }
    }
    (statistics, windows)
}

/// Consecutive rows are a view of the hidden state on the device; other rows are gathered.
#[test]
fn sequences_that_take_turns_in_a_ubatch_are_told_apart() {
    const EACH: usize = 60;
    let model = model();
    let tokens = tokens(&model, EACH + 1);
    for kv_unified in [true, false] {
        let params = ContextParams { n_ctx: 1024, n_ubatch: 128, n_seq_max: 3, kv_unified, ..ContextParams::default() };
        let run = || {
            let mut ctx = Context::new(&model, &params).unwrap();
            let layout = Layout::of(&ctx, 0).unwrap();
            let mut capture = Capture::new(&ctx, &layout, 32, 4);
            let mut batch = Batch::new(2 * EACH);
            for i in 0..EACH {
                for seq in [0, 1] {
                    batch.add(tokens[i + seq], i as Pos, seq as SeqId, i + 1 == EACH).unwrap();
                }
            }
            [0, 1].into_iter().for_each(|seq| capture.follow(seq));
            capture.decode(&mut ctx, &batch, true).unwrap();
            assert_eq!(capture.pending(), 0);
            seen(&mut capture, &layout, &[0, 1], EACH as Pos - 1)
        };
        let (host, device) = (run(), on_device(run));
        let alike = |a: &[f64], b: &[f64]| largest(a.iter().zip(b).map(|(a, b)| (a - b) / (1.0 + a.abs()))) < 1e-5;
        let (first, second) = host.0.split_at(host.0.len() / 2);
        assert!(!alike(first, second), "{kv_unified}: the sequences differ");
        assert!(alike(&host.0, &device.0), "{kv_unified}: statistics");
        assert!(host.1 == device.1, "{kv_unified}: windows");
    }
}

/// Results of a ubatch stay on the device until its last layer. If the decode is cancelled before, they are discarded.
#[test]
fn what_a_cancelled_ubatch_left_on_a_device_is_given_up() {
    const N: usize = 100;
    let model = model();
    if is_on_gpu(&Layout::of(&context(&model, F16_FLASH, 512, 512), 0).unwrap()) {
        return; // a GPU finishes a ubatch despite the cancellation
    }
    let tokens = tokens(&model, N);
    let mut batch = Batch::new(N);
    tokens.iter().enumerate().for_each(|(i, &token)| batch.add(token, i as Pos, 0, i + 1 == N).unwrap());
    let run = |cancels: bool| {
        let mut ctx = context(&model, F16_FLASH, 512, 512);
        let layout = Layout::of(&ctx, 0).unwrap();
        let mut capture = Capture::new(&ctx, &layout, 64, 4);
        capture.follow(0);
        ctx.cancel_at(0);
        capture.decode(&mut ctx, &batch, true).unwrap();
        let asked = ctx.cancel_at(0);
        capture.forget(0);
        capture.follow(0);
        for part in if cancels { 1..4 } else { 0..0 } {
            ctx.clear();
            ctx.cancel_at(part * asked / 4);
            let cancelled = capture.decode(&mut ctx, &batch, true).unwrap_err();
            assert!(matches!(cancelled, CaptureError::Llama(LlamaError::Cancelled)), "{cancelled}");
            // statistics and queries of the layers computed so far
            let left = part * 2 * layout.layers.len() / 4;
            assert!(capture.pending().abs_diff(left) < 5, "{} wait, not {left}", capture.pending());
        }
        ctx.clear();
        ctx.cancel_at(0);
        capture.decode(&mut ctx, &batch, true).unwrap();
        assert_eq!(capture.pending(), 0);
        seen(&mut capture, &layout, &[0], N as Pos - 1)
    };
    let (alone, after) = on_device(|| (run(false), run(true)));
    assert!(alone == after);
}

#[test]
fn a_graph_over_several_back_ends_gives_the_same_queries() {
    let model = model();
    let tokens = tokens(&model, N);
    for setup in [F16, F16_FLASH] {
        let probe = |scattered| {
            PRETEND_SCATTERED.set(scattered);
            let mut ctx = context(&model, setup, 512, 64);
            let mut capture = captured(&mut ctx, &tokens);
            let before = cells(&ctx);
            let queries = capture.probe(&mut ctx, 0, N as Pos - 1, 70, 3).unwrap();
            PRETEND_SCATTERED.set(false);
            assert!(cells(&ctx) == before, "{setup:?}");
            (0..30).map(|il| queries.layer(il).to_vec()).collect::<Vec<_>>()
        };
        assert!(probe(false) == probe(true), "{setup:?}");
    }
}

#[test]
fn keys_get_the_same_scores() {
    let model = model();
    let tokens = tokens(&model, N);
    let needs = Needs {
        future: true,
        observed: true,
        each: true,
        value_norm: true,
        key_similarity: true,
        expected: true,
        fourth_powers: true,
    };
    for setup in [F16, F16_FLASH, Q8_0, Q4_0] {
        let mut ctx = context(&model, setup, 512, 64);
        let mut capture = captured(&mut ctx, &tokens);
        let layout = Layout::of(&ctx, 0).unwrap();
        let probe = capture.probe(&mut ctx, 0, N as Pos - 1, 40, 3).unwrap();
        let run = |needs, n_query| {
            let mut out: Vec<f32> = Vec::new();
            let queries = |il| {
                let observed = capture.window(0, il, N as Pos - 1).unwrap();
                Ok::<_, ComputeError>(LayerQueries::of_window(
                    &observed,
                    probe.layer(il),
                    probe.pos(),
                    capture.logit_scale(il),
                ))
            };
            let mut scorer = Scorer::new(2, n_query);
            let sink = |_, heads: &[HeadScores]| {
                for s in heads {
                    let kinds =
                        [s.future, s.observed, s.each, s.value_norm, s.key_similarity, s.expected, s.fourth_powers];
                    out.extend(kinds.concat());
                }
            };
            scorer.score(&layout, &crate::cache::cells(&ctx, 0), needs, true, queries, sink).unwrap();
            out
        };
        // a device measures keys and values first if no query is requested by itself, and processes fewer layers at once if all the
        // expected queries do not fit
        for (needs, n_query) in [(needs, 1), (Needs { each: false, ..needs }, 1 << 20)] {
            let (host, device) = (run(needs, n_query), on_device(|| run(needs, n_query)));
            assert_eq!(host.len(), device.len(), "{setup:?}");
            let worst = host.iter().zip(&device).map(|(a, b)| (a - b).abs() / (1e-3 + a.abs())).fold(0.0, f32::max);
            assert!(worst < 1e-2, "{setup:?}: {worst}");
        }
    }
}

/// ggml frees memory once every view of it has been read: a view that nothing reads would keep the logits of all queries.
#[test]
fn scores_take_little_memory_beside_the_cache() {
    let model = model();
    let mut ctx = context(&model, F16_FLASH, 1536, 512);
    let mut capture = captured(&mut ctx, &tokens(&model, 1000));
    let layout = Layout::of(&ctx, 0).unwrap();
    let probe = capture.probe(&mut ctx, 0, 999, 32, 3).unwrap();
    let needs = Needs { future: true, observed: true, value_norm: true, key_similarity: true, ..Needs::default() };
    let queries = |il| {
        let observed = capture.window(0, il, 999).unwrap();
        Ok::<_, ComputeError>(LayerQueries::of_window(&observed, probe.layer(il), probe.pos(), capture.logit_scale(il)))
    };
    let mut scorer = Scorer::new(1, 1);
    scorer.score(&layout, &cells(&ctx), needs, true, queries, |_, _: &[HeadScores]| ()).unwrap();
    let share = scorer.release() as f64 / (1000 * layout.bytes_per_cell()) as f64;
    assert!((0.005..0.05).contains(&share), "{share}");
}

#[test]
fn an_order_and_its_inverse_leave_every_byte() {
    let model = model();
    let tokens = tokens(&model, N);
    let heads = |head: usize| (0..N as u32).map(|c| (c * 7 + head as u32) % N as u32).collect::<Vec<u32>>();
    let inverse = |head: usize| {
        let mut out = vec![0; N];
        (0..).zip(heads(head)).for_each(|(place, from)| out[from as usize] = place);
        out
    };
    for setup in [F16, F16_FLASH, Q8_0, Q4_0] {
        let mut ctx = context(&model, setup, 512, 64);
        decode(&mut ctx, &tokens, 0, 0);
        let before = save_state(&ctx, 0);
        let run = |ctx: &mut Context| {
            let mut rows = Reorder::of(ctx, 0).unwrap();
            rows.permute(ctx, &heads);
            let between = save_state(ctx, 0);
            rows.permute(ctx, &inverse);
            between
        };
        let host = run(&mut ctx);
        let device = on_device(|| run(&mut ctx));
        assert!(host != before && host == device, "{setup:?}: the order");
        assert!(save_state(&ctx, 0) == before, "{setup:?}: and back");
    }
}

#[test]
fn compaction_moves_the_same_rows() {
    let model = model();
    let tokens = tokens(&model, N + 1);
    for setup in [F16, F16_FLASH, Q8_0, Q4_0] {
        let run = || {
            let mut ctx = context(&model, setup, 512, 64);
            decode(&mut ctx, &tokens[..N], 0, 0);
            let layout = Layout::of(&ctx, 0).unwrap();
            compact(&mut ctx, 0, &random_heads(&layout, N, 120, 5)).unwrap();
            next_logits(&mut ctx, tokens[N], N as Pos)
        };
        let expected = run();
        assert!(expected == on_device(run), "{setup:?}");
        let kept = Pool::keep().unwrap();
        assert!(expected == on_device(run), "{setup:?}");
        drop(kept);
        // a compaction that has begun is completed even without other threads
        let alone = threads::alone(|| [run(), on_device(run)]);
        assert!(alone.iter().all(|logits| *logits == expected), "{setup:?}");
    }
}
