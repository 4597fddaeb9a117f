//! The replay equals a naive float64 reference over the decoder's own queries and keys.

use std::ops::Range;

use half::f16;

use super::*;
use crate::tests::fixture::{F16, F16_FLASH, Q8_0, dot, is_on_gpu, is_within, largest, record, rounded, row, softmax};
use crate::vote::replay::Replayed;

/// More than one chunk at this ubatch size; the last chunk is a short one.
const N: usize = 170;
const UBATCH: usize = 64;
/// Tokens that are repeated before a chunk.
const LEAD: usize = 8;

const HEADS: [(usize, usize); 5] = [(0, 0), (0, 2), (13, 1), (29, 0), (29, 2)];

/// Results for one KV head, `[n]` each.
struct Naive {
    mean: Vec<f64>,
    fourth_powers: Vec<f64>,
}

/// Reads `range` again behind `announcement`, chunk by chunk, and adds up the attention of the repeated tokens.
fn naive(session: &mut Session, range: Range<usize>, announcement: &[Token]) -> Vec<Naive> {
    let layout = session.voter.as_ref().unwrap().layout.clone();
    let l = &layout.layers[0];
    let (d, n_head, group) = (l.n_embd_head_k as usize, l.n_head as usize, (l.n_head / l.n_head_kv) as usize);
    let scale = 1.0 / (d as f64).sqrt();
    let mut out: Vec<_> = HEADS.iter().map(|_| Naive { mean: vec![0.0; N], fourth_powers: vec![0.0; N] }).collect();

    for start in range.clone().step_by(UBATCH - LEAD - announcement.len()) {
        let end = range.end.min(start + UBATCH - LEAD - announcement.len());
        let lead = LEAD.min(start - range.start);
        let tokens = [announcement, &session.sequence.tokens[start - lead..end]].concat();
        let ctx = &mut session.ctx;
        let attention = record(ctx, &layout, |ctx| fixture::decode(ctx, &tokens, N as Pos, SEQ));
        let visible = cache::cells(ctx, SEQ);
        for (&(layer, kv), out) in HEADS.iter().zip(&mut out) {
            let keys: Vec<_> = visible.iter().map(|cell| row(&layout, layer, false, kv, cell)).collect();
            for i in announcement.len()..tokens.len() {
                for head in kv * group..(kv + 1) * group {
                    let q = &attention[layer].q[(i * n_head + head) * d..][..d];
                    // queries are captured as f16
                    let q: Vec<f32> = q.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
                    let q = rounded(&layout, layer, &q);
                    // the text, the announcement, and the repeated tokens up to this one
                    let logits: Vec<f64> = keys[..=N + i].iter().map(|k| scale * dot(&q, k)).collect();
                    let queries = (lead + end - start) * group;
                    let weight = (end - start) as f64 / range.len() as f64 / queries as f64;
                    for (j, p) in softmax(&logits)[..N].iter().enumerate() {
                        out.mean[j] += weight * p;
                        out.fourth_powers[j] += p.powi(4);
                    }
                }
            }
        }
        ctx.remove(SEQ, N as Pos, -1);
    }
    out
}

/// Compares each entry relative to its own size, because most are thousands of times smaller than the largest.
fn are_equal(got: &Replayed, expected: &[Naive], tolerance: f64, name: &str) -> bool {
    let apart = |got: &[f32], expected: &[f64]| {
        assert_eq!(got.len(), N);
        let smallest = 1e-9 * largest(expected.iter().copied());
        largest(got.iter().zip(expected).map(|(g, e)| (f64::from(*g) - e) / (e + smallest)))
    };
    let heads = || HEADS.iter().map(|(layer, kv)| layer * 3 + kv).zip(expected);
    let means = heads().map(|(head, expected)| apart(got.mean_of(head), &expected.mean));
    let powers = heads().map(|(head, expected)| apart(got.fourth_powers_of(head), &expected.fourth_powers));
    let means_hold = is_within(format_args!("means of a replay, {name}"), largest(means), tolerance);
    is_within(format_args!("fourth powers of a replay, {name}"), largest(powers), 4.0 * tolerance) && means_hold
}

/// On a GPU, the sums over the queries use numbers with 10 bits: see the tests of the scorer. A value of q between two
/// steps of q8_1 may also be rounded the other way there, which shows in an entry that few queries attend to.
fn tolerance(session: &Session, setup: Setup) -> f64 {
    match (is_on_gpu(&session.voter.as_ref().unwrap().layout), setup.k.is_quantized()) {
        (false, false) => 2e-3,
        (false, true) => 5e-3,
        (true, false) => 5e-3,
        (true, true) => 5e-2,
    }
}

#[test]
fn a_replay_equals_float64() {
    let mut all_hold = true;
    for setup in [F16, F16_FLASH, Q8_0] {
        let mut session = after(N, setup, 256, UBATCH as u32, Params { replay: true, ..Params::default() });
        let cells = cache::cells(&session.ctx, SEQ);
        let before = session.save();
        let replayed = session.vote().unwrap().replay(&cells).unwrap();
        assert!(session.save() == before, "{setup:?}: a replay leaves no trace");

        let announcement = session.model().tokenize("\n\nThe same text once more:\n\n", false, false).unwrap();
        let expected = naive(&mut session, 0..N, &announcement);
        all_hold &= are_equal(&replayed, &expected, tolerance(&session, setup), &setup.to_string());
    }
    assert!(all_hold, "a replay is not that of float64: see what was measured");
}

#[test]
fn reading_a_part_again_equals_float64() {
    let mut session = after(N, F16, 256, UBATCH as u32, Params::default());
    let cells = cache::cells(&session.ctx, SEQ);
    let again = session.vote().unwrap().read_again(&cells, 40..104).unwrap();
    let expected = naive(&mut session, 40..104, &[]);
    assert!(are_equal(&again, &expected, tolerance(&session, F16), "40..104"), "see what was measured");
}

#[test]
fn a_replay_works_with_ubatches_of_any_size() {
    for n_ubatch in [1, 8, 17] {
        let policy = Params { replay: true, ratio: Some(0.5), ..Params::default() };
        let mut session = after(140, F16, 256, n_ubatch, policy);
        let report = session.compress().unwrap();
        assert_eq!(report.cells_after, 70, "-ub {n_ubatch}");
    }
}
