//! The ranking that a trial works on.

use super::*;
use crate::threads::{Pool, alone};

const SHAPE: Shape = Shape { n: 300, n_layer: 2, n_head_kv: 2, group: 1 };

fn ranking(params: &Params) -> Ranking {
    ranking_of(params, SHAPE, &Request::random(&SHAPE, 1, 9), 1)
}

/// Returns the ranking of a policy that receives `at_once` heads at a time.
fn ranking_of(params: &Params, shape: Shape, request: &Request, at_once: usize) -> Ranking {
    let mut policy = build(params, shape).unwrap();
    let scores = request.heads.iter().map(|head| HeadScores {
        future: &head.future,
        observed: &head.observed,
        value_norm: &head.value_norm,
        key_similarity: &head.key_similarity,
        ..HeadScores::NONE
    });
    let scores: Vec<_> = scores.collect();
    for (first, heads) in (0..).step_by(at_once).zip(scores.chunks(at_once)) {
        policy.observe_heads(first, heads);
    }
    match policy.decide() {
        Decision::Ranking(ranking) => ranking,
        Decision::Selection(_) => panic!("the default settings want a trial"),
    }
}

#[test]
fn heads_in_several_threads_rank_and_are_cut_as_one_after_another() {
    let shape = Shape { n: 70_000, n_layer: 2, n_head_kv: 4, group: 1 };
    let request = Request::random(&shape, 1, 9);
    let by_one = ranking_of(&Params::default(), shape, &request, 1);
    // fewer heads in the last call; no additional threads; and waiting threads
    for (at_once, is_alone, keeps) in
        [(4, false, false), (3, false, false), (8, false, false), (8, true, false), (3, false, true)]
    {
        let _threads = keeps.then(Pool::keep);
        let rank = || {
            let layers = ranking_of(&Params::default(), shape, &request, at_once);
            let kept = layers.clone().keep(20_000, Bound::Trial);
            (layers, kept)
        };
        let (layers, kept) = if is_alone { alone(rank) } else { rank() };
        assert_eq!(by_one.curve(), layers.curve());
        for head in 0..shape.heads() {
            // not `assert_eq`, which would print the lists
            assert!(by_one.of_head(head) == layers.of_head(head), "head {head}");
            let mut best = by_one.of_head(head)[..20_000].to_vec();
            best.sort_unstable();
            assert!(kept.kept_by(head) == Some(&best[..]), "head {head}");
        }
    }
}

#[test]
fn every_head_ranks_all_entries_forced_ones_first() {
    for &evict in Evict::ALL {
        let params = Params { evict, ..Params::default() };
        let ranking = ranking(&params);
        assert_eq!((ranking.n(), ranking.forced()), (300, (4, 236)));
        for head in 0..SHAPE.heads() {
            let order = ranking.of_head(head);
            let forced: Vec<u32> = (0..4).chain(236..300).collect();
            assert_eq!(order[..forced.len()], forced);
            let mut sorted = order.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..300).collect::<Vec<u32>>());
        }
        let same = ranking.of_head(0) == ranking.of_head(3);
        assert_eq!(same, evict == Evict::Cells, "{evict:?}");
    }
}

#[test]
fn what_is_kept_is_the_head_of_the_ranking() {
    for &evict in Evict::ALL {
        let ranking = ranking(&Params { evict, ..Params::default() });
        for count in [68, 69, 150, 299] {
            let selection = ranking.clone().keep(count, Bound::Trial);
            assert_eq!((selection.n_cells(), selection.bound), (count, Bound::Trial));
            for head in 0..SHAPE.heads() {
                let mut best = ranking.of_head(head)[..count].to_vec();
                best.sort_unstable();
                assert_eq!(selection.kept_by(head), Some(&best[..]), "{evict:?}, head {head}, {count}");
            }
        }
    }
}

#[test]
fn keeping_stays_within_the_bounds_and_says_which_one_decided() {
    let all = (300, Bound::All);
    let (plain, raised) = (Params::default(), Params { min_cells: 120, ..Params::default() });
    let capped = Params { max_cells: Some(200), ..raised.clone() };
    for (params, count, expected) in [
        (&plain, 20, (68, Bound::Forced)),
        (&plain, 100, (100, Bound::Trial)),
        (&plain, 300, all),
        (&plain, 999, all),
        (&raised, 20, (120, Bound::MinCells)),
        (&raised, 120, (120, Bound::Trial)),
        (&capped, 300, (200, Bound::MaxCells)),
        (&capped, 199, (199, Bound::Trial)),
    ] {
        let selection = ranking(params).keep(count, Bound::Trial);
        assert_eq!((selection.n_cells(), selection.bound), expected, "{count} of {params:?}");
        assert_eq!(selection.kept == Kept::All, expected == all);
    }
}

#[test]
fn a_trial_may_settle_on_what_the_bounds_allow() {
    let good = Params::default;
    for (params, expected) in [
        (good(), (68, 300)),
        // a twelfth of the cells is more than the forced entries
        (Params { sinks: 0, recent: 8, window: 8, ..good() }, (25, 300)),
        (Params { min_cells: 100, ..good() }, (100, 300)),
        (Params { min_cells: 500, ..good() }, (300, 300)),
        (Params { max_cells: Some(200), ..good() }, (68, 200)),
        (Params { max_cells: Some(69), min_cells: 69, ..good() }, (69, 69)),
        (Params { max_cells: Some(1000), ..good() }, (68, 300)),
    ] {
        assert_eq!(ranking(&params).range(), expected, "{params:?}");
    }
}

#[test]
fn settings_decide_who_finds_the_count() {
    let good = Params::default;
    assert!(good().tries());
    for params in [
        Params { ratio: Some(0.5), ..good() },
        Params { target_kl: None, ..good() },
        Params { replay: true, ..good() },
        Params::new(Kind::SnapKv),
    ] {
        assert!(!params.tries(), "{params:?}");
    }
}
