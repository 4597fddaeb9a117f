//! The explanation of a selection, against simple float64.

use super::*;

const SHAPE: Shape = Shape { n: 300, n_layer: 2, n_head_kv: 2, group: 1 };

fn scores(head: &Head) -> HeadScores<'_> {
    HeadScores {
        future: &head.future,
        observed: &head.observed,
        value_norm: &head.value_norm,
        key_similarity: &head.key_similarity,
        ..HeadScores::NONE
    }
}

/// Returns a selection, its ranking, and its explanation.
fn explained(params: &Params, request: &Request) -> (Selection, Ranking, Vec<HeadOpinion>) {
    let mut policy = build(params, SHAPE).unwrap();
    let mut opinions = Opinions::new(params, SHAPE, &Protected::default());
    for (index, head) in request.heads.iter().enumerate() {
        let scores = scores(head);
        policy.observe(index, &scores);
        opinions.observe(&scores);
    }
    let (decision, ranking) = policy.explain();
    let (Decision::Selection(selection), Some(ranking)) = (decision, ranking) else { panic!("a share was asked for") };
    let heads = opinions.on(&selection, Some(&ranking));
    (selection, ranking, heads)
}

fn normal(scores: &[f32]) -> Vec<f64> {
    let sum: f64 = scores.iter().map(|&x| f64::from(x)).sum();
    scores.iter().map(|&x| f64::from(x) / sum).collect()
}

/// Returns the best `count` of the entries that are not forced.
fn best(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (4..236).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

#[test]
fn what_a_head_gives_up_and_needs_follows_from_its_mass() {
    for &evict in Evict::ALL {
        let params = Params { ratio: Some(0.5), evict, ..Params::default() };
        let request = Request::random(&SHAPE, 1, 5);
        let (selection, ranking, heads) = explained(&params, &request);
        let mass: Vec<Vec<f64>> = request.heads.iter().map(|head| normal(&head.future)).collect();
        let left = |head: usize, kept: &[u32]| 1.0 - kept.iter().map(|&j| mass[head][j as usize]).sum::<f64>();
        let lost: Vec<f64> = (0..4).map(|head| left(head, selection.kept_by(head).unwrap())).collect();
        let mean = lost.iter().sum::<f64>() / 4.0;
        for (head, opinion) in heads.iter().enumerate() {
            assert!((f64::from(opinion.lost_mass) - lost[head]).abs() < 1e-5, "{evict:?}, head {head}");
            let needs = opinion.needs.unwrap() as usize;
            let order = ranking.of_head(head);
            assert!(left(head, &order[..needs]) <= mean + 1e-5, "{evict:?}, head {head}");
            assert!(left(head, &order[..needs - 1]) > mean - 1e-5, "{evict:?}, head {head}");
        }
        assert!((mean - f64::from(selection.lost_mass.unwrap())).abs() < 1e-3, "{evict:?}");
    }
}

#[test]
fn agreement_counts_whom_each_kind_of_query_would_have_kept() {
    let params = Params { ratio: Some(0.5), pool: 1, ..Params::default() };
    let request = Request::random(&SHAPE, 1, 6);
    let (selection, _, heads) = explained(&params, &request);
    let count = selection.n_cells() - 68;
    for (index, head) in request.heads.iter().enumerate() {
        let real = best(&normal(&head.observed), count);
        let synthetic = best(&normal(&head.future), count);
        let is_free = |j: &&u32| (4..236).contains(*j);
        let kept: Vec<usize> = selection.kept_by(index).unwrap().iter().filter(is_free).map(|&j| j as usize).collect();
        let of = |in_real: bool, in_synthetic: bool| {
            let fits = |j: &&usize| real.contains(j) == in_real && synthetic.contains(j) == in_synthetic;
            kept.iter().filter(fits).count() as u32
        };
        let expected = Agreement {
            both: of(true, true),
            real: of(true, false),
            synthetic: of(false, true),
            neither: of(false, false),
            common: real.iter().filter(|j| synthetic.contains(j)).count() as u32,
        };
        assert_eq!(heads[index].agreement, Some(expected), "head {index}");
    }
}

#[test]
fn nothing_is_said_where_nothing_was_measured_or_all_stays() {
    let opinions = Opinions::new(&Params::default(), SHAPE, &Protected::default());
    let params = Params { ratio: Some(0.5), ..Params::default() };
    let (selection, ranking, _) = explained(&params, &Request::random(&SHAPE, 1, 7));
    assert_eq!(opinions.on(&selection, Some(&ranking)), []);
    let all = Params { ratio: Some(1.0), ..Params::default() };
    let (selection, _, heads) = explained(&all, &Request::random(&SHAPE, 1, 7));
    assert_eq!((selection.kept, heads), (Kept::All, Vec::new()));
}

#[test]
fn explaining_decides_the_same() {
    for params in [Params::default(), Params { ratio: Some(0.3), ..Params::default() }] {
        let request = Request::random(&SHAPE, 1, 8);
        let observed = || {
            let mut policy = build(&params, SHAPE).unwrap();
            for (index, head) in request.heads.iter().enumerate() {
                policy.observe(index, &scores(head));
            }
            policy
        };
        let of = |decision: Decision| match decision {
            Decision::Selection(selection) => selection,
            Decision::Ranking(ranking) => ranking.keep(150, Bound::Trial),
        };
        assert_eq!(of(observed().explain().0), of(observed().decide()));
    }
}
