//! Checks that input from callers, C and llama.cpp is validated before llama.cpp or an index uses it.

#![forbid(unsafe_code)]

use super::fixture::{F16, context, decode, words_of};
use crate::cache::{self, Layout};
use crate::capture::{Capture, CaptureError};
use crate::llama::{
    Batch, Context, ContextParams, LlamaError, Model, ModelParams, Sampler, SamplerParams, SeqId, Token,
};
use crate::tests::tiny::{self, MARKUP, N_VOCAB, Tiny};

/// Token ids outside the vocabulary of a tiny model.
const NO_TOKENS: [Token; 6] = [N_VOCAB as Token, 2_000_000_000, Token::MAX, -1, -2, Token::MIN];
/// Sequence ids that a context for three sequences does not have.
const NO_SEQUENCES: [SeqId; 4] = [3, SeqId::MAX, -1, SeqId::MIN];

fn with_vocabulary() -> Model {
    let folder = tempfile::tempdir().unwrap();
    Tiny::new(folder.path(), tiny::Spec { vocabulary: true, ..tiny::SPECS[0] }).model
}

#[test]
fn an_id_that_is_no_token_has_no_text_and_means_nothing() {
    let model = with_vocabulary();
    for token in NO_TOKENS {
        assert!(!model.has_token(token) && !model.is_control(token) && !model.is_eog(token), "{token}");
        assert!(model.piece(token, true).is_empty() && model.detokenize(&[token], true).is_empty(), "{token}");
    }
    let last = N_VOCAB as Token - 1;
    assert_eq!((model.piece(0, false), model.piece(last, true)), (b"a".to_vec(), MARKUP[2].into()));
    assert!(model.is_control(last) && model.is_eog(last) && !model.is_control(0));
    assert_eq!(model.tokenize("ab <|im_end|>", false, true).unwrap(), [0, 1, 52, N_VOCAB as Token - 2]);
    // a model without token texts
    let model = tiny::model("llama");
    assert!(model.has_token(last) && !model.is_control(last) && model.piece(last, true).is_empty());
    assert!(matches!(model.tokenize("ab", true, true), Err(LlamaError::Tokenize)));
}

#[test]
fn a_batch_with_what_is_no_token_or_no_sequence_is_refused_and_the_next_one_is_not() {
    let mut ctx = context(&with_vocabulary(), F16, 256, 64);
    for (token, seq) in NO_TOKENS.map(|token| (token, 0)).into_iter().chain(NO_SEQUENCES.map(|seq| (1, seq))) {
        let mut batch = Batch::new(2);
        batch.add(1, 0, 0, false).unwrap();
        batch.add(token, 1, seq, true).unwrap();
        let error = ctx.decode(&batch).unwrap_err();
        assert!(matches!(error, LlamaError::Decode(_)), "token {token}, sequence {seq}: {error}");
        assert_eq!(ctx.pos_max(0), None);
    }
    decode(&mut ctx, &[1, 2, 3], 0, 0);
    assert_eq!(ctx.pos_max(0), Some(2));
}

/// A capacity of 2^32 + 1 once allocated memory for one token.
#[test]
fn a_batch_of_any_capacity_holds_what_is_added() {
    for capacity in [3, (1 << 32) + 1, usize::MAX] {
        let mut batch = Batch::new(capacity);
        for i in 0..3 {
            batch.add(i, i / 2, i % 2, i == 2).unwrap();
        }
        assert_eq!(batch.len(), 3, "{capacity}");
        assert!(matches!(batch.add(1, -1, 0, false), Err(LlamaError::BatchFull(3) | LlamaError::NoPositions { .. })));
        let mut ctx = context(&tiny::model("llama"), F16, 256, 64);
        ctx.decode(&batch).unwrap();
        assert_eq!([0, 1].map(|seq| ctx.pos_max(seq)), [Some(1), Some(0)], "{capacity}");
        assert_eq!(ctx.logits().unwrap().len(), N_VOCAB);
    }
    assert!(matches!(Batch::new(0).add(1, 0, 0, true), Err(LlamaError::BatchFull(0))));
}

#[test]
fn a_sampler_needs_numbers_to_choose_from() {
    let model = with_vocabulary();
    let greedy = SamplerParams { temp: 0.0, ..SamplerParams::default() };
    let penalised = SamplerParams { repeat_penalty: 1.2, ..SamplerParams::default() };
    for params in [SamplerParams::default(), greedy, penalised] {
        let mut sampler = Sampler::new(&model, &params, 64).unwrap();
        assert!(matches!(sampler.sample(&[]), Err(LlamaError::NoLogits)));
        let mut logits = vec![f32::NEG_INFINITY; N_VOCAB];
        for broken in [f32::NEG_INFINITY, f32::NAN, f32::INFINITY] {
            logits[7] = broken;
            assert!(matches!(sampler.sample(&logits), Err(LlamaError::NotANumber)), "{broken}");
        }
        sampler.accept(&NO_TOKENS).unwrap();
        logits[7] = 1.0;
        assert_eq!(sampler.sample(&logits).unwrap(), 7, "what is impossible alone is no fault");
        assert_eq!(sampler.sample(&[0.5]).unwrap(), 0);
    }
}

#[test]
fn a_sampler_outlives_the_model_whose_texts_it_reads() {
    let grammar = Some(c"root ::= [a-c] [a-c] [a-c] [a-c]".to_owned());
    let params = SamplerParams { grammar, temp: 0.0, ..SamplerParams::default() };
    let mut sampler = Sampler::new(&with_vocabulary(), &params, 64).unwrap();
    let logits: Vec<f32> = (0..N_VOCAB).map(|token| token as f32).collect();
    assert_eq!([(); 3].map(|()| sampler.sample(&logits).unwrap()), [2; 3], "the likeliest letter of the grammar");
}

#[test]
fn a_sequence_that_a_context_has_not_holds_nothing_and_cannot_be_changed() {
    let mut ctx = context(&tiny::model("llama"), F16, 256, 64);
    decode(&mut ctx, &words_of(40), 0, 0);
    let state = ctx.copy_sequence(0).unwrap();
    for seq in NO_SEQUENCES {
        assert!(cache::cells(&ctx, seq).is_empty() && Layout::of(&ctx, seq).is_err(), "{seq}");
        assert_eq!((cache::cells_free(&ctx, seq), cache::cut_from(&ctx, seq), ctx.pos_max(seq)), (0, 0, None), "{seq}");
        assert!(!ctx.remove(seq, 0, -1), "{seq}");
        let refused = [ctx.copy(0, seq).err(), ctx.copy(seq, 0).err(), ctx.copy_sequence(seq).err()];
        let refused = refused.into_iter().chain([ctx.adopt_sequence(seq, &state).err()]);
        for error in refused {
            assert!(matches!(error, Some(LlamaError::NoSequence { .. })), "{seq}: {error:?}");
        }
    }
    assert_eq!(cache::cells(&ctx, 0).len(), 40);
}

#[test]
fn a_context_without_an_attention_cache_has_no_cells() {
    let folder = tempfile::tempdir().unwrap();
    for arch in tiny::RECURRENT {
        let path = tiny::recurrent(folder.path(), arch);
        let model = Model::load(&path, &ModelParams::default(), |_| true).unwrap();
        let mut ctx = Context::new(&model, &ContextParams { n_ctx: 64, ..ContextParams::default() }).unwrap();
        decode(&mut ctx, &[1, 2, 3], 0, 0);
        assert!(cache::cells(&ctx, 0).is_empty() && Layout::of(&ctx, 0).is_err(), "{arch}");
        assert_eq!((cache::cells_free(&ctx, 0), ctx.pos_max(0)), (0, Some(2)), "{arch}");
        assert!(cache::Parked::new(&mut ctx, 0, 4).is_err(), "{arch}");
    }
}

#[test]
fn what_is_known_of_a_cache_outlives_the_context() {
    let ctx = context(&tiny::model("llama"), F16, 256, 64);
    let layout = Layout::of(&ctx, 0).unwrap();
    // K and V of two heads of 64 f16 values in each layer
    let expected = tiny::N_LAYER * 2 * 2 * 64 * 2;
    assert_eq!(layout.bytes_per_cell(), expected);
    drop(ctx);
    // overwrite the freed memory
    let _other = vec![vec![0xa5_u8; 4096]; 512];
    assert_eq!((layout.bytes_per_cell(), layout.n_cells(), layout.is_host()), (expected, 256, true));
}

#[test]
fn a_capture_refuses_another_context() {
    let model = tiny::model("llama");
    let mut ctx = context(&model, F16, 256, 64);
    let mut other = context(&model, F16, 256, 64);
    let mut capture = Capture::new(&ctx, &Layout::of(&ctx, 0).unwrap(), 8, 0);
    capture.follow(0);
    let mut batch = Batch::new(40);
    for (pos, token) in (0..).zip(words_of(40)) {
        batch.add(token, pos, 0, false).unwrap();
    }
    let is_refused = |result: Result<(), CaptureError>| matches!(result, Err(CaptureError::OtherContext));
    for wants_queries in [false, true] {
        assert!(is_refused(capture.decode(&mut other, &batch, wants_queries)));
    }
    assert!(is_refused(capture.decode_again(&mut other, &batch)));
    assert!(is_refused(capture.replay(&mut other, 0, &batch).map(|_| ())));
    assert_eq!(other.pos_max(0), None);
    capture.decode(&mut ctx, &batch, true).unwrap();
    decode(&mut other, &words_of(40), 0, 0);
    assert!(is_refused(capture.probe(&mut other, 0, 39, 4, 0).map(|_| ())));
    assert_eq!(other.pos_max(0), Some(39));
    assert_eq!(capture.probe(&mut ctx, 0, 39, 4, 0).unwrap().pos(), [40, 41, 42, 43]);
}
