//! The quantization-aware scorer: probabilities of sets of queries over the cached keys.
//!
//! For every layer small ggml graphs run on the back end that holds the layer's K, over the very tensor the decoder
//! reads: stored type, rotation and all. For each query head of a KV head
//!
//! ```text
//! kq  = K_h · Q          [n_kv, n_query]      ggml's own kernel for K's type
//! kq += E_h · Q²         (quantized K only)   see below
//! kq  = cap(kq) + mask                        softcap; cells that a query does not see
//! p   = softmax(scale · kq)
//! out = mean over the queries of p            [n_kv]
//! ```
//!
//! Only `out` leaves the back end (and p of the synthetic queries, where a policy asks for it). On the host one query head
//! and one chunk of queries at a time keep the transient memory at one `[n_kv, chunk]` block of f32; on a device, where the
//! start of a kernel is dear, all heads are one node and a chunk is as large as a share of the cache allows.
//!
//! # Coarse keys
//! A quantized K is known only up to its rounding. Within a block b of 32 values with scale δ_b the error of each value is
//! taken as uniform on one step, variance c δ_b² (c = 1/12 for types with evenly spaced levels), independent of the
//! others. The logit l = s Σ_i q_i k_i then has, given the stored k̂, mean l̂ and variance
//!
//! ```text
//! v = s² c Σ_b δ_b² Σ_{i∈b} q_i²
//! ```
//!
//! and, taking l as Gaussian, the expected weight of the key is E[exp l] = exp(l̂ + v/2). So each logit is raised by v/2:
//! a key whose stored copy is coarse may matter more than it seems. In the graph δ² is read straight from the block
//! headers, viewed as strided f16 `[1, n_block, n_kv]`, and v/2 becomes one more small product, E_h = δ².

mod baselines;
mod graph;

use self::graph::{CellsView, Coarseness, Grain, LayerGraph, Target};
use crate::backend::{ComputeError, Devices};
use crate::cache::{Cell, Layout};
use crate::capture::{LogitScale, Queries};
use crate::policy::{HeadScores, Needs};

/// On the host one query head and few queries at a time: bounds the transient memory to one `[n_kv, queries]` block of f32 a
/// thread.
const HOST_GRAIN: Grain = Grain { queries: 17, heads: 1, kv_heads: 1, cells: 1024 };
/// On a device starting a kernel costs more than what it does: as much at once as fits into this share of the bytes of K and
/// V, or into [`DEVICE_LEAST`].
const DEVICE_SHARE: f64 = 0.03;
const DEVICE_LEAST: usize = 32 << 20;

/// The queries of a vote for one layer of the cache.
pub struct LayerQueries {
    /// The observation window: real queries, each sees the cells up to its own position.
    pub observed: Queries,
    /// Synthetic queries, then the current query: each sees every cell.
    pub future: Queries,
    pub scale: LogitScale,
}

/// Scores the keys of one context's cache.
pub struct Scorer {
    /// The back ends of each thread.
    threads: Vec<Devices>,
}

impl Scorer {
    /// A scorer that works on `n_threads` layers at once.
    pub fn new(n_threads: usize) -> Self {
        // whole layers are shared out among threads: a barrier after each small node costs more than it gains
        Self { threads: (0..n_threads.max(1)).map(|_| Devices::new(1)).collect() }
    }

    /// Gives the compute memory back and says how many bytes it was.
    pub fn release(&mut self) -> usize {
        self.threads.iter_mut().map(Devices::release).sum()
    }

    /// Computes the scores of every KV head, layer by layer, and hands those of a layer to `sink(first, heads)`, where `first`
    /// counts heads over all layers and scores are indexed by the place in `cells`. `queries` gives those of the i-th layer.
    /// `account_error`: raise logits by half their variance where K is quantized.
    ///
    /// # Errors
    /// [`ComputeError`], or what `queries` fails with; the cache is only read.
    pub fn score<E: From<ComputeError>>(
        &mut self,
        layout: &Layout,
        cells: &[Cell],
        needs: Needs,
        account_error: bool,
        mut queries: impl FnMut(usize) -> Result<LayerQueries, E>,
        mut sink: impl FnMut(usize, &[HeadScores]),
    ) -> Result<(), E> {
        let in_order = cells.iter().enumerate().all(|(i, c)| c.index as usize == i);
        let view = CellsView::new(cells);
        let mut head = 0;
        let mut gathered: Vec<Gathered> = Vec::new();
        let mut hand_over = |layers: &[Vec<CellScores>]| {
            for scores in layers {
                if !in_order {
                    gathered.resize_with(scores.len(), Gathered::default);
                    gathered.iter_mut().zip(scores).for_each(|(to, scores)| to.fill(scores, cells, view.n_kv));
                }
                let heads = |i: usize| if in_order { scores[i].as_head() } else { gathered[i].0.as_head() };
                sink(head, &(0..scores.len()).map(heads).collect::<Vec<_>>());
                head += scores.len();
            }
        };
        // a device computes one graph after another anyway
        let is_host = layout.is_host();
        let n_threads = if is_host { self.threads.len() } else { 1 };
        let room = ((DEVICE_SHARE * (view.n_kv * layout.bytes_per_cell()) as f64) as usize).max(DEVICE_LEAST);
        // two sets of scores take turns: fresh memory for each layer would cost as much time as what fills it
        let (mut computed, mut next) = (Vec::new(), Vec::new());
        for (batch, layers) in layout.layers.chunks(n_threads).enumerate() {
            let mut graphs = Vec::with_capacity(layers.len());
            for (i, layer) in layers.iter().enumerate() {
                let queries = queries(batch * n_threads + i)?;
                // SAFETY: K's storage lives as long as the context, which the caller holds.
                let type_ = unsafe { (*layer.k).type_ };
                graphs.push(LayerGraph {
                    layer,
                    stream: layout.info.stream as usize,
                    view: &view,
                    coarseness: account_error.then(|| Coarseness::of(type_)).flatten(),
                    queries,
                    grain: if is_host { HOST_GRAIN } else { Grain::on_device(layer, view.n_kv, room) },
                    v_trans: layout.info.v_trans,
                    n_cells: layout.n_cells(),
                });
            }
            compute_all(&mut self.threads, &graphs, needs, &mut next, || hand_over(&computed))?;
            std::mem::swap(&mut computed, &mut next);
        }
        hand_over(&computed);
        Ok(())
    }
}

/// Computes each graph on a thread of its own into `out`, and does something else meanwhile.
fn compute_all(
    threads: &mut [Devices],
    graphs: &[LayerGraph],
    needs: Needs,
    out: &mut Vec<Vec<CellScores>>,
    meanwhile: impl FnOnce(),
) -> Result<(), ComputeError> {
    let run = |devices: &mut Devices, graph: &LayerGraph, out: &mut Vec<CellScores>| {
        // SAFETY: K's storage lives as long as the context, which the caller of `score` holds.
        let device = unsafe { devices.at((*graph.layer.k).buffer)? };
        graph.compute(device, needs, out)
    };
    out.resize_with(graphs.len(), Vec::new);
    std::thread::scope(|scope| {
        let work = threads.iter_mut().zip(graphs).zip(out);
        let running: Vec<_> =
            work.map(|((devices, graph), out)| scope.spawn(move || run(devices, graph, out))).collect();
        meanwhile();
        // ggml aborts rather than unwinds, and this crate's code in a graph does not panic
        running.into_iter().try_for_each(|thread| thread.join().expect("no panic in a graph"))
    })
}

/// Scores of one KV head, indexed by cell.
#[derive(Default)]
struct CellScores {
    observed: Vec<f32>,
    future: Vec<f32>,
    each: Vec<f32>,
    expected: Vec<f32>,
    value_norm: Vec<f32>,
    key_similarity: Vec<f32>,
    fourth_powers: Vec<f32>,
}

impl CellScores {
    fn clear(&mut self) {
        let Self { observed, future, each, expected, value_norm, key_similarity, fourth_powers } = self;
        for scores in [observed, future, each, expected, value_norm, key_similarity, fourth_powers] {
            scores.clear();
        }
    }

    fn target(&mut self, target: Target) -> &mut Vec<f32> {
        match target {
            Target::Observed => &mut self.observed,
            Target::Future => &mut self.future,
        }
    }

    fn as_head(&self) -> HeadScores<'_> {
        HeadScores {
            future: &self.future,
            observed: &self.observed,
            each: &self.each,
            expected: &self.expected,
            value_norm: &self.value_norm,
            key_similarity: &self.key_similarity,
            fourth_powers: &self.fourth_powers,
            replayed: &[],
        }
    }
}

/// Scores of one KV head, indexed by place in the sequence: where the cells are not in order.
#[derive(Default)]
struct Gathered(CellScores);

impl Gathered {
    fn fill(&mut self, from: &CellScores, cells: &[Cell], n_kv: usize) {
        let gather = |out: &mut Vec<f32>, data: &[f32]| {
            out.clear();
            for row in data.chunks_exact(n_kv) {
                out.extend(cells.iter().map(|c| row[c.index as usize]));
            }
        };
        gather(&mut self.0.observed, &from.observed);
        gather(&mut self.0.future, &from.future);
        gather(&mut self.0.each, &from.each);
        gather(&mut self.0.expected, &from.expected);
        gather(&mut self.0.value_norm, &from.value_norm);
        gather(&mut self.0.key_similarity, &from.key_similarity);
        gather(&mut self.0.fourth_powers, &from.fourth_powers);
    }
}
