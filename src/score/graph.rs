//! The graph of one layer: every score of it is one row of the results.

use half::f16;

use super::LayerQueries;
use super::results::{Block, LayerScores, Rows};
use crate::backend::{Builder, ComputeError, Device, Results, Tensor, read};
use crate::cache::Cell;
use crate::llama::Pos;
use crate::capture::Queries;
use crate::policy::Needs;
use crate::sys;

/// On the host, columns of a product (a few queries of one KV head): they bound the transient memory to one `[n_kv, columns]` block
/// of f32 a thread.
const HOST_COLUMNS: usize = 18;
/// On the host, rows of heads that are measured at once: as f32 they stay in the CPU's cache.
const HOST_CELLS: usize = 2048;

/// How a type stores its scale, for the error of a rounded key.
pub(super) struct Coarseness {
    /// Bytes of a block; the f16 scale comes first.
    block_bytes: usize,
    block_size: usize,
    /// Variance of the rounding error in units of the squared scale.
    variance: f32,
}

impl Coarseness {
    /// Scale-first types of ggml-common.h; `None` for types whose error does not matter.
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

/// The cells of the sequence as the kernels see them: the first `n_kv` cells of the stream.
pub(super) struct CellsView {
    pub(super) n_kv: usize,
    /// Position of each cell, -1 where the sequence owns none.
    pub(super) pos: Vec<Pos>,
}

/// What to add to the logits of the cells from `first` on; cells before it are seen by every query.
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

/// A chunk of queries in one layer's graph.
pub(super) struct QuerySet {
    data: Tensor, // [d, n_head, n] f16
    mask: Tensor, // [n_kv - first, n], NULL if every query sees every cell
    first: usize,
    pub(super) n: usize,
    /// Its first query among those of its kind.
    start: usize,
}

/// How much one node does at once.
#[derive(Clone, Copy)]
pub(super) struct Grain {
    /// Columns of a product: queries times query heads of a KV head.
    pub columns: usize,
    /// KV heads whose keys meet queries.
    pub kv_heads: usize,
    /// Cells whose keys and values are measured, of all heads.
    pub cells: usize,
}

impl Grain {
    /// A few queries of one head, and cells that stay in the CPU's cache.
    pub fn on_host(layer: &sys::gvote_shim_layer) -> Self {
        Self { columns: HOST_COLUMNS, kv_heads: 1, cells: (HOST_CELLS / layer.n_head_kv as usize).max(1) }
    }

    /// As much as fits into `room` bytes, of at most `n_query` queries at once.
    pub fn on_device(layer: &sys::gvote_shim_layer, n_kv: usize, n_query: usize, room: usize) -> Self {
        let n_head_kv = layer.n_head_kv as usize;
        let d = layer.n_embd_head_k.max(layer.n_embd_head_v) as usize;
        let number = n_kv.max(1) * size_of::<f32>();
        let all = n_query.max(1) * (layer.n_head / layer.n_head_kv) as usize;
        // the keys of a head are turned into f32 on the way
        let columns = (room / number).saturating_sub(d).clamp(1, all);
        let kv_heads = (room / (number * (columns + d))).clamp(1, n_head_kv);
        Self { columns, kv_heads, cells: (room / (n_head_kv * d * size_of::<f32>())).max(1) }
    }
}

/// The scoring of one layer.
pub(super) struct LayerGraph<'a> {
    pub layer: &'a sys::gvote_shim_layer,
    pub stream: usize,
    pub view: &'a CellsView,
    pub queries: LayerQueries,
    pub coarseness: Option<Coarseness>,
    pub grain: Grain,
    /// V is stored transposed, in rows of so many cells.
    pub v_trans: bool,
    pub n_cells: usize,
}

// SAFETY: the layer's tensors are only read, and no one writes to the cache while it is scored.
unsafe impl Sync for LayerGraph<'_> {}

/// Tensors of one chunk of queries for some KV heads, at most.
const CHUNK_NODES: usize = 48;
/// Tensors of one chunk of queries, at most; of one chunk of cells; and what else there is.
const SET_NODES: usize = 8;
const CELLS_NODES: usize = 40;
const OTHER_NODES: usize = 24;

impl LayerGraph<'_> {
    /// The scores of each KV head, in place of what `scores` holds.
    pub fn compute(&self, device: &mut Device, needs: Needs, scores: &mut LayerScores) -> Result<(), ComputeError> {
        let LayerQueries { observed, future, .. } = &self.queries;
        let rows = Rows::new(self.view.n_kv, self.n_head_kv(), needs, self.group() * future.pos.len());
        scores.rows = rows;
        scores.data.resize(device, rows.n * rows.n_kv)?;

        let n_sets = (observed.pos.len() + future.pos.len()).div_ceil(self.queries_at_once()) + 1;
        let head_chunks = rows.heads.div_ceil(self.grain.kv_heads);
        let cell_chunks = rows.n_kv.div_ceil(self.grain.cells);
        let n_nodes =
            n_sets * (SET_NODES + head_chunks * CHUNK_NODES) + cell_chunks * CELLS_NODES + head_chunks * 8 + OTHER_NODES;
        let mut b = Builder::new(n_nodes)?;
        let mut out = b.results(rows.n_kv, rows.n);
        let none = Block::default();
        if needs.observed {
            self.look(&mut b, &mut out, observed, rows.observed, rows.fourth_powers, none);
        }
        if needs.future || needs.each {
            self.look(&mut b, &mut out, future, rows.future, none, rows.each);
        }
        if needs.value_norm {
            self.measure_values(&mut b, &mut out, rows.value_norm);
        }
        if needs.key_similarity {
            self.compare_keys(&mut b, &mut out, rows.key_similarity);
        }
        b.compute(device)?;
        read(&mut scores.data, out.tensor);
        if needs.expected {
            self.expect(device, scores)?;
        }
        Ok(())
    }

    /// Where the queries look: their mean probabilities, and where they are asked for, the sum of the fourth powers and each of
    /// them.
    fn look<'b>(
        &self,
        b: &mut Builder<'b>,
        out: &mut Results,
        queries: &'b Queries,
        mean: Block,
        fourth_powers: Block,
        each: Block,
    ) {
        let group = self.group();
        let weight = 1.0 / (queries.pos.len() * group) as f32;
        let sets = self.query_sets(b, queries);
        let columns = sets.iter().map(|set| set.n).max().unwrap_or(0) * group;
        let kv_heads = self.grain.kv_heads;
        let weights = b.input([1, columns, kv_heads], vec![weight; columns * kv_heads]);
        for (kv, kv_heads) in self.head_chunks() {
            let k = self.k_rows(b, kv, kv_heads);
            let errors = self.error_view(b, kv, kv_heads);
            for set in &sets {
                let (logits, scale) = self.logits(b, set, k, errors, kv);
                // SAFETY: a contiguous tensor of this context.
                let p = unsafe { sys::ggml_soft_max_ext_inplace(b.ctx, logits, std::ptr::null_mut(), scale, 0.0) };
                b.run(p);
                if each.of_head > 0 {
                    for head in 0..kv_heads * group {
                        let row = each.first + (kv * group + head) * queries.pos.len() + set.start;
                        let block = self.block_of(b, p, set, head);
                        b.write(out, row, block);
                    }
                }
                let sum = self.sum_over_queries(b, p, weights);
                b.write(out, mean.at(kv), sum);
                if fourth_powers.of_head > 0 {
                    // SAFETY: p is read for the last time.
                    let powers = unsafe {
                        let powers = sys::ggml_sqr_inplace(b.ctx, sys::ggml_sqr_inplace(b.ctx, p));
                        sys::ggml_scale_inplace(b.ctx, self.sum_over_queries(b, powers, weights), 1.0 / weight)
                    };
                    b.write(out, fourth_powers.at(kv), powers);
                }
            }
        }
    }

    pub(super) fn n_head_kv(&self) -> usize {
        self.layer.n_head_kv as usize
    }

    /// Query heads of a KV head.
    pub(super) fn group(&self) -> usize {
        (self.layer.n_head / self.layer.n_head_kv) as usize
    }

    fn queries_at_once(&self) -> usize {
        (self.grain.columns / self.group()).max(1)
    }

    /// The KV heads that are worked on at once: the first one, and how many.
    pub(super) fn head_chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (n, at_once) = (self.n_head_kv(), self.grain.kv_heads);
        (0..n).step_by(at_once).map(move |first| (first, at_once.min(n - first)))
    }

    pub(super) fn query_sets<'b>(&self, b: &mut Builder<'b>, queries: &'b Queries) -> Vec<QuerySet> {
        let (d, n_head) = (self.layer.n_embd_head_k as usize, self.layer.n_head as usize);
        let at_once = self.queries_at_once();
        let chunks = queries.pos.chunks(at_once).zip(queries.data.chunks(at_once * d * n_head)).enumerate();
        let set = |(i, (pos, data)): (usize, (&[Pos], &'b [f16]))| {
            let n = pos.len();
            let Mask { first, data: mask } = self.view.mask(pos);
            let n_newest = self.view.n_kv - first;
            QuerySet {
                data: b.halves([d, n_head, n], data),
                mask: if n_newest > 0 { b.input([n_newest, n, 1], mask) } else { std::ptr::null_mut() },
                first,
                n,
                start: i * at_once,
            }
        };
        chunks.map(set).collect()
    }

    /// The part of K that belongs to `kv_heads` heads from `kv` on. `[d, n_kv, kv_heads]` of K's type
    pub(super) fn k_rows(&self, b: &Builder, kv: usize, kv_heads: usize) -> Tensor {
        let d = i64::from(self.layer.n_embd_head_k);
        // SAFETY: the view stays inside K's storage: cells of one stream, some heads of each row.
        unsafe {
            let k = self.layer.k;
            let head = sys::ggml_row_size((*k).type_, d);
            let offset = self.stream * (*k).nb[2] + kv * head;
            sys::ggml_view_3d(b.ctx, k, d, self.view.n_kv as i64, kv_heads as i64, (*k).nb[1], head, offset)
        }
    }

    /// Squared block scales of `kv_heads` heads from `kv` on. `[n_block, n_kv, kv_heads]` f32, or NULL where K is not quantized.
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

    /// The logits of the queries of `set` that belong to the KV heads from `kv` on, whose keys `k` are, still to be multiplied by
    /// the scale. `[n_kv, n * group, kv_heads]`
    pub(super) fn logits(&self, b: &mut Builder, set: &QuerySet, k: Tensor, errors: Tensor, kv: usize) -> (Tensor, f32) {
        let (n, group) = (set.n as i64, self.group() as i64);
        // SAFETY: shapes as noted; every tensor belongs to this context.
        unsafe {
            let [d, _, kv_heads, _] = (*k).ne;
            let n_head = group * kv_heads;
            let [_, nb1, nb2, _] = (*set.data).nb;
            let own = sys::ggml_view_3d(b.ctx, set.data, d, n_head, n, nb1, nb2, kv * group as usize * nb1);
            let by_head = sys::ggml_permute(b.ctx, own, 0, 2, 1, 3);
            let floats = sys::ggml_cast(b.ctx, by_head, sys::GGML_TYPE_F32); // [d, n, n_head]
            let q = sys::ggml_reshape_3d(b.ctx, floats, d, n * group, kv_heads);
            let kq = sys::ggml_mul_mat(b.ctx, k, q);
            // as attention does
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
            if !set.mask.is_null() {
                // only the newest cells can be hidden from a query: the rest of the block is not touched
                let nb1 = (*kq).nb[1];
                let n_newest = (*set.mask).ne[0];
                let offset = set.first * size_of::<f32>();
                let newest = sys::ggml_view_3d(b.ctx, kq, n_newest, n, n_head, nb1, nb1 * set.n, offset);
                let masked = sys::ggml_add_inplace(b.ctx, newest, set.mask);
                b.run(masked);
            }
            (kq, scale)
        }
    }

    /// Half the variance of a logit for a key of scale 1, in units of the unscaled logit so that one scale serves both: see the
    /// module's docs. `q` `[d, n, heads]` gives `[n_block, n, heads]`
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

    /// The sum of `p` `[n_kv, n * group, kv_heads]` over the queries of each KV head, with as many `weights` as there are of them.
    /// `[n_kv, 1, kv_heads]`
    fn sum_over_queries(&self, b: &Builder, p: Tensor, weights: Tensor) -> Tensor {
        // SAFETY: p is contiguous; there are weights for the largest set.
        unsafe {
            let [_, n, kv_heads, _] = (*p).ne;
            let [_, nb1, nb2, _] = (*weights).nb;
            sys::ggml_out_prod(b.ctx, p, sys::ggml_view_3d(b.ctx, weights, 1, n, kv_heads, nb1, nb2, 0))
        }
    }

    /// What is one query head's, the `head`-th, of `p` `[n_kv, n * group, kv_heads]`. `[n_kv, n]`
    fn block_of(&self, b: &Builder, p: Tensor, set: &QuerySet, head: usize) -> Tensor {
        // SAFETY: p is contiguous.
        unsafe {
            let [n_kv, ..] = (*p).ne;
            let row = (*p).nb[1];
            sys::ggml_view_2d(b.ctx, p, n_kv, set.n as i64, row, head * set.n * row)
        }
    }
}
