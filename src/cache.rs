//! Reads the layout of a context's KV cache through the shim: which tensors hold K and V, and which cells a sequence owns.

use std::ffi::CStr;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

use crate::llama::{Context, Pos, SeqId, Token};
use crate::sys;

/// Reasons why a context's cache cannot be compressed.
#[derive(Debug, thiserror::Error)]
#[error("the KV cache of this context cannot be compressed: {0}; `policy` full runs it as it is")]
pub struct CacheError(pub(crate) String);

impl CacheError {
    /// Text of the shim when C++ runs out of memory.
    pub(crate) const OUT_OF_MEMORY: &str = "out of memory";

    /// Whether the reason is too little memory.
    pub(crate) fn is_memory(&self) -> bool {
        self.0 == Self::OUT_OF_MEMORY
    }
}

/// The attention cache of a context for one sequence (the base cache, if there is also a sliding-window cache).
///
/// May outlive the context: the numbers were read when it was made.
#[derive(Clone)]
pub struct Layout {
    pub(crate) info: sys::gvote_shim_cache,
    /// The storage tensors live as long as the context: only code that holds the context may dereference them.
    pub(crate) layers: Vec<sys::gvote_shim_layer>,
    bytes_per_cell: usize,
    on_host: bool,
}

// SAFETY: the tensor pointers are only followed by code that holds the context.
unsafe impl Send for Layout {}
// SAFETY: see above; the numbers themselves are only read.
unsafe impl Sync for Layout {}

/// A cell of the cache that a sequence owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Index in the sequence's stream.
    pub index: u32,
    /// Position; for a composite cell the largest position it holds.
    pub pos: Pos,
    /// Token at that position, -1 if llama.cpp does not know it.
    pub token: Token,
    /// Whether another sequence also uses this cell.
    pub shared: bool,
}

impl Cell {
    pub(crate) fn raw(&self) -> sys::gvote_shim_cell {
        let Self { index, pos, token, shared } = *self;
        sys::gvote_shim_cell { index, pos, token, shared }
    }
}

impl Layout {
    /// Reads the layout of the cache that `seq` uses.
    ///
    /// # Errors
    /// [`CacheError`] for recurrent, hybrid and other layouts that cannot be compacted, with the reason.
    pub fn of(ctx: &Context, seq: SeqId) -> Result<Self, CacheError> {
        // SAFETY: the shim fills the structs it is given when it answers NULL, and its strings are static. The storage tensors
        // live as long as the context.
        unsafe {
            let mut info: sys::gvote_shim_cache = std::mem::zeroed();
            ok(sys::gvote_shim_cache_open(ctx.as_ptr(), seq, &raw mut info))?;
            let mut layers = vec![std::mem::zeroed(); info.n_layer as usize];
            ok(sys::gvote_shim_cache_layers(ctx.as_ptr(), layers.as_mut_ptr()))?;
            let tensors = || layers.iter().flat_map(|l: &sys::gvote_shim_layer| [&*l.k, &*l.v]);
            let bytes_per_cell = tensors().map(|t| sys::ggml_row_size(t.type_, t.ne[0])).sum();
            let on_host = tensors().all(|t| reaches(t.buffer));
            Ok(Self { info, bytes_per_cell, on_host, layers })
        }
    }

    /// Cells of the sequence's stream, used or not.
    pub fn n_cells(&self) -> usize {
        self.info.n_cells as usize
    }

    /// Layers that store K and V in this cache.
    pub fn n_layer(&self) -> usize {
        self.layers.len()
    }

    /// KV heads of each layer, in order.
    pub fn n_head_kv(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers.iter().map(|l| l.n_head_kv as usize)
    }

    /// Range of KV heads of each layer, counted over all layers.
    pub(crate) fn heads(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let of_layer = |n_heads| {
            end += n_heads;
            end - n_heads..end
        };
        self.n_head_kv().map(of_layer).collect()
    }

    /// Whether the whole cache lies in memory that the host can access in place.
    pub(crate) fn is_host(&self) -> bool {
        self.on_host && !pretends_device()
    }

    /// Bytes of K and V in one cell, over all layers.
    pub fn bytes_per_cell(&self) -> usize {
        self.bytes_per_cell
    }
}

/// Counts the cells of `seq` without listing them.
pub(crate) fn n_cells(ctx: &Context, seq: SeqId) -> usize {
    // SAFETY: valid context; the shim checks the rest, and writes nothing.
    unsafe { sys::gvote_shim_cells(ctx.as_ptr(), seq, std::ptr::null_mut(), 0) as usize }
}

/// Returns the cells of `seq`, ordered by position; none if there is no attention cache or no such sequence.
pub fn cells(ctx: &Context, seq: SeqId) -> Vec<Cell> {
    // SAFETY: valid context; the shim checks the rest, and writes at most the given number of entries.
    unsafe {
        let n = sys::gvote_shim_cells(ctx.as_ptr(), seq, std::ptr::null_mut(), 0);
        let mut raw = vec![std::mem::zeroed::<sys::gvote_shim_cell>(); n as usize];
        sys::gvote_shim_cells(ctx.as_ptr(), seq, raw.as_mut_ptr(), n);
        raw.iter().map(|c| Cell { index: c.index, pos: c.pos, token: c.token, shared: c.shared }).collect()
    }
}

/// Returns the position and token of `seq` in each of `cells`, whose indices count over all streams.
///
/// # Safety
/// `ctx` is valid, and its layout was accepted.
pub(crate) unsafe fn rows(ctx: *mut sys::llama_context, seq: SeqId, cells: &[i64]) -> Vec<sys::gvote_shim_row> {
    let mut out = vec![sys::gvote_shim_row { pos: -1, token: -1 }; cells.len()];
    // SAFETY: both arrays have as many entries; see above for the context.
    unsafe { sys::gvote_shim_rows(ctx, seq, cells.as_ptr(), cells.len() as u32, out.as_mut_ptr()) };
    out
}

/// Returns the sequences that own any of `cells`, whose indices count over all streams.
///
/// # Safety
/// `ctx` is valid, and its layout was accepted.
pub(crate) unsafe fn owners(ctx: *mut sys::llama_context, cells: &[i64]) -> Vec<SeqId> {
    // SAFETY: the buffer has the size that the shim asks for; see above for the context.
    unsafe {
        let mut out = vec![0; sys::llama_max_parallel_sequences()];
        let n = sys::gvote_shim_owners(ctx, cells.as_ptr(), cells.len() as u32, out.as_mut_ptr());
        out.truncate(n as usize);
        out
    }
}

/// Returns the first position at which `seq` can be truncated so that the next token still sees a whole sliding window and a matching state
/// of recurrent layers; 0 if the model has neither.
pub(crate) fn cut_from(ctx: &Context, seq: SeqId) -> Pos {
    // SAFETY: valid context; the shim checks the rest.
    unsafe { sys::gvote_shim_cut_from(ctx.as_ptr(), seq) }
}

/// Counts the cells of the stream of `seq` that no sequence uses; 0 if there is no attention cache or no such sequence.
pub fn cells_free(ctx: &Context, seq: SeqId) -> usize {
    // SAFETY: valid context; the shim checks the rest.
    unsafe { sys::gvote_shim_cells_free(ctx.as_ptr(), seq) as usize }
}

/// Returns the index after the last cell that any sequence uses in the stream of `seq`; 0 if there is no attention cache or no such
/// sequence.
pub(crate) fn cells_end(ctx: &Context, seq: SeqId) -> usize {
    // SAFETY: valid context; the shim checks the rest.
    unsafe { sys::gvote_shim_cells_end(ctx.as_ptr(), seq) as usize }
}

/// Returns the first `n` free cells, or all of them if there are fewer.
pub(crate) fn free_cells(ctx: &Context, seq: SeqId, n: usize) -> Vec<u32> {
    let mut free = vec![0; n.min(cells_free(ctx, seq))];
    // SAFETY: valid context; the shim checks the rest, and writes at most the given number of entries.
    let n = unsafe { sys::gvote_shim_free_cells(ctx.as_ptr(), seq, free.as_mut_ptr(), free.len() as u32) };
    free.truncate(n as usize);
    free
}

/// A context in which one sequence is open to experiments. Dropping this restores the sequence, cell by cell, and frees the cells of the
/// experiment. See `gvote_shim_park`.
pub(crate) struct Parked<'a> {
    ctx: &'a mut Context,
    raw: NonNull<sys::gvote_shim_parked>,
}

impl<'a> Parked<'a> {
    /// Parks a sequence. `room`: maximum number of tokens that an experiment decodes before it is reset.
    ///
    /// # Errors
    /// [`CacheError`] if memory runs out; nothing has changed then.
    pub fn new(ctx: &'a mut Context, seq: SeqId, room: usize) -> Result<Self, CacheError> {
        let mut raw = std::ptr::null_mut();
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        // SAFETY: valid context; the shim checks the rest. The result is freed in drop.
        unsafe { ok(sys::gvote_shim_park(ctx.as_ptr(), seq, room, &raw mut raw))? };
        let raw = NonNull::new(raw).ok_or_else(|| CacheError(CacheError::OUT_OF_MEMORY.into()))?;
        Ok(Self { ctx, raw })
    }

    /// Hides the cells at `positions` from the sequence; cells of a window cache stay visible.
    ///
    /// # Errors
    /// [`CacheError`] if memory runs out; nothing is hidden then.
    pub fn hide(&mut self, positions: Range<Pos>) -> Result<(), CacheError> {
        if positions.is_empty() {
            return Ok(());
        }
        // SAFETY: the sequence is parked; llama.cpp checks the rest.
        unsafe { ok(sys::gvote_shim_parked_hide(self.raw.as_ptr(), positions.start, positions.end, false)) }
    }

    /// Hides every cell from position `p0` on from the sequence, in all layers.
    ///
    /// # Errors
    /// As [`Self::hide`].
    pub fn hide_from(&mut self, p0: Pos) -> Result<(), CacheError> {
        // SAFETY: the sequence is parked; -1 is an open end.
        unsafe { ok(sys::gvote_shim_parked_hide(self.raw.as_ptr(), p0, -1, true)) }
    }

    /// Ends an experiment: restores the hidden cells, and frees the cells of the experiment.
    ///
    /// # Errors
    /// [`CacheError`] if memory runs out; no further experiment is possible then.
    pub fn reset(&mut self) -> Result<(), CacheError> {
        // SAFETY: the sequence is parked; the text is static.
        unsafe { ok(sys::gvote_shim_parked_reset(self.raw.as_ptr())) }
    }
}

impl Deref for Parked<'_> {
    type Target = Context;

    fn deref(&self) -> &Context {
        self.ctx
    }
}

impl DerefMut for Parked<'_> {
    fn deref_mut(&mut self) -> &mut Context {
        self.ctx
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        // SAFETY: parked in `new`, unparked once.
        unsafe { sys::gvote_shim_unpark(self.raw.as_ptr()) };
    }
}

/// Whether the host can read and write a buffer in place.
///
/// # Safety
/// `buffer` is valid or NULL (no memory).
pub(crate) unsafe fn is_host(buffer: sys::ggml_backend_buffer_t) -> bool {
    // SAFETY: passed on.
    !pretends_device() && unsafe { reaches(buffer) }
}

/// Whether the host can access a buffer, regardless of the test setting.
///
/// # Safety
/// As for [`is_host`].
unsafe fn reaches(buffer: sys::ggml_backend_buffer_t) -> bool {
    // SAFETY: passed on.
    !buffer.is_null() && unsafe { sys::ggml_backend_buffer_is_host(buffer) }
}

/// Whether a test treats all memory as device memory.
fn pretends_device() -> bool {
    #[cfg(test)]
    return PRETEND_DEVICE.get();
    #[cfg(not(test))]
    false
}

#[cfg(test)]
thread_local! {
    /// Set by tests to run the code for device memory.
    pub(crate) static PRETEND_DEVICE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Converts the shim's answer to a result.
///
/// # Safety
/// `reason` is NULL or a static C string.
pub(crate) unsafe fn ok(reason: *const std::ffi::c_char) -> Result<(), CacheError> {
    if reason.is_null() {
        return Ok(());
    }
    // SAFETY: see above.
    Err(CacheError(unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned()))
}
