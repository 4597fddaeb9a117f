//! Random requests and shared code of the tests, by module:
//! - `baselines`: the fixed-budget policies against float64;
//! - `adakv`: the policy whose heads share a budget, and unequal budgets in general;
//! - `properties`: properties of any request, and agreement with the float64 `reference`;
//! - `examples`: small requests whose result can be worked out by hand;
//! - `opinions`: the explanation of a selection;
//! - `protected`: protected entries stay, and cost no more than their own cells;
//! - `ranking`: the order of entries that a trial works on, and the range of its cuts;
//! - `replay`: the entries kept after a second reading of the context;
//! - `settings`: valid settings, and the errors for invalid ones.

mod adakv;
mod baselines;
mod examples;
mod opinions;
mod properties;
mod protected;
mod ranking;
mod reference;
mod replay;
mod settings;

use super::*;

/// The scores of one KV head, owned.
#[derive(Debug, Clone, Default)]
struct Head {
    future: Vec<f32>,
    observed: Vec<f32>,
    each: Vec<f32>,
    expected: Vec<f32>,
    value_norm: Vec<f32>,
    key_similarity: Vec<f32>,
    /// For a replay only.
    fourth_powers: Vec<f32>,
    replayed: Vec<f32>,
}

#[derive(Debug, Clone)]
struct Request {
    heads: Vec<Head>,
}

/// splitmix64: sufficient to fill a request from one seed.
fn random(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Returns a softmax row that resembles attention: mostly flat, with a few peaks.
fn softmax(n: usize, state: &mut u64) -> Vec<f32> {
    let raw: Vec<f64> = (0..n).map(|_| (8.0 * random(state).powi(3)).exp()).collect();
    let sum: f64 = raw.iter().sum();
    raw.iter().map(|x| (x / sum) as f32).collect()
}

impl Request {
    fn random(shape: &Shape, samples: usize, seed: u64) -> Self {
        let state = &mut seed.clone();
        let queries = shape.group * (samples + 1);
        let heads = (0..shape.heads()).map(|_| Head {
            future: softmax(shape.n, state),
            observed: softmax(shape.n, state),
            each: (0..queries).flat_map(|_| softmax(shape.n, state)).collect(),
            expected: softmax(shape.n, state),
            value_norm: (0..shape.n).map(|_| random(state) as f32).collect(),
            key_similarity: (0..shape.n).map(|_| (2.0 * random(state) - 1.0) as f32).collect(),
            ..Head::default()
        });
        Self { heads: heads.collect() }
    }
}

fn select(params: &Params, shape: Shape, request: &Request) -> Selection {
    select_protecting(params, shape, request, &Protected::default())
}

fn select_protecting(params: &Params, shape: Shape, request: &Request, protected: &Protected) -> Selection {
    let mut policy = build_protecting(params, shape, protected).unwrap();
    let needs = policy.needs();
    assert_eq!(policy.name(), params.policy.name());
    for (index, head) in request.heads.iter().enumerate() {
        let asked = |needed, x| if needed { x } else { &[][..] };
        let scores = HeadScores {
            future: asked(needs.future, &head.future),
            observed: asked(needs.observed, &head.observed),
            each: asked(needs.each, &head.each),
            expected: asked(needs.expected, &head.expected),
            value_norm: asked(needs.value_norm, &head.value_norm),
            key_similarity: asked(needs.key_similarity, &head.key_similarity),
            fourth_powers: asked(params.replay, &head.fourth_powers),
            replayed: asked(params.replay, &head.replayed),
        };
        policy.observe(index, &scores);
    }
    policy.select()
}

/// Returns the entries that one head keeps.
fn kept(selection: &Selection, head: usize) -> Vec<usize> {
    let all = || (0..selection.n).collect();
    selection.kept_by(head).map_or_else(all, |kept| kept.iter().map(|&j| j as usize).collect())
}

fn shape(n: usize) -> Shape {
    Shape { n, n_layer: 1, n_head_kv: 1, group: 1 }
}
