//! The probe pass: turns sampled hidden states into queries. See the documentation of `capture`.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::graph::{Attention, by_token, nodes};
use super::moments::Moments;
use super::node::{Node, Path};
use super::record::LayerRecord;
use super::{Capture, CaptureError, Inner, Layer, Mode};
use crate::backend::{Builder, ComputeError};
use crate::cache::{self, Parked};
use crate::llama::{Batch, Context, Pos, SeqId};
use crate::policy::threads;
use crate::{memory, sys};

/// How the queries of a ubatch are computed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Computes only the paths from hidden states to queries.
    Paths,
    /// Computes the whole graph and overwrites hidden states on the way. Needed if a path leads over several back ends, as with weights in
    /// host memory that a GPU computes with.
    Whole,
}

#[cfg(test)]
thread_local! {
    /// Set by tests to force [`Way::Whole`], as for a graph over several back ends.
    pub(crate) static PRETEND_SCATTERED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Tensors of the probe's graph for each layer, in addition to the nodes of its path; and tensors for the graph as a whole.
const LAYER_NODES: usize = 12;
const OTHER_NODES: usize = 8;

/// Limit on drawing threads: more threads would take longer to start than to draw.
const DRAWING_THREADS: usize = 4;

/// Samples of hidden states, which stand for future tokens.
///
/// All layers use the same deviations, each scaled by its own Gaussian: a layer's queries only meet the keys of that layer. A sample
/// depends only on the seed and its number, not on how many are drawn at once.
struct Samples {
    seed: u64,
    n_embd: usize,
    n_threads: usize,
    /// Layers whose statistics describe the distributions.
    layers: Vec<Arc<LayerRecord>>,
    /// Gaussians with independent channels, `[layer][2][n_embd]`: standard deviations, then means. Empty before the first draw.
    gaussians: Vec<f32>,
    /// Number of the first sample in the current ubatch.
    first: usize,
    /// Deviation of each channel from its mean, in standard deviations, for the samples of the current ubatch: `[n][n_embd]`.
    z: Vec<f32>,
}

impl Samples {
    fn new(seed: u64, n_embd: usize, layers: Vec<Arc<LayerRecord>>, n_threads: usize) -> Self {
        let n_threads = n_threads.min(DRAWING_THREADS);
        Self { seed, n_embd, n_threads, layers, gaussians: Vec::new(), first: 0, z: Vec::new() }
    }

    /// Draws `n` new samples, the first of which has the number `first`.
    fn draw(&mut self, first: usize, n: usize) {
        let Self { seed, n_embd, n_threads, ref layers, .. } = *self;
        self.first = first;
        // freshly zeroed memory, whose pages are mapped by the threads that write to them
        self.z = vec![0.0; n * n_embd];
        let rows = (first..).zip(self.z.chunks_exact_mut(n_embd));
        let gaussians = &mut self.gaussians;
        let describe = || {
            if gaussians.is_empty() {
                *gaussians = vec![0.0; layers.len() * 2 * n_embd];
                let of_layers = layers.iter().zip(gaussians.chunks_exact_mut(2 * n_embd));
                of_layers.for_each(|(layer, out)| gaussian(&layer.moments, out));
            }
        };
        threads::share_out(n_threads, rows, |(number, row)| deviations(seed, number, row), describe);
    }

    /// Number of samples in the current ubatch.
    fn n(&self) -> usize {
        self.z.len() / self.n_embd
    }

    fn gaussian(&self, layer: usize) -> &[f32] {
        &self.gaussians[layer * 2 * self.n_embd..][..2 * self.n_embd]
    }
}

/// Synthetic queries of every layer of the cache, at the same positions in each layer. May be empty.
#[derive(Debug, Default)]
pub struct SyntheticQueries {
    /// `[layer][sample][n_head][n_embd_head_k]`
    data: Vec<f16>,
    /// Range of each layer in `data`.
    layers: Vec<Range<usize>>,
    pos: Vec<Pos>,
}

impl SyntheticQueries {
    /// Reserves places for the queries at `pos`.
    fn at(layers: &[Layer], pos: Vec<Pos>) -> Self {
        let mut end = 0;
        let ranges = layers.iter().map(|layer| {
            let start = end;
            end += pos.len() * layer.n_q;
            start..end
        });
        Self { data: Vec::new(), layers: ranges.collect(), pos }
    }

    /// Allocates the memory for the queries, unless that was done before.
    fn take_memory(&mut self) -> Result<(), ComputeError> {
        let n = self.layers.last().map_or(0, |last| last.end);
        if self.data.len() < n {
            self.data = memory::zeros(n).ok_or(ComputeError::Memory("queries"))?;
            threads::touch(&mut self.data);
        }
        Ok(())
    }

    /// Queries of the i-th layer of the cache, `[sample][n_head][n_embd_head_k]`.
    pub fn layer(&self, layer: usize) -> &[f16] {
        self.layers.get(layer).map_or(&[], |own| &self.data[own.clone()])
    }

    pub(super) fn layer_mut(&mut self, layer: usize) -> &mut [f16] {
        &mut self.data[self.layers[layer].clone()]
    }

    /// `[sample]`
    pub fn pos(&self) -> &[Pos] {
        &self.pos
    }
}

pub(super) struct Probe {
    samples: Samples,
    /// Whether the queries of each layer have been taken from the current ubatch.
    pub(super) taken: Vec<bool>,
    /// How the current ubatch is computed; None before its first node.
    pub(super) way: Option<Way>,
    pub(super) queries: SyntheticQueries,
}

impl Probe {
    /// Number of the sample that belongs to a token of the current ubatch.
    pub(super) fn number(&self, row: usize) -> usize {
        self.samples.first + row
    }

    /// Number of tokens in the current ubatch.
    pub(super) fn n(&self) -> usize {
        self.samples.n()
    }
}

impl Capture {
    /// The probe pass: makes `n` synthetic queries for every layer, at the positions that follow `pos`. The cache is unchanged afterwards.
    /// The samples depend only on `seed`, layer and index, not on how the batch is split.
    ///
    /// # Errors
    /// [`CaptureError::NoCells`], [`CaptureError::Empty`], and errors of decoding.
    pub fn probe(
        &mut self,
        ctx: &mut Context,
        seq: SeqId,
        pos: Pos,
        n: usize,
        seed: u64,
    ) -> Result<SyntheticQueries, CaptureError> {
        self.settle();
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let free = cache::cells_free(ctx, seq);
        if free < n {
            return Err(CaptureError::NoCells { needed: n, free });
        }
        let Some(record) = self.inner.records.get(&seq).filter(|record| record.has_moments()) else {
            return Err(CaptureError::Empty);
        };

        self.inner.mode = Mode::Probe(Probe {
            samples: Samples::new(seed, self.inner.n_embd, record.layers.clone(), ctx.n_threads_batch()),
            taken: Vec::new(),
            way: None,
            queries: SyntheticQueries::at(&self.inner.layers, (1..=n as Pos).map(|i| pos + i).collect()),
        });
        let result = self.probe_in_chunks(ctx, seq, pos, n);
        let mode = std::mem::replace(&mut self.inner.mode, Mode::Listen);
        result?;
        match mode {
            Mode::Probe(probe) => Ok(probe.queries),
            _ => Err(CaptureError::Empty),
        }
    }

    /// Decodes dummy tokens at positions where the sequence has none. Only the nodes up to q matter.
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
                probe.samples.draw(start, batch.len());
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

    /// Returns the hidden state that the probe of `seq` uses as sample `index` in the i-th layer of the cache, `[n_embd]`.
    #[cfg(test)]
    pub fn sample(&mut self, seq: SeqId, layer: usize, index: usize, seed: u64) -> Vec<f32> {
        self.settle();
        let mut out = vec![0.0; self.inner.n_embd];
        if let Some(record) = self.inner.records.get(&seq) {
            let mut own = vec![0.0; 2 * out.len()];
            gaussian(&record.layers[layer].moments, &mut own);
            deviations(seed, index, &mut out);
            place(&own, &mut out);
        }
        out
    }
}

impl Inner {
    /// Reads a node of the probe's ubatch. Returns false to end the node's part of the graph.
    pub(super) fn read_probe(&mut self, node: &Node) -> Result<bool, CaptureError> {
        let Mode::Probe(probe) = &self.mode else { return Ok(true) };
        if probe.way != Some(Way::Whole) && self.take_paths(node)? {
            return Ok(false);
        }
        if let Some(layer) = self.hidden_layer(node) {
            self.check_hidden(node)?;
            self.inject(node, layer)?;
        } else if let Some(attention) = self.attention(node) {
            if self.take(node)? {
                self.end_ubatch()?;
            }
            self.mark_taken(attention.layer);
        }
        Ok(true)
    }

    /// Whether to read a node of the probe's ubatch.
    pub(super) fn asks_for(&self, way: Option<Way>, node: &Node) -> bool {
        match way {
            // at the first node of a part, all inputs from other back ends are available
            None | Some(Way::Paths) => true,
            Some(Way::Whole) => self.hidden_layer(node).is_some() || self.attention(node).is_some(),
        }
    }

    /// Computes the queries of all layers on the device that holds `node`. Returns false if a path leads over several back ends.
    fn take_paths(&mut self, node: &Node) -> Result<bool, CaptureError> {
        // SAFETY: called from inside the graph.
        let found: Vec<_> = unsafe { nodes(self.ctx) }.filter_map(|node| self.attention(&node)).collect();
        let place = node.place();
        let Mode::Probe(Probe { way, taken, .. }) = &self.mode else { return Ok(true) };
        let is_first = way.is_none();
        let here = |attention: &Attention| attention.q.place() == place && !taken[attention.layer];
        let wanted = found.into_iter().filter(|attention| is_first || here(attention));
        let with_path = wanted.map(|attention| Ok((self.path(&attention)?, attention)));
        let mut paths = with_path.collect::<Result<Vec<_>, CaptureError>>()?;
        let is_complete = paths.iter().all(|(path, _)| path.is_complete());
        #[cfg(test)]
        let is_complete = is_complete && !PRETEND_SCATTERED.get();
        paths.retain(|(_, attention)| here(attention));
        if let Mode::Probe(probe) = &mut self.mode {
            probe.way = Some(if is_complete { Way::Paths } else { Way::Whole });
            if !is_complete {
                probe.queries.take_memory()?;
            }
        }
        if is_complete && !paths.is_empty() {
            self.turn_into_queries(&paths)?;
            paths.iter().for_each(|(_, attention)| self.mark_taken(attention.layer));
        }
        Ok(is_complete)
    }

    /// Records that the queries of a layer have been taken.
    fn mark_taken(&mut self, layer: usize) {
        if let Mode::Probe(probe) = &mut self.mode {
            probe.taken[layer] = true;
        }
    }

    fn path<'a>(&self, attention: &Attention<'a>) -> Result<Path<'a>, CaptureError> {
        // SAFETY: called from inside the graph.
        let graph = unsafe { sys::gvote_shim_graph(self.ctx) };
        let mut path = Path::new(self.layers[attention.layer].il, graph);
        path.collect(attention.q)?;
        Ok(path)
    }

    /// Computes the queries of some layers that lie on one device.
    fn turn_into_queries(&mut self, paths: &[(Path, Attention)]) -> Result<(), CaptureError> {
        let mut hidden_states = Vec::with_capacity(paths.len());
        for (path, attention) in paths {
            self.check_queries(attention)?;
            let hidden = path.hidden.ok_or(CaptureError::NoHidden(self.layers[attention.layer].il))?;
            self.check_hidden(&hidden)?;
            hidden_states.push(hidden);
        }
        let Mode::Probe(Probe { samples, queries: out, .. }) = &mut self.mode else { return Ok(()) };
        let (n, n_embd) = (samples.n(), samples.n_embd);
        if let Some(other) = hidden_states.iter().find(|hidden| hidden.0.ne[1] as usize != n) {
            return Err(other.shape_error());
        }
        if let Some((_, other)) = paths.iter().find(|(_, attention)| attention.n_tokens() != n) {
            return Err(other.q.shape_error());
        }
        let n_nodes = paths.iter().map(|(path, _)| path.nodes.len() + LAYER_NODES).sum::<usize>() + OTHER_NODES;
        // ranges of the layers' queries in the output
        let places = paths.iter().map(|(_, attention)| {
            let n_q = self.layers[attention.layer].n_q;
            let start = out.layers[attention.layer].start + samples.first * n_q;
            start..start + n * n_q
        });
        let places: Vec<_> = places.collect();
        let mut b = Builder::new(n_nodes)?;
        let z = b.input([n_embd, n, 1], &samples.z[..]);
        let gaussians = b.input([n_embd, 2, samples.gaussians.len() / (2 * n_embd)], &samples.gaussians[..]);
        let queries = b.half_results(places.iter().map(Range::len).sum());
        let mut end = 0;
        for (((path, attention), hidden), place) in paths.iter().zip(hidden_states).zip(&places) {
            // SAFETY: llama.cpp has allocated its graph and set its inputs, and lets nobody else compute before we return. What is on
            // a path reads nothing else of the graph.
            unsafe {
                let [_, nb1, nb2, _] = (*gaussians).nb;
                let own = attention.layer * nb2;
                let [deviation, mean] =
                    [own, own + nb1].map(|offset| sys::ggml_view_1d(b.ctx, gaussians, n_embd as i64, offset));
                let scaled = sys::ggml_mul(b.ctx, z, deviation);
                b.place(scaled, hidden.0);
                b.run(sys::ggml_add_inplace(b.ctx, scaled, mean));
                path.nodes.iter().for_each(|&node| b.run_other(node));
                let of_tokens = by_token(&b, attention.q, 0..attention.q.0.ne[1] as usize);
                b.write_halves(queries, end, of_tokens);
            }
            end += place.len();
        }
        let Some((_, first)) = paths.first() else { return Ok(()) };
        // SAFETY: a node of the current graph has a buffer.
        let device = unsafe { self.devices.at(first.q.buffer())? };
        b.begin(device)?;
        // allocate while the device computes
        if let Err(error) = out.take_memory() {
            device.wait()?;
            return Err(error.into());
        }
        let mut start = 0;
        // one read for consecutive layers if a ubatch has all samples
        for places in places.chunk_by(|place, next| place.end == next.start) {
            let side_by_side = &mut out.data[places[0].start..places[places.len() - 1].end];
            device.read_from(start, side_by_side, queries)?;
            start += side_by_side.len();
        }
        Ok(())
    }

    fn inject(&mut self, hidden: &Node, layer: usize) -> Result<(), CaptureError> {
        let Mode::Probe(probe) = &self.mode else { return Ok(()) };
        let mut samples = probe.samples.z.clone();
        samples.chunks_exact_mut(self.n_embd).for_each(|sample| place(probe.samples.gaussian(layer), sample));
        if hidden.0.ne[1] as usize != probe.samples.n() {
            return Err(hidden.shape_error());
        }
        let tensor = std::ptr::from_ref(hidden.0).cast_mut();
        // SAFETY: the tensor is contiguous and holds as many floats as `samples`.
        let is_set =
            unsafe { sys::gvote_shim_tensor_set(tensor, samples.as_ptr().cast(), 0, size_of_val(&samples[..])) };
        if is_set { Ok(()) } else { Err(ComputeError::Memory("sending").into()) }
    }
}

/// Draws the deviations of a sample's channels from their means, in standard deviations.
fn deviations(seed: u64, number: usize, out: &mut [f32]) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(number as u64);
    out.iter_mut().for_each(|z| *z = StandardNormal.sample(&mut rng));
}

/// Computes the distribution of a layer's hidden states: see [`Samples`].
fn gaussian(moments: &Moments, out: &mut [f32]) {
    let (deviations, means) = out.split_at_mut(moments.mean.len());
    for (deviation, m2) in deviations.iter_mut().zip(&moments.m2) {
        *deviation = ((m2 / moments.count) as f32).sqrt();
    }
    means.iter_mut().zip(&moments.mean).for_each(|(to, &mean)| *to = mean as f32);
}

/// Turns deviations into a hidden state, in place.
fn place(gaussian: &[f32], sample: &mut [f32]) {
    let (deviations, means) = gaussian.split_at(sample.len());
    sample.iter_mut().zip(deviations).zip(means).for_each(|((x, deviation), mean)| *x = *x * deviation + mean);
}
