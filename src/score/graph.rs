//! The graph of one layer for one chunk of queries, and what is added up from chunk to chunk.

use half::f16;

use super::{CellScores, LayerQueries};
use crate::backend::{Builder, ComputeError, Device, Tensor, read, read_at};
use crate::cache::Cell;
use crate::llama::Pos;
use crate::policy::Needs;
use crate::sys;

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

/// Which result a query counts for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Observed,
    Future,
}

/// A chunk of queries in one layer's graph.
pub(super) struct QuerySet {
    /// Query heads at once: 1, or whole groups.
    heads: usize,
    q: Tensor,    // [d, n, n_head]
    mask: Tensor, // [n_kv - first, n], NULL if every query sees every cell
    first: usize,
    pub(super) weights: Tensor, // [1, n * heads of a group, KV heads]
    errors: Tensor,             // [n_block, n, n_head], NULL without coarseness
}

/// How much one graph does at once.
#[derive(Clone, Copy)]
pub(super) struct Grain {
    /// Queries.
    pub queries: usize,
    /// Query heads in one node: 1, or whole groups of them.
    pub heads: usize,
    /// KV heads whose keys and values are measured in one node.
    pub kv_heads: usize,
    /// Cells whose keys and values are measured.
    pub cells: usize,
}

impl Grain {
    /// All heads at once, and as much else as fits into `room` bytes.
    pub fn on_device(layer: &sys::gvote_shim_layer, n_kv: usize, room: usize) -> Self {
        let (heads, kv_heads) = (layer.n_head as usize, layer.n_head_kv as usize);
        let query = heads * n_kv.max(1) * size_of::<f32>();
        // as f32, of length 1, and transposed
        let cell = 3 * kv_heads * layer.n_embd_head_k.max(layer.n_embd_head_v) as usize * size_of::<f32>();
        Self { queries: (room / query).max(1), heads, kv_heads, cells: (room / cell).max(1) }
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

impl LayerGraph<'_> {
    /// The scores of each KV head, in place of what `scores` holds.
    pub fn compute(&self, device: &mut Device, needs: Needs, scores: &mut Vec<CellScores>) -> Result<(), ComputeError> {
        scores.resize_with(self.layer.n_head_kv as usize, CellScores::default);
        scores.iter_mut().for_each(CellScores::clear);
        if needs.observed {
            self.add(device, scores, Target::Observed, Needs { each: false, ..needs })?;
        }
        if needs.future || needs.each {
            self.add(device, scores, Target::Future, Needs { fourth_powers: false, ..needs })?;
        }
        if needs.expected {
            self.expect(device, scores)?;
        }
        if needs.value_norm || needs.key_similarity {
            self.measure_keys(device, scores, needs)?;
        }
        Ok(())
    }

    /// Adds up the mean probabilities under all queries of one kind, and notes `each` of them if asked to.
    fn add(
        &self,
        device: &mut Device,
        scores: &mut [CellScores],
        target: Target,
        needs: Needs,
    ) -> Result<(), ComputeError> {
        let queries = match target {
            Target::Observed => &self.queries.observed,
            Target::Future => &self.queries.future,
        };
        let (n_kv, n_query) = (self.view.n_kv, queries.pos.len());
        let n_q = (self.layer.n_head * self.layer.n_embd_head_k) as usize;
        let group = (self.layer.n_head / self.layer.n_head_kv) as usize;
        let weight = 1.0 / (n_query * group) as f32;
        for score in &mut *scores {
            score.target(target).resize(n_kv, 0.0);
            if needs.each {
                score.each.resize(group * n_query * n_kv, 0.0);
            }
            if needs.fourth_powers {
                score.fourth_powers.resize(n_kv, 0.0);
            }
        }
        for (i, (pos, data)) in
            queries.pos.chunks(self.grain.queries).zip(queries.data.chunks(self.grain.queries * n_q)).enumerate()
        {
            // a query head's chain has at most 16 nodes and views; inputs and K views come on top
            let mut b = Builder::new(self.layer.n_head as usize * 16 + self.layer.n_head_kv as usize * 8 + 40)?;
            let set = self.query_set(&mut b, target, pos, data, weight, self.grain.heads);
            let heads_out = self.grain.heads.div_ceil(group);
            let outputs: Vec<_> = (0..self.layer.n_head_kv as usize)
                .step_by(heads_out)
                .map(|kv| self.add_heads(&mut b, &set, kv, group, needs))
                .collect();
            b.compute(device)?;

            let row = &mut device.scratch;
            row.resize(heads_out * n_kv, 0.0);
            for (scores, outputs) in scores.chunks_mut(heads_out).zip(outputs) {
                read(row, outputs.mean);
                for (score, row) in scores.iter_mut().zip(row.chunks(n_kv)) {
                    score.target(target).iter_mut().zip(row).for_each(|(to, x)| *to += x);
                }
                if needs.fourth_powers {
                    read(row, outputs.fourth_powers);
                    for (score, row) in scores.iter_mut().zip(row.chunks(n_kv)) {
                        score.fourth_powers.iter_mut().zip(row).for_each(|(to, x)| *to += x / weight);
                    }
                }
                let block = pos.len() * n_kv;
                for (head, (p, at)) in outputs.each.into_iter().enumerate() {
                    let first = (head % group * n_query + i * self.grain.queries) * n_kv;
                    read_at(&mut scores[head / group].each[first..first + block], p, at * block);
                }
            }
        }
        Ok(())
    }

    /// The results of the KV head `kv`, or of as many from it on as the grain has, for one set of queries.
    fn add_heads(&self, b: &mut Builder, set: &QuerySet, kv: usize, group: usize, needs: Needs) -> Outputs {
        let kv_heads = set.heads.div_ceil(group);
        let k = self.k_rows(b, kv, kv_heads, 0, self.view.n_kv);
        let errors = self.error_view(b, kv, kv_heads);
        let mut out = Outputs::default();
        for head in (kv * group..(kv + kv_heads) * group).step_by(set.heads) {
            let p = self.probabilities(b, set, k, errors, head);
            if needs.each {
                // p is a view: the memory that must stay is its source's
                // SAFETY: the source belongs to this context.
                unsafe { sys::ggml_set_output((*p).view_src) };
                b.output(p);
                out.each.extend((0..set.heads).map(|at| (p, at)));
            }
            let mean = self.sum_over_queries(b, p, set, kv_heads);
            out.mean = b.sum(out.mean, mean);
            if needs.fourth_powers {
                // SAFETY: p is read for the last time.
                let powers = unsafe { sys::ggml_sqr_inplace(b.ctx, sys::ggml_sqr_inplace(b.ctx, p)) };
                let powers = self.sum_over_queries(b, powers, set, kv_heads);
                out.fourth_powers = b.sum(out.fourth_powers, powers);
            }
        }
        out
    }

    /// The weighted sum of `p` `[n_kv, n_query, heads]` over the queries and the heads of each group. `[n_kv, 1, kv_heads]`
    fn sum_over_queries(&self, b: &Builder, p: Tensor, set: &QuerySet, kv_heads: usize) -> Tensor {
        // SAFETY: p is contiguous; shapes [n_kv, n, heads] and [1, n, heads] give [n_kv, 1, heads].
        unsafe {
            let [n_kv, n_query, heads, _] = (*p).ne;
            let n = n_query * heads / kv_heads as i64;
            sys::ggml_out_prod(b.ctx, sys::ggml_reshape_3d(b.ctx, p, n_kv, n, kv_heads as i64), set.weights)
        }
    }

    /// `data`: `[n_query][n_head][d]`; `heads`: query heads at once.
    pub(super) fn query_set<'a>(
        &self,
        b: &mut Builder<'a>,
        target: Target,
        pos: &[Pos],
        data: &'a [f16],
        weight: f32,
        heads: usize,
    ) -> QuerySet {
        let n = pos.len();
        let d = self.layer.n_embd_head_k as usize;
        let n_head = self.layer.n_head as usize;
        let data = b.halves([d, n_head, n], data);
        // SAFETY: shapes as noted; every tensor belongs to this context.
        let (q, errors) = unsafe {
            let by_head = sys::ggml_permute(b.ctx, data, 0, 2, 1, 3);
            let q = sys::ggml_cast(b.ctx, by_head, sys::GGML_TYPE_F32); // [d, n, n_head]
            let errors = self.coarseness.as_ref().map_or(std::ptr::null_mut(), |c| {
                // v/2 in units of the unscaled logit, so that one scale serves both: see the module's docs
                let factor = self.queries.scale.post * self.queries.scale.pre * c.variance / 2.0;
                let (size, n_block) = (c.block_size as i64, (d / c.block_size) as i64);
                let blocks = sys::ggml_reshape_2d(b.ctx, q, size, n_block * (n * n_head) as i64);
                let squares = sys::ggml_sum_rows(b.ctx, sys::ggml_sqr(b.ctx, blocks));
                let squares = sys::ggml_scale(b.ctx, squares, factor);
                sys::ggml_reshape_3d(b.ctx, squares, n_block, n as i64, n_head as i64)
            });
            (q, errors)
        };
        let mask = match target {
            Target::Observed => self.view.mask(pos),
            Target::Future => self.view.mask(&vec![Pos::MAX; n]),
        };
        let first = mask.first;
        let kv_heads = heads.div_ceil(n_head / self.layer.n_head_kv as usize);
        let n_weights = n * heads / kv_heads;
        QuerySet {
            heads,
            q,
            mask: if first < self.view.n_kv {
                b.input([self.view.n_kv - first, n, 1], mask.data)
            } else {
                std::ptr::null_mut()
            },
            first,
            weights: b.input([1, n_weights, kv_heads], vec![weight; n_weights * kv_heads]),
            errors,
        }
    }

    /// The part of K that belongs to `kv_heads` heads from `kv` on, in `n` cells from `first` on. `[d, n, kv_heads]` of K's type
    pub(super) fn k_rows(&self, b: &Builder, kv: usize, kv_heads: usize, first: usize, n: usize) -> Tensor {
        let d = i64::from(self.layer.n_embd_head_k);
        // SAFETY: the view stays inside K's storage: cells of one stream, some heads of each row.
        unsafe {
            let k = self.layer.k;
            let head = sys::ggml_row_size((*k).type_, d);
            let offset = self.stream * (*k).nb[2] + first * (*k).nb[1] + kv * head;
            sys::ggml_view_3d(b.ctx, k, d, n as i64, kv_heads as i64, (*k).nb[1], head, offset)
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

    /// Softmax over all cells of the logits of as many query heads as the set has at once. `[n_kv, n_query, heads]`
    fn probabilities(&self, b: &mut Builder, set: &QuerySet, k: Tensor, errors: Tensor, head: usize) -> Tensor {
        let (kq, scale) = self.logits(b, set, k, errors, head);
        // SAFETY: a contiguous tensor of this context.
        let p = unsafe { sys::ggml_soft_max_ext_inplace(b.ctx, kq, std::ptr::null_mut(), scale, 0.0) };
        b.run(p)
    }

    /// The logits of as many query heads as the set has at once, from `head` on, still to be multiplied by the scale.
    /// `[n_kv, n_query, heads]`
    pub(super) fn logits(
        &self,
        b: &mut Builder,
        set: &QuerySet,
        k: Tensor,
        errors: Tensor,
        head: usize,
    ) -> (Tensor, f32) {
        let (ctx, heads) = (b.ctx, set.heads);
        let heads_of = |t: Tensor| {
            // SAFETY: some matrices of a contiguous 3d input.
            unsafe {
                let [ne0, ne1, ..] = (*t).ne;
                let [_, nb1, nb2, _] = (*t).nb;
                sys::ggml_view_3d(ctx, t, ne0, ne1, heads as i64, nb1, nb2, head * nb2)
            }
        };
        // SAFETY: shapes as noted; every tensor belongs to this context.
        unsafe {
            let kq = sys::ggml_mul_mat(b.ctx, k, heads_of(set.q)); // [n_kv, n, heads]
            // as attention does
            sys::ggml_mul_mat_set_prec(kq, sys::GGML_PREC_F32);
            let mut kq = b.run(kq);
            if !errors.is_null() {
                let error = sys::ggml_mul_mat(b.ctx, errors, heads_of(set.errors)); // [n_kv, n, heads]
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
                let [_, nb1, nb2, _] = (*kq).nb;
                let [n_newest, n, ..] = (*set.mask).ne;
                let offset = set.first * size_of::<f32>();
                let newest = sys::ggml_view_3d(b.ctx, kq, n_newest, n, heads as i64, nb1, nb2, offset);
                let masked = sys::ggml_add_inplace(b.ctx, newest, set.mask);
                b.run(masked);
            }
            (kq, scale)
        }
    }
}

/// What some KV heads give for one set of queries. Weighted sums over their query heads and the set `[n_kv, 1, kv_heads]`, and
/// where the probabilities of each query head are: the tensor, and the block in it.
struct Outputs {
    mean: Tensor,
    fourth_powers: Tensor,
    each: Vec<(Tensor, usize)>,
}

impl Default for Outputs {
    fn default() -> Self {
        Self { mean: std::ptr::null_mut(), fourth_powers: std::ptr::null_mut(), each: Vec::new() }
    }
}
