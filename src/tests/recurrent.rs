//! Models with recurrent layers: no vote can free any of their cells, and the policy `full` runs them as they are.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use crate::capi::header::{GVOTE_ERROR_NOT_ATTACHED, GVOTE_ERROR_UNSUPPORTED};
use crate::capi::tests::app;
use crate::llama::{ContextParams, LlamaError, Model, ModelParams, Token};
use crate::policy::{Kind, Params};
use crate::session::Stop;
use crate::tests::fixture::greedy;
use crate::tests::tiny;
use crate::{Session, SessionError, SessionParams};

const N_CTX: u32 = 512;

/// Both kinds of model, each with the reason why it cannot be compressed.
fn models() -> impl Iterator<Item = (Model, String)> {
    tiny::RECURRENT.into_iter().map(|arch| {
        let dir = tempfile::tempdir().unwrap();
        let path = tiny::recurrent(dir.path(), arch);
        let model = Model::load(&path, &ModelParams::default(), |_| true).unwrap();
        let reason = model.unsupported().expect("it has recurrent layers").to_owned();
        (model, reason)
    })
}

fn session(model: &Model, kind: Kind) -> Result<Session, SessionError> {
    let context = ContextParams { n_ctx: N_CTX, n_ubatch: 64, n_threads: 1, n_threads_batch: 1, ..Default::default() };
    Session::new(model, &SessionParams { context, policy: Params::new(kind), ..Default::default() })
}

fn full(model: &Model) -> Session {
    session(model, Kind::Full).unwrap()
}

fn words(n: usize, kind: usize) -> Vec<Token> {
    (0..n).map(|i| ((7 * i + (3 + kind) * i * i / 5 + 11 * kind) % 256) as Token).collect()
}

fn read(session: &mut Session, tokens: &[Token]) {
    session.prefill(tokens, |_, _| ControlFlow::Continue(())).unwrap();
}

/// A session and the C interface give the same reason.
#[test]
fn every_policy_that_votes_is_refused_with_the_reason() {
    for (model, reason) in models() {
        assert!(reason.contains("recurrent"), "{reason}");
        for kind in Kind::ALL.iter().copied().filter(|kind| *kind != Kind::Full) {
            let error = session(&model, kind).err().unwrap().to_string();
            assert!(error.contains(&reason) && error.contains("`policy` full"), "{kind}: {error}");
        }

        let app = app::App::with(&model, &app::ONE, |_| {});
        let handle = app::Handle::new(&app::defaults());
        // SAFETY: both live.
        assert_eq!(unsafe { crate::capi::gvote_attach(handle.0, app.ctx) }, GVOTE_ERROR_UNSUPPORTED);
        assert!(handle.error().contains(&reason) && !handle.error().contains("--"), "{}", handle.error());
        app.decode(&[(0, 0, &words(20, 0))]);
        assert_eq!(handle.compress(&app, 0).0, GVOTE_ERROR_NOT_ATTACHED);
    }
}

#[test]
fn the_full_policy_runs_them() {
    for (model, reason) in models() {
        let (mut once, mut parts) = (full(&model), full(&model));
        let tokens = words(200, 0);
        read(&mut once, &tokens);
        tokens.chunks(30).for_each(|part| read(&mut parts, part));
        let apart = once.logits().iter().zip(parts.logits()).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(apart < 1e-3, "{reason}: {apart}");
        let spread = once.logits().iter().fold(0f32, |most, x| most.max(x.abs()));
        assert!(spread > 0.5 && once.logits().iter().all(|x| x.is_finite()), "{reason}: {spread}");

        let report = once.compress().unwrap();
        assert_eq!((report.cells_before, report.cells_after), (200, 200));
        let saved = once.save();
        let (first, stop) = greedy(&mut once, 15);
        assert_eq!((first.len(), stop), (15, Stop::Limit), "{reason}");
        parts.load(&saved).unwrap();
        assert_eq!(greedy(&mut parts, 15).0, first, "{reason}");

        // `n_ctx` limits the tokens although a state takes no cells
        let error = once.prefill_long(&words(400, 1), |_, _| ControlFlow::Continue(())).unwrap_err();
        assert!(matches!(error, SessionError::PromptTooLong { tokens: 400, room: 297, .. }), "{error}");
    }
}

#[test]
fn a_cut_is_refused_unless_all_goes() {
    for (model, reason) in models() {
        let mut session = full(&model);
        let tokens = words(100, 0);
        read(&mut session, &tokens);
        let (before, logits) = (session.save(), session.logits().to_vec());
        assert_eq!(session.exact_from(), 100);
        for pos in [1, 50, 99] {
            let error = session.truncate(pos).unwrap_err();
            assert!(matches!(error, SessionError::Compressed(_, 100)), "{reason}: {error}");
        }
        session.truncate(100).unwrap();
        assert!(session.save() == before && session.logits() == logits, "{reason}");
        session.truncate(0).unwrap();
        assert_eq!((session.n_past(), session.exact_from()), (0, 0));
        read(&mut session, &tokens);
        assert!(session.save() == before && session.logits() == logits, "{reason}");
    }
}

/// The state has advanced when a decode is cancelled, and is restored; a single token is always completed.
#[test]
fn what_is_cancelled_at_any_moment_leaves_no_trace() {
    for (model, reason) in models() {
        let mut session = full(&model);
        read(&mut session, &words(100, 0));
        let (before, logits) = (session.save(), session.logits().to_vec());
        let work = |session: &mut Session| session.prefill(&words(150, 1), |_, _| ControlFlow::Continue(()));
        session.context().cancel_at(0);
        work(&mut session).unwrap();
        let times = session.context().cancel_at(0);
        assert!(times > 10, "{reason}: {times}");
        session.load(&before).unwrap();
        for at in (1..=times).step_by(times.div_ceil(40)) {
            session.context().cancel_at(at);
            let error = work(&mut session).unwrap_err();
            assert!(matches!(error, SessionError::Llama(LlamaError::Cancelled)), "{reason}: {error}");
            session.context().cancel_at(0);
            assert!(session.save() == before && session.logits() == logits, "{reason}, cancelled at {at} of {times}");
        }

        let (whole, _) = greedy(&mut session, 20);
        session.load(&before).unwrap();
        session.context().cancel_at(12);
        let (part, stop) = greedy(&mut session, 20);
        session.cancel_flag().store(false, Ordering::Relaxed);
        assert_eq!(stop, Stop::Cancelled, "{reason}");
        assert!(session.n_past() > 100 && part.len() < 20, "{reason}: {}", part.len());
        // reported to the caller, but not decoded
        let decoded = session.n_past() as usize - 100;
        assert_eq!((part.len(), &whole[..part.len()]), (decoded + 1, &*part), "{reason}");
        session.context().cancel_at(0);
        assert_eq!(greedy(&mut session, 20 - decoded as i32).0, whole[decoded..], "{reason}");
    }
}
