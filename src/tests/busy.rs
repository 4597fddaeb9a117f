//! What may change on a busy machine, and what must not.

use super::fixture::{BF16, F16, F16_FLASH, Q4_0, Q8_0, Setup, context, decode, model, tokens};
use crate::llama::{Context, Pos};
use crate::sys;

/// Whether the number of threads may change the logits of the next token.
fn in_parts(ctx: &Context) -> bool {
    // SAFETY: valid context.
    unsafe { sys::gvote_shim_token_in_parts(ctx.as_ptr()) }
}

/// Returns for each number of threads the bits of the logits of the tokens that are decoded one by one after `n_prompt` tokens: at most 12,
/// and only as long as `while_` holds.
fn bits<const N: usize>(
    setup: Setup,
    n_prompt: usize,
    n_threads: [i32; N],
    while_: impl Fn(&Context) -> bool,
) -> [Vec<u32>; N] {
    let model = model();
    let text = tokens(&model, n_prompt + 12);
    let mut ctx = context(&model, setup, 1024, 512);
    decode(&mut ctx, &text[..n_prompt], 0, 0);
    n_threads.map(|n_threads| {
        assert!(ctx.remove(0, n_prompt as Pos, -1));
        // SAFETY: valid context.
        unsafe { sys::llama_set_n_threads(ctx.as_ptr(), n_threads, 2) };
        let mut bits = Vec::new();
        for (i, &token) in text.iter().enumerate().skip(n_prompt) {
            if !while_(&ctx) {
                break;
            }
            decode(&mut ctx, &[token], i as Pos, 0);
            bits.extend(ctx.logits().unwrap().iter().map(|logit| logit.to_bits()));
        }
        assert!(!bits.is_empty());
        bits
    })
}

#[test]
fn fewer_threads_decode_a_token_to_the_same_bits() {
    // the last run ends when there are so many cells that attention is split among the threads
    for (setup, n_prompt) in [(F16, 600), (BF16, 600), (Q8_0, 600), (Q4_0, 600), (F16_FLASH, 232)] {
        let [two, one, three] = bits(setup, n_prompt, [2, 1, 3], |ctx| !in_parts(ctx));
        assert!(one == two && three == two, "{setup}");
    }
}

#[test]
fn threads_stay_where_their_number_shows() {
    let [one, two] = bits(F16_FLASH, 600, [1, 2], in_parts);
    assert!(one != two);
}
