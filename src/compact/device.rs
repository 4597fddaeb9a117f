//! Rows in memory of a device: a graph of two nodes for each of K and V takes them out and puts them in.
//!
//! A row of one head is copied bit by bit, so it may be called floats whatever its type: then `get_rows` and `set_rows` neither
//! convert nor round.

use super::{Moves, host};
use crate::backend::{self, Builder, ComputeError, Devices, Tensor};
use crate::cache::Layout;
use crate::sys;

/// What moves the rows of a sequence, with the memory for it.
pub(super) struct Mover {
    devices: Devices,
}

impl Mover {
    /// Takes the memory to move `n` cells of any layer.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn new(layout: &Layout, n: usize) -> Result<Self, ComputeError> {
        let mut mover = Self { devices: Devices::new(1) };
        let mut reserved = Vec::new();
        for layer in layout.layers.iter().filter(|layer| moves_on_device(layout, layer)) {
            // SAFETY: the storage tensors live as long as the context, which the caller holds.
            let shape =
                unsafe { (backend::place((*layer.k).buffer), (*layer.k).nb[1], (*layer.v).nb[1], layer.n_head_kv) };
            if reserved.contains(&shape) {
                continue;
            }
            reserved.push(shape);
            let mut b = Builder::new(NODES)?;
            let from = b.rows([n, layer.n_head_kv as usize, 1], vec![0; n * layer.n_head_kv as usize]);
            let to = b.rows([n, 1, 1], vec![0; n]);
            mover.describe(&mut b, layout, layer, from, to);
            // SAFETY: the storage tensors live as long as the context, which the caller holds.
            b.reserve(unsafe { mover.devices.at((*layer.k).buffer)? })?;
        }
        Ok(mover)
    }

    /// Moves the rows of all layers. `moves_of`: of each head of a layer; those of the next `n_threads` layers are put together while
    /// the device works. `ascending`: see [`host::move_layer`].
    pub fn move_layers<'a>(
        &mut self,
        layout: &Layout,
        moves_of: &(dyn Fn(usize) -> Vec<Moves<'a>> + Sync),
        ascending: bool,
        n_threads: usize,
    ) {
        let list = |il| {
            let moves = moves_of(il);
            let mut from = Vec::with_capacity(moves.iter().map(|moves| moves.to.len()).sum());
            moves.iter().for_each(|moves| moves.sources(&mut from));
            (moves, from)
        };
        let list = &list;
        let n_layer = layout.n_layer();
        std::thread::scope(|scope| {
            let start = |first: usize| -> Vec<_> {
                (first..(first + n_threads).min(n_layer)).map(|il| scope.spawn(move || list(il))).collect()
            };
            let mut ahead = start(0);
            for first in (0..n_layer).step_by(n_threads) {
                let lists = ahead.into_iter().map(|thread| thread.join().expect("a list of rows does not panic"));
                let lists: Vec<_> = lists.collect();
                ahead = start(first + n_threads);
                for (layer, (moves, from)) in layout.layers[first..].iter().zip(lists) {
                    self.move_layer(layout, layer, &moves, from, ascending);
                }
            }
        });
    }

    /// `from`: the cells that give, head by head.
    fn move_layer(
        &mut self,
        layout: &Layout,
        layer: &sys::gvote_shim_layer,
        moves: &[Moves],
        from: Vec<u32>,
        ascending: bool,
    ) {
        if !moves_on_device(layout, layer) {
            // SAFETY: the cache is idle, and this is the only thread that touches it.
            unsafe { host::move_layer(layout, layer, moves, ascending) };
            return;
        }
        let Some(to) = moves.first().map(|moves| moves.to) else { return };
        let moved = self.try_move(layout, layer, from, to);
        debug_assert!(
            moved.is_ok(),
            "the memory was taken before, and a device that fails ends the process: {moved:?}"
        );
    }

    fn try_move(
        &mut self,
        layout: &Layout,
        layer: &sys::gvote_shim_layer,
        from: Vec<u32>,
        to: &[u32],
    ) -> Result<(), ComputeError> {
        let mut b = Builder::new(NODES)?;
        let from = b.rows([to.len(), layer.n_head_kv as usize, 1], from);
        let to = b.rows([to.len(), 1, 1], to.to_vec());
        self.describe(&mut b, layout, layer, from, to);
        // SAFETY: the storage tensors live as long as the context, which the caller holds.
        b.compute(unsafe { self.devices.at((*layer.k).buffer)? })
    }

    /// `from` `[n, n_head_kv]`, `to` `[n]`: numbers of cells.
    fn describe(&self, b: &mut Builder, layout: &Layout, layer: &sys::gvote_shim_layer, from: Tensor, to: Tensor) {
        for (storage, d) in [(layer.k, layer.n_embd_head_k), (layer.v, layer.n_embd_head_v)] {
            // SAFETY: shapes as noted; the views lie inside the storage, and the floats inside their rows.
            unsafe {
                let bytes = row_bytes(storage, d);
                let offset = layout.info.stream as usize * (*storage).nb[2];
                let heads = i64::from(layer.n_head_kv);
                let view = || {
                    let nb1 = (*storage).nb[1];
                    let view = sys::ggml_view_3d(
                        b.ctx,
                        storage,
                        i64::from(d),
                        layout.n_cells() as i64,
                        heads,
                        nb1,
                        bytes,
                        offset,
                    );
                    (*view).type_ = sys::GGML_TYPE_F32;
                    (*view).ne[0] = (bytes / size_of::<f32>()) as i64;
                    (*view).nb[0] = size_of::<f32>();
                    view
                };
                let (given, receiving) = (view(), view());
                let rows = sys::ggml_get_rows(b.ctx, given, from);
                let moved = sys::ggml_set_rows(b.ctx, receiving, rows, to);
                b.run(moved);
            }
        }
    }
}

/// Nodes, views and inputs of one layer.
const NODES: usize = 16;

/// Bytes of one head's row.
unsafe fn row_bytes(storage: Tensor, d: u32) -> usize {
    // SAFETY: passed on.
    unsafe { sys::ggml_row_size((*storage).type_, i64::from(d)) }
}

/// Whether K and V of a layer lie on one device, in rows that are whole floats.
fn moves_on_device(layout: &Layout, layer: &sys::gvote_shim_layer) -> bool {
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
