//! A failed vote leaves the session unchanged, and a vote in a full context does not fail.

use std::sync::atomic::Ordering;
use std::thread;

use super::*;
use crate::policy::{Decision, HeadScores, Policy, Ranking};
use crate::tests::fixture::{F16, Q8_0};
use crate::vote::uniform_shape;

const N: usize = 160;
/// Number of moments to cancel at, spread over the duration of the work.
const MOMENTS: u32 = 6;

fn replaying() -> Params {
    Params { replay: true, ..Params::default() }
}

/// Returns a ranking with invented scores, without a vote.
fn ranking(session: &Session) -> Ranking {
    let n = session.cells_used();
    let shape = uniform_shape(&session.voter.as_ref().unwrap().layout, n).unwrap();
    let mut policy: Box<dyn Policy + Send> = policy::build(&session.policy, shape).unwrap();
    let scores: Vec<f32> = (0..n).map(|j| ((37 * j) % 101) as f32).collect();
    for head in 0..shape.heads() {
        policy.observe(
            head,
            &HeadScores {
                future: &scores,
                observed: &scores,
                value_norm: &scores,
                key_similarity: &scores,
                ..HeadScores::NONE
            },
        );
    }
    match policy.decide() {
        Decision::Ranking(ranking) => ranking,
        Decision::Selection(_) => panic!("the default settings want a trial"),
    }
}

fn try_out(session: &mut Session) -> Result<(), SessionError> {
    let ranking = ranking(session);
    Ok(session.vote().unwrap().try_out(&ranking).map(|trial| assert!(trial.is_some()))?)
}

fn replay(session: &mut Session) -> Result<(), SessionError> {
    let cells = cache::cells(&session.ctx, SEQ);
    Ok(session.vote().unwrap().replay(&cells).map(|_| ())?)
}

/// Runs `work` repeatedly, each time cancelled a bit later.
fn cancel_at_many_moments(session: &mut Session, work: fn(&mut Session) -> Result<(), SessionError>) {
    let before = session.save();
    let clock = Instant::now();
    work(session).unwrap();
    let whole = clock.elapsed();
    assert!(session.save() == before, "without being cancelled");

    let mut cancelled = 0;
    for moment in 0..MOMENTS {
        let flag = session.cancel_flag();
        let thread = thread::spawn(move || {
            thread::sleep(whole * moment / MOMENTS);
            flag.store(true, Ordering::Relaxed);
        });
        let result = work(session);
        thread.join().unwrap();
        session.cancel_flag().store(false, Ordering::Relaxed);
        match result {
            Ok(()) => {}
            Err(SessionError::Llama(LlamaError::Cancelled)) => cancelled += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(session.save() == before, "cancelled at {moment} of {MOMENTS}");
    }
    assert!(cancelled >= 2, "cancelled {cancelled} times");
}

/// Returns the saved session after a vote and one more token.
fn vote(session: &mut Session) -> Vec<u8> {
    session.compress().unwrap();
    session.decode(100).unwrap();
    session.save()
}

#[test]
fn a_cancelled_trial_leaves_no_trace() {
    let undisturbed = vote(&mut after(N, F16, 448, 64, Params::default()));
    let mut session = after(N, F16, 448, 64, Params::default());
    cancel_at_many_moments(&mut session, try_out);
    assert!(vote(&mut session) == undisturbed, "a later vote is not changed by it");
}

#[test]
fn a_cancelled_replay_leaves_no_trace() {
    let undisturbed = vote(&mut after(N, F16, 448, 64, replaying()));
    let mut session = after(N, F16, 448, 64, replaying());
    cancel_at_many_moments(&mut session, replay);
    assert!(vote(&mut session) == undisturbed, "a later vote is not changed by it");
}

/// Cancels `work` at each moment that llama.cpp or a vote checks for cancellation, or at a sample of these moments if
/// there are many.
fn cancel_whenever_it_can_be(
    session: &mut Session,
    name: &str,
    work: impl Fn(&mut Session) -> Result<(), SessionError>,
) {
    const MOMENTS: usize = 100;
    let before = session.save();
    session.ctx.cancel_at(0);
    work(session).unwrap();
    let after = session.save();
    assert!(after != before, "{name} does something");
    let times = session.ctx.cancel_at(0);
    assert!(times > 10, "{name} can be cancelled {times} times");
    session.load(&before).unwrap();
    for at in (1..=times).step_by(times.div_ceil(MOMENTS)) {
        session.ctx.cancel_at(at);
        let error = work(session).expect_err(name);
        assert!(matches!(error, SessionError::Llama(LlamaError::Cancelled)), "{name}: {error}");
        session.ctx.cancel_at(0);
        assert!(session.save() == before, "{name}, cancelled at {at} of {times}");
    }
    work(session).unwrap();
    assert!(session.save() == after, "{name} is not changed by having been cancelled");
}

#[test]
fn a_vote_cancelled_at_any_moment_leaves_no_trace() {
    let trial = Params { target_kl: Some(1e-4), draft: 8, window: 16, recent: 16, ..Params::default() };
    for (name, policy) in [
        ("a vote without a trial", Params { target_kl: None, ..trial.clone() }),
        ("a vote with a trial", trial.clone()),
        ("the paper's vote", Params { policy: Kind::GvotePaper, ..trial.clone() }),
    ] {
        for setup in [F16, Q8_0] {
            let mut session = open("llama", setup, N_CTX, policy.clone());
            read(&mut session, &words(200, 1));
            // the tokens of the answer are observed first
            answer(&mut session, 20);
            let compress = |session: &mut Session| session.compress().map(|_| ());
            cancel_whenever_it_can_be(&mut session, &format!("{name}, {setup:?}"), compress);
        }
    }
}

#[test]
fn a_prefill_or_a_step_cancelled_at_any_moment_leaves_no_trace() {
    let mut session = open("llama", F16, N_CTX, quick());
    read(&mut session, &words(100, 1));
    cancel_whenever_it_can_be(&mut session, "a prefill", |session| {
        session.prefill(&words(150, 2), |_, _| ControlFlow::Continue(())).map(|_| ())
    });
    cancel_whenever_it_can_be(&mut session, "a step", |session| session.decode(5));
}

/// Where an answer needs room, either no cell was freed or all of them were.
#[test]
fn an_answer_cancelled_while_room_is_made_is_whole() {
    let mut session = open("llama", F16, N_CTX, quick());
    read(&mut session, &words(N_CTX - 20, 1));
    assert_eq!(answer(&mut session, 20).len(), 20);
    assert_eq!(session.room(), 0);
    let before = session.save();
    session.ctx.cancel_at(0);
    assert_eq!(generate(&mut session, 1), Stop::Limit);
    let times = session.ctx.cancel_at(0);
    let after = session.save();
    let mut freed = 0;
    for at in 1..=times {
        session.load(&before).unwrap();
        session.ctx.cancel_at(at);
        assert_eq!(generate(&mut session, 1), Stop::Cancelled, "at {at} of {times}");
        session.ctx.cancel_at(0);
        if session.room() == 0 {
            assert!(session.save() == before, "cancelled at {at} of {times}");
        } else {
            freed += 1;
        }
        assert_eq!(generate(&mut session, 1), Stop::Limit);
        assert!(session.save() == after, "cancelled at {at} of {times}");
    }
    assert!(freed > 0 && freed < times, "{freed} of {times}");
}

fn generate(session: &mut Session, n: i32) -> Stop {
    let mut sampler =
        Sampler::new(session.model(), &SamplerParams { temp: 0.0, ..SamplerParams::default() }, 0).unwrap();
    session.generate(&mut sampler, n, |_| ControlFlow::Continue(())).unwrap().stop
}

#[test]
fn a_trial_or_replay_without_a_free_cell_leaves_no_trace() {
    for work in [try_out, replay] {
        // no free cell, or too few for the whole vote
        for free in [0, 10] {
            let mut session = session(F16, 192, 64, Params::default());
            let size = session.ctx.n_ctx();
            // as if no spare cells existed
            session.limit = size;
            read(&mut session, &fixture::tokens(&fixture::model(), size - free));
            let before = session.save();
            let error = work(&mut session).unwrap_err();
            assert!(matches!(error, SessionError::Llama(LlamaError::NoCells { .. })), "{error}");
            assert!(session.save() == before, "{free} free");
            session.truncate(100).unwrap();
            read(&mut session, &fixture::tokens(&fixture::model(), 150)[100..]);
            work(&mut session).unwrap();
        }
    }
}

#[test]
fn a_full_context_can_still_be_voted_on() {
    for policy in [Params { draft: 100, ..Params::default() }, replaying()] {
        // a multiple of 256, so that llama.cpp adds no cells of its own
        let n_ctx = 768 - Voter::spare_cells(&policy);
        let mut session = after(n_ctx, F16, n_ctx, 512, policy.clone());
        assert_eq!(session.spare(), Voter::spare_cells(&policy));
        assert_eq!(session.room(), 0);
        let report = session.compress().unwrap();
        assert!(report.cells_after < n_ctx, "{report:?}");
        assert_eq!(report.tried.is_empty(), policy.replay);
        assert_eq!(session.room(), n_ctx - report.cells_after);
        session.decode(100).unwrap();
    }
}

#[test]
fn settings_that_need_more_spare_cells_are_refused_by_name() {
    let n_ctx = 512 - Voter::spare_cells(&Params::default());
    let mut session = session(F16, n_ctx, 64, Params::default());
    let spare = session.spare();
    for (change, flag) in [
        (Params { draft: spare + 1, ..Params::default() }, "draft"),
        (Params { samples: spare + 1, ..Params::default() }, "samples"),
        (replaying(), "replay"),
    ] {
        let error = session.set_policy(change, false).unwrap_err();
        assert!(matches!(error, SessionError::Fixed(named) if named == flag), "{flag}: {error}");
        assert_eq!(session.policy(), &Params::default());
    }
    session.set_policy(Params { draft: spare, ..Params::default() }, false).unwrap();
}
