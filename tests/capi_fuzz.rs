//! Settings and saved states of the C interface, changed at random: a short, repeatable cousin of `make fuzz`.

#[path = "common/capi_check.rs"]
mod capi_check;

use std::cell::RefCell;
use std::collections::BTreeMap;

use capi_check::{ERROR_PARAMS, ERROR_SIZE, ERROR_STATE, OK, check};
use gvote::llama;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Runs `cases` inputs that begin with one of two bytes, and counts what came of them.
fn outcomes(cases: u32, kinds: [u8; 2]) -> BTreeMap<u32, usize> {
    let counts = RefCell::new(BTreeMap::<u32, usize>::new());
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    // numbers at the borders of what is allowed
    let number = prop_oneof![
        any::<u64>(),
        0..300_u64,
        Just(u64::MAX),
        Just(1 << 31),
        Just(1 << 62),
        any::<f32>().prop_map(|x| u64::from(x.to_bits())),
        any::<f64>().prop_map(f64::to_bits),
    ];
    let place = prop_oneof![any::<u16>(), 0..120_u16];
    let edit = (any::<u8>(), place, number)
        .prop_map(|(what, place, number)| [&[what][..], &place.to_le_bytes(), &number.to_le_bytes()].concat());
    let edits = vec(edit, 0..5).prop_map(|edits| edits.concat());
    let input = prop_oneof![
        1 => vec(any::<u8>(), 0..200).prop_map(move |bytes| [&[kinds[0]][..], &bytes].concat()),
        9 => edits.prop_map(move |edits| [&[kinds[1]][..], &edits].concat()),
    ];
    let explored = runner.run(&input, |input| {
        *counts.borrow_mut().entry(check(&input)).or_default() += 1;
        Ok(())
    });
    explored.unwrap();
    counts.into_inner()
}

#[test]
fn settings_of_any_size_and_content_are_refused_or_within_bounds() {
    let counts = outcomes(200_000, [0, 1]);
    for status in [OK, ERROR_SIZE, ERROR_PARAMS] {
        assert!(counts[&status] > 10_000, "{counts:?}");
    }
}

#[test]
fn saved_states_of_any_content_are_refused_or_make_sense() {
    let counts = outcomes(4_000, [2, 3]);
    for status in [OK, ERROR_STATE] {
        assert!(counts[&status] > 500, "{counts:?}");
    }
}
