//! Models of other shapes: fused QKV, biases, q-norm, one KV head, both kinds of RoPE and none, softcap.

#![forbid(unsafe_code)]

use std::ops::ControlFlow;

use rand::{RngExt, SeedableRng};

use super::fixture::{BF16, F16, F16_FLASH, F32_FLASH, Q8_0, Setup, captured, context, is_on_gpu, is_within, largest};
use super::tiny::{N_VOCAB, SPECS, Tiny};
use crate::cache::Layout;
use crate::llama::{FlashAttention, Model, ModelParams, Pos, Token};
use crate::policy::{Kind, Params};
use crate::{Session, SessionParams};

fn tokens(n: usize) -> Vec<Token> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(4);
    (0..n).map(|_| rng.random_range(0..N_VOCAB as Token)).collect()
}

/// Applies the Walsh-Hadamard rotation of a quantized cache, in place, to blocks of the largest power of two that fits into a head.
fn rotate(q: &mut [f64]) {
    let n = q.len();
    let old = q.to_vec();
    for (i, x) in q.iter_mut().enumerate() {
        let signed = |j: usize| if (i & j).count_ones().is_multiple_of(2) { old[j] } else { -old[j] };
        *x = (0..n).map(signed).sum::<f64>() / (n as f64).sqrt();
    }
}

fn check_probe(tiny: &Tiny, setup: Setup, rotated: bool) -> bool {
    const N: usize = 100;
    let mut ctx = context(&tiny.model, setup, 512, 64);
    let layout = Layout::of(&ctx, 0).unwrap();
    // CUDA has no flash attention for head size 32
    if is_on_gpu(&layout) && setup.flash && tiny.spec.head == 32 {
        return true;
    }
    let mut capture = captured(&mut ctx, &tokens(N));
    // more samples than fit into one ubatch
    let probe = capture.probe(&mut ctx, 0, N as Pos - 1, 70, 3).unwrap();
    let mut errors = Vec::new();
    for (i, layer) in layout.layers.iter().enumerate() {
        for sample in [0, 1, 69] {
            let hidden = capture.sample(0, i, sample, 3);
            for head in 0..tiny.spec.n_head {
                let mut expected = tiny.query(layer.il as usize, head, &hidden, (N + sample) as Pos);
                if rotated {
                    rotate(&mut expected);
                }
                let got = &probe.layer(i)[(sample * tiny.spec.n_head + head) * tiny.spec.head..][..tiny.spec.head];
                let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
                let error = got.iter().zip(&expected).map(|(g, e)| (g.to_f64() - e).powi(2)).sum::<f64>().sqrt();
                errors.push(error / norm);
            }
        }
    }
    // a GPU rounds the factors of f32 products to 10 bits (TF32)
    let tolerance = if is_on_gpu(&layout) { 5e-3 } else { 2e-3 };
    is_within(format_args!("queries of {}, {setup}", tiny.spec.arch), largest(errors), tolerance)
}

#[test]
fn the_probes_queries_are_w_q_times_the_hidden_state() {
    let dir = tempfile::tempdir().unwrap();
    let mut all_hold = true;
    for spec in SPECS {
        let tiny = Tiny::new(dir.path(), spec);
        for setup in [F16, F16_FLASH, BF16, F32_FLASH] {
            all_hold &= check_probe(&tiny, setup, false);
        }
        if spec.head == 64 {
            all_hold &= check_probe(&tiny, Q8_0, true);
        }
    }
    assert!(all_hold, "a query is not W_q times the hidden state: see what was measured");
}

#[test]
fn the_probes_queries_know_adapters() {
    const SCALE: f32 = 0.5;
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(dir.path(), SPECS[0]);
    let adapter = tiny.adapter(dir.path());
    tiny.merge(&adapter, SCALE);
    let params = ModelParams { adapters: vec![(adapter.path, SCALE)], ..ModelParams::default() };
    tiny.model = Model::load(&tiny.path, &params, |_| true).unwrap();
    assert!(check_probe(&tiny, F16, false) & check_probe(&tiny, F16_FLASH, false));
}

#[test]
fn every_shape_is_compressed_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    for spec in SPECS {
        let tiny = Tiny::new(dir.path(), spec);
        for flash_attn in [FlashAttention::Off, FlashAttention::On] {
            let mut params = SessionParams::default();
            params.context.n_ctx = 768;
            params.context.n_ubatch = 100;
            params.context.flash_attn = flash_attn;
            params.policy.max_cells = Some(200);
            let mut session = Session::new(&tiny.model, &params).unwrap();
            session.prefill(&tokens(400), |_, _| ControlFlow::Continue(())).unwrap();
            let report = session.compress().unwrap();
            assert!(report.cells_after <= 200, "{spec:?}: {report:?}");
            session.decode(1).unwrap();
            assert_eq!(session.cells_used(), report.cells_after + 1);
            assert!(session.logits().iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn every_shape_is_masked_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    for spec in SPECS {
        let tiny = Tiny::new(dir.path(), spec);
        let mut params = SessionParams::default();
        params.context.n_ctx = 768;
        params.context.n_ubatch = 100;
        params.context.flash_attn = FlashAttention::Off;
        params.policy = Params { exact: true, ..Params::new(Kind::AdaKv) };
        let mut session = Session::new(&tiny.model, &params).unwrap();
        session.prefill(&tokens(400), |_, _| ControlFlow::Continue(())).unwrap();
        let compressed = session.compress();
        if spec.softcap {
            let error = compressed.unwrap_err().to_string();
            assert!(error.contains("softcap"), "{spec:?}: {error}");
            continue;
        }
        assert_eq!(compressed.unwrap().cells_after, 200, "{spec:?}");
        session.prefill(&tokens(150), |_, _| ControlFlow::Continue(())).unwrap();
        assert!(session.logits().iter().all(|x| x.is_finite()), "{spec:?}");
    }
}
