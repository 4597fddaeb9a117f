//! The probe pass: sampled hidden states become queries. See the module above.

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

/// More threads would take longer to start than to draw.
const DRAWING_THREADS: usize = 4;

/// What stands for the hidden states of future tokens.
///
/// All layers take the same samples, each with a Gaussian of its own: a layer's queries only meet its own keys. A sample depends on
/// nothing but the seed and its number, however many are drawn at once.
struct Samples {
    seed: u64,
    n_embd: usize,
    n_threads: usize,
    /// Whose statistics they come of.
    layers: Vec<Arc<LayerRecord>>,
    /// Independent channels; empty before the first are drawn. `[layer][2][n_embd]`: deviations, then means
    gaussians: Vec<f32>,
    /// The number of the first of those that fill the ubatch in work.
    first: usize,
    /// How far each channel of those lies from its mean, in deviations. `[n][n_embd]`
    z: Vec<f32>,
}

impl Samples {
    fn new(seed: u64, n_embd: usize, layers: Vec<Arc<LayerRecord>>, n_threads: usize) -> Self {
        let n_threads = n_threads.min(DRAWING_THREADS);
        Self { seed, n_embd, n_threads, layers, gaussians: Vec::new(), first: 0, z: Vec::new() }
    }

    /// Draws `n` others, from the `first` on.
    fn draw(&mut self, first: usize, n: usize) {
        let Self { seed, n_embd, n_threads, ref layers, .. } = *self;
        self.first = first;
        // fresh zeros, whose pages are made ready by those who write to them
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

    /// How many fill the ubatch in work.
    fn n(&self) -> usize {
        self.z.len() / self.n_embd
    }

    fn gaussian(&self, layer: usize) -> &[f32] {
        &self.gaussians[layer * 2 * self.n_embd..][..2 * self.n_embd]
    }
}

/// Synthetic queries of every layer of the cache, at the same positions in each; or none.
#[derive(Debug, Default)]
pub struct SyntheticQueries {
    /// `[layer][sample][n_head][n_embd_head_k]`
    data: Vec<f16>,
    /// Where those of each layer are.
    layers: Vec<Range<usize>>,
    pos: Vec<Pos>,
}

impl SyntheticQueries {
    /// Places for the queries at `pos`.
    fn at(layers: &[Layer], pos: Vec<Pos>) -> Self {
        let mut end = 0;
        let ranges = layers.iter().map(|layer| {
            let start = end;
            end += pos.len() * layer.n_q;
            start..end
        });
        Self { data: Vec::new(), layers: ranges.collect(), pos }
    }

    /// Takes the memory for them, if that has not been done.
    fn take_memory(&mut self) -> Result<(), ComputeError> {
        let n = self.layers.last().map_or(0, |last| last.end);
        if self.data.len() < n {
            self.data = memory::zeros(n).ok_or(ComputeError::Memory("queries"))?;
            threads::touch(&mut self.data);
        }
        Ok(())
    }

    /// Those of the i-th layer of the cache. `[sample][n_head][n_embd_head_k]`
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
    /// Layers whose queries of the ubatch in work are there.
    pub(super) taken: Vec<bool>,
    /// How the ubatch in work is read; None before its first node.
    pub(super) way: Option<Way>,
    pub(super) queries: SyntheticQueries,
}

impl Probe {
    /// The place that the sample of a token of the ubatch in work has among all.
    pub(super) fn number(&self, row: usize) -> usize {
        self.samples.first + row
    }

    /// Tokens of the ubatch in work.
    pub(super) fn n(&self) -> usize {
        self.samples.n()
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

    /// The hidden state that the probe of `seq` uses as sample `index` in the i-th layer of the cache. `[n_embd]`
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
    /// Reads a node of the probe's ubatch; false ends the part of the graph that it belongs to.
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

    /// Whether a node of the probe's ubatch is to be read.
    pub(super) fn asks_for(&self, way: Option<Way>, node: &Node) -> bool {
        match way {
            // the first node of a part of the graph: what the part needs from elsewhere is there
            None | Some(Way::Paths) => true,
            Some(Way::Whole) => self.hidden_layer(node).is_some() || self.attention(node).is_some(),
        }
    }

    /// Turns the samples of all layers that lie where `node` does into queries, unless a path leads over several back ends.
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

    /// Notes that the queries of a layer are there.
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

    /// Turns the samples of some layers, which lie on one device, into queries.
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
        // where the queries of each layer belong
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
        // SAFETY: a node of the graph in work has a buffer.
        let device = unsafe { self.devices.at(first.q.buffer())? };
        b.begin(device)?;
        // while the device is at work
        if let Err(error) = out.take_memory() {
            device.wait()?;
            return Err(error.into());
        }
        let mut start = 0;
        // all at once where one ubatch has all samples of layers that follow each other
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
        // SAFETY: the tensor holds as many contiguous floats.
        let is_set =
            unsafe { sys::gvote_shim_tensor_set(tensor, samples.as_ptr().cast(), 0, size_of_val(&samples[..])) };
        if is_set { Ok(()) } else { Err(ComputeError::Memory("sending").into()) }
    }
}

/// How far the channels of a sample lie from their means, in deviations.
fn deviations(seed: u64, number: usize, out: &mut [f32]) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(number as u64);
    out.iter_mut().for_each(|z| *z = StandardNormal.sample(&mut rng));
}

/// What the hidden states of a layer are drawn from: see [`Samples`].
fn gaussian(moments: &Moments, out: &mut [f32]) {
    let (deviations, means) = out.split_at_mut(moments.mean.len());
    for (deviation, m2) in deviations.iter_mut().zip(&moments.m2) {
        *deviation = ((m2 / moments.count) as f32).sqrt();
    }
    means.iter_mut().zip(&moments.mean).for_each(|(to, &mean)| *to = mean as f32);
}

/// Turns deviations into a hidden state.
fn place(gaussian: &[f32], sample: &mut [f32]) {
    let (deviations, means) = gaussian.split_at(sample.len());
    sample.iter_mut().zip(deviations).zip(means).for_each(|((x, deviation), mean)| *x = *x * deviation + mean);
}
