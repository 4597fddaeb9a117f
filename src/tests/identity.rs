//! Keeping all cells changes no bit of the next logits.

#![forbid(unsafe_code)]

use super::fixture::*;
use crate::cache::Layout;
use crate::policy::{Kept, Selection};

const N: usize = 300;

fn check(setup: Setup, n_ubatch: u32) {
    let model = model();
    let tokens = tokens(&model, N + 2);
    let run = |compacts: bool| {
        let mut ctx = context(&model, setup, 1024, n_ubatch);
        decode(&mut ctx, &tokens[..N], 0, 0);
        if compacts {
            let layout = Layout::of(&ctx, 0).unwrap();
            let all: Vec<u32> = (0..N as u32).collect();
            compact(&mut ctx, 0, &composite(N, N, all.repeat(n_heads(&layout)))).unwrap();
            let tokens = Selection { kept: Kept::Tokens(all), ..composite(N, N, Vec::new()) };
            compact(&mut ctx, 0, &tokens).unwrap();
        }
        let first = next_logits(&mut ctx, tokens[N], N as i32);
        let second = next_logits(&mut ctx, tokens[N + 1], N as i32 + 1);
        (first, second)
    };
    assert!(run(false) == run(true), "{setup:?}, n_ubatch {n_ubatch}: logits differ");
}

#[test]
fn f16() {
    check(F16, 512);
    check(F16, 64);
}

#[test]
fn f16_with_flash_attention() {
    check(F16_FLASH, 512);
    check(F16_FLASH, 100);
}

#[test]
fn quantized_caches() {
    check(Q8_0, 512);
    check(Q8_0, 64);
    check(Q4_0, 512);
    check(Q4_0, 64);
}
