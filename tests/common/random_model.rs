//! Models of any shape with random weights, for measuring speed, which does not depend on the values. Their text is meaningless.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use clap::ValueEnum;
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "gguf.rs"]
mod gguf;

use gguf::Value::{F32, Text, U32};

/// Approximate number of bytes generated and written at once.
const CHUNK: usize = 1 << 20;

/// Standard deviation of W x for an x of unit mean square.
const GAIN: f64 = 1.0;
/// Standard deviation of queries and of keys. Their product is the deviation of attention logits: of n keys about n / e^4 have weight,
/// neither all nor one.
const ATTENTION_GAIN: f64 = std::f64::consts::SQRT_2;
/// Standard deviation of the logits: some tens of tokens are likely, as after real text.
const OUTPUT_GAIN: f64 = 3.0;

/// Storage format of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Weights {
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q8_0")]
    Q8_0,
}

impl Weights {
    /// Values per block: a block has a scale in f16, and an integer for each value.
    const BLOCK: usize = 32;

    /// Returns the bytes of a block.
    const fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 2 + Self::BLOCK / 2,
            Self::Q8_0 => 2 + Self::BLOCK,
        }
    }

    /// Returns the number of ggml's type, and of the type of a file that consists mostly of it.
    const fn numbers(self) -> (u32, u32) {
        match self {
            Self::Q4_0 => (2, 2),
            Self::Q8_0 => (8, 7),
        }
    }

    /// Returns the root mean square of the integers, which are equally likely: -8 to 7, or -128 to 127.
    fn spread(self) -> f64 {
        let half: i32 = match self {
            Self::Q4_0 => 8,
            Self::Q8_0 => 128,
        };
        let squares: i32 = (-half..half).map(|x| x * x).sum();
        (f64::from(squares) / f64::from(2 * half)).sqrt()
    }
}

/// Shape of a decoder with llama's architecture.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub weights: Weights,
    pub n_layer: u32,
    pub n_embd: u32,
    pub n_head: u32,
    pub n_head_kv: u32,
    pub n_ff: u32,
    pub n_vocab: u32,
    /// Training context that the file declares, in tokens.
    pub n_ctx: u32,
}

struct Tensor {
    name: String,
    /// Innermost dimension first.
    shape: Vec<u64>,
    /// None: a norm, all ones.
    gain: Option<f64>,
}

impl Tensor {
    fn values(&self) -> usize {
        self.shape.iter().product::<u64>() as usize
    }

    fn bytes(&self, weights: Weights) -> usize {
        match self.gain {
            Some(_) => self.values() / Weights::BLOCK * weights.bytes(),
            None => self.values() * size_of::<f32>(),
        }
    }
}

impl Shape {
    /// Returns what is wrong with the shape, if anything.
    fn fault(&self) -> Option<&'static str> {
        let sizes = [self.n_layer, self.n_embd, self.n_head, self.n_head_kv, self.n_ff, self.n_vocab, self.n_ctx];
        let block = Weights::BLOCK as u32;
        if sizes.contains(&0) {
            Some("no size may be 0")
        } else if !self.n_embd.is_multiple_of(self.n_head) || !self.n_head.is_multiple_of(self.n_head_kv) {
            Some("--n-embd must be a multiple of --n-head, and that one of --n-head-kv")
        } else if !(self.n_embd / self.n_head).is_multiple_of(2) {
            Some("--n-embd / --n-head, the size of a head, must be even")
        } else if !self.n_embd.is_multiple_of(block) || !self.n_ff.is_multiple_of(block) {
            Some("--n-embd and --n-ff must be multiples of 32")
        } else {
            None
        }
    }

    fn tensors(&self) -> Vec<Tensor> {
        let [embd, ff, vocab] = [self.n_embd, self.n_ff, self.n_vocab].map(u64::from);
        let kv = embd / u64::from(self.n_head) * u64::from(self.n_head_kv);
        // W x has the deviation `gain` if each weight has it divided by the square root of the number of inputs
        let matrix = |name: String, n_in: u64, n_out: u64, gain: f64| Tensor {
            name,
            shape: vec![n_in, n_out],
            gain: Some(gain / (n_in as f64).sqrt()),
        };
        let norm = |name: String| Tensor { name, shape: vec![embd], gain: None };
        let mut out = vec![
            // rows are used as they are
            Tensor { name: "token_embd.weight".into(), shape: vec![embd, vocab], gain: Some(GAIN) },
            norm("output_norm.weight".into()),
            matrix("output.weight".into(), embd, vocab, OUTPUT_GAIN),
        ];
        for il in 0..self.n_layer {
            let name = |part: &str| format!("blk.{il}.{part}.weight");
            out.extend([
                norm(name("attn_norm")),
                matrix(name("attn_q"), embd, embd, ATTENTION_GAIN),
                matrix(name("attn_k"), embd, kv, ATTENTION_GAIN),
                matrix(name("attn_v"), embd, kv, GAIN),
                matrix(name("attn_output"), embd, embd, GAIN),
                norm(name("ffn_norm")),
                matrix(name("ffn_gate"), embd, ff, GAIN),
                matrix(name("ffn_up"), embd, ff, GAIN),
                matrix(name("ffn_down"), ff, embd, GAIN),
            ]);
        }
        out
    }

    /// Writes the model. Returns its size in bytes. The same seed always gives the same file.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for an invalid shape, with the reason; errors of writing the file.
    pub fn write(&self, path: &Path, seed: u64) -> io::Result<u64> {
        if let Some(fault) = self.fault() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, fault));
        }
        let (type_, file_type) = self.weights.numbers();
        let entries = [
            ("general.architecture", Text("llama")),
            ("general.name", Text("random weights")),
            ("general.file_type", U32(file_type)),
            ("tokenizer.ggml.model", Text("no_vocab")),
            ("llama.vocab_size", U32(self.n_vocab)),
            ("llama.context_length", U32(self.n_ctx)),
            ("llama.embedding_length", U32(self.n_embd)),
            ("llama.block_count", U32(self.n_layer)),
            ("llama.feed_forward_length", U32(self.n_ff)),
            ("llama.attention.head_count", U32(self.n_head)),
            ("llama.attention.head_count_kv", U32(self.n_head_kv)),
            ("llama.attention.layer_norm_rms_epsilon", F32(1e-5)),
            ("llama.rope.dimension_count", U32(self.n_embd / self.n_head)),
            ("llama.rope.freq_base", F32(500_000.0)),
        ];
        let tensors = self.tensors();
        let infos: Vec<_> = tensors
            .iter()
            .map(|t| {
                let kind = if t.gain.is_some() { type_ } else { 0 };
                gguf::tensor(&t.name, &t.shape, kind, t.bytes(self.weights) as u64)
            })
            .collect();
        let (head, size) = gguf::head(&entries, &infos);
        let mut file = BufWriter::with_capacity(CHUNK, File::create(path)?);
        file.write_all(&head)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for (i, tensor) in tensors.iter().enumerate() {
            match tensor.gain {
                Some(gain) => write_random(&mut file, tensor.bytes(self.weights), self.weights, gain, &mut rng)?,
                None => file.write_all(&1f32.to_le_bytes().repeat(tensor.values()))?,
            }
            if i + 1 < tensors.len() {
                let bytes = tensor.bytes(self.weights);
                file.write_all(&vec![0; bytes.next_multiple_of(32) - bytes])?;
            }
        }
        file.flush()?;
        Ok(size)
    }
}

/// Writes blocks of this many bytes, whose values have a mean of 0 and the deviation `gain`.
fn write_random(
    file: &mut impl Write,
    mut bytes: usize,
    weights: Weights,
    gain: f64,
    rng: &mut ChaCha8Rng,
) -> io::Result<()> {
    // the integers have a mean slightly below 0, so half of the scales are negative
    let scale = f16::from_f64(gain / weights.spread());
    let scales = [scale, -scale].map(f16::to_le_bytes);
    let block = weights.bytes();
    let mut chunk = vec![0; CHUNK / block * block];
    while bytes > 0 {
        let n = bytes.min(chunk.len());
        rng.fill_bytes(&mut chunk[..n]);
        for block in chunk[..n].chunks_exact_mut(block) {
            let sign = usize::from(block[0] & 1);
            block[..2].copy_from_slice(&scales[sign]);
        }
        file.write_all(&chunk[..n])?;
        bytes -= n;
    }
    Ok(())
}
