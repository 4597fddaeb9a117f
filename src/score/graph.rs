//! The ggml graph that scores one layer: every score is one row of the results.

use std::ops::Range;

use half::f16;

use super::LayerQueries;
use super::measure::{GRAM, STEP};
use super::results::{LayerScores, Rows};
use crate::backend::{Builder, ComputeError, Device, Results, Tensor};
use crate::cache::Cell;
use crate::llama::Pos;
use crate::policy::Needs;
use crate::sys;

/// Columns of a product on the host (a few queries of one KV head). They bound the transient memory to one `[n_kv, columns]` block of f32
/// per thread.
const HOST_COLUMNS: usize = 18;
/// Rows of heads that are measured at once on the host: as f32 they stay in the CPU's cache.
const HOST_CELLS: usize = 512;

/// How a type stores its scale, for the variance of a key's rounding error.
pub(super) struct Coarseness {
    /// Bytes of a block, which begins with the f16 scale.
    block_bytes: usize,
    block_size: usize,
    /// Variance of the rounding error in units of the squared scale.
    variance: f32,
}

impl Coarseness {
    /// Types of ggml-common.h whose blocks begin with the scale; `None` for types whose error is negligible.
    pub(super) fn of(type_: sys::ggml_type) -> Option<Self> {
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

/// The sequence's cells as the kernels see them: the first `n_kv` cells of the stream.
pub(super) struct CellsView {
    pub(super) n_kv: usize,
    /// Position of each cell, -1 if the sequence does not own it.
    pos: Vec<Pos>,
    /// 1 for each cell that the sequence owns, else 0; long enough for all cells that are measured.
    pub(super) owned: Vec<f32>,
    /// Indices of the cells.
    pub(super) numbers: Vec<u32>,
}

/// Addends to the logits of the cells from `first` on. Every query sees the cells before `first`.
struct Mask {
    first: usize,
    /// `[n_query][n_kv - first]`, 0 or -inf
    data: Vec<f32>,
}

impl CellsView {
    pub(super) fn new(cells: &[Cell]) -> Self {
        let n_kv = cells.iter().map(|c| c.index as usize + 1).max().unwrap_or(0);
        let mut pos = vec![-1; n_kv];
        for cell in cells {
            pos[cell.index as usize] = cell.pos;
        }
        let mut owned: Vec<f32> = pos.iter().map(|p| if *p >= 0 { 1.0 } else { 0.0 }).collect();
        owned.resize(n_kv.next_multiple_of(STEP), 0.0);
        Self { n_kv, pos, owned, numbers: (0..n_kv as u32).collect() }
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

/// A chunk of queries in one layer's graph, observed queries first.
pub(super) struct QuerySet {
    /// `[d, n_head, n]` f16; with a coarse grain, the output of [`LayerGraph::by_kv_head`] for all heads.
    data: Tensor,
    mask: Tensor, // [n_kv - first, 1, n], NULL if every query sees every cell
    first: usize,
    /// Index of the chunk's first query among all queries.
    pub(super) start: usize,
    pub(super) n: usize,
}

/// Logits of a chunk of queries.
pub(super) struct Logits {
    /// Logits before multiplication by `scale`. `[n_kv, group * n, kv_heads]`: for each query the heads of a group.
    pub kq: Tensor,
    pub scale: f32,
    /// Node that masks some of the cells, or NULL: to be passed to [`Builder::run_after`].
    pub masked: Tensor,
}

/// Amount of work of one node.
#[derive(Clone, Copy)]
pub(super) struct Grain {
    /// Columns of a product: queries times query heads of a KV head.
    pub columns: usize,
    /// KV heads whose keys meet queries in one product.
    pub kv_heads: usize,
    /// Cells whose keys and values are measured at once, for all heads: a multiple of `step`.
    pub cells: usize,
    /// Granularity of measuring: the last cells may not belong to the sequence.
    pub step: usize,
    /// Whether the grain is for a device, where nodes are expensive and memory is not: everything is one graph, and cells are measured
    /// channel by channel rather than row by row.
    pub is_coarse: bool,
}

impl Grain {
    /// Grain for the host: a few queries of one head, and cells that stay in the CPU's cache.
    pub fn on_host(layer: &sys::gvote_shim_layer) -> Self {
        let cells = (HOST_CELLS / layer.n_head_kv as usize).max(1);
        Self { columns: HOST_COLUMNS, kv_heads: 1, cells, step: 1, is_coarse: false }
    }

    /// Bytes that `n_query` queries of a KV head need at once.
    pub fn least_room(layer: &sys::gvote_shim_layer, n_kv: usize, n_query: usize) -> usize {
        Self::bytes_of_row(n_kv) * (Self::columns(layer, n_query) + Self::channels(layer))
    }

    fn columns(layer: &sys::gvote_shim_layer, n_query: usize) -> usize {
        n_query.max(1) * (layer.n_head / layer.n_head_kv) as usize
    }

    fn bytes_of_row(n_kv: usize) -> usize {
        n_kv.max(1) * size_of::<f32>()
    }

    fn channels(layer: &sys::gvote_shim_layer) -> usize {
        layer.n_embd_head_k.max(layer.n_embd_head_v) as usize
    }

    /// Largest grain that fits into `room` bytes, with at most `n_query` queries at once. `n_cells`: cells of a stream.
    pub fn on_device(layer: &sys::gvote_shim_layer, n_kv: usize, n_cells: usize, n_query: usize, room: usize) -> Self {
        let n_head_kv = layer.n_head_kv as usize;
        let d = Self::channels(layer);
        let number = Self::bytes_of_row(n_kv);
        // a head's keys are converted to f32 on the way
        let columns = (room / number).saturating_sub(d).clamp(1, Self::columns(layer, n_query));
        let kv_heads = (room / (number * (columns + d))).clamp(1, n_head_kv);
        // chunks of equal size
        let kv_heads = n_head_kv.div_ceil(n_head_kv.div_ceil(kv_heads));
        // llama.cpp's streams have a multiple of 256 cells; no step extends beyond the last cell
        let step = STEP.min(n_cells & n_cells.wrapping_neg()).max(1);
        // converted to f32, and squared or multiplied with each other
        let of_row = d + d.max(GRAM).max(n_head_kv);
        let cells = room / (n_head_kv * of_row * size_of::<f32>());
        Self { columns, kv_heads, cells: (cells / step * step).max(step), step, is_coarse: true }
    }
}

/// The inputs and settings for scoring one layer.
pub(super) struct LayerGraph<'a> {
    pub layer: &'a sys::gvote_shim_layer,
    pub stream: usize,
    pub view: &'a CellsView,
    pub queries: LayerQueries<'a>,
    pub coarseness: Option<Coarseness>,
    pub grain: Grain,
    /// Whether V is stored transposed, in rows of `n_cells` cells.
    pub v_trans: bool,
    pub n_cells: usize,
}

// SAFETY: the layer's tensors are only read, and no one writes to the cache while it is scored.
unsafe impl Send for LayerGraph<'_> {}

/// Upper bounds on the number of tensors: for a chunk of queries; for its logits with some KV heads; in addition, for coarse keys and for a
/// softcap; for a mean over the queries; for their fourth powers; for each query head that is recorded by itself.
const SET_NODES: usize = 8;
const LOGITS_NODES: usize = 9;
const ERROR_NODES: usize = 8;
const SOFTCAP_NODES: usize = 2;
const MEAN_NODES: usize = 10;
const POWERS_NODES: usize = 14;
const EACH_NODES: usize = 3;
/// For a chunk of cells on the host and on a device, for a chunk of heads, and for everything else.
const CELLS_NODES: usize = 40;
const DEVICE_CELLS_NODES: usize = 56;
const HEADS_NODES: usize = 8;
const OTHER_NODES: usize = 32;

impl LayerGraph<'_> {
    /// Starts computing the scores of keys and values alone, which stay on the device for [`Self::compute`]. Returns their location; None
    /// if the device has no room for them. `n_layers`: number of layers that will be requested.
    pub fn measure_ahead(
        &self,
        device: &mut Device,
        needs: Needs,
        n_layers: usize,
    ) -> Result<Option<usize>, ComputeError> {
        let rows = Rows::new(self.view.n_kv, self.n_head_kv(), needs, 0);
        let part = rows.measures();
        if !device.has_room(part.len() * rows.n_kv * size_of::<f32>(), n_layers) {
            return Ok(None);
        }
        let mut b = Builder::on(device, self.n_nodes(0, 0, false, true))?;
        let mut out = b.results(rows.n_kv, part);
        let at = out.keep(device);
        self.measure(&mut b, &mut out, &rows);
        b.begin(device)?;
        if !device.is_on_its_own() {
            device.wait()?;
        }
        Ok(Some(at))
    }

    /// Computes the scores of each KV head into `scores`. `measured`: the result of [`Self::measure_ahead`].
    pub fn compute(
        &self,
        device: &mut Device,
        needs: Needs,
        measured: Option<usize>,
        scores: &mut LayerScores,
    ) -> Result<(), ComputeError> {
        let LayerQueries { pos, n_observed, .. } = &self.queries;
        let n_future = pos.len() - n_observed;
        let rows = Rows::new(self.view.n_kv, self.n_head_kv(), needs, self.group() * n_future);
        scores.resize(rows)?;

        let (looks, measures) = (rows.looks(), rows.measures());
        match measured {
            Some(at) => {
                self.compute_rows(device, needs, scores, looks)?;
                device.read_kept(&mut scores.data[measures.start * rows.n_kv..measures.end * rows.n_kv], at)?;
            }
            None if self.grain.is_coarse => self.compute_rows(device, needs, scores, looks.start..measures.end)?,
            // one after the other, they need less memory
            None => {
                self.compute_rows(device, needs, scores, looks)?;
                self.compute_rows(device, needs, scores, measures)?;
            }
        }
        if needs.expected {
            self.expect(device, scores)?;
        }
        Ok(())
    }

    /// Computes some of the rows of the results: those that depend on queries, those of keys and values alone, or both.
    fn compute_rows(
        &self,
        device: &mut Device,
        needs: Needs,
        scores: &mut LayerScores,
        part: Range<usize>,
    ) -> Result<(), ComputeError> {
        let rows = scores.rows;
        if part.is_empty() {
            return Ok(());
        }
        let looks = part.start < rows.looks().end;
        let measures = part.end > rows.measures().start;
        let n_query = if looks { self.queries.pos.len() } else { 0 };
        let n_each = if needs.each { self.layer.n_head as usize } else { 0 };
        let mut b = Builder::on(device, self.n_nodes(n_query, n_each, needs.fourth_powers, measures))?;
        let mut out = b.results(rows.n_kv, part.clone());
        if looks {
            self.look(&mut b, &mut out, &rows);
        }
        if measures {
            self.measure(&mut b, &mut out, &rows);
        }
        b.begin(device)?;
        device.read(&mut scores.data[part.start * rows.n_kv..part.end * rows.n_kv], out.tensor)
    }

    /// Upper bound on the tensors of a graph for `n_query` queries. `n_each`: query heads whose probabilities are recorded one by one;
    /// `powers`: whether fourth powers are summed; `measures`: whether keys and values are measured.
    pub(super) fn n_nodes(&self, n_query: usize, n_each: usize, powers: bool, measures: bool) -> usize {
        let n_sets = n_query.div_ceil(self.queries_at_once());
        let head_chunks = self.n_head_kv().div_ceil(self.grain.kv_heads);
        let cell_chunks = self.view.n_kv.div_ceil(self.grain.cells);
        let of = |nodes: usize, is_there: bool| if is_there { nodes } else { 0 };
        let logits = LOGITS_NODES
            + of(ERROR_NODES, self.coarseness.is_some())
            + of(SOFTCAP_NODES, self.queries.scale.softcap)
            + of(POWERS_NODES, powers);
        // at most one chunk has queries of both kinds
        let chunks = n_sets * logits + (n_sets + 1) * MEAN_NODES;
        n_sets * (SET_NODES + n_each * EACH_NODES)
            + head_chunks * (chunks + HEADS_NODES)
            + of(cell_chunks * if self.grain.is_coarse { DEVICE_CELLS_NODES } else { CELLS_NODES }, measures)
            + OTHER_NODES
    }

    /// Computes the attention of the queries: the mean probabilities of the observed and of the future queries and, if requested, the sum
    /// of the observed ones' fourth powers, and each future probability.
    fn look<'b>(&'b self, b: &mut Builder<'b>, out: &mut Results, rows: &Rows) {
        let LayerQueries { pos, n_observed, .. } = &self.queries;
        let (n_query, group) = (pos.len(), self.group());
        let (observes, foresees) = (rows.observed.of_head > 0, rows.future.of_head > 0);
        let first = if observes { 0 } else { *n_observed };
        let end = if foresees { n_query } else { *n_observed };
        let sets = self.query_sets(b, first..end);
        let heads = self.grain.kv_heads;
        let mut weights = |is_needed: bool, n: usize| {
            let columns = n.min(self.queries_at_once()) * group;
            let mut weights = || b.input([1, columns, heads], vec![1.0 / (n * group) as f32; columns * heads]);
            if is_needed { weights() } else { std::ptr::null_mut() }
        };
        let observed_weights = weights(observes, *n_observed);
        let future_weights = weights(foresees, n_query - n_observed);
        // if all queries form one set, one product computes both means
        let both_weights = (observes && foresees && sets.len() == 1).then(|| {
            let [observed, future] = [*n_observed, n_query - n_observed].map(|n| n * group);
            let of_observed = std::iter::repeat_n([1.0 / observed as f32, 0.0], observed);
            let of_head = of_observed.chain(std::iter::repeat_n([0.0, 1.0 / future as f32], future));
            b.input([2, n_query * group, heads], of_head.flatten().collect::<Vec<_>>().repeat(heads))
        });
        for (kv, kv_heads) in self.head_chunks() {
            let k = self.k_rows(b, kv, kv_heads, 0, rows.n_kv);
            let errors = self.error_view(b, kv, kv_heads);
            for set in &sets {
                let Logits { kq, scale, masked } = self.logits(b, set, k, errors, kv);
                // SAFETY: a contiguous tensor of this context.
                let p = unsafe { sys::ggml_soft_max_ext_inplace(b.ctx, kq, std::ptr::null_mut(), scale, 0.0) };
                b.run_after(masked, p);
                let observed = n_observed.saturating_sub(set.start).min(set.n);
                let future = set.n - observed;
                if let Some(weights) = both_weights {
                    b.write(out, rows.observed.at(kv), self.sum_over_queries(b, p, weights));
                } else if future > 0 {
                    let p = self.columns(b, p, observed, future);
                    b.write(out, rows.future.at(kv), self.sum_over_queries(b, p, future_weights));
                }
                if future > 0 && rows.each.of_head > 0 {
                    for head in 0..kv_heads * group {
                        let done = set.start + observed - n_observed;
                        let row = rows.each.first + (kv * group + head) * (n_query - n_observed) + done;
                        let block = self.block_of(b, p, head, observed, future);
                        b.write_part(out, row, 0, block);
                    }
                }
                if observed > 0 {
                    let p = self.columns(b, p, 0, observed);
                    if both_weights.is_none() {
                        b.write(out, rows.observed.at(kv), self.sum_over_queries(b, p, observed_weights));
                    }
                    if rows.fourth_powers.of_head > 0 {
                        // SAFETY: p is read for the last time.
                        let powers = unsafe {
                            let powers = sys::ggml_sqr_inplace(b.ctx, sys::ggml_sqr_inplace(b.ctx, p));
                            let mean = self.sum_over_queries(b, powers, observed_weights);
                            sys::ggml_scale_inplace(b.ctx, mean, (n_observed * group) as f32)
                        };
                        b.write(out, rows.fourth_powers.at(kv), powers);
                    }
                }
            }
        }
    }

    pub(super) fn n_head_kv(&self) -> usize {
        self.layer.n_head_kv as usize
    }

    /// Query heads per KV head.
    pub(super) fn group(&self) -> usize {
        (self.layer.n_head / self.layer.n_head_kv) as usize
    }

    fn queries_at_once(&self) -> usize {
        (self.grain.columns / self.group()).max(1)
    }

    /// Chunks of KV heads that are processed at once: the first head, and their number.
    pub(super) fn head_chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (n, at_once) = (self.n_head_kv(), self.grain.kv_heads);
        (0..n).step_by(at_once).map(move |first| (first, at_once.min(n - first)))
    }

    /// Splits a range of the queries into chunks.
    pub(super) fn query_sets<'b>(&'b self, b: &mut Builder<'b>, which: Range<usize>) -> Vec<QuerySet> {
        let (d, n_head) = (self.layer.n_embd_head_k as usize, self.layer.n_head as usize);
        let at_once = self.queries_at_once();
        let set = |start: usize| {
            let n = at_once.min(which.end - start);
            let Mask { first, data: mask } = self.view.mask(&self.queries.pos[start..start + n]);
            let n_newest = self.view.n_kv - first;
            let numbers = self.queries.numbers(start * d * n_head..(start + n) * d * n_head);
            let halves = b.halves([d, n_head, n], numbers);
            QuerySet {
                data: if self.grain.is_coarse { self.by_kv_head(b, halves, 0, self.n_head_kv()) } else { halves },
                mask: if n_newest > 0 { b.input([n_newest, 1, n], mask) } else { std::ptr::null_mut() },
                first,
                start,
                n,
            }
        };
        which.clone().step_by(at_once).map(set).collect()
    }

    /// Selects from queries `[d, n_head, n]` f16 those of `kv_heads` KV heads from `kv` on, as f32, one KV head after another.
    /// `[d, group * n, kv_heads]`
    fn by_kv_head(&self, b: &Builder, queries: Tensor, kv: usize, kv_heads: usize) -> Tensor {
        // SAFETY: shapes as noted; every tensor belongs to this context.
        unsafe {
            let ([d, _, n, _], [_, nb1, nb2, _]) = ((*queries).ne, (*queries).nb);
            let (group, heads) = (self.group() as i64, kv_heads as i64);
            let of_kv = nb1 * group as usize;
            let own = sys::ggml_view_4d(b.ctx, queries, d, group, heads, n, nb1, of_kv, nb2, kv * of_kv);
            let floats = sys::ggml_cast(b.ctx, sys::ggml_permute(b.ctx, own, 0, 1, 3, 2), sys::GGML_TYPE_F32);
            sys::ggml_reshape_3d(b.ctx, floats, d, group * n, heads)
        }
    }

    /// View of K for `kv_heads` heads from `kv` on, in `n` cells from `first` on. `[d, n, kv_heads]` of K's type
    pub(super) fn k_rows(&self, b: &Builder, kv: usize, kv_heads: usize, first: usize, n: usize) -> Tensor {
        self.head_rows(b, self.layer.k, self.layer.n_embd_head_k, kv..kv + kv_heads, first..first + n)
    }

    /// View of K or V for some heads and cells, if it is stored in rows. `[d, n, heads]`
    pub(super) fn head_rows(
        &self,
        b: &Builder,
        storage: Tensor,
        d: u32,
        heads: Range<usize>,
        cells: Range<usize>,
    ) -> Tensor {
        let d = i64::from(d);
        // SAFETY: the view stays inside the storage: cells of one stream, some heads of each row.
        unsafe {
            let row = (*storage).nb[1];
            let head = sys::ggml_row_size((*storage).type_, d);
            let offset = self.stream * (*storage).nb[2] + cells.start * row + heads.start * head;
            sys::ggml_view_3d(b.ctx, storage, d, cells.len() as i64, heads.len() as i64, row, head, offset)
        }
    }

    /// Squared block scales of `kv_heads` heads from `kv` on. `[n_block, n_kv, kv_heads]` f32, or NULL if K is not quantized.
    fn error_view(&self, b: &mut Builder, kv: usize, kv_heads: usize) -> Tensor {
        let Some(c) = &self.coarseness else {
            return std::ptr::null_mut();
        };
        let n_block = self.layer.n_embd_head_k as usize / c.block_size;
        // SAFETY: as in k_rows; the scale is the first f16 of each block, so every element lies inside the storage.
        // ggml has no view that changes the type; the description alone is changed, the bytes are read as they are.
        unsafe {
            let k = self.layer.k;
            let row = (*k).nb[1];
            let head = n_block * c.block_bytes;
            let offset = self.stream * (*k).nb[2] + kv * head;
            let view = sys::ggml_view_2d(b.ctx, k, c.block_size as i64, 1, row, offset);
            (*view).type_ = sys::GGML_TYPE_F16;
            (*view).ne = [1, n_block as i64, self.view.n_kv as i64, kv_heads as i64];
            (*view).nb = [size_of::<f16>(), c.block_bytes, row, head];
            let scales = sys::ggml_cast(b.ctx, view, sys::GGML_TYPE_F32);
            let n_kv = self.view.n_kv as i64;
            let scales = sys::ggml_reshape_3d(b.ctx, scales, n_block as i64, n_kv, kv_heads as i64);
            let squared = sys::ggml_sqr(b.ctx, scales);
            b.run(squared)
        }
    }

    /// Logits of the queries of `set` that belong to the KV heads from `kv` on, with the keys `k`.
    pub(super) fn logits(&self, b: &mut Builder, set: &QuerySet, k: Tensor, errors: Tensor, kv: usize) -> Logits {
        let (n, group) = (set.n as i64, self.group() as i64);
        // SAFETY: shapes as noted; every tensor belongs to this context.
        unsafe {
            let [d, n_kv, kv_heads, _] = (*k).ne;
            let q = if self.grain.is_coarse {
                let [_, nb1, nb2, _] = (*set.data).nb;
                sys::ggml_view_3d(b.ctx, set.data, d, group * n, kv_heads, nb1, nb2, kv * nb2)
            } else {
                self.by_kv_head(b, set.data, kv, kv_heads as usize)
            };
            let kq = sys::ggml_mul_mat(b.ctx, k, q);
            // the precision that llama.cpp's attention uses
            sys::ggml_mul_mat_set_prec(kq, sys::GGML_PREC_F32);
            let mut kq = b.run(kq);
            if let Some(c) = &self.coarseness
                && !errors.is_null()
            {
                let error = sys::ggml_mul_mat(b.ctx, errors, self.squares(b, q, c));
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
            let mut masked = std::ptr::null_mut();
            if !set.mask.is_null() {
                // only the newest cells can be hidden from a query: the rest of the block is not touched
                let nb1 = (*kq).nb[1];
                let n_newest = (*set.mask).ne[0];
                let offset = set.first * size_of::<f32>();
                let (of_query, of_head) = (nb1 * group as usize, (*kq).nb[2]);
                let newest = sys::ggml_view_4d(b.ctx, kq, n_newest, group, n, kv_heads, nb1, of_query, of_head, offset);
                masked = b.run(sys::ggml_add_inplace(b.ctx, newest, set.mask));
            }
            debug_assert_eq!((*kq).ne, [n_kv, group * n, kv_heads, 1]);
            Logits { kq, scale, masked }
        }
    }

    /// Half the variance of a logit for a key of scale 1, in units of the unscaled logit so that one scale serves both: see the module's
    /// docs. `q` `[d, n, heads]` gives `[n_block, n, heads]`.
    fn squares(&self, b: &Builder, q: Tensor, c: &Coarseness) -> Tensor {
        let factor = self.queries.scale.post * self.queries.scale.pre * c.variance / 2.0;
        // SAFETY: shapes as noted; every tensor belongs to this context.
        unsafe {
            let [d, n, heads, _] = (*q).ne;
            let n_block = d / c.block_size as i64;
            let blocks = sys::ggml_reshape_2d(b.ctx, q, c.block_size as i64, n_block * n * heads);
            let squares = sys::ggml_sum_rows(b.ctx, sys::ggml_sqr(b.ctx, blocks));
            let squares = sys::ggml_scale(b.ctx, squares, factor);
            sys::ggml_reshape_3d(b.ctx, squares, n_block, n, heads)
        }
    }

    /// View of `n` queries from `first` on in `p` `[n_kv, group * n_query, kv_heads]`.
    fn columns(&self, b: &Builder, p: Tensor, first: usize, n: usize) -> Tensor {
        let group = self.group();
        // SAFETY: a part of p.
        unsafe {
            let [n_kv, _, kv_heads, _] = (*p).ne;
            let [_, nb1, nb2, _] = (*p).nb;
            sys::ggml_view_3d(b.ctx, p, n_kv, (n * group) as i64, kv_heads, nb1, nb2, first * group * nb1)
        }
    }

    /// Sums of `p` `[n_kv, group * n, kv_heads]` over the queries of each KV head, one for each row of `weights`. `[n_kv, sums, kv_heads]`
    fn sum_over_queries(&self, b: &Builder, p: Tensor, weights: Tensor) -> Tensor {
        // SAFETY: there are weights for the largest set.
        unsafe {
            let [_, n, kv_heads, _] = (*p).ne;
            let ([sums, ..], [_, nb1, nb2, _]) = ((*weights).ne, (*weights).nb);
            b.out_prod(p, sys::ggml_view_3d(b.ctx, weights, sums, n, kv_heads, nb1, nb2, 0))
        }
    }

    /// View of one query head, the `head`-th, and of `n` queries from `first` on in `p` `[n_kv, group * n_query, kv_heads]`. `[n_kv, n]`
    fn block_of(&self, b: &Builder, p: Tensor, head: usize, first: usize, n: usize) -> Tensor {
        let group = self.group();
        // SAFETY: a part of p.
        unsafe {
            let [_, nb1, nb2, _] = (*p).nb;
            let offset = head / group * nb2 + (first * group + head % group) * nb1;
            sys::ggml_view_2d(b.ctx, p, (*p).ne[0], n as i64, group * nb1, offset)
        }
    }
}
