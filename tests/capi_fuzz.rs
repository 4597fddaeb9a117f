//! Random changes to settings and saved states of the C interface and to session files: a short, repeatable version of `make fuzz`.

#[path = "common/capi_check.rs"]
mod capi_check;
#[path = "common/edit.rs"]
mod edit;
#[path = "common/session_check.rs"]
mod session_check;
#[allow(dead_code)] // also used by other tests
#[path = "../src/tests/tiny.rs"]
mod tiny;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;

use capi_check::{ERROR_PARAMS, ERROR_SIZE, ERROR_STATE, OK};
use gvote::llama;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Runs `cases` inputs and counts their outcomes.
fn outcomes<T: Ord + Debug>(
    cases: u32,
    input: impl Strategy<Value = Vec<u8>>,
    check: impl Fn(&[u8]) -> T,
) -> BTreeMap<T, usize> {
    let counts = RefCell::new(BTreeMap::<T, usize>::new());
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let explored = runner.run(&input, |input| {
        *counts.borrow_mut().entry(check(&input)).or_default() += 1;
        Ok(())
    });
    explored.unwrap();
    counts.into_inner()
}

/// Generates up to four changes at such places: see `edit`.
fn edits(place: impl Strategy<Value = u32>) -> impl Strategy<Value = Vec<u8>> {
    // numbers at the limits of what is allowed
    let number = prop_oneof![
        any::<u64>(),
        0..300_u64,
        Just(u64::MAX),
        Just(1 << 31),
        Just(1 << 62),
        any::<f32>().prop_map(|x| u64::from(x.to_bits())),
        any::<f64>().prop_map(f64::to_bits),
    ];
    let edit = (any::<u8>(), place, number)
        .prop_map(|(what, place, number)| [&[what][..], &place.to_le_bytes(), &number.to_le_bytes()].concat());
    vec(edit, 0..5).prop_map(|edits| edits.concat())
}

/// Generates inputs of `capi_check` that begin with one of two bytes.
fn of_c(kinds: [u8; 2]) -> impl Strategy<Value = Vec<u8>> {
    let place = prop_oneof![any::<u16>().prop_map(u32::from), 0..120_u32];
    prop_oneof![
        1 => vec(any::<u8>(), 0..200).prop_map(move |bytes| [&[kinds[0]][..], &bytes].concat()),
        9 => edits(place).prop_map(move |edits| [&[kinds[1]][..], &edits].concat()),
    ]
}

#[test]
fn settings_of_any_size_and_content_are_refused_or_within_bounds() {
    let counts = outcomes(200_000, of_c([0, 1]), capi_check::check);
    for status in [OK, ERROR_SIZE, ERROR_PARAMS] {
        assert!(counts[&status] > 10_000, "{counts:?}");
    }
}

#[test]
fn saved_states_of_any_content_are_refused_or_make_sense() {
    let counts = outcomes(4_000, of_c([2, 3]), capi_check::check);
    for status in [OK, ERROR_STATE] {
        assert!(counts[&status] > 500, "{counts:?}");
    }
}

#[test]
fn files_of_sessions_of_any_content_are_refused_or_make_sense() {
    // the records of the tokens and the cells come before the cells themselves
    let place = any::<u16>().prop_map(u32::from);
    let counts = outcomes(1_500, edits(place), session_check::check);
    for outcome in [session_check::Outcome::Taken, session_check::Outcome::Refused] {
        assert!(counts[&outcome] > 300, "{counts:?}");
    }
}
