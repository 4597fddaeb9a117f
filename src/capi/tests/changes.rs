use super::app::*;
use crate::capi::*;
use crate::sys;

const N: usize = 300;

fn capped() -> gvote_params {
    gvote_params { max_cells: 150, recall: GVOTE_RECALL_OFF, ..defaults() }
}

/// Returns an app with a prompt, and a handle that observed it.
fn heard() -> (App, Handle) {
    let app = App::new(&tiny("llama"), &Shape { n_seq_max: 2, ..ONE });
    let handle = Handle::with(&app, &capped());
    app.decode(&[(0, 0, &words(N, 0))]);
    (app, handle)
}

#[test]
fn a_removed_tail_is_followed() {
    let (app, handle) = heard();
    app.remove(0, 250, -1);
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 250));
    // continue with other tokens
    app.decode(&[(0, 250, &words(60, 3))]);
    let report = handle.compressed(&app, 0);
    assert_eq!((report.cells_before, report.cells_after), (310, 150));

    // without the detour the same positions stay, up to the removed tokens' effect on the statistics
    app.remove(0, 280, -1);
    assert_eq!(handle.cells(&app, 0).0, GVOTE_OK);
    app.decode(&[(0, 280, &words(5, 1))]);
    assert_eq!(handle.cells(&app, 0).0, GVOTE_OK);
}

#[test]
fn a_tail_that_was_decoded_anew_at_once_is_followed() {
    let (app, handle) = heard();
    app.remove(0, 200, -1);
    app.decode(&[(0, 200, &words(100, 7))]);
    let report = handle.compressed(&app, 0);
    assert_eq!(report.cells_before, 300);
}

#[test]
fn what_is_removed_inside_the_compressed_part_is_refused() {
    let (app, handle) = heard();
    handle.compressed(&app, 0);
    let mut exact_from = 0;
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_seq_exact_from(handle.0, app.ctx, 0, &raw mut exact_from) }, GVOTE_OK);
    assert_eq!(exact_from, N as i32 - 64);
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_seq_truncate(handle.0, app.ctx, 0, exact_from - 1) }, GVOTE_ERROR_COMPRESSED);
    assert!(handle.error().contains("236"), "{}", handle.error());
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 150));
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_seq_truncate(handle.0, app.ctx, 0, exact_from) }, GVOTE_OK);
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 150 - 64));

    let (app, handle) = heard();
    handle.compressed(&app, 0);
    app.remove(0, 150, -1);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_CHANGED);
    // the remaining cells need not reach up to there
    // SAFETY: valid memory.
    let next = unsafe { sys::llama_memory_seq_pos_max(app.memory(), 0) } + 1;
    app.decode(&[(0, next, &words(90, 3))]);
    assert_ne!(handle.compress(&app, 0).0, GVOTE_OK);
    // until the sequence begins anew
    app.remove(0, -1, -1);
    app.decode(&[(0, 0, &words(N, 3))]);
    handle.compressed(&app, 0);
}

#[test]
fn removed_moved_and_replaced_cells_are_refused() {
    let (app, handle) = heard();
    app.remove(0, 100, 120);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_CHANGED);

    // a shift that leaves positions as if only the end had been removed
    let (app, handle) = heard();
    app.remove(0, 0, 50);
    // SAFETY: valid memory.
    unsafe { sys::llama_memory_seq_add(app.memory(), 0, 50, -1, -50) };
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_CHANGED);

    // a state of the same length, in the same cells
    let (app, handle) = heard();
    app.decode(&[(1, 0, &words(N, 4))]);
    let other = app.state(1);
    app.remove(1, -1, -1);
    app.load(0, &other);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_CHANGED);
}

#[test]
fn an_empty_sequence_and_one_that_nobody_heard_are_told_apart_from_changed_ones() {
    let (app, handle) = heard();
    // SAFETY: valid memory.
    unsafe { sys::llama_memory_clear(app.memory(), true) };
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_NOT_SEEN);
    assert!(handle.error().contains("empty"), "{}", handle.error());

    let app = App::new(&tiny("llama"), &ONE);
    app.decode(&[(0, 0, &words(N, 0))]);
    let handle = Handle::at(&app);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_NOT_SEEN);
    // observing only the end is not enough
    app.decode(&[(0, N as i32, &words(80, 0))]);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_NOT_SEEN);

    // until the sequence begins anew
    app.remove(0, -1, -1);
    app.decode(&[(0, 0, &words(N, 0))]);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_OK, "{}", handle.error());
}

#[test]
fn cells_that_are_shared_are_refused_until_they_are_not() {
    let (app, handle) = heard();
    // SAFETY: valid memory.
    unsafe { sys::llama_memory_seq_cp(app.memory(), 0, 1, -1, -1) };
    let before = [0, 1].map(|seq| app.state(seq));
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_SHARED);
    assert!([0, 1].map(|seq| app.state(seq)) == before);
    assert_eq!(handle.compress(&app, 1).0, GVOTE_ERROR_SHARED);
    assert!([0, 1].map(|seq| app.state(seq)) == before);
    app.remove(1, -1, -1);
    handle.compressed(&app, 0);
}

#[test]
fn a_compressed_sequence_can_be_copied_and_goes_on_twice() {
    let (app, handle) = heard();
    handle.compressed(&app, 0);
    // SAFETY: valid memory.
    unsafe { sys::llama_memory_seq_cp(app.memory(), 0, 1, -1, -1) };
    app.decode(&[(0, N as i32, &[5]), (1, N as i32, &[5])]);
    // each adds up in another order
    let apart = app.logits(0).1.iter().zip(app.logits(1).1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-3, "{apart}");
}

#[test]
fn a_window_that_has_moved_on_is_not_cut_into() {
    let app = App::with(&tiny("gemma2"), &ONE, |params| params.swa_full = false);
    let handle = Handle::with(&app, &capped());
    for first in (0..600).step_by(100) {
        app.decode(&[(0, first, &words(100, first))]);
    }
    let mut exact_from = 0;
    // SAFETY: both objects are alive.
    unsafe {
        assert_eq!(gvote_seq_exact_from(handle.0, app.ctx, 0, &raw mut exact_from), GVOTE_OK);
        assert!(exact_from > 300 && exact_from < 600, "{exact_from}");
        assert_eq!(gvote_seq_truncate(handle.0, app.ctx, 0, exact_from - 1), GVOTE_ERROR_COMPRESSED);
        assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 600));
        assert_eq!(gvote_seq_truncate(handle.0, app.ctx, 0, exact_from), GVOTE_OK);
    }
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, exact_from as u32));
    // later tokens see the same cells as without the detour
    let straight = App::with(&tiny("gemma2"), &ONE, |params| params.swa_full = false);
    for first in (0..exact_from).step_by(100) {
        let n = 100.min(exact_from - first) as usize;
        straight.decode(&[(0, first, &words(100, first)[..n])]);
    }
    let [got, expected] = [&app, &straight].map(|app| {
        app.decode(&[(0, exact_from, &words(20, 9))]);
        app.logits(19).1
    });
    let apart = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 0.02, "{apart}");
}
