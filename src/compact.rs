//! Turns a [`Selection`] into fewer cells, in place.
//!
//! 1. **Check** everything that could fail, and build the new table of cells aside (the shim).
//! 2. **Move** rows: for each layer and KV head the kept rows of K and V are gathered into the first C cells that the
//!    sequence owns. Where cells and positions ascend together, a source never lies before its destination, so ascending
//!    copies need no temporary; otherwise one head's rows go through a buffer. A layer in memory that the host cannot
//!    reach is fetched, worked on, and put back.
//! 3. **Commit** the table. Neither 2 nor 3 can fail, so a failed compaction leaves the cache as it was.
//!
//! Where all heads keep the same tokens (`--evict cells`) the result is that of `llama_memory_seq_rm` on the dropped
//! positions followed by closing the holes. It is done in one step because a removal cannot be taken back if closing fails.
//!
//! Composite cells: cell c of the result holds, for every (layer, KV head), the c-th key and value *that head* kept. It is
//! labelled with the largest position it holds: labels ascend, the last one is the sequence's last position, and removing
//! the cells from some position on never leaves a newer key behind.

mod mask;

use std::borrow::Cow;

use crate::cache::{self, CacheError, Cell, Layout};
use crate::llama::{Context, Pos, SeqId};
use crate::policy::{Kept, Selection};
use crate::sys;

pub(crate) use mask::Mask;
pub use mask::MaskError;

/// Why a compaction was refused. The cache is as it was.
#[derive(Debug, thiserror::Error)]
pub enum CompactError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("the selection was made for {expected} cells, the sequence has {found}")]
    Changed { expected: usize, found: usize },
    #[error("the selection is not ascending within {n} cells, or has not {heads} heads of {n_cells}")]
    Malformed { n: usize, heads: usize, n_cells: usize },
    #[error("cells of the sequence are shared with another one (llama_memory_seq_cp): compress before sharing")]
    Shared,
    #[error("the sequence's newest cell must stay")]
    LastDropped,
    #[error("the heads keep different numbers of tokens, which the cells of llama.cpp cannot: see `exact`")]
    Ragged,
}

/// The rows that one head's cells come from.
struct Moves<'a> {
    /// Cells that receive.
    to: &'a [u32],
    /// Cells of the sequence by position.
    cells: &'a [Cell],
    /// Places in `cells` that give, as many as receive; `None`: all, in order.
    from: Option<Cow<'a, [u32]>>,
}

impl Moves<'_> {
    fn from(&self, c: usize) -> usize {
        let place = self.from.as_ref().map_or(c, |from| from[c] as usize);
        self.cells[place].index as usize
    }
}

/// What [`Moves::from`] is for a head, over all layers.
type Sources<'a> = &'a (dyn Fn(usize) -> Option<Cow<'a, [u32]>> + Sync);

/// The rows of a sequence, to be put into another order and back.
pub(crate) struct Reorder {
    layout: Layout,
    cells: Vec<Cell>,
}

impl Reorder {
    /// # Errors
    /// [`CompactError`] when the cells cannot be worked on.
    pub fn of(ctx: &Context, seq: SeqId) -> Result<Self, CompactError> {
        let layout = Layout::of(ctx, seq)?;
        let cells = cache::cells(ctx, seq);
        if cells.iter().any(|c| c.shared) {
            return Err(CompactError::Shared);
        }
        Ok(Self { layout, cells })
    }

    /// Puts the rows into another order, head by head: the cell at place c (in the order of positions) gets the row from
    /// place `sources(head)[c]`, a permutation of all places. Nothing is lost: the inverse order brings everything back.
    /// Positions stay. The sequence has the cells that it had.
    pub fn permute(&self, ctx: &mut Context, sources: &(dyn Fn(usize) -> Vec<u32> + Sync)) {
        let to: Vec<u32> = self.cells.iter().map(|c| c.index).collect();
        // SAFETY: valid context; llama.cpp may still be computing into the cache.
        unsafe { sys::llama_synchronize(ctx.as_ptr()) };
        let sources = |head| Some(Cow::Owned(sources(head)));
        move_rows(&self.layout, &self.cells, &to, &sources, false, ctx.n_threads_batch());
    }
}

/// Keeps what `selection` says of the cells of `seq`, frees the others, and leaves other sequences untouched.
///
/// # Errors
/// [`CompactError`]; the cache is then as it was.
pub fn compact(ctx: &mut Context, seq: SeqId, selection: &Selection) -> Result<(), CompactError> {
    if let Kept::Ragged { .. } = selection.kept {
        return Err(CompactError::Ragged);
    }
    let layout = Layout::of(ctx, seq)?;
    let cells = cache::cells(ctx, seq);
    check(&layout, &cells, selection)?;
    let n_cells = selection.n_cells();
    if matches!(selection.kept, Kept::All) {
        return Ok(());
    }

    let mut slots: Vec<u32> = cells.iter().map(|c| c.index).collect();
    slots.sort_unstable();
    let to = &slots[..n_cells];
    let labels = labels(&layout, &cells, selection);

    let mut table = std::ptr::null_mut();
    // SAFETY: both arrays have n_cells entries; the table is committed or freed below.
    unsafe {
        cache::ok(sys::gvote_shim_table_new(
            ctx.as_ptr(),
            seq,
            to.as_ptr(),
            labels.as_ptr(),
            n_cells as u32,
            &raw mut table,
        ))?;
    }

    // llama.cpp may still be computing into the cache
    // SAFETY: valid context.
    unsafe { sys::llama_synchronize(ctx.as_ptr()) };
    let ascending = cells.windows(2).all(|w| w[0].index < w[1].index);
    let kept = |head| selection.kept_by(head).map(Cow::Borrowed);
    move_rows(&layout, &cells, to, &kept, ascending, ctx.n_threads_batch());
    // SAFETY: the table was built from the cells as they still are.
    unsafe { sys::gvote_shim_table_commit(ctx.as_ptr(), seq, table) };
    Ok(())
}

fn check(layout: &Layout, cells: &[Cell], selection: &Selection) -> Result<(), CompactError> {
    let n = cells.len();
    if selection.n != n {
        return Err(CompactError::Changed { expected: selection.n, found: n });
    }
    if cells.iter().any(|c| c.shared) {
        return Err(CompactError::Shared);
    }
    let heads: usize = layout.n_head_kv().sum();
    let n_cells = selection.n_cells();
    let malformed = CompactError::Malformed { n, heads, n_cells };
    let (n_lists, complete) = match &selection.kept {
        Kept::All | Kept::Tokens(_) => (1, true),
        Kept::Heads { index, .. } => (heads, index.len() == heads * n_cells),
        Kept::Ragged { end, index } => {
            (heads, end.len() == heads && end.last() == Some(&index.len()) && end.is_sorted())
        }
    };
    if !complete {
        return Err(malformed);
    }
    let mut keeps_last = n_cells == 0;
    for head in 0..n_lists {
        let Some(kept) = selection.kept_by(head) else {
            return Ok(());
        };
        let ascending = kept.windows(2).all(|w| w[0] < w[1]);
        if !ascending || kept.last().is_some_and(|&k| k as usize >= n) {
            return Err(malformed);
        }
        keeps_last |= kept.last().is_some_and(|&k| k as usize + 1 == n);
    }
    if !keeps_last || n_cells == 0 {
        return Err(CompactError::LastDropped);
    }
    Ok(())
}

/// The position each kept cell gets: the largest it holds.
fn labels(layout: &Layout, cells: &[Cell], selection: &Selection) -> Vec<Pos> {
    let heads = match selection.kept {
        Kept::Heads { .. } => layout.n_head_kv().sum(),
        _ => 1,
    };
    let mut last = vec![0u32; selection.n_cells()];
    for head in 0..heads {
        if let Some(kept) = selection.kept_by(head) {
            for (l, k) in last.iter_mut().zip(kept) {
                *l = (*l).max(*k);
            }
        }
    }
    last.into_iter().map(|l| cells[l as usize].pos).collect()
}

/// One stream of a K or V tensor, where the host can work on it.
struct Storage<'a> {
    tensor: &'a sys::ggml_tensor,
    /// Of the stream, in the tensor.
    offset: usize,
    /// The stream's bytes, if the tensor itself cannot be reached.
    copy: Option<Vec<u8>>,
}

impl<'a> Storage<'a> {
    /// # Safety
    /// `tensor` is a storage tensor of the cache, and nobody else uses the stream until this is put back.
    unsafe fn fetch(tensor: *mut sys::ggml_tensor, stream: usize) -> Self {
        // SAFETY: the stream is nb[2] bytes of a tensor that lives as long as the context.
        unsafe {
            let tensor: &sys::ggml_tensor = &*tensor;
            let offset = stream * tensor.nb[2];
            let copy = (!cache::is_host(tensor.buffer)).then(|| {
                let mut bytes = vec![0; tensor.nb[2]];
                sys::ggml_backend_tensor_get(tensor, bytes.as_mut_ptr().cast(), offset, bytes.len());
                bytes
            });
            Self { tensor, offset, copy }
        }
    }

    fn base(&mut self) -> *mut u8 {
        match &mut self.copy {
            Some(copy) => copy.as_mut_ptr(),
            // SAFETY: host memory, and the stream lies inside the tensor.
            None => unsafe { self.tensor.data.cast::<u8>().add(self.offset) },
        }
    }

    fn put_back(self) {
        if let Some(copy) = self.copy {
            let tensor = std::ptr::from_ref(self.tensor).cast_mut();
            // SAFETY: the range that was fetched.
            unsafe { sys::ggml_backend_tensor_set(tensor, copy.as_ptr().cast(), self.offset, copy.len()) };
        }
    }
}

/// A block of equal rows in host memory: cell i starts at `base + i * stride`.
#[derive(Clone, Copy)]
struct Rows {
    base: *mut u8,
    stride: usize,
    bytes: usize,
}

/// `ascending`: no cell receives a row before it has given its own.
fn move_rows(layout: &Layout, cells: &[Cell], to: &[u32], sources: Sources, ascending: bool, n_threads: usize) {
    let first_head: Vec<usize> = layout
        .n_head_kv()
        .scan(0, |sum, n| {
            let first = *sum;
            *sum += n;
            Some(first)
        })
        .collect();
    let move_layer = |il: usize| {
        let mut buffer = Vec::new();
        let layer = &layout.layers[il];
        let stream = layout.info.stream as usize;
        // SAFETY: the cache is idle and no other thread works on this layer.
        let (mut k, mut v) = unsafe { (Storage::fetch(layer.k, stream), Storage::fetch(layer.v, stream)) };
        for kv in 0..layer.n_head_kv as usize {
            let moves = Moves { to, cells, from: sources(first_head[il] + kv) };
            let mut gather = |rows: Rows| {
                // SAFETY: rows of this layer and head only, see rows_of_head; no other thread works on this layer.
                unsafe { gather(rows, &moves, ascending, &mut buffer) };
            };
            rows_of_head(layout, layer, kv, &mut k, &mut v, &mut gather);
        }
        k.put_back();
        v.put_back();
    };
    let n_layer = layout.n_layer();
    // transfers queue up on the device anyway, and one thread holds one layer's copy only
    let n_threads = if layout.is_host() { n_threads.clamp(1, n_layer) } else { 1 };
    let per_thread = n_layer.div_ceil(n_threads);
    // raw pointers inside the layout: each thread follows those of its own layers only
    let shared = Unshared(&move_layer);
    std::thread::scope(|scope| {
        for t in 1..n_threads {
            let shared = &shared;
            scope.spawn(move || {
                for il in t * per_thread..((t + 1) * per_thread).min(n_layer) {
                    (shared.0)(il);
                }
            });
        }
        for il in 0..per_thread.min(n_layer) {
            move_layer(il);
        }
    });
}

struct Unshared<'a, F>(&'a F);
// SAFETY: the closure works on disjoint layers in different threads and reads everything else.
unsafe impl<F> Sync for Unshared<'_, F> {}

/// Calls `f` with the rows of one head: one block of K, and one of V, or one for each channel of a transposed V.
fn rows_of_head(
    layout: &Layout,
    layer: &sys::gvote_shim_layer,
    kv: usize,
    k: &mut Storage,
    v: &mut Storage,
    f: &mut impl FnMut(Rows),
) {
    let (k_base, v_base) = (k.base(), v.base());
    // SAFETY: offsets stay inside the streams of llama_kv_cache (see get_k and get_v).
    unsafe {
        let bytes = sys::ggml_row_size(k.tensor.type_, i64::from(layer.n_embd_head_k));
        f(Rows { base: k_base.add(kv * bytes), stride: k.tensor.nb[1], bytes });

        let d = layer.n_embd_head_v as usize;
        if layout.info.v_trans {
            let bytes = sys::ggml_type_size(v.tensor.type_);
            for channel in kv * d..(kv + 1) * d {
                f(Rows { base: v_base.add(channel * layout.n_cells() * bytes), stride: bytes, bytes });
            }
        } else {
            let bytes = sys::ggml_row_size(v.tensor.type_, d as i64);
            f(Rows { base: v_base.add(kv * bytes), stride: v.tensor.nb[1], bytes });
        }
    }
}

/// # Safety
/// Every cell in `moves` has a row in `rows`, and nobody else touches them.
unsafe fn gather(rows: Rows, moves: &Moves, ascending: bool, buffer: &mut Vec<u8>) {
    // the sizes that transposed f16 and f32 values have become plain loads and stores
    // SAFETY: passed on.
    unsafe {
        match rows.bytes {
            2 => gather_sized::<2>(rows, moves, ascending, buffer),
            4 => gather_sized::<4>(rows, moves, ascending, buffer),
            _ => gather_sized::<0>(rows, moves, ascending, buffer),
        }
    }
}

/// # Safety
/// See [`gather`]; `N` is the rows' size, or 0 for any.
unsafe fn gather_sized<const N: usize>(rows: Rows, moves: &Moves, ascending: bool, buffer: &mut Vec<u8>) {
    let bytes = if N == 0 { rows.bytes } else { N };
    // SAFETY: cell indices are below the stream's size, so every row lies inside the tensor.
    let row = |cell: usize| unsafe { rows.base.add(cell * rows.stride) };
    if ascending {
        for (c, &to) in moves.to.iter().enumerate() {
            let from = moves.from(c);
            if from != to as usize {
                // SAFETY: different rows do not overlap.
                unsafe { std::ptr::copy_nonoverlapping(row(from), row(to as usize), bytes) };
            }
        }
        return;
    }
    buffer.clear();
    for c in 0..moves.to.len() {
        // SAFETY: one row.
        buffer.extend_from_slice(unsafe { std::slice::from_raw_parts(row(moves.from(c)), bytes) });
    }
    for (kept, &to) in buffer.chunks_exact(bytes).zip(moves.to) {
        // SAFETY: the buffer is ours, the row is the cache's.
        unsafe { std::ptr::copy_nonoverlapping(kept.as_ptr(), row(to as usize), bytes) };
    }
}
