use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::app::*;
use crate::capi::handle::gvote_t;
use crate::capi::*;
use crate::sys;

const N: usize = 300;

fn trying() -> gvote_params {
    gvote_params { target_kl: 1e-4, ..defaults() }
}

#[test]
fn every_function_takes_null_for_an_answer() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &words(N, 0))]);
    let (g, ctx) = (handle.0, app.ctx);
    let (no_g, no_ctx) = (ptr::null_mut::<gvote_t>(), ptr::null_mut());
    let none = ptr::null_mut::<c_void>();
    // SAFETY: NULLs and living objects.
    unsafe {
        for status in [
            gvote_params_init(ptr::null_mut()),
            gvote_set_params(no_g, ptr::null()),
            gvote_get_params(no_g, ptr::null_mut()),
            gvote_get_params(g, ptr::null_mut()),
            gvote_set_log_callback(no_g, None, none),
            gvote_set_progress_callback(no_g, None, none),
            gvote_set_next_callback(no_g, None, none),
            gvote_cancel(no_g),
            gvote_cancel_clear(no_g),
            gvote_attach(no_g, ctx),
            gvote_attach(g, no_ctx),
            gvote_detach(no_g, ctx),
            gvote_detach(g, no_ctx),
            gvote_compress(no_g, ctx, 0, ptr::null_mut()),
            gvote_compress(g, no_ctx, 0, ptr::null_mut()),
            gvote_vote_if_due(no_g, ctx, 0, 0, ptr::null_mut(), ptr::null_mut()),
            gvote_vote_if_due(g, no_ctx, 0, 0, ptr::null_mut(), ptr::null_mut()),
            gvote_plan(no_g, ctx, 0, ptr::null_mut()),
            gvote_plan(g, no_ctx, 0, ptr::null_mut()),
            gvote_make_room(no_g, ctx, 0, 1, ptr::null(), 0, ptr::null_mut()),
            gvote_make_room(g, no_ctx, 0, 1, ptr::null(), 0, ptr::null_mut()),
            gvote_make_room(g, ctx, 0, 1, ptr::null(), 1, ptr::null_mut()),
            gvote_expand(no_g, ctx, 0, 0, ptr::null_mut()),
            gvote_expand(g, no_ctx, 0, 0, ptr::null_mut()),
            gvote_seq_cells(no_g, ctx, 0, ptr::null_mut()),
            gvote_seq_cells(g, no_ctx, 0, ptr::null_mut()),
            gvote_seq_cells(g, ctx, 0, ptr::null_mut()),
            gvote_seq_exact_from(no_g, ctx, 0, ptr::null_mut()),
            gvote_seq_exact_from(g, no_ctx, 0, ptr::null_mut()),
            gvote_seq_exact_from(g, ctx, 0, ptr::null_mut()),
            gvote_seq_positions(no_g, ctx, 0, 0, 0, ptr::null_mut(), 0, ptr::null_mut()),
            gvote_seq_positions(g, no_ctx, 0, 0, 0, ptr::null_mut(), 0, ptr::null_mut()),
            gvote_seq_positions(g, ctx, 0, 0, 0, ptr::null_mut(), 1, ptr::null_mut()),
            gvote_seq_truncate(no_g, ctx, 0, 0),
            gvote_seq_truncate(g, no_ctx, 0, 0),
            gvote_state_size(no_g, ctx, 0, ptr::null_mut()),
            gvote_state_size(g, no_ctx, 0, ptr::null_mut()),
            gvote_state_size(g, ctx, 0, ptr::null_mut()),
            gvote_state_get(no_g, ctx, 0, none, 0, ptr::null_mut()),
            gvote_state_get(g, no_ctx, 0, none, 0, ptr::null_mut()),
            gvote_state_get(g, ctx, 0, none, usize::MAX, ptr::null_mut()),
            gvote_state_set(no_g, ctx, 0, none, 0),
            gvote_state_set(g, no_ctx, 0, none, 0),
            gvote_state_set(g, ctx, 0, none, 0),
        ] {
            assert_eq!(status, GVOTE_ERROR_NULL);
        }
        gvote_free(no_g);
        assert!(gvote_cb_eval(ptr::null_mut(), false, none));
        assert!(!gvote_cb_eval(ptr::null_mut(), true, none));
        assert!(!gvote_cb_eval(ptr::null_mut(), true, g.cast()));
        assert!(!error_of(no_g).is_empty());
        // where NULL is allowed
        assert_eq!(gvote_set_params(g, ptr::null()), GVOTE_OK);
        assert_eq!(gvote_seq_positions(g, ctx, 0, 0, 0, ptr::null_mut(), 0, ptr::null_mut()), GVOTE_OK);
        assert_eq!(gvote_plan(g, ctx, 0, ptr::null_mut()), GVOTE_OK);
        assert_eq!(gvote_vote_if_due(g, ctx, 0, 0, ptr::null_mut(), ptr::null_mut()), GVOTE_OK);
        assert_eq!(gvote_expand(g, ctx, 0, 0, ptr::null_mut()), GVOTE_OK);
        assert_eq!(gvote_make_room(g, ctx, 0, 500, ptr::null(), 0, ptr::null_mut()), GVOTE_OK);
        let unnamed = gvote_new(ptr::null(), ptr::null_mut());
        assert!(!unnamed.is_null());
        gvote_free(unnamed);
    }
}

#[test]
fn sizes_that_nobody_knows_are_refused_and_older_ones_are_not() {
    let ours = size_of::<gvote_params>();
    for size in [0, 1, 8, 15, 20, ours - 1, ours + 1, ours + 8, 0xfefe_fefe, usize::MAX] {
        let mut params = gvote_params { size, ..defaults() };
        let mut status = GVOTE_OK;
        // SAFETY: a complete struct, whatever size it states.
        unsafe {
            assert!(gvote_new(&raw const params, &raw mut status).is_null());
            assert_eq!(status, GVOTE_ERROR_SIZE, "{size}");
            assert_eq!(gvote_params_init(&raw mut params), GVOTE_ERROR_SIZE);
        }
        assert!(error_of(ptr::null()).contains("size"));
    }
    // a caller that knows only the first fields: the others have their defaults
    let mut old = gvote_params { size: 24, ..Default::default() };
    (old.policy, old.evict) = (GVOTE_POLICY_SNAPKV, GVOTE_EVICT_CELLS);
    (old.flags, old.target_kl) = (0, 0.5);
    let handle = Handle::new(&old);
    let mut now = gvote_params { size: ours, ..Default::default() };
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_get_params(handle.0, &raw mut now) }, GVOTE_OK);
    let expected = gvote_params { policy: GVOTE_POLICY_SNAPKV, evict: GVOTE_EVICT_CELLS, target_kl: 0.5, ..defaults() };
    assert_eq!(format!("{now:?}"), format!("{expected:?}"));

    // bytes behind the caller's struct are not written
    let mut report = gvote_report { size: 24, compact_s: 7.0, rounding: 3.0, ..Default::default() };
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::with(&app, &gvote_params { max_cells: 150, ..defaults() });
    app.decode(&[(0, 0, &words(N, 0))]);
    // SAFETY: all objects are alive.
    assert_eq!(unsafe { gvote_compress(handle.0, app.ctx, 0, &raw mut report) }, GVOTE_OK);
    assert_eq!((report.size, report.cells_before, report.cells_after), (24, N as u32, 150));
    assert_eq!((report.compact_s, report.rounding), (7.0, 3.0));
    report.size = size_of::<gvote_report>() + 8;
    // SAFETY: all objects are alive.
    assert_eq!(unsafe { gvote_compress(handle.0, app.ctx, 0, &raw mut report) }, GVOTE_ERROR_SIZE);
}

#[test]
fn nonsense_settings_are_refused_by_the_name_of_the_field() {
    let change = |change: fn(&mut gvote_params)| {
        let mut params = defaults();
        change(&mut params);
        params
    };
    for (params, name) in [
        (change(|p| p.policy = 77), "policy"),
        (change(|p| p.evict = 2), "evict"),
        (change(|p| p.flags = 8), "flags"),
        (change(|p| p.target_kl = -1.0), "target_kl"),
        (change(|p| p.target_kl = f32::NAN), "target_kl"),
        (change(|p| p.lost_mass = 1.5), "lost_mass"),
        (change(|p| p.ratio = f32::INFINITY), "ratio"),
        (change(|p| p.samples = 0), "samples"),
        (change(|p| p.samples = u32::MAX), "samples"),
        (change(|p| p.window = 0), "window"),
        (change(|p| p.recent = 1), "recent"),
        (change(|p| p.max_cells = 3), "max_cells"),
        (change(|p| p.draft = 1000), "draft"),
        (change(|p| p.span_back = u32::MAX), "span"),
        (change(|p| p.pool = 4), "pool"),
        (change(|p| p.head_mix = -0.5), "head_mix"),
        (change(|p| p.p_nuc = 0.0), "p_nuc"),
        (change(|p| p.when = 3), "when"),
    ] {
        let mut status = GVOTE_OK;
        // SAFETY: both objects are alive.
        assert!(unsafe { gvote_new(&raw const params, &raw mut status) }.is_null(), "{name}");
        assert_eq!(status, GVOTE_ERROR_PARAMS, "{name}");
        let error = error_of(ptr::null());
        let is_named = error.contains(name) || error.contains(&name.replace('_', " "));
        assert!(is_named && !error.contains("--"), "{name}: {error}");
    }
}

#[test]
fn calls_out_of_order_are_refused() {
    let (app, other) = (App::new(&tiny("llama"), &ONE), App::new(&tiny("gemma2"), &ONE));
    let handle = Handle::new(&defaults());
    app.decode(&[(0, 0, &words(N, 0))]);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_NOT_ATTACHED);
    assert_eq!(handle.make_room(&app, 0, 500, &[]).0, GVOTE_ERROR_NOT_ATTACHED);
    assert_eq!(handle.vote_if_due(&app, 0, 0).0, GVOTE_ERROR_NOT_ATTACHED);
    assert!(handle.error().contains("gvote_attach"));
    // SAFETY: all objects are alive.
    unsafe {
        assert_eq!(gvote_detach(handle.0, app.ctx), GVOTE_ERROR_NOT_ATTACHED);
        assert_eq!(gvote_attach(handle.0, app.ctx), GVOTE_OK);
        assert_eq!(gvote_attach(handle.0, app.ctx), GVOTE_OK, "twice is once");
    }
    assert_eq!(handle.compress(&other, 0).0, GVOTE_ERROR_NOT_ATTACHED, "a context of another model");
    for seq in [-1, 1, 255, 256, i32::MAX, i32::MIN] {
        assert_eq!(handle.compress(&app, seq).0, GVOTE_ERROR_NO_SEQUENCE, "{seq}");
        assert_eq!(handle.make_room(&app, seq, 500, &[]).0, GVOTE_ERROR_NO_SEQUENCE, "{seq}");
        assert_eq!(handle.vote_if_due(&app, seq, 0).0, GVOTE_ERROR_NO_SEQUENCE, "{seq}");
    }
    for (layer, head) in [(-1, 0), (3, 0), (0, 2), (0, u32::MAX)] {
        // SAFETY: all objects are alive.
        let status =
            unsafe { gvote_seq_positions(handle.0, app.ctx, 0, layer, head, ptr::null_mut(), 0, ptr::null_mut()) };
        assert_eq!(status, GVOTE_ERROR_NO_SEQUENCE, "layer {layer}, head {head}");
    }
    let wider = gvote_params { window: 32, ..defaults() };
    // SAFETY: all objects are alive.
    assert_eq!(unsafe { gvote_set_params(handle.0, &raw const wider) }, GVOTE_ERROR_PARAMS);
    // SAFETY: all objects are alive.
    assert_eq!(unsafe { gvote_detach(handle.0, app.ctx) }, GVOTE_OK);
    // SAFETY: all objects are alive.
    assert_eq!(unsafe { gvote_set_params(handle.0, &raw const wider) }, GVOTE_OK);
    assert_eq!(handle.error(), "", "after a success");
}

#[test]
fn a_handle_moves_from_a_freed_context_to_another() {
    let handle = Handle::new(&gvote_params { max_cells: 150, ..defaults() });
    for kind in 0..3 {
        let app = App::new(&tiny(["llama", "gemma2"][kind as usize % 2]), &ONE);
        // SAFETY: both objects are alive.
        assert_eq!(unsafe { gvote_attach(handle.0, app.ctx) }, GVOTE_OK);
        app.decode(&[(0, 0, &words(N, kind))]);
        handle.compressed(&app, 0);
    }
}

#[test]
fn contexts_that_cannot_be_compressed_are_refused_with_a_reason() {
    let model = tiny("llama");
    let handle = Handle::new(&defaults());
    let app = App::new(&model, &ONE);
    // SAFETY: both objects are alive.
    unsafe {
        sys::llama_set_causal_attn(app.ctx, false);
        assert_eq!(gvote_attach(handle.0, app.ctx), GVOTE_ERROR_UNSUPPORTED);
    }
    assert!(handle.error().contains("causal"), "{}", handle.error());

    let app = App::new(&model, &Shape { n_seq_max: 256, n_ctx: 1024, ..ONE });
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_attach(handle.0, app.ctx) }, GVOTE_ERROR_UNSUPPORTED);
    assert!(handle.error().contains("n_seq_max"), "{}", handle.error());
}

unsafe extern "C" fn stop_at(stage: gvote_stage, data: *mut c_void) -> bool {
    // SAFETY: `data` points to a stage.
    stage != unsafe { *data.cast::<gvote_stage>() }
}

#[test]
fn a_vote_is_cancelled_in_every_way_and_loses_nothing() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::with(&app, &gvote_params { max_cells: 150, ..trying() });
    app.decode(&[(0, 0, &words(N, 0))]);
    let before = app.state(0);
    let logits = app.logits(N as i32 - 1);
    let check = |status: gvote_status, how: &str| {
        assert_eq!(status, GVOTE_ERROR_CANCELLED, "{how}");
        assert!(app.state(0) == before, "{how}");
        assert!(app.logits(N as i32 - 1) == logits, "{how}");
    };
    // SAFETY: all objects are alive.
    unsafe {
        assert_eq!(gvote_cancel(handle.0), GVOTE_OK);
        check(handle.compress(&app, 0).0, "by the flag");
        assert_eq!(gvote_cancel_clear(handle.0), GVOTE_OK);
        for stage in [GVOTE_STAGE_PROBE, GVOTE_STAGE_SCORE, GVOTE_STAGE_DRAFT, GVOTE_STAGE_TRY, GVOTE_STAGE_COMPACT] {
            let mut stage = stage;
            gvote_set_progress_callback(handle.0, Some(stop_at), (&raw mut stage).cast());
            check(handle.compress(&app, 0).0, &format!("at stage {stage}"));
        }
        gvote_set_progress_callback(handle.0, None, ptr::null_mut());

        unsafe extern "C" fn abort(data: *mut c_void) -> bool {
            // SAFETY: `data` points to a counter; the callback is called from one thread.
            unsafe { (*data.cast::<AtomicUsize>()).fetch_add(1, Ordering::Relaxed) > 20 }
        }
        let mut calls = AtomicUsize::new(0);
        sys::llama_set_abort_callback(app.ctx, Some(abort), (&raw mut calls).cast());
        check(handle.compress(&app, 0).0, "by the app's own abort callback");
        sys::llama_set_abort_callback(app.ctx, None, ptr::null_mut());
    }
    handle.compressed(&app, 0);
}

#[test]
fn a_vote_is_cancelled_from_another_thread() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::with(&app, &trying());
    app.decode(&[(0, 0, &words(N, 0))]);
    let before = app.state(0);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let g = &handle;
        let over = &over;
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                // SAFETY: the handle lives; these two may be called at any time.
                unsafe {
                    gvote_cancel(g.raw());
                    gvote_cancel_clear(g.raw());
                }
            }
        });
        let mut cancelled = 0;
        for _ in 0..20 {
            match handle.plan(&app, 0).0 {
                GVOTE_OK => {}
                status => {
                    assert_eq!(status, GVOTE_ERROR_CANCELLED, "{}", handle.error());
                    cancelled += 1;
                }
            }
            assert!(app.state(0) == before);
        }
        over.store(true, Ordering::Relaxed);
        assert!(cancelled > 0);
    });
}

#[test]
fn two_contexts_in_two_threads_do_not_meet() {
    let model = tiny("llama");
    let run = |kind: i32| {
        let app = App::new(&model, &ONE);
        let handle = Handle::with(&app, &gvote_params { max_cells: 150, ..trying() });
        app.decode(&[(0, 0, &words(N, kind))]);
        handle.compressed(&app, 0);
        app.decode(&[(0, N as i32, &words(80, kind))]);
        handle.compressed(&app, 0);
        (app.state(0), handle.positions(&app, 0, 2, 1))
    };
    let expected = [run(0), run(1)];
    let got = thread::scope(|scope| [0, 1].map(|kind| scope.spawn(move || run(kind))).map(|t| t.join().unwrap()));
    assert!(got == expected);
}

unsafe extern "C" fn keep_line(level: gvote_log_level, text: *const c_char, data: *mut c_void) {
    // SAFETY: `data` points to a list of lines, and `text` lives during the call.
    unsafe { (*data.cast::<Vec<(gvote_log_level, CString)>>()).push((level, CStr::from_ptr(text).to_owned())) };
}

#[test]
fn a_vote_is_logged_to_whoever_wants_it() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::with(&app, &gvote_params { max_cells: 150, ..defaults() });
    app.decode(&[(0, 0, &words(N, 0))]);
    let mut lines: Vec<(gvote_log_level, CString)> = Vec::new();
    // SAFETY: all objects are alive.
    unsafe { gvote_set_log_callback(handle.0, Some(keep_line), (&raw mut lines).cast()) };
    handle.compressed(&app, 0);
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0].0, GVOTE_LOG_INFO);
    assert!(lines[0].1.to_str().unwrap().contains("150 of 300"), "{lines:?}");
}

#[test]
fn a_panic_becomes_a_status_and_the_handle_goes_on() {
    let handle = Handle::new(&defaults());
    let status = crate::capi::call(handle.0, |_| panic!("a fault for the test"));
    assert_eq!(status, GVOTE_ERROR_INTERNAL);
    assert!(handle.error().contains("a fault for the test"), "{}", handle.error());
    // SAFETY: the handle is alive.
    assert_eq!(unsafe { gvote_set_params(handle.0, ptr::null()) }, GVOTE_OK);
}

#[test]
fn every_status_has_words_of_its_own() {
    // SAFETY: static strings.
    let words = |status| unsafe { CStr::from_ptr(gvote_status_string(status)) }.to_str().unwrap().to_owned();
    let all: std::collections::BTreeSet<_> = (GVOTE_OK..=GVOTE_ERROR_FILE).map(words).collect();
    assert_eq!(all.len() as u32, GVOTE_ERROR_FILE + 1);
    assert_eq!(words(GVOTE_ERROR_FILE + 1), words(12345));
    assert!(!all.contains(&words(12345)));
}
