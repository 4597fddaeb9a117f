//! Moves rows in device memory: for each of K and V a graph of two nodes reads the rows and writes them.
//!
//! A head's row is copied bit by bit, so the graph treats it as floats whatever its type: then `get_rows` and `set_rows` neither convert
//! nor round.

use std::borrow::Cow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};

use super::host::{Coming, Leaving};
use super::{Moves, Order, give_up, host};
use crate::backend::{self, Builder, ComputeError, DEVICE_LAYERS, Devices, Tensor};
use crate::cache::Layout;
use crate::policy::threads;
use crate::sys;

/// The back ends that move the rows of a sequence, with their memory.
pub(super) struct Mover<D: AsMut<[Devices]>> {
    /// Back ends of each thread.
    threads: D,
}

impl<D: AsMut<[Devices]>> Drop for Mover<D> {
    fn drop(&mut self) {
        self.threads.as_mut().iter_mut().for_each(|devices| _ = devices.release());
    }
}

/// Sources of the rows of one layer.
enum Rows<'a> {
    /// On a device: the source cells, head by head, then the destination cells.
    Device(Vec<u32>),
    /// In host memory, or to be fetched.
    Host(Vec<Moves<'a>>),
}

impl<D: AsMut<[Devices]>> Mover<D> {
    /// Allocates the memory to move `n` cells of any layer; it is freed on drop. `threads`: the back ends of each of one or more threads.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn new(threads: D, layout: &Layout, n: usize) -> Result<Self, ComputeError> {
        let mut mover = Self { threads };
        mover.threads.as_mut().iter_mut().try_for_each(|devices| reserve(devices, layout, n))?;
        Ok(mover)
    }

    /// Back ends of each thread.
    pub fn devices(&mut self) -> &mut [Devices] {
        self.threads.as_mut()
    }

    /// Moves the rows of all layers. `moves_of`: returns the moves of each head of a layer. While a device works on one layer, the graph of
    /// the next is built, and the lists of cells for later layers are prepared on at most `n_threads` other threads.
    pub fn move_layers<'a>(
        &mut self,
        layout: &Layout,
        order: &Order,
        moves_of: &(dyn Fn(usize) -> Vec<Moves<'a>> + Sync),
        n_threads: usize,
        meanwhile: impl FnOnce(),
    ) {
        let on_device: Vec<bool> = layout.layers.iter().map(|layer| moves_on_device(layout, layer)).collect();
        let rows_of = |il: usize| {
            let moves = moves_of(il);
            if !on_device[il] {
                return Rows::Host(moves);
            }
            let mut cells = Vec::with_capacity((moves.len() + 1) * order.to.len());
            moves.iter().for_each(|moves| moves.sources(&mut cells));
            cells.extend(order.to);
            Rows::Device(cells)
        };
        let n_layer = layout.n_layer();
        let next = AtomicUsize::new(0);
        let begin = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&il| il < n_layer);
        let (ready, listed) = mpsc::sync_channel(DEVICE_LAYERS);
        let line = Mutex::new(Line { listed, n_left: n_layer });
        // once a row has moved there is no way back, so no thread waits for another that may not have started
        let take = || {
            let mut line = line.lock().expect(ALIVE);
            line.n_left = line.n_left.checked_sub(1)?;
            Some(match line.listed.try_recv() {
                Ok(layer) => layer,
                Err(_) => match begin() {
                    Some(il) => {
                        drop(line);
                        (il, rows_of(il))
                    }
                    // another thread is preparing it already
                    None => line.listed.recv().expect(ALIVE),
                },
            })
        };
        let move_all = |devices: &mut Devices| {
            while let Some((il, rows)) = take() {
                move_layer(devices, layout, &layout.layers[il], rows, order);
            }
        };
        let list = || {
            while let Some(il) = begin() {
                ready.send((il, rows_of(il))).expect(ALIVE);
            }
        };
        let Some((own, others)) = self.threads.as_mut().split_first_mut() else { return };
        let n_lists = n_threads.saturating_sub(others.len()).max(1);
        let (move_all, list) = (&move_all, &list);
        threads::scope(|crew| {
            for devices in others {
                crew.start(backend::elsewhere(move || move_all(devices)));
            }
            for _ in 0..n_lists {
                crew.start(list);
            }
            meanwhile();
            move_all(own);
        });
    }
}

/// Layers that are still to be moved.
struct Line<'a> {
    /// Layers whose cells have been listed.
    listed: Receiver<(usize, Rows<'a>)>,
    /// Number of layers that have not been taken yet.
    n_left: usize,
}

/// ggml aborts rather than unwinds, and this crate's code here does not panic.
const ALIVE: &str = "who moves rows ends when there are no more";

/// Allocates the memory to move `n` cells of any layer.
fn reserve(devices: &mut Devices, layout: &Layout, n: usize) -> Result<(), ComputeError> {
    let mut reserved = Vec::new();
    for layer in layout.layers.iter().filter(|layer| moves_on_device(layout, layer)) {
        // SAFETY: the storage tensors live as long as the context, which the caller holds.
        let shape = unsafe { (backend::place((*layer.k).buffer), (*layer.k).nb[1], (*layer.v).nb[1], layer.n_head_kv) };
        if reserved.contains(&shape) {
            continue;
        }
        reserved.push(shape);
        let mut b = Builder::new(NODES)?;
        describe(&mut b, layout, layer, n, vec![0; n * numbers(layer)]);
        // SAFETY: the storage tensors live as long as the context, which the caller holds.
        b.reserve(unsafe { devices.at((*layer.k).buffer)? })?;
    }
    Ok(())
}

fn move_layer(devices: &mut Devices, layout: &Layout, layer: &sys::gvote_shim_layer, rows: Rows, order: &Order) {
    match rows {
        Rows::Device(cells) => {
            // its memory was allocated before
            if let Err(error) = try_move(devices, layout, layer, &cells) {
                give_up(error);
            }
        }
        // SAFETY: the cache is idle, and no other thread works on this layer.
        Rows::Host(moves) => unsafe { host::move_layer(layout, layer, &moves, order.ascending) },
    }
}

fn try_move(
    devices: &mut Devices,
    layout: &Layout,
    layer: &sys::gvote_shim_layer,
    cells: &[u32],
) -> Result<(), ComputeError> {
    let mut b = Builder::new(NODES)?;
    describe(&mut b, layout, layer, cells.len() / numbers(layer), cells);
    // SAFETY: the storage tensors live as long as the context, which the caller holds.
    b.compute(unsafe { devices.at((*layer.k).buffer)? })
}

/// Indices per destination cell: a source cell for each head, and the destination.
fn numbers(layer: &sys::gvote_shim_layer) -> usize {
    layer.n_head_kv as usize + 1
}

/// Adds the nodes that move `n` cells. `cells` `[n_head_kv + 1][n]`: the source cells of each head, then the destination cells, sent in one
/// transfer.
fn describe<'a>(
    b: &mut Builder<'a>,
    layout: &Layout,
    layer: &sys::gvote_shim_layer,
    n: usize,
    cells: impl Into<Cow<'a, [u32]>>,
) {
    let cells = b.rows([n, numbers(layer), 1], cells);
    // SAFETY: parts of a contiguous tensor of this context.
    let (from, to) = unsafe {
        let (n, heads, row) = (n as i64, i64::from(layer.n_head_kv), (*cells).nb[1]);
        (sys::ggml_view_2d(b.ctx, cells, n, heads, row, 0), sys::ggml_view_1d(b.ctx, cells, n, heads as usize * row))
    };
    for (storage, d) in storages(layer) {
        let (given, receiving) =
            (rows_as_floats(b, layout, layer, storage, d), rows_as_floats(b, layout, layer, storage, d));
        // SAFETY: tensors of this context, with matching shapes.
        unsafe {
            let rows = sys::ggml_get_rows(b.ctx, given, from);
            let moved = sys::ggml_set_rows(b.ctx, receiving, rows, to);
            b.run(moved);
        }
    }
}

/// K and V of a layer, each with its head size.
pub(super) fn storages(layer: &sys::gvote_shim_layer) -> [(Tensor, u32); 2] {
    [(layer.k, layer.n_embd_head_k), (layer.v, layer.n_embd_head_v)]
}

/// View of the rows of the sequence's stream as floats: `[floats, cells, n_head_kv]`.
pub(super) fn rows_as_floats(
    b: &Builder,
    layout: &Layout,
    layer: &sys::gvote_shim_layer,
    storage: Tensor,
    d: u32,
) -> Tensor {
    // SAFETY: shapes as noted; the view lies inside the storage, and the floats inside their rows.
    unsafe {
        let bytes = row_bytes(storage, d);
        let offset = layout.info.stream as usize * (*storage).nb[2];
        let (heads, nb1) = (i64::from(layer.n_head_kv), (*storage).nb[1]);
        let view = sys::ggml_view_3d(b.ctx, storage, i64::from(d), layout.n_cells() as i64, heads, nb1, bytes, offset);
        (*view).type_ = sys::GGML_TYPE_F32;
        (*view).ne[0] = (bytes / size_of::<f32>()) as i64;
        (*view).nb[0] = size_of::<f32>();
        view
    }
}

/// Rows per head that are copied from a device at once: many, yet small compared with a cache.
const AT_ONCE: usize = 4096;

/// As [`host::copy_out`]. Rows are gathered on the device, so that only they cross the bus.
///
/// # Errors
/// [`ComputeError`].
pub(super) fn copy_out(
    devices: &mut Devices,
    layout: &Layout,
    layer: &sys::gvote_shim_layer,
    heads: &mut [Leaving],
) -> Result<(), ComputeError> {
    if !moves_on_device(layout, layer) {
        // SAFETY: the cache is idle, and no other thread works on this layer.
        return unsafe { host::copy_out(layout, layer, heads) };
    }
    let n = heads.iter().map(Vec::len).max().unwrap_or(0);
    let mut rows: Vec<[u8; size_of::<f32>()]> = Vec::new();
    for first in (0..n).step_by(AT_ONCE) {
        let these = first..(first + AT_ONCE).min(n);
        // heads with fewer rows are filled up with an arbitrary cell, whose row is ignored
        let cell = |head: &Leaving, i: usize| head.get(i).map_or(0, |(cell, _)| *cell);
        let cells: Vec<u32> = heads.iter().flat_map(|head| these.clone().map(|i| cell(head, i))).collect();
        let mut b = Builder::new(NODES)?;
        let cells = b.rows([these.len(), heads.len(), 1], cells);
        let gathered = storages(layer).map(|(storage, d)| {
            let rows = rows_as_floats(&b, layout, layer, storage, d);
            // SAFETY: tensors of this context, with matching shapes.
            let gathered = unsafe { sys::ggml_get_rows(b.ctx, rows, cells) };
            b.output(gathered)
        });
        // SAFETY: the storage tensors live as long as the context, which the caller holds.
        let device = unsafe { devices.at((*layer.k).buffer)? };
        b.compute(device)?;
        let mut at = 0;
        for gathered in gathered {
            // SAFETY: a tensor of this context.
            let floats = unsafe { (*gathered).ne[0] as usize };
            rows.resize(floats * these.len() * heads.len(), Default::default());
            device.read(&mut rows, gathered)?;
            let bytes = floats * size_of::<f32>();
            for (head, rows) in heads.iter_mut().zip(rows.as_flattened().chunks_exact(bytes * these.len())) {
                let to = head.iter_mut().skip(first).map(|(_, row)| &mut row[at..][..bytes]);
                to.zip(rows.chunks_exact(bytes)).for_each(|(to, row)| to.copy_from_slice(row));
            }
            at += bytes;
        }
    }
    Ok(())
}

/// As [`host::copy_in`].
///
/// # Errors
/// [`ComputeError`].
pub(super) fn copy_in(
    devices: &mut Devices,
    layout: &Layout,
    layer: &sys::gvote_shim_layer,
    heads: &[Coming],
) -> Result<(), ComputeError> {
    let n = heads.first().map_or(0, Vec::len);
    // the graph needs the same number of rows in each head; otherwise the host writes them
    if !moves_on_device(layout, layer) || heads.iter().any(|head| head.len() != n) {
        // SAFETY: the cache is idle, and no other thread works on this layer.
        return unsafe { host::copy_in(layout, layer, heads) };
    }
    // SAFETY: the storage tensors live as long as the context, which the caller holds.
    let row: usize = storages(layer).into_iter().map(|(storage, d)| unsafe { row_bytes(storage, d) }).sum();
    // as many rows as one transfer can send
    let at_once = (backend::STAGE / (heads.len() * (row + size_of::<u32>() + 1))).max(1);
    let mut floats: [Vec<f32>; 2] = Default::default();
    for first in (0..n).step_by(at_once) {
        let these = first..(first + at_once).min(n);
        let cells: Vec<u32> = heads.iter().flat_map(|head| &head[these.clone()]).map(|&(cell, _)| cell).collect();
        let mut b = Builder::new(NODES)?;
        let cells = b.rows([these.len(), heads.len(), 1], cells);
        let mut at = 0;
        for ((storage, d), floats) in storages(layer).into_iter().zip(&mut floats) {
            // SAFETY: the storage tensors live as long as the context, which the caller holds.
            let bytes = unsafe { row_bytes(storage, d) };
            floats.clear();
            floats.reserve(bytes / size_of::<f32>() * these.len() * heads.len());
            for (_, row) in heads.iter().flat_map(|head| &head[these.clone()]) {
                floats.extend(row[at..][..bytes].as_chunks().0.iter().map(|&bytes| f32::from_ne_bytes(bytes)));
            }
            at += bytes;
            let rows = b.input([bytes / size_of::<f32>(), these.len(), heads.len()], &floats[..]);
            let receiving = rows_as_floats(&b, layout, layer, storage, d);
            // SAFETY: tensors of this context, with matching shapes.
            let put = unsafe { sys::ggml_set_rows(b.ctx, receiving, rows, cells) };
            b.run(put);
        }
        // SAFETY: the storage tensors live as long as the context, which the caller holds.
        b.compute(unsafe { devices.at((*layer.k).buffer)? })?;
    }
    Ok(())
}

/// Upper bound on the nodes, views and inputs of one layer.
const NODES: usize = 16;

/// Bytes of one head's row.
unsafe fn row_bytes(storage: Tensor, d: u32) -> usize {
    // SAFETY: passed on.
    unsafe { sys::ggml_row_size((*storage).type_, i64::from(d)) }
}

/// Whether K and V of a layer lie on one device, in rows that are a whole number of floats.
pub(super) fn moves_on_device(layout: &Layout, layer: &sys::gvote_shim_layer) -> bool {
    // SAFETY: the storage tensors live as long as the context.
    unsafe {
        let place = backend::place((*layer.k).buffer);
        let whole = |storage, d| row_bytes(storage, d).is_multiple_of(size_of::<f32>());
        !place.is_null()
            && place == backend::place((*layer.v).buffer)
            && !layout.info.v_trans
            && whole(layer.k, layer.n_embd_head_k)
            && whole(layer.v, layer.n_embd_head_v)
    }
}
