use std::ffi::c_void;
use std::ptr;

use super::app::*;
use crate::attach::ASKED;
use crate::capi::*;
use crate::llama::{Model, Pos, SeqId, Token};
use crate::sys;
use crate::tests::fixture;

const N: usize = 300;
const ANSWER: usize = 40;

/// Settings whose vote does not depend on the rounding of a trial.
fn capped() -> gvote_params {
    gvote_params { max_cells: 150, target_kl: 0.0, ..defaults() }
}

/// Number of nodes that gvote was asked about during `work`.
fn asked(work: impl FnOnce()) -> usize {
    let before = ASKED.get();
    work();
    ASKED.get() - before
}

/// Decodes an answer, a token at a time. `hears`: as if every graph were built anew, so that gvote observes each step.
fn answer(app: &App, handle: &Handle, seq: SeqId, first: Pos, tokens: &[Token], hears: bool) {
    for (pos, token) in (first..).zip(tokens) {
        if hears {
            attach(app, handle);
        }
        app.decode(&[(seq, pos, &[*token])]);
    }
}

/// Reinstalls the callback of a handle that is already attached.
fn attach(app: &App, handle: &Handle) {
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_attach(handle.0, app.ctx) }, GVOTE_OK);
}

/// Positions that the heads of a layer without a window keep.
fn kept(app: &App, handle: &Handle, seq: SeqId) -> [Vec<Pos>; 2] {
    [0, 1].map(|head| handle.positions(app, seq, 1, head))
}

#[test]
fn steps_of_an_answer_are_not_disturbed_and_the_next_prompt_is_heard() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::at(&app);
    assert!(asked(|| app.decode(&[(0, 0, &words(N, 0))])) > 0);
    // the first step builds a graph, which is reused up to 512 cells
    assert!(asked(|| answer(&app, &handle, 0, N as Pos, &words(1, 2), false)) > 0);
    assert_eq!(asked(|| answer(&app, &handle, 0, N as Pos + 1, &words(ANSWER, 3), false)), 0);
    assert!(asked(|| app.decode(&[(0, (N + ANSWER) as Pos + 1, &words(60, 4))])) > 0);
    let (status, report) = handle.compress(&app, 0);
    assert_eq!((status, report.cells_before as usize), (GVOTE_OK, N + ANSWER + 61), "{}", handle.error());
    // after a vote, gvote observes at most one step
    let n = N + ANSWER + 61;
    answer(&app, &handle, 0, n as Pos, &words(1, 5), false);
    assert_eq!(asked(|| answer(&app, &handle, 0, n as Pos + 1, &words(5, 6), false)), 0);
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, report.cells_after + 6));
}

/// A device computes the rest of a part of the graph at once, with all nodes that are read of it, unless the app reads
/// nodes too.
#[test]
fn a_device_stops_once_for_a_prompt() {
    unsafe extern "C" fn look_on(_: *mut sys::ggml_tensor, _: bool, _: *mut c_void) -> bool {
        false
    }
    unsafe extern "C" fn call_it(t: *mut sys::ggml_tensor, ask: bool, handle: *mut c_void) -> bool {
        // SAFETY: passes on what ggml passed.
        unsafe { gvote_cb_eval(t, ask, handle) }
    }
    #[derive(PartialEq)]
    enum Callback {
        IsBlind,
        LooksOn,
        CallsIt,
    }
    let decode = |who: Callback| {
        let app = App::new(&tiny("llama"), &Shape { flash: true, ..ONE });
        let handle = Handle::with(&app, &capped());
        // SAFETY: the handle and the context live; the first callback needs no data.
        unsafe {
            if who == Callback::LooksOn {
                assert_eq!(gvote_set_next_callback(handle.0, Some(look_on), ptr::null_mut()), GVOTE_OK);
            } else if who == Callback::CallsIt {
                sys::gvote_shim_set_eval_callback(app.ctx, Some(call_it), handle.0.cast());
            }
        }
        let n_asked = asked(|| app.decode(&[(0, 0, &words(N, 0))]));
        let (status, _) = handle.compress(&app, 0);
        assert_eq!(status, GVOTE_OK, "{}", handle.error());
        let heads = kept(&app, &handle, 0);
        app.decode(&[(0, N as Pos, &words(1, 7))]);
        (n_asked, heads, app.logits(0).1)
    };
    let [(stops, kept, logits), looked_on, called] =
        fixture::on_device(|| [Callback::IsBlind, Callback::LooksOn, Callback::CallsIt].map(decode));
    for (asked, others, expected) in [looked_on, called] {
        assert!(10 * stops < asked, "{stops} and {asked}");
        assert!(kept == others && logits == expected);
    }
}

/// Every cell and every head holds what it would hold with all steps observed.
#[test]
fn a_vote_after_unheard_steps_is_that_of_one_who_heard_everything() {
    for (arch, flash) in [("llama", false), ("llama", true), ("gemma2", false)] {
        let votes = |hears: bool| {
            let app = App::new(&tiny(arch), &Shape { flash, ..ONE });
            let handle = Handle::with(&app, &capped());
            let mut votes = Vec::new();
            let mut n_asked = 0;
            let mut n = 0;
            for turn in 0..3 {
                app.decode(&[(0, n, &words(N / 2, turn))]);
                n += N as Pos / 2;
                app.decode(&[(0, n, &words(1, turn))]);
                n_asked += asked(|| answer(&app, &handle, 0, n + 1, &words(ANSWER, 9 + turn), hears));
                n += 1 + ANSWER as Pos;
                let (status, report) = handle.compress(&app, 0);
                assert_eq!(status, GVOTE_OK, "{}", handle.error());
                votes.push((report.cells_after, report.lost_mass.to_bits(), kept(&app, &handle, 0)));
            }
            assert!(votes.iter().all(|vote| vote.0 == 150), "{votes:?}");
            (votes, n_asked, app.state(0))
        };
        let (all, some) = (votes(true), votes(false));
        assert!(all.1 > 10 * some.1, "{} and {} nodes", all.1, some.1);
        assert!((all.0, all.2) == (some.0, some.2), "{arch}, flash {flash}");
    }
}

/// The same with a real model, including the trial.
#[test]
fn a_trial_after_unheard_steps_is_that_of_one_who_heard_everything() {
    let model: Model = fixture::model();
    let tokens = fixture::tokens(&model, N + 1 + ANSWER);
    let vote = |hears: bool| {
        let app = App::new(&model, &ONE);
        let handle = Handle::at(&app);
        app.decode(&[(0, 0, &tokens[..N])]);
        app.decode(&[(0, N as Pos, &tokens[N..=N])]);
        let n_asked = asked(|| answer(&app, &handle, 0, N as Pos + 1, &tokens[N + 1..], hears));
        assert_eq!(n_asked > 0, hears);
        let (status, report) = handle.compress(&app, 0);
        assert_eq!(status, GVOTE_OK, "{}", handle.error());
        let tried: Vec<_> = report.tried.iter().map(|tried| (tried.cells, tried.kl.to_bits())).collect();
        let heads = [(0, 0), (13, 1), (29, 2)].map(|(layer, head)| handle.positions(&app, 0, layer, head));
        (report.cells_after, tried, heads)
    };
    assert_eq!(vote(false), vote(true));
}

/// After a tail was removed, replaced and removed again, the present cells count.
#[test]
fn a_tail_that_was_replaced_unheard_is_followed() {
    let votes = |hears: bool| {
        let app = App::new(&tiny("llama"), &ONE);
        let handle = Handle::with(&app, &capped());
        app.decode(&[(0, 0, &words(N, 0))]);
        app.decode(&[(0, N as Pos, &words(1, 1))]);
        let go_on = |first: usize, kind: i32, n: usize| answer(&app, &handle, 0, first as Pos, &words(n, kind), hears);
        go_on(N + 1, 2, 20);
        assert_eq!(handle.cells(&app, 0), (GVOTE_OK, N as u32 + 21));
        // shorter than before, longer than before, as long as before
        for (from, kind, n) in [(N + 5, 3, 6), (N + 3, 4, 40), (N + 3, 5, 40), (N - 10, 6, 53)] {
            app.remove(0, from as Pos, -1);
            assert_eq!(asked(|| go_on(from, kind, n)) > 0, hears);
            assert_eq!(handle.cells(&app, 0), (GVOTE_OK, (from + n) as u32), "{}", handle.error());
        }
        let report = handle.compressed(&app, 0);
        let first = (report.lost_mass.to_bits(), kept(&app, &handle, 0));
        // behind the compressed part as well
        answer(&app, &handle, 0, 343, &words(1, 7), hears);
        go_on(344, 8, 20);
        app.remove(0, 320, -1);
        go_on(320, 9, 30);
        let report = handle.compressed(&app, 0);
        assert_eq!(report.cells_before, 150 - 23 + 30);
        (first, report.lost_mass.to_bits(), kept(&app, &handle, 0))
    };
    assert_eq!(votes(false), votes(true));
}

/// A position is not protected any more when another token comes there.
#[test]
fn a_tail_that_was_replaced_unheard_is_protected_no_longer() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::with(&app, &capped());
    app.decode(&[(0, 0, &words(N, 0))]);
    answer(&app, &handle, 0, N as Pos, &words(5, 1), false);
    assert_eq!(handle.protect(&app, 0, 100, N as Pos, true), GVOTE_OK);
    // so many protected tokens cannot stay
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_PARAMS, "{}", handle.error());
    app.remove(0, 150, -1);
    answer(&app, &handle, 0, 150, &words(100, 2), false);
    handle.compressed(&app, 0);
    for positions in kept(&app, &handle, 0) {
        assert!((100..150).all(|pos| positions.contains(&pos)), "{positions:?}");
    }
}

/// The callback is removed when the sequence begins anew, with a single token.
#[test]
fn a_sequence_that_begins_anew_unheard_is_compressed_as_a_new_one() {
    let text = words(200, 7);
    for compresses in [false, true] {
        let app = App::new(&tiny("llama"), &ONE);
        let handle = Handle::with(&app, &capped());
        app.decode(&[(0, 0, &words(200, 0))]);
        app.decode(&[(0, 200, &words(1, 1))]);
        if compresses {
            handle.compressed(&app, 0);
        }
        // up to 256 cells the graph is reused
        answer(&app, &handle, 0, 201, &words(3, 2), false);
        app.remove(0, -1, -1);
        assert_eq!(asked(|| answer(&app, &handle, 0, 0, &text, false)), 0);
        let report = handle.compressed(&app, 0);
        assert_eq!((report.cells_before, report.cells_after), (200, 150));
        let statistics = handle.save(&app, 0);

        // nothing of the old text is left in the record
        let new = App::new(&tiny("llama"), &Shape { n_seq_max: 2, ..ONE });
        let only = Handle::with(&new, &capped());
        answer(&new, &only, 1, 0, &words(10, 3), false);
        new.remove(1, -1, -1);
        assert_eq!(asked(|| answer(&new, &only, 0, 0, &text, false)), 0);
        assert_eq!(only.compressed(&new, 0).lost_mass, report.lost_mass);
        assert_eq!(kept(&new, &only, 0), kept(&app, &handle, 0));
        assert!(only.save(&new, 0) == statistics);
    }
}

#[test]
fn what_was_loaded_is_refused_though_the_callback_was_away() {
    let app = App::new(&tiny("llama"), &Shape { n_seq_max: 2, ..ONE });
    let handle = Handle::with(&app, &capped());
    app.decode(&[(1, 0, &words(N, 4))]);
    app.decode(&[(1, N as Pos, &words(1, 5))]);
    let state = app.state(1);
    app.load(0, &state);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_NOT_SEEN);
    assert!(handle.error().contains("loaded"), "{}", handle.error());
    // whatever is decoded behind the sequence, and in place of its end
    answer(&app, &handle, 0, N as Pos + 1, &words(10, 6), false);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_NOT_SEEN);
    app.remove(0, 100, -1);
    app.decode(&[(0, 100, &words(N, 7))]);
    assert_ne!(handle.compress(&app, 0).0, GVOTE_OK);

    // in place of a known sequence, compressed or not
    handle.compressed(&app, 1);
    app.load(1, &state);
    answer(&app, &handle, 1, N as Pos + 1, &words(10, 6), false);
    assert_eq!(handle.compress(&app, 1).0, GVOTE_ERROR_CHANGED);
    app.remove(1, -1, -1);
    app.decode(&[(1, 0, &words(50, 0))]);
    assert_eq!(handle.cells(&app, 1), (GVOTE_OK, 50));
    app.load(1, &state);
    assert_eq!(handle.compress(&app, 1).0, GVOTE_ERROR_CHANGED);
}

/// A context shift during an answer: cells that no longer lie where they were, and cells that were never known.
#[test]
fn cells_that_moved_while_the_callback_was_away_are_refused() {
    for n_keep in [0, 10] {
        let app = App::new(&tiny("llama"), &ONE);
        let handle = Handle::with(&app, &capped());
        app.decode(&[(0, 0, &words(N, 0))]);
        answer(&app, &handle, 0, N as Pos, &words(10, 1), false);
        app.remove(0, n_keep, n_keep + 100);
        // SAFETY: valid memory.
        unsafe { sys::llama_memory_seq_add(app.memory(), 0, n_keep + 100, -1, -100) };
        answer(&app, &handle, 0, N as Pos - 90, &words(10, 2), false);
        assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_CHANGED, "{n_keep}");
        assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_CHANGED, "{n_keep}: it was accepted the second time");
        app.remove(0, -1, -1);
        app.decode(&[(0, 0, &words(N, 0))]);
        handle.compressed(&app, 0);
    }
}

/// The moved cells were never recorded: each still holds exactly its own position.
#[test]
fn cells_of_an_answer_that_moved_unheard_are_followed() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::with(&app, &capped());
    app.decode(&[(0, 0, &words(N, 0))]);
    answer(&app, &handle, 0, N as Pos, &words(100, 1), false);
    let p0 = N as Pos + 10;
    app.remove(0, p0, p0 + 50);
    // SAFETY: valid memory.
    unsafe { sys::llama_memory_seq_add(app.memory(), 0, p0 + 50, -1, -50) };
    let report = handle.compressed(&app, 0);
    assert_eq!((report.cells_before, report.cells_after), (N as u32 + 50, 150));
    for positions in kept(&app, &handle, 0) {
        assert_eq!(&positions[86..], (N as Pos - 14..N as Pos + 50).collect::<Vec<_>>(), "the recent ones stay");
    }
    app.decode(&[(0, N as Pos + 50, &words(20, 2))]);
    assert!(app.logits(19).1.iter().all(|logit| logit.is_finite()));
    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 170));
}

/// In one stream and in several. One sequence begins while the callback is removed.
#[test]
fn several_sequences_go_on_unheard_and_each_is_followed() {
    for unified in [true, false] {
        let votes = |hears: bool| {
            let app = App::new(&tiny("llama"), &Shape { n_ctx: 2048, n_seq_max: 4, unified, flash: false });
            let handle = Handle::with(&app, &capped());
            let prompts: Vec<_> = (0..3).map(|kind| words(180 + 10 * kind as usize, kind)).collect();
            let parts: Vec<_> = (0..).zip(&prompts).map(|(seq, tokens)| (seq, 0, tokens.as_slice())).collect();
            app.decode(&parts);
            let step = |i: usize| {
                if hears {
                    attach(&app, &handle);
                }
                let token = words(1, 5 + i as i32);
                let parts: Vec<_> =
                    (0..).zip(&prompts).map(|(seq, prompt)| (seq, (prompt.len() + i) as Pos, &token[..])).collect();
                app.decode(&parts);
            };
            step(0);
            let n_asked = asked(|| (1..30).for_each(step));
            assert_eq!(n_asked > 0, hears, "unified {unified}");
            (0..3)
                .map(|seq| (handle.compressed(&app, seq).lost_mass.to_bits(), kept(&app, &handle, seq)))
                .collect::<Vec<_>>()
        };
        assert_eq!(votes(false), votes(true), "unified {unified}");
    }

    let app = App::new(&tiny("llama"), &Shape { n_ctx: 1024, n_seq_max: 2, ..ONE });
    let handle = Handle::with(&app, &capped());
    app.decode(&[(0, 0, &words(N, 0))]);
    answer(&app, &handle, 0, N as Pos, &words(2, 1), false);
    assert_eq!(asked(|| answer(&app, &handle, 1, 0, &words(200, 2), false)), 0);
    let report = handle.compressed(&app, 1);
    assert_eq!((report.cells_before, report.cells_after), (200, 150));
}

/// The statistics of a copy of an uncompressed sequence are those of its newest tokens.
#[test]
fn a_copy_is_followed() {
    for unified in [true, false] {
        let app = App::new(&tiny("llama"), &Shape { n_ctx: 1536, n_seq_max: 2, unified, flash: false });
        let handle = Handle::with(&app, &capped());
        app.decode(&[(0, 0, &words(N, 0))]);
        // SAFETY: valid memory.
        unsafe { sys::llama_memory_seq_cp(app.memory(), 0, 1, -1, -1) };
        answer(&app, &handle, 1, N as Pos, &words(20, 1), false);
        assert_eq!(handle.cells(&app, 1), (GVOTE_OK, N as u32 + 20));
        app.remove(0, -1, -1);
        assert_eq!(handle.cells(&app, 0).0, GVOTE_ERROR_NOT_SEEN);
        let report = handle.compressed(&app, 1);
        assert_eq!((report.cells_before, report.cells_after), (N as u32 + 20, 150));

        // a copy of a compressed sequence as well
        // SAFETY: valid memory.
        unsafe { sys::llama_memory_seq_cp(app.memory(), 1, 0, -1, -1) };
        answer(&app, &handle, 0, N as Pos + 20, &words(20, 1), false);
        assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 170));
        if unified {
            assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_SHARED);
            app.remove(1, -1, -1);
        }
        let report = handle.compressed(&app, 0);
        assert_eq!((report.cells_before, report.cells_after), (170, 150));
    }
}

/// Once the original has other cells, it is unknown what a copy of the earlier ones holds.
#[test]
fn a_copy_of_what_was_voted_on_since_is_not_known() {
    let app = App::new(&tiny("llama"), &Shape { n_ctx: 1536, n_seq_max: 2, unified: false, flash: false });
    let handle = Handle::with(&app, &capped());
    app.decode(&[(0, 0, &words(N, 0))]);
    handle.compressed(&app, 0);
    // SAFETY: valid memory.
    unsafe { sys::llama_memory_seq_cp(app.memory(), 0, 1, -1, -1) };
    app.decode(&[(0, N as Pos, &words(60, 1))]);
    handle.compressed(&app, 0);
    assert_eq!(handle.compress(&app, 1).0, GVOTE_ERROR_NOT_SEEN);
}

/// A window cache has no room for many tokens at once.
#[test]
fn a_sequence_that_nobody_heard_is_compressed_beside_a_sliding_window() {
    let app = App::with(&tiny("gemma2"), &Shape { n_ctx: 1024, n_seq_max: 2, ..ONE }, |params| params.swa_full = false);
    let handle = Handle::with(&app, &capped());
    app.decode(&[(0, 0, &words(100, 0))]);
    answer(&app, &handle, 0, 100, &words(2, 1), false);
    answer(&app, &handle, 1, 0, &words(240, 2), false);
    handle.compressed(&app, 1);
}

unsafe extern "C" fn count(_: *mut sys::ggml_tensor, ask: bool, data: *mut c_void) -> bool {
    // SAFETY: the app's own counter.
    unsafe { *data.cast::<usize>() += usize::from(ask) };
    !ask
}

/// The app's callback is called at every step, as it would be without gvote.
#[test]
fn a_callback_of_the_apps_own_stays_during_an_answer() {
    let mut seen = 0_usize;
    let data = (&raw mut seen).cast();
    let app = App::with(&tiny("llama"), &ONE, |params| {
        params.cb_eval = Some(count);
        params.cb_eval_user_data = data;
    });
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &words(N, 0))]);
    for i in 0..5 {
        let before = seen;
        app.decode(&[(0, (N + i) as Pos, &[1])]);
        assert!(seen > before, "step {i}");
    }

    // a callback that is set while gvote's is removed is called once the handle is attached again
    let app = App::new(&tiny("llama"), &ONE);
    let second = Handle::at(&app);
    drop(handle);
    app.decode(&[(0, 0, &words(N, 0))]);
    answer(&app, &second, 0, N as Pos, &words(5, 1), false);
    // SAFETY: all objects are alive.
    assert_eq!(unsafe { gvote_set_next_callback(second.0, Some(count), data) }, GVOTE_OK);
    attach(&app, &second);
    for i in 5..10 {
        let before = seen;
        app.decode(&[(0, (N + i) as Pos, &[1])]);
        assert!(seen > before, "step {i}");
    }
    // SAFETY: all objects are alive.
    assert_eq!(unsafe { gvote_set_next_callback(second.0, None, ptr::null_mut()) }, GVOTE_OK);
    app.decode(&[(0, N as Pos + 10, &[1])]);
    assert_eq!(asked(|| app.decode(&[(0, N as Pos + 11, &[1])])), 0);
    // detached while the callback is removed
    // SAFETY: all objects are alive.
    assert_eq!(unsafe { gvote_detach(second.0, app.ctx) }, GVOTE_OK);
    assert_eq!(asked(|| app.decode(&[(0, N as Pos + 12, &words(20, 3))])), 0);
}
