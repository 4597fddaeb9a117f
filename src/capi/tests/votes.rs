use std::ffi::c_void;
use std::ops::ControlFlow;
use std::ptr;

use super::app::*;
use crate::capi::*;
use crate::llama::{CacheType, ContextParams, FlashAttention, Token};
use crate::sys;
use crate::tests::fixture;
use crate::vote::Voter;
use crate::{Session, SessionParams};

const N: usize = 400;

fn capped(cells: u32) -> gvote_params {
    gvote_params { max_cells: cells, ..defaults() }
}

/// A real model with default settings: the number of cells, each attempt of the trial, and the rows that every head
/// keeps.
#[test]
fn a_vote_does_what_a_session_does() {
    let model = fixture::model();
    let tokens = fixture::tokens(&model, N);
    for (flash, cache) in [(false, CacheType::F16), (true, CacheType::Q8_0)] {
        let context = ContextParams {
            n_ctx: 512,
            n_ubatch: 128,
            n_threads: 2,
            n_threads_batch: 2,
            flash_attn: if flash { FlashAttention::On } else { FlashAttention::Off },
            type_k: cache,
            type_v: cache,
            ..ContextParams::default()
        };
        let mut session = Session::new(&model, &SessionParams { context, ..SessionParams::default() }).unwrap();
        session.prefill(&tokens, |_, _| ControlFlow::Continue(())).unwrap();
        let expected = session.compress().unwrap();

        let shape = Shape { n_ctx: session.context().n_ctx() as u32, flash, ..ONE };
        let app = App::with(&model, &shape, |params| {
            (params.type_k, params.type_v) = (cache.raw(), cache.raw());
        });
        let handle = Handle::at(&app);
        app.decode(&[(0, 0, &tokens)]);
        let (status, got) = handle.compress(&app, 0);
        assert_eq!(status, GVOTE_OK, "{}", handle.error());

        assert_eq!(
            (got.cells_before as usize, got.cells_after as usize),
            (expected.cells_before, expected.cells_after)
        );
        assert_eq!(got.kv_bytes_after as usize, expected.kv_bytes_after);
        assert_eq!(got.rounding, expected.rounding);
        let tried = got.tried[..got.n_tried as usize].iter().map(|t| (t.cells as usize, t.kl)).collect::<Vec<_>>();
        assert_eq!(tried, expected.tried);
        let cells = crate::cache::cells(session.context(), 0);
        for (layer, head) in [(0, 0), (13, 1), (29, 2)] {
            let expected = session.sequence().positions(&cells, layer as usize * 3 + head as usize);
            assert_eq!(handle.positions(&app, 0, layer, head), expected);
        }
    }
}

/// llama.cpp's marker for a random seed is an ordinary seed here.
#[test]
fn every_seed_chooses_the_same_each_time() {
    let app = App::new(&tiny("llama"), &ONE);
    for seed in [0, u64::from(sys::LLAMA_DEFAULT_SEED), u64::MAX] {
        let kept = [(); 2].map(|()| {
            app.remove(0, 0, -1);
            let handle = Handle::with(&app, &gvote_params { seed, ..capped(150) });
            app.decode(&[(0, 0, &words(N, 1))]);
            handle.compressed(&app, 0);
            (0..2).map(|head| handle.positions(&app, 0, 0, head)).collect::<Vec<_>>()
        });
        assert_eq!(kept[0], kept[1], "{seed}");
        assert_eq!(kept[0][0].len(), 150, "{seed}");
    }
}

/// Four sequences in one batch, in one stream and in four.
#[test]
fn outputs_and_other_sequences_are_not_disturbed() {
    let model = tiny("llama");
    for (unified, flash) in [(true, false), (true, true), (false, false), (false, true)] {
        let app = App::new(&model, &Shape { n_ctx: 2048, n_seq_max: 4, unified, flash });
        let handle = Handle::with(&app, &capped(150));
        let prompts: Vec<_> = (0..4).map(|kind| words(260 + 10 * kind as usize, kind)).collect();
        let parts: Vec<_> = (0..).zip(&prompts).map(|(seq, tokens)| (seq, 0, tokens.as_slice())).collect();
        app.decode(&parts);
        let mut rows = Vec::new();
        prompts.iter().fold(-1, |last, tokens| {
            rows.push(last + tokens.len() as i32);
            last + tokens.len() as i32
        });
        let outputs = |app: &App| rows.iter().map(|&row| app.logits(row)).collect::<Vec<_>>();
        let before = outputs(&app);
        for seq in [2, 0, 3, 1] {
            let others: Vec<_> = (0..4).filter(|other| *other != seq).collect();
            let states: Vec<_> = others.iter().map(|&other| app.state(other)).collect();
            let report = handle.compressed(&app, seq);
            assert_eq!(report.cells_after, 150);
            assert!(outputs(&app) == before, "unified {unified}, after {seq}");
            assert!(others.iter().map(|&other| app.state(other)).eq(states), "unified {unified}, after {seq}");
        }
        // all sequences continue in one batch
        let next: Vec<_> = (0..).zip(&prompts).map(|(seq, prompt)| (seq, prompt.len() as i32, &prompt[..1])).collect();
        app.decode(&next);
        for seq in 0..4 {
            assert_eq!(handle.cells(&app, seq), (GVOTE_OK, 151));
        }
    }
}

/// Each of four sequences in one batch is observed as if it were alone, except that kernels round differently in a
/// batch of another shape.
#[test]
fn sequences_in_one_batch_are_not_mixed_up() {
    let model = tiny("llama");
    let prompts: Vec<_> = (0..4).map(|kind| words(260 + 10 * kind as usize, kind)).collect();
    let kept_alone: Vec<Vec<i32>> = prompts
        .iter()
        .map(|prompt| {
            let app = App::new(&model, &ONE);
            let handle = Handle::with(&app, &capped(150));
            app.decode(&[(0, 0, prompt)]);
            handle.compressed(&app, 0);
            handle.positions(&app, 0, 1, 0)
        })
        .collect();
    for unified in [true, false] {
        let app = App::new(&model, &Shape { n_ctx: 2048, n_seq_max: 4, unified, flash: false });
        let handle = Handle::with(&app, &capped(150));
        let parts: Vec<_> = (0..).zip(&prompts).map(|(seq, tokens)| (seq, 0, tokens.as_slice())).collect();
        app.decode(&parts);
        for (seq, expected) in (0..).zip(&kept_alone) {
            handle.compressed(&app, seq);
            let got = handle.positions(&app, seq, 1, 0);
            let same = got.iter().filter(|pos| expected.contains(pos)).count();
            assert!(same > 140, "unified {unified}, sequence {seq}: {same} of 150");
        }
    }
}

/// The choice for a sequence does not depend on the other sequences of the context.
#[test]
fn a_sequence_among_others_is_compressed_as_if_it_were_alone() {
    let model = tiny("llama");
    let prompt = words(300, 1);
    let alone = App::new(&model, &Shape { n_ctx: 768, n_seq_max: 1, unified: true, flash: false });
    let handle = Handle::with(&alone, &capped(150));
    alone.decode(&[(0, 0, &prompt)]);
    handle.compressed(&alone, 0);
    let expected: Vec<_> = (0..3).map(|layer| handle.positions(&alone, 0, layer, 1)).collect();

    let streams = App::new(&model, &Shape { n_ctx: 4 * 768, n_seq_max: 4, unified: false, flash: false });
    let handle = Handle::with(&streams, &capped(150));
    streams.decode(&[(0, 0, &words(200, 5)), (3, 0, &words(200, 6))]);
    streams.decode(&[(2, 0, &prompt)]);
    handle.compressed(&streams, 2);
    let got: Vec<_> = (0..3).map(|layer| handle.positions(&streams, 2, layer, 1)).collect();
    assert_eq!(got, expected);
}

/// Not only the saved state is equal: the next tokens go to the same cells.
#[test]
fn after_a_plan_decoding_goes_on_as_without() {
    let go_on = |unified: bool, arch: &str, plans: bool| {
        let app = App::new(&tiny(arch), &Shape { n_ctx: 2048, n_seq_max: 2, unified, flash: false });
        let handle = Handle::with(&app, &gvote_params { target_kl: 1e-4, ..defaults() });
        app.decode(&[(0, 0, &words(N, 0)), (1, 0, &words(50, 1))]);
        // a hole, so that the search for free cells does not begin at the end
        app.remove(1, 20, -1);
        if plans {
            let (status, plan) = handle.plan(&app, 0);
            assert_eq!(status, GVOTE_OK, "{}", handle.error());
            assert!(plan.n_tried > 0);
        }
        app.decode(&[(0, N as i32, &words(40, 2)), (1, 20, &words(3, 3))]);
        let cells = [0, 1].map(|seq| {
            // SAFETY: valid context, used here alone.
            let ctx = unsafe { crate::llama::Context::lent(ptr::NonNull::new(app.ctx).unwrap(), Default::default()) };
            crate::cache::cells(&ctx, seq)
        });
        (app.logits(39).1, app.logits(42).1, cells)
    };
    for unified in [true, false] {
        for arch in ["llama", "gemma2"] {
            assert!(go_on(unified, arch, true) == go_on(unified, arch, false), "{arch}, unified {unified}");
        }
    }
}

#[test]
fn a_plan_tells_what_a_compression_does_and_changes_nothing() {
    for arch in ["llama", "gemma2"] {
        for flash in [false, true] {
            let app = App::new(&tiny(arch), &Shape { flash, ..ONE });
            let handle = Handle::with(&app, &gvote_params { target_kl: 1e-4, ..defaults() });
            app.decode(&[(0, 0, &words(N, 0))]);
            let before = app.state(0);
            let (status, plan) = handle.plan(&app, 0);
            assert_eq!(status, GVOTE_OK, "{}", handle.error());
            assert!(plan.n_tried > 0);
            assert!(app.state(0) == before, "{arch}");
            assert_eq!(handle.cells(&app, 0), (GVOTE_OK, N as u32));
            let (_, done) = handle.compress(&app, 0);
            assert_eq!((plan.cells_after, plan.bound, plan.n_tried), (done.cells_after, done.bound, done.n_tried));
            assert_eq!(handle.cells(&app, 0), (GVOTE_OK, done.cells_after));
        }
    }
}

/// A full window cache has no cell for a draft: cells outside the window make room, and come back.
#[test]
fn a_full_window_cache_is_brought_back_whole() {
    let model = tiny("gemma2");
    for flash in [false, true] {
        let app = App::new(&model, &Shape { n_ctx: 1024, flash, ..ONE });
        let handle = Handle::with(&app, &gvote_params { target_kl: 1e-4, ..defaults() });
        for first in (0..900).step_by(100) {
            app.decode(&[(0, first, &words(100, first))]);
        }
        // the whole cache, not only the part inside the window
        let whole = |app: &App| {
            // SAFETY: the buffer has the size that llama.cpp asks for.
            unsafe {
                let mut data = vec![0; sys::llama_state_get_size(app.ctx)];
                let n = sys::llama_state_get_data(app.ctx, data.as_mut_ptr(), data.len());
                data.truncate(n);
                data
            }
        };
        let before = whole(&app);
        let (status, plan) = handle.plan(&app, 0);
        assert_eq!(status, GVOTE_OK, "{}", handle.error());
        assert!(plan.n_tried > 0, "{plan:?}");
        assert!(whole(&app) == before, "flash {flash}");
    }
}

#[test]
fn generated_tokens_are_heard_so_that_a_sequence_can_be_compressed_again() {
    for recall in [GVOTE_RECALL_OFF, GVOTE_RECALL_AUTO] {
        let app = App::new(&tiny("llama"), &ONE);
        let handle = Handle::with(&app, &gvote_params { recall, ..capped(150) });
        app.decode(&[(0, 0, &words(300, 0))]);
        handle.compressed(&app, 0);
        let first = handle.positions(&app, 0, 1, 0);
        let tokens = words(100, 2);
        for (i, token) in tokens.iter().enumerate() {
            app.decode(&[(0, 300 + i as i32, &[*token])]);
        }
        let report = handle.compressed(&app, 0);
        assert_eq!((report.cells_before, report.cells_after), (250, 150));
        let second = handle.positions(&app, 0, 1, 0);
        assert_eq!(second.len(), 150);
        assert!(second.windows(2).all(|w| w[0] < w[1]), "ascending: {second:?}");
        // dropped rows do not come back, unless they were set aside
        let is_lost = second.iter().all(|pos| *pos >= 300 || first.contains(pos));
        assert_eq!(is_lost, recall == GVOTE_RECALL_OFF, "{second:?}");
        assert_eq!(&second[86..], (336..400).collect::<Vec<_>>(), "the recent ones stay");
    }
}

/// Without tokens there is no text to continue, so that no trial is made.
#[test]
fn embeddings_as_input_leave_the_count_to_the_lost_mass() {
    let app = App::new(&tiny("llama"), &ONE);
    let handle = Handle::at(&app);
    let n = 300;
    let mut embeddings: Vec<f32> = (0..n * crate::tests::tiny::N_EMBD).map(|i| (0.37 * i as f32).sin()).collect();
    let mut pos: Vec<i32> = (0..n as i32).collect();
    let mut n_seq_id = vec![1; n];
    let mut ids = [0];
    let mut seq_id = vec![ids.as_mut_ptr(); n];
    let mut logits = vec![0; n];
    logits[n - 1] = 1;
    // SAFETY: every array has n entries.
    unsafe {
        let batch = sys::llama_batch {
            n_tokens: n as i32,
            token: ptr::null_mut(),
            embd: embeddings.as_mut_ptr(),
            pos: pos.as_mut_ptr(),
            n_seq_id: n_seq_id.as_mut_ptr(),
            seq_id: seq_id.as_mut_ptr(),
            logits: logits.as_mut_ptr(),
        };
        assert_eq!(sys::llama_decode(app.ctx, batch), 0);
    }
    let (status, report) = handle.compress(&app, 0);
    assert_eq!(status, GVOTE_OK, "{}", handle.error());
    assert_eq!((report.n_tried, report.bound), (0, GVOTE_BOUND_LOST_MASS), "{report:?}");
}

unsafe extern "C" fn count(_: *mut sys::ggml_tensor, ask: bool, data: *mut c_void) -> bool {
    // SAFETY: `data` points to two counters: nodes asked about, and nodes read.
    let counters = unsafe { &mut *data.cast::<[usize; 2]>() };
    counters[usize::from(!ask)] += 1;
    // ask for every third node, so that gvote alone asks for the others
    !ask || counters[0] % 3 == 0
}

fn callback_of(app: &App) -> (bool, *mut c_void) {
    let (mut callback, mut data) = (None, ptr::null_mut());
    // SAFETY: valid context.
    unsafe { sys::gvote_shim_get_eval_callback(app.ctx, &raw mut callback, &raw mut data) };
    let is_count = callback.is_some_and(|callback| callback as usize == count as *const () as usize);
    (is_count, data)
}

#[test]
fn the_apps_own_eval_callback_goes_on_seeing_its_nodes() {
    let model = tiny("llama");
    let nodes = |attach: bool| {
        let mut counters = [0usize; 2];
        let app = App::with(&model, &ONE, |params| {
            params.cb_eval = Some(count);
            params.cb_eval_user_data = (&raw mut counters).cast();
        });
        let handle = Handle::new(&capped(150));
        if attach {
            // SAFETY: both objects are alive.
            assert_eq!(unsafe { gvote_attach(handle.0, app.ctx) }, GVOTE_OK);
        }
        app.decode(&[(0, 0, &words(N, 0))]);
        let heard = counters;
        if attach {
            handle.compressed(&app, 0);
            assert_eq!(counters, heard, "a vote's own graphs are not the app's");
            assert!(!callback_of(&app).0);
            // SAFETY: both objects are alive.
            assert_eq!(unsafe { gvote_detach(handle.0, app.ctx) }, GVOTE_OK);
        }
        assert_eq!(callback_of(&app), (true, (&raw mut counters).cast()));
        heard
    };
    assert_eq!(nodes(true), nodes(false));
}

/// The app installs the callback itself, in the parameters of the context.
#[test]
fn the_callback_can_be_installed_by_the_app() {
    let handle = Handle::new(&capped(150));
    let app = App::with(&tiny("llama"), &ONE, |params| {
        params.cb_eval = Some(gvote_cb_eval);
        params.cb_eval_user_data = handle.0.cast();
    });
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_attach(handle.0, app.ctx) }, GVOTE_OK);
    app.decode(&[(0, 0, &words(N, 0))]);
    assert_eq!(handle.compressed(&app, 0).cells_after, 150);
}

#[test]
fn an_app_that_also_wants_embeddings_keeps_them() {
    let app = App::with(&tiny("llama"), &ONE, |params| params.embeddings = true);
    let handle = Handle::with(&app, &gvote_params { target_kl: 1e-4, ..defaults() });
    app.decode(&[(0, 0, &words(N, 0))]);
    let embeddings = || {
        // SAFETY: as many values as the model is wide.
        unsafe {
            let row = sys::llama_get_embeddings_ith(app.ctx, N as i32 - 1);
            assert!(!row.is_null());
            std::slice::from_raw_parts(row, crate::tests::tiny::N_EMBD).to_vec()
        }
    };
    let before = embeddings();
    let (status, report) = handle.compress(&app, 0);
    assert_eq!(status, GVOTE_OK, "{}", handle.error());
    assert!(report.n_tried > 0);
    assert!(embeddings() == before);
    let next: [Token; 1] = [3];
    app.decode(&[(0, N as i32, &next)]);
    assert_eq!(embeddings_row(&app).len(), crate::tests::tiny::N_EMBD);
}

fn embeddings_row(app: &App) -> Vec<f32> {
    // SAFETY: as many values as the model is wide.
    unsafe {
        let row = sys::llama_get_embeddings_ith(app.ctx, 0);
        assert!(!row.is_null());
        std::slice::from_raw_parts(row, crate::tests::tiny::N_EMBD).to_vec()
    }
}

#[test]
fn a_context_that_gives_few_outputs_at_once_is_asked_for_few() {
    let model = tiny("llama");
    let vote = |n_outputs_max| {
        let app = App::with(&model, &ONE, |params| params.n_outputs_max = n_outputs_max);
        let handle = Handle::with(&app, &gvote_params { target_kl: 1e-4, ..defaults() });
        app.decode(&[(0, 0, &words(N, 0))]);
        let (status, report) = handle.compress(&app, 0);
        assert_eq!(status, GVOTE_OK, "{}", handle.error());
        report
    };
    let (few, many) = (vote(1), vote(0));
    assert!(few.n_tried > 0);
    assert_eq!(few.cells_before, many.cells_before);
}

/// An app's sampler that runs in the graph does not see a draft: its sample stays, and it continues to sample.
#[test]
fn samplers_in_the_graph_are_left_alone() {
    let model = tiny("llama");
    let draw = |votes: bool| {
        // SAFETY: the chain outlives the context; llama.cpp checks the rest.
        unsafe {
            let chain = sys::llama_sampler_chain_init(sys::llama_sampler_chain_default_params());
            sys::llama_sampler_chain_add(chain, sys::llama_sampler_init_dist(7));
            let drawn = {
                let app = App::new(&model, &ONE);
                assert!(sys::llama_set_sampler(app.ctx, 0, chain), "the CPU runs it");
                // a plan leaves the cells, and so the samples, as they are
                let handle = Handle::with(&app, &gvote_params { target_kl: 1e-4, ..defaults() });
                app.decode(&[(0, 0, &words(N, 0))]);
                let mut drawn = vec![sys::llama_get_sampled_token_ith(app.ctx, N as i32 - 1)];
                for i in 0..5 {
                    if votes {
                        let (status, plan) = handle.plan(&app, 0);
                        assert_eq!(status, GVOTE_OK, "{}", handle.error());
                        assert!(plan.n_tried > 0);
                    }
                    let row = if i == 0 { N as i32 - 1 } else { 0 };
                    assert_eq!(sys::llama_get_sampled_token_ith(app.ctx, row), drawn[i as usize]);
                    app.decode(&[(0, N as i32 + i, &drawn[i as usize..])]);
                    drawn.push(sys::llama_get_sampled_token_ith(app.ctx, 0));
                }
                drawn
            };
            sys::llama_sampler_free(chain);
            drawn
        }
    };
    let undisturbed = draw(false);
    assert!(undisturbed.iter().all(|&token| token >= 0), "{undisturbed:?}");
    assert_eq!(draw(true), undisturbed);
}

#[test]
fn a_vote_says_how_many_cells_it_needs() {
    let app = App::new(&tiny("llama"), &Shape { n_ctx: 512, ..ONE });
    let handle = Handle::at(&app);
    app.decode(&[(0, 0, &words(500, 0))]);
    let before = app.state(0);
    assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_NO_CELLS);
    assert!(handle.error().contains("free"), "{}", handle.error());
    assert!(!handle.error().contains("--"), "no flags of the program: {}", handle.error());
    assert!(app.state(0) == before);
    assert!(Voter::spare_cells(&crate::policy::Params::default()) <= 64, "as the header says");
}
