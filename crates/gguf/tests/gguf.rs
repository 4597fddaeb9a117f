//! What a model file says of itself, and what becomes of files that lie.

#[path = "../../../tests/common/gguf.rs"]
mod file;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use file::Value::{self, *};
use file::handwritten;
use gvote::llama::CacheType;
use gvote_gguf::{self as gguf, GgufError, ModelInfo, Support};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const SMOLLM: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Metadata and tensor descriptions of SmolLM2 end before this byte; its tensor data does not.
const HEADER: u64 = 2 << 20;
const F16: CacheType = CacheType::F16;

fn models() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
    cache.join("gvote/models")
}

/// A model that need not be there.
fn optional(name: &str) -> Option<ModelInfo> {
    let path = models().join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not there (make setup)", path.display());
        return None;
    }
    Some(gguf::read(&path).unwrap())
}

/// A folder for hostile files.
struct Lab {
    dir: TempDir,
    /// The first bytes of SmolLM2, and the size of the whole file.
    head: Vec<u8>,
    size: u64,
}

impl Lab {
    fn new() -> Self {
        let file = File::open(models().join(SMOLLM)).expect("run make setup");
        let size = file.metadata().unwrap().len();
        let mut head = Vec::new();
        file.take(HEADER).read_to_end(&mut head).unwrap();
        Self { dir: tempfile::tempdir().unwrap(), head, size }
    }

    /// Read a file of these first bytes and this size; the rest is a hole. The answer must come at once.
    fn read(&self, head: &[u8], size: u64) -> Result<ModelInfo, GgufError> {
        let path = self.dir.path().join("model.gguf");
        let mut file = File::create(&path).unwrap();
        file.write_all(head).unwrap();
        file.set_len(size).unwrap();
        read_at_once(&path)
    }

    /// Read SmolLM2 with some bytes replaced.
    fn with(&self, at: usize, bytes: &[u8]) -> Result<ModelInfo, GgufError> {
        let mut head = self.head.clone();
        head[at..at + bytes.len()].copy_from_slice(bytes);
        self.read(&head, self.size)
    }

    fn find(&self, text: &str) -> usize {
        self.head.windows(text.len()).position(|w| w == text.as_bytes()).unwrap()
    }
}

fn read_at_once(path: &Path) -> Result<ModelInfo, GgufError> {
    let start = Instant::now();
    let result = gguf::read(path);
    assert!(start.elapsed() < Duration::from_secs(2), "took {:?}", start.elapsed());
    if let Err(error) = &result {
        let line = error.to_string();
        assert!(line.starts_with(path.to_str().unwrap()) && !line.contains('\n'), "{line}");
    }
    result
}

/// See [`file::decoder`].
fn decoder(lab: &Lab, name: &str, extra: &[(&str, Value)]) -> Result<ModelInfo, GgufError> {
    let entries = file::decoder(name, extra);
    let file = handwritten(&file::borrowed(&entries), 0);
    lab.read(&file, file.len() as u64)
}

fn support(lab: &Lab, name: &str, extra: &[(&str, Value)]) -> Support {
    decoder(lab, name, extra).unwrap().support()
}

fn assert_refused(support: Support, word: &str) {
    match support {
        Support::Refused(reason) => assert!(reason.contains(word), "{reason}"),
        other => panic!("{other:?}, not refused for {word}"),
    }
}

// ---- real models

#[test]
fn smollm_says_what_it_is() {
    let info = gguf::read(&models().join(SMOLLM)).expect("run make setup");
    assert_eq!(info.architecture, "llama");
    assert_eq!(info.quantization, Some("Q4_1"));
    assert_eq!((info.n_layer, info.n_head, info.n_head_kv.as_slice()), (30, 9, &[3; 30][..]));
    assert_eq!((info.n_embd, info.n_embd_head_k, info.n_embd_head_v), (576, 64, 64));
    assert_eq!((info.n_ctx_train, info.n_split), (8192, 1));
    assert!(info.chat_template.as_ref().unwrap().contains("<|im_start|>"));
    assert_eq!(info.sliding_window, None);
    assert_eq!(info.support(), Support::Composite);
    assert_eq!(info.kv_bytes_per_cell(F16, F16), 23_040);
    assert_eq!(info.kv_bytes_per_cell(CacheType::F32, CacheType::F32), 46_080);
    assert_eq!(info.kv_bytes_per_cell(CacheType::Q8_0, F16), 11_520 + 11_520 * 34 / 64);
    assert_eq!(info.kv_bytes_per_cell(CacheType::Q4_0, CacheType::Q4_0), 23_040 * 18 / 64);
}

#[test]
fn qwen_says_what_it_is() {
    let Some(info) = optional("Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf") else {
        return;
    };
    assert_eq!((info.architecture.as_str(), info.quantization), ("qwen2", Some("Q4_K_M")));
    assert_eq!((info.n_layer, info.n_head, info.n_head_kv[0]), (28, 12, 2));
    assert_eq!((info.n_embd_head_k, info.n_ctx_train), (128, 32_768));
    assert_eq!(info.kv_bytes_per_cell(F16, F16), 28 * 2 * (128 + 128) * 2);
    assert_eq!(info.support(), Support::Composite);
}

#[test]
fn gemma_has_a_window_in_five_layers_of_six() {
    let Some(info) = optional("gemma-3-270m.Q4_K_M.gguf") else {
        return;
    };
    assert_eq!(info.architecture, "gemma3");
    assert_eq!((info.n_layer, info.n_head, info.n_head_kv[0]), (18, 4, 1));
    assert_eq!((info.n_embd, info.n_embd_head_k), (640, 256));
    assert_eq!(info.sliding_window, Some(512));
    let full: Vec<_> = (0..18).filter(|&il| !info.windowed[il]).collect();
    assert_eq!(full, [5, 11, 17]);
    assert_eq!(info.kv_bytes_per_cell(F16, F16), 3 * (256 + 256) * 2);
    assert_eq!(info.support(), Support::BaseOnly);
}

// ---- files that are not what they should be

#[test]
fn what_is_no_model_file_is_named() {
    let lab = Lab::new();
    let missing = lab.dir.path().join("missing.gguf");
    assert!(matches!(read_at_once(&missing), Err(GgufError::NotFound { .. })));
    assert!(matches!(read_at_once(lab.dir.path()), Err(GgufError::Folder { .. })));
    #[cfg(unix)]
    assert!(matches!(read_at_once(Path::new("/dev/zero")), Err(GgufError::NotAFile { .. })));
    assert!(matches!(lab.read(b"", 0), Err(GgufError::Empty { .. })));
    assert!(matches!(lab.with(0, b"PK\x03\x04"), Err(GgufError::NotGguf { .. })));
    assert!(matches!(lab.with(0, b"FUGG"), Err(GgufError::BigEndian { .. })));
    let pointer = b"version https://git-lfs.github.com/spec/v1\n";
    let error = lab.read(pointer, pointer.len() as u64).unwrap_err().to_string();
    assert!(error.contains("git lfs pull"), "{error}");
}

#[test]
fn other_versions_are_refused() {
    let lab = Lab::new();
    for version in [0, 1, 4, 0x7fff_ffff_u32] {
        let result = lab.with(4, &version.to_le_bytes());
        assert!(matches!(result, Err(GgufError::Version { version: v, .. }) if v == version));
    }
    assert!(matches!(lab.with(4, &3_u32.to_be_bytes()), Err(GgufError::BigEndian { .. })));
    assert_eq!(lab.with(4, &2_u32.to_le_bytes()).unwrap().n_layer, 30);
}

#[test]
fn a_truncated_file_is_found_wherever_it_is_cut() {
    let lab = Lab::new();
    assert!(lab.read(&lab.head, lab.size).is_ok());
    let mut cuts: Vec<u64> = (1..2_000).collect();
    cuts.extend((2_000..HEADER).step_by(1_009));
    cuts.extend((HEADER..lab.size).step_by(5_000_003));
    cuts.extend([lab.size - 32, lab.size - 1]);
    let path = lab.dir.path().join("model.gguf");
    let file = File::options().write(true).open(&path).unwrap();
    let mut in_header = 0;
    for cut in cuts.into_iter().rev() {
        file.set_len(cut).unwrap();
        match read_at_once(&path) {
            Err(GgufError::TruncatedHeader { size, .. }) => {
                assert_eq!(size, cut);
                in_header += 1;
            }
            Err(GgufError::TruncatedData { needed, size, .. }) => {
                assert_eq!((needed, size, in_header), (lab.size, cut, 0));
            }
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
    assert!(in_header > 2_000);
}

#[test]
fn promises_that_the_file_cannot_keep_are_not_believed() {
    let lab = Lab::new();
    let huge = [1_u64 << 21, 1 << 40, i64::MAX as u64, u64::MAX];
    let name = lab.find("general.name");
    let tokens = lab.find("tokenizer.ggml.tokens");
    let places = [
        ("tensors", 8),
        ("entries", 16),
        ("the first key", 24),
        ("a string", name + "general.name".len() + 4),
        ("an array", tokens + "tokenizer.ggml.tokens".len() + 8),
        ("a string in an array", tokens + "tokenizer.ggml.tokens".len() + 16),
        ("a tensor's name", lab.find("blk.0.attn_norm.weight") - 8),
    ];
    for (what, at) in places {
        for n in huge {
            match lab.with(at, &n.to_le_bytes()) {
                Err(GgufError::Malformed { .. }) => {}
                // a length that is possible, were the file not too short for it
                Err(GgufError::TruncatedHeader { .. }) if n < 1 << 30 => {}
                other => panic!("{what} of {n}: {other:?}"),
            }
        }
    }
    // a type of value that there is not
    let at = name + "general.name".len();
    assert!(matches!(lab.with(at, &99_u32.to_le_bytes()), Err(GgufError::Malformed { .. })));
}

#[test]
fn tensors_out_of_place_or_shape_are_found() {
    let lab = Lab::new();
    // name, u32 dimensions, u64 for each, u32 type, u64 offset
    let at = lab.find("blk.0.attn_norm.weight") + "blk.0.attn_norm.weight".len();
    let n_dims = u32::from_le_bytes(lab.head[at..at + 4].try_into().unwrap());
    let kind = at + 4 + 8 * n_dims as usize;
    for offset in [7_u64, 1 << 40, u64::MAX] {
        let result = lab.with(kind + 4, &offset.to_le_bytes());
        assert!(matches!(result, Err(GgufError::Malformed { .. })), "{result:?}");
    }
    for dim in [577_u64 << 40, u64::MAX] {
        assert!(lab.with(at + 4, &dim.to_le_bytes()).is_err());
    }
    assert!(matches!(lab.with(at, &5_u32.to_le_bytes()), Err(GgufError::Malformed { .. })));
}

#[test]
fn a_tensor_type_that_only_llama_cpp_knows_is_left_to_it() {
    let lab = Lab::new();
    // 40 is NVFP4, at which gguf-rs panics; 41 to 43 it refuses
    for ggml_type in [40, 41, 42, 43, 44, 1_000, u32::MAX] {
        let file = handwritten(&[("general.architecture", Text("llama"))], ggml_type);
        assert!(lab.read(&file, file.len() as u64).is_ok(), "{ggml_type}");
    }
}

#[test]
fn random_damage_never_panics() {
    let lab = Lab::new();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let path = lab.dir.path().join("damaged.gguf");
    let mut file = File::create(&path).unwrap();
    file.write_all(&lab.head).unwrap();
    file.set_len(lab.size).unwrap();
    let mut refused = 0;
    for round in 0..600 {
        // half of the rounds in the shape's own entries, where a flip hurts most
        let end = if round % 2 == 0 { 2_048 } else { 64 << 10 };
        let flips: Vec<(u64, u8)> =
            (0..rng.random_range(1..8)).map(|_| (rng.random_range(0..end), 1 << rng.random_range(0..8))).collect();
        for (at, bit) in flips.iter().chain([&(0, 0)]) {
            patch(&mut file, *at, lab.head[*at as usize] ^ bit);
        }
        if let Ok(info) = read_at_once(&path) {
            info.support();
            info.kv_bytes_per_cell(F16, CacheType::Q4_0);
        } else {
            refused += 1;
        }
        for (at, _) in flips {
            patch(&mut file, at, lab.head[at as usize]);
        }
    }
    assert!((100..600).contains(&refused), "{refused} refused");
    assert!(read_at_once(&path).is_ok());
}

fn patch(file: &mut File, at: u64, byte: u8) {
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[byte]).unwrap();
}

#[test]
fn implausible_shapes_are_refused_without_overflow() {
    let lab = Lab::new();
    for key in [
        ".block_count",
        ".embedding_length",
        ".attention.head_count",
        ".attention.key_length",
        ".attention.value_length",
    ] {
        for value in [U32(u32::MAX), Text("many"), F32(-1.0)] {
            let result = decoder(&lab, "llama", &[(key, value)]);
            assert!(matches!(result, Err(GgufError::Malformed { .. })), "{key}: {result:?}");
        }
    }
    let short = decoder(&lab, "llama", &[(".attention.head_count_kv", Array(&[1, 2]))]);
    assert!(matches!(short, Err(GgufError::Malformed { .. })));
    for alignment in [0, 3, 48] {
        let result = decoder(&lab, "llama", &[("general.alignment", U32(alignment))]);
        assert!(matches!(result, Err(GgufError::Malformed { .. })));
    }
    let largest = [(".attention.head_count_kv", U32(1 << 20)), (".attention.key_length", U32(1 << 20))];
    let info = decoder(&lab, "llama", &largest).unwrap();
    assert_eq!(info.kv_bytes_per_cell(F16, F16), 4 * ((1 << 41) + 2 * 32 * (1 << 20)));
}

// ---- what gvote can work on

#[test]
fn architectures_without_a_plain_cache_are_refused() {
    let lab = Lab::new();
    let by_name = [
        ("mamba", "recurrent"),
        ("rwkv7", "recurrent"),
        ("qwen3next", "mixes recurrent"),
        ("granitehybrid", "mixes recurrent"),
        ("llada", "diffusion"),
        ("bert", "encodes"),
        ("t5encoder", "encodes"),
        ("t5", "encoder"),
        ("bloom", "ALiBi"),
        ("deepseek32", "sparse"),
        ("clip", "no language model"),
        ("eagle3", "drafts"),
    ];
    for (name, word) in by_name {
        assert_refused(support(&lab, name, &[]), word);
    }
    let by_key = [
        ("deepseek2", ".attention.key_length_mla", U32(192), "latent"),
        ("mpt", ".attention.max_alibi_bias", F32(8.0), "ALiBi"),
        ("baichuan", ".block_count", U32(40), "ALiBi"),
        ("llama", ".attention.causal", Bool(false), "looks ahead"),
        ("llama", "general.type", Text("adapter"), "adapter"),
        ("llama", ".attention.head_count_kv", U32(0), "no layer"),
    ];
    for (name, key, value, word) in by_key {
        assert_refused(support(&lab, name, &[(key, value)]), word);
    }
}

#[test]
fn everything_else_is_left_to_llama_cpp() {
    let lab = Lab::new();
    assert_eq!(support(&lab, "llama", &[("general.type", Text("model"))]), Support::Composite);
    assert_eq!(support(&lab, "not-heard-of-yet", &[]), Support::Composite);
    assert_eq!(support(&lab, "mpt", &[(".attention.max_alibi_bias", F32(0.0))]), Support::Composite);
    assert_eq!(support(&lab, "baichuan", &[(".block_count", U32(32))]), Support::Composite);
    // keeps whole keys and values, though it computes them from a latent
    assert_eq!(support(&lab, "minicpm3", &[(".attention.kv_lora_rank", U32(256))]), Support::Composite);
}

#[test]
fn windows_count_where_llama_cpp_uses_them() {
    let lab = Lab::new();
    let window = (".attention.sliding_window", U32(512));
    let pattern = ".attention.sliding_window_pattern";
    let windowed = |name, extra: &[_]| {
        let info = decoder(&lab, name, extra).unwrap();
        (info.windowed.clone(), info.kv_bytes_per_cell(F16, F16) / 256, info.support())
    };
    let (no, yes) = (false, true);
    assert_eq!(windowed("phi3", &[window]), (vec![no; 4], 4, Support::Composite));
    assert_eq!(windowed("gemma3", &[]), (vec![no; 4], 4, Support::Composite));
    assert_eq!(windowed("gemma2", &[]), (vec![yes, no, yes, no], 2, Support::BaseOnly));
    assert_eq!(windowed("olmo2", &[window]), (vec![yes, yes, yes, no], 1, Support::BaseOnly));
    assert_eq!(windowed("smallthinker", &[window]), (vec![no, yes, yes, yes], 1, Support::BaseOnly));
    let listed = [window, (pattern, Array(&[0, 1, 1, 0]))];
    assert_eq!(windowed("mimo2", &listed), (vec![no, yes, yes, no], 2, Support::BaseOnly));
    assert_eq!(windowed("gpt-oss", &[window, (pattern, U32(4))]), (vec![yes, yes, yes, no], 1, Support::BaseOnly));
    assert_refused(support(&lab, "gemma4", &[window, (pattern, Array(&[1; 4]))]), "every layer");
}

#[test]
fn layers_may_differ() {
    let lab = Lab::new();
    let info = decoder(&lab, "deci", &[(".attention.head_count_kv", Array(&[0, 1, 2, 4]))]).unwrap();
    assert_eq!((info.n_head_kv.as_slice(), info.kv_bytes_per_cell(F16, F16)), (&[0, 1, 2, 4][..], 7 * 128));
    // a layer that only predicts further tokens keeps no cache in the main context
    let info = decoder(&lab, "glm4moe", &[(".nextn_predict_layers", U32(1))]).unwrap();
    assert_eq!((info.n_layer, info.kv_bytes_per_cell(F16, F16)), (3, 3 * 256));
    // layers that read another layer's keys
    let info = decoder(&lab, "gemma4", &[(".attention.shared_kv_layers", U32(2))]).unwrap();
    assert_eq!(info.kv_bytes_per_cell(F16, F16), 2 * 256);
}

#[test]
fn a_key_given_twice_is_refused() {
    let lab = Lab::new();
    let file = handwritten(&[("general.architecture", Text("llama")), ("general.architecture", Text("mamba"))], 0);
    assert!(matches!(lab.read(&file, file.len() as u64), Err(GgufError::Malformed { .. })));
}
