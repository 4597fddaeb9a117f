//! The paper's budgets, votes and unions, on tensors captured from the real model.

#![forbid(unsafe_code)]

use super::fixture::*;
use crate::backend::ComputeError;
use crate::cache::Layout;
use crate::llama::Pos;
use crate::policy::{self, HeadScores, Kind, Needs, Params, Shape};
use crate::score::{LayerQueries, Scorer};

const N: usize = 300;

/// Size of the smallest set of entries, taken by descending probability, that holds `share` of the mass.
fn nucleus(p: &[f32], share: f64) -> usize {
    let mut sorted: Vec<f64> = p.iter().map(|p| f64::from(*p)).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let mut sum = 0.0;
    sorted
        .iter()
        .position(|p| {
            sum += p;
            sum >= share
        })
        .map_or(p.len(), |i| i + 1)
}

fn top(p: &[f32], b: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&i, &j| p[j].total_cmp(&p[i]).then(i.cmp(&j)));
    order.truncate(b);
    order
}

#[test]
fn budgets_votes_and_unions_equal_a_naive_reference() {
    let model = model();
    let tokens = tokens(&model, N);
    let mut ctx = context(&model, F16, 512, 512);
    let layout = Layout::of(&ctx, 0).unwrap();
    let params = Params::new(Kind::GvotePaper);
    let mut capture = captured(&mut ctx, &tokens);
    let last = N as Pos - 1;
    let synthetic = capture.probe(&mut ctx, 0, last, params.samples, 5).unwrap();

    let (n_head, n_kv) = (layout.layers[0].n_head as usize, layout.layers[0].n_head_kv as usize);
    let shape = Shape { n: N, n_layer: layout.n_layer(), n_head_kv: n_kv, group: n_head / n_kv };
    let mut policy = policy::build(&params, shape).unwrap();
    let mut votes_of = Vec::new();
    let mut unions = Vec::new();
    Scorer::new(2, 1)
        .score(
            &layout,
            &cells(&ctx),
            Needs { each: true, ..policy.needs() },
            false,
            |il| {
                let window = capture.window(0, il, last).unwrap();
                Ok::<_, ComputeError>(LayerQueries::of_window(
                    &window,
                    synthetic.layer(il),
                    synthetic.pos(),
                    capture.logit_scale(il),
                ))
            },
            |first, heads: &[HeadScores]| {
                policy.observe_heads(first, heads);
                for s in heads {
                    let mut votes = vec![0usize; N];
                    for query_head in s.each.chunks((params.samples + 1) * N) {
                        let current = &query_head[params.samples * N..];
                        let b = nucleus(current, f64::from(params.p_nuc));
                        for p in query_head.chunks(N) {
                            for i in top(p, b) {
                                votes[i] += 1;
                            }
                        }
                    }
                    let forced = |i: usize| i < params.sinks || i >= N - params.recent;
                    unions.push((0..N).filter(|&i| votes[i] > 0 || forced(i)).count());
                    votes_of.push(votes);
                }
            },
        )
        .unwrap();
    let selection = policy.select();

    let ragged = selection.ragged.expect("the paper's budget is ragged");
    assert_eq!(ragged.min as usize, *unions.iter().min().unwrap());
    assert_eq!(ragged.max as usize, *unions.iter().max().unwrap());
    let mean = unions.iter().sum::<usize>() as f64 / unions.len() as f64;
    assert!((f64::from(ragged.mean) - mean).abs() < 1e-3);
    assert!(unions.iter().any(|u| *u < N), "the test text leaves something to drop");
    assert_eq!(selection.n_cells(), mean.ceil() as usize);

    for (head, votes) in votes_of.iter().enumerate() {
        let kept = selection.kept_by(head).unwrap();
        let is_kept = |i: usize| kept.binary_search(&(i as u32)).is_ok();
        let forced = |i: usize| i < params.sinks || i >= N - params.recent;
        assert!((0..N).filter(|&i| forced(i)).all(is_kept), "head {head} drops a sink or a recent token");
        let weakest = kept.iter().map(|&i| i as usize).filter(|&i| !forced(i)).map(|i| votes[i]).min();
        let strongest = (0..N).filter(|&i| !is_kept(i)).map(|i| votes[i]).max();
        if let (Some(weakest), Some(strongest)) = (weakest, strongest) {
            assert!(strongest <= weakest, "head {head} drops {strongest} votes and keeps {weakest}");
        }
    }
}
