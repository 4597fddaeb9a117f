//! The probe pass: sampled hidden states become queries. See the module above.

use std::sync::Arc;
use std::thread;

use half::f16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::graph::{Attention, halves, nodes};
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

/// Layers whose samples become queries in one graph: while a device computes it, the samples of the next are drawn.
const LAYERS_AT_ONCE: usize = 8;
/// Tensors of such a graph for each layer, beside the nodes of its path; and for all of them.
const LAYER_NODES: usize = 8;
const OTHER_NODES: usize = 4;

/// The hidden states that stand for those of future tokens, which one ubatch is filled with. Each depends on nothing but the
/// statistics of its layer, the seed, the layer, and its number: however many are drawn at once.
struct Samples {
    seed: u64,
    layers: Vec<Arc<LayerRecord>>,
    /// The number of the first.
    first: usize,
    n: usize,
    n_threads: usize,
}

impl Samples {
    /// Those of some layers. `[layer][n][n_embd]`
    fn draw(&self, layers: &[usize]) -> Vec<f32> {
        let n_embd = self.layers.first().map_or(0, |layer| layer.moments.mean.len());
        let mut out = vec![0.0; layers.len() * self.n * n_embd];
        let share = (layers.len() * self.n).div_ceil(self.n_threads).max(1);
        thread::scope(|scope| {
            for (part, out) in out.chunks_mut(share * n_embd.max(1)).enumerate() {
                scope.spawn(move || {
                    let mut of_layer: Option<Gaussian> = None;
                    for (row, out) in (part * share..).zip(out.chunks_exact_mut(n_embd)) {
                        let layer = layers[row / self.n];
                        let gaussian = match &mut of_layer {
                            Some(gaussian) if gaussian.layer == layer => gaussian,
                            other => other.insert(Gaussian::new(&self.layers[layer].moments, layer)),
                        };
                        gaussian.sample(self.seed, self.first + row % self.n, out);
                    }
                });
            }
        });
        out
    }
}

pub(super) struct Probe {
    /// Those of the ubatch in work.
    samples: Arc<Samples>,
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

        let n_threads = ctx.n_threads_batch();
        let samples = Samples { seed, layers: record.layers.clone(), first: 0, n: 0, n_threads };
        self.inner.mode = Mode::Probe(Probe {
            samples: Arc::new(samples),
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
                let Samples { seed, n_threads, .. } = *probe.samples;
                let layers = probe.samples.layers.clone();
                probe.samples = Arc::new(Samples { seed, layers, first: start, n: batch.len(), n_threads });
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
            Gaussian::new(&record.layers[layer].moments, layer).sample(seed, index, &mut out);
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
        let Mode::Probe(probe) = &self.mode else { return Ok(()) };
        let samples = &*probe.samples.clone();
        let layers: Vec<_> = here.iter().map(|attention| attention.layer).collect();
        let mut ahead = layers.chunks(LAYERS_AT_ONCE);
        let mut drawn = samples.draw(ahead.next().unwrap_or_default());
        for group in here.chunks(LAYERS_AT_ONCE) {
            let next = ahead.next().unwrap_or_default();
            drawn = thread::scope(|scope| {
                let next = scope.spawn(|| samples.draw(next));
                self.take_group(group, samples.n, &drawn)?;
                Ok::<_, CaptureError>(next.join().expect("drawing does not panic"))
            })?;
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

    /// Turns samples of some layers into queries: `n` of each, `drawn` `[layer][n][n_embd]`.
    fn take_group(&mut self, group: &[Attention], n: usize, drawn: &[f32]) -> Result<(), CaptureError> {
        let Some(first) = group.first() else { return Ok(()) };
        let paths = group.iter().map(|attention| self.path(attention)).collect::<Result<Vec<_>, _>>()?;
        let n_nodes = paths.iter().map(|path| path.nodes.len() + LAYER_NODES).sum::<usize>() + OTHER_NODES;
        let mut b = Builder::new(n_nodes)?;
        let samples = b.input([self.n_embd, n, group.len()], drawn);
        let mut queries = Vec::with_capacity(group.len());
        for (i, (attention, path)) in group.iter().zip(&paths).enumerate() {
            self.check_queries(attention)?;
            let hidden = path.hidden.ok_or(CaptureError::NoHidden(self.layers[attention.layer].il))?;
            self.check_hidden(&hidden)?;
            if hidden.0.ne[1] as usize != n {
                return Err(hidden.shape_error());
            }
            // SAFETY: llama.cpp has allocated its graph and set its inputs, and lets nobody else compute before we return. What is on
            // a path reads nothing else of the graph.
            unsafe {
                let [_, nb1, nb2, _] = (*samples).nb;
                let own = sys::ggml_view_2d(b.ctx, samples, self.n_embd as i64, n as i64, nb1, i * nb2);
                b.run(sys::ggml_cpy(b.ctx, own, b.elsewhere(hidden.0)));
                path.nodes.iter().for_each(|&node| b.run_other(node));
                let halves = halves(&b, attention.q, 0..attention.q.0.ne[1] as usize);
                queries.push(b.output(halves));
            }
        }
        // SAFETY: a node of the graph in work has a buffer.
        b.compute(unsafe { self.devices.at(first.q.buffer())? })?;
        let Mode::Probe(probe) = &mut self.mode else { return Ok(()) };
        for (attention, queries) in group.iter().zip(queries) {
            let n_q = self.layers[attention.layer].n_q;
            read(&mut probe.queries[attention.layer][probe.samples.first * n_q..][..n * n_q], queries);
        }
        Ok(())
    }

    fn inject(&mut self, hidden: &Node, layer: usize) -> Result<(), CaptureError> {
        let Mode::Probe(probe) = &self.mode else { return Ok(()) };
        let samples = probe.samples.draw(&[layer]);
        if hidden.0.ne[1] as usize != probe.samples.n {
            return Err(hidden.shape_error());
        }
        let tensor = std::ptr::from_ref(hidden.0).cast_mut();
        // SAFETY: the tensor holds as many contiguous floats.
        unsafe { sys::ggml_backend_tensor_set(tensor, samples.as_ptr().cast(), 0, size_of_val(&samples[..])) };
        Ok(())
    }
}

/// What the hidden states of a layer are drawn from: independent channels.
struct Gaussian<'a> {
    layer: usize,
    mean: &'a [f64],
    deviation: Vec<f64>,
}

impl<'a> Gaussian<'a> {
    fn new(moments: &'a Moments, layer: usize) -> Self {
        let deviation = moments.m2.iter().map(|m2| (m2 / moments.count).sqrt()).collect();
        Self { layer, mean: &moments.mean, deviation }
    }

    fn sample(&self, seed: u64, number: usize, out: &mut [f32]) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(((self.layer as u64) << 32) | number as u64);
        for ((x, mean), deviation) in out.iter_mut().zip(self.mean).zip(&self.deviation) {
            let z: f64 = StandardNormal.sample(&mut rng);
            *x = (mean + deviation * z) as f32;
        }
    }
}
