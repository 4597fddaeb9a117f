//! The reader of model files on files that were changed at random: a short, repeatable cousin of `make fuzz`.

#[path = "../../../tests/common/gguf.rs"]
mod file;
#[path = "../../../tests/common/gguf_check.rs"]
mod gguf_check;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gguf_check::check;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const CASES: u32 = 50_000;

/// A change to a file. Places are shares of its length, so that they mean something whatever was changed before.
#[derive(Clone, Debug)]
enum Change {
    Flip(f64, u8),
    Number32(f64, u32),
    Number64(f64, u64),
    Cut(f64),
    Remove(f64, usize),
    Repeat(f64, usize),
    /// What another seed holds, from here on.
    Splice(f64, usize),
}

impl Change {
    fn apply(&self, seeds: &[Vec<u8>], file: &mut Vec<u8>) {
        let place = |share: f64, len: usize| ((share * share * len as f64) as usize).min(len.saturating_sub(1));
        let len = file.len();
        let overwrite = |file: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            let n = bytes.len().min(len - at);
            file[at..at + n].copy_from_slice(&bytes[..n]);
        };
        if len == 0 {
            return;
        }
        match *self {
            Self::Flip(at, bit) => file[place(at, len)] ^= 1 << (bit % 8),
            Self::Number32(at, n) => overwrite(file, place(at, len), &n.to_le_bytes()),
            Self::Number64(at, n) => overwrite(file, place(at, len), &n.to_le_bytes()),
            Self::Cut(at) => file.truncate(place(at, len)),
            Self::Remove(at, n) => drop(file.drain(place(at, len)..(place(at, len) + n).min(len))),
            Self::Repeat(at, n) => {
                let at = place(at, len);
                let part = file[at..(at + n).min(len)].to_vec();
                file.splice(at..at, part);
            }
            Self::Splice(at, other) => {
                let (at, other) = (place(at, len), &seeds[other % seeds.len()]);
                file.truncate(at);
                file.extend(&other[at.min(other.len())..]);
            }
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    let place = || 0.0..1.0_f64;
    // numbers at the borders of what is allowed
    let number32 =
        prop_oneof![any::<u32>(), 0..16_u32, Just(u32::MAX), Just(1 << 31), Just(9), Just(39), Just(40), Just(44)];
    let border = (0..64_u32, -1..2_i64).prop_map(|(bit, by)| (1_u64 << bit).wrapping_add_signed(by));
    let number64 = prop_oneof![any::<u64>(), 0..64_u64, Just(u64::MAX), border];
    prop_oneof![
        4 => (place(), any::<u8>()).prop_map(|(at, bit)| Change::Flip(at, bit)),
        3 => (place(), number32).prop_map(|(at, n)| Change::Number32(at, n)),
        3 => (place(), number64).prop_map(|(at, n)| Change::Number64(at, n)),
        1 => place().prop_map(Change::Cut),
        1 => (place(), 1..64_usize).prop_map(|(at, n)| Change::Remove(at, n)),
        1 => (place(), 1..64_usize).prop_map(|(at, n)| Change::Repeat(at, n)),
        1 => (place(), any::<usize>()).prop_map(|(at, other)| Change::Splice(at, other)),
    ]
}

/// The kind of an outcome: a message without its numbers and names.
fn kind(message: &str) -> String {
    let mut quoted = false;
    let text = message.chars().filter(|c| {
        quoted ^= *c == '"';
        !quoted && !c.is_ascii_digit()
    });
    text.take(80).collect()
}

#[test]
fn nothing_makes_the_reader_panic_hang_or_lie() {
    let seeds = file::seeds();
    let outcomes = RefCell::new(BTreeMap::<String, usize>::new());
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let strategy = (0..seeds.len(), vec(change(), 1..6), prop_oneof![Just(0), Just(100), Just(1_u64 << 40)]);
    let explored = runner.run(&strategy, |(seed, changes, hole)| {
        let mut bytes = seeds[seed].clone();
        changes.iter().for_each(|change| change.apply(&seeds, &mut bytes));
        let start = Instant::now();
        let found = check(&bytes, hole);
        prop_assert!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
        let outcome = found.map_or_else(|error| kind(&error.to_string()), |_| "accepted".into());
        *outcomes.borrow_mut().entry(outcome).or_default() += 1;
        Ok(())
    });
    explored.unwrap();
    // it went everywhere: many files were accepted, many refused, and for many reasons
    let outcomes = outcomes.into_inner();
    assert!(outcomes["accepted"] > 2_500 && outcomes["accepted"] < 37_500, "{outcomes:#?}");
    assert!(outcomes.len() > 25, "{outcomes:#?}");
}

#[test]
fn the_seeds_are_sound() {
    for (i, seed) in file::seeds().iter().enumerate() {
        match check(seed, 0) {
            Ok(file) => assert!(file.entries.len() >= 5, "seed {i}"),
            // the second part of a split model is not there
            Err(error) => {
                assert!(i == 3 && error.to_string().contains("NAME-00001-of-00002.gguf"), "seed {i}: {error}")
            }
        }
    }
}

#[test]
fn every_cut_of_every_seed_is_noticed() {
    for seed in file::seeds() {
        let cuts = (0..seed.len()).filter(|&n| check(&seed[..n], 0).is_ok()).count();
        assert_eq!(cuts, 0, "of a file of {} bytes", seed.len());
    }
}

#[test]
fn a_terabyte_of_zeros_costs_nothing() {
    // everything that can be promised in a header, with nothing but zeros to keep it
    let header = |n_tensors: u64, n_entries: u64| {
        [b"GGUF\x03\0\0\0".to_vec(), n_tensors.to_le_bytes().to_vec(), n_entries.to_le_bytes().to_vec()].concat()
    };
    let array = |of: u32, n: u64| {
        let key = [file::string("k"), 9_u32.to_le_bytes().to_vec(), of.to_le_bytes().to_vec()].concat();
        [header(0, 2), key, n.to_le_bytes().to_vec()].concat()
    };
    let text =
        [header(0, 1), file::string("k"), 8_u32.to_le_bytes().to_vec(), (1_u64 << 30).to_le_bytes().to_vec()].concat();
    for bytes in [
        header(1 << 17, 0),
        header(0, 1 << 12),
        array(0, 1 << 30),
        array(12, 1 << 30),
        array(8, 1 << 24),
        array(8, (1 << 24) + 1),
        text,
    ] {
        let start = Instant::now();
        assert!(check(&bytes, 1 << 40).is_err());
        assert!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
    }
    #[cfg(target_os = "linux")]
    {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let kib: usize = peak.split_whitespace().next().unwrap().parse().unwrap();
        // the program itself takes most of it
        assert!(kib < 256 << 10, "{kib} KiB were resident");
    }
}
