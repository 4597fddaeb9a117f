//! What a model file holds beside its shape: every tensor, every entry, the other files of a split model; and where it is wrong.

#[path = "../../../tests/common/gguf.rs"]
mod file;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::Path;
use std::rc::Rc;

use file::Value::{self, *};
use file::{Tensor, borrowed, decoder, head, tensor};
use gvote_gguf::{Gguf, GgufError, Kind, Support};
use serde_json::json;
use tempfile::TempDir;

const GGML_F32: u32 = 0;
const Q4_K: u32 = 12;
const MXFP4: u32 = 39;
const NVFP4: u32 = 40;
const UNKNOWN: u32 = 77;

/// Reads a file of this head and size; what comes after the head is never looked at.
fn parse((head, size): (Vec<u8>, u64)) -> Result<Gguf, GgufError> {
    Gguf::parse(Path::new("model.gguf"), Cursor::new(head), size)
}

fn with_tensors(tensors: &[Tensor]) -> Result<Gguf, GgufError> {
    parse(head(&[("general.architecture", Text("llama"))], tensors))
}

fn with_entries(entries: &[(&str, Value)]) -> Gguf {
    let entries = [&[("general.architecture", Text("llama"))], entries].concat();
    parse(head(&entries, &[])).unwrap()
}

/// The place and the reason of damage.
#[track_caller]
fn damage(result: Result<Gguf, GgufError>) -> (u64, String) {
    match result {
        Err(GgufError::Malformed { offset, what, .. }) => (offset, what),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("nothing was found"),
    }
}

// ---- tensors

#[test]
fn tensors_have_ggmls_own_sizes() {
    let tensors =
        [tensor("a", &[256, 2], Q4_K, 288), tensor("b", &[64], MXFP4, 34), tensor("c", &[128, 3], NVFP4, 216)];
    let file = with_tensors(&tensors).unwrap();
    let found: Vec<_> = file.tensors.iter().map(|t| (t.type_name(), t.values, t.bytes.unwrap())).collect();
    let expected = [("Q4_K", 512, 288), ("MXFP4", 64, 34), ("NVFP4", 384, 216)];
    assert_eq!(found, expected.map(|(name, values, bytes)| (name.to_owned(), values, bytes)));
    assert_eq!((file.n_params(), file.n_bytes()), (960, 538));
    // data is aligned, and its place counts from the start of the file
    let start = file.tensors[0].offset;
    assert_eq!(file.tensors.iter().map(|t| t.offset - start).collect::<Vec<_>>(), [0, 288, 352]);
    assert!(start.is_multiple_of(32));
}

#[test]
fn types_are_summed_up() {
    let tensors = [tensor("a", &[8], GGML_F32, 32), tensor("b", &[256], Q4_K, 144), tensor("c", &[4, 4], GGML_F32, 64)];
    let shares = with_tensors(&tensors).unwrap().by_type();
    let found: Vec<_> = shares.iter().map(|s| (&*s.name, s.tensors, s.values, s.bytes)).collect();
    assert_eq!(found, [("Q4_K", 1, 256, Some(144)), ("F32", 2, 24, Some(96))]);
}

#[test]
fn a_type_that_nobody_knows_is_named_by_its_number() {
    let file = with_tensors(&[tensor("a", &[100], UNKNOWN, 64), tensor("b", &[8], GGML_F32, 32)]).unwrap();
    assert_eq!((file.tensors[0].type_name().as_str(), file.tensors[0].bytes), ("type 77", None));
    assert_eq!((file.n_params(), file.n_bytes()), (108, 32));
}

#[test]
fn tensors_that_overlap_are_found_even_after_an_unknown_type() {
    let at = |offset, of: Tensor<'static>| Tensor { offset: Some(offset), ..of };
    let known = with_tensors(&[tensor("a", &[32], GGML_F32, 128), at(64, tensor("b", &[8], GGML_F32, 32))]);
    assert!(damage(known).1.contains("\"b\" is out of place, at 64 of the data instead of 128"));
    let hole = with_tensors(&[tensor("a", &[32], GGML_F32, 128), at(256, tensor("b", &[8], GGML_F32, 32))]);
    assert!(damage(hole).1.contains("out of place"));
    let unknown =
        [tensor("a", &[32], GGML_F32, 128), tensor("b", &[8], UNKNOWN, 64), at(96, tensor("c", &[8], GGML_F32, 32))];
    assert!(
        damage(with_tensors(&unknown)).1.contains("\"c\" is out of place, at 96 of the data instead of at least 128")
    );
    let crooked = [tensor("a", &[8], UNKNOWN, 64), at(65, tensor("b", &[8], GGML_F32, 32))];
    assert!(damage(with_tensors(&crooked)).1.contains("\"b\" is out of place"));
}

#[test]
fn a_tensor_given_twice_is_refused_where_it_stands() {
    let once = head(&[("general.architecture", Text("llama"))], &[tensor("twin", &[8], GGML_F32, 32)]).0;
    let (at, what) = damage(with_tensors(&[tensor("twin", &[8], GGML_F32, 32), tensor("twin", &[8], GGML_F32, 32)]));
    assert!(what.contains("\"twin\" twice"), "{what}");
    // the second description begins where the first ends: name, dimensions, shape, type, offset
    let first = once.windows(4).position(|w| w == b"twin").unwrap() - 8;
    assert_eq!(at, first as u64 + 8 + 4 + 4 + 8 + 4 + 8);
}

#[test]
fn shapes_that_overflow_are_refused() {
    for shape in [&[u64::MAX][..], &[1 << 40, 1 << 40], &[1 << 31, 1 << 31], &[1 << 61]] {
        assert!(
            damage(with_tensors(&[tensor("a", shape, GGML_F32, 0)])).1.contains("cannot have the shape"),
            "{shape:?}"
        );
    }
    // a row that is no whole number of blocks
    assert!(damage(with_tensors(&[tensor("a", &[100], Q4_K, 0)])).1.contains("cannot have the shape"));
}

// ---- metadata

#[test]
fn values_are_what_was_written() {
    let entries = [
        ("a.u32", U32(u32::MAX)),
        ("a.u64", U64(u64::MAX)),
        ("a.f32", F32(1e-5)),
        ("a.bool", Bool(true)),
        ("a.text", Text("gr\u{fc}n")),
        ("a.array", Array(&[3, 1, 2])),
        ("a.texts", Texts(&["x", "", "yz"])),
    ];
    let file = with_entries(&entries);
    let value = |key| file.value(key).unwrap().unwrap();
    assert_eq!(value("a.u32"), json!(u32::MAX));
    assert_eq!(value("a.u64"), json!(u64::MAX));
    assert_eq!(value("a.f32"), json!(1e-5), "not 9.999999747378752e-6");
    assert_eq!(value("a.bool"), json!(true));
    assert_eq!(value("a.text"), json!("gr\u{fc}n"));
    assert_eq!(value("a.array"), json!([3, 1, 2]));
    assert_eq!(value("a.texts"), json!(["x", "", "yz"]));
    assert_eq!(file.value("b").unwrap(), None);
    let entry = file.entries.iter().find(|entry| entry.key == "a.texts").unwrap();
    assert_eq!((entry.kind, entry.elements, entry.type_name().as_str()), (Kind::String, Some(3), "string[3]"));
}

#[test]
fn a_long_array_is_cut_openly_and_read_whole_on_demand() {
    let words: Vec<String> = (0..2000).map(|i| format!("word{i}")).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let numbers: Vec<u32> = (0..5000).collect();
    let entries = [
        ("general.architecture", Text("llama")),
        ("tokenizer.ggml.tokens", Texts(&words)),
        ("tokenizer.ggml.token_type", Array(&numbers)),
    ];
    let (bytes, _) = head(&entries, &[]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    let file = Gguf::open(&path).unwrap();
    for (key, n) in [("tokenizer.ggml.tokens", 2000), ("tokenizer.ggml.token_type", 5000)] {
        let entry = file.entries.iter().find(|entry| entry.key == key).unwrap();
        assert_eq!((entry.elements, entry.is_whole()), (Some(n), false));
        assert_eq!(entry.value.as_ref().unwrap().as_array().unwrap().len(), 512);
        assert_eq!(file.value(key).unwrap().unwrap().as_array().unwrap().len() as u64, n);
    }
    assert_eq!(file.value("tokenizer.ggml.tokens").unwrap().unwrap()[1999], "word1999");
    assert_eq!(file.info.n_vocab, Some(2000));
}

#[test]
fn a_part_whose_number_has_another_type_is_a_fault() {
    let faults = |number: Value<'static>| {
        let split = Split::new(|i, entries| {
            if i == 2 {
                entries[0].1 = number;
            }
        });
        Gguf::open(&split.0.path().join("m-00001-of-00003.gguf")).unwrap().faults
    };
    assert_eq!(faults(U16(2)), [""; 0]);
    assert_eq!(faults(U32(2)), ["split.no of part 3 of 3 is no 16-bit number"]);
}

#[test]
fn text_that_is_not_utf8_is_shown_as_far_as_it_can_be() {
    let words = ["word", "ends in \u{c3}", "\u{a9} "];
    let entries = [
        ("general.architecture", Text("llama")),
        ("general.name", Text("good")),
        ("key", U32(1)),
        ("tokenizer.ggml.tokens", Texts(&words)),
    ];
    let (mut bytes, size) = head(&entries, &[tensor("weight", &[8], GGML_F32, 32)]);
    for text in ["good", "key", "word", "weight"] {
        let at = bytes.windows(text.len()).position(|w| w == text.as_bytes()).unwrap() + 2;
        bytes[at] = 0xff;
    }
    let file = parse((bytes, size)).unwrap();
    assert_eq!(file.info.name.as_deref(), Some("go\u{fffd}d"));
    let of = |key: &str| file.entries.iter().find(|entry| entry.key == key).unwrap().value.clone();
    assert_eq!(of("ke\u{fffd}"), Some(json!(1)));
    assert_eq!(of("tokenizer.ggml.tokens"), Some(json!(["wo\u{fffd}d", "ends in \u{c3}", "\u{a9} "])));
    assert_eq!(file.tensors[0].name, "we\u{fffd}ght");
}

/// The length of the second string begins with the byte that would end the character.
#[test]
fn a_string_ends_where_it_ends() {
    let long = "x".repeat(0xa9);
    let (mut bytes, size) = head(&[("general.architecture", Text("llama")), ("a", Texts(&["ab", &long]))], &[]);
    let at = bytes.windows(2).rposition(|w| w == b"ab").unwrap() + 1;
    bytes[at] = 0xc3;
    let file = parse((bytes, size)).unwrap();
    assert_eq!(file.entries[1].value, Some(json!(["a\u{fffd}", long])));
}

#[test]
fn experts_may_differ_by_layer() {
    let of = |used| {
        let entries = decoder("qwen3moe", &[(".expert_count", U32(8)), (".expert_used_count", used)]);
        parse(head(&borrowed(&entries), &[])).unwrap().info.n_expert
    };
    assert_eq!(of(U32(2)), (8, 2));
    assert_eq!(of(Array(&[1, 4, 2, 2])), (8, 4));
}

#[test]
fn damage_is_reported_where_it_is() {
    let entries = [("general.architecture", Text("llama")), ("general.name", Text("good"))];
    let (bytes, size) = head(&entries, &[]);
    let name = bytes.windows(12).position(|w| w == b"general.name").unwrap();
    let with = |at: usize, value: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        parse((bytes, size))
    };
    // tensors, entries, the length of a key, its type, the length of a value
    let huge = u64::MAX.to_le_bytes();
    assert_eq!(damage(with(8, &huge)).0, 8);
    assert_eq!(damage(with(16, &huge)).0, 16);
    assert_eq!(damage(with(name - 8, &huge)).0, name as u64 - 8);
    assert_eq!(damage(with(name + 12, &[99])).0, name as u64 + 12);
    assert_eq!(damage(with(name + 16, &huge)).0, name as u64 + 16);
    // a length that is possible, were the file not too short for it
    match with(name + 16, &1_000_u64.to_le_bytes()) {
        Err(GgufError::TruncatedHeader { offset, .. }) => assert_eq!(offset, name as u64 + 24),
        other => panic!("{other:?}"),
    }
    // an array of arrays
    assert_eq!(damage(with(name + 12, &[9, 0, 0, 0, 9, 0, 0, 0])).0, name as u64 + 16);
}

#[test]
fn implausible_shapes_are_reported_at_their_key() {
    let entries = decoder("llama", &[(".block_count", U32(u32::MAX))]);
    let (bytes, size) = head(&borrowed(&entries), &[]);
    let at = bytes.windows(17).position(|w| w == b"llama.block_count").unwrap() as u64 - 8;
    assert_eq!(damage(parse((bytes, size))), (at, "its value of llama.block_count is implausible".into()));
}

#[test]
fn alignment_is_a_32_bit_power_of_two() {
    let with = |value| parse(head(&[("general.architecture", Text("llama")), ("general.alignment", value)], &[]));
    assert_eq!(with(U32(64)).unwrap().alignment, 64);
    for value in [U32(0), U32(48), U64(32), Text("32")] {
        assert!(damage(with(value)).1.contains("general.alignment"));
    }
}

// ---- what gvote finds out from tensors and heads

#[test]
fn learned_sinks_and_unequal_layers_are_refused_before_loading() {
    let refused = |name, extra: &[(&'static str, Value<'static>)], tensors: &[Tensor]| {
        let entries = decoder(name, extra);
        match parse(head(&borrowed(&entries), tensors)).unwrap().info.support() {
            Support::Refused(reason) => reason,
            other => format!("{other:?}"),
        }
    };
    let weight = tensor("output.weight", &[8], GGML_F32, 32);
    let sinks = tensor("blk.0.attn_sinks.weight", &[4], GGML_F32, 16);
    assert_eq!(refused("llama", &[], std::slice::from_ref(&weight)), "Composite");
    assert!(refused("gpt-oss", &[(".attention.sliding_window", U32(128))], &[weight.clone(), sinks]).contains("sinks"));
    let uneven = [(".attention.head_count_kv", Array(&[0, 1, 2, 4]))];
    assert!(refused("deci", &uneven, std::slice::from_ref(&weight)).contains("differ in their number of heads"));
    // a layer without attention does not count
    let even = [(".attention.head_count_kv", Array(&[0, 2, 2, 0]))];
    assert_eq!(refused("deci", &even, &[weight]), "Composite");
}

// ---- split models

struct Split(TempDir);

impl Split {
    /// A model in three files, the second and third with a tensor each; `tamper` may change the head of part i.
    fn new(tamper: impl Fn(usize, &mut Vec<(String, Value<'static>)>)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for i in 0..3 {
            let mut entries = if i == 0 { decoder("llama", &[]) } else { Vec::new() };
            entries.push(("split.no".into(), U16(i as u16)));
            entries.push(("split.count".into(), U16(3)));
            entries.push(("split.tensors.count".into(), U32(2)));
            tamper(i, &mut entries);
            let name = ["", "blk.0.a", "blk.1.a"][i];
            let shape = [256 * i as u64];
            let tensors = [tensor(name, &shape, GGML_F32, 1024 * i as u64)];
            let (bytes, size) = head(&borrowed(&entries), if i == 0 { &[] } else { &tensors });
            let file = File::create(folder.path().join(format!("m-0000{}-of-00003.gguf", i + 1))).unwrap();
            io::Write::write_all(&mut &file, &bytes).unwrap();
            file.set_len(size).unwrap();
        }
        Self(folder)
    }

    fn path(&self, part: usize) -> std::path::PathBuf {
        self.0.path().join(format!("m-0000{part}-of-00003.gguf"))
    }

    fn error(&self, part: usize) -> String {
        Gguf::open(&self.path(part)).unwrap_err().to_string()
    }
}

#[test]
fn a_split_model_is_read_as_one() {
    let split = Split::new(|_, _| ());
    let file = Gguf::open(&split.path(1)).unwrap();
    assert_eq!((file.parts.len(), file.info.n_split, file.info.support()), (3, 3, Support::Composite));
    assert_eq!(file.tensors.iter().map(|t| (&*t.name, t.part)).collect::<Vec<_>>(), [("blk.0.a", 1), ("blk.1.a", 2)]);
    assert_eq!(file.n_bytes(), 3072);
    let sizes: u64 = (1..=3).map(|part| fs::metadata(split.path(part)).unwrap().len()).sum();
    assert_eq!(file.file_size(), sizes);
}

#[test]
fn another_part_than_the_first_names_the_first() {
    let split = Split::new(|_, _| ());
    let error = split.error(2);
    assert!(error.contains("part 2 of 3") && error.contains(split.path(1).to_str().unwrap()), "{error}");
}

#[test]
fn a_part_that_is_missing_cut_or_wrong_is_named() {
    let split = Split::new(|_, _| ());
    let file = File::options().write(true).open(split.path(3)).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    let error = split.error(1);
    assert!(error.starts_with(split.path(3).to_str().unwrap()) && error.contains("cut short"), "{error}");
    fs::rename(split.path(3), split.path(3).with_extension("part")).unwrap();
    let error = split.error(1);
    assert!(error.contains("part 3 of 3 of the model is missing"), "{error}");
    fs::copy(split.path(2), split.path(3)).unwrap();
    assert!(split.error(1).contains("its split.no is not 2"));

    let renamed = split.path(1).with_file_name("model.gguf");
    fs::rename(split.path(1), &renamed).unwrap();
    let error = Gguf::open(&renamed).unwrap_err().to_string();
    assert!(error.contains("NAME-00001-of-00003.gguf"), "{error}");

    let counted = Split::new(|i, entries| entries[if i == 0 { 7 } else { 2 }].1 = U32(9));
    assert!(counted.error(1).contains("hold 2 tensors, and it counts 9"));
    let many = Split::new(|i, entries| entries[if i == 0 { 6 } else { 1 }].1 = U64(1 << 40));
    assert!(many.error(1).contains("split.count"));
}

// ---- cost

/// Counts the bytes that are read from it.
struct Counted<R>(R, Rc<Cell<u64>>);

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read(buf)?;
        self.1.set(self.1.get() + n as u64);
        Ok(n)
    }
}

impl<R: Seek> Seek for Counted<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

#[test]
fn forty_gigabytes_are_not_read() {
    let (rows, bytes) = (10_u64 << 30, 40_u64 << 30);
    let numbers = vec![7; 1 << 20];
    let entries = decoder("llama", &[("tokenizer.scores", Array(&numbers))]);
    let (bytes_of_head, size) = head(&borrowed(&entries), &[tensor("output.weight", &[rows], GGML_F32, bytes)]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.gguf");
    fs::write(&path, bytes_of_head).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.set_len(size).unwrap();
    let read = Rc::new(Cell::new(0));
    let found = Gguf::parse(&path, Counted(file, read.clone()), size).unwrap();
    assert_eq!(found.n_bytes(), bytes);
    // neither the weights nor an array of 4 MiB
    assert!(read.get() < 64 << 10, "{} bytes read", read.get());
}
