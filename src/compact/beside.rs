//! Copies rows from a device to the host while the device decodes.
//!
//! The device gathers the rows in separate device memory, which takes no longer than reading and writing them once; after that the cache
//! may be changed. A separate thread with a back end of its own then copies the rows to the host. So a vote does not wait for the bus. This
//! takes as much device memory as the rows have bytes, and frees it when they have arrived.

use super::device::{moves_on_device, rows_as_floats, storages};
use super::pack::Packing;
use crate::archive::RecallType;
use crate::backend::{self, Builder, ComputeError, Device, Lane};
use crate::cache::Layout;
use crate::sys;

/// One part in this many of a device's free memory may be taken temporarily: llama.cpp ends the process when it finds none.
const SPARE: usize = 4;
/// Limit on the numbers of K or V that are read at once.
const AT_ONCE: usize = Lane::PIECE / size_of::<f32>();

/// Rows of the cache, gathered in separate memory of a device.
pub(super) struct Gathered {
    lane: Lane,
    /// Device of the lane; must be dropped after it.
    _device: Device,
    layers: Vec<Layer>,
    /// Number of rows per head.
    n: usize,
}

/// The rows of a layer's heads.
struct Layer {
    n_heads: usize,
    packing: Packing,
    /// Offsets of its keys and values, `[head][n][row]`.
    at: [usize; 2],
}

impl Gathered {
    /// Gathers `n` rows of each head. `cells_of`: cells for the heads of a layer, one head after another. None if the layers do not lie on
    /// one device, the device has no memory to spare, or its driver does not support several threads.
    ///
    /// # Errors
    /// [`ComputeError`].
    /// [`ComputeError`].
    pub fn new(
        layout: &Layout,
        form: RecallType,
        n: usize,
        cells_of: &dyn Fn(usize) -> Vec<u32>,
    ) -> Result<Option<Self>, ComputeError> {
        let Some(first) = layout.layers.first() else { return Ok(None) };
        // SAFETY: the storage tensors live as long as the context, which the caller holds.
        let place_of = |layer: &sys::gvote_shim_layer| unsafe { backend::place((*layer.k).buffer) };
        let place = place_of(first);
        let is_one_place = |layer| moves_on_device(layout, layer) && place_of(layer) == place;
        if !backend::has_own_host_memory(place) || !layout.layers.iter().all(is_one_place) {
            return Ok(None);
        }
        let packings: Vec<Packing> = layout.layers.iter().map(|layer| Packing::of(layer, form)).collect();
        let mut sizes = Vec::new();
        for (layer, packing) in layout.layers.iter().zip(&packings) {
            let rows = n * layer.n_head_kv as usize;
            sizes.push(rows * size_of::<u32>());
            sizes.extend(packing.parts().map(|part| rows * part.cached()));
        }
        let Ok(device) = Device::new(place, 1) else { return Ok(None) };
        if device.free_bytes().is_some_and(|free| sizes.iter().sum::<usize>() > free / SPARE) {
            return Ok(None);
        }
        let mut lane = Lane::new(place);
        // SAFETY: the device, and with it the back end, lives as long as the lane.
        unsafe { lane.enter(device.backend())? };
        if lane.prepare(&sizes, 0).is_err() {
            return Ok(None);
        }
        let mut layers = Vec::with_capacity(packings.len());
        for (il, packing) in packings.into_iter().enumerate() {
            let (layer, n_heads) = (&layout.layers[il], layout.layers[il].n_head_kv as usize);
            let cells_at = lane.send(cells_of(il))?;
            let mut b = Builder::new(NODES)?;
            let cells = lane.sent(&b, cells_at, n * n_heads);
            // SAFETY: a tensor of this context.
            let cells = unsafe { sys::ggml_reshape_2d(b.ctx, cells, n as i64, n_heads as i64) };
            let at = storages(layer).map(|(storage, d)| {
                let rows = rows_as_floats(&b, layout, layer, storage, d);
                // SAFETY: tensors of this context, with matching shapes.
                let gathered = unsafe { sys::ggml_get_rows(b.ctx, rows, cells) };
                let at = lane.keep(gathered);
                b.run(gathered);
                at
            });
            // SAFETY: the cache lies on the same device, and stays as it is until the lane was waited for.
            unsafe { lane.enqueue(&mut b)? };
            layers.push(Layer { n_heads, packing, at });
        }
        lane.wait()?;
        Ok(Some(Self { lane, _device: device, layers, n }))
    }

    /// Copies the rows of all heads to the host. `rooms`: for each `[head]`, over all layers, `[n][row]` bytes.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn deliver<'a>(mut self, mut rooms: impl Iterator<Item = &'a mut [u8]>) -> Result<(), ComputeError> {
        let mut floats = Vec::new();
        for Layer { n_heads, packing, at } in &self.layers {
            for head in 0..*n_heads {
                let Some(room) = rooms.next() else { return Ok(()) };
                let row = room.len() / self.n;
                let mut start = 0;
                for (part, at) in packing.parts().zip(at) {
                    let (cached, end) = (part.cached(), start + part.aside());
                    let n_read = (AT_ONCE * size_of::<f32>() / cached).max(1);
                    let mut at = at + head * self.n * cached;
                    for rows in room.chunks_mut(n_read * row) {
                        let bytes = rows.len() / row * cached;
                        let read = self.lane.bytes(at, bytes)?;
                        let to = rows.chunks_exact_mut(row).map(|row| &mut row[start..end]);
                        to.zip(read.chunks_exact(cached)).for_each(|(to, from)| part.pack(from, to, &mut floats));
                        at += bytes;
                    }
                    start = end;
                }
            }
        }
        Ok(())
    }
}

/// Upper bound on the tensors for one layer: rows, cells, and gathered rows.
const NODES: usize = 16;
