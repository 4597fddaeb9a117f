//! The quantization-aware scorer: attention probabilities of sets of queries over the cached keys.
//!
//! For every layer small ggml graphs run on the back end that holds the layer's K, on the tensor that the decoder itself reads, in its
//! stored type and rotation. For each query head of a KV head:
//!
//! ```text
//! kq  = K_h · Q          [n_kv, n_query]      ggml's own kernel for K's type
//! kq += E_h · Q²         (quantized K only)   see below
//! kq  = cap(kq) + mask                        softcap; cells that a query does not see
//! p   = softmax(scale · kq)
//! out = mean over the queries of p            [n_kv]
//! ```
//!
//! The query heads of a KV head are columns of one product. Only `out` leaves the back end, in one piece with the other scores of the layer
//! (and p of the synthetic queries, if a policy asks for it). On the host a node processes one KV head and a few queries, so that the
//! transient memory is one `[n_kv, columns]` block of f32. On a device, where each kernel start is expensive, a node processes as many
//! heads and queries as fit into a share of the cache's bytes.
//!
//! # Coarse keys
//! A quantized K is known only up to its rounding. Within a block b of 32 values with scale δ_b the error of each value is assumed to be
//! uniform on one step, with variance c δ_b² (c = 1/12 for types with evenly spaced levels), and independent of the others. Given the
//! stored k̂, the logit l = s Σ_i q_i k_i then has mean l̂ and variance
//!
//! ```text
//! v = s² c Σ_b δ_b² Σ_{i∈b} q_i²
//! ```
//!
//! If l is assumed to be Gaussian, the expected weight of the key is E[exp l] = exp(l̂ + v/2). So each logit is raised by v/2: a key whose
//! stored copy is coarse may matter more than its logit shows. In the graph δ² is read directly from the block headers, viewed as strided
//! f16 `[1, n_block, n_kv]`, and v/2 becomes one more small product, E_h = δ².

mod expected;
mod graph;
mod measure;
mod results;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, Scope, ScopedJoinHandle};

use half::f16;

use self::graph::{CellsView, Coarseness, Grain, LayerGraph};
use self::results::{Gathered, LayerScores};
use crate::backend::{self, ComputeError, DEVICE_LAYERS, Devices};
use crate::cache::{Cell, Layout};
use crate::capture::{LogitScale, Queries, Window};
use crate::llama::Pos;
use crate::policy::{HeadScores, Needs};

/// Memory that a device may use to compute scores, as a share of the bytes of K and V. At least [`DEVICE_LEAST`], which starts fewer
/// kernels, but no more than [`DEVICE_FREE`] of the free memory unless the share is larger.
const DEVICE_SHARE: f64 = 0.05;
const DEVICE_LEAST: usize = 288 << 20;
const DEVICE_FREE: f64 = 0.125;

/// Number of scores that a device hands over at once, from several layers if one has fewer. Policies process them on several threads;
/// smaller batches do not amortise starting these.
const HANDED_OVER: usize = 1 << 20;

/// The queries of a vote for one layer of the cache: the observation window (real queries), then synthetic queries and the current one.
/// Each query sees the cells up to its own position.
pub struct LayerQueries<'a> {
    /// `[n_query][n_head][n_embd_head_k]`, split into parts.
    parts: Vec<Cow<'a, [f16]>>,
    pos: Vec<Pos>,
    n_observed: usize,
    scale: LogitScale,
}

impl<'a> LayerQueries<'a> {
    /// No queries, for scores that depend on keys and values alone.
    pub fn none() -> Self {
        Self::new(Queries::default(), Queries::default(), LogitScale::default())
    }

    /// `observed`: the observation window. `future`: synthetic queries, then the current query.
    pub fn new(observed: Queries, future: Queries, scale: LogitScale) -> Self {
        let n_observed = observed.pos.len();
        let parts = vec![observed.data.into(), future.data.into()];
        Self { parts, pos: [observed.pos, future.pos].concat(), n_observed, scale }
    }

    /// Borrows the queries of a window, whose last query is the current one, and synthetic queries at `synthetic_pos`.
    pub fn of_window(window: &Window<'a>, synthetic: &'a [f16], synthetic_pos: &[Pos], scale: LogitScale) -> Self {
        let parts = window.parts.iter().copied().chain([synthetic, window.current()]).map(Cow::from).collect();
        let pos = window.pos.iter().chain(synthetic_pos).chain(window.pos.last()).copied().collect();
        Self { parts, pos, n_observed: window.pos.len(), scale }
    }

    /// Returns a range of the numbers in `parts`, as slices.
    fn numbers(&self, mut range: Range<usize>) -> Vec<&[f16]> {
        let mut out = Vec::new();
        for part in &self.parts {
            if let Some(own) = part.get(range.start..range.end.min(part.len()))
                && !own.is_empty()
            {
                out.push(own);
            }
            range = range.start.saturating_sub(part.len())..range.end.saturating_sub(part.len());
        }
        out
    }
}

/// Scores the keys of one context's cache.
pub struct Scorer {
    /// Back ends of each thread. Each thread works on a layer of its own: a barrier after each small node would cost more than it gains.
    threads: Vec<Devices>,
    /// Number of threads used if the cache is in host memory.
    n_threads: usize,
    /// Approximate number of queries per layer.
    n_query: usize,
}

impl Scorer {
    /// Makes a scorer that works on `n_threads` layers at once if the cache is in host memory. `n_query`: approximate number of queries per
    /// layer, by which a device's memory is divided.
    pub fn new(n_threads: usize, n_query: usize) -> Self {
        let threads = (0..n_threads.max(DEVICE_LAYERS)).map(|_| Devices::new(1)).collect();
        Self { threads, n_threads: n_threads.max(1), n_query }
    }

    /// See [`Devices::start`].
    ///
    /// # Errors
    /// [`ComputeError`].
    pub(crate) fn start(&mut self, layout: &Layout) -> Result<(), ComputeError> {
        if layout.is_host() {
            return Ok(());
        }
        self.devices().iter_mut().try_for_each(|devices| devices.start(layout))
    }

    /// Back ends for other work between scores: as many as there are threads that work on a device.
    pub(crate) fn devices(&mut self) -> &mut [Devices] {
        &mut self.threads[..DEVICE_LAYERS]
    }

    /// Returns the bytes that a device may use to compute the scores of `n_kv` cells.
    fn room(&mut self, layout: &Layout, n_kv: usize) -> Result<usize, ComputeError> {
        let mut least = DEVICE_LEAST;
        let mut seen = std::ptr::null_mut();
        for layer in &layout.layers {
            // SAFETY: K's storage lives as long as the context, which the caller holds.
            let buffer = unsafe { (*layer.k).buffer };
            if std::mem::replace(&mut seen, buffer) != buffer {
                // SAFETY: as above.
                let free = unsafe { self.threads[0].at(buffer)?.free_bytes() };
                least = free.map_or(least, |free| least.min((DEVICE_FREE * free as f64) as usize));
            }
        }
        Ok(least.max((DEVICE_SHARE * (n_kv * layout.bytes_per_cell()) as f64) as usize))
    }

    /// Returns how many layers of `n_kv` cells a device works on at once, sharing `room` bytes: one fewer if a layer would not have room
    /// for all queries of a KV head.
    fn layers_at_once(&self, layout: &Layout, n_kv: usize, room: usize) -> usize {
        let least = layout.layers.iter().map(|layer| Grain::least_room(layer, n_kv, self.n_query)).max();
        if least.is_some_and(|least| least > room / DEVICE_LAYERS) { DEVICE_LAYERS - 1 } else { DEVICE_LAYERS }
    }

    /// Bytes of compute memory.
    pub fn compute_bytes(&self) -> usize {
        self.threads.iter().map(Devices::compute_bytes).sum()
    }

    /// Frees the compute memory and returns its bytes.
    pub fn release(&mut self) -> usize {
        self.threads.iter_mut().map(Devices::release).sum()
    }

    /// Computes the scores of every KV head, layer by layer, and passes those of one or more layers to `sink(first, heads)`. `first` counts
    /// heads over all layers; scores are indexed by the place in `cells`. `queries` returns the queries of the i-th layer. `account_error`:
    /// raise logits by half their variance if K is quantized. The first call of `sink` may have no heads.
    ///
    /// # Errors
    /// [`ComputeError`], or the error of `queries`; the cache is only read.
    pub(crate) fn score<'q, E: From<ComputeError>>(
        &mut self,
        layout: &Layout,
        cells: &[Cell],
        needs: Needs,
        account_error: bool,
        mut queries: impl FnMut(usize) -> Result<LayerQueries<'q>, E>,
        mut sink: impl FnMut(usize, &[HeadScores]),
    ) -> Result<(), E> {
        let in_order = cells.iter().enumerate().all(|(i, c)| c.index as usize == i);
        let view = CellsView::new(cells);
        let mut head = 0;
        let mut gathered = Vec::new();
        let mut hand_over = |layers: &[LayerScores]| {
            let mut heads = Vec::new();
            if in_order {
                layers.iter().for_each(|scores| heads.extend((0..scores.rows.heads).map(|i| scores.head(i))));
            } else {
                gathered.resize_with(layers.len(), Gathered::default);
                for (gathered, scores) in gathered.iter_mut().zip(layers) {
                    gathered.fill(scores, cells);
                    heads.extend((0..scores.rows.heads).map(|i| gathered.head(i)));
                }
            }
            sink(head, &heads);
            head += heads.len();
        };
        let is_host = layout.is_host();
        let layers_at_once = |scores: &LayerScores| if is_host { 1 } else { HANDED_OVER / scores.data.len().max(1) };
        let room = if is_host { 0 } else { self.room(layout, view.n_kv)? };
        let n_workers = if is_host { self.n_threads } else { self.layers_at_once(layout, view.n_kv, room) };
        let n_workers = n_workers.min(layout.n_layer());
        let room = room / n_workers;
        let describe = |il: usize, queries: LayerQueries<'q>| {
            let layer = &layout.layers[il];
            let n_query = queries.pos.len();
            // SAFETY: K's storage lives as long as the context, which the caller holds.
            let type_ = unsafe { (*layer.k).type_ };
            LayerGraph {
                layer,
                stream: layout.info.stream as usize,
                view: &view,
                coarseness: account_error.then(|| Coarseness::of(type_)).flatten(),
                queries,
                grain: match is_host {
                    true => Grain::on_host(layer),
                    false => Grain::on_device(layer, view.n_kv, layout.n_cells(), n_query, room),
                },
                v_trans: layout.info.v_trans,
                n_cells: layout.n_cells(),
            }
        };
        // while queries are still being made, a device measures keys and values of all layers
        let measures_first = !is_host && needs.samples() && !needs.each && !needs.of_cells().nothing();
        // on the host each worker has one layer in progress and one queued; a device is given all layers at once and never waits
        let ahead = if is_host { n_workers } else { layout.n_layer() };
        let threads = &mut self.threads;
        // reuse memory for scores: fresh memory takes as much time as filling it
        let spare = Mutex::new(Vec::new());
        thread::scope(|scope| {
            let spare = &spare;
            let n_layers = ahead / n_workers + 1;
            let workers =
                threads[..n_workers].iter_mut().map(|devices| Worker::start(scope, devices, needs, spare, n_layers));
            let workers = workers.collect::<Result<Vec<_>, _>>()?;
            if measures_first {
                for il in 0..layout.n_layer() {
                    workers[il % n_workers].give(Part::Cells, describe(il, LayerQueries::none()));
                }
                // prepare for scores in the meantime
                hand_over(&[]);
            }
            let part = if measures_first { Part::Queries } else { Part::All };
            let mut ready: Vec<LayerScores> = Vec::new();
            for il in 0..layout.n_layer() + ahead {
                if il < layout.n_layer() {
                    workers[il % n_workers].give(part, describe(il, queries(il)?));
                }
                if let Some(il) = il.checked_sub(ahead) {
                    let scores = workers[il % n_workers].take()?;
                    let at_once = layers_at_once(&scores);
                    ready.push(scores);
                    if ready.len() >= at_once || il + 1 == layout.n_layer() {
                        hand_over(&ready);
                        spare.lock().expect(ALIVE).append(&mut ready);
                    }
                }
            }
            workers.into_iter().for_each(Worker::end);
            Ok(())
        })
    }
}

/// The part of a layer's scores to compute.
#[derive(Clone, Copy)]
enum Part {
    All,
    /// Scores of keys and values alone, which stay on the device.
    Cells,
    /// The remaining scores; those of `Cells` are read with them.
    Queries,
}

type Task<'a> = (Part, LayerGraph<'a>);

/// A thread that computes the scores of layers, one after another. Queries are sent back, to be freed by the thread that made them.
struct Worker<'s, 'a> {
    layers: SyncSender<Task<'a>>,
    scores: Receiver<(LayerGraph<'a>, Result<LayerScores, ComputeError>)>,
    thread: ScopedJoinHandle<'s, Receiver<Task<'a>>>,
}

impl<'s, 'a: 's> Worker<'s, 'a> {
    /// `spare`: memory for scores to reuse. `n_layers`: maximum number of layers queued ahead.
    fn start(
        scope: &'s Scope<'s, '_>,
        devices: &'s mut Devices,
        needs: Needs,
        spare: &'s Mutex<Vec<LayerScores>>,
        n_layers: usize,
    ) -> Result<Self, ComputeError> {
        let (layers, to_do) = mpsc::sync_channel::<Task>(2 * n_layers);
        // a longer queue would need fresh memory for the scores of more layers
        let (done, scores) = mpsc::sync_channel(2);
        let thread = backend::start(scope, move || {
            devices.forget_kept();
            let mut measured: VecDeque<Result<Option<usize>, ComputeError>> = VecDeque::new();
            while let Ok((part, graph)) = to_do.recv() {
                // SAFETY: K's storage lives as long as the context, which the caller of `score` holds.
                let device = unsafe { devices.at((*graph.layer.k).buffer) };
                if let Part::Cells = part {
                    measured.push_back(device.and_then(|device| graph.measure_ahead(device, needs, n_layers)));
                    continue;
                }
                let measured = if let Part::Queries = part { measured.pop_front() } else { None };
                let computed = measured.unwrap_or(Ok(None)).and_then(|measured| {
                    let mut out = spare.lock().expect(ALIVE).pop().unwrap_or_default();
                    graph.compute(device?, needs, measured, &mut out)?;
                    Ok(out)
                });
                // the receiver is gone if another layer has failed
                if done.send((graph, computed)).is_err() {
                    break;
                }
            }
            to_do
        });
        Ok(Self { layers, scores, thread: thread? })
    }

    /// Queues a layer. After `Part::Cells` of some layers, `Part::Queries` of the same layers must follow in the same order.
    fn give(&self, part: Part, layer: LayerGraph<'a>) {
        self.layers.send((part, layer)).expect(ALIVE);
    }

    /// Waits for the scores of the oldest queued layer.
    fn take(&self) -> Result<LayerScores, ComputeError> {
        let (_, scores) = self.scores.recv().expect(ALIVE);
        scores
    }

    fn end(self) {
        drop(self.layers);
        drop(self.thread.join().expect(ALIVE));
    }
}

/// ggml aborts rather than unwinds, and this crate's code in a graph does not panic.
const ALIVE: &str = "a worker ends when it is no longer needed";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::fixture::{F16_FLASH, context};
    use crate::tests::tiny::{SPECS, Tiny};

    #[test]
    fn layers_share_a_device_as_long_as_each_has_room_for_the_queries_of_a_head() {
        let dir = tempfile::tempdir().unwrap();
        let tiny = Tiny::new(dir.path(), SPECS[0]);
        let layout = Layout::of(&context(&tiny.model, F16_FLASH, 512, 512), 0).unwrap();
        let (n_kv, scorer) = (40_000, Scorer::new(1, 97));
        let graph = |room| Grain::on_device(&layout.layers[0], n_kv, layout.n_cells(), 97, room);
        let all = graph(usize::MAX >> 1).columns;
        let least = (1..).map(|mb| mb << 20).find(|&room| graph(room).columns == all).unwrap();
        for (room, n_layers) in [(4 * least, 4), (4 * (least - (1 << 20)), 3), (0, 3)] {
            assert_eq!(scorer.layers_at_once(&layout, n_kv, room), n_layers, "{room} bytes");
        }
    }
}
