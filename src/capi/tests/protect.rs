//! Tokens that no vote may drop.

use std::ops::Range;

use super::app::*;
use super::room::read_long;
use crate::capi::*;
use crate::llama::{Pos, SeqId, Token};
use crate::sys;
use crate::tests::fixture;
use crate::tests::tiny::N_LAYER;

/// Layers and heads of the tiny models.
fn tiny_heads() -> impl Iterator<Item = (i32, u32)> {
    (0..N_LAYER as i32).flat_map(|layer| [(layer, 0), (layer, 1)])
}

/// Returns those of `positions` that each head has lost.
fn lost(
    app: &App,
    handle: &Handle,
    seq: SeqId,
    heads: impl Iterator<Item = (i32, u32)>,
    positions: &[Pos],
) -> Vec<Vec<Pos>> {
    let of_head = |(layer, head)| {
        let held = handle.positions(app, seq, layer, head);
        positions.iter().copied().filter(|pos| !held.contains(pos)).collect()
    };
    heads.map(of_head).collect()
}

fn lost_of_tiny(app: &App, handle: &Handle, seq: SeqId, positions: Range<Pos>) -> usize {
    lost(app, handle, seq, tiny_heads(), &positions.collect::<Vec<_>>()).concat().len()
}

/// Returns a chat with a system message, and the end of that message.
fn chat() -> (Vec<Token>, usize) {
    let model = fixture::model();
    let text = model.detokenize(&fixture::tokens(&model, 900), false);
    let mut messages = vec![("system", "Whatever is asked, you answer in rhymes and in one line.".to_owned())];
    let words: Vec<&str> = text.split_inclusive(' ').collect();
    for (part, role) in words.chunks(words.len() / 6).zip(["user", "assistant"].into_iter().cycle()) {
        messages.push((role, part.concat()));
    }
    (fixture::chat(&messages, false), fixture::chat(&messages[..1], false).len())
}

/// A real model, and a chat of more tokens than cells: the app names the system message, a setting protects the
/// markers.
#[test]
fn the_system_message_and_the_markers_stay_in_every_head_after_squeezes_and_votes() {
    let (tokens, system) = chat();
    let model = fixture::model();
    // SAFETY: valid model.
    let (n_layer, n_head_kv) =
        unsafe { (sys::llama_model_n_layer(model.as_ptr()), sys::llama_model_n_head_kv(model.as_ptr()) as u32) };
    let heads = || (0..n_layer).flat_map(|layer| (0..n_head_kv).map(move |head| (layer, head)));
    let named: Vec<Pos> = (0..system as Pos).collect();
    let markers: Vec<Pos> = (0..).zip(&tokens).filter(|(_, token)| model.is_control(**token)).map(|(i, _)| i).collect();
    assert!(markers.len() >= 14 && tokens.len() > 800, "{markers:?}");

    for (asks, evict) in [(true, GVOTE_EVICT_COMPOSITE), (true, GVOTE_EVICT_CELLS), (false, GVOTE_EVICT_COMPOSITE)] {
        let app = App::new(&model, &Shape { n_ctx: 512, ..ONE });
        let flags = if asks { GVOTE_FLAG_PROTECT } else { 0 };
        let handle = Handle::with(&app, &gvote_params { flags, evict, max_cells: 160, target_kl: 0.0, ..defaults() });
        app.decode(&[(0, 0, &tokens[..system])]);
        if asks {
            assert_eq!(handle.protect(&app, 0, 0, -1, true), GVOTE_OK, "{}", handle.error());
        }
        let mut freed = 0;
        for start in (system..tokens.len()).step_by(64) {
            let part = &tokens[start..tokens.len().min(start + 64)];
            let (status, report) = handle.make_room(&app, 0, part.len(), &tokens[start..]);
            assert_eq!(status, GVOTE_OK, "{}", handle.error());
            freed += usize::from(report.cells_after < report.cells_before);
            app.decode(&[(0, start as Pos, part)]);
        }
        assert!(freed >= 3, "{freed}");
        assert_eq!(handle.compressed(&app, 0).cells_after, 160);
        let of = |positions: &[Pos]| lost(&app, &handle, 0, heads(), positions).concat().len();
        let lost = (of(&named), of(&markers));
        if asks {
            assert_eq!(lost, (0, 0), "evict {evict}");
        } else {
            assert!(lost.0 > 0 && lost.1 > 0, "nothing would have been lost anyway: {lost:?}");
        }
    }
}

#[test]
fn what_is_protected_counts_where_cells_cannot_be_freed() {
    let app = App::new(&tiny("llama"), &Shape { n_ctx: 512, ..ONE });
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &words(400, 0))]);
    assert_eq!(handle.protect(&app, 0, 20, 320, true), GVOTE_OK);
    let (before, known) = (app.state(0), handle.save(&app, 0));
    for needed in [60, 100, 200] {
        assert_eq!(handle.make_room(&app, 0, needed, &[]).0, GVOTE_ERROR_NO_CELLS);
        // 4 sinks, 64 recent tokens, 300 protected ones
        assert!(handle.error().contains("at least 368 stay"), "{}", handle.error());
        assert!(handle.error().contains("300 protected"), "{}", handle.error());
    }
    // SAFETY: the handle is alive.
    let set = |max_cells| unsafe { gvote_set_params(handle.0, &gvote_params { max_cells, ..defaults() }) };
    assert_eq!(set(368), GVOTE_OK);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_PARAMS);
    let error = handle.error();
    assert!(
        error.contains("300 protected") && error.contains("`max_cells` to 369") && !error.contains("--"),
        "{error}"
    );
    assert!(app.state(0) == before && handle.save(&app, 0) == known);
    assert_eq!(set(369), GVOTE_OK);
    assert_eq!(handle.plan(&app, 0).1.cells_after, 369);

    // with fewer protected tokens there is room
    assert_eq!(handle.protect(&app, 0, 70, -1, false), GVOTE_OK);
    let (status, report) = handle.make_room(&app, 0, 100, &[]);
    assert_eq!(status, GVOTE_OK, "{}", handle.error());
    assert!(report.cells_after < 368, "{report:?}");
    assert_eq!(lost_of_tiny(&app, &handle, 0, 20..70), 0);
    assert!(lost_of_tiny(&app, &handle, 0, 70..320) > 0);
}

/// After a removal, by gvote or without it, another text comes to the same positions.
#[test]
fn what_was_removed_is_protected_no_longer() {
    for by_gvote in [true, false] {
        let app = App::new(&tiny("llama"), &ONE);
        let handle = Handle::with(&app, &gvote_params { max_cells: 120, ..defaults() });
        app.decode(&[(0, 0, &words(300, 0))]);
        assert_eq!(handle.protect(&app, 0, 60, 110, true), GVOTE_OK);
        if by_gvote {
            // SAFETY: both objects are alive.
            assert_eq!(unsafe { gvote_seq_truncate(handle.0, app.ctx, 0, 80) }, GVOTE_OK);
        } else {
            app.remove(0, 80, -1);
        }
        app.decode(&[(0, 80, &words(220, 1))]);
        assert_eq!(handle.compressed(&app, 0).cells_after, 120);
        assert_eq!(lost_of_tiny(&app, &handle, 0, 60..80), 0);
        assert!(lost_of_tiny(&app, &handle, 0, 80..110) > 0, "by gvote: {by_gvote}");

        app.remove(0, -1, -1);
        app.decode(&[(0, 0, &words(300, 2))]);
        assert_eq!(handle.compressed(&app, 0).cells_after, 120);
        assert!(lost_of_tiny(&app, &handle, 0, 60..80) > 0, "it began anew");
    }
}

#[test]
fn a_saved_sequence_stays_protected_in_another_context() {
    let model = tiny("llama");
    let shape = || Shape { n_seq_max: 2, ..ONE };
    let params = gvote_params { max_cells: 150, ..defaults() };
    let app = App::new(&model, &shape());
    let handle = Handle::with(&app, &params);
    app.decode(&[(0, 0, &words(300, 0))]);
    for (p0, p1) in [(10, 40), (60, 70)] {
        assert_eq!(handle.protect(&app, 0, p0, p1, true), GVOTE_OK);
    }
    let (state, known) = (app.state(0), handle.save(&app, 0));

    let later = App::new(&model, &shape());
    let other = Handle::with(&later, &params);
    later.load(1, &state);
    assert_eq!(other.load(&later, 1, &known), GVOTE_OK, "{}", other.error());
    assert!(other.save(&later, 1) == known);
    assert_eq!(other.compressed(&later, 1).cells_after, 150);
    assert_eq!(lost_of_tiny(&later, &other, 1, 10..40) + lost_of_tiny(&later, &other, 1, 60..70), 0);
    assert!(lost_of_tiny(&later, &other, 1, 40..60) > 0);
}

#[test]
fn positions_that_a_sequence_does_not_have_are_refused_and_none_is_none() {
    let app = App::new(&tiny("llama"), &Shape { n_seq_max: 2, ..ONE });
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &words(300, 0))]);
    let before = handle.save(&app, 0);
    for (p0, p1) in [(0, 301), (300, 301), (400, i32::MAX)] {
        assert_eq!(handle.protect(&app, 0, p0, p1, true), GVOTE_ERROR_NOT_SEEN, "{p0}..{p1}");
        assert!(handle.error().contains("300 tokens"), "{}", handle.error());
    }
    for (p0, p1) in [(50, 50), (50, 20), (-3, 0), (300, 300), (300, -1), (i32::MAX, -1), (i32::MAX, i32::MIN)] {
        assert_eq!(handle.protect(&app, 0, p0, p1, true), GVOTE_OK, "{p0}..{p1}");
        assert!(handle.save(&app, 0) == before, "{p0}..{p1}");
    }
    // everything: no token can be dropped any more
    assert_eq!(handle.protect(&app, 0, i32::MIN, i32::MIN, true), GVOTE_OK);
    assert!(handle.save(&app, 0) != before);
    let (status, report) = handle.plan(&app, 0);
    assert_eq!((status, report.cells_after), (GVOTE_OK, 300), "{}", handle.error());
}

/// A head that has lost a token before continues without it, and keeps the others.
#[test]
fn what_was_lost_before_does_not_come_back() {
    let app = App::new(&tiny("llama"), &Shape { n_ctx: 512, ..ONE });
    let handle = Handle::at(&app);
    let text = words(600, 0);
    assert!(read_long(&app, &handle, &text, 64) > 0);
    let positions: Vec<Pos> = (100..160).collect();
    let before = lost(&app, &handle, 0, tiny_heads(), &positions);
    let (fewest, most) = before.iter().map(Vec::len).fold((60, 0), |(a, b), n| (a.min(n), b.max(n)));
    assert!(most > 0 && fewest < 60, "some were lost and some are there: {before:?}");
    assert_eq!(handle.protect(&app, 0, 100, 160, true), GVOTE_OK);
    for i in 0..4 {
        assert_eq!(handle.make_room(&app, 0, 100, &[]).0, GVOTE_OK, "{}", handle.error());
        app.decode(&[(0, 600 + 100 * i, &words(100, i))]);
    }
    assert_eq!(lost(&app, &handle, 0, tiny_heads(), &positions), before);
}
