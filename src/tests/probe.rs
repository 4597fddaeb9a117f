//! The probe's queries, and the statistics they are drawn from.

#![forbid(unsafe_code)]

use super::fixture::*;
use crate::cache::Layout;
use crate::capture::{Capture, CaptureError};
use crate::llama::Pos;

const N: usize = 150;
const WINDOW: usize = 64;

#[test]
fn leaves_the_cache_and_the_next_logits_as_they_were() {
    let model = model();
    let tokens = tokens(&model, N + 1);
    for setup in [F16, F16_FLASH, Q8_0] {
        let run = |probes: bool| {
            let mut ctx = context(&model, setup, 512, 64);
            let mut capture = captured(&mut ctx, &tokens[..N]);
            let before = cells(&ctx);
            if probes {
                capture.probe(&mut ctx, 0, N as Pos - 1, 100, 1).unwrap();
            }
            assert_eq!(before, cells(&ctx));
            next_logits(&mut ctx, tokens[N], N as Pos)
        };
        assert!(run(false) == run(true), "{setup:?}");
    }
}

#[test]
fn captures_the_same_however_the_prompt_is_split() {
    let model = model();
    let tokens = tokens(&model, N);
    let capture = |n_ubatch| {
        let mut ctx = context(&model, F16, 512, n_ubatch);
        let mut capture = captured(&mut ctx, &tokens);
        let probe = capture.probe(&mut ctx, 0, N as Pos - 1, 40, 9).unwrap();
        let window = capture.window(0, 5, N as Pos - 1).unwrap().joined();
        assert_eq!(window.pos, (N as Pos - WINDOW as Pos..N as Pos).collect::<Vec<_>>());
        (capture.statistics(0, 5), window, probe, is_on_gpu(&Layout::of(&ctx, 0).unwrap()))
    };
    let (a, b) = (capture(512), capture(13));
    // Another split changes the order of sums in llama.cpp's kernels: the results are equal up to rounding. A GPU multiplies a few tokens
    // and many tokens with different kernels, some of which round the hidden state to eight bits: after five layers this amounts to a few
    // per cent. Queries of other tokens or samples would differ by as much as their length.
    let (moments, queries) = if a.3 { (1e-1, 1e-1) } else { (2e-2, 1e-2) };
    let far = |a: &[f64], b: &[f64]| largest(a.iter().zip(b).map(|(a, b)| (a - b) / (1.0 + a.abs())));
    let mut all_hold = is_within("means of another split", far(&a.0.0, &b.0.0), moments);
    all_hold &= is_within("variances of another split", far(&a.0.1, &b.0.1), moments);
    for (name, x, y) in [("window", &a.1.data[..], &b.1.data[..]), ("synthetic queries", a.2.layer(5), b.2.layer(5))] {
        assert_eq!(x.len(), y.len());
        let (mut error, mut norm) = (0.0, 0.0);
        for (x, y) in x.iter().zip(y) {
            error += (x.to_f64() - y.to_f64()).powi(2);
            norm += x.to_f64().powi(2);
        }
        all_hold &= is_within(format_args!("{name} of another split"), (error / norm).sqrt(), queries);
    }
    assert!(all_hold, "another split is another capture: see what was measured");
}

#[test]
fn the_same_seed_gives_the_same_queries_and_another_seed_others() {
    let model = model();
    let mut ctx = context(&model, F16, 512, 512);
    let mut capture = captured(&mut ctx, &tokens(&model, N));
    let mut probe = |seed| capture.probe(&mut ctx, 0, N as Pos - 1, 8, seed).unwrap().layer(7).to_vec();
    let (a, b, c) = (probe(1), probe(1), probe(2));
    assert!(a == b);
    assert!(a != c);
}

#[test]
fn needs_what_it_says() {
    let model = model();
    let tokens = tokens(&model, N);

    let mut ctx = context(&model, F16, 256, 256);
    let mut capture = captured(&mut ctx, &tokens);
    let error = capture.probe(&mut ctx, 0, N as Pos - 1, 200, 0).unwrap_err();
    assert!(matches!(error, CaptureError::NoCells { needed: 200, free: 106 }), "{error}");
    assert!(error.to_string().contains("`samples`"), "{error}");

    let layout = Layout::of(&ctx, 0).unwrap();
    let mut empty = Capture::new(&ctx, &layout, WINDOW, 4);
    let error = empty.probe(&mut ctx, 0, N as Pos - 1, 8, 0).unwrap_err();
    assert!(matches!(error, CaptureError::Empty), "{error}");
}
