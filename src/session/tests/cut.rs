//! Truncation is exact, or refused.

use super::*;
use crate::policy::{Evict, Span};
use crate::tests::fixture::{F16, F16_FLASH, Q8_0};

fn apart(a: &Session, b: &Session) -> f32 {
    a.logits().iter().zip(b.logits()).fold(0f32, |most, (a, b)| most.max((a - b).abs()))
}

#[test]
fn a_marked_place_is_come_back_to_as_if_what_followed_had_never_been() {
    for setup in [F16, F16_FLASH, Q8_0] {
        let start = || {
            let mut session = open("llama", setup, N_CTX, quick());
            read(&mut session, &words(230, 1));
            session.compress().unwrap();
            session.mark();
            session
        };
        let (mut straight, mut detour) = (start(), start());
        let pos = detour.n_past();
        read(&mut detour, &words(40, 2));
        answer(&mut detour, 10);
        detour.truncate(pos).unwrap();
        assert!(detour.save() == straight.save(), "{setup:?}");
        // generate again without the message, then with another message
        assert_eq!(answer(&mut detour, 5), answer(&mut straight, 5));
        detour.truncate(pos).unwrap();
        straight.truncate(pos).unwrap();
        for session in [&mut detour, &mut straight] {
            read(session, &words(60, 3));
            session.compress().unwrap();
            answer(session, 5);
        }
        assert!(detour.save() == straight.save(), "{setup:?}");
    }
}

/// Often no head keeps the last token among those that a vote may drop.
#[test]
fn at_the_first_place_where_a_session_can_be_cut_it_goes_on() {
    const N: usize = 250;
    let policy = Params { evict: Evict::Cells, span: Span { back: 0, forward: 0 }, max_cells: Some(80), ..quick() };
    let mut moved = 0;
    for kind in 0..6 {
        let mut session = open("llama", F16, N_CTX, policy.clone());
        read(&mut session, &words(N, kind));
        session.compress().unwrap();
        let exact_from = session.exact_from();
        assert!(session.truncate(exact_from - 1).is_err());
        session.truncate(exact_from).unwrap();
        read(&mut session, &words(20, 2));
        assert_eq!(session.n_past(), exact_from + 20);
        moved += usize::from(exact_from as usize > N - policy.recent);
    }
    assert!(moved > 0);
}

#[test]
fn only_the_last_four_marks_are_kept_and_none_that_lies_in_what_was_cut_off() {
    let mut session = open("llama", F16, N_CTX, quick());
    let mut logits = Vec::new();
    for i in 0..5 {
        read(&mut session, &words(20, i));
        session.mark();
        logits.push(session.logits().to_vec());
    }
    session.truncate(60).unwrap();
    assert!(session.logits() == logits[2]);
    read(&mut session, &words(20, 7));
    read(&mut session, &words(20, 8));
    session.truncate(80).unwrap();
    assert!(session.logits().is_empty(), "that was another place");
    session.truncate(40).unwrap();
    assert!(session.logits() == logits[1]);
    session.truncate(20).unwrap();
    assert!(session.logits().is_empty(), "not remembered any more");
    session.truncate(0).unwrap();
    assert!(session.marks.is_empty());
}

#[test]
fn a_prefill_that_is_given_up_leaves_no_trace() {
    for (arch, setup) in [("llama", F16), ("llama", Q8_0), ("gemma2", F16), ("gemma2", F16_FLASH)] {
        let start = || {
            let mut session = open(arch, setup, 640, quick());
            read(&mut session, &words(120, 1));
            session
        };
        let (mut session, mut straight) = (start(), start());
        let before = session.save();
        // enough tokens for a window cache to overwrite cells that earlier tokens attended to
        let flow = |done, _| if done >= 400 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let error = session.prefill(&words(450, 2), flow).unwrap_err();
        assert!(matches!(error, SessionError::Llama(LlamaError::Cancelled)), "{error}");
        assert!(session.save() == before, "{arch}, {setup:?}");
        for session in [&mut session, &mut straight] {
            read(session, &words(30, 3));
        }
        assert!(apart(&session, &straight) < 0.02, "{arch}, {setup:?}: {}", apart(&session, &straight));
    }
}

/// Of a window cache, only the cells that the next token sees are saved.
#[test]
fn beside_a_window_a_cut_is_exact_or_refused() {
    for setup in [F16, F16_FLASH] {
        let tokens = words(300, 1);
        let mut session = open("gemma2", setup, 640, quick());
        read(&mut session, &tokens[..200]);
        assert_eq!(session.exact_from(), 0, "nothing was dropped yet");
        let saved = session.save();
        session.load(&saved).unwrap();
        read(&mut session, &tokens[200..]);
        assert_eq!((session.exact_from(), session.sequence.exact_from), (199, 0));
        let before = session.save();
        let error = session.truncate(198).unwrap_err();
        assert!(matches!(error, SessionError::Compressed(198, 199)), "{error}");
        assert!(session.save() == before);

        session.truncate(199).unwrap();
        let mut straight = open("gemma2", setup, 640, quick());
        read(&mut straight, &tokens[..199]);
        for session in [&mut session, &mut straight] {
            read(session, &words(20, 2));
        }
        assert!(apart(&session, &straight) < 0.02, "{setup:?}: {}", apart(&session, &straight));
        session.truncate(0).unwrap();
        assert_eq!(session.exact_from(), 0);
    }
}

/// The cache is so short, and the vote drops so much, that the window is larger than the part that stays: a message may
/// then overwrite the window of the token before it.
#[test]
fn a_prefill_that_is_given_up_brings_the_window_back() {
    let policy = Params { window: 16, recent: 16, sinks: 4, max_cells: Some(24), ..quick() };
    // together with the spare cells a multiple of 256, so that llama.cpp adds none
    let n_ctx = 768 - Voter::spare_cells(&policy);
    let start = || {
        let mut session = open("gemma2", F16, n_ctx, policy.clone());
        read(&mut session, &words(560, 1));
        session.compress().unwrap();
        session
    };
    let (mut session, mut straight) = (start(), start());
    let before = session.save();
    let room = session.room();
    let flow = |done, of| if done == of { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    session.prefill(&words(room, 2), flow).unwrap_err();
    assert!(session.save() == before);
    assert_eq!(cache::cut_from(&session.ctx, SEQ), 559, "it was lost and is back, and no more than that");
    for session in [&mut session, &mut straight] {
        read(session, &words(30, 3));
    }
    assert!(apart(&session, &straight) < 0.02, "{}", apart(&session, &straight));
}

/// Where cells can be cut anywhere, a message needs no copy, however long the text before it is. Only a window cache
/// needs one.
#[test]
fn what_can_be_cut_is_not_copied() {
    for (arch, is_copied) in [("llama", false), ("gemma2", true)] {
        let mut session = open(arch, F16, 640, quick());
        read(&mut session, &words(500, 1));
        assert_eq!(!session.ctx.copy_uncut(SEQ).unwrap().is_empty(), is_copied, "{arch}");
    }
}
