//! The probe pass: sampled hidden states become queries. See the module above.

use std::sync::atomic::{AtomicBool, Ordering};

use half::f16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::graph::Attention;
use super::moments::Moments;
use super::node::{MAX_PATH, Node, Path};
use super::{Capture, CaptureError, Inner, Mode, Queries};
use crate::cache::{self, Parked};
use crate::llama::{Batch, Context, LlamaError, Pos, SeqId};
use crate::sys;

pub(super) struct Probe {
    seed: u64,
    /// What the samples are drawn from, by layer.
    moments: Vec<Moments>,
    /// Tokens of earlier ubatches.
    pub(super) done: usize,
    /// Tokens of the ubatch in work.
    pub(super) n_tokens: usize,
    /// `[layer][sample][n_q]`
    pub(super) queries: Vec<Vec<f16>>,
    pub(super) scratch: Vec<f32>,
    pub(super) path: PathBackend,
    /// Set when the last query has been read, where the graph may end there.
    pub(super) end_graph: Option<*const AtomicBool>,
}

/// A CPU back end for the nodes that lead from a hidden state to its query.
pub(super) struct PathBackend(sys::ggml_backend_t);

impl PathBackend {
    fn new(n_threads: usize) -> Result<Self, CaptureError> {
        // SAFETY: checked below; freed in drop.
        unsafe {
            let backend = sys::gvote_shim_backend_init(std::ptr::null_mut());
            if backend.is_null() {
                return Err(CaptureError::Memory);
            }
            sys::ggml_backend_cpu_set_n_threads(backend, n_threads as i32);
            Ok(Self(backend))
        }
    }

    /// Computes `nodes`, which are allocated and in order, with all they need computed before.
    fn compute(&self, nodes: &[*mut sys::ggml_tensor]) -> Result<(), CaptureError> {
        // SAFETY: the graph context describes existing tensors only and is freed here.
        unsafe {
            let ctx = sys::ggml_init(sys::ggml_init_params {
                mem_size: sys::ggml_graph_overhead_custom(MAX_PATH, false) + sys::ggml_tensor_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            });
            if ctx.is_null() {
                return Err(CaptureError::Memory);
            }
            let graph = sys::ggml_new_graph_custom(ctx, MAX_PATH, false);
            for node in nodes {
                sys::ggml_graph_add_node(graph, *node);
            }
            let status = sys::gvote_shim_graph_compute(self.0, graph);
            sys::ggml_free(ctx);
            if status == sys::GGML_STATUS_SUCCESS { Ok(()) } else { Err(CaptureError::Memory) }
        }
    }
}

impl Drop for PathBackend {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once.
        unsafe { sys::ggml_backend_free(self.0) };
    }
}

impl Capture {
    /// The probe pass: `n` synthetic queries of every layer, at the positions that follow `pos`, leaving the cache as it
    /// was. The samples depend on `seed`, layer and index only, not on how the batch is split.
    ///
    /// # Errors
    /// [`CaptureError::NoCells`], [`CaptureError::Empty`]; whatever decoding fails with.
    pub fn probe(
        &mut self,
        ctx: &mut Context,
        seq: SeqId,
        pos: Pos,
        n: usize,
        seed: u64,
    ) -> Result<Vec<Queries>, CaptureError> {
        let free = cache::cells_free(ctx, seq);
        if free < n {
            return Err(CaptureError::NoCells { needed: n, free });
        }
        let Some(record) = self.inner.records.get(&seq).filter(|record| record.has_moments()) else {
            return Err(CaptureError::Empty);
        };

        self.inner.mode = Mode::Probe(Probe {
            seed,
            moments: record.layers.iter().map(|layer| layer.moments.clone()).collect(),
            done: 0,
            n_tokens: 0,
            queries: self.inner.layers.iter().map(|l| vec![f16::ZERO; n * l.n_q]).collect(),
            scratch: Vec::new(),
            path: PathBackend::new(ctx.n_threads_batch())?,
            end_graph: ctx.end_graph(),
        });
        let result = self.probe_in_chunks(ctx, seq, pos, n);
        let mode = std::mem::replace(&mut self.inner.mode, Mode::Prompt);
        result?;
        let Mode::Probe(probe) = mode else {
            return Err(CaptureError::Empty);
        };
        Ok(probe
            .queries
            .into_iter()
            .map(|data| Queries { data, pos: (1..=n as Pos).map(|i| pos + i).collect() })
            .collect())
    }

    /// Decodes dummy tokens where the sequence has no others: what their graphs compute behind q is not wanted.
    fn probe_in_chunks(&mut self, ctx: &mut Context, seq: SeqId, pos: Pos, n: usize) -> Result<(), CaptureError> {
        // one ubatch a call: ending a graph ends the whole batch
        let chunk = ctx.n_batch().min(ctx.n_ubatch());
        let mut parked = Parked::new(ctx, seq, n)?;
        parked.hide_from(0);
        self.during(&mut parked, |ctx| {
            let mut batch = Batch::new(chunk.min(n));
            for start in (0..n).step_by(chunk) {
                batch.clear();
                for i in start..n.min(start + chunk) {
                    // the token does not matter: its hidden state is overwritten in every layer
                    batch.add(0, pos + 1 + i as Pos, seq, false)?;
                }
                match ctx.decode(&batch) {
                    Ok(()) | Err(LlamaError::Ended) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })
    }

    /// The hidden state that the probe of `seq` uses as sample `index` in the i-th layer of the cache. `[n_embd]`
    pub fn sample(&self, seq: SeqId, layer: usize, index: usize, seed: u64) -> Vec<f32> {
        let mut out = vec![0.0; self.inner.n_embd];
        if let Some(record) = self.inner.records.get(&seq) {
            sample(&record.layers[layer].moments, layer, index, seed, &mut out);
        }
        out
    }
}

impl Inner {
    /// Turns the samples of a layer into queries before llama.cpp computes anything.
    pub(super) fn take_path(&mut self, attention: &Attention) -> Result<(), CaptureError> {
        let il = self.layers[attention.layer].il;
        let mut path = Path::new(il);
        path.collect(attention.q)?;
        let hidden = path.hidden.ok_or(CaptureError::NoHidden(il))?;
        self.on_hidden(&hidden, attention.layer)?;
        let Mode::Probe(probe) = &self.mode else { return Ok(()) };
        probe.path.compute(&path.nodes)?;
        self.on_queries(attention)?;
        if let Mode::Probe(probe) = &self.mode
            && attention.layer + 1 == self.layers.len()
            && let Some(end_graph) = probe.end_graph
        {
            // SAFETY: the flag belongs to the context that is decoding.
            unsafe { (*end_graph).store(true, Ordering::Relaxed) };
        }
        Ok(())
    }

    pub(super) fn inject(&mut self, node: &Node, layer: usize, n_tokens: usize) {
        let Mode::Probe(probe) = &mut self.mode else { return };
        if layer == 0 {
            probe.done += probe.n_tokens;
            probe.n_tokens = n_tokens;
        }
        let (first, seed) = (probe.done, probe.seed);
        let mut scratch = std::mem::take(&mut probe.scratch);
        scratch.resize(n_tokens * self.n_embd, 0.0);
        for (i, out) in scratch.chunks_exact_mut(self.n_embd).enumerate() {
            sample(&probe.moments[layer], layer, first + i, seed, out);
        }
        // SAFETY: the tensor holds n_tokens * n_embd contiguous floats, as on_hidden checked.
        unsafe {
            sys::ggml_backend_tensor_set(
                std::ptr::from_ref(node.0).cast_mut(),
                scratch.as_ptr().cast(),
                0,
                scratch.len() * size_of::<f32>(),
            );
        }
        if let Mode::Probe(probe) = &mut self.mode {
            probe.scratch = scratch;
        }
    }
}

fn sample(moments: &Moments, layer: usize, index: usize, seed: u64, out: &mut [f32]) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(((layer as u64) << 32) | index as u64);
    for (c, x) in out.iter_mut().enumerate() {
        let z: f64 = StandardNormal.sample(&mut rng);
        let sd = (moments.m2[c] / moments.count).sqrt();
        *x = (moments.mean[c] + sd * z) as f32;
    }
}
