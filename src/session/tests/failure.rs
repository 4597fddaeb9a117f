//! A vote that fails leaves the session as it was, and one in a full context does not fail.

use std::sync::atomic::Ordering;
use std::thread;

use super::*;
use crate::policy::{Decision, HeadScores, Policy, Ranking};
use crate::tests::fixture::F16;
use crate::vote::uniform_shape;

const N: usize = 160;
/// When to cancel: after so many parts of the time that the work takes.
const MOMENTS: u32 = 6;

fn replaying() -> Params {
    Params { replay: true, ..Params::default() }
}

/// A ranking that needs no vote: the scores are made up.
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

/// Runs `work` again and again, each time cancelled a bit later.
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

/// What a session is after a vote and one more token.
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

#[test]
fn a_trial_or_replay_without_a_free_cell_leaves_no_trace() {
    for work in [try_out, replay] {
        // none is free, or too few for the whole of it
        for free in [0, 10] {
            let mut session = session(F16, 192, 64, Params::default());
            let size = session.ctx.n_ctx();
            // as if no cells had been set aside
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
        (Params { draft: spare + 1, ..Params::default() }, "--draft"),
        (Params { samples: spare + 1, ..Params::default() }, "--samples"),
        (replaying(), "--replay"),
    ] {
        let error = session.set_policy(change, false).unwrap_err();
        assert!(matches!(error, SessionError::Fixed(named) if named == flag), "{flag}: {error}");
        assert_eq!(session.policy(), &Params::default());
    }
    session.set_policy(Params { draft: spare, ..Params::default() }, false).unwrap();
}
