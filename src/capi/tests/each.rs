//! Each function that takes a handle, one by one, in every wrong situation.

use std::collections::BTreeSet;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::app::*;
use crate::capi::handle::gvote_t;
use crate::capi::*;
use crate::llama::SeqId;
use crate::sys::llama_context;

const N: usize = 300;

/// Name of a function, and the status that it returned.
type Answer = (&'static str, gvote_status);

/// Upper bound: two threads that take turns meet long before that.
const PATIENCE: Duration = Duration::from_secs(60);

/// Enough bytes for the saved state of a tiny model's sequence.
const ROOM: usize = 1 << 20;

/// Calls the functions that take only a handle. The last two may be called at any time.
unsafe fn of_a_handle(g: *mut gvote_t) -> [Answer; 7] {
    let mut params = gvote_params { size: size_of::<gvote_params>(), ..Default::default() };
    let none = ptr::null_mut();
    // SAFETY: the handle is the caller's, valid or not; everything else is alive.
    unsafe {
        [
            ("gvote_set_params", gvote_set_params(g, ptr::null())),
            ("gvote_get_params", gvote_get_params(g, &raw mut params)),
            ("gvote_set_log_callback", gvote_set_log_callback(g, None, none)),
            ("gvote_set_progress_callback", gvote_set_progress_callback(g, None, none)),
            ("gvote_set_next_callback", gvote_set_next_callback(g, None, none)),
            ("gvote_cancel", gvote_cancel(g)),
            ("gvote_cancel_clear", gvote_cancel_clear(g)),
        ]
    }
}

/// Calls the functions that name a sequence.
unsafe fn of_a_sequence(g: *mut gvote_t, ctx: *mut llama_context, seq: SeqId) -> [Answer; 12] {
    let mut report = report();
    let (mut number, mut pos, mut size, mut voted) = (0, 0, 0, false);
    let mut data = vec![0_u8; ROOM];
    let bytes = data.as_mut_ptr().cast::<c_void>();
    // SAFETY: as above, and the context is alive.
    unsafe {
        [
            ("gvote_seq_cells", gvote_seq_cells(g, ctx, seq, &raw mut number)),
            ("gvote_seq_exact_from", gvote_seq_exact_from(g, ctx, seq, &raw mut pos)),
            ("gvote_seq_positions", gvote_seq_positions(g, ctx, seq, 0, 0, ptr::null_mut(), 0, &raw mut number)),
            ("gvote_state_size", gvote_state_size(g, ctx, seq, &raw mut size)),
            ("gvote_state_get", gvote_state_get(g, ctx, seq, bytes, ROOM, &raw mut size)),
            ("gvote_plan", gvote_plan(g, ctx, seq, &raw mut report)),
            ("gvote_compress", gvote_compress(g, ctx, seq, &raw mut report)),
            ("gvote_vote_if_due", gvote_vote_if_due(g, ctx, seq, 0, &raw mut voted, &raw mut report)),
            ("gvote_expand", gvote_expand(g, ctx, seq, 0, &raw mut number)),
            ("gvote_seq_protect", gvote_seq_protect(g, ctx, seq, 0, 10, true)),
            ("gvote_seq_truncate", gvote_seq_truncate(g, ctx, seq, N as i32)),
            ("gvote_state_set", gvote_state_set(g, ctx, seq, bytes, size)),
        ]
    }
}

/// Asks for a cell that is free, which is valid for an empty sequence too.
unsafe fn make_room(g: *mut gvote_t, ctx: *mut llama_context, seq: SeqId) -> Answer {
    // SAFETY: as above.
    ("gvote_make_room", unsafe { gvote_make_room(g, ctx, seq, 1, ptr::null(), 0, ptr::null_mut()) })
}

/// Calls all functions that name a context.
unsafe fn of_a_context(g: *mut gvote_t, ctx: *mut llama_context) -> Vec<Answer> {
    // SAFETY: as above.
    unsafe {
        let mut answers = of_a_sequence(g, ctx, 0).to_vec();
        answers.push(make_room(g, ctx, 0));
        answers.push(("gvote_detach", gvote_detach(g, ctx)));
        answers
    }
}

/// Calls all functions that can fail with a handle.
unsafe fn of_all(g: *mut gvote_t, ctx: *mut llama_context) -> Vec<Answer> {
    // SAFETY: as above.
    unsafe {
        let mut answers = of_a_handle(g).to_vec();
        answers.push(("gvote_attach", gvote_attach(g, ctx)));
        answers.extend(of_a_context(g, ctx));
        answers
    }
}

#[track_caller]
fn all_are(answers: &[Answer], expected: gvote_status) {
    for (name, status) in answers {
        assert_eq!(*status, expected, "{name}");
    }
}

#[test]
fn no_function_is_left_out_here() {
    let app = App::new(&tiny("llama"), &ONE);
    // SAFETY: a NULL, and a living context.
    let tried = unsafe { of_all(ptr::null_mut(), app.ctx) };
    let mut left: BTreeSet<&str> = drift::NAMES.iter().copied().collect();
    tried.iter().for_each(|(name, _)| assert!(left.remove(name), "{name}"));
    // functions without a handle or a status: each has a test of its own
    let others = [
        "gvote_version",
        "gvote_llama_version",
        "gvote_status_string",
        "gvote_params_init",
        "gvote_new",
        "gvote_free",
        "gvote_last_error",
        "gvote_cb_eval",
    ];
    assert_eq!(left, others.into());
    all_are(&tried, GVOTE_ERROR_NULL);
}

#[test]
fn what_is_no_handle_any_more_or_never_was_is_refused_by_each() {
    let app = App::new(&tiny("llama"), &ONE);
    for garbage in [[0_u64; 64], [u64::MAX; 64], [0x5a5a_5a5a_5a5a_5a5a; 64]] {
        let mut memory = garbage;
        let aligned = memory.as_mut_ptr().cast::<gvote_t>();
        let crooked = aligned.wrapping_byte_add(1);
        for g in [aligned, crooked] {
            // SAFETY: our own memory, with any contents.
            unsafe {
                all_are(&of_all(g, app.ctx), GVOTE_ERROR_HANDLE);
                gvote_free(g);
                assert!(!gvote_cb_eval(ptr::null_mut(), true, g.cast()));
            }
            assert!(error_of(g).contains("handle"), "{}", error_of(g));
        }
        assert_eq!(memory, garbage, "nothing was written there");
    }
}

#[test]
fn each_needs_the_context_that_the_handle_is_attached_to() {
    let (app, other) = (App::new(&tiny("llama"), &ONE), App::new(&tiny("gemma2"), &ONE));
    let handle = Handle::new(&defaults());
    // SAFETY: all objects are alive.
    unsafe {
        all_are(&of_context(&handle, &app), GVOTE_ERROR_NOT_ATTACHED);
        assert_eq!(gvote_attach(handle.0, app.ctx), GVOTE_OK);
        app.decode(&[(0, 0, &words(N, 0))]);
        other.decode(&[(0, 0, &words(N, 0))]);
        let before = [&app, &other].map(|app| app.state(0));
        all_are(&of_context(&handle, &other), GVOTE_ERROR_NOT_ATTACHED);
        assert!([&app, &other].map(|app| app.state(0)) == before);
    }
}

/// # Safety
/// Both live.
unsafe fn of_context(handle: &Handle, app: &App) -> Vec<Answer> {
    // SAFETY: see above.
    unsafe { of_a_context(handle.0, app.ctx) }
}

#[test]
fn each_refuses_sequences_that_there_are_not_or_that_are_empty() {
    let app = App::new(&tiny("llama"), &Shape { n_seq_max: 2, ..ONE });
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &words(N, 0))]);
    for seq in [-1, 2, 254, 255, 256, 1 << 16, i32::MAX, i32::MIN] {
        // SAFETY: all objects are alive.
        unsafe {
            all_are(&of_a_sequence(handle.0, app.ctx, seq), GVOTE_ERROR_NO_SEQUENCE);
            all_are(&[make_room(handle.0, app.ctx, seq)], GVOTE_ERROR_NO_SEQUENCE);
        }
    }
    // SAFETY: all objects are alive.
    let (last, others) =
        unsafe { of_a_sequence(handle.0, app.ctx, 1) }.split_last().map(|(l, o)| (*l, o.to_vec())).unwrap();
    all_are(&others, GVOTE_ERROR_NOT_SEEN);
    assert_eq!(last.1, GVOTE_ERROR_STATE, "no bytes are no state");
}

#[test]
fn each_that_takes_a_size_refuses_wrong_ones() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &words(N, 0))]);
    let known = handle.save(&app, 0);
    let mut data = vec![7_u8; known.len()];
    // SAFETY: all objects are alive and complete, whatever size they state.
    unsafe {
        for size in [0, 1, 8, 15, size_of::<gvote_params>() + 8, 0xfefe_fefe, usize::MAX] {
            let mut params = gvote_params { size, ..defaults() };
            assert_eq!(gvote_set_params(handle.0, &raw const params), GVOTE_ERROR_SIZE, "{size}");
            assert_eq!(gvote_get_params(handle.0, &raw mut params), GVOTE_ERROR_SIZE, "{size}");
            assert_eq!(params.size, size);
        }
        for size in [0, 1, 8, 15, size_of::<gvote_report>() + 8, 0xfefe_fefe, usize::MAX] {
            let mut report = gvote_report { size, ..report() };
            assert_eq!(gvote_plan(handle.0, app.ctx, 0, &raw mut report), GVOTE_ERROR_SIZE, "{size}");
            assert_eq!(gvote_compress(handle.0, app.ctx, 0, &raw mut report), GVOTE_ERROR_SIZE, "{size}");
            let status = gvote_vote_if_due(handle.0, app.ctx, 0, 0, ptr::null_mut(), &raw mut report);
            assert_eq!(status, GVOTE_ERROR_SIZE, "{size}");
            let status = gvote_make_room(handle.0, app.ctx, 0, 1, ptr::null(), 0, &raw mut report);
            assert_eq!(status, GVOTE_ERROR_SIZE, "{size}");
        }
        for size in [0, 1, known.len() - 1] {
            let mut written = 99;
            let to = data.as_mut_ptr().cast();
            assert_eq!(gvote_state_get(handle.0, app.ctx, 0, to, size, &raw mut written), GVOTE_ERROR_SIZE, "{size}");
            assert_eq!(written, 99);
        }
        let status = gvote_state_set(handle.0, app.ctx, 0, data.as_ptr().cast(), usize::MAX);
        assert_eq!(status, GVOTE_ERROR_SIZE, "more than there can be");
    }
    assert!(data.iter().all(|&byte| byte == 7), "what does not fit is not begun");
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, N as u32));
}

/// Data of the progress callback below.
struct Inside {
    g: *mut gvote_t,
    ctx: *mut llama_context,
    answers: Vec<Answer>,
}

unsafe extern "C" fn call_all(_: gvote_stage, data: *mut c_void) -> bool {
    // SAFETY: `data` points to the struct of the test below; the handle is alive.
    unsafe {
        let inside = &mut *data.cast::<Inside>();
        inside.answers.extend(of_all(inside.g, inside.ctx));
        // the call is refused: the handle stays alive
        gvote_free(inside.g);
        // a NULL node
        assert!(!gvote_cb_eval(ptr::null_mut(), true, inside.g.cast()));
    }
    true
}

#[test]
fn each_is_refused_while_another_call_is_running() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &words(N, 0))]);
    let mut inside = Inside { g: handle.0, ctx: app.ctx, answers: Vec::new() };
    // SAFETY: all objects are alive.
    unsafe { gvote_set_progress_callback(handle.0, Some(call_all), (&raw mut inside).cast()) };
    assert_eq!(handle.plan(&app, 0).0, GVOTE_OK, "{}", handle.error());
    assert!(inside.answers.len() > 100);
    for (name, status) in &inside.answers {
        let any_time = ["gvote_cancel", "gvote_cancel_clear"].contains(name);
        assert_eq!(*status, if any_time { GVOTE_OK } else { GVOTE_ERROR_BUSY }, "{name}");
    }
}

/// Another thread calls each function again and again. Calls that are not refused are served one after the other.
#[test]
fn each_can_be_called_from_another_thread_meanwhile() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::with(&app, &gvote_params { target_kl: 0.0, ..defaults() });
    app.decode(&[(0, 0, &words(N, 0))]);
    let before = app.state(0);
    let (over, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let begin = Instant::now();
    let (mut heard, mut refused) = (0, 0);
    thread::scope(|scope| {
        let (g, over, served) = (&handle, &over, &served);
        let other = scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                // SAFETY: the handle is alive.
                for (name, status) in unsafe { of_a_handle(g.raw()) } {
                    assert!([GVOTE_OK, GVOTE_ERROR_BUSY].contains(&status), "{name}: {status}");
                    served.fetch_add(usize::from(status == GVOTE_OK), Ordering::Relaxed);
                }
            }
        });
        // until both threads were served, and this one was also refused
        while (heard < 10 || refused == 0 || served.load(Ordering::Relaxed) == 0) && !other.is_finished() {
            match handle.plan(&app, 0).0 {
                GVOTE_ERROR_BUSY => refused += 1,
                GVOTE_OK | GVOTE_ERROR_CANCELLED => heard += 1,
                _ => break,
            }
            if begin.elapsed() > PATIENCE {
                break;
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(heard >= 10 && refused > 0, "{heard} votes, {refused} refusals: {}", handle.error());
    assert!(app.state(0) == before);
    // SAFETY: the handle is alive.
    assert_eq!(unsafe { gvote_cancel_clear(handle.0) }, GVOTE_OK);
    assert_eq!(handle.plan(&app, 0).0, GVOTE_OK);
}
