//! Votes within answers.

use std::thread;
use std::time::{Duration, Instant};

use super::app::*;
use crate::archive::PRETEND_FULL;
use crate::capi::*;
use crate::llama::{Pos, SeqId, Token};
use crate::tests::fixture;
use crate::tests::tiny::N_LAYER;

const N: usize = 300;
const START: Pos = N as Pos;

fn after(n: u32) -> gvote_params {
    gvote_params { max_cells: 150, target_kl: 0.0, when: GVOTE_WHEN_AFTER, vote_after: n, ..defaults() }
}

/// Returns an app that has read a prompt, and a handle that observed it.
fn asked(shape: &Shape, params: &gvote_params) -> (App, Handle) {
    let app = App::new(&tiny("llama"), shape);
    let handle = Handle::with(&app, params);
    app.decode(&[(0, 0, &words(N, 0))]);
    (app, handle)
}

/// Returns such an app without a handle.
fn full(shape: &Shape) -> App {
    let app = App::new(&tiny("llama"), shape);
    app.decode(&[(0, 0, &words(N, 0))]);
    app
}

/// Decodes a token of an answer after a call of `gvote_vote_if_due()`, and returns the result of the call.
fn step(app: &App, handle: &Handle, seq: SeqId, start: Pos, pos: Pos) -> (gvote_status, Option<gvote_report>) {
    let answer = handle.vote_if_due(app, seq, start);
    app.decode(&[(seq, pos, &[token(pos)])]);
    answer
}

fn token(pos: Pos) -> Token {
    (pos * 7 + 3) % 50
}

/// Bits of the logits after the newest token.
fn bits(app: &App) -> Vec<u32> {
    app.logits(0).1.iter().map(|logit| logit.to_bits()).collect()
}

/// Returns the votes during an answer of `n` tokens: the number of tokens before each, and its report. Nothing may
/// fail.
#[track_caller]
fn votes(app: &App, handle: &Handle, seq: SeqId, n: usize) -> Vec<(usize, gvote_report)> {
    let each = (0..n).filter_map(|i| {
        let (status, report) = step(app, handle, seq, START, START + i as Pos);
        assert_eq!(status, GVOTE_OK, "{}", handle.error());
        report.map(|report| (i, report))
    });
    each.collect()
}

#[test]
fn the_first_tokens_are_bit_for_bit_the_full_cache_s() {
    for (flash, params) in [(false, after(32)), (true, after(32)), (false, defaults()), (true, defaults())] {
        let shape = Shape { flash, ..ONE };
        let ((app, handle), full) = (asked(&shape, &params), full(&shape));
        let mut first_vote = None;
        for i in 0..40 {
            let pos = START + i;
            if let (GVOTE_OK, Some(_)) = step(&app, &handle, 0, START, pos) {
                first_vote = Some(i);
            }
            full.decode(&[(0, pos, &[token(pos)])]);
            assert!(first_vote.is_some() || bits(&app) == bits(&full), "token {i}, flash {flash}");
        }
        assert!(first_vote.is_none_or(|after| after >= 32), "{first_vote:?}");
        if params.when == GVOTE_WHEN_AFTER {
            assert_eq!(first_vote, Some(32));
            assert!(bits(&app) != bits(&full), "with fewer cells something differs");
        }
    }
}

#[test]
fn there_is_one_vote_and_the_answer_goes_on_behind_it() {
    let (app, handle) = asked(&ONE, &after(20));
    let votes = votes(&app, &handle, 0, 60);
    let [(20, report)] = votes[..] else { panic!("{votes:?}") };
    assert_eq!((report.cells_before, report.cells_after), (N as u32 + 20, 150));
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 150 + 40));
    // the question stays as well
    for head in (0..N_LAYER as i32).flat_map(|layer| [(layer, 0), (layer, 1)]) {
        let held = handle.positions(&app, 0, head.0, head.1);
        assert!((START - 64..START + 60).all(|pos| held.contains(&pos)), "{head:?}: {held:?}");
    }
    // all rows come back before the next answer, which is voted on anew
    assert_eq!(handle.expand(&app, 0, 40), (GVOTE_OK, N as u32 + 60), "{}", handle.error());
    app.decode(&[(0, START + 60, &words(40, 1))]);
    let start = START + 100;
    let next: Vec<_> = (0..30).filter(|i| step(&app, &handle, 0, start, start + i).1.is_some()).collect();
    assert_eq!(next, [20]);
}

#[test]
fn a_short_answer_pays_nothing_and_by_hand_there_is_no_vote() {
    let never = gvote_params { when: GVOTE_WHEN_NEVER, ..after(0) };
    let full = gvote_params { policy: GVOTE_POLICY_FULL, when: GVOTE_WHEN_AFTER, vote_after: 5, ..defaults() };
    for (params, n) in [(after(20), 20), (defaults(), 63), (never, 60), (full, 20)] {
        let (app, handle) = asked(&ONE, &params);
        assert!(votes(&app, &handle, 0, n).is_empty());
        assert_eq!(handle.cells(&app, 0), (GVOTE_OK, (N + n) as u32));
    }
}

/// With a tiny model, the cache is half of the bytes that a step reads. The app pauses after each token; this pause
/// counts as the time of a step if llama.cpp does not measure the decoding.
#[test]
fn a_vote_comes_when_that_pays() {
    for (no_perf, expected) in [(true, Some(64)), (false, None)] {
        let app = App::with(&tiny("llama"), &ONE, |params| params.no_perf = no_perf);
        // a trial would take as long as hundreds of steps
        let handle = Handle::with(&app, &gvote_params { target_kl: 0.0, ..defaults() });
        app.decode(&[(0, 0, &words(N, 0))]);
        let mut first = None;
        for i in 0..68 {
            let (status, report) = step(&app, &handle, 0, START, START + i);
            assert_eq!(status, GVOTE_OK, "{}", handle.error());
            // llama.cpp counts a step when its outputs are asked for
            app.logits(0);
            thread::sleep(Duration::from_millis(20));
            first = first.or(report.map(|_| i));
        }
        assert_eq!(first, expected, "no_perf {no_perf}");
    }
}

/// With a real model, a few hundred cells are small compared with the weights.
#[test]
fn a_cache_that_is_small_beside_the_weights_is_never_voted_on_for_speed() {
    let model = fixture::model();
    let app = App::new(&model, &ONE);
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &fixture::tokens(&model, N))]);
    assert!(votes(&app, &handle, 0, 60).is_empty());
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, N as u32 + 60));
}

#[test]
fn a_vote_that_fails_says_so_once_and_the_answer_goes_on_with_all_cells() {
    let no_memory = || PRETEND_FULL.set(true);
    for expected in [GVOTE_ERROR_MEMORY, GVOTE_ERROR_CANCELLED, GVOTE_ERROR_PARAMS] {
        let ((app, handle), full) = (asked(&ONE, &after(10)), full(&ONE));
        match expected {
            GVOTE_ERROR_MEMORY => no_memory(),
            // SAFETY: the handle is alive.
            GVOTE_ERROR_CANCELLED => assert_eq!(unsafe { gvote_cancel(handle.0) }, GVOTE_OK),
            // more tokens are protected than cells may stay
            _ => assert_eq!(handle.protect(&app, 0, 0, 200, true), GVOTE_OK),
        }
        let mut statuses = Vec::new();
        for pos in START..START + 30 {
            let (status, report) = step(&app, &handle, 0, START, pos);
            assert!(report.is_none());
            assert!(status == GVOTE_OK || !handle.error().is_empty());
            statuses.push(status);
            full.decode(&[(0, pos, &[token(pos)])]);
            assert!(bits(&app) == bits(&full), "{pos}");
        }
        PRETEND_FULL.set(false);
        assert_eq!(statuses.iter().position(|status| *status == expected), Some(10), "{statuses:?}");
        assert_eq!(statuses.iter().filter(|status| **status != GVOTE_OK).count(), 1, "{statuses:?}");
        assert_eq!(handle.cells(&app, 0), (GVOTE_OK, N as u32 + 30));
    }
}

#[test]
fn sequences_in_common_batches_are_voted_on_by_themselves() {
    for unified in [true, false] {
        let app = App::new(&tiny("llama"), &Shape { n_ctx: 2048, n_seq_max: 2, unified, flash: false });
        let handle = Handle::with(&app, &after(15));
        app.decode(&[(0, 0, &words(N, 0)), (1, 0, &words(N + 20, 1))]);
        let starts = [START, START + 20];
        let mut voted = [None; 2];
        for i in 0..40 {
            for (seq, start) in starts.into_iter().enumerate() {
                // the second answer begins later
                if seq == 0 || i >= 5 {
                    let (status, report) = handle.vote_if_due(&app, seq as SeqId, start);
                    assert_eq!(status, GVOTE_OK, "{}", handle.error());
                    voted[seq] = voted[seq].or(report.map(|_| i));
                }
            }
            let first = (0, starts[0] + i, &[token(i)][..]);
            let second = (1, starts[1] + i - 5, &[token(i)][..]);
            app.decode(&[first, second][..if i >= 5 { 2 } else { 1 }]);
        }
        assert_eq!(voted, [Some(15), Some(20)], "unified {unified}");
        assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 150 + 25));
        assert_eq!(handle.cells(&app, 1), (GVOTE_OK, 150 + 20));
    }
}

#[test]
fn an_answer_that_is_begun_again_is_another_one_and_one_that_was_compressed_is_not() {
    let (app, handle) = asked(&ONE, &after(20));
    for _ in 0..2 {
        assert_eq!(votes(&app, &handle, 0, 25).len(), 1);
        assert_eq!(handle.truncate(&app, 0, START), GVOTE_OK, "{}", handle.error());
        assert_eq!(handle.expand(&app, 0, 30), (GVOTE_OK, N as u32), "{}", handle.error());
    }
    assert!(votes(&app, &handle, 0, 10).is_empty());
    handle.compressed(&app, 0);
    let more = (10..30).filter(|i| step(&app, &handle, 0, START, START + i).1.is_some()).count();
    assert_eq!(more, 0);
}

#[test]
fn what_an_app_protects_stays_protected() {
    let (app, handle) = asked(&ONE, &after(5));
    assert_eq!(handle.protect(&app, 0, START - 10, START, true), GVOTE_OK);
    assert_eq!(votes(&app, &handle, 0, 100).len(), 1);
    handle.compressed(&app, 0);
    let held = handle.positions(&app, 0, 0, 0);
    assert!((START - 10..START).all(|pos| held.contains(&pos)), "{held:?}");
    assert!((START - 64..START - 10).any(|pos| !held.contains(&pos)), "the rest of the question may go");
}

#[test]
fn an_answer_that_is_not_there_is_refused() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::with(&app, &after(0));
    assert_eq!(handle.vote_if_due(&app, 0, 0).0, GVOTE_ERROR_NOT_SEEN);
    app.decode(&[(0, 0, &words(N, 0))]);
    for start in [START + 1, Pos::MAX] {
        assert_eq!(handle.vote_if_due(&app, 0, start).0, GVOTE_ERROR_NOT_SEEN);
        assert!(handle.error().contains("ends before"), "{}", handle.error());
    }
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, N as u32));
    let before = app.state(0);
    // everything would have to stay
    assert_eq!(handle.vote_if_due(&app, 0, Pos::MIN).0, GVOTE_ERROR_PARAMS);
    assert!(app.state(0) == before);
}

/// A call before each token takes a negligible time compared with the token.
#[test]
fn a_call_that_is_not_due_costs_next_to_nothing() {
    let app = App::new(&tiny("llama"), &Shape { n_ctx: 8192, ..ONE });
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &words(8000, 0))]);
    app.decode(&[(0, 8000, &[5])]);
    let round = |_| {
        let clock = Instant::now();
        (0..1000).for_each(|_| assert_eq!(handle.vote_if_due(&app, 0, 8000).0, GVOTE_OK));
        clock.elapsed() / 1000
    };
    let call = (0..20).map(round).min().unwrap();
    println!("{call:?} a call");
    assert!(call < Duration::from_micros(20), "{call:?}");
}
