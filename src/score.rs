//! The quantization-aware scorer: probabilities of sets of queries over the cached keys.
//!
//! For every layer one small ggml graph runs on the back end that holds the layer's K, over the very tensor the decoder
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
//! Only `out` leaves the back end (and p of the synthetic queries, where a policy asks for it). One query head at a time
//! keeps the transient memory at one `[n_kv, n_query]` block of f32.
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

use half::f16;

use crate::cache::{Cell, Layout};
use crate::capture::{LogitScale, Queries};
use crate::llama::Pos;
use crate::policy::{HeadScores, Needs};
use crate::sys;

/// What can go wrong while scoring.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    #[error("out of memory while scoring: {0}")]
    Memory(&'static str),
    #[error("the back end that holds the KV cache cannot be started a second time for scoring")]
    Backend,
    #[error("the scoring graph failed (ggml status {0})")]
    Compute(i32),
}

/// The queries of a vote for one layer of the cache.
pub struct LayerQueries {
    /// The observation window: real queries, each sees the cells up to its own position.
    pub observed: Queries,
    /// Synthetic queries, then the current query: each sees every cell.
    pub future: Queries,
    pub scale: LogitScale,
}

/// Most queries scored at once: bounds the transient memory to one `[n_kv, CHUNK]` block of f32 a thread.
const CHUNK: usize = 17;

/// How a type stores its scale, for the error of a rounded key.
struct Coarseness {
    /// Bytes of a block; the f16 scale comes first.
    block_bytes: usize,
    block_size: usize,
    /// Variance of the rounding error in units of the squared scale.
    variance: f32,
}

impl Coarseness {
    /// Scale-first types of ggml-common.h; `None` for types whose error does not matter.
    fn of(type_: sys::ggml_type) -> Option<Self> {
        let variance = match type_ {
            sys::GGML_TYPE_Q8_0
            | sys::GGML_TYPE_Q4_0
            | sys::GGML_TYPE_Q4_1
            | sys::GGML_TYPE_Q5_0
            | sys::GGML_TYPE_Q5_1 => 1.0 / 12.0,
            // 16 uneven levels from -127 to 113 (kvalues_iq4nl): the mean of their squared steps
            sys::GGML_TYPE_IQ4_NL => 273.0 / 12.0,
            _ => return None,
        };
        // SAFETY: plain queries about a valid type.
        let (block_bytes, block_size) = unsafe { (sys::ggml_type_size(type_), sys::ggml_blck_size(type_) as usize) };
        Some(Self { block_bytes, block_size, variance })
    }
}

/// A back end of our own on the device that holds a part of the cache.
struct Device {
    buffer_type: sys::ggml_backend_buffer_type_t,
    backend: sys::ggml_backend_t,
    alloc: sys::ggml_gallocr_t,
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: both were made in `new`, freed once.
        unsafe {
            sys::ggml_gallocr_free(self.alloc);
            sys::ggml_backend_free(self.backend);
        }
    }
}

// SAFETY: a back end and its allocator are used by one thread at a time (&mut).
unsafe impl Send for Device {}

impl Device {
    fn new(buffer_type: sys::ggml_backend_buffer_type_t) -> Result<Self, ScoreError> {
        // SAFETY: the buffer type comes from a living buffer; results are checked.
        unsafe {
            let device = sys::ggml_backend_buft_get_device(buffer_type);
            let backend = if device.is_null() {
                sys::ggml_backend_cpu_init()
            } else {
                sys::ggml_backend_dev_init(device, std::ptr::null())
            };
            if backend.is_null() {
                return Err(ScoreError::Backend);
            }
            if sys::ggml_backend_is_cpu(backend) {
                // whole layers are shared out among threads instead: a barrier after each small node costs more than it gains
                sys::ggml_backend_cpu_set_n_threads(backend, 1);
            }
            let alloc = sys::ggml_gallocr_new(sys::ggml_backend_get_default_buffer_type(backend));
            Ok(Self { buffer_type, backend, alloc })
        }
    }
}

/// Scores the keys of one context's cache.
pub struct Scorer {
    /// The back ends of each thread, one for each kind of memory that it met.
    threads: Vec<Vec<Device>>,
}

impl Scorer {
    /// A scorer that works on `n_threads` layers at once.
    pub fn new(n_threads: usize) -> Self {
        Self { threads: (0..n_threads.max(1)).map(|_| Vec::new()).collect() }
    }

    /// Gives the compute memory back and says how many bytes it was.
    pub fn release(&mut self) -> usize {
        // SAFETY: valid allocators.
        self.threads
            .iter_mut()
            .flat_map(|devices| devices.drain(..))
            .map(|d| unsafe { sys::ggml_gallocr_get_buffer_size(d.alloc, 0) })
            .sum()
    }

    /// Computes the scores of every KV head, layer by layer, and hands them to `sink(head, scores)`, where `head` counts
    /// over all layers and scores are indexed by the place in `cells`. `queries` gives those of the i-th layer.
    /// `account_error`: raise logits by half their variance where K is quantized.
    ///
    /// # Errors
    /// [`ScoreError`], or what `queries` fails with; the cache is only read.
    pub fn score<E: From<ScoreError>>(
        &mut self,
        layout: &Layout,
        cells: &[Cell],
        needs: Needs,
        account_error: bool,
        mut queries: impl FnMut(usize) -> Result<LayerQueries, E>,
        mut sink: impl FnMut(usize, &HeadScores),
    ) -> Result<(), E> {
        let in_order = cells.iter().enumerate().all(|(i, c)| c.index as usize == i);
        let view = CellsView::new(cells);
        let mut head = 0;
        let mut gathered = Gathered::default();
        let n_threads = self.threads.len();
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
                });
            }
            for scores in compute_all(&mut self.threads, &graphs, needs) {
                for scores in scores? {
                    if in_order {
                        sink(head, &scores.as_head());
                    } else {
                        sink(head, &gathered.fill(&scores, cells, view.n_kv));
                    }
                    head += 1;
                }
            }
        }
        Ok(())
    }
}

/// Computes each graph on a thread of its own; the first on this one.
fn compute_all(
    threads: &mut [Vec<Device>],
    graphs: &[LayerGraph],
    needs: Needs,
) -> Vec<Result<Vec<CellScores>, ScoreError>> {
    let run = |devices: &mut Vec<Device>, graph: &LayerGraph| graph.compute(device_for(devices, graph.layer)?, needs);
    std::thread::scope(|scope| {
        let mut work = threads.iter_mut().zip(graphs);
        let first = work.next();
        let others: Vec<_> = work.map(|(devices, graph)| scope.spawn(move || run(devices, graph))).collect();
        let first = first.map(|(devices, graph)| run(devices, graph));
        // ggml aborts rather than unwinds, and this crate's code in a graph does not panic
        first.into_iter().chain(others.into_iter().map(|t| t.join().expect("no panic in a graph"))).collect()
    })
}

/// The back end for the memory that holds this layer's K.
fn device_for<'a>(devices: &'a mut Vec<Device>, layer: &sys::gvote_shim_layer) -> Result<&'a mut Device, ScoreError> {
    // SAFETY: K's storage lives as long as the context, which the caller of `score` holds.
    let buffer_type = unsafe { sys::ggml_backend_buffer_get_type((*layer.k).buffer) };
    let i = match devices.iter().position(|d| d.buffer_type == buffer_type) {
        Some(i) => i,
        None => {
            devices.push(Device::new(buffer_type)?);
            devices.len() - 1
        }
    };
    Ok(&mut devices[i])
}

/// The cells of the sequence as the kernels see them: the first `n_kv` cells of the stream.
struct CellsView {
    n_kv: usize,
    /// Position of each cell, -1 where the sequence owns none.
    pos: Vec<Pos>,
}

/// What to add to the logits of the cells from `first` on; cells before it are seen by every query.
struct Mask {
    first: usize,
    /// `[n_query][n_kv - first]`, 0 or -inf
    data: Vec<f32>,
}

impl CellsView {
    fn new(cells: &[Cell]) -> Self {
        let n_kv = cells.iter().map(|c| c.index as usize + 1).max().unwrap_or(0);
        let mut pos = vec![-1; n_kv];
        for cell in cells {
            pos[cell.index as usize] = cell.pos;
        }
        Self { n_kv, pos }
    }

    fn mask(&self, query_pos: &[Pos]) -> Mask {
        let oldest = query_pos.iter().copied().min().unwrap_or(0);
        let seen_by_all = |p: &Pos| *p >= 0 && *p <= oldest;
        let first = self.pos.iter().position(|p| !seen_by_all(p)).unwrap_or(self.n_kv);
        let data = query_pos
            .iter()
            .flat_map(|q| {
                self.pos[first..].iter().map(move |p| if *p >= 0 && p <= q { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        Mask { first, data }
    }
}

/// Scores of one KV head, indexed by cell.
#[derive(Default)]
struct CellScores {
    observed: Vec<f32>,
    future: Vec<f32>,
    each: Vec<f32>,
}

impl CellScores {
    fn as_head(&self) -> HeadScores<'_> {
        HeadScores { future: &self.future, observed: &self.observed, each: &self.each }
    }
}

/// Scores of one KV head, indexed by place in the sequence: where the cells are not in order.
#[derive(Default)]
struct Gathered(CellScores);

impl Gathered {
    fn fill(&mut self, from: &CellScores, cells: &[Cell], n_kv: usize) -> HeadScores<'_> {
        let gather = |out: &mut Vec<f32>, data: &[f32]| {
            out.clear();
            for row in data.chunks_exact(n_kv) {
                out.extend(cells.iter().map(|c| row[c.index as usize]));
            }
        };
        gather(&mut self.0.observed, &from.observed);
        gather(&mut self.0.future, &from.future);
        gather(&mut self.0.each, &from.each);
        self.0.as_head()
    }
}

type Tensor = *mut sys::ggml_tensor;

/// A graph under construction, with the data its inputs get.
struct Builder {
    ctx: *mut sys::ggml_context,
    graph: *mut sys::ggml_cgraph,
    inputs: Vec<(Tensor, Vec<f32>)>,
}

impl Drop for Builder {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once; the tensors' data belongs to the allocator.
        unsafe { sys::ggml_free(self.ctx) };
    }
}

impl Builder {
    fn new(n_nodes: usize) -> Result<Self, ScoreError> {
        // SAFETY: a context for descriptions only; sizes come from ggml.
        unsafe {
            let ctx = sys::ggml_init(sys::ggml_init_params {
                mem_size: n_nodes * sys::ggml_tensor_overhead() + sys::ggml_graph_overhead_custom(n_nodes, false),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            });
            if ctx.is_null() {
                return Err(ScoreError::Memory("graph"));
            }
            let graph = sys::ggml_new_graph_custom(ctx, n_nodes, false);
            Ok(Self { ctx, graph, inputs: Vec::new() })
        }
    }

    fn input(&mut self, ne: [usize; 3], data: Vec<f32>) -> Tensor {
        debug_assert_eq!(data.len(), ne.iter().product::<usize>());
        // SAFETY: the context has room for the tensor.
        let t = unsafe {
            let t = sys::ggml_new_tensor_3d(self.ctx, sys::GGML_TYPE_F32, ne[0] as i64, ne[1] as i64, ne[2] as i64);
            sys::ggml_set_input(t);
            t
        };
        self.inputs.push((t, data));
        t
    }

    /// Appends a node; ggml keeps the order of these calls.
    fn run(&mut self, t: Tensor) -> Tensor {
        // SAFETY: the tensor belongs to this context.
        unsafe { sys::ggml_build_forward_expand(self.graph, t) };
        t
    }

    fn output(&mut self, t: Tensor) -> Tensor {
        // SAFETY: the tensor belongs to this context.
        unsafe { sys::ggml_set_output(t) };
        self.run(t)
    }

    fn compute(&mut self, device: &mut Device) -> Result<(), ScoreError> {
        // SAFETY: the graph is complete; inputs are allocated before they are set and sized as declared.
        unsafe {
            if !sys::ggml_gallocr_alloc_graph(device.alloc, self.graph) {
                return Err(ScoreError::Memory("compute buffer"));
            }
            for (t, data) in &self.inputs {
                sys::ggml_backend_tensor_set(*t, data.as_ptr().cast(), 0, std::mem::size_of_val(&data[..]));
            }
            match sys::ggml_backend_graph_compute(device.backend, self.graph) {
                sys::GGML_STATUS_SUCCESS => Ok(()),
                status => Err(ScoreError::Compute(status)),
            }
        }
    }
}

/// Reads a contiguous f32 result, if there is one, appending to `out`.
fn append(out: &mut Vec<f32>, t: Tensor) {
    if t.is_null() {
        return;
    }
    // SAFETY: the tensor was computed and stays allocated until the next graph.
    unsafe {
        let n = sys::ggml_nelements(t) as usize;
        let start = out.len();
        out.resize(start + n, 0.0);
        sys::ggml_backend_tensor_get(t, out[start..].as_mut_ptr().cast(), 0, n * size_of::<f32>());
    }
}

/// Which result a query counts for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Observed,
    Future,
}

/// A chunk of queries in one layer's graph.
struct QuerySet {
    target: Target,
    q: Tensor,    // [d, n, n_head]
    mask: Tensor, // [n_kv - first, n], NULL if every query sees every cell
    first: usize,
    weights: Tensor, // [1, n]
    errors: Tensor,  // [n_block, n, n_head], NULL without coarseness
}

struct LayerGraph<'a> {
    layer: &'a sys::gvote_shim_layer,
    stream: usize,
    view: &'a CellsView,
    queries: LayerQueries,
    coarseness: Option<Coarseness>,
}

// SAFETY: the layer's tensors are only read, and no one writes to the cache while it is scored.
unsafe impl Sync for LayerGraph<'_> {}

impl LayerGraph<'_> {
    /// The scores of each KV head.
    fn compute(&self, device: &mut Device, needs: Needs) -> Result<Vec<CellScores>, ScoreError> {
        let queries = &self.queries;
        let n_head = self.layer.n_head as usize;
        let n_head_kv = self.layer.n_head_kv as usize;
        let group = n_head / n_head_kv;
        let n_sets = queries.observed.pos.len().div_ceil(CHUNK) + queries.future.pos.len().div_ceil(CHUNK);
        // a query head's chain has at most 12 nodes and views; inputs and K views come on top
        let mut b = Builder::new((n_head * 12 + 8) * n_sets + n_head_kv * 8 + 32)?;

        let mut sets = Vec::with_capacity(n_sets);
        if needs.observed {
            self.add_sets(&mut b, &mut sets, Target::Observed, &queries.observed);
        }
        if needs.future || needs.each {
            self.add_sets(&mut b, &mut sets, Target::Future, &queries.future);
        }

        let mut outputs = Vec::with_capacity(n_head_kv);
        for kv in 0..n_head_kv {
            let k = self.k_view(&b, kv);
            let errors = self.error_view(&mut b, kv);
            let mut sums: [Tensor; 2] = [std::ptr::null_mut(); 2];
            let mut each = Vec::new();
            for head in kv * group..(kv + 1) * group {
                for set in &sets {
                    let p = self.probabilities(&mut b, set, k, errors, head);
                    if needs.each && set.target == Target::Future {
                        each.push(b.output(p));
                    }
                    // SAFETY: shapes [n_kv, n] and [1, n] give [n_kv, 1].
                    let mean = unsafe { sys::ggml_out_prod(b.ctx, p, set.weights) };
                    let sum = &mut sums[set.target as usize];
                    if sum.is_null() {
                        *sum = b.output(mean);
                    } else {
                        // SAFETY: same shapes; the sum is an output, so its memory stays ours.
                        let added = unsafe { sys::ggml_add_inplace(b.ctx, *sum, mean) };
                        b.run(added);
                    }
                }
            }
            outputs.push((sums, each));
        }

        b.compute(device)?;

        Ok(outputs
            .into_iter()
            .map(|([observed, future], each)| {
                let mut scores = CellScores::default();
                append(&mut scores.observed, observed);
                append(&mut scores.future, future);
                for t in each {
                    append(&mut scores.each, t);
                }
                scores
            })
            .collect())
    }

    fn add_sets(&self, b: &mut Builder, sets: &mut Vec<QuerySet>, target: Target, queries: &Queries) {
        let n_q = (self.layer.n_head * self.layer.n_embd_head_k) as usize;
        let group = (self.layer.n_head / self.layer.n_head_kv) as usize;
        let weight = 1.0 / (queries.pos.len() * group) as f32;
        for (pos, data) in queries.pos.chunks(CHUNK).zip(queries.data.chunks(CHUNK * n_q)) {
            sets.push(self.query_set(b, target, pos, data, weight));
        }
    }

    /// `data`: `[n_query][n_head][d]`
    fn query_set(&self, b: &mut Builder, target: Target, pos: &[Pos], data: &[f16], weight: f32) -> QuerySet {
        let n = pos.len();
        let d = self.layer.n_embd_head_k as usize;
        let n_head = self.layer.n_head as usize;

        let mut q = vec![0f32; n * n_head * d]; // [n_head][n_query][d]
        for (i, row) in data.chunks_exact(n_head * d).enumerate() {
            for (h, head) in row.chunks_exact(d).enumerate() {
                let out = &mut q[(h * n + i) * d..][..d];
                for (x, y) in out.iter_mut().zip(head) {
                    *x = y.to_f32();
                }
            }
        }

        let errors = match &self.coarseness {
            Some(c) => {
                // v/2 in units of the unscaled logit, so that one scale serves both: see the module's docs
                let factor = self.queries.scale.post * self.queries.scale.pre * c.variance / 2.0;
                let squares: Vec<f32> = q
                    .chunks_exact(c.block_size)
                    .map(|block| factor * block.iter().map(|x| x * x).sum::<f32>())
                    .collect();
                b.input([d / c.block_size, n, n_head], squares)
            }
            None => std::ptr::null_mut(),
        };
        let mask = match target {
            Target::Observed => self.view.mask(pos),
            Target::Future => self.view.mask(&vec![Pos::MAX; n]),
        };
        let first = mask.first;
        QuerySet {
            target,
            q: b.input([d, n, n_head], q),
            mask: if first < self.view.n_kv {
                b.input([self.view.n_kv - first, n, 1], mask.data)
            } else {
                std::ptr::null_mut()
            },
            first,
            weights: b.input([1, n, 1], vec![weight; n]),
            errors,
        }
    }

    /// K of one KV head. `[d, n_kv]`
    fn k_view(&self, b: &Builder, kv: usize) -> Tensor {
        let d = i64::from(self.layer.n_embd_head_k);
        // SAFETY: the view stays inside K's storage: n_kv cells of one stream, one head of each row.
        unsafe {
            let k = self.layer.k;
            let offset = self.stream * (*k).nb[2] + kv * sys::ggml_row_size((*k).type_, d);
            sys::ggml_view_2d(b.ctx, k, d, self.view.n_kv as i64, (*k).nb[1], offset)
        }
    }

    /// Squared block scales of one KV head. `[n_block, n_kv]` f32, or NULL where K is not quantized.
    fn error_view(&self, b: &mut Builder, kv: usize) -> Tensor {
        let Some(c) = &self.coarseness else {
            return std::ptr::null_mut();
        };
        let n_block = self.layer.n_embd_head_k as usize / c.block_size;
        // SAFETY: as in k_view; the scale is the first f16 of each block, so every element lies inside the storage.
        // ggml has no view that changes the type; the description alone is changed, the bytes are read as they are.
        unsafe {
            let k = self.layer.k;
            let row = (*k).nb[1];
            let offset = self.stream * (*k).nb[2] + kv * n_block * c.block_bytes;
            let view = sys::ggml_view_2d(b.ctx, k, c.block_size as i64, 1, row, offset);
            (*view).type_ = sys::GGML_TYPE_F16;
            (*view).ne = [1, n_block as i64, self.view.n_kv as i64, 1];
            (*view).nb = [size_of::<f16>(), c.block_bytes, row, row * self.view.n_kv];
            let scales = sys::ggml_cast(b.ctx, view, sys::GGML_TYPE_F32);
            let scales = sys::ggml_reshape_2d(b.ctx, scales, n_block as i64, self.view.n_kv as i64);
            let squared = sys::ggml_sqr(b.ctx, scales);
            b.run(squared)
        }
    }

    /// Softmax of one query head's logits over all cells. `[n_kv, n_query]`
    fn probabilities(&self, b: &mut Builder, set: &QuerySet, k: Tensor, errors: Tensor, head: usize) -> Tensor {
        let ctx = b.ctx;
        let head_of = |t: Tensor| {
            // SAFETY: one matrix of a contiguous 3d input.
            unsafe { sys::ggml_view_2d(ctx, t, (*t).ne[0], (*t).ne[1], (*t).nb[1], head * (*t).nb[2]) }
        };
        // SAFETY: shapes as noted; every tensor belongs to this context.
        unsafe {
            let kq = sys::ggml_mul_mat(b.ctx, k, head_of(set.q)); // [n_kv, n]
            let mut kq = b.run(kq);
            if !errors.is_null() {
                let error = sys::ggml_mul_mat(b.ctx, errors, head_of(set.errors)); // [n_kv, n]
                kq = sys::ggml_add_inplace(b.ctx, kq, error);
                b.run(kq);
            }
            let mut scale = self.queries.scale.post;
            if self.queries.scale.softcap {
                kq = sys::ggml_scale_inplace(b.ctx, kq, self.queries.scale.pre);
                kq = sys::ggml_tanh_inplace(b.ctx, kq);
                kq = b.run(kq);
            } else {
                scale *= self.queries.scale.pre;
            }
            if !set.mask.is_null() {
                // only the newest cells can be hidden from a query: the rest of the block is not touched
                let offset = set.first * size_of::<f32>();
                let nb = (*kq).nb;
                kq = sys::ggml_acc_inplace(b.ctx, kq, set.mask, nb[1], nb[2], nb[3], offset);
                b.run(kq);
            }
            let p = sys::ggml_soft_max_ext_inplace(b.ctx, kq, std::ptr::null_mut(), scale, 0.0);
            b.run(p)
        }
    }
}
