//! Requests small enough to work out by hand, and calls that are bugs.

use super::*;

/// Creates a request of one head whose attention is all on `hits`, with decreasing weights.
fn hits(n: usize, hits: &[usize]) -> Request {
    let mut future = vec![0.0; n];
    for (rank, &hit) in hits.iter().enumerate() {
        future[hit] = 0.5_f32.powi(rank as i32 + 1);
    }
    Request {
        heads: vec![Head {
            observed: future.clone(),
            each: future.clone(),
            future,
            value_norm: vec![1.0; n],
            key_similarity: vec![0.0; n],
            ..Head::default()
        }],
    }
}

#[test]
fn a_hit_keeps_what_follows_it() {
    let params = Params { pool: 1, ..Params::default() };
    let selection = select(&params, shape(1000), &hits(1000, &[500]));
    assert_eq!(selection.bound, Bound::LostMass);
    // All of the mass is on one entry: the second turn, that of the single entries, takes it.
    let expected: Vec<usize> = (0..4).chain([498, 500]).chain(936..1000).collect();
    assert_eq!(kept(&selection, 0), expected);
    // Of 69 turns, the odd ones take the passage. The even ones take the hit, then the oldest entries. The last turn
    // finds the passage complete.
    let wide = Params { min_cells: 4 + 69 + 64, ..params };
    let selection = select(&wide, shape(1000), &hits(1000, &[500]));
    assert_eq!(selection.bound, Bound::MinCells);
    let expected: Vec<usize> = (0..4 + 34).chain(498..533).chain(936..1000).collect();
    assert_eq!(kept(&selection, 0), expected);
}

#[test]
fn a_cap_before_the_hit_admits_that_all_is_lost() {
    let params = Params { pool: 1, max_cells: Some(4 + 1 + 64), ..Params::default() };
    let selection = select(&params, shape(1000), &hits(1000, &[500]));
    assert_eq!(selection.bound, Bound::MaxCells);
    assert_eq!(selection.lost_mass, Some(1.0));
}

#[test]
fn the_paper_prefers_the_older_of_equal_entries() {
    let mut request = hits(1000, &[]);
    request.heads[0].each = vec![0.001; 9 * 1000];
    let params = Params { max_cells: Some(100), ..Params::new(Kind::GvotePaper) };
    let selection = select(&params, shape(1000), &request);
    // Flat attention: 950 entries hold 0.95 of it, and 50 of the recent ones are added.
    assert_eq!(selection.ragged.unwrap().max, 1000);
    let expected: Vec<usize> = (0..36).chain(936..1000).collect();
    assert_eq!(kept(&selection, 0), expected);
}

#[test]
fn without_spans_a_hit_keeps_itself() {
    let params = Params { pool: 1, span: Span::NONE, lost_mass: 0.2, ..Params::default() };
    // 1/2, 1/4 and 1/8 of the mass, of which 1/8 is 0.14 of the whole.
    let selection = select(&params, shape(1000), &hits(1000, &[700, 300, 500]));
    let expected: Vec<usize> = (0..4).chain([300, 700]).chain(936..1000).collect();
    assert_eq!(kept(&selection, 0), expected);
    assert!((selection.lost_mass.unwrap() - 1.0 / 7.0).abs() < 1e-4);
}

#[test]
fn mass_is_neither_too_large_nor_too_small_for_its_storage() {
    // 0.9 of the mass on one entry, 0.1 spread so thinly that f16 alone would hold none of it.
    let n = 200_000;
    let mut request = hits(n, &[]);
    request.heads[0].future = vec![0.1 / n as f32; n];
    request.heads[0].future[n / 2] = 0.9;
    for evict in Evict::ALL {
        let params = Params { evict: *evict, lost_mass: 0.05, ..Params::default() };
        let selection = select(&params, shape(n), &request);
        assert!((selection.share() - 0.5).abs() < 1e-3, "{evict:?}: {}", selection.share());
        assert!((selection.lost_mass.unwrap() - 0.05).abs() < 1e-5);
    }
}

#[test]
fn the_windows_own_observed_scores_count_nothing() {
    let params = Params { window: 64, recent: 64, min_cells: 69, pool: 1, ..Params::default() };
    let mut request = hits(300, &[]);
    // The window's oldest token stays anyway; if its score counted, its span would win over 148.
    request.heads[0].observed[236] = 0.9;
    request.heads[0].observed[150] = 0.1;
    let selection = select(&params, shape(300), &request);
    let expected: Vec<usize> = (0..4).chain([148]).chain(236..300).collect();
    assert_eq!(kept(&selection, 0), expected);
}

#[test]
fn heads_keep_their_own_entries_and_share_the_count() {
    let heads = [hits(500, &[100]), hits(500, &[200])].map(|mut one| one.heads.remove(0));
    let request = Request { heads: heads.to_vec() };
    let shape = Shape { n: 500, n_layer: 2, n_head_kv: 1, group: 1 };
    let params = Params { span: Span::NONE, pool: 1, head_mix: 0.0, ..Params::default() };
    let selection = select(&params, shape, &request);
    assert_eq!(selection.n_cells(), 69);
    assert!(kept(&selection, 0).contains(&100) && !kept(&selection, 0).contains(&200));
    assert!(kept(&selection, 1).contains(&200) && !kept(&selection, 1).contains(&100));
    // One ranking for all heads must hold both hits.
    let selection = select(&Params { evict: Evict::Cells, ..params }, shape, &request);
    assert_eq!(selection.n_cells(), 70);
    assert_eq!(selection.kept_by(0), selection.kept_by(1));
}

#[test]
fn short_prompts_are_left_alone_unless_the_cap_forbids() {
    let params = Params::default();
    assert!(params.leaves_alone(131) && !params.leaves_alone(132));
    let policy = build(&params, shape(131)).unwrap();
    assert!(policy.needs().nothing());
    assert_eq!(policy.name(), "gvote");
    assert_eq!(policy.select(), Selection::all(131));

    let capped = Params { max_cells: Some(100), lost_mass: 0.02, ..params };
    assert!(capped.leaves_alone(100) && !capped.leaves_alone(101));
    let selection = select(&capped, shape(131), &Request::random(&shape(131), 32, 1));
    assert_eq!((selection.n_cells(), selection.bound), (100, Bound::MaxCells));
}

#[test]
fn full_keeps_everything() {
    let policy = build(&Params::new(Kind::Full), shape(100_000)).unwrap();
    assert!(policy.needs().nothing());
    assert_eq!(policy.select(), Selection::all(100_000));
}

#[test]
fn a_request_without_heads_is_refused() {
    for (n_layer, n_head_kv, group) in [(0, 1, 1), (1, 0, 1), (1, 1, 0)] {
        let empty = Shape { n: 1000, n_layer, n_head_kv, group };
        let refused = build(&Params::default(), empty).err();
        assert_eq!(refused, Some(PolicyError::Shape(empty)));
    }
}

#[test]
#[should_panic(expected = "head 1 is out of order")]
fn a_skipped_head_is_a_bug() {
    let mut policy = build(&Params::default(), shape(1000)).unwrap();
    policy.observe(1, &HeadScores { future: &[0.0; 1000], observed: &[0.0; 1000], ..HeadScores::NONE });
}

#[test]
#[should_panic(expected = "heads observed before select")]
fn selecting_too_early_is_a_bug() {
    build(&Params::default(), shape(1000)).unwrap().select();
}
