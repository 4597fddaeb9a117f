//! The probe pass: sampled hidden states become queries. See the module above.

use std::thread;

use half::f16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::graph::{Attention, nodes};
use super::moments::Moments;
use super::node::{Node, Path};
use super::{Capture, CaptureError, Inner, Mode, Queries};
use crate::backend::recompute;
use crate::cache::{self, Parked};
use crate::llama::{Batch, Context, Pos, SeqId};
use crate::sys;

/// How a ubatch becomes queries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Only the paths from hidden states to queries are computed.
    Paths,
    /// All of the graph is, and hidden states are overwritten on the way: where a path leads over several back ends, as with
    /// weights in host memory that a GPU computes with.
    Whole,
}

#[cfg(test)]
thread_local! {
    /// Tests set it to go the way that a graph over several back ends goes.
    pub(crate) static PRETEND_SCATTERED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

pub(super) struct Probe {
    seed: u64,
    /// What the samples are drawn from, by layer.
    moments: Vec<Moments>,
    /// Tokens of earlier ubatches.
    pub(super) done: usize,
    /// Hidden states of the ubatch in work. `[layer][n_tokens][n_embd]`
    samples: Vec<Vec<f32>>,
    /// Layers whose queries of the ubatch in work are there.
    pub(super) taken: Vec<bool>,
    /// How the ubatch in work is read; None before its first node.
    pub(super) way: Option<Way>,
    /// `[layer][sample][n_q]`
    pub(super) queries: Vec<Vec<f16>>,
}

impl Probe {
    /// Draws the samples of a ubatch, a share of the layers in each thread.
    fn draw(&mut self, first: usize, n: usize, n_threads: usize) {
        (self.done, self.way, self.taken) = (first, None, vec![false; self.moments.len()]);
        let Self { moments, samples, seed, .. } = self;
        let share = moments.len().div_ceil(n_threads);
        thread::scope(|scope| {
            for (part, (moments, samples)) in moments.chunks(share).zip(samples.chunks_mut(share)).enumerate() {
                let seed = *seed;
                scope.spawn(move || {
                    for (layer, (moments, out)) in (part * share..).zip(moments.iter().zip(samples)) {
                        let n_embd = moments.mean.len();
                        out.resize(n * n_embd, 0.0);
                        for (i, out) in out.chunks_exact_mut(n_embd).enumerate() {
                            sample(moments, layer, first + i, seed, out);
                        }
                    }
                });
            }
        });
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
            samples: vec![Vec::new(); self.inner.layers.len()],
            taken: Vec::new(),
            way: None,
            queries: self.inner.layers.iter().map(|l| vec![f16::ZERO; n * l.n_q]).collect(),
        });
        let result = self.probe_in_chunks(ctx, seq, pos, n);
        let mode = std::mem::replace(&mut self.inner.mode, Mode::Listen);
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
        let chunk = ctx.n_batch().min(ctx.n_ubatch());
        let mut parked = Parked::new(ctx, seq, n)?;
        let mut batch = Batch::new(chunk.min(n));
        for start in (0..n).step_by(chunk) {
            batch.clear();
            for i in start..n.min(start + chunk) {
                // the token does not matter: its hidden state is overwritten in every layer
                batch.add(0, pos + 1 + i as Pos, seq, false)?;
            }
            if let Mode::Probe(probe) = &mut self.inner.mode {
                probe.draw(start, batch.len(), parked.n_threads_batch());
            }
            self.during(&mut parked, |ctx| ctx.decode(&batch))?;
            if let Mode::Probe(probe) = &self.inner.mode
                && let Some(layer) = probe.taken.iter().position(|taken| !taken)
            {
                return Err(CaptureError::NoHidden(self.inner.layers[layer].il));
            }
        }
        Ok(())
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
    /// Reads a node of the probe's ubatch; false ends the part of the graph that it belongs to.
    pub(super) fn read_probe(&mut self, node: &Node) -> Result<bool, CaptureError> {
        let Mode::Probe(probe) = &self.mode else { return Ok(true) };
        let way = match probe.way {
            Some(way) => way,
            None => self.choose_way()?,
        };
        if way == Way::Paths {
            self.take_paths(node)?;
            return Ok(false);
        }
        if let Some(layer) = self.hidden_layer(node) {
            self.check_hidden(node)?;
            self.inject(node, layer)?;
        } else if let Some(attention) = self.attention(node) {
            self.on_queries(&attention)?;
            self.mark_taken(attention.layer);
        }
        Ok(true)
    }

    /// Whether a node of the probe's ubatch is to be read.
    pub(super) fn asks_for(&self, way: Option<Way>, node: &Node) -> bool {
        match way {
            // the first node of a part of the graph: what the part needs from elsewhere is there
            None | Some(Way::Paths) => true,
            Some(Way::Whole) => self.hidden_layer(node).is_some() || self.attention(node).is_some(),
        }
    }

    fn choose_way(&mut self) -> Result<Way, CaptureError> {
        let mut way = Way::Paths;
        for attention in nodes(self.ctx).filter_map(|node| self.attention(&node)) {
            if !self.path(&attention)?.is_complete() {
                way = Way::Whole;
            }
        }
        #[cfg(test)]
        if PRETEND_SCATTERED.get() {
            way = Way::Whole;
        }
        if let Mode::Probe(probe) = &mut self.mode {
            probe.way = Some(way);
        }
        Ok(way)
    }

    /// Turns the samples of all layers that lie where `node` does into queries.
    fn take_paths(&mut self, node: &Node) -> Result<(), CaptureError> {
        for attention in nodes(self.ctx).filter_map(|node| self.attention(&node)).collect::<Vec<_>>() {
            if attention.q.place() == node.place() && !self.mark_taken(attention.layer) {
                self.take_path(&attention)?;
            }
        }
        Ok(())
    }

    /// Notes that the queries of a layer are there, and says whether they were before.
    fn mark_taken(&mut self, layer: usize) -> bool {
        match &mut self.mode {
            Mode::Probe(probe) => std::mem::replace(&mut probe.taken[layer], true),
            _ => true,
        }
    }

    fn path<'a>(&self, attention: &Attention<'a>) -> Result<Path<'a>, CaptureError> {
        // SAFETY: called from inside the graph.
        let graph = unsafe { sys::gvote_shim_graph(self.ctx) };
        let mut path = Path::new(self.layers[attention.layer].il, graph);
        path.collect(attention.q)?;
        Ok(path)
    }

    fn take_path(&mut self, attention: &Attention) -> Result<(), CaptureError> {
        let path = self.path(attention)?;
        let hidden = path.hidden.ok_or(CaptureError::NoHidden(self.layers[attention.layer].il))?;
        self.check_hidden(&hidden)?;
        self.inject(&hidden, attention.layer)?;
        // SAFETY: llama.cpp has allocated its graph and set its inputs, and lets nobody else compute before we return.
        unsafe { recompute(self.devices.at(attention.q.buffer())?, &path.nodes)? };
        self.on_queries(attention)
    }

    fn inject(&mut self, hidden: &Node, layer: usize) -> Result<(), CaptureError> {
        let Mode::Probe(probe) = &mut self.mode else { return Ok(()) };
        let samples = std::mem::take(&mut probe.samples[layer]);
        if samples.len() != hidden.0.ne[1] as usize * self.n_embd {
            return Err(hidden.shape_error());
        }
        let tensor = std::ptr::from_ref(hidden.0).cast_mut();
        // SAFETY: the tensor holds as many contiguous floats.
        unsafe { sys::ggml_backend_tensor_set(tensor, samples.as_ptr().cast(), 0, size_of_val(&samples[..])) };
        Ok(())
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
