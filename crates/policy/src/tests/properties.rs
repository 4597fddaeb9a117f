//! Properties of any request, and agreement with float64.

use proptest::prelude::*;

use super::*;

prop_compose! {
    /// Small requests with all settings varied, long enough to be compressed.
    fn case()(
        n in 90_usize..200,
        (n_layer, n_head_kv, group) in (1_usize..4, 1_usize..4, 1_usize..4),
        (samples, window, more) in (1_usize..5, 1_usize..9, 0_usize..9),
        (sinks, back, forward) in (0_usize..5, 0_usize..4, 0_usize..12),
        (lost_mass, p_nuc, head_mix) in (0.005_f32..0.6, 0.05_f32..1.0, 0.0_f32..2.0),
        (max_over, min_cells) in (prop::option::of(1_usize..120), 0_usize..120),
        (side, cells, paper, seed) in (0_usize..4, any::<bool>(), any::<bool>(), any::<u64>()),
    ) -> (Params, Shape, Request) {
        let recent = window + more;
        let max_cells = max_over.map(|over| sinks + recent + over);
        let params = Params {
            policy: if paper { Kind::GvotePaper } else { Kind::Gvote },
            lost_mass, p_nuc, samples, window, sinks, recent, max_cells, head_mix,
            span: Span { back, forward },
            min_cells: max_cells.map_or(min_cells, |cap| min_cells.min(cap)),
            evict: if cells { Evict::Cells } else { Evict::Composite },
            pool: 2 * side + 1,
            ..Params::default()
        };
        let shape = Shape { n, n_layer, n_head_kv, group };
        (params.clone(), shape, Request::random(&shape, samples, seed))
    }
}

proptest! {
    #[test]
    fn selections_are_ascending_complete_and_within_the_bounds((params, shape, request) in case()) {
        let selection = select(&params, shape, &request);
        let cells = selection.n_cells();
        prop_assert!(cells <= params.max_cells.unwrap_or(shape.n));
        prop_assert!(cells >= params.min_cells.min(shape.n));
        match &selection.kept {
            Kept::All => prop_assert_eq!(cells, shape.n),
            Kept::Tokens(_) => prop_assert_eq!(params.evict, Evict::Cells),
            Kept::Ragged { .. } => prop_assert!(false, "nothing exact was asked for"),
            Kept::Heads { n_cells, index } => {
                prop_assert_eq!(params.evict, Evict::Composite);
                prop_assert_eq!(index.len(), n_cells * shape.heads());
            }
        }
        for head in 0..shape.heads() {
            let kept = kept(&selection, head);
            prop_assert_eq!(kept.len(), cells);
            prop_assert!(kept.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(kept.last().is_some_and(|&last| last < shape.n));
            for j in (0..shape.n).filter(|&j| reference::forced(&params, shape.n, j)) {
                prop_assert!(kept.contains(&j), "head {} lost the forced entry {}", head, j);
            }
        }
        let lost = selection.lost_mass.unwrap();
        prop_assert!((0.0..=1.0).contains(&lost));
        match selection.bound {
            Bound::LostMass => prop_assert!(lost <= params.lost_mass),
            Bound::MaxCells => prop_assert_eq!(Some(cells), params.max_cells),
            Bound::MinCells => prop_assert_eq!(cells, params.min_cells.min(shape.n)),
            Bound::Forced => prop_assert_eq!(cells, params.sinks + params.recent),
            Bound::All => prop_assert_eq!(cells, shape.n),
            Bound::Budget => prop_assert_eq!(params.policy, Kind::GvotePaper),
            Bound::Ratio | Bound::Trial | Bound::Blind => prop_assert!(false, "nobody asked for that"),
        }
    }

    #[test]
    fn the_same_request_gets_the_same_answer((params, shape, request) in case()) {
        prop_assert_eq!(select(&params, shape, &request), select(&params, shape, &request));
    }

    #[test]
    fn permuting_the_heads_permutes_the_answer((params, shape, request) in case(), turn in 1_usize..8) {
        let mut turned = request.clone();
        turned.heads.rotate_left(turn % shape.heads());
        let (before, after) = (select(&params, shape, &request), select(&params, shape, &turned));
        prop_assert_eq!((before.n_cells(), before.bound), (after.n_cells(), after.bound));
        for head in 0..shape.heads() {
            let from = (head + turn % shape.heads()) % shape.heads();
            prop_assert_eq!(kept(&after, head), kept(&before, from));
        }
    }

    #[test]
    fn giving_up_more_mass_never_keeps_more((params, shape, request) in case(), more in 0.0_f32..0.3) {
        let careful = Params { policy: Kind::Gvote, ..params };
        let bold = Params { lost_mass: careful.lost_mass + more, ..careful.clone() };
        let (careful, bold) = (select(&careful, shape, &request), select(&bold, shape, &request));
        prop_assert!(bold.n_cells() <= careful.n_cells());
        for head in 0..shape.heads() {
            // One ranking, cut in two places.
            let wide = kept(&careful, head);
            prop_assert!(kept(&bold, head).iter().all(|j| wide.contains(j)));
        }
    }

    #[test]
    fn no_value_panics((params, shape, request) in case(), poison in any::<u64>()) {
        let bad = [f32::NAN, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-45, -0.0];
        let state = &mut poison.clone();
        let mut request = request;
        for head in &mut request.heads {
            for x in head.future.iter_mut().chain(&mut head.observed).chain(&mut head.each) {
                if random(state) < 0.5 {
                    *x = bad[(random(state) * bad.len() as f64) as usize];
                }
            }
        }
        let selection = select(&params, shape, &request);
        prop_assert!(selection.n_cells() <= params.max_cells.unwrap_or(shape.n));
        prop_assert!(selection.lost_mass.is_some_and(|lost| (0.0..=1.0).contains(&lost)));
    }

    #[test]
    fn gvote_agrees_with_float64((params, shape, request) in case()) {
        let params = Params { policy: Kind::Gvote, ..params };
        let selection = select(&params, shape, &request);
        let cells = selection.n_cells();
        let ranked = match params.evict {
            Evict::Composite => reference::gvote_composite(&params, &shape, &request),
            Evict::Cells => reference::gvote_cells(&params, &shape, &request),
        };
        let turns: Vec<_> = (0..ranked.mass.len()).map(|list| ranked.turns(&params, list, &[])).collect();
        for (index, (opinions, turns)) in ranked.opinions.iter().zip(&turns).enumerate() {
            let kept = kept(&selection, index);
            let is_forced = |j: &usize| reference::forced(&params, shape.n, *j);
            for j in (0..shape.n).filter(|j| !is_forced(j)) {
                // float32 may swap neighbours, which may shift a turn to the other opinion
                let ranks = |worse: f64| [0, 1].map(|side| {
                    let score: &Vec<f64> = &opinions[side];
                    score.iter().filter(|&&x| x > score[j] * worse + (worse - 1.0) * 1e-9).count()
                });
                let (surely, perhaps) = (ranks(1.001), ranks(0.999));
                let reached = turns.reached[cells.max(turns.order.iter().filter(|j| is_forced(j)).count())];
                if kept.contains(&j) {
                    prop_assert!((0..2).any(|s| surely[s] < reached[s] + 3), "head {}: {} was kept", index, j);
                } else {
                    prop_assert!((0..2).all(|s| perhaps[s] + 3 > reached[s]), "head {}: {} was dropped", index, j);
                }
            }
        }
        // 0.05 % of a mass that is at most 1, plus one swap of neighbours
        let tolerance = 2e-2;
        let lost = ranked.lost(|list| kept(&selection, list));
        prop_assert!((lost - f64::from(selection.lost_mass.unwrap())).abs() < 1e-3);
        let fewer = |cells: usize| ranked.lost(|list| turns[list].order[..cells].to_vec());
        let eps = f64::from(params.lost_mass);
        match selection.bound {
            Bound::LostMass => {
                prop_assert!(lost <= eps + 1e-3);
                prop_assert!(fewer(cells - 1) > eps - tolerance);
            }
            Bound::MaxCells => prop_assert!(lost > eps - tolerance),
            Bound::MinCells | Bound::Forced => prop_assert!(lost <= eps + 1e-3),
            Bound::All => prop_assert!(params.min_cells >= shape.n || fewer(shape.n - 1) > eps - tolerance),
            _ => prop_assert!(false, "gvote has no budget"),
        }
    }

    #[test]
    fn gvote_paper_agrees_with_float64((params, shape, request) in case()) {
        let params = Params { policy: Kind::GvotePaper, ..params };
        let selection = select(&params, shape, &request);
        let heads: Vec<_> =
            request.heads.iter().map(|head| reference::paper_head(&params, &shape, head)).collect();
        let unions = || heads.iter().map(|head| head.union);
        let mean = unions().sum::<usize>() as f64 / heads.len() as f64;
        let ragged = selection.ragged.unwrap();
        prop_assert_eq!(ragged.min as usize, unions().min().unwrap());
        prop_assert_eq!(ragged.max as usize, unions().max().unwrap());
        prop_assert!((f64::from(ragged.mean) - mean).abs() < 1e-4);

        let mut cells = (mean.ceil() as usize).max(params.min_cells).min(shape.n);
        cells = cells.min(params.max_cells.unwrap_or(shape.n));
        prop_assert_eq!(selection.n_cells(), cells);

        let total = |of: &dyn Fn(&reference::Votes, usize) -> f64, j| {
            heads.iter().map(|head| of(head, j)).sum::<f64>()
        };
        let mut lost = 0.0;
        for (index, head) in heads.iter().enumerate() {
            let score: Vec<f64> = (0..shape.n).map(|j| {
                // Sums stay below 1000 queries, so that the votes lead.
                let (votes, sum) = match params.evict {
                    Evict::Composite => (head.votes[j] as f64, head.sum[j]),
                    Evict::Cells => (total(&|h, j| h.votes[j] as f64, j), total(&|h, j| h.sum[j], j)),
                };
                if reference::forced(&params, shape.n, j) { f64::INFINITY } else { votes * 1e3 + sum }
            }).collect();
            let mut expected = reference::best(&score, cells);
            expected.sort_unstable();
            let stays: f64 = expected.iter().map(|&j| head.sum[j]).sum();
            lost += (1.0 - stays / head.sum.iter().sum::<f64>()) / heads.len() as f64;
            prop_assert_eq!(kept(&selection, index), expected, "head {}", index);
        }
        prop_assert!((lost - f64::from(selection.lost_mass.unwrap())).abs() < 1e-6);
    }
}
