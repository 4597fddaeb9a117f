//! The baselines against simple float64 versions of their papers' formulas.

use proptest::prelude::*;

use super::*;

const KINDS: [Kind; 4] = [Kind::StreamingLlm, Kind::SnapKv, Kind::ExpectedAttention, Kind::KeyDiff];

prop_compose! {
    fn case()(
        n in 90_usize..200,
        (n_layer, n_head_kv, group) in (1_usize..3, 1_usize..4, 1_usize..3),
        (kind, cells, seed) in (0..KINDS.len(), any::<bool>(), any::<u64>()),
        (window, side, ratio) in (1_usize..9, 0_usize..4, 0.1_f32..1.0),
        (back, forward) in (0_usize..3, 0_usize..9),
    ) -> (Params, Shape, Request) {
        let params = Params {
            window, recent: window, sinks: 2, pool: 2 * side + 1,
            ratio: Some(ratio),
            span: Span { back, forward },
            evict: if cells { Evict::Cells } else { Evict::Composite },
            ..Params::new(KINDS[kind])
        };
        let shape = Shape { n, n_layer, n_head_kv, group };
        (params, shape, Request::random(&shape, 1, seed))
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// The paper's score of each entry of one head.
pub(super) fn own_score(params: &Params, n: usize, head: &Head) -> Vec<f64> {
    match params.policy {
        Kind::SnapKv | Kind::AdaKv => {
            let older = n - params.window;
            let side = params.pool / 2;
            let seen = |j: usize| (j < older).then(|| f64::from(head.observed[j]));
            let pooled = |j: usize| {
                let around = (j + side + 1).saturating_sub(params.pool)..=j + side;
                around.filter_map(seen).sum::<f64>() / params.pool as f64
            };
            (0..n).map(|j| if j < older { pooled(j) } else { 0.0 }).collect()
        }
        Kind::ExpectedAttention => {
            wide(&head.expected).iter().zip(wide(&head.value_norm)).map(|(e, v)| (e + 0.02) * v).collect()
        }
        Kind::KeyDiff => wide(&head.key_similarity).iter().map(|c| 1.0 - c).collect(),
        _ => vec![0.0; n],
    }
}

/// Applies spans.
pub(super) fn lifted(params: &Params, n: usize, own: &[f64]) -> Vec<f64> {
    let lifted = |j: usize| {
        let hits = j.saturating_sub(params.span.forward)..=(j + params.span.back).min(n - 1);
        own[hits].iter().copied().fold(0.0, f64::max)
    };
    (0..n).map(lifted).collect()
}

fn score(params: &Params, n: usize, head: &Head) -> Vec<f64> {
    let own = own_score(params, n, head);
    let sum: f64 = own.iter().sum();
    lifted(params, n, &own.iter().map(|x| x / sum).collect::<Vec<_>>())
}

proptest! {
    #[test]
    fn baselines_agree_with_float64((params, shape, request) in case()) {
        let n = shape.n;
        let selection = select(&params, shape, &request);
        let wanted = (f64::from(params.ratio.unwrap()) * n as f64).round() as usize;
        let cells = wanted.max(params.sinks + params.recent).min(n);
        prop_assert_eq!(selection.n_cells(), cells);
        let forced = |j: usize| j < params.sinks || j + params.recent >= n;
        let scores: Vec<Vec<f64>> = request.heads.iter().map(|head| score(&params, n, head)).collect();
        for head in 0..shape.heads() {
            let kept = kept(&selection, head);
            prop_assert_eq!(kept.len(), cells);
            if params.policy == Kind::StreamingLlm {
                let expected: Vec<usize> = (0..n).filter(|&j| j < params.sinks || j >= n - (cells - params.sinks)).collect();
                prop_assert_eq!(kept, expected);
                continue;
            }
            let of = |j: usize| match params.evict {
                Evict::Composite => scores[head][j],
                Evict::Cells => scores.iter().map(|s| s[j]).sum::<f64>(),
            };
            let worst = kept.iter().filter(|j| !forced(**j)).map(|&j| of(j)).fold(f64::INFINITY, f64::min);
            for j in (0..n).filter(|j| !kept.contains(j)) {
                prop_assert!(!forced(j), "the forced entry {} was dropped", j);
                prop_assert!(of(j) <= worst * (1.0 + 1e-4) + 1e-9, "head {}: {} was dropped", head, j);
            }
        }
    }
}

#[test]
fn a_cap_alone_is_the_budget() {
    let shape = Shape { n: 500, n_layer: 1, n_head_kv: 2, group: 1 };
    let request = Request::random(&shape, 1, 7);
    for kind in KINDS {
        let params = Params { max_cells: Some(123), ..Params::new(kind) };
        assert_eq!(select(&params, shape, &request).n_cells(), 123, "{kind}");
        let params = Params::new(kind);
        assert_eq!(select(&params, shape, &request).n_cells(), 250, "{kind}: half by default");
    }
}

#[test]
fn a_ratio_overrules_the_automatic_budgets() {
    let shape = Shape { n: 500, n_layer: 1, n_head_kv: 2, group: 1 };
    for kind in [Kind::Gvote, Kind::GvotePaper] {
        let params = Params { ratio: Some(0.3), ..Params::new(kind) };
        let selection = select(&params, shape, &Request::random(&shape, params.samples, 7));
        assert_eq!((selection.n_cells(), selection.bound), (150, Bound::Ratio), "{kind}");
    }
}
