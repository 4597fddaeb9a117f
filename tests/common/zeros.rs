//! Models with all-zero weights, of any shape and with a tokenizer: all tokens are equally likely, and the first one is chosen.
#![allow(dead_code)] // each test program uses only a part of it

use std::io::Write;

use tempfile::NamedTempFile;

#[path = "gguf.rs"]
pub mod file;

use file::Value::{self, *};

/// Properties in which the models differ.
pub struct Zeros<'a> {
    /// `llama` or `gemma3`.
    pub architecture: &'a str,
    pub n_layer: u32,
    pub n_head_kv: u32,
    /// Dimension of a head.
    pub head: u32,
    /// Training context in tokens.
    pub n_ctx: u32,
    /// Vocabulary of single letters, so that a text has as many tokens as letters.
    pub tokens: &'a [&'a str],
    /// Additional metadata; see [`file::decoder`].
    pub extra: &'a [(&'static str, Value<'static>)],
}

impl Default for Zeros<'_> {
    fn default() -> Self {
        let tokens = &["a", "b", "c"];
        Self { architecture: "llama", n_layer: 2, n_head_kv: 2, head: 16, n_ctx: 512, tokens, extra: &[] }
    }
}

const N_EMBD: u64 = 64;
const N_HEAD: u64 = 4;

impl Zeros<'_> {
    /// Writes the model to a temporary file that exists as long as the value.
    pub fn write(&self) -> NamedTempFile {
        let own = [
            (".block_count", U32(self.n_layer)),
            (".embedding_length", U32(N_EMBD as u32)),
            (".feed_forward_length", U32(N_EMBD as u32)),
            (".context_length", U32(self.n_ctx)),
            (".attention.head_count", U32(N_HEAD as u32)),
            (".attention.head_count_kv", U32(self.n_head_kv)),
            (".attention.key_length", U32(self.head)),
            (".attention.value_length", U32(self.head)),
            (".attention.layer_norm_rms_epsilon", F32(1e-5)),
            ("tokenizer.ggml.model", Text("gpt2")),
            ("tokenizer.ggml.pre", Text("gpt-2")),
            ("tokenizer.ggml.merges", Texts(&[])),
            ("tokenizer.ggml.tokens", Texts(self.tokens)),
        ];
        let entries = file::decoder(self.architecture, &[&own[..], self.extra].concat());
        let shapes = self.shapes();
        let tensors: Vec<_> = shapes
            .iter()
            .map(|(name, shape)| file::tensor(name, shape, 0, 4 * shape.iter().product::<u64>()))
            .collect();
        let (head, size) = file::head(&file::borrowed(&entries), &tensors);
        let mut made = NamedTempFile::new().unwrap();
        made.write_all(&head).unwrap();
        made.as_file().set_len(size).unwrap();
        made
    }

    fn shapes(&self) -> Vec<(String, Vec<u64>)> {
        let (n_vocab, head) = (self.tokens.len() as u64, u64::from(self.head));
        let (q, kv) = (N_HEAD * head, u64::from(self.n_head_kv) * head);
        let mut of_layer = vec![
            ("attn_norm", vec![N_EMBD]),
            ("attn_q", vec![N_EMBD, q]),
            ("attn_k", vec![N_EMBD, kv]),
            ("attn_v", vec![N_EMBD, kv]),
            ("attn_output", vec![q, N_EMBD]),
            ("ffn_norm", vec![N_EMBD]),
            ("ffn_gate", vec![N_EMBD, N_EMBD]),
            ("ffn_up", vec![N_EMBD, N_EMBD]),
            ("ffn_down", vec![N_EMBD, N_EMBD]),
        ];
        if self.architecture == "gemma3" {
            of_layer.extend([("attn_q_norm", vec![head]), ("attn_k_norm", vec![head])]);
            of_layer.extend([("post_attention_norm", vec![N_EMBD]), ("post_ffw_norm", vec![N_EMBD])]);
        }
        let mut shapes =
            vec![("token_embd.weight".into(), vec![N_EMBD, n_vocab]), ("output_norm.weight".into(), vec![N_EMBD])];
        for il in 0..self.n_layer {
            shapes.extend(of_layer.iter().map(|(name, shape)| (format!("blk.{il}.{name}.weight"), shape.clone())));
        }
        shapes
    }
}
