//! More tokens than cells.

use std::ops::ControlFlow;
use std::ptr;

use super::app::*;
use crate::capi::*;
use crate::llama::{ContextParams, FlashAttention, Pos, Token};
use crate::tests::fixture;
use crate::vote::Voter;
use crate::{Session, SessionParams};

/// Tokens of a batch.
const STEP: usize = 100;

/// Reads a text as the header describes.
pub fn read_long(app: &App, handle: &Handle, tokens: &[Token], step: usize) -> usize {
    let mut freed = 0;
    for start in (0..tokens.len()).step_by(step) {
        let part = &tokens[start..tokens.len().min(start + step)];
        let (status, report) = handle.make_room(app, 0, part.len(), &tokens[start..]);
        assert_eq!(status, GVOTE_OK, "{}", handle.error());
        freed += usize::from(report.cells_after < report.cells_before);
        app.decode(&[(0, start as Pos, part)]);
    }
    freed
}

fn likeliest(logits: &[f32]) -> Token {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as Token
}

/// A real model and three times as many tokens as cells: the rows of every head, the logits, and the answer.
#[test]
fn a_prompt_longer_than_the_cache_is_read_as_by_a_session_and_answered() {
    const ANSWER: usize = 12;
    let model = fixture::model();
    let policy = crate::policy::Params::default();
    // llama.cpp rounds up to a multiple of 256
    let n_ctx = 512 - Voter::spare_cells(&policy);
    let tokens = fixture::tokens(&model, 3 * n_ctx);
    let context = ContextParams {
        n_ctx: n_ctx as u32,
        n_ubatch: STEP as u32,
        n_threads: 2,
        n_threads_batch: 2,
        flash_attn: FlashAttention::Off,
        ..ContextParams::default()
    };
    let mut session = Session::new(&model, &SessionParams { context, policy, ..Default::default() }).unwrap();
    let squeezes = session.prefill_long(&tokens, |_, _| ControlFlow::Continue(())).unwrap().squeezes;

    let app = App::with(&model, &Shape { n_ctx: 512, ..ONE }, |params| params.n_ubatch = STEP as u32);
    let handle = Handle::at(&app);
    assert_eq!(read_long(&app, &handle, &tokens, STEP), squeezes.count);
    assert!(squeezes.count >= 6, "{squeezes:?}");

    // an app's queries are captured when tokens are decoded once more, so that rounding decides between equal entries
    let cells = crate::cache::cells(session.context(), 0);
    let mut others = 0;
    for (layer, head) in (0..30).flat_map(|layer| (0..3).map(move |head| (layer, head))) {
        let expected = session.sequence().positions(&cells, layer as usize * 3 + head as usize);
        let held = handle.positions(&app, 0, layer, head);
        assert_eq!(held.len(), expected.len());
        others += held.iter().filter(|pos| !expected.contains(pos)).count();
    }
    assert!(others * 500 < 90 * cells.len(), "{others} of {} cells", 90 * cells.len());

    let last = tokens.len() as i32 % STEP as i32 - 1;
    let mut logits = app.logits(last).1;
    let mut answer = Vec::new();
    while answer.len() < ANSWER {
        let token = likeliest(&logits);
        assert_eq!(handle.make_room(&app, 0, 1, &[]).0, GVOTE_OK, "{}", handle.error());
        app.decode(&[(0, (tokens.len() + answer.len()) as Pos, &[token])]);
        answer.push(token);
        logits = app.logits(0).1;
        assert!(logits.iter().all(|logit| logit.is_finite()));
    }
}

#[test]
fn where_there_is_room_nothing_happens() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::at(&app);
    let spare = Voter::spare_cells(&crate::policy::Params::default());
    // there is room for an empty sequence too
    assert_eq!(handle.make_room(&app, 0, 768 - spare, &[]).0, GVOTE_OK);
    app.decode(&[(0, 0, &words(300, 0))]);
    let before = app.state(0);
    let (status, report) = handle.make_room(&app, 0, 468 - spare, &[]);
    assert_eq!((status, report.cells_before, report.cells_after), (GVOTE_OK, 300, 300));
    assert!(app.state(0) == before);
    let (status, report) = handle.make_room(&app, 0, 469 - spare, &[]);
    assert_eq!((status, report.bound), (GVOTE_OK, GVOTE_BOUND_MAX_CELLS));
    assert!(report.cells_after < 300);
}

#[test]
fn an_answer_goes_on_without_end() {
    for arch in ["llama", "gemma2"] {
        let app = App::new(&tiny(arch), &Shape { n_ctx: 512, ..ONE });
        let handle = Handle::with(&app, &gvote_params { policy: GVOTE_POLICY_SNAPKV, ..defaults() });
        for (i, token) in words(1500, 0).into_iter().enumerate() {
            assert_eq!(handle.make_room(&app, 0, 1, &[]).0, GVOTE_OK, "{arch}: {}", handle.error());
            app.decode(&[(0, i as Pos, &[token])]);
        }
        let (status, cells) = handle.cells(&app, 0);
        assert!(status == GVOTE_OK && cells <= 512, "{arch}: {cells}");
    }
}

/// In one stream, the cells of all sequences count, but only one sequence loses cells. With a stream each, no other
/// sequence matters.
#[test]
fn only_the_sequence_that_is_named_gives_cells() {
    let spare = Voter::spare_cells(&crate::policy::Params::default());
    for (unified, n_ctx, free) in [(true, 1024, 1024 - 750), (false, 2048, 1024 - 450)] {
        let app = App::new(&tiny("llama"), &Shape { n_ctx, n_seq_max: 2, unified, flash: false });
        let handle = Handle::at(&app);
        app.decode(&[(0, 0, &words(300, 0)), (1, 0, &words(450, 1))]);
        let other = app.state(0);
        assert_eq!(handle.make_room(&app, 1, free - spare, &[]).1.cells_after, 450, "unified: {unified}");
        let needed = free - spare + 50;
        let (status, report) = handle.make_room(&app, 1, needed, &words(40, 2));
        assert_eq!((status, report.cells_before), (GVOTE_OK, 450), "{}", handle.error());
        assert!(report.cells_after <= 400, "unified: {unified}, {report:?}");
        assert!(app.state(0) == other);
        // the room suffices
        app.decode(&[(1, 450, &words(needed, 3))]);
        assert_eq!(handle.cells(&app, 1), (GVOTE_OK, report.cells_after + needed as u32));
    }
}

#[test]
fn what_cannot_be_freed_is_refused_and_nothing_is_lost() {
    let app = App::new(&tiny("llama"), &Shape { n_ctx: 512, n_seq_max: 2, ..ONE });
    let handle = Handle::at(&app);
    let text = words(300, 0);
    app.decode(&[(0, 0, &text)]);
    let (before, known, logits) = (app.state(0), handle.save(&app, 0), app.logits(299));
    let check = |outcome: (gvote_status, gvote_report), expected: gvote_status, words: &str| {
        assert_eq!(outcome.0, expected, "{}", handle.error());
        assert!(handle.error().contains(words) && !handle.error().contains("--"), "{}", handle.error());
        assert!(app.state(0) == before && app.logits(299) == logits, "{words}");
    };
    for needed in [400, 448, 512, 10_000, u32::MAX as usize] {
        check(handle.make_room(&app, 0, needed, &[]), GVOTE_ERROR_NO_CELLS, "sinks and recent");
    }
    // an empty sequence has no cells to free
    check(handle.make_room(&app, 1, 200, &[]), GVOTE_ERROR_NO_CELLS, "sequence 1");
    check(handle.make_room(&app, 0, 200, &[3, 64, 5]), GVOTE_ERROR_DECODE, "");
    check(handle.make_room(&app, 0, 200, &[-1]), GVOTE_ERROR_DECODE, "");
    // SAFETY: all objects are alive; a text of this stated length is not read.
    let status = unsafe { gvote_make_room(handle.0, app.ctx, 0, 200, text.as_ptr(), usize::MAX / 2, ptr::null_mut()) };
    check((status, report()), GVOTE_ERROR_SIZE, "tokens");
    // SAFETY: all objects are alive.
    unsafe { gvote_cancel(handle.0) };
    check(handle.make_room(&app, 0, 200, &text), GVOTE_ERROR_CANCELLED, "");
    // SAFETY: all objects are alive.
    unsafe { gvote_cancel_clear(handle.0) };
    assert!(handle.save(&app, 0) == known);

    // SAFETY: valid memory.
    unsafe { crate::sys::llama_memory_seq_cp(app.memory(), 0, 1, -1, -1) };
    check(handle.make_room(&app, 0, 200, &[]), GVOTE_ERROR_SHARED, "");
    app.remove(1, -1, -1);
    assert_eq!(handle.make_room(&app, 0, 200, &[]).0, GVOTE_OK, "{}", handle.error());
}

#[test]
fn the_full_policy_drops_nothing() {
    let app = App::new(&tiny("llama"), &Shape { n_ctx: 512, ..ONE });
    let handle = Handle::with(&app, &gvote_params { policy: GVOTE_POLICY_FULL, ..defaults() });
    app.decode(&[(0, 0, &words(300, 0))]);
    assert_eq!(handle.make_room(&app, 0, 100, &[]).0, GVOTE_OK);
    assert_eq!(handle.make_room(&app, 0, 200, &[]).0, GVOTE_ERROR_NO_CELLS);
    assert!(handle.error().contains("full drops nothing"), "{}", handle.error());
}

#[test]
fn cells_that_a_vote_needs_are_missed_in_time() {
    let app = App::new(&tiny("llama"), &Shape { n_ctx: 512, ..ONE });
    let handle = Handle::at(&app);
    // decoded without asking for room
    app.decode(&[(0, 0, &words(510, 0))]);
    let before = app.state(0);
    assert_eq!(handle.make_room(&app, 0, 1, &[]).0, GVOTE_ERROR_NO_CELLS, "{}", handle.error());
    assert!(handle.error().contains("free"), "{}", handle.error());
    assert!(app.state(0) == before);
}
