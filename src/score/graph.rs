//! The graph of one layer for one chunk of queries, and what is added up from chunk to chunk.

use half::f16;

use super::{CellScores, LayerQueries};
use crate::backend::{Builder, ComputeError, Device, Tensor, read};
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

/// What one KV head gives for one set of queries: weighted sums over its query heads and the set `[n_kv]`, and the
/// probabilities of each query head `[n_kv, n]`.
struct HeadOutputs {
    mean: Tensor,
    fourth_powers: Tensor,
    each: Vec<Tensor>,
}

/// A chunk of queries in one layer's graph.
pub(super) struct QuerySet {
    q: Tensor,    // [d, n, n_head]
    mask: Tensor, // [n_kv - first, n], NULL if every query sees every cell
    first: usize,
    pub(super) weights: Tensor, // [1, n]
    errors: Tensor,             // [n_block, n, n_head], NULL without coarseness
}

/// The scoring of one layer.
pub(super) struct LayerGraph<'a> {
    pub layer: &'a sys::gvote_shim_layer,
    pub stream: usize,
    pub view: &'a CellsView,
    pub queries: LayerQueries,
    pub coarseness: Option<Coarseness>,
    /// Queries of one graph.
    pub chunk: usize,
    /// Cells whose values one graph measures.
    pub cells_at_once: usize,
    /// V is stored transposed, in rows of so many cells.
    pub v_trans: bool,
    pub n_cells: usize,
}

// SAFETY: the layer's tensors are only read, and no one writes to the cache while it is scored.
unsafe impl Sync for LayerGraph<'_> {}

impl LayerGraph<'_> {
    /// The scores of each KV head.
    pub fn compute(&self, device: &mut Device, needs: Needs) -> Result<Vec<CellScores>, ComputeError> {
        let mut scores: Vec<_> = (0..self.layer.n_head_kv).map(|_| CellScores::default()).collect();
        if needs.observed {
            self.add(device, &mut scores, Target::Observed, Needs { each: false, ..needs })?;
        }
        if needs.future || needs.each {
            self.add(device, &mut scores, Target::Future, Needs { fourth_powers: false, ..needs })?;
        }
        if needs.expected {
            self.expect(device, &mut scores)?;
        }
        if needs.value_norm || needs.key_similarity {
            self.measure_keys(device, &mut scores, needs)?;
        }
        Ok(scores)
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
        let mut row = Vec::new();
        for score in &mut *scores {
            score.target(target).resize(n_kv, 0.0);
            if needs.each {
                score.each.resize(group * n_query * n_kv, 0.0);
            }
            if needs.fourth_powers {
                score.fourth_powers.resize(n_kv, 0.0);
            }
        }
        for (i, (pos, data)) in queries.pos.chunks(self.chunk).zip(queries.data.chunks(self.chunk * n_q)).enumerate() {
            // a query head's chain has at most 16 nodes and views; inputs and K views come on top
            let mut b = Builder::new(self.layer.n_head as usize * 16 + self.layer.n_head_kv as usize * 8 + 40)?;
            let set = self.query_set(&mut b, target, pos, data, weight);
            let outputs: Vec<_> =
                (0..self.layer.n_head_kv as usize).map(|kv| self.add_head(&mut b, &set, kv, group, needs)).collect();
            b.compute(device)?;

            row.resize(n_kv, 0.0);
            for (score, outputs) in scores.iter_mut().zip(outputs) {
                read(&mut row, outputs.mean);
                score.target(target).iter_mut().zip(&row).for_each(|(to, x)| *to += x);
                if needs.fourth_powers {
                    read(&mut row, outputs.fourth_powers);
                    score.fourth_powers.iter_mut().zip(&row).for_each(|(to, x)| *to += x / weight);
                }
                for (member, p) in outputs.each.into_iter().enumerate() {
                    let first = (member * n_query + i * self.chunk) * n_kv;
                    read(&mut score.each[first..first + pos.len() * n_kv], p);
                }
            }
        }
        Ok(())
    }

    /// The results of one KV head for one set of queries.
    fn add_head(&self, b: &mut Builder, set: &QuerySet, kv: usize, group: usize, needs: Needs) -> HeadOutputs {
        let k = self.k_view(b, kv);
        let errors = self.error_view(b, kv);
        let mut out = HeadOutputs { mean: std::ptr::null_mut(), fourth_powers: std::ptr::null_mut(), each: Vec::new() };
        for head in kv * group..(kv + 1) * group {
            let p = self.probabilities(b, set, k, errors, head);
            if needs.each {
                // p is a view: the memory that must stay is its source's
                // SAFETY: the source belongs to this context.
                unsafe { sys::ggml_set_output((*p).view_src) };
                out.each.push(b.output(p));
            }
            // SAFETY: shapes [n_kv, n] and [1, n] give [n_kv, 1].
            let mean = unsafe { sys::ggml_out_prod(b.ctx, p, set.weights) };
            out.mean = b.sum(out.mean, mean);
            if needs.fourth_powers {
                // SAFETY: as above; p is read for the last time.
                let powers = unsafe {
                    let squares = sys::ggml_sqr_inplace(b.ctx, p);
                    sys::ggml_out_prod(b.ctx, sys::ggml_sqr_inplace(b.ctx, squares), set.weights)
                };
                out.fourth_powers = b.sum(out.fourth_powers, powers);
            }
        }
        out
    }

    /// `data`: `[n_query][n_head][d]`
    pub(super) fn query_set(
        &self,
        b: &mut Builder,
        target: Target,
        pos: &[Pos],
        data: &[f16],
        weight: f32,
    ) -> QuerySet {
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
    pub(super) fn k_view(&self, b: &Builder, kv: usize) -> Tensor {
        self.k_rows(b, kv, 0, self.view.n_kv)
    }

    /// The part of K that belongs to one KV head, in `n` cells from `first` on. `[d, n]` of K's type
    pub(super) fn k_rows(&self, b: &Builder, kv: usize, first: usize, n: usize) -> Tensor {
        let d = i64::from(self.layer.n_embd_head_k);
        // SAFETY: the view stays inside K's storage: cells of one stream, one head of each row.
        unsafe {
            let k = self.layer.k;
            let offset = self.stream * (*k).nb[2] + first * (*k).nb[1] + kv * sys::ggml_row_size((*k).type_, d);
            sys::ggml_view_2d(b.ctx, k, d, n as i64, (*k).nb[1], offset)
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
        let (kq, scale) = self.logits(b, set, k, errors, head);
        // SAFETY: a contiguous matrix of this context.
        let p = unsafe { sys::ggml_soft_max_ext_inplace(b.ctx, kq, std::ptr::null_mut(), scale, 0.0) };
        b.run(p)
    }

    /// One query head's logits, still to be multiplied by the scale. `[n_kv, n_query]`
    pub(super) fn logits(
        &self,
        b: &mut Builder,
        set: &QuerySet,
        k: Tensor,
        errors: Tensor,
        head: usize,
    ) -> (Tensor, f32) {
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
            (kq, scale)
        }
    }
}
