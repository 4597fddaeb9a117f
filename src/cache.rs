//! The layout of a context's KV cache, read through the shim: which tensors hold K and V, and which cells a sequence owns.

use std::ffi::CStr;

use crate::llama::{Context, Pos, SeqId};
use crate::sys;

/// Why a context's cache cannot be worked on.
#[derive(Debug, thiserror::Error)]
#[error("the KV cache of this context cannot be compressed: {0}; --policy full runs it as it is")]
pub struct CacheError(pub(crate) String);

/// The attention cache of a context as one sequence sees it (the base cache, where a sliding-window cache lives beside it).
#[derive(Clone)]
pub struct Layout {
    pub(crate) info: sys::gvote_shim_cache,
    pub(crate) layers: Vec<sys::gvote_shim_layer>,
}

// SAFETY: the tensor pointers are only followed by code that holds the context.
unsafe impl Send for Layout {}

/// A cell of the cache that a sequence owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Place in the sequence's stream.
    pub index: u32,
    /// Position; of a composite cell the largest position it holds.
    pub pos: Pos,
    /// Another sequence sees this cell too.
    pub shared: bool,
}

impl Layout {
    /// # Errors
    /// [`CacheError`] for recurrent, hybrid and other layouts that cannot be compacted, with the reason.
    pub fn of(ctx: &Context, seq: SeqId) -> Result<Self, CacheError> {
        // SAFETY: the shim fills the structs it is given when it answers NULL, and its strings are static.
        unsafe {
            let mut info: sys::gvote_shim_cache = std::mem::zeroed();
            ok(sys::gvote_shim_cache_open(ctx.as_ptr(), seq, &raw mut info))?;
            let mut layers = vec![std::mem::zeroed(); info.n_layer as usize];
            ok(sys::gvote_shim_cache_layers(ctx.as_ptr(), layers.as_mut_ptr()))?;
            Ok(Self { info, layers })
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

    /// KV heads of every layer, in order.
    pub fn n_head_kv(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers.iter().map(|l| l.n_head_kv as usize)
    }

    /// Whether all of the cache lies in memory that the host can work on in place.
    pub(crate) fn is_host(&self) -> bool {
        // SAFETY: the storage tensors and their buffers live as long as the context.
        self.layers.iter().all(|l| unsafe { is_host((*l.k).buffer) && is_host((*l.v).buffer) })
    }

    /// Bytes of K and V that one cell takes over all layers.
    pub fn bytes_per_cell(&self) -> usize {
        // SAFETY: the storage tensors live as long as the context.
        self.layers
            .iter()
            .map(|l| unsafe {
                sys::ggml_row_size((*l.k).type_, (*l.k).ne[0]) + sys::ggml_row_size((*l.v).type_, (*l.v).ne[0])
            })
            .sum()
    }
}

/// The cells of `seq`, ordered by position.
pub fn cells(ctx: &Context, seq: SeqId) -> Vec<Cell> {
    // SAFETY: called with an accepted layout's context; writes at most the given number of entries.
    unsafe {
        let n = sys::gvote_shim_cells(ctx.as_ptr(), seq, std::ptr::null_mut(), 0);
        let mut raw = vec![std::mem::zeroed::<sys::gvote_shim_cell>(); n as usize];
        sys::gvote_shim_cells(ctx.as_ptr(), seq, raw.as_mut_ptr(), n);
        raw.iter().map(|c| Cell { index: c.index, pos: c.pos, shared: c.shared }).collect()
    }
}

/// Takes the cells at positions `p0..p1` away from `seq`, but not those of a window cache beside this one.
pub(crate) fn hide(ctx: &mut Context, seq: SeqId, p0: Pos, p1: Pos) {
    // SAFETY: called with an accepted layout's context; llama.cpp checks the rest.
    unsafe { sys::gvote_shim_hide(ctx.as_ptr(), seq, p0, p1) };
}

/// Cells of the stream of `seq` that no sequence uses.
pub fn cells_free(ctx: &Context, seq: SeqId) -> usize {
    // SAFETY: called with an accepted layout's context.
    unsafe { sys::gvote_shim_cells_free(ctx.as_ptr(), seq) as usize }
}

/// Whether the host can read and write a buffer in place.
///
/// # Safety
/// `buffer` is valid or NULL (which is nowhere).
pub(crate) unsafe fn is_host(buffer: sys::ggml_backend_buffer_t) -> bool {
    #[cfg(test)]
    if PRETEND_DEVICE.get() {
        return false;
    }
    // SAFETY: passed on.
    unsafe { !buffer.is_null() && sys::ggml_backend_buffer_is_host(buffer) }
}

#[cfg(test)]
thread_local! {
    /// Tests set it to walk the ways that memory of a device takes.
    pub(crate) static PRETEND_DEVICE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Turns the shim's answer into a result.
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
