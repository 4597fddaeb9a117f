//! Rows that left the cache come back unchanged.

use super::*;
use crate::archive::PRETEND_FULL;
use crate::compact::CompactError;
use crate::policy::Evict;
use crate::tests::fixture::{F16, F16_FLASH, Q4_0, Q8_0, greedy, on_device};

pub(super) const N: usize = 250;

/// Settings of votes that leave a hundred cells.
pub(super) fn hundred() -> Params {
    Params { max_cells: Some(100), ..quick() }
}

/// Returns a session that has read some tokens.
fn started(arch: &str, setup: Setup, policy: Params) -> Session {
    started_as(arch, setup, policy, Recall::Auto)
}

pub(super) fn started_as(arch: &str, setup: Setup, policy: Params, recall: Recall) -> Session {
    let mut session = open_as(&tiny::model(arch), setup, N_CTX, policy, recall);
    read(&mut session, &words(N, 1));
    session
}

/// Returns K and V of all cells in order, with positions.
fn cells(session: &mut Session) -> Vec<u8> {
    session.copy_cells().unwrap()
}

/// Returns the next-token logits after one more token.
fn next(session: &mut Session) -> Vec<f32> {
    session.decode(5).unwrap();
    session.logits().to_vec()
}

/// Returns the bytes of one row of every head that is set aside, with its position.
fn bytes_per_token(session: &Session) -> usize {
    let layout = session.layout().unwrap();
    layout.bytes_per_cell() + size_of::<u32>() * layout.n_head_kv().sum::<usize>()
}

fn assert_comes_back(arch: &str, setup: Setup, policy: &Params) {
    assert_comes_back_from(&Recall::Auto, arch, setup, policy);
}

pub(super) fn assert_comes_back_from(recall: &Recall, arch: &str, setup: Setup, policy: &Params) {
    let name = format!("{arch}, {setup}, {:?}", policy.evict);
    let mut session = started_as(arch, setup, policy.clone(), recall.clone());
    let (before, saved, labels) = (cells(&mut session), session.save(), cache::cells(&session.ctx, SEQ));
    let report = session.compress().unwrap();
    assert_eq!((report.cells_before, report.cells_after, session.rows_aside()), (N, 100, N - 100), "{name}");
    assert_eq!(session.bytes_aside(), (N - 100) * bytes_per_token(&session), "{name}");
    assert!(cells(&mut session) != before && session.sequence.exact_from > 0, "{name}");

    let expanded = session.expand().unwrap();
    assert_eq!((expanded.cells_before, expanded.cells_after), (100, N), "{name}");
    assert!(cells(&mut session) == before, "{name}: K, V or positions are others");
    assert!(cache::cells(&session.ctx, SEQ) == labels, "{name}: they lie in other cells");
    assert!(session.save() == saved, "{name}: something is left of the vote");
    assert_eq!((session.rows_aside(), session.bytes_aside(), session.exact_from()), (0, 0, 0), "{name}");
    let mut never = started(arch, setup, policy.clone());
    assert!(next(&mut session) == next(&mut never), "{name}: the next logits are others");
}

#[test]
fn a_vote_and_an_expansion_leave_every_byte() {
    for evict in [Evict::Composite, Evict::Cells] {
        for setup in [F16, F16_FLASH, Q8_0, Q4_0] {
            assert_comes_back("llama", setup, &Params { evict, ..hundred() });
            on_device(|| assert_comes_back("llama", setup, &Params { evict, ..hundred() }));
        }
        assert_comes_back("phi3", F16, &Params { evict, ..hundred() });
    }
}

/// Rows that a graph cannot move, such as transposed values, are copied before.
#[test]
fn rows_leave_a_device_while_it_goes_on() {
    on_device(|| {
        for (setup, is_copied_before) in [(F16_FLASH, false), (F16, true)] {
            let mut session = started("llama", setup, hundred());
            session.compress().unwrap();
            let archive = session.sequence.archive.as_ref().unwrap();
            assert_eq!(archive.batches()[0].is_in_memory(), is_copied_before, "{setup:?}");
            let of_copies = archive.clone();
            session.clear();
            drop(session);
            assert_eq!(of_copies.entries(0).len(), N - 100, "{setup:?}: they outlive the context that they left");
            assert!(of_copies.batches()[0].row(0, 0).iter().any(|&byte| byte != 0), "{setup:?}");
        }
    });
}

/// Covers rows that are not a whole number of floats, and a single row.
#[test]
fn so_they_do_beside_a_window_and_with_other_heads() {
    for setup in [F16, F16_FLASH, Q8_0] {
        for arch in ["gemma2", "qwen3"] {
            assert_comes_back(arch, setup, &hundred());
            on_device(|| assert_comes_back(arch, setup, &hundred()));
        }
    }
}

/// Several votes, with tokens in between, are undone at once.
#[test]
fn many_votes_are_taken_back_at_once() {
    for setup in [F16, F16_FLASH, Q8_0] {
        let mut session = started("llama", setup, hundred());
        let mut expected = Vec::new();
        for i in 0..4 {
            session.compress().unwrap();
            for token in words(30, 3 + i) {
                session.decode(token).unwrap();
                let cells = cache::cells(&session.ctx, SEQ);
                expected.push((session.n_past() - 1, rows_of(&session, cells.last().unwrap())));
            }
        }
        assert_eq!((session.cells_used(), session.rows_aside()), (130, N - 10));
        let report = session.expand().unwrap();
        assert_eq!((report.cells_after, session.rows_aside()), (N_CTX, N + 120 - N_CTX), "as many as there are cells");
        // the newest rows come first, so that all heads have the decoded tokens
        let cells = cache::cells(&session.ctx, SEQ);
        for (pos, rows) in expected {
            let cell = cells.iter().find(|cell| cell.pos == pos).unwrap();
            assert!(rows_of(&session, cell) == rows, "{setup:?}: another row at {pos}");
        }
    }
}

/// Returns K and V of all heads in a cell.
pub(super) fn rows_of(session: &Session, cell: &crate::cache::Cell) -> Vec<Vec<f32>> {
    let layout = Layout::of(&session.ctx, SEQ).unwrap();
    let heads = layout.n_head_kv().enumerate().flat_map(|(layer, n)| (0..n).map(move |kv| (layer, kv)));
    heads.flat_map(|(layer, kv)| [false, true].map(|is_v| fixture::row(&layout, layer, is_v, kv, cell))).collect()
}

#[test]
fn a_default_vote_of_a_real_model_is_taken_back() {
    const N: usize = 500;
    for setup in [F16, Q8_0] {
        let model = fixture::model();
        let open = || open_as(&model, setup, 700, Params::default(), Recall::Auto);
        let (mut session, mut never) = (open(), open());
        for session in [&mut session, &mut never] {
            read(session, &fixture::tokens(&model, N));
        }
        let before = cells(&mut session);
        let report = session.compress().unwrap();
        assert!(report.cells_after < N, "{report:?}");
        answer(&mut session, 3);
        session.truncate(N as Pos).unwrap();
        session.expand().unwrap();
        assert!(cells(&mut session) == before && next(&mut session) == next(&mut never), "{setup:?}");
    }
}

#[test]
fn a_prompt_is_read_with_all_rows_and_the_cache_grows_for_them() {
    let policy = hundred();
    let mut session = open_recalling("llama", F16, 300, policy.clone());
    session.set_grow_to(900);
    let mut never = open("llama", F16, 900, policy);
    for session in [&mut session, &mut never] {
        read(session, &words(N, 1));
    }
    session.compress().unwrap();
    for session in [&mut session, &mut never] {
        session.prefill_long(&words(120, 2), |_, _| ControlFlow::Continue(())).unwrap();
    }
    assert!(session.n_ctx() > 300 && session.cells_used() == N + 120);
    assert!(session.logits() == never.logits() && cells(&mut session) == cells(&mut never));
    // where cells do not suffice for both, the prompt comes first
    let mut fixed = started("llama", F16, hundred());
    fixed.compress().unwrap();
    let report = fixed.prefill(&words(200, 2), |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!((report.expanded.cells_after, fixed.cells_used(), fixed.room()), (N_CTX - 200, N_CTX, 0));
    fixed.clear();
    assert_eq!((fixed.rows_aside(), fixed.bytes_aside(), fixed.recall()), (0, 0, Recall::Auto));
}

#[test]
fn a_session_is_cut_anywhere_as_if_there_had_been_no_vote() {
    for setup in [F16, F16_FLASH, Q8_0] {
        for pos in [1, 50, 99, 100, 185, 186, N as Pos - 1] {
            let (mut session, mut never) = (started("llama", setup, hundred()), started("llama", setup, hundred()));
            session.compress().unwrap();
            assert_eq!(session.exact_from(), 0);
            for session in [&mut session, &mut never] {
                session.truncate(pos).unwrap();
                read(session, &words(30, 2));
            }
            assert!(session.save() == never.save() && session.logits() == never.logits(), "{setup:?}, {pos}");
        }
    }
}

#[test]
fn a_marked_place_before_a_vote_is_come_back_to() {
    let mut session = open_recalling("llama", F16, N_CTX, hundred());
    read(&mut session, &words(120, 1));
    session.mark();
    let (before, logits) = (session.save(), session.logits().to_vec());
    read(&mut session, &words(80, 2));
    session.compress().unwrap();
    answer(&mut session, 10);
    session.truncate(120).unwrap();
    assert!(session.logits() == logits && session.save() == before);
}

/// Rows dropped before recall was switched on stay lost, and that part cannot be cut.
#[test]
fn what_was_lost_before_stays_lost() {
    let mut lost = open("llama", F16, N_CTX, hundred());
    read(&mut lost, &words(N, 1));
    lost.compress().unwrap();
    let mut session = open_recalling("llama", F16, N_CTX, hundred());
    session.load(&lost.save()).unwrap();
    let exact_from = session.exact_from();
    assert!(exact_from > 0 && session.rows_aside() == 0);
    read(&mut session, &words(100, 2));
    session.compress().unwrap();
    assert_eq!(session.rows_aside(), 100);
    assert!(session.exact_from() > exact_from);
    assert!(matches!(session.truncate(150), Err(SessionError::Compressed(150, _))));
    let report = session.expand().unwrap();
    assert_eq!((report.cells_after, session.rows_aside()), (200, 0));
    assert!(matches!(session.truncate(150), Err(SessionError::Compressed(150, _))));
}

#[test]
fn without_memory_a_vote_is_refused_and_nothing_has_changed() {
    let refused = |session: &mut Session, work: &dyn Fn(&mut Session) -> Result<(), SessionError>| {
        let before = session.save();
        PRETEND_FULL.set(true);
        let error = work(session);
        PRETEND_FULL.set(false);
        let Err(SessionError::Vote(VoteError::Compact(CompactError::Archive { bytes }))) = error else {
            panic!("{error:?}")
        };
        assert!(bytes > 0 && session.save() == before);
    };
    for setup in [F16, F16_FLASH, Q8_0] {
        let mut session = started("llama", setup, hundred());
        let vote = |session: &mut Session| session.compress().map(|_| ());
        refused(&mut session, &vote);
        on_device(|| refused(&mut session, &vote));
        session.compress().unwrap();
        // if everything fits, no memory is needed
        PRETEND_FULL.set(true);
        assert_eq!(session.expand().unwrap().cells_after, N);
        PRETEND_FULL.set(false);
        session.compress().unwrap();
        // otherwise the remaining rows of a batch form a new batch, which needs memory
        session.limit_cells(180);
        refused(&mut session, &|session| session.expand().map(|_| ()));
        refused(&mut session, &|session| session.truncate(185));
        assert_eq!(session.expand().unwrap().cells_after, 180);
    }
}

/// Like a chat: every turn is read with all rows and voted on, and answers make room for themselves.
#[test]
fn of_200_turns_no_more_is_set_aside_than_left_the_cache() {
    let mut session = open_recalling("llama", F16, N_CTX, hundred());
    let per_token = bytes_per_token(&session);
    for i in 0..200 {
        session.prefill_long(&words(5 + 7 * i % 23, i), |_, _| ControlFlow::Continue(())).unwrap();
        session.compress().unwrap();
        answer(&mut session, (3 + i % 9) as i32);
        let left = session.n_past() as usize - session.cells_used();
        assert_eq!((session.rows_aside(), session.bytes_aside()), (left, left * per_token), "turn {i}");
        assert_eq!(session.exact_from(), 0, "turn {i}");
        if session.n_past() > 900 {
            session.truncate(100).unwrap();
            assert_eq!((session.cells_used(), session.bytes_aside()), (100, 0), "turn {i}");
        }
    }
    session.clear();
    assert_eq!(session.bytes_aside(), 0);
}

#[test]
fn a_saved_session_brings_what_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat");
    for setup in [F16, Q8_0] {
        let mut session = started("llama", setup, hundred());
        let before = session.save();
        session.compress().unwrap();
        session.save_to(&path, b"").unwrap();
        let mut other = open_recalling("llama", setup, N_CTX, hundred());
        other.load_from(&path, |_| Ok(())).unwrap();
        assert!(other.save() == session.save() && other.rows_aside() == N - 100);
        other.expand().unwrap();
        assert!(other.save() == before, "{setup:?}");
        // a session that sets nothing aside would lose the rows
        let mut off = open("llama", setup, N_CTX, hundred());
        read(&mut off, &words(20, 2));
        let untouched = off.save();
        let error = off.load_from(&path, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("start with `recall` auto"), "{error}");
        let error = off.load(&session.save()).unwrap_err().to_string();
        assert!(error.contains("`recall` off"), "{error}");
        assert!(off.save() == untouched);
    }
}

/// A file of the previous version, which has no rows set aside.
#[test]
fn a_file_of_the_version_before_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat");
    let mut session = open("llama", F16, N_CTX, hundred());
    read(&mut session, &words(N, 1));
    session.compress().unwrap();
    session.save_to(&path, b"a note").unwrap();
    let file = std::fs::read(&path).unwrap();
    let mut at = 12;
    // skip the settings, the note and gvote's own state
    for _ in 0..3 {
        at += 8 + u64::from_le_bytes(file[at..][..8].try_into().unwrap()) as usize;
    }
    let mut old =
        [&file[..8], &2u32.to_le_bytes(), &file[12..at], &file[at + 8..file.len() - blake3::OUT_LEN]].concat();
    let checksum = blake3::hash(&old);
    old.extend_from_slice(checksum.as_bytes());
    std::fs::write(&path, old).unwrap();
    for recall in [Recall::Off, Recall::Auto] {
        let mut loaded = open_as(&tiny::model("llama"), F16, N_CTX, hundred(), recall.clone());
        assert_eq!(loaded.load_from(&path, |note| Ok(note.to_vec())).unwrap(), b"a note");
        assert!(loaded.save() == session.save() && loaded.recall() == recall);
        assert!(loaded.exact_from() > 0 && loaded.rows_aside() == 0);
    }
}

/// Returns the positions that each head holds.
fn held(session: &Session) -> Vec<Vec<Pos>> {
    let cells = cache::cells(&session.ctx, SEQ);
    let heads: usize = session.layout().unwrap().n_head_kv().sum();
    (0..heads).map(|head| session.sequence.positions(&cells, head)).collect()
}

/// 1,200 tokens in 320 cells: rows set aside long before compete with those in the cache.
#[test]
fn where_not_all_have_room_the_choice_for_a_new_question_is_made_among_all() {
    const OLD: Pos = 300;
    let model = fixture::model();
    let text = fixture::tokens(&model, 1200);
    let question = model.tokenize("\nQuestion: What is this text about?\nAnswer:", false, false).unwrap();
    let long = |session: &mut Session, tokens: &[Token]| {
        session.prefill_long(tokens, |_, _| ControlFlow::Continue(())).unwrap()
    };
    let mut session = session(F16, N_CTX, 128, Params::default());
    session.set_recall(Recall::Auto);
    long(&mut session, &text);
    let before = held(&session);
    let report = long(&mut session, &question);
    // one vote for each page of a quarter of the cells
    assert!(report.squeezes.count >= 10, "{report:?}");
    let n = text.len() + question.len();
    assert!(session.cells_used() <= N_CTX);
    assert_eq!((session.rows_aside() + session.cells_used(), session.exact_from()), (n, 0));
    // the end of the question is read with the rows that came back, not with the earlier ones
    let logits = session.logits().to_vec();
    session.truncate(n as Pos - 1).unwrap();
    session.decode(*question.last().unwrap()).unwrap();
    let apart = logits.iter().zip(session.logits()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 0.5, "{apart}");
    let came_back = before
        .iter()
        .zip(held(&session))
        .map(|(before, now)| now.into_iter().filter(|pos| *pos < OLD && before.binary_search(pos).is_err()).count());
    let came_back = came_back.sum::<usize>();
    assert!(came_back > before.len(), "{came_back} of {} heads", before.len());
    assert_eq!(greedy(&mut session, 4).0.len(), 4);
}

/// During a long answer, the number of cells stays at the share that the vote chose, no row is lost, and the rows in
/// the cache change.
#[test]
fn cells_are_chosen_anew_while_an_answer_is_written() {
    for evict in [Evict::Composite, Evict::Cells] {
        let policy = Params { evict, ..quick() };
        let mut session = open_recalling("llama", F16, 800, policy);
        session.renew = 16;
        read(&mut session, &words(500, 0));
        let left = session.compress().unwrap().cells_after;
        let held = |session: &Session| {
            let cells = cache::cells(session.context(), SEQ);
            session.sequence().positions(&cells, 0)
        };
        let before = held(&session);
        let mut sampler =
            session.sampler(&SamplerParams { temp: 0.0, ignore_eos: true, ..SamplerParams::default() }, 50).unwrap();
        let report = session.generate(&mut sampler, 50, |_| ControlFlow::Continue(())).unwrap();
        assert_eq!((report.tokens, report.renewals.count, report.squeezes.count), (50, 3, 0), "{report:?}");
        let share = left as f64 / 500.0;
        assert_eq!(session.cells_used(), (share * 548.0) as usize + 2);
        assert_eq!(session.cells_used() + session.rows_aside(), 550, "no row is lost");
        assert!(held(&session).iter().any(|pos| *pos < 400 && !before.contains(pos)), "nothing came back");
        // no row exists twice
        session.expand().unwrap();
        assert!(held(&session).into_iter().eq(0..550));
    }
}

/// An answer continues when a choice fails.
#[test]
fn an_answer_goes_on_where_there_is_no_memory_to_choose_anew() {
    let mut session = open_recalling("llama", F16, 800, quick());
    session.renew = 16;
    read(&mut session, &words(500, 0));
    session.compress().unwrap();
    PRETEND_FULL.set(true);
    let mut sampler =
        session.sampler(&SamplerParams { temp: 0.0, ignore_eos: true, ..SamplerParams::default() }, 50).unwrap();
    let report = session.generate(&mut sampler, 50, |_| ControlFlow::Continue(()));
    PRETEND_FULL.set(false);
    let report = report.unwrap();
    assert_eq!((report.tokens, report.renewals.count), (50, 0));
    assert_eq!(session.cells_used() + session.rows_aside(), 550);
}
