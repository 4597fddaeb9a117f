//! Entries that stay like sinks, at different places in each head.

use super::*;

const SHAPE: Shape = Shape { n: 160, n_layer: 2, n_head_kv: 2, group: 2 };
const CELLS: usize = 60;

fn params(policy: Kind, evict: Evict) -> Params {
    let (sinks, window, recent) = (3, 8, 10);
    let max_cells = Some(CELLS);
    Params {
        sinks,
        window,
        recent,
        samples: 3,
        ratio: Some(0.1),
        max_cells,
        evict,
        min_cells: CELLS,
        ..Params::new(policy)
    }
}

/// Protects different entries in each head, some of them sinks or recent: nine in the middle of every head.
fn scattered() -> Protected {
    let of_head = |head| [1].into_iter().chain((0..9).map(|i| 20 + 13 * i + 3 * head)).chain([155]).collect();
    Protected::by_head((0..SHAPE.heads() as u32).map(of_head).collect())
}

/// Returns the entries that `head` must hold: if heads share their cells, all that any head protects.
fn expected(protected: &Protected, params: &Params, head: usize) -> Vec<u32> {
    let is_for_all = params.evict == Evict::Cells || params.policy == Kind::StreamingLlm;
    let heads = if is_for_all { 0..SHAPE.heads() } else { head..head + 1 };
    heads.flat_map(|head| protected.of_head(head).to_vec()).collect()
}

#[test]
fn every_policy_keeps_what_is_protected_and_else_its_best() {
    let request = Request::random(&SHAPE, 3, 1);
    let protected = scattered();
    for (kind, evict) in Kind::ALL.iter().flat_map(|&kind| Evict::ALL.iter().map(move |&evict| (kind, evict))) {
        if kind == Kind::Full || (kind == Kind::AdaKv && evict == Evict::Cells) {
            continue;
        }
        let params = params(kind, evict);
        let selection = select_protecting(&params, SHAPE, &request, &protected);
        assert_eq!(selection.n_cells(), CELLS, "{kind} {evict:?}");
        let mut lost_without = 0;
        for head in 0..SHAPE.heads() {
            let must = expected(&protected, &params, head);
            let with = kept(&selection, head);
            assert!(must.iter().all(|&entry| with.contains(&(entry as usize))), "{kind} {evict:?}: {with:?}");
            assert!((0..SHAPE.n).filter(|&j| reference::forced(&params, SHAPE.n, j)).all(|j| with.contains(&j)));
            // The remaining entries are the same as without protection.
            let without = kept(&select(&params, SHAPE, &request), head);
            lost_without += must.iter().filter(|&&entry| !without.contains(&(entry as usize))).count();
            if kind != Kind::Gvote {
                let mut others = with.iter().filter(|&&j| !must.contains(&(j as u32)));
                assert!(others.all(|j| without.contains(j)), "{kind} {evict:?}, head {head}");
            }
        }
        assert!(lost_without > 0, "{kind} {evict:?} would have kept all of them anyway");
    }
}

#[test]
fn gvote_agrees_with_float64_on_what_else_stays() {
    for (seed, evict) in (0..10).flat_map(|seed| [(seed, Evict::Composite), (seed, Evict::Cells)]) {
        let (params, request) = (params(Kind::Gvote, evict), Request::random(&SHAPE, 3, seed));
        let protected = scattered();
        let selection = select_protecting(&params, SHAPE, &request, &protected);
        let ranked = match evict {
            Evict::Composite => reference::gvote_composite(&params, &SHAPE, &request),
            Evict::Cells => reference::gvote_cells(&params, &SHAPE, &request),
        };
        let mut differ = 0;
        for list in 0..ranked.mass.len() {
            let order = ranked.turns(&params, list, &expected(&protected, &params, list)).order;
            let kept = kept(&selection, list);
            differ += order[..CELLS].iter().filter(|j| !kept.contains(j)).count();
        }
        // float32 may swap neighbours at the cut
        assert!(differ <= 2, "{evict:?} {seed}: {differ} of {} differ", ranked.mass.len() * CELLS);
        let lost = ranked.lost(|list| kept(&selection, list));
        assert!((lost - f64::from(selection.lost_mass.unwrap())).abs() < 1e-3, "{evict:?} {seed}");
    }
}

#[test]
fn a_head_that_has_lost_some_fills_their_cells_with_its_best() {
    let request = Request::random(&SHAPE, 3, 2);
    let uneven = Protected::by_head(vec![vec![30, 40, 50], vec![], vec![60], vec![70, 80]]);
    for kind in [Kind::Gvote, Kind::GvotePaper, Kind::SnapKv, Kind::AdaKv] {
        let params = Params { min_cells: 0, ..params(kind, Evict::Composite) };
        // the smallest count that holds all: 13 forced and 3 protected
        let params = Params { ratio: Some(0.01), ..params };
        let selection = select_protecting(&params, SHAPE, &request, &uneven);
        assert_eq!((selection.n_cells(), selection.bound), (16, Bound::Forced), "{kind}");
        for head in 0..SHAPE.heads() {
            let kept = kept(&selection, head);
            assert!(kept.len() == 16 && uneven.of_head(head).iter().all(|&j| kept.contains(&(j as usize))), "{kind}");
        }
    }
}

#[test]
fn a_cap_without_room_for_them_names_the_flag() {
    let protected = Protected::everywhere((20..70).collect());
    let error = build_protecting(&params(Kind::Gvote, Evict::Composite), SHAPE, &protected).err().unwrap();
    assert!(matches!(error, PolicyError::Protected { cap: CELLS, protected: 50, least: 64, .. }), "{error}");
    assert!(error.to_string().contains("`protect`") && error.to_string().contains("64 or more"), "{error}");
    let roomy = Params { max_cells: Some(64), ..params(Kind::Gvote, Evict::Composite) };
    assert!(build_protecting(&roomy, SHAPE, &protected).is_ok());
}
