//! Rows set aside as q8_0 take half the bytes and are rounded once.

use super::recall::{N, hundred, rows_of};
use super::*;
use crate::archive::{RecallFile, RecallType};
use crate::llama::CacheType;
use crate::tests::fixture::{BF16, F16, F16_FLASH, F32_FLASH, Q8_0, on_device};
use crate::tests::tiny::{SPECS, Spec, Tiny};

fn open(arch: &str, setup: Setup, recall: Recall, recall_type: RecallType) -> Session {
    let params = SessionParams { policy: hundred(), recall, recall_type, ..params(setup, N_CTX) };
    Session::new(&tiny::model(arch), &params).unwrap()
}

fn started(arch: &str, setup: Setup, recall: Recall) -> Session {
    let mut session = open(arch, setup, recall, RecallType::Q8_0);
    read(&mut session, &words(N, 1));
    session
}

/// Returns K and V of all heads in all cells, one after another.
fn rows(session: &Session) -> Vec<Vec<f32>> {
    cache::cells(&session.ctx, SEQ).iter().flat_map(|cell| rows_of(session, cell)).collect()
}

/// Returns the largest difference in a row, relative to the largest value in its block of 32.
fn apart(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let blocks = a.iter().zip(b).flat_map(|(a, b)| a.chunks(32).zip(b.chunks(32)));
    let apart = |(a, b): (&[f32], &[f32])| {
        let largest = a.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest.max(f32::MIN_POSITIVE)
    };
    blocks.map(apart).fold(0.0, f32::max)
}

/// Half a step of q8_0, plus the rounding of its f16 scale and of the cache's type.
fn bound(setup: Setup) -> f32 {
    let own = if setup.k == CacheType::Bf16 { 1.0 / 256.0 } else { 1.0 / 2048.0 };
    0.5 / 127.0 + 1.0 / 2048.0 + own
}

fn assert_rounded_once(arch: &str, setup: Setup, recall: Recall) {
    let name = format!("{arch}, {setup}");
    let mut session = started(arch, setup, recall);
    let before = rows(&session);
    let mut first = Vec::new();
    for round in 0..6 {
        session.compress().unwrap();
        assert_eq!(session.rows_aside(), N - 100, "{name}");
        let exact = session.layout().unwrap().bytes_per_cell();
        let aside = session.bytes_aside() / (N - 100) - 4 * session.layout().unwrap().n_head_kv().sum::<usize>();
        // 34 bytes for 32 numbers
        let expected = exact * 34 / if setup.k == CacheType::F32 { 128 } else { 64 };
        assert_eq!(aside, expected, "{name}");
        assert_eq!(session.expand().unwrap().cells_after, N, "{name}");
        assert_eq!(session.exact_from(), 0);
        let now = rows(&session);
        let error = apart(&before, &now);
        assert!(error > 0.0 && error < bound(setup), "{name}, round {round}: {error}");
        if round == 0 {
            first = now;
            continue;
        }
        // rows that the first vote set aside; the others stayed in the cache
        let was_rounded = before.iter().zip(&first).map(|(before, first)| before != first);
        let [first, now] = [&first, &now].map(|rows| {
            let rounded = rows.iter().zip(was_rounded.clone()).filter(|(_, was_rounded)| *was_rounded);
            rounded.map(|(row, _)| row.clone()).collect::<Vec<_>>()
        });
        let error = apart(&first, &now);
        assert!(error <= 2.0 * (bound(setup) - 0.5 / 127.0), "{name}, round {round}: {error} more");
    }
}

#[test]
fn what_comes_back_is_rounded_once_and_takes_half_the_bytes() {
    for setup in [F16, F16_FLASH, BF16, F32_FLASH] {
        assert_rounded_once("llama", setup, Recall::Auto);
        on_device(|| assert_rounded_once("llama", setup, Recall::Auto));
    }
    assert_rounded_once("phi3", F16, Recall::Auto);
    let folder = tempfile::tempdir().unwrap();
    let file = RecallFile::create(&folder.path().join("rows")).unwrap();
    assert_rounded_once("gemma2", F16_FLASH, Recall::File(file.clone()));
    assert_eq!(file.disk_bytes(), 0);
}

#[test]
fn host_and_device_round_alike() {
    for setup in [F16, F16_FLASH] {
        let gone_and_back = || {
            let mut session = started("llama", setup, Recall::Auto);
            session.compress().unwrap();
            session.expand().unwrap();
            session.copy_cells().unwrap()
        };
        assert!(gone_and_back() == on_device(gone_and_back), "{setup}");
    }
}

#[test]
fn a_quantized_cache_is_set_aside_as_it_is() {
    let mut session = started("llama", Q8_0, Recall::Auto);
    let before = session.copy_cells().unwrap();
    session.compress().unwrap();
    session.expand().unwrap();
    assert!(session.copy_cells().unwrap() == before);
}

#[test]
fn a_saved_session_is_loaded_with_the_same_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat");
    let mut session = started("llama", F16, Recall::Auto);
    session.compress().unwrap();
    session.save_to(&path, b"").unwrap();
    let mut same = open("llama", F16, Recall::Auto, RecallType::Q8_0);
    same.load_from(&path, |_| Ok(())).unwrap();
    assert!(same.save() == session.save());
    let mut other = open("llama", F16, Recall::Auto, RecallType::Cache);
    let error = other.load_from(&path, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("start with `recall_type` q8_0"), "{error}");
    assert!(other.load(&session.save()).is_err());
    assert_eq!(other.n_past(), 0);
    // without rows set aside, the storage type does not matter
    session.expand().unwrap();
    session.save_to(&path, b"").unwrap();
    other.load_from(&path, |_| Ok(())).unwrap();
}

#[test]
fn heads_that_are_no_whole_blocks_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = Tiny::new(folder.path(), Spec { head: 48, ..SPECS[0] }).model;
    let open = |setup, recall_type| {
        let params = SessionParams { policy: hundred(), recall: Recall::Auto, recall_type, ..params(setup, N_CTX) };
        Session::new(&model, &params).map(|_| ())
    };
    open(F16, RecallType::Cache).unwrap();
    let error = open(F16, RecallType::Q8_0).unwrap_err().to_string();
    assert!(error.contains("`recall_type` q8_0") && error.contains("48"), "{error}");
}
