//! Moves rows in memory that the host can access, or in a fetched copy.

use super::{Moves, give_up};
use crate::backend::{self, ComputeError};
use crate::cache::Layout;
use crate::{memory, sys};

/// Moves the rows of one layer. `moves`: for each of its heads. `ascending`: no cell receives a row before its own row has been read.
///
/// # Safety
/// The cache is idle, and no other thread works on this layer.
pub(super) unsafe fn move_layer(layout: &Layout, layer: &sys::gvote_shim_layer, moves: &[Moves], ascending: bool) {
    let stream = layout.info.stream as usize;
    let mut buffer = Vec::new();
    // SAFETY: see above.
    let fetched = unsafe { Storage::fetch(layer.k, stream).and_then(|k| Ok((k, Storage::fetch(layer.v, stream)?))) };
    let (mut k, mut v) = fetched.unwrap_or_else(|error| give_up(error));
    for (kv, moves) in moves.iter().enumerate() {
        let mut gather = |rows: Rows| {
            // SAFETY: rows of this layer and head only, see rows_of_head.
            unsafe { gather(rows, moves, ascending, &mut buffer) };
        };
        rows_of_head(layout, layer, kv, &mut k, &mut v, &mut gather);
    }
    k.put_back();
    v.put_back();
}

/// Cells of one head, each with memory for its row: the key, followed by the value. See [`crate::archive`].
pub(super) type Leaving<'a> = Vec<(u32, &'a mut [u8])>;

/// Cells of one head, each with its new row.
pub(super) type Coming<'a> = Vec<(u32, &'a [u8])>;

/// Copies rows of each head of one layer out of the cache.
///
/// # Errors
/// [`ComputeError::Memory`].
///
/// # Safety
/// The cache is idle, and no other thread works on this layer.
pub(super) unsafe fn copy_out(
    layout: &Layout,
    layer: &sys::gvote_shim_layer,
    heads: &mut [Leaving],
) -> Result<(), ComputeError> {
    let stream = layout.info.stream as usize;
    // SAFETY: see above.
    let (mut k, mut v) = unsafe { (Storage::fetch(layer.k, stream)?, Storage::fetch(layer.v, stream)?) };
    for (kv, leaving) in heads.iter_mut().enumerate() {
        let blocks = Blocks::of_head(layout, layer, kv, &mut k, &mut v);
        for tile in leaving.chunks_mut(TILE) {
            for &(rows, at) in &blocks.0 {
                for (cell, row) in tile.iter_mut() {
                    let to = &mut row[at..][..rows.bytes];
                    // SAFETY: a row of this layer and head, and a buffer of the same size.
                    unsafe { copy(rows.base.add(*cell as usize * rows.stride), to.as_mut_ptr(), rows.bytes) };
                }
            }
        }
    }
    Ok(())
}

/// Copies rows of each head of one layer into the cache. Other rows are unchanged.
///
/// # Errors
/// [`ComputeError::Memory`]; nothing was copied then.
///
/// # Safety
/// The cache is idle, and no other thread works on this layer.
pub(super) unsafe fn copy_in(
    layout: &Layout,
    layer: &sys::gvote_shim_layer,
    heads: &[Coming],
) -> Result<(), ComputeError> {
    let stream = layout.info.stream as usize;
    // SAFETY: see above.
    let (mut k, mut v) = unsafe { (Storage::fetch(layer.k, stream)?, Storage::fetch(layer.v, stream)?) };
    for (kv, coming) in heads.iter().enumerate() {
        let blocks = Blocks::of_head(layout, layer, kv, &mut k, &mut v);
        for tile in coming.chunks(TILE) {
            for &(rows, at) in &blocks.0 {
                for (cell, row) in tile {
                    let from = &row[at..][..rows.bytes];
                    // SAFETY: a row of this layer and head, and a buffer of the same size.
                    unsafe { copy(from.as_ptr(), rows.base.add(*cell as usize * rows.stride), rows.bytes) };
                }
            }
        }
    }
    k.put_back();
    v.put_back();
    Ok(())
}

/// Rows that are copied before the next channel of a transposed V: few enough to stay in the L1 cache, because the channels of one row are
/// far apart.
const TILE: usize = 32;

/// Copies a row. The sizes of transposed f16 and f32 values compile to plain loads and stores.
///
/// # Safety
/// Both places have `bytes` bytes and do not overlap.
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: see above.
    unsafe {
        match bytes {
            2 => std::ptr::copy_nonoverlapping(from, to, 2),
            4 => std::ptr::copy_nonoverlapping(from, to, 4),
            _ => std::ptr::copy_nonoverlapping(from, to, bytes),
        }
    }
}

/// Location of one head's rows: blocks, each with its byte offset in a whole row.
struct Blocks(Vec<(Rows, usize)>);

impl Blocks {
    fn of_head(layout: &Layout, layer: &sys::gvote_shim_layer, kv: usize, k: &mut Storage, v: &mut Storage) -> Self {
        let (mut blocks, mut at) = (Vec::new(), 0);
        rows_of_head(layout, layer, kv, k, v, &mut |rows| {
            blocks.push((rows, at));
            at += rows.bytes;
        });
        Self(blocks)
    }
}

/// One stream of a K or V tensor, accessible to the host.
struct Storage<'a> {
    tensor: &'a sys::ggml_tensor,
    /// Byte offset of the stream in the tensor.
    offset: usize,
    /// Copy of the stream's bytes, if the host cannot access the tensor itself.
    copy: Option<Vec<u8>>,
}

impl<'a> Storage<'a> {
    /// # Errors
    /// [`ComputeError::Memory`] if a copy of the stream cannot be allocated.
    ///
    /// # Safety
    /// `tensor` is a storage tensor of the cache, and nobody else uses the stream until [`Self::put_back`].
    unsafe fn fetch(tensor: *mut sys::ggml_tensor, stream: usize) -> Result<Self, ComputeError> {
        const FAILED: ComputeError = ComputeError::Memory("reading");
        // SAFETY: the stream is nb[2] bytes of a tensor that lives as long as the context.
        unsafe {
            let tensor: &sys::ggml_tensor = &*tensor;
            let offset = stream * tensor.nb[2];
            let mut copy = None;
            if !backend::place(tensor.buffer).is_null() {
                let mut bytes: Vec<u8> = memory::zeros(tensor.nb[2]).ok_or(FAILED)?;
                if !sys::gvote_shim_tensor_get(tensor, bytes.as_mut_ptr().cast(), offset, bytes.len()) {
                    return Err(FAILED);
                }
                copy = Some(bytes);
            }
            Ok(Self { tensor, offset, copy })
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
            if !unsafe { sys::gvote_shim_tensor_set(tensor, copy.as_ptr().cast(), self.offset, copy.len()) } {
                give_up(ComputeError::Memory("sending"));
            }
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
/// Every cell in `moves` has a row in `rows`, and nobody else accesses these rows.
unsafe fn gather(rows: Rows, moves: &Moves, ascending: bool, buffer: &mut Vec<u8>) {
    // the sizes of transposed f16 and f32 values compile to plain loads and stores
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
        // SAFETY: the buffer and the cache's row do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(kept.as_ptr(), row(to as usize), bytes) };
    }
}
