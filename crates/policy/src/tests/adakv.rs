//! Ada-KV's shared budget, against float64, and its effect in a llama.cpp cache.

use proptest::prelude::*;

use super::baselines::{lifted, own_score};
use super::*;

prop_compose! {
    fn case()(
        n in 90_usize..200,
        (n_layer, n_head_kv, group) in (1_usize..4, 1_usize..5, 1_usize..3),
        (window, side, ratio, seed) in (1_usize..9, 0_usize..4, 0.05_f32..1.0, any::<u64>()),
        (back, forward) in (0_usize..3, 0_usize..9),
    ) -> (Params, Shape, Request) {
        let params = Params {
            window, recent: window, sinks: 2, pool: 2 * side + 1,
            ratio: Some(ratio),
            span: Span { back, forward },
            ..Params::new(Kind::AdaKv)
        };
        let shape = Shape { n, n_layer, n_head_kv, group };
        let mut request = Request::random(&shape, 1, seed);
        // heads to which the window pays more or less of its attention; the rest is on the window itself
        let state = &mut seed.clone();
        for head in &mut request.heads {
            let share = random(state) as f32;
            head.observed.iter_mut().for_each(|p| *p *= share);
        }
        (params, shape, request)
    }
}

fn exact(params: &Params) -> Params {
    Params { exact: true, ..params.clone() }
}

fn counts(selection: &Selection, shape: Shape) -> Vec<usize> {
    (0..shape.heads()).map(|head| kept(selection, head).len()).collect()
}

proptest! {
    #[test]
    fn a_layer_shares_exactly_its_budget((params, shape, request) in case()) {
        let selection = select(&exact(&params), shape, &request);
        let n = shape.n;
        let forced = params.sinks + params.recent;
        let budget = params.fixed_cells(n).max(forced);
        prop_assert_eq!(selection.n_cells(), budget);
        let counts = counts(&selection, shape);
        for layer in counts.chunks(shape.n_head_kv) {
            prop_assert_eq!(layer.iter().sum::<usize>(), budget * shape.n_head_kv);
            prop_assert!(layer.iter().all(|&count| count >= forced + (budget - forced) / 5 && count <= n));
        }
        for head in 0..shape.heads() {
            let kept = kept(&selection, head);
            prop_assert!(kept.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!((0..n).filter(|&j| reference::forced(&params, n, j)).all(|j| kept.contains(&j)));
        }
        if let Some(ragged) = selection.ragged {
            let (min, max) = (counts.iter().min(), counts.iter().max());
            prop_assert_eq!((Some(&(ragged.min as usize)), Some(&(ragged.max as usize))), (min, max));
            prop_assert_eq!(ragged.mean, budget as f32);
        }
    }

    #[test]
    fn budgets_and_choices_agree_with_float64((params, shape, request) in case()) {
        let selection = select(&exact(&params), shape, &request);
        let (n, heads) = (shape.n, shape.n_head_kv);
        let forced = params.sinks + params.recent;
        let free = params.fixed_cells(n).max(forced) - forced;
        let is_free = |j: &usize| !reference::forced(&params, n, *j);
        for (layer, members) in request.heads.chunks(heads).enumerate() {
            let scores: Vec<Vec<f64>> =
                members.iter().map(|head| lifted(&params, n, &own_score(&params, n, head))).collect();
            let mut all: Vec<f64> = scores.iter().flat_map(|s| (0..n).filter(is_free).map(|j| s[j])).collect();
            all.sort_by(|a, b| b.total_cmp(a));
            let Some(&worst) = all[..free * heads].last() else { continue };
            for (h, score) in scores.iter().enumerate() {
                let head = layer * heads + h;
                let kept = kept(&selection, head);
                // Among equal scores at the border either may win, and float32 may swap neighbours.
                let above = |limit: f64| (0..n).filter(is_free).filter(|&j| score[j] > limit).count() as f64;
                let (least, most) = (above(worst * (1.0 + 1e-5) + 1e-12), above(worst * (1.0 - 1e-5) - 1e-12));
                let with = |won: f64| 0.2 * free as f64 + 0.8 * won;
                let count = (kept.len() - forced) as f64;
                prop_assert!(with(least) - 1.0 < count && count < with(most) + 1.0, "head {}: {}", head, count);
                let weakest = kept.iter().filter(|j| is_free(j)).map(|&j| score[j]).fold(f64::INFINITY, f64::min);
                let strongest = (0..n).filter(|j| !kept.contains(j)).map(|j| score[j]).fold(0.0, f64::max);
                prop_assert!(strongest <= weakest * (1.0 + 1e-4) + 1e-12, "head {}", head);
            }
        }
    }

    #[test]
    fn a_cache_has_the_cells_of_the_greediest_head_and_is_that_of_snapkv((params, shape, request) in case()) {
        let exact = select(&exact(&params), shape, &request);
        let real = select(&params, shape, &request);
        prop_assert_eq!(real.n_cells(), counts(&exact, shape).into_iter().max().unwrap());
        let share = real.n_cells() as f32 / shape.n as f32;
        let snapkv = Params { policy: Kind::SnapKv, ratio: Some(share), ..params };
        let snapkv = select(&snapkv, shape, &request);
        for head in 0..shape.heads() {
            let real = kept(&real, head);
            prop_assert!(kept(&exact, head).iter().all(|j| real.contains(j)));
            prop_assert_eq!(real, kept(&snapkv, head));
        }
    }

    #[test]
    fn caps_hold_for_cells_and_for_means((params, shape, request) in case(), over in 1_usize..80, least in 0_usize..200) {
        let cap = params.sinks + params.recent + over;
        for params in [params.clone(), exact(&params)] {
            let capped = Params { max_cells: Some(cap), ..params.clone() };
            prop_assert!(select(&capped, shape, &request).n_cells() <= cap);
            let raised = Params { min_cells: least, ..params };
            prop_assert!(select(&raised, shape, &request).n_cells() >= least.min(shape.n));
        }
        let alone = Params { max_cells: Some(cap), ratio: None, ..params };
        prop_assert_eq!(select(&alone, shape, &request).n_cells(), cap.min(shape.n));
    }
}

#[test]
fn what_the_window_looks_at_takes_the_budget_of_what_it_does_not() {
    let shape = Shape { n: 100, n_layer: 1, n_head_kv: 2, group: 1 };
    let params =
        Params { window: 4, recent: 4, sinks: 0, pool: 1, ratio: Some(0.24), exact: true, ..Params::new(Kind::AdaKv) };
    let head = |p: f32| Head { observed: vec![p; 100], ..Head::default() };
    // u = 24 - 4 = 20 a head; the first head wins all 40 and gets 0.2 * 20 + 0.8 * 40
    let selection = select(&params, shape, &Request { heads: vec![head(0.01), head(0.001)] });
    assert_eq!(counts(&selection, shape), [4 + 36, 4 + 4]);
    assert_eq!(selection.ragged, Some(Ragged { min: 8, mean: 24.0, max: 40 }));
    // normalised, the heads would be equal; equal heads share by age
    let selection = select(&params, shape, &Request { heads: vec![head(0.01), head(0.01)] });
    assert_eq!(counts(&selection, shape), [24, 24]);
}

#[test]
fn the_papers_own_budgets_stay_unequal() {
    let shape = Shape { n: 150, n_layer: 2, n_head_kv: 3, group: 2 };
    let params = Params::new(Kind::GvotePaper);
    let request = Request::random(&shape, params.samples, 11);
    let params = Params { window: 8, recent: 8, p_nuc: 0.3, ..params };
    let exact = select(&exact(&params), shape, &request);
    let real = select(&params, shape, &request);
    assert_eq!((exact.ragged, exact.n_cells()), (real.ragged, real.n_cells()));
    assert_eq!(exact.bound, Bound::Budget);
    for (head, scores) in request.heads.iter().enumerate() {
        let votes = reference::paper_head(&params, &shape, scores);
        let union: Vec<usize> =
            (0..shape.n).filter(|&j| votes.votes[j] > 0 || reference::forced(&params, shape.n, j)).collect();
        assert_eq!(kept(&exact, head), union);
    }
    assert!(counts(&exact, shape).windows(2).any(|pair| pair[0] != pair[1]));
}
