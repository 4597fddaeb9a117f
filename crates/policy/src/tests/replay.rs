//! A replay: a single opinion, each head's own.

use super::*;

/// Creates scores for which the peaks times the value norms are 1/n, 2/n, ... in a random order, which any precision
/// can distinguish. `levels[head][j]` is the rank of an entry, from 1, the lowest.
fn request(shape: &Shape, seed: u64) -> (Request, Vec<Vec<usize>>) {
    let state = &mut seed.clone();
    let n = shape.n;
    let mut request = Request::random(shape, 1, seed);
    let levels = request.heads.iter_mut().map(|head| {
        let mut order: Vec<(f64, usize)> = (0..n).map(|j| (random(state), j)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut levels = vec![0; n];
        order.iter().enumerate().for_each(|(rank, &(_, j))| levels[j] = rank + 1);
        head.value_norm = (0..n).map(|_| 0.1 + random(state) as f32).collect();
        let peak = |j: usize| levels[j] as f64 / n as f64 / f64::from(head.value_norm[j]);
        head.fourth_powers = (0..n).map(|j| peak(j).powi(4) as f32).collect();
        head.replayed = softmax(n, state);
        levels
    });
    let levels = levels.collect();
    (request, levels)
}

fn expected(params: &Params, score: &[f64], count: usize) -> Vec<usize> {
    let n = score.len();
    let first = |j: usize| if reference::forced(params, n, j) { f64::INFINITY } else { score[j] };
    let mut kept = reference::best(&(0..n).map(first).collect::<Vec<_>>(), count);
    kept.sort_unstable();
    kept
}

const SHAPE: Shape = Shape { n: 180, n_layer: 2, n_head_kv: 2, group: 1 };

/// Settings whose spans and head mix would change the order if they had any effect.
fn params() -> Params {
    Params {
        replay: true,
        head_mix: 2.0,
        span: Span { back: 3, forward: 9 },
        recent: 10,
        window: 8,
        ..Params::default()
    }
}

#[test]
fn each_head_keeps_what_its_own_repetition_looks_at() {
    for (seed, share) in [(1, 0.2), (2, 0.5), (3, 0.8)] {
        let params = Params { ratio: Some(share), ..params() };
        let (request, levels) = request(&SHAPE, seed);
        let selection = select(&params, SHAPE, &request);
        let count = (f64::from(share) * SHAPE.n as f64).round() as usize;
        assert_eq!((selection.n_cells(), selection.bound), (count, Bound::Ratio));
        for (head, levels) in levels.iter().enumerate() {
            let score: Vec<f64> = levels.iter().map(|&level| level as f64).collect();
            assert_eq!(kept(&selection, head), expected(&params, &score, count), "head {head}");
        }
    }
}

#[test]
fn one_ranking_for_all_is_by_the_mean_of_the_heads() {
    let params = Params { ratio: Some(0.4), evict: Evict::Cells, ..params() };
    let (request, levels) = request(&SHAPE, 4);
    let selection = select(&params, SHAPE, &request);
    // All heads' scores have the same sum, so their means are in the order of the sums of the levels.
    let sum = |j: usize| levels.iter().map(|levels| levels[j] as f64).sum::<f64>();
    let score: Vec<f64> = (0..SHAPE.n).map(sum).collect();
    let kept = kept(&selection, 0);
    let free = |j: &usize| !reference::forced(&params, SHAPE.n, *j);
    let worst = kept.iter().copied().filter(free).map(|j| score[j]).fold(f64::INFINITY, f64::min);
    let missed = (0..SHAPE.n).filter(|j| !kept.contains(j)).map(|j| score[j]).fold(0.0, f64::max);
    // The cut may fall between equal sums.
    assert!(worst >= missed, "{worst} was kept and {missed} was not");
}

#[test]
fn the_lost_mass_is_that_of_the_repetitions_attention() {
    let params = Params { lost_mass: 0.15, ..params() };
    assert!(!params.tries(), "what is kept is for questions to come: nothing to try it on");
    let (request, _) = request(&SHAPE, 5);
    let lost = |selection: &Selection| {
        let outside = request.heads.iter().enumerate().map(|(head, scores)| {
            let kept = kept(selection, head);
            let lost = (0..SHAPE.n).filter(|j| !kept.contains(j)).map(|j| f64::from(scores.replayed[j]));
            lost.sum::<f64>()
        });
        outside.sum::<f64>() / request.heads.len() as f64
    };
    let selection = select(&params, SHAPE, &request);
    assert_eq!(selection.bound, Bound::LostMass);
    let share = lost(&selection);
    assert!((share - f64::from(selection.lost_mass.unwrap())).abs() < 1e-4, "{share}");
    assert!(share <= 0.15);
    let one_less = Params { max_cells: Some(selection.n_cells() - 1), ..params };
    assert!(lost(&select(&one_less, SHAPE, &request)) > 0.15, "the smallest count");
}

#[test]
fn no_queries_are_asked_for() {
    let needs = build(&params(), SHAPE).unwrap().needs();
    assert!(!needs.samples() && !needs.observed, "{needs:?}");
    assert!(needs.value_norm && !needs.nothing());
}
