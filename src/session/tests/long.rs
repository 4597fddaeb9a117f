//! More tokens than cells.

use super::*;
use crate::session::Stop;
use crate::tests::fixture::{F16, greedy};

const N_CTX: usize = 320;

fn read_long(session: &mut Session, tokens: &[Token]) -> PrefillReport {
    session.prefill_long(tokens, |_, _| ControlFlow::Continue(())).unwrap()
}

#[test]
fn a_prompt_longer_than_the_cache_is_read_and_answered() {
    for kind in [Kind::Gvote, Kind::SnapKv, Kind::StreamingLlm] {
        let mut session = session(F16, N_CTX, 128, Params::new(kind));
        let tokens = fixture::tokens(&fixture::model(), 900);
        let report = read_long(&mut session, &tokens);
        assert!(report.tokens == 900 && report.squeezes.count >= 7, "{kind}: {report:?}");
        assert_eq!(session.n_past(), 900, "{kind}");
        assert!(session.cells_used() <= N_CTX, "{kind}: {}", session.cells_used());
        let vote = session.compress().unwrap();
        assert!(vote.cells_after <= vote.cells_before, "{kind}");
        assert_eq!(greedy(&mut session, 4).0.len(), 4, "{kind}");
    }
}

#[test]
fn a_prompt_that_fits_is_read_as_always() {
    let tokens = fixture::tokens(&fixture::model(), 300);
    let [mut long, mut short] = [(), ()].map(|()| session(F16, N_CTX, 128, Params::default()));
    assert_eq!(read_long(&mut long, &tokens).squeezes.count, 0);
    read(&mut short, &tokens);
    assert!(long.save() == short.save() && long.logits() == short.logits());
}

/// Share of all heads and `positions` for which the head holds the token.
fn held(session: &Session, positions: std::ops::Range<Pos>) -> f64 {
    let cells = cache::cells(&session.ctx, SEQ);
    let heads: usize = session.voter.as_ref().unwrap().layout.n_head_kv().sum();
    let of_head = |head| {
        let held = session.sequence.positions(&cells, head);
        held.into_iter().filter(|pos| positions.contains(pos)).count()
    };
    (0..heads).map(of_head).sum::<usize>() as f64 / (heads * positions.len()) as f64
}

#[test]
fn what_the_question_at_the_end_asks_for_stays() {
    let model = fixture::model();
    let needle = model.tokenize("\nThe password of the lighthouse is 48213.\n", false, false).unwrap();
    let question =
        model.tokenize("\nQuestion: What is the password of the lighthouse?\nAnswer: 4", false, false).unwrap();
    let text = fixture::tokens(&model, 1000);
    let place = 200;
    let prompt = [&text[..place], &needle, &text[place..], &question].concat();
    let at = place as Pos..(place + needle.len()) as Pos;

    let kept = [prompt.as_slice(), &prompt[..prompt.len() - question.len()]].map(|tokens| {
        let mut session = session(F16, N_CTX, 128, Params::default());
        read_long(&mut session, tokens);
        (held(&session, at.clone()), held(&session, 100..180))
    });
    let [(asked, other), (unasked, _)] = kept;
    assert!(asked > 1.4 * other, "{asked} of the needle, {other} of what stands before it");
    assert!(asked > 1.1 * unasked, "{asked} with the question, {unasked} without");
}

#[test]
fn an_answer_longer_than_the_cache_goes_on() {
    let mut session = after(200, F16, N_CTX, 128, Params::default());
    let (tokens, stop) = greedy(&mut session, 400);
    assert_eq!((tokens.len(), stop), (400, Stop::Limit));
    assert_eq!(session.n_past(), 600);
    assert!(session.cells_used() <= N_CTX);
}

#[test]
fn a_vote_may_follow_an_answer() {
    let mut session = after(300, F16, 600, 128, Params { ratio: Some(0.5), ..Params::default() });
    greedy(&mut session, 20);
    let before = session.save();
    let report = session.compress().unwrap();
    assert_eq!((report.cells_before, report.cells_after), (320, 160));
    assert!(session.save() != before);
}

#[test]
fn a_cache_with_no_cell_to_spare_refuses_and_stays_as_it_was() {
    let mut session = session(F16, 80, 64, Params::default());
    let tokens = fixture::tokens(&fixture::model(), 200);
    let error = session.prefill_long(&tokens, |_, _| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, SessionError::CacheTooSmall { n_ctx: 80, least: 91, protected: 0 }), "{error}");
    assert_eq!((session.n_past(), session.cells_used()), (0, 0));
    read(&mut session, &tokens[..60]);
    let (answer, stop) = greedy(&mut session, 100);
    assert_eq!((answer.len(), stop), (20, Stop::ContextFull));
}

#[test]
fn a_cancelled_reading_keeps_what_was_read_once_cells_were_freed() {
    let tokens = fixture::tokens(&fixture::model(), 900);
    for (cancel_at, left) in [(200, 0), (600, 640)] {
        let mut session = session(F16, N_CTX, 128, Params::default());
        let flow = |done, _| if done >= cancel_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let error = session.prefill_long(&tokens, flow).unwrap_err();
        assert!(matches!(error, SessionError::Llama(LlamaError::Cancelled)), "{error}");
        assert_eq!(session.n_past(), left, "cancelled at {cancel_at}");
        assert!(session.logits().is_empty());
        read_long(&mut session, &tokens[left as usize..]);
        assert_eq!(session.n_past(), 900);
    }
}

#[test]
fn the_full_policy_says_that_a_prompt_is_too_long() {
    let mut session = session(F16, N_CTX, 128, Params::new(Kind::Full));
    let tokens = fixture::tokens(&fixture::model(), 900);
    let error = session.prefill_long(&tokens, |_, _| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, SessionError::PromptTooLong { tokens: 900, room: N_CTX, .. }), "{error}");
}

/// A message that fails before it frees cells leaves no trace in cells, statistics, window and logits.
#[test]
fn a_reading_that_fails_before_anything_was_freed_leaves_no_trace() {
    for arch in ["llama", "gemma2"] {
        let mut session = open(arch, F16, N_CTX, quick());
        read(&mut session, &words(150, 1));
        let (before, logits) = (session.save(), session.logits().to_vec());
        for cancel_at in [64, 128] {
            let flow = |done, _| if done >= cancel_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            let error = session.prefill_long(&words(600, 2), flow).unwrap_err();
            assert!(matches!(error, SessionError::Llama(LlamaError::Cancelled)), "{error}");
            assert!(session.save() == before && session.logits() == logits, "{arch}, cancelled at {cancel_at}");
        }
        // the session continues as if nothing had happened
        let mut straight = open(arch, F16, N_CTX, quick());
        read(&mut straight, &words(150, 1));
        for session in [&mut session, &mut straight] {
            read_long(session, &words(600, 2));
        }
        let apart = session.logits().iter().zip(straight.logits()).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        // a restored window lies in other cells, so that sums add up in another order
        let is_alike = if arch == "gemma2" { apart < 0.05 } else { session.save() == straight.save() };
        assert!(is_alike && session.n_past() == straight.n_past(), "{arch}: {apart}");
    }
}

/// Learned positions end somewhere, and llama.cpp would abort the process there.
#[test]
fn a_table_of_positions_is_not_left() {
    const TABLE: usize = 1024;
    let mut session = open("starcoder", F16, N_CTX, quick());
    assert_eq!(session.model().n_positions(), Some(TABLE));
    assert_eq!(tiny::model("llama").n_positions(), None);
    let error = session.prefill_long(&words(TABLE + 76, 1), |_, _| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, SessionError::Llama(LlamaError::NoPositions { n: TABLE, .. })), "{error}");
    assert!(session.n_past() as usize <= TABLE && session.cells_used() <= N_CTX);
    session.clear();
    read_long(&mut session, &words(900, 1));
    let (tokens, stop) = greedy(&mut session, 400);
    assert_eq!(stop, Stop::ContextFull);
    assert!(tokens.len() <= TABLE - 900 + 1 && session.n_past() as usize <= TABLE, "{}", tokens.len());
    // the tokens of a vote lie behind the newest one
    let before = session.save();
    match session.compress() {
        Ok(_) => {}
        Err(SessionError::Llama(LlamaError::NoPositions { .. })) => assert!(session.save() == before),
        Err(error) => panic!("{error}"),
    }
}
