//! The real model, a context with a decoded prompt, and a recorder of what attention reads and writes: on a GPU if there is one, wherever
//! the tensors lie.

use std::collections::BTreeSet;
use std::ffi::{CStr, c_void};
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::Session;
use crate::cache::{self, Cell, Layout, PRETEND_DEVICE};
use crate::capture::Capture;
use crate::compact::{self, CompactError};
use crate::llama::{
    Batch, CacheType, Context, ContextParams, FlashAttention, Model, ModelParams, Pos, Sampler, SamplerParams, SeqId,
    Token,
};
use crate::policy::{Bound, Kept, Params, Selection};
use crate::score::Scorer;
use crate::session::Stop;
use crate::sys;
use crate::tests::tiny::N_VOCAB;

/// SmolLM2-135M-Instruct, loaded once.
pub fn model() -> Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL
        .get_or_init(|| {
            let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(
                || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"),
                PathBuf::from,
            );
            let path = cache.join("gvote/models/SmolLM2-135M-Instruct.Q4_1.gguf");
            assert!(path.exists(), "{} is missing: run `make setup`", path.display());
            Model::load(&path, &ModelParams::default(), |_| true).expect("the model loads")
        })
        .clone()
}

/// Generates the most likely answer, of at most `n` tokens, and returns it with the reason why it ended.
pub fn greedy(session: &mut Session, n: i32) -> (Vec<Token>, Stop) {
    let mut sampler =
        Sampler::new(session.model(), &SamplerParams { temp: 0.0, ..SamplerParams::default() }, 0).unwrap();
    let mut tokens = Vec::new();
    let each = |token| {
        tokens.push(token);
        ControlFlow::Continue(())
    };
    let stop = session.generate(&mut sampler, n, each).unwrap().stop;
    (tokens, stop)
}

/// Tokens of a chat in the real model's template: roles and messages, and optionally the start of an answer.
pub fn chat(messages: &[(&str, String)], opens_answer: bool) -> Vec<Token> {
    let opening = if opens_answer { "<|im_start|>assistant\n" } else { "" };
    let turns = messages.iter().map(|(role, text)| format!("<|im_start|>{role}\n{text}<|im_end|>\n"));
    model().tokenize(&(turns.collect::<String>() + opening), true, true).expect("the model has a tokenizer")
}

/// Real text of `n` tokens. The text must not change: rounding errors depend on it.
pub fn tokens(model: &Model, n: usize) -> Vec<Token> {
    let mut tokens = model.tokenize(include_str!("text.txt"), true, false).expect("the model has a tokenizer");
    assert!(tokens.len() >= n, "{} tokens of text are not enough", tokens.len());
    tokens.truncate(n);
    tokens
}

/// One way to store and read the cache.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub flash: bool,
    pub k: CacheType,
    pub v: CacheType,
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}, flash attention {}", self.k.name(), if self.flash { "on" } else { "off" })
    }
}

pub const F16: Setup = Setup { flash: false, k: CacheType::F16, v: CacheType::F16 };
pub const F16_FLASH: Setup = Setup { flash: true, ..F16 };
pub const F32_FLASH: Setup = Setup { flash: true, k: CacheType::F32, v: CacheType::F32 };
pub const BF16: Setup = Setup { flash: false, k: CacheType::Bf16, v: CacheType::Bf16 };
pub const Q8_0: Setup = Setup { flash: true, k: CacheType::Q8_0, v: CacheType::Q8_0 };
pub const Q4_0: Setup = Setup { flash: true, k: CacheType::Q4_0, v: CacheType::Q4_0 };
pub const Q5_1: Setup = Setup { flash: true, k: CacheType::Q5_1, v: CacheType::Q5_1 };
pub const IQ4_NL: Setup = Setup { flash: true, k: CacheType::Iq4Nl, v: CacheType::Iq4Nl };

/// Runs `f` with all memory treated as device memory.
pub fn on_device<T>(f: impl FnOnce() -> T) -> T {
    PRETEND_DEVICE.set(true);
    let out = f();
    PRETEND_DEVICE.set(false);
    out
}

pub fn context(model: &Model, setup: Setup, n_ctx: u32, n_ubatch: u32) -> Context {
    Context::new(
        model,
        &ContextParams {
            n_ctx,
            n_batch: 2048.min(n_ctx),
            n_ubatch,
            n_seq_max: 3,
            n_threads: 2,
            n_threads_batch: 2,
            flash_attn: if setup.flash { FlashAttention::On } else { FlashAttention::Off },
            type_k: setup.k,
            type_v: setup.v,
            ..ContextParams::default()
        },
    )
    .expect("the context is made")
}

pub fn decode(ctx: &mut Context, tokens: &[Token], first: Pos, seq: SeqId) {
    let mut batch = Batch::new(tokens.len());
    for (i, &token) in tokens.iter().enumerate() {
        batch.add(token, first + i as Pos, seq, i + 1 == tokens.len()).expect("the batch has room");
    }
    ctx.decode(&batch).expect("decodes");
    // a GPU may still be writing K and V
    // SAFETY: valid context.
    unsafe { sys::llama_synchronize(ctx.as_ptr()) };
}

/// Decodes `tokens` into an empty sequence 0, and returns a capture of them with the default window.
pub fn captured(ctx: &mut Context, tokens: &[Token]) -> Capture {
    let layout = Layout::of(ctx, 0).expect("a cache that can be compacted");
    let params = Params::default();
    let mut capture = Capture::new(ctx, &layout, params.window, params.sinks);
    capture.follow(0);
    let mut batch = Batch::new(tokens.len());
    for (i, &token) in tokens.iter().enumerate() {
        batch.add(token, i as Pos, 0, i + 1 == tokens.len()).expect("the batch has room");
    }
    capture.decode(ctx, &batch, true).expect("decodes");
    capture
}

/// Decodes one more token and returns the next-token logits.
pub fn next_logits(ctx: &mut Context, token: Token, pos: Pos) -> Vec<f32> {
    decode(ctx, &[token], pos, 0);
    ctx.logits().expect("asked for").to_vec()
}

pub fn composite(n: usize, n_cells: usize, index: Vec<u32>) -> Selection {
    Selection { n, kept: Kept::Heads { n_cells, index }, lost_mass: None, bound: Bound::MaxCells, ragged: None }
}

pub fn n_heads(layout: &Layout) -> usize {
    layout.n_head_kv().sum()
}

/// Ascending random places below `n`, `n_cells` of them, the last one included.
pub fn random_subset(n: usize, n_cells: usize, rng: &mut impl rand::Rng) -> Vec<u32> {
    use rand::seq::index::sample;
    let mut kept = sample(rng, n - 1, n_cells - 1).into_vec();
    kept.push(n - 1);
    kept.sort_unstable();
    kept.into_iter().map(|i| i as u32).collect()
}

/// Location of K: `CPU`, or the GPUs as ggml names them, such as `CUDA0, CUDA1`.
pub fn place(layout: &Layout) -> String {
    // SAFETY: the storage tensors and their buffers live as long as the context; names end with NUL and are static.
    let name = |l: &sys::gvote_shim_layer| unsafe {
        let type_ = sys::ggml_backend_buffer_get_type((*l.k).buffer);
        CStr::from_ptr(sys::ggml_backend_buft_name(type_)).to_string_lossy()
    };
    layout.layers.iter().map(name).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
}

/// Whether K lies on a GPU, whose kernels round differently from the CPU's.
pub fn is_on_gpu(layout: &Layout) -> bool {
    // SAFETY: as above.
    layout.layers.iter().any(|l| unsafe { !sys::ggml_backend_buffer_is_host((*l.k).buffer) })
}

/// Prints an error and its tolerance, and returns whether it is below. `benches/gpu/check` shows these lines.
#[must_use]
pub fn is_within(what: impl fmt::Display, error: f64, tolerance: f64) -> bool {
    let holds = error < tolerance;
    println!("measured: {what}: {error:.1e}, {} {tolerance:.0e}", if holds { "below" } else { "NOT below" });
    holds
}

/// The largest absolute error; NaN if any error is NaN.
pub fn largest(errors: impl IntoIterator<Item = f64>) -> f64 {
    errors.into_iter().map(f64::abs).max_by(f64::total_cmp).unwrap_or(0.0)
}

/// Largest error relative to the largest expected number.
pub fn apart(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    largest(got.iter().zip(expected).map(|(g, e)| f64::from(*g) - e)) / largest(expected.iter().copied())
}

/// A selection with a different random subset of rows in every head.
pub fn random_heads(layout: &Layout, n: usize, n_cells: usize, seed: u64) -> Selection {
    use rand::SeedableRng;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let index = (0..n_heads(layout)).flat_map(|_| random_subset(n, n_cells, &mut rng)).collect();
    composite(n, n_cells, index)
}

/// Reads `n` pieces of `bytes` bytes from a tensor, from host or device memory: the first at `offset`, each next one `stride` further.
fn strided(t: &sys::ggml_tensor, offset: usize, bytes: usize, n: usize, stride: usize) -> Vec<u8> {
    let mut out = vec![0; bytes * n];
    // SAFETY: the buffer has the size passed; ggml checks that all lies inside the tensor.
    unsafe { sys::ggml_backend_tensor_get_2d(t, out.as_mut_ptr().cast(), offset, bytes, n, stride, bytes) };
    out
}

/// Reads bytes of a tensor, from host or device memory.
pub fn bytes(t: &sys::ggml_tensor, offset: usize, n: usize) -> Vec<u8> {
    strided(t, offset, n, 1, n)
}

/// Reads all bytes from a tensor's first value to its last one; for a view these may be more than its values.
pub fn all_bytes(t: &sys::ggml_tensor) -> Vec<u8> {
    // SAFETY: plain query of a valid tensor.
    bytes(t, 0, unsafe { sys::ggml_nbytes(t) })
}

/// One row of K or V as floats. `[d]`
pub fn row(layout: &Layout, layer: usize, is_v: bool, kv: usize, cell: &Cell) -> Vec<f32> {
    let l = &layout.layers[layer];
    let cell = cell.index as usize;
    let d = if is_v { l.n_embd_head_v } else { l.n_embd_head_k } as usize;
    // SAFETY: the storage lives as long as the context; plain queries of its type.
    let (t, value, row) = unsafe {
        let t = if is_v { &*l.v } else { &*l.k };
        (t, sys::ggml_type_size(t.type_), sys::ggml_row_size(t.type_, d as i64))
    };
    // offsets as in llama_kv_cache::get_k and get_v
    let bytes = if is_v && layout.info.v_trans {
        let channel = layout.n_cells() * value;
        strided(t, kv * d * channel + cell * value, value, d, channel)
    } else {
        bytes(t, cell * t.nb[1] + kv * row, row)
    };
    floats(t.type_, &bytes)
}

/// Converts an archived row to floats: key and value.
pub fn key_and_value(layout: &Layout, layer: usize, row: &[u8]) -> [Vec<f32>; 2] {
    let l = &layout.layers[layer];
    // SAFETY: the storage lives as long as the context; plain queries of its type.
    let (k, v, key) =
        unsafe { ((*l.k).type_, (*l.v).type_, sys::ggml_row_size((*l.k).type_, i64::from(l.n_embd_head_k))) };
    let (key, value) = row.split_at(key);
    [floats(k, key), floats(v, value)]
}

/// Converts stored values of a type to floats.
pub fn floats(type_: sys::ggml_type, data: &[u8]) -> Vec<f32> {
    if type_ == sys::GGML_TYPE_F32 {
        return data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
    }
    // SAFETY: tables of ggml; the data are whole blocks of the type, and `out` has room for their values.
    unsafe {
        let n = data.len() / sys::ggml_type_size(type_) * sys::ggml_blck_size(type_) as usize;
        let mut out = vec![0f32; n];
        let to_float = (*sys::ggml_get_type_traits(type_)).to_float.expect("a cache type");
        to_float(data.as_ptr().cast(), out.as_mut_ptr(), n as i64);
        out
    }
}

/// Rounds a query as flash attention kernels do, and on the CPU all kernels: to the type that a dot product with K's type takes. On the CPU
/// this is its `vec_dot_type`. CUDA's kernel for one token (ggml-cuda/fattn-vec.cuh) uses it unchanged if K has no blocks, otherwise as
/// q8_1: eight bits with one f32 scale for 32 values.
pub fn rounded(layout: &Layout, layer: usize, q: &[f32]) -> Vec<f32> {
    // SAFETY: the storage lives as long as the context; plain query.
    let (k, has_blocks) = unsafe {
        let k = (*layout.layers[layer].k).type_;
        (k, sys::ggml_is_quantized(k))
    };
    if is_on_gpu(layout) {
        let in_blocks = |block: &[f32]| -> Vec<f32> {
            let step = block.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
            block.iter().map(|x| if step > 0.0 { (x / step).round() * step } else { 0.0 }).collect()
        };
        return if has_blocks { q.chunks(32).flat_map(in_blocks).collect() } else { q.to_vec() };
    }
    // SAFETY: tables of ggml; the buffer has the size of n values of that type.
    unsafe {
        let type_ = (*sys::ggml_get_type_traits_cpu(k)).vec_dot_type;
        if type_ == sys::GGML_TYPE_F32 {
            return q.to_vec();
        }
        let from_float = (*sys::ggml_get_type_traits_cpu(type_)).from_float.expect("a type to compute with");
        let mut bytes = vec![0u8; sys::ggml_row_size(type_, q.len() as i64)];
        from_float(q.as_ptr(), bytes.as_mut_ptr().cast(), q.len() as i64);
        floats(type_, &bytes)
    }
}

/// What the attention of one layer read and wrote for the tokens of one ubatch.
#[derive(Default)]
pub struct Attention {
    /// Cells that the kernel read.
    pub n_kv: usize,
    /// `[n_tokens][n_head][d]`
    pub q: Vec<f32>,
    /// `[n_tokens][n_head][d]`
    pub out: Vec<f32>,
}

struct Recorder {
    layers: Vec<(*const sys::ggml_tensor, Attention)>,
}

/// Runs `f`, which decodes one ubatch, and returns each layer's attention.
pub fn record(ctx: &mut Context, layout: &Layout, f: impl FnOnce(&mut Context)) -> Vec<Attention> {
    let mut recorder =
        Recorder { layers: layout.layers.iter().map(|l| (l.k.cast_const(), Attention::default())).collect() };
    // SAFETY: the recorder outlives the calls; the callback is removed again.
    unsafe {
        sys::gvote_shim_set_eval_callback(ctx.as_ptr(), Some(on_eval), (&raw mut recorder).cast());
        f(ctx);
        sys::gvote_shim_set_eval_callback(ctx.as_ptr(), None, std::ptr::null_mut());
    }
    recorder.layers.into_iter().map(|l| l.1).collect()
}

unsafe extern "C" fn on_eval(t: *mut sys::ggml_tensor, ask: bool, data: *mut c_void) -> bool {
    // SAFETY: ggml passes a node whose sources are valid; data is the recorder.
    unsafe {
        let t = &*t;
        let name = CStr::from_ptr(t.name.as_ptr()).to_string_lossy();
        let flash = t.op == sys::GGML_OP_FLASH_ATTN_EXT;
        let kq = t.op == sys::GGML_OP_MUL_MAT && name.starts_with("kq-");
        let kqv = t.op == sys::GGML_OP_MUL_MAT && name.starts_with("kqv-");
        if ask || !(flash || kq || kqv) {
            return flash || kq || kqv;
        }
        let recorder = &mut *data.cast::<Recorder>();
        if kqv {
            let il: usize = name["kqv-".len()..].parse().expect("a layer");
            recorder.layers[il].1.out = read(t, 1);
            return true;
        }
        let (k, q) = if flash { (t.src[1], t.src[0]) } else { (t.src[0], t.src[1]) };
        let mut storage: *const sys::ggml_tensor = k;
        while !(*storage).view_src.is_null() {
            storage = (*storage).view_src;
        }
        let entry = recorder.layers.iter_mut().find(|l| l.0 == storage).expect("a layer of the cache");
        entry.1.n_kv = (*k).ne[1] as usize;
        entry.1.q = read(&*q, 1);
        if flash {
            entry.1.out = read(t, 2);
        }
        true
    }
}

/// Reads the floats of a tensor `[d, n_tokens, n_head]` or `[d, n_head, n_tokens]`; `tokens` is the dimension that counts the tokens.
fn read(t: &sys::ggml_tensor, tokens: usize) -> Vec<f32> {
    assert_eq!((t.type_, t.nb[0]), (sys::GGML_TYPE_F32, size_of::<f32>()));
    let heads = 3 - tokens;
    let [d, n_tokens, n_head] = [0, tokens, heads].map(|i| t.ne[i] as usize);
    let bytes = all_bytes(t);
    (0..n_tokens)
        .flat_map(|i| (0..n_head).map(move |h| i * t.nb[tokens] + h * t.nb[heads]))
        .flat_map(|start| floats(t.type_, &bytes[start..][..d * size_of::<f32>()]))
        .collect()
}

/// softmax of `logits`, in float64.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// Compacts a sequence to the cells that `selection` keeps.
pub fn compact(ctx: &mut Context, seq: SeqId, selection: &Selection) -> Result<(), CompactError> {
    let cells = cache::cells(ctx, seq);
    let left = compact::compact(ctx, seq, &cells, selection, Scorer::new(1, 1).devices(), None)?;
    assert_eq!(cache::cells(ctx, seq), left);
    Ok(())
}

pub fn cells(ctx: &Context) -> Vec<Cell> {
    cache::cells(ctx, 0)
}

/// llama.cpp's own state of a sequence, as an app saves it.
pub fn save_state(ctx: &Context, seq: SeqId) -> Vec<u8> {
    // SAFETY: valid context; the buffer has the size llama.cpp asked for.
    unsafe {
        let mut data = vec![0u8; sys::llama_state_seq_get_size(ctx.as_ptr(), seq)];
        let n = sys::llama_state_seq_get_data(ctx.as_ptr(), data.as_mut_ptr(), data.len(), seq);
        data.truncate(n);
        data
    }
}

/// Replaces a sequence by a saved state, as an app does.
pub fn load_state(ctx: &mut Context, seq: SeqId, data: &[u8]) {
    // SAFETY: valid context; the length is that of `data`.
    let n = unsafe { sys::llama_state_seq_set_data(ctx.as_ptr(), data.as_ptr(), data.len(), seq) };
    assert_eq!(n, data.len());
}

/// Some tokens of a tiny model.
pub fn words_of(n: usize) -> Vec<Token> {
    (0..n).map(|i| ((7 * i + i * i / 5) % N_VOCAB) as Token).collect()
}
