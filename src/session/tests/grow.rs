//! A session that grows equals one that had the cells from the start.

use std::sync::atomic::Ordering;

use super::*;
use crate::tests::fixture::{F16, F16_FLASH, Q8_0};

/// Returns a session of `n_ctx` cells that may grow to `N_MOST`, and one that has them from the start.
fn growing(arch: &str, setup: Setup, n_ctx: usize, policy: Params) -> [Session; 2] {
    const N_MOST: usize = 900;
    let mut small = open(arch, setup, n_ctx, policy.clone());
    small.grow_to = N_MOST;
    [small, open(arch, setup, N_MOST, policy)]
}

#[track_caller]
fn assert_alike(arch: &str, [a, b]: &[Session; 2], name: &str) {
    assert_eq!((a.n_past(), a.cells_used()), (b.n_past(), b.cells_used()), "{name}");
    let apart = a.logits().iter().zip(b.logits()).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    // llama.cpp does not save cells outside the window, so that sums add up in another order
    assert!(apart <= if arch == "gemma2" { 0.05 } else { 0.0 }, "{name}: {apart}");
}

/// Prompts, votes, answers and truncation may each need more cells.
#[test]
fn whatever_asks_for_more_cells_gets_them() {
    for (arch, setup) in [("llama", F16), ("llama", F16_FLASH), ("qwen2", Q8_0), ("gemma2", F16)] {
        let mut both = growing(arch, setup, 100, quick());
        let mut sizes = vec![both[0].n_ctx()];
        let mut step = |both: &mut [Session; 2], name: &str, work: &dyn Fn(&mut Session)| {
            both.iter_mut().for_each(work);
            assert_alike(arch, both, &format!("{arch} {setup:?} {name}"));
            sizes.push(both[0].n_ctx());
        };
        step(&mut both, "prompt", &|session| read(session, &words(90, 1)));
        step(&mut both, "answer", &|session| _ = answer(session, 30));
        step(&mut both, "long prompt", &|session| {
            session.prefill_long(&words(560, 2), |_, _| ControlFlow::Continue(())).unwrap();
        });
        step(&mut both, "vote", &|session| {
            let report = session.compress().unwrap();
            assert!(report.cells_after < report.cells_before);
            session.mark();
        });
        step(&mut both, "more", &|session| read(session, &words(600, 3)));
        // back to a mark set in a smaller context, unless the window has moved on
        if arch != "gemma2" {
            step(&mut both, "back", &|session| session.truncate(680).unwrap());
            step(&mut both, "again", &|session| {
                read(session, &words(40, 4));
                session.compress().unwrap();
                answer(session, 5);
            });
        }
        assert!(sizes[0] == 100 && sizes[2] > 100 && sizes.is_sorted() && sizes.last() == Some(&900), "{sizes:?}");
    }
}

#[test]
fn where_it_may_not_grow_cells_are_freed() {
    let mut session = open("llama", F16, 200, quick());
    session.prefill_long(&words(500, 1), |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!((session.n_ctx(), session.take_stuck()), (200, None));
    // a session that has grown as far as it may
    let [mut session, _] = growing("llama", F16, 200, quick());
    session.prefill_long(&words(2000, 1), |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!((session.n_ctx(), session.take_stuck()), (900, None));
    assert!(session.cells_used() <= 900);
}

#[test]
fn without_memory_for_more_it_stays_as_it_is_and_says_so() {
    let mut session = open("llama", F16, 200, quick());
    // more than any machine has
    session.grow_to = usize::MAX;
    session.grow_until(1 << 40);
    assert_eq!(session.n_ctx(), 200);
    let stuck = session.take_stuck().unwrap();
    let (needed, available) = stuck.memory.unwrap();
    assert!(stuck.n_ctx == 200 && needed > available, "{stuck:?}");
    session.prefill_long(&words(500, 1), |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!((session.n_ctx(), session.take_stuck()), (200, None));
}

#[test]
fn the_flag_that_cancels_stays_the_same() {
    let [mut session, _] = growing("llama", F16, 100, quick());
    let flag = session.cancel_flag();
    read(&mut session, &words(300, 1));
    assert!(session.n_ctx() > 100);
    flag.store(true, Ordering::Relaxed);
    let cancelled = session.prefill(&words(300, 1), |_, _| ControlFlow::Continue(()));
    assert!(matches!(cancelled, Err(SessionError::Llama(LlamaError::Cancelled))), "{cancelled:?}");
}

#[test]
fn a_saved_session_brings_its_cells_along() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved");
    let [mut small, mut large] = growing("llama", F16, 100, quick());
    read(&mut large, &words(600, 1));
    large.save_to(&path, b"").unwrap();
    small.load_from(&path, |_| Ok(())).unwrap();
    assert!(small.n_ctx() >= 600 && small.save() == large.save());
    let mut fixed = open("llama", F16, 100, quick());
    let error = fixed.load_from(&path, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("600 cells and there are 100"), "{error}");
}

/// No token is read that has no position.
#[test]
fn a_prompt_past_the_table_of_positions_is_refused_at_once() {
    for long in [false, true] {
        let mut session = open("starcoder", F16, 2000, quick());
        read(&mut session, &words(100, 1));
        let before = session.save();
        let mut progress = |done: usize, _| -> ControlFlow<()> { panic!("{done} tokens were read") };
        let tokens = words(1024, 1);
        let refused =
            if long { session.prefill_long(&tokens, progress) } else { session.prefill(&tokens, &mut progress) };
        assert!(matches!(refused, Err(SessionError::Llama(LlamaError::NoPositions { n: 1024, .. }))), "{refused:?}");
        assert!(session.save() == before);
    }
}
