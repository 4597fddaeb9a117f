//! Tests of a session when llama.cpp runs out of memory: an error, and a session that is unchanged or holds what was read so far. The
//! first, the second, the third ... C++ allocation fails, alone or with all that follow.
//!
//! Each test runs itself again in its own process, in which `tests/common/scarce.cpp` is preloaded.

#![cfg(target_os = "linux")]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{CStr, c_long, c_void};
use std::ops::ControlFlow;
use std::process::Command;

use gvote::llama::{self, ContextParams, Model, ModelParams, Pos, Sampler, SamplerParams, Token};
use gvote::policy::{Kind, Params};
use gvote::{Session, SessionError, SessionParams};

#[allow(dead_code)] // also used by other tests
#[path = "../src/tests/tiny.rs"]
mod tiny;

#[path = "common/scarce.rs"]
mod scarce;

use scarce::library;

/// Cells of a session: a prompt of twice as many tokens frees cells at least three times.
const N_CTX: u32 = 192;
/// Maximum tokens computed at once.
const STEP: usize = 64;

/// The functions of `scarce.cpp`.
#[derive(Clone, Copy)]
struct Scarce {
    begin: unsafe extern "C" fn(c_long, bool),
    end: unsafe extern "C" fn() -> bool,
}

impl Scarce {
    /// Looks up the functions; None if `scarce.cpp` is not preloaded.
    fn find() -> Option<Self> {
        // SAFETY: names; what has them are functions of these types.
        unsafe {
            let find = |name: &CStr| Some(libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr())).filter(|p| !p.is_null());
            let (begin, end) = (find(c"scarce_begin")?, find(c"scarce_end")?);
            type Begin = unsafe extern "C" fn(c_long, bool);
            type End = unsafe extern "C" fn() -> bool;
            Some(Self {
                begin: std::mem::transmute::<*mut c_void, Begin>(begin),
                end: std::mem::transmute::<*mut c_void, End>(end),
            })
        }
    }
}

/// Runs a test in a process in which memory can run out.
fn alone(name: &str, test: impl FnOnce(Scarce)) {
    if let Some(scarce) = Scarce::find() {
        return test(scarce);
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", name, "--nocapture", "--test-threads=1"]).env("LD_PRELOAD", library());
    let done = again.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
}

/// Returns the next allocation to fail: every one of the first, then increasingly distant ones.
fn next(place: c_long) -> c_long {
    const DENSE: c_long = 100;
    const SPARSE: c_long = 12;
    if place < DENSE { place + 1 } else { place + place / SPARSE }
}

/// Repeats `work` until no allocation fails; `check` inspects the session after each failure. Returns the number of failures.
fn sweep<T>(
    scarce: Scarce,
    session: &mut Session,
    once: bool,
    before: &[u8],
    work: impl Fn(&mut Session) -> Result<T, String>,
    check: impl Fn(&mut Session, &str),
) -> usize {
    let mut failures = 0;
    let mut place = 0;
    loop {
        session.load(before).unwrap();
        // SAFETY: they set and read numbers.
        let (done, has_failed) = unsafe {
            (scarce.begin)(place, once);
            (work(session), (scarce.end)())
        };
        match done {
            _ if !has_failed => return failures,
            // the session handled the failure of an optional allocation
            Ok(_) => {}
            Err(error) => {
                failures += 1;
                check(session, &format!("allocation {place}, once: {once}: {error}"));
            }
        }
        place = next(place);
    }
}

fn policy() -> Params {
    Params {
        target_kl: None,
        lost_mass: 0.1,
        max_cells: Some(120),
        window: 16,
        recent: 16,
        samples: 4,
        draft: 4,
        ..Params::default()
    }
}

fn open(model: &Model, policy: Params) -> Session {
    let context = ContextParams {
        n_ctx: N_CTX,
        n_ubatch: STEP as u32,
        n_threads: 1,
        n_threads_batch: 1,
        ..ContextParams::default()
    };
    Session::new(model, &SessionParams { context, policy, ..Default::default() }).unwrap()
}

fn words(n: usize, kind: usize) -> Vec<Token> {
    (0..n).map(|i| ((7 * i + (3 + kind) * i * i / 5 + 11 * kind) % tiny::N_VOCAB) as Token).collect()
}

fn read_long(session: &mut Session, tokens: &[Token], up_to: usize) -> Result<(), SessionError> {
    let flow = |done, _| if done == up_to { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    session.prefill_long(tokens, flow).map(|_| ())
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

fn is_empty(session: &Session) -> bool {
    session.n_past() == 0 && session.cells_used() == 0 && session.logits().is_empty()
}

fn attention_models() -> [Model; 2] {
    ["llama", "gemma2"].map(tiny::model)
}

/// Cells are freed while reading: the session holds what was read until the failure, as if it had been cancelled there.
#[test]
fn a_long_reading_holds_what_was_read_so_far() {
    alone("a_long_reading_holds_what_was_read_so_far", |scarce| {
        for (arch, once) in [("llama", true), ("llama", false), ("gemma2", true), ("gemma2", false)] {
            let model = tiny::model(arch);
            let [mut session, mut straight] = [(); 2].map(|()| open(&model, policy()));
            for session in [&mut session, &mut straight] {
                read_long(session, &words(150, 1), 0).unwrap();
            }
            let (before, logits) = (session.save(), session.logits().to_vec());
            let text = words(250, 2);
            let work = |session: &mut Session| read_long(session, &text, 0).map_err(|error| error.to_string());
            work(&mut straight).unwrap();
            let whole = straight.logits().to_vec();
            straight.load(&before).unwrap();
            let reached = RefCell::new(BTreeSet::new());
            let straight = RefCell::new(&mut straight);
            let check = |session: &mut Session, name: &str| {
                // if all memory is gone, a window cannot be restored
                if is_empty(session) {
                    assert!(!once, "{name}");
                    return;
                }
                let read = session.n_past() - 150;
                let mut straight = straight.borrow_mut();
                straight.load(&before).unwrap();
                if read > 0 {
                    read_long(&mut straight, &text, read as usize).unwrap_err();
                }
                let freed = session.cells_used() < straight.cells_used();
                reached.borrow_mut().insert((read, freed));
                if !freed {
                    assert!(session.save() == straight.save(), "{name}, after {read} tokens");
                    assert!(read > 0 || session.logits() == logits, "{name}");
                }
                // reading continues, even after cells were freed for tokens that were not decoded
                read_long(session, &text[read as usize..], 0).unwrap();
                assert!(session.n_past() == 400 && session.cells_used() <= N_CTX as usize, "{name}");
                if freed {
                    // a restored window lies in other cells, so sums are added in another order
                    let rounding = if arch == "gemma2" { 0.02 } else { 0.0 };
                    let apart = apart(session.logits(), &whole);
                    assert!(apart <= rounding, "{name}, after {read} tokens and with cells freed: {apart}");
                }
            };
            let failures = sweep(scarce, &mut session, once, &before, work, check);
            let reached = reached.into_inner();
            assert!(failures > 40 && reached.len() > 3, "{failures} failures after {reached:?} tokens");
        }
    });
}

/// The answer has run out of cells: the decoded tokens remain, with no trace of later ones.
#[test]
fn an_answer_holds_what_was_decoded_so_far() {
    alone("an_answer_holds_what_was_decoded_so_far", |scarce| {
        let [mut session, mut straight] = [(); 2].map(|()| open(&tiny::model("llama"), policy()));
        read_long(&mut session, &words(N_CTX as usize - 4, 1), 0).unwrap();
        let before = session.save();
        let greedy = SamplerParams { temp: 0.0, ..SamplerParams::default() };
        let sampler = RefCell::new(Sampler::new(session.model(), &greedy, 0).unwrap());
        let answer = |session: &mut Session, n| {
            let sampler = &mut sampler.borrow_mut();
            session.generate(sampler, n, |_| ControlFlow::Continue(())).map_err(|error| error.to_string())
        };
        let first = session.n_past();
        let straight = RefCell::new(&mut straight);
        for once in [true, false] {
            let check = |session: &mut Session, name: &str| {
                let mut straight = straight.borrow_mut();
                straight.load(&before).unwrap();
                let decoded = session.n_past() - first;
                answer(&mut straight, decoded).unwrap();
                assert!(straight.logits() == session.logits(), "{name}");
                if session.cells_used() == straight.cells_used() {
                    assert!(straight.save() == session.save(), "{name}");
                    return;
                }
                // cells were freed for a token that was not decoded
                for session in [&mut straight, &mut *session] {
                    answer(session, 8 - decoded).unwrap();
                }
                assert!(straight.save() == session.save(), "{name}, with cells freed");
            };
            assert!(sweep(scarce, &mut session, once, &before, |session| answer(session, 8), check) > 50);
        }
    });
}

#[test]
fn a_vote_leaves_no_trace() {
    alone("a_vote_leaves_no_trace", |scarce| {
        for (model, once) in attention_models().into_iter().flat_map(|model| [(model.clone(), true), (model, false)]) {
            // with a trial
            let mut session = open(&model, Params { target_kl: Some(1e-4), ..policy() });
            read_long(&mut session, &words(180, 1), 0).unwrap();
            let (before, logits) = (session.save(), session.logits().to_vec());
            let work = |session: &mut Session| session.compress().map_err(|error| error.to_string());
            let check = |session: &mut Session, name: &str| {
                assert!(session.save() == before && session.logits() == logits, "{name}");
            };
            assert!(sweep(scarce, &mut session, once, &before, work, check) > 50);
        }
    });
}

/// The running session is unchanged, or empty if memory does not suffice to restore it. The file belongs to another session.
#[test]
fn a_loaded_file_is_there_whole_or_not_at_all() {
    alone("a_loaded_file_is_there_whole_or_not_at_all", |scarce| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("saved");
        for (model, once) in attention_models().into_iter().flat_map(|model| [(model.clone(), true), (model, false)]) {
            let mut session = open(&model, policy());
            read_long(&mut session, &words(300, 3), 0).unwrap();
            session.save_to(&path, b"note").unwrap();
            let saved = session.save();
            session.clear();
            read_long(&mut session, &words(100, 1), 0).unwrap();
            let (before, logits) = (session.save(), session.logits().to_vec());
            let load = |session: &mut Session| {
                let note = session.load_from(&path, |note| Ok(note.to_vec()));
                note.map(|note| assert_eq!(note, b"note")).map_err(|error| error.to_string())
            };
            let check = |session: &mut Session, name: &str| {
                if is_empty(session) {
                    assert!(!once, "{name}");
                    read_long(session, &words(100, 1), 0).unwrap();
                    return;
                }
                assert!(session.save() == before && session.logits() == logits, "{name}");
            };
            assert!(sweep(scarce, &mut session, once, &before, load, check) > 5);
            assert!(session.save() == saved);
        }
    });
}

/// A recurrent state that has advanced is restored, or the session is empty.
#[test]
fn a_reading_with_recurrent_layers_leaves_no_trace() {
    alone("a_reading_with_recurrent_layers_leaves_no_trace", |scarce| {
        let dir = tempfile::tempdir().unwrap();
        for (arch, once) in tiny::RECURRENT.into_iter().flat_map(|arch| [(arch, true), (arch, false)]) {
            let model = Model::load(&tiny::recurrent(dir.path(), arch), &ModelParams::default(), |_| true).unwrap();
            let mut session = open(&model, Params::new(Kind::Full));
            read_long(&mut session, &words(50, 1), 0).unwrap();
            let (before, logits) = (session.save(), session.logits().to_vec());
            let text = words(100, 2);
            let work = |session: &mut Session| {
                read_long(session, &text, 0).map_err(|error| error.to_string())?;
                session.decode(7).map_err(|error| error.to_string())
            };
            let check = |session: &mut Session, name: &str| match session.n_past() {
                0 => assert!(is_empty(session), "{name}"),
                50 => assert!(session.save() == before && session.logits() == logits, "{name}"),
                n => assert_eq!((n, session.logits().is_empty()), (150 as Pos, false), "{name}"),
            };
            assert!(sweep(scarce, &mut session, once, &before, work, check) > 50, "{arch}");
        }
    });
}

/// The session continues to read in its existing cells, or is unchanged.
#[test]
fn a_session_that_cannot_grow_is_as_it_was() {
    alone("a_session_that_cannot_grow_is_as_it_was", |scarce| {
        let model = tiny::model("llama");
        let mut grown = BTreeSet::new();
        for once in [true, false] {
            let mut place = 0;
            loop {
                let mut session = open(&model, policy());
                read_long(&mut session, &words(150, 1), 0).unwrap();
                let before = session.save();
                session.set_grow_to(1000);
                // SAFETY: they set and read numbers.
                let (done, has_failed) = unsafe {
                    (scarce.begin)(place, once);
                    (read_long(&mut session, &words(250, 2), 0), (scarce.end)())
                };
                grown.insert((done.is_ok(), session.n_ctx() > N_CTX as usize));
                if done.is_err() && session.n_past() == 150 {
                    assert!(session.save() == before, "allocation {place}, once: {once}");
                }
                if !has_failed {
                    break;
                }
                place = next(place);
            }
        }
        // if only the move fails, the text is read in the existing cells
        assert!(grown.contains(&(true, true)) && grown.contains(&(true, false)), "{grown:?}");
    });
}
