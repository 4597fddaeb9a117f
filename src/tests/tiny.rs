//! Generates tiny random models as GGUF files, for shapes that the real models do not have.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::llama::{Model, ModelParams};

pub const N_EMBD: usize = 256;
pub const N_LAYER: usize = 3;
pub const N_VOCAB: usize = 64;
const N_FF: usize = 64;
const N_CTX: usize = 1024;
pub const ROPE_BASE: f64 = 10000.0;
pub const EPS: f32 = 1e-5;

/// How positions are encoded in the queries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rope {
    /// Rotates pairs of neighbours (llama).
    Normal,
    /// Rotates pairs half a head apart.
    Neox,
    /// Learned positions in the embedding; queries are not rotated.
    None,
}

/// The shape of a model.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    pub arch: &'static str,
    pub n_head: usize,
    pub n_head_kv: usize,
    pub head: usize,
    pub rope: Rope,
    /// One tensor for W_Q, W_K and W_V.
    pub fused: bool,
    pub qkv_bias: bool,
    pub qk_norm: bool,
    /// LayerNorm with a bias instead of RMSNorm.
    pub layer_norm: bool,
    /// Attention logit softcap (gemma2).
    pub softcap: bool,
    /// Queries are scaled by 1/sqrt(head) before they are multiplied with K (phi3, gemma2).
    pub scaled: bool,
    /// Tokens have texts, and some of them are markup: see [`MARKUP`].
    pub vocabulary: bool,
}

const LLAMA: Spec = Spec {
    arch: "llama",
    n_head: 4,
    n_head_kv: 2,
    head: 64,
    rope: Rope::Normal,
    fused: false,
    qkv_bias: false,
    qk_norm: false,
    layer_norm: false,
    softcap: false,
    scaled: false,
    vocabulary: false,
};

/// The last tokens of a vocabulary.
pub const MARKUP: [&str; 3] = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"];

pub const SPECS: [Spec; 7] = [
    LLAMA,
    Spec { n_head_kv: 1, head: 32, ..LLAMA },
    Spec { arch: "qwen2", rope: Rope::Neox, qkv_bias: true, ..LLAMA },
    Spec { arch: "qwen3", rope: Rope::Neox, qk_norm: true, ..LLAMA },
    Spec { arch: "phi3", rope: Rope::Neox, fused: true, scaled: true, n_head: 8, n_head_kv: 8, head: 32, ..LLAMA },
    Spec {
        arch: "starcoder",
        rope: Rope::None,
        fused: true,
        qkv_bias: true,
        layer_norm: true,
        n_head: 8,
        n_head_kv: 1,
        head: 32,
        ..LLAMA
    },
    Spec { arch: "gemma2", rope: Rope::Neox, softcap: true, scaled: true, ..LLAMA },
];

/// A random model of an architecture, made once. Its file has been deleted.
pub fn model(arch: &str) -> Model {
    static MODELS: Mutex<Vec<(String, Model)>> = Mutex::new(Vec::new());
    let mut models = MODELS.lock().unwrap();
    if let Some((_, model)) = models.iter().find(|(name, _)| name == arch) {
        return model.clone();
    }
    let spec = SPECS.into_iter().find(|spec| spec.arch == arch).expect("a known architecture");
    let dir = tempfile::tempdir().expect("a temporary folder can be made");
    let model = Tiny::new(dir.path(), spec).model;
    models.push((arch.into(), model.clone()));
    model
}

/// Recurrent in all layers, and recurrent in two layers around one with attention.
#[allow(dead_code)] // not every includer of this module needs them
pub const RECURRENT: [&str; 2] = ["mamba", "jamba"];

/// Writes a random model with recurrent layers. Its tokenizer knows only bytes.
#[allow(dead_code)]
pub fn recurrent(dir: &Path, arch: &str) -> PathBuf {
    const N_INNER: usize = 2 * N_EMBD;
    const N_CONV: usize = 4;
    const N_STATE: usize = 16;
    const N_RANK: usize = 8;
    let is_hybrid = arch == "jamba";
    let (n_head, n_head_kv) = if is_hybrid { (LLAMA.n_head, [0, LLAMA.n_head_kv, 0]) } else { (0, [0; N_LAYER]) };
    let vocab = byte_tokens();
    let mut file = Gguf::default();
    file.text("general.architecture", arch);
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "gpt-2");
    file.texts("tokenizer.ggml.tokens", &vocab);
    file.texts("tokenizer.ggml.merges", &[]);
    file.number("tokenizer.ggml.eos_token_id", vocab.len() as u32 - 1);
    for (name, value) in [
        ("context_length", N_CTX),
        ("embedding_length", N_EMBD),
        ("block_count", N_LAYER),
        ("feed_forward_length", if is_hybrid { N_FF } else { 0 }),
        ("attention.head_count", n_head),
        ("ssm.conv_kernel", N_CONV),
        ("ssm.inner_size", N_INNER),
        ("ssm.state_size", N_STATE),
        ("ssm.time_step_rank", N_RANK),
    ] {
        file.number(&format!("{arch}.{name}"), value as u32);
    }
    file.numbers(&format!("{arch}.attention.head_count_kv"), &n_head_kv.map(|n| n as u32));
    file.float(&format!("{arch}.attention.layer_norm_rms_epsilon"), EPS);

    let mut tensors = vec![
        ("token_embd.weight".to_owned(), vec![N_EMBD, vocab.len()]),
        ("output_norm.weight".to_owned(), vec![N_EMBD]),
    ];
    for (il, n_head_kv) in n_head_kv.into_iter().enumerate() {
        let mut add = |name: &str, dims: &[usize]| tensors.push((format!("blk.{il}.{name}"), dims.to_vec()));
        add("attn_norm.weight", &[N_EMBD]);
        if n_head_kv > 0 {
            let kv = n_head_kv * N_EMBD / n_head;
            add("attn_q.weight", &[N_EMBD, N_EMBD]);
            add("attn_k.weight", &[N_EMBD, kv]);
            add("attn_v.weight", &[N_EMBD, kv]);
            add("attn_output.weight", &[N_EMBD, N_EMBD]);
        } else {
            add("ssm_in.weight", &[N_EMBD, 2 * N_INNER]);
            add("ssm_conv1d.weight", &[N_CONV, N_INNER]);
            add("ssm_conv1d.bias", &[N_INNER]);
            add("ssm_x.weight", &[N_INNER, N_RANK + 2 * N_STATE]);
            add("ssm_dt.weight", &[N_RANK, N_INNER]);
            add("ssm_dt.bias", &[N_INNER]);
            add("ssm_a", &[N_STATE, N_INNER]);
            add("ssm_d", &[N_INNER]);
            add("ssm_out.weight", &[N_INNER, N_EMBD]);
        }
        if n_head_kv == 0 && is_hybrid {
            add("ssm_dt_norm.weight", &[N_RANK]);
            add("ssm_b_norm.weight", &[N_STATE]);
            add("ssm_c_norm.weight", &[N_STATE]);
        }
        if is_hybrid {
            add("ffn_norm.weight", &[N_EMBD]);
            add("ffn_gate.weight", &[N_EMBD, N_FF]);
            add("ffn_up.weight", &[N_EMBD, N_FF]);
            add("ffn_down.weight", &[N_FF, N_EMBD]);
        }
    }
    fill(&mut file, tensors);
    let path = dir.join(format!("{arch}.gguf"));
    std::fs::write(&path, file.bytes()).expect("a temporary folder can be written");
    path
}

/// Writes a tokenizer of letters and markup, `N_VOCAB` tokens in all.
fn write_vocabulary(file: &mut Gguf) {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    // GPT-2's letters for space and newline
    let letters = ('a'..='z').chain('A'..='Z').chain("\u{120}\u{10a}.,!?:'-".chars());
    let tokens: Vec<String> = letters.map(String::from).chain(MARKUP.map(String::from)).collect();
    assert_eq!(tokens.len(), N_VOCAB);
    let kinds: Vec<i32> = (0..N_VOCAB).map(|i| if i < N_VOCAB - MARKUP.len() { NORMAL } else { CONTROL }).collect();
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "gpt-2");
    file.texts("tokenizer.ggml.tokens", &tokens);
    file.integers("tokenizer.ggml.token_type", &kinds);
    file.texts("tokenizer.ggml.merges", &[]);
    file.number("tokenizer.ggml.eos_token_id", N_VOCAB as u32 - 2);
}

/// Writes a random model of one layer with a SentencePiece tokenizer, which puts a space before a text and joins pieces. Its markers are
/// `<s>`, `</s>`, `<|im_start|>` and `<|im_end|>`; the pieces `<|im` and `_end|>` together spell the last.
#[allow(dead_code)]
pub fn sentencepiece(dir: &Path) -> PathBuf {
    // LLAMA_TOKEN_TYPE_*
    const NORMAL: i32 = 1;
    const UNKNOWN: i32 = 2;
    const CONTROL: i32 = 3;
    const BYTE: i32 = 6;
    let mut vocab = vec![("<unk>".to_owned(), UNKNOWN)];
    vocab.extend(["<s>", "</s>", "<|im_start|>", "<|im_end|>"].map(|text| (text.to_owned(), CONTROL)));
    vocab.extend((0..=u8::MAX).map(|byte| (format!("<0x{byte:02X}>"), BYTE)));
    let pieces =
        ["<|", "im", "<|im", "_e", "nd", "_end", "|>", "_end|>", "\u{2581}t", "he", "\u{2581}the", "us", "er", "user"];
    vocab.extend(pieces.map(|text| (text.to_owned(), NORMAL)));
    vocab.extend((' '..='~').map(|c| (c.to_string().replace(' ', "\u{2581}"), NORMAL)));

    let mut file = Gguf::default();
    file.text("general.architecture", "llama");
    file.text("tokenizer.ggml.model", "llama");
    file.texts("tokenizer.ggml.tokens", &vocab.iter().map(|(text, _)| text.clone()).collect::<Vec<_>>());
    file.integers("tokenizer.ggml.token_type", &vocab.iter().map(|(_, kind)| *kind).collect::<Vec<_>>());
    // earlier pieces have higher scores
    file.floats("tokenizer.ggml.scores", &(0..vocab.len()).map(|i| -(i as f32)).collect::<Vec<_>>());
    file.number("tokenizer.ggml.bos_token_id", 1);
    file.number("tokenizer.ggml.eos_token_id", 2);
    for (name, value) in [
        ("context_length", N_CTX),
        ("embedding_length", N_EMBD),
        ("block_count", 1),
        ("feed_forward_length", N_FF),
        ("attention.head_count", LLAMA.n_head),
        ("rope.dimension_count", LLAMA.head),
    ] {
        file.number(&format!("llama.{name}"), value as u32);
    }
    file.float("llama.attention.layer_norm_rms_epsilon", EPS);
    let tensors = [
        ("token_embd", vec![N_EMBD, vocab.len()]),
        ("output_norm", vec![N_EMBD]),
        ("blk.0.attn_norm", vec![N_EMBD]),
        ("blk.0.attn_q", vec![N_EMBD, N_EMBD]),
        ("blk.0.attn_k", vec![N_EMBD, N_EMBD]),
        ("blk.0.attn_v", vec![N_EMBD, N_EMBD]),
        ("blk.0.attn_output", vec![N_EMBD, N_EMBD]),
        ("blk.0.ffn_norm", vec![N_EMBD]),
        ("blk.0.ffn_gate", vec![N_EMBD, N_FF]),
        ("blk.0.ffn_up", vec![N_EMBD, N_FF]),
        ("blk.0.ffn_down", vec![N_FF, N_EMBD]),
    ];
    fill(&mut file, tensors.map(|(name, dims)| (format!("{name}.weight"), dims)).into());
    let path = dir.join("sentencepiece.gguf");
    std::fs::write(&path, file.bytes()).expect("a temporary folder can be written");
    path
}

/// GPT-2's letter for every byte, and a token that ends a text.
fn byte_tokens() -> Vec<String> {
    let is_plain = |byte: &u32| (33..127).contains(byte) || (161..256).contains(byte) && *byte != 173;
    let (plain, others): (Vec<u32>, Vec<u32>) = (0..256).partition(is_plain);
    let letters = plain.into_iter().chain((256..).take(others.len()));
    letters.filter_map(char::from_u32).map(String::from).chain(["<|endoftext|>".to_owned()]).collect()
}

/// Adds random tensors of these names and dimensions.
fn fill(file: &mut Gguf, tensors: Vec<(String, Vec<usize>)>) -> HashMap<String, Vec<f32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    let mut weights = HashMap::new();
    for (name, dims) in tensors {
        let n: usize = dims.iter().product();
        let center = match &*name {
            name if name.contains("norm.weight") => 1.0,
            // a state decays
            name if name.ends_with("ssm_a") => -1.0,
            _ => 0.0,
        };
        // wide enough for logits that spread over a few units
        let spread = if dims.len() == 2 { 2.0 / (dims[0] as f32).sqrt() } else { 0.3 };
        let data: Vec<f32> = (0..n).map(|_| rng.random_range(-spread..spread) + center).collect();
        file.tensor(&name, &dims, &data);
        weights.insert(name, data);
    }
    weights
}

/// A model and its weights by tensor name; matrices are `[n_out][n_in]`.
pub struct Tiny {
    pub spec: Spec,
    pub path: PathBuf,
    pub model: Model,
    pub weights: HashMap<String, Vec<f32>>,
}

/// A LoRA adapter and its weights by tensor name: A `[rank][n_in]` and B `[n_out][rank]`.
pub struct Adapter {
    pub path: PathBuf,
    rank: usize,
    weights: HashMap<String, Vec<f32>>,
}

impl Tiny {
    pub fn new(dir: &Path, spec: Spec) -> Self {
        let path = dir.join(format!("{}-{}-{}.gguf", spec.arch, spec.n_head_kv, spec.head));
        let mut file = Gguf::default();
        file.text("general.architecture", spec.arch);
        if spec.vocabulary {
            write_vocabulary(&mut file);
        } else {
            file.text("tokenizer.ggml.model", "no_vocab");
        }
        let key = |name: &str| format!("{}.{name}", spec.arch);
        for (name, value) in [
            ("vocab_size", N_VOCAB),
            ("context_length", N_CTX),
            ("embedding_length", N_EMBD),
            ("block_count", N_LAYER),
            ("feed_forward_length", N_FF),
            ("attention.head_count", spec.n_head),
            ("attention.head_count_kv", spec.n_head_kv),
            ("attention.key_length", spec.head),
            ("attention.value_length", spec.head),
            ("rope.dimension_count", spec.head),
        ] {
            file.number(&key(name), value as u32);
        }
        file.float(
            &key(if spec.layer_norm { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" }),
            EPS,
        );
        if spec.softcap {
            file.float(&key("attn_logit_softcapping"), 3.0);
            file.float(&key("final_logit_softcapping"), 30.0);
            file.number(&key("attention.sliding_window"), 64);
        }
        let weights = fill(&mut file, tensors(&spec));
        std::fs::write(&path, file.bytes()).expect("a temporary folder can be written");
        let model = Model::load(&path, &ModelParams::default(), |_| true).expect("llama.cpp loads it");
        Self { spec, path, model, weights }
    }

    /// Writes a random LoRA adapter of rank 4 for the queries and keys of every layer.
    #[allow(dead_code)]
    pub fn adapter(&self, dir: &Path) -> Adapter {
        const RANK: usize = 4;
        let spec = &self.spec;
        let path = dir.join("lora.gguf");
        let mut file = Gguf::default();
        file.text("general.type", "adapter");
        file.text("general.architecture", spec.arch);
        file.text("adapter.type", "lora");
        // llama.cpp scales by alpha over the rank
        file.float("adapter.lora.alpha", RANK as f32);
        let parts =
            [("attn_q", spec.n_head), ("attn_k", spec.n_head_kv)].map(|(part, heads)| (part, heads * spec.head));
        let mut tensors = Vec::new();
        for il in 0..N_LAYER {
            for (part, n_out) in parts {
                tensors.push((format!("blk.{il}.{part}.weight.lora_a"), vec![N_EMBD, RANK]));
                tensors.push((format!("blk.{il}.{part}.weight.lora_b"), vec![RANK, n_out]));
            }
        }
        let weights = fill(&mut file, tensors);
        std::fs::write(&path, file.bytes()).expect("a temporary folder can be written");
        Adapter { path, rank: RANK, weights }
    }

    /// Merges an adapter into the weights: adds `scale` times B A. The file is unchanged.
    #[allow(dead_code)]
    pub fn merge(&mut self, adapter: &Adapter, scale: f32) {
        for (name, a) in adapter.weights.iter().filter_map(|(name, a)| Some((name.strip_suffix(".lora_a")?, a))) {
            let b = &adapter.weights[&format!("{name}.lora_b")];
            let rows = self.weights.get_mut(name).expect("it is for this model").chunks_exact_mut(N_EMBD);
            for (row, b) in rows.zip(b.chunks_exact(adapter.rank)) {
                for (b, a) in b.iter().zip(a.chunks_exact(N_EMBD)) {
                    row.iter_mut().zip(a).for_each(|(w, a)| *w += scale * b * a);
                }
            }
        }
    }

    /// W_Q h + b, normalised, rotated to `pos`, scaled: the query of one head, in float64.
    pub fn query(&self, layer: usize, head: usize, hidden: &[f32], pos: i32) -> Vec<f64> {
        let spec = &self.spec;
        let weight = |name: &str| self.weights.get(&format!("blk.{layer}.{name}"));
        let which = if spec.fused { "attn_qkv" } else { "attn_q" };
        let (w, bias) = (weight(&format!("{which}.weight")).unwrap(), weight(&format!("{which}.bias")));
        let mut q: Vec<f64> = (head * spec.head..(head + 1) * spec.head)
            .map(|row| {
                let product: f64 =
                    w[row * N_EMBD..][..N_EMBD].iter().zip(hidden).map(|(w, h)| f64::from(*w) * f64::from(*h)).sum();
                product + bias.map_or(0.0, |b| f64::from(b[row]))
            })
            .collect();
        if let Some(norm) = weight("attn_q_norm.weight") {
            let square = q.iter().map(|x| x * x).sum::<f64>() / q.len() as f64;
            for (x, w) in q.iter_mut().zip(norm) {
                *x *= f64::from(*w) / (square + f64::from(EPS)).sqrt();
            }
        }
        let d = spec.head;
        for i in 0..d / 2 {
            let (a, b) = match spec.rope {
                Rope::Normal => (2 * i, 2 * i + 1),
                Rope::Neox => (i, i + d / 2),
                Rope::None => break,
            };
            let angle = f64::from(pos) * ROPE_BASE.powf(-2.0 * i as f64 / d as f64);
            let (x, y) = (q[a], q[b]);
            q[a] = x * angle.cos() - y * angle.sin();
            q[b] = x * angle.sin() + y * angle.cos();
        }
        if spec.scaled {
            for x in &mut q {
                *x /= (d as f64).sqrt();
            }
        }
        q
    }
}

/// Names and dimensions of the tensors that llama.cpp expects, innermost dimension first.
fn tensors(spec: &Spec) -> Vec<(String, Vec<usize>)> {
    let (q, kv) = (spec.n_head * spec.head, spec.n_head_kv * spec.head);
    let mut out =
        vec![("token_embd.weight".to_owned(), vec![N_EMBD, N_VOCAB]), ("output_norm.weight".to_owned(), vec![N_EMBD])];
    let starcoder = spec.arch == "starcoder";
    if starcoder {
        out.push(("position_embd.weight".into(), vec![N_EMBD, N_CTX]));
        out.push(("output_norm.bias".into(), vec![N_EMBD]));
    }
    for il in 0..N_LAYER {
        let mut add = |name: &str, dims: &[usize]| out.push((format!("blk.{il}.{name}"), dims.to_vec()));
        add("attn_norm.weight", &[N_EMBD]);
        add("ffn_norm.weight", &[N_EMBD]);
        if spec.fused {
            add("attn_qkv.weight", &[N_EMBD, q + 2 * kv]);
        } else {
            add("attn_q.weight", &[N_EMBD, q]);
            add("attn_k.weight", &[N_EMBD, kv]);
            add("attn_v.weight", &[N_EMBD, kv]);
        }
        if spec.qkv_bias && spec.fused {
            add("attn_qkv.bias", &[q + 2 * kv]);
        } else if spec.qkv_bias {
            add("attn_q.bias", &[q]);
            add("attn_k.bias", &[kv]);
            add("attn_v.bias", &[kv]);
        }
        if spec.qk_norm {
            add("attn_q_norm.weight", &[spec.head]);
            add("attn_k_norm.weight", &[spec.head]);
        }
        if spec.softcap {
            add("post_attention_norm.weight", &[N_EMBD]);
            add("post_ffw_norm.weight", &[N_EMBD]);
        }
        add("attn_output.weight", &[q, N_EMBD]);
        if starcoder {
            add("attn_norm.bias", &[N_EMBD]);
            add("ffn_norm.bias", &[N_EMBD]);
            add("attn_output.bias", &[N_EMBD]);
            add("ffn_up.bias", &[N_FF]);
            add("ffn_down.bias", &[N_EMBD]);
        }
        // phi3 stores gate and up in one tensor
        let gated = !starcoder && spec.arch != "phi3";
        if gated {
            add("ffn_gate.weight", &[N_EMBD, N_FF]);
        }
        add("ffn_up.weight", &[N_EMBD, if spec.arch == "phi3" { 2 * N_FF } else { N_FF }]);
        add("ffn_down.weight", &[N_FF, N_EMBD]);
    }
    out
}

/// A GGUF v3 file under construction: metadata, tensor infos, aligned data.
#[derive(Default)]
pub struct Gguf {
    n_meta: u64,
    meta: Vec<u8>,
    n_tensors: u64,
    infos: Vec<u8>,
    data: Vec<u8>,
}

impl Gguf {
    const ALIGNMENT: usize = 32;
    const TYPE_U32: u32 = 4;
    const TYPE_I32: u32 = 5;
    const TYPE_F32: u32 = 6;
    const TYPE_STRING: u32 = 8;
    const TYPE_ARRAY: u32 = 9;

    fn string(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, type_: u32) {
        self.n_meta += 1;
        Self::string(&mut self.meta, key);
        self.meta.extend(type_.to_le_bytes());
    }

    pub fn text(&mut self, key: &str, value: &str) {
        self.key(key, Self::TYPE_STRING);
        Self::string(&mut self.meta, value);
    }

    pub fn number(&mut self, key: &str, value: u32) {
        self.key(key, Self::TYPE_U32);
        self.meta.extend(value.to_le_bytes());
    }

    fn array(&mut self, key: &str, type_: u32, n: usize) {
        self.key(key, Self::TYPE_ARRAY);
        self.meta.extend(type_.to_le_bytes());
        self.meta.extend((n as u64).to_le_bytes());
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        self.array(key, Self::TYPE_STRING, values.len());
        values.iter().for_each(|value| Self::string(&mut self.meta, value));
    }

    fn numbers(&mut self, key: &str, values: &[u32]) {
        self.array(key, Self::TYPE_U32, values.len());
        values.iter().for_each(|value| self.meta.extend(value.to_le_bytes()));
    }

    fn integers(&mut self, key: &str, values: &[i32]) {
        self.array(key, Self::TYPE_I32, values.len());
        values.iter().for_each(|value| self.meta.extend(value.to_le_bytes()));
    }

    fn floats(&mut self, key: &str, values: &[f32]) {
        self.array(key, Self::TYPE_F32, values.len());
        values.iter().for_each(|value| self.meta.extend(value.to_le_bytes()));
    }

    pub fn float(&mut self, key: &str, value: f32) {
        self.key(key, Self::TYPE_F32);
        self.meta.extend(value.to_le_bytes());
    }

    fn tensor(&mut self, name: &str, dims: &[usize], data: &[f32]) {
        self.n_tensors += 1;
        Self::string(&mut self.infos, name);
        self.infos.extend((dims.len() as u32).to_le_bytes());
        for dim in dims {
            self.infos.extend((*dim as u64).to_le_bytes());
        }
        self.infos.extend(0u32.to_le_bytes()); // f32
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(data.iter().flat_map(|x| x.to_le_bytes()));
        self.data.resize(self.data.len().next_multiple_of(Self::ALIGNMENT), 0);
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(self.n_tensors.to_le_bytes());
        out.extend(self.n_meta.to_le_bytes());
        out.extend(&self.meta);
        out.extend(&self.infos);
        out.resize(out.len().next_multiple_of(Self::ALIGNMENT), 0);
        out.extend(&self.data);
        out
    }
}
