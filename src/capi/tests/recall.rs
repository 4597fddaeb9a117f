//! Rows that a vote removed from the cache come back unchanged.

use std::ffi::c_void;

use super::app::*;
use super::room::read_long;
use crate::archive::PRETEND_FULL;
use crate::capi::*;
use crate::llama::Pos;
use crate::sys;
use crate::tests::tiny::N_LAYER;

const N: usize = 300;

fn capped() -> gvote_params {
    gvote_params { max_cells: 150, ..defaults() }
}

fn shape(flash: bool, unified: bool) -> Shape {
    Shape { n_seq_max: 2, n_ctx: 1536, flash, unified }
}

/// Returns an app in which cells of another sequence lie between those of the first.
fn heard(shape: &Shape, params: &gvote_params) -> (App, Handle) {
    let app = App::new(&tiny("llama"), shape);
    let handle = Handle::with(&app, params);
    let text = words(N, 0);
    app.decode(&[(0, 0, &text[..100])]);
    app.decode(&[(1, 0, &words(90, 3))]);
    app.decode(&[(0, 100, &text[100..])]);
    (app, handle)
}

#[test]
fn every_byte_every_position_and_the_next_logits_are_those_from_before() {
    for (flash, unified, evict) in [
        (false, true, GVOTE_EVICT_COMPOSITE),
        (true, true, GVOTE_EVICT_COMPOSITE),
        (false, false, GVOTE_EVICT_COMPOSITE),
        (true, false, GVOTE_EVICT_CELLS),
    ] {
        let (app, handle) = heard(&shape(flash, unified), &gvote_params { evict, ..capped() });
        let before = [0, 1].map(|seq| app.state(seq));
        let report = handle.compressed(&app, 0);
        assert_eq!(report.bytes_aside, report.kv_bytes_before - report.kv_bytes_after + 4 * 150 * 2 * N_LAYER as u64);
        assert!(report.aside_s > 0.0 && report.aside_s < 1.0, "{}", report.aside_s);
        assert_eq!(handle.exact_from(&app, 0), 0);
        // an answer, with two votes in between
        app.decode(&[(0, N as Pos, &words(7, 5))]);
        handle.compressed(&app, 0);
        app.decode(&[(0, N as Pos + 7, &words(9, 6))]);
        assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, N as u32 + 16), "{}", handle.error());
        for (layer, head) in (0..N_LAYER as i32).flat_map(|layer| [(layer, 0), (layer, 1)]) {
            assert!(handle.positions(&app, 0, layer, head).into_iter().eq(0..N as Pos + 16));
        }
        assert_eq!(handle.truncate(&app, 0, N as Pos), GVOTE_OK);
        assert!([0, 1].map(|seq| app.state(seq)) == before, "flash {flash}, unified {unified}, evict {evict}");
        assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, N as u32), "there is no more");

        let (straight, _other) = heard(&shape(flash, unified), &capped());
        let [got, expected] = [&app, &straight].map(|app| {
            app.decode(&[(0, N as Pos, &[5])]);
            app.logits(0).1
        });
        // cells may lie in another order, so that sums add up in another order
        let apart = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-3, "{apart}");
    }
}

#[test]
fn a_sequence_is_cut_exactly_at_any_place_that_was_compressed() {
    for pos in [1, 77, 149, 150, 200, 236, 299] {
        let (app, handle) = heard(&shape(false, true), &capped());
        handle.compressed(&app, 0);
        assert_eq!(handle.truncate(&app, 0, pos), GVOTE_OK, "{}", handle.error());
        if pos < 236 {
            assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 150.min(pos as u32)));
        }
        assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, pos as u32));
        let (straight, _other) = heard(&shape(false, true), &capped());
        straight.remove(0, pos, -1);
        assert!(app.state(0) == straight.state(0), "{pos}");
        // the sequence continues
        app.decode(&[(0, pos, &words(N, 8))]);
        handle.compressed(&app, 0);
        assert_eq!(handle.exact_from(&app, 0), 0);
    }
}

#[test]
fn as_much_comes_back_as_there_are_cells_for_beside_those_that_are_needed() {
    let (app, handle) = heard(&Shape { n_ctx: 512, ..shape(false, true) }, &capped());
    handle.compressed(&app, 0);
    // of 512 cells, 90 are another sequence's and 64 are spare cells for a vote
    for (needed, expected) in [(400, 150), (200, 158), (100, 258), (60, 298), (0, 300)] {
        assert_eq!(handle.expand(&app, 0, needed), (GVOTE_OK, expected), "{needed}: {}", handle.error());
    }
    // rows in the cache and rows set aside are still complete
    handle.compressed(&app, 0);
    assert_eq!(handle.expand(&app, 0, 198), (GVOTE_OK, 160));
    app.decode(&[(0, N as Pos, &words(100, 2))]);
    assert_eq!(handle.compressed(&app, 0).cells_after, 150);
    assert_eq!(handle.exact_from(&app, 0), 0);
    app.remove(1, -1, -1);
    assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, 400));
}

#[test]
fn a_saved_sequence_has_what_was_set_aside() {
    let (app, handle) = heard(&shape(false, true), &capped());
    let before = app.state(0);
    handle.compressed(&app, 0);
    let (state, known) = (app.state(0), handle.save(&app, 0));

    let (later, other) = heard(&shape(false, true), &capped());
    later.remove(1, -1, -1);
    later.load(1, &state);
    assert_eq!(other.load(&later, 1, &known), GVOTE_OK, "{}", other.error());
    assert!(other.save(&later, 1) == known);
    assert_eq!(other.expand(&later, 1, 0), (GVOTE_OK, N as u32));
    // llama.cpp's state does not contain the tokens of cells, but gvote's record does
    assert_eq!(later.state(1).len(), before.len());
    assert_eq!(other.truncate(&later, 1, 120), GVOTE_OK);
    assert_eq!(other.cells(&later, 1), (GVOTE_OK, 120));

    // a handle that sets nothing aside could not keep the sequence whole
    let lossy = Handle::with(&later, &gvote_params { recall: GVOTE_RECALL_OFF, ..capped() });
    later.remove(1, -1, -1);
    later.load(1, &state);
    assert_eq!(lossy.load(&later, 1, &known), GVOTE_ERROR_STATE);
    assert!(lossy.error().contains("set aside"), "{}", lossy.error());
    // another position for the rows of a head; one row too many, or too few
    let rows = known.len() - (handle_bytes(&handle, &app) as usize);
    for (place, value) in [(rows, known[rows] ^ 1), (rows - 8, 149), (rows - 8, 151)] {
        let mut bytes = known.clone();
        bytes[place] = value;
        assert_eq!(other.load(&later, 1, &bytes), GVOTE_ERROR_STATE, "{place}");
    }
}

/// Bytes that are set aside, as `gvote_plan()` reports them.
fn handle_bytes(handle: &Handle, app: &App) -> u64 {
    handle.plan(app, 0).1.bytes_aside
}

/// In a unified cache, the copy can change once the original is gone; in a stream of its own, at once.
#[test]
fn a_copy_has_what_was_set_aside_of_the_original() {
    for unified in [true, false] {
        let (app, handle) = heard(&shape(false, unified), &capped());
        // a state names its sequence
        let before = [0, 1].map(|seq| {
            let other = App::new(&tiny("llama"), &shape(false, unified));
            let text = words(N, 0);
            other.decode(&[(seq, 0, &text[..100])]);
            other.decode(&[(1 - seq, 0, &words(90, 3))]);
            other.decode(&[(seq, 100, &text[100..])]);
            other.state(seq)
        });
        let aside = handle.compressed(&app, 0).bytes_aside;
        app.remove(1, -1, -1);
        // SAFETY: valid memory.
        unsafe { sys::llama_memory_seq_cp(app.memory(), 0, 1, -1, -1) };
        app.decode(&[(1, N as Pos, &words(9, 4))]);
        assert_eq!(handle.cells(&app, 1), (GVOTE_OK, 159), "{}", handle.error());
        assert_eq!(handle.exact_from(&app, 1), 0);
        if unified {
            assert_eq!(handle.expand(&app, 1, 0).0, GVOTE_ERROR_SHARED);
            app.remove(0, -1, -1);
        }
        assert_eq!(handle.expand(&app, 1, 0), (GVOTE_OK, N as u32 + 9), "{}", handle.error());
        assert_eq!(handle.truncate(&app, 1, N as Pos), GVOTE_OK);
        assert!(app.state(1) == before[1], "unified: {unified}");
        assert_eq!(handle.plan(&app, 1).1.bytes_aside, 0);
        if !unified {
            assert_eq!(handle.plan(&app, 0).1.bytes_aside, aside, "the original is as it was");
            handle.compressed(&app, 1);
            assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, N as u32));
            assert!(app.state(0) == before[0]);
        }
    }
}

/// An app that reads more than its cells hold: the cells are chosen among everything that was read, not among the
/// survivors.
#[test]
fn the_choice_for_a_question_is_made_among_all_that_was_read() {
    const LONG: usize = 1500;
    for (recall, everything) in [(GVOTE_RECALL_AUTO, true), (GVOTE_RECALL_OFF, false)] {
        let app = App::new(&tiny("llama"), &Shape { n_ctx: 512, n_seq_max: 1, flash: false, unified: true });
        let handle = Handle::with(&app, &gvote_params { recall, ..capped() });
        let text = words(LONG, 0);
        read_long(&app, &handle, &text, 100);
        let (n_past, n_cells) = (LONG as Pos, handle.cells(&app, 0).1);
        let survivors = handle.positions(&app, 0, 0, 0);
        let report = handle.compressed(&app, 0);
        assert_eq!((report.cells_before, report.cells_after), (n_cells, 150));
        assert_eq!(report.rows_back > 0, everything);
        assert_eq!(report.recall_s > 1e-4, everything, "{}", report.recall_s);
        let held = handle.positions(&app, 0, 0, 0);
        assert_eq!(held.iter().any(|pos| !survivors.contains(pos)), everything);
        if everything {
            assert_eq!(u64::from(report.rows_back), LONG as u64 - u64::from(n_cells));
            // no row is lost or exists twice
            assert_eq!(handle.exact_from(&app, 0), 0);
            assert_eq!(handle.truncate(&app, 0, 300), GVOTE_OK, "{}", handle.error());
            assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, 300));
            let straight = App::new(&tiny("llama"), &Shape { n_ctx: 512, n_seq_max: 1, flash: false, unified: true });
            straight.decode(&[(0, 0, &text[..300])]);
            assert_eq!(app.state(0).len(), straight.state(0).len());
        } else {
            assert_eq!(handle.truncate(&app, 0, 300), GVOTE_ERROR_COMPRESSED);
        }
        assert_eq!(app.decode(&[(0, if everything { 300 } else { n_past }, &[5])]), ());
    }
}

/// A vote that is cancelled while rows come back leaves every head with its rows.
#[test]
fn a_cancelled_choice_loses_no_row() {
    let app = App::new(&tiny("llama"), &Shape { n_ctx: 512, n_seq_max: 1, flash: false, unified: true });
    let handle = Handle::with(&app, &capped());
    let text = words(900, 0);
    read_long(&app, &handle, &text, 100);
    /// Progress callback that cancels when the count reaches 0.
    unsafe extern "C" fn countdown(_: gvote_stage, left: *mut c_void) -> bool {
        // SAFETY: `left` points to the number below.
        let left = unsafe { &mut *left.cast::<usize>() };
        *left -= 1;
        *left > 0
    }
    let held = |handle: &Handle| {
        let heads = (0..N_LAYER as i32).flat_map(|layer| [(layer, 0), (layer, 1)]);
        heads.map(|(layer, head)| handle.positions(&app, 0, layer, head)).collect::<Vec<_>>()
    };
    let before = held(&handle);
    for stage in 1.. {
        let mut left: usize = stage;
        // SAFETY: the number lives until the callback is removed.
        unsafe { gvote_set_progress_callback(handle.0, Some(countdown), (&raw mut left).cast()) };
        let (status, _) = handle.compress(&app, 0);
        // SAFETY: as above.
        unsafe { gvote_set_progress_callback(handle.0, None, std::ptr::null_mut()) };
        assert_eq!(handle.exact_from(&app, 0), 0, "{stage}");
        if status == GVOTE_OK {
            assert!(stage > 3);
            break;
        }
        assert_eq!(status, GVOTE_ERROR_CANCELLED, "{}", handle.error());
        assert!(held(&handle) == before, "{stage}");
    }
    assert_eq!(handle.truncate(&app, 0, 400), GVOTE_OK, "{}", handle.error());
    assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, 400));
}

#[test]
fn without_memory_for_it_nothing_is_dropped() {
    let (app, handle) = heard(&shape(false, true), &capped());
    let (before, known) = (app.state(0), handle.save(&app, 0));
    PRETEND_FULL.set(true);
    let status = handle.compress(&app, 0).0;
    PRETEND_FULL.set(false);
    assert_eq!(status, GVOTE_ERROR_MEMORY, "{}", handle.error());
    assert!(app.state(0) == before && handle.save(&app, 0) == known);
    handle.compressed(&app, 0);
}

#[test]
fn where_rows_are_to_be_lost_they_are() {
    let lossy = gvote_params { recall: GVOTE_RECALL_OFF, ..capped() };
    let (app, handle) = heard(&shape(false, true), &lossy);
    assert_eq!(handle.compressed(&app, 0).bytes_aside, 0);
    assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, 150));
    assert_eq!(handle.exact_from(&app, 0), N as Pos - 64);
    assert_eq!(handle.truncate(&app, 0, 100), GVOTE_ERROR_COMPRESSED);
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_set_params(handle.0, &capped()) }, GVOTE_ERROR_PARAMS);
    assert!(handle.error().contains("recall"), "{}", handle.error());
    let nonsense = gvote_params { recall: 3, ..capped() };
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_set_params(handle.0, &nonsense) }, GVOTE_ERROR_PARAMS);
}

#[test]
fn a_sequence_that_begins_anew_has_nothing_set_aside() {
    for hears in [true, false] {
        let (app, handle) = heard(&shape(false, true), &capped());
        assert!(handle.compressed(&app, 0).bytes_aside > 0);
        app.remove(0, -1, -1);
        if hears {
            assert_eq!(handle.cells(&app, 0).0, GVOTE_ERROR_NOT_SEEN);
        }
        app.decode(&[(0, 0, &words(N - 40, 7))]);
        assert_eq!(handle.plan(&app, 0).1.bytes_aside, 0);
        assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, N as u32 - 40));
    }
}
