//! The probe pass: sampled hidden states become queries. See the module above.

use std::sync::Arc;
use std::thread;

use half::f16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::graph::{Attention, by_token, nodes};
use super::moments::Moments;
use super::node::{Node, Path};
use super::record::LayerRecord;
use super::{Capture, CaptureError, Inner, Mode, Queries, zeros};
use crate::backend::{Builder, read};
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

/// Tensors of the probe's graph for each layer, beside the nodes of its path; and for all of them.
const LAYER_NODES: usize = 12;
const OTHER_NODES: usize = 8;

/// What stands for the hidden states of future tokens, in one ubatch: how far each channel lies from its mean, in deviations.
/// All layers take the same, each with a mean and deviations of its own: a layer's queries only meet its own keys. Each sample
/// depends on nothing but the seed and its number: however many are drawn at once.
struct Samples {
    seed: u64,
    layers: Vec<Arc<LayerRecord>>,
    /// The number of the first.
    first: usize,
    n: usize,
    /// `[n][n_embd]`
    z: Vec<f32>,
}

impl Samples {
    fn none(seed: u64, layers: Vec<Arc<LayerRecord>>) -> Self {
        Self { seed, layers, first: 0, n: 0, z: Vec::new() }
    }

    /// `n` others, from the `first` on.
    fn draw(&mut self, first: usize, n: usize, n_threads: usize) {
        let n_embd = self.layers.first().map_or(0, |layer| layer.moments.mean.len());
        (self.first, self.n) = (first, n);
        self.z.resize(n * n_embd, 0.0);
        let share = n.div_ceil(n_threads).max(1);
        let seed = self.seed;
        thread::scope(|scope| {
            for (first, rows) in (first..).step_by(share).zip(self.z.chunks_mut(share * n_embd.max(1))) {
                let mut draw = move || {
                    for (number, row) in (first..).zip(rows.chunks_exact_mut(n_embd)) {
                        deviations(seed, number, row);
                    }
                };
                if share < n { drop(scope.spawn(draw)) } else { draw() }
            }
        });
    }
}

pub(super) struct Probe {
    /// Those of the ubatch in work.
    samples: Samples,
    /// Layers whose queries of the ubatch in work are there.
    pub(super) taken: Vec<bool>,
    /// How the ubatch in work is read; None before its first node.
    pub(super) way: Option<Way>,
    /// `[layer][sample][n_q]`
    pub(super) queries: Vec<Vec<f16>>,
}

impl Probe {
    /// The place that the sample of a token of the ubatch in work has among all.
    pub(super) fn number(&self, row: usize) -> usize {
        self.samples.first + row
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
            samples: Samples::none(seed, record.layers.clone()),
            taken: Vec::new(),
            way: None,
            queries: self.inner.layers.iter().map(|l| zeros(n * l.n_q)).collect(),
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
                probe.samples.draw(start, batch.len(), parked.n_threads_batch());
                (probe.way, probe.taken) = (None, vec![false; self.inner.layers.len()]);
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
            deviations(seed, index, &mut out);
            Gaussian::of(&record.layers[layer].moments).place(&mut out);
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
        let found: Vec<_> = nodes(self.ctx).filter_map(|node| self.attention(&node)).collect();
        let here = found.into_iter().filter(|attention| attention.q.place() == node.place());
        let here: Vec<_> = here.filter(|attention| !self.mark_taken(attention.layer)).collect();
        if here.is_empty() { Ok(()) } else { self.turn_into_queries(&here) }
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

    /// Turns the samples of some layers, which lie side by side, into queries.
    fn turn_into_queries(&mut self, here: &[Attention]) -> Result<(), CaptureError> {
        let Mode::Probe(probe) = &self.mode else { return Ok(()) };
        let Samples { layers, n, z, .. } = &probe.samples;
        let (n, n_embd) = (*n, self.n_embd);
        let paths = here.iter().map(|attention| self.path(attention)).collect::<Result<Vec<_>, _>>()?;
        let n_nodes = paths.iter().map(|path| path.nodes.len() + LAYER_NODES).sum::<usize>() + OTHER_NODES;
        let mut b = Builder::new(n_nodes)?;
        let z = b.input([n_embd, n, 1], &z[..]);
        let gaussians = here.iter().map(|attention| Gaussian::of(&layers[attention.layer].moments));
        let gaussians: Vec<_> = gaussians.flat_map(|Gaussian { mean, deviation }| [deviation, mean].concat()).collect();
        let gaussians = b.input([n_embd, 2, here.len()], gaussians);
        let n_q: Vec<usize> = here.iter().map(|attention| self.layers[attention.layer].n_q).collect();
        let queries = b.memory(sys::GGML_TYPE_F16, n * n_q.iter().sum::<usize>(), 1);
        let mut end = 0;
        for (i, ((attention, path), n_q)) in here.iter().zip(&paths).zip(&n_q).enumerate() {
            self.check_queries(attention)?;
            let hidden = path.hidden.ok_or(CaptureError::NoHidden(self.layers[attention.layer].il))?;
            self.check_hidden(&hidden)?;
            if hidden.0.ne[1] as usize != n {
                return Err(hidden.shape_error());
            }
            // SAFETY: llama.cpp has allocated its graph and set its inputs, and lets nobody else compute before we return. What is on
            // a path reads nothing else of the graph.
            unsafe {
                let [_, nb1, nb2, _] = (*gaussians).nb;
                let [deviation, mean] =
                    [0, nb1].map(|offset| sys::ggml_view_1d(b.ctx, gaussians, n_embd as i64, i * nb2 + offset));
                let hidden = sys::ggml_cpy(b.ctx, z, b.elsewhere(hidden.0));
                let hidden = sys::ggml_mul_inplace(b.ctx, hidden, deviation);
                b.run(sys::ggml_add_inplace(b.ctx, hidden, mean));
                path.nodes.iter().for_each(|&node| b.run_other(node));
                let of_tokens = by_token(&b, attention.q, 0..attention.q.0.ne[1] as usize);
                let own = sys::ggml_view_1d(b.ctx, queries, (n * n_q) as i64, end * size_of::<f16>());
                b.run(sys::ggml_cpy(b.ctx, of_tokens, own));
            }
            end += n * n_q;
        }
        // SAFETY: a node of the graph in work has a buffer.
        let device = unsafe { self.devices.at(here[0].q.buffer())? };
        b.compute(device)?;
        self.scratch.resize(device, end.div_ceil(2))?;
        let mut read_back = &mut self.scratch.halves()[..end];
        read(read_back, queries);
        drop(b);
        let Mode::Probe(probe) = &mut self.mode else { return Ok(()) };
        for (attention, n_q) in here.iter().zip(n_q) {
            let (own, rest) = read_back.split_at_mut(n * n_q);
            probe.queries[attention.layer][probe.samples.first * n_q..][..n * n_q].copy_from_slice(own);
            read_back = rest;
        }
        Ok(())
    }

    fn inject(&mut self, hidden: &Node, layer: usize) -> Result<(), CaptureError> {
        let Mode::Probe(probe) = &self.mode else { return Ok(()) };
        let Samples { layers, z, .. } = &probe.samples;
        let gaussian = Gaussian::of(&layers[layer].moments);
        let mut samples = z.clone();
        samples.chunks_exact_mut(self.n_embd).for_each(|sample| gaussian.place(sample));
        if hidden.0.ne[1] as usize != probe.samples.n {
            return Err(hidden.shape_error());
        }
        let tensor = std::ptr::from_ref(hidden.0).cast_mut();
        // SAFETY: the tensor holds as many contiguous floats.
        unsafe { sys::ggml_backend_tensor_set(tensor, samples.as_ptr().cast(), 0, size_of_val(&samples[..])) };
        Ok(())
    }
}

/// How far the channels of a sample lie from their means, in deviations.
fn deviations(seed: u64, number: usize, out: &mut [f32]) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(number as u64);
    out.iter_mut().for_each(|z| *z = StandardNormal.sample(&mut rng));
}

/// What the hidden states of a layer are drawn from: independent channels. `[n_embd]` each
struct Gaussian {
    mean: Vec<f32>,
    deviation: Vec<f32>,
}

impl Gaussian {
    fn of(moments: &Moments) -> Self {
        let deviation = moments.m2.iter().map(|m2| (m2 / moments.count).sqrt() as f32);
        Self { mean: moments.mean.iter().map(|&mean| mean as f32).collect(), deviation: deviation.collect() }
    }

    /// Turns deviations into a hidden state.
    fn place(&self, sample: &mut [f32]) {
        for ((x, mean), deviation) in sample.iter_mut().zip(&self.mean).zip(&self.deviation) {
            *x = *x * deviation + mean;
        }
    }
}
