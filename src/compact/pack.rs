//! Archives rows as q8_0 where the cache has floats: half the bytes of f16.
//!
//! A value comes back with an error of at most half a 127th of the largest value in its block of 32. Packing a row again changes nothing
//! beyond the rounding of the cache's own type: the largest value keeps its level, and the others their distance to it.

use std::ops::Range;

use super::{device, host};
use crate::archive::RecallType;
use crate::backend::{ComputeError, Devices};
use crate::cache::Layout;
use crate::sys;

/// Rows per head that are converted at once: many, yet small compared with a cache.
const AT_ONCE: usize = 1024;

/// Format of one head's key or value in a cell.
#[derive(Clone, Copy)]
pub(super) struct Part {
    type_: sys::ggml_type,
    /// Number of values.
    d: usize,
    is_packed: bool,
}

/// Formats of archived rows of a layer's heads: key, then value.
pub(super) struct Packing([Part; 2]);

impl Part {
    fn new(storage: *const sys::ggml_tensor, d: u32, form: RecallType) -> Self {
        // SAFETY: the storage tensors live as long as the context, which the caller holds.
        let type_ = unsafe { (*storage).type_ };
        let is_float = [sys::GGML_TYPE_F32, sys::GGML_TYPE_F16, sys::GGML_TYPE_BF16].contains(&type_);
        Self { type_, d: d as usize, is_packed: is_float && form == RecallType::Q8_0 }
    }

    /// Bytes of a row in the cache.
    pub fn cached(&self) -> usize {
        // SAFETY: plain query.
        unsafe { sys::ggml_row_size(self.type_, self.d as i64) }
    }

    /// Bytes of a row in the archive.
    pub fn aside(&self) -> usize {
        let type_ = if self.is_packed { sys::GGML_TYPE_Q8_0 } else { self.type_ };
        // SAFETY: plain query.
        unsafe { sys::ggml_row_size(type_, self.d as i64) }
    }

    pub fn pack(&self, cached: &[u8], aside: &mut [u8], floats: &mut Vec<f32>) {
        if self.is_packed {
            self.convert(self.type_, cached, sys::GGML_TYPE_Q8_0, aside, floats);
        } else {
            aside.copy_from_slice(cached);
        }
    }

    fn unpack(&self, aside: &[u8], cached: &mut [u8], floats: &mut Vec<f32>) {
        if self.is_packed {
            self.convert(sys::GGML_TYPE_Q8_0, aside, self.type_, cached, floats);
        } else {
            cached.copy_from_slice(aside);
        }
    }

    /// Converts via f32 with ggml's own functions.
    fn convert(
        &self,
        from_type: sys::ggml_type,
        from: &[u8],
        to_type: sys::ggml_type,
        to: &mut [u8],
        floats: &mut Vec<f32>,
    ) {
        const STEP: usize = size_of::<f32>();
        floats.clear();
        floats.resize(self.d, 0.0);
        // SAFETY: ggml's table has an entry for each type, which lives forever.
        let [from_traits, to_traits] = [from_type, to_type].map(|type_| unsafe { &*sys::ggml_get_type_traits(type_) });
        match from_traits.to_float {
            // SAFETY: `d` numbers of this type, in whole blocks; every row begins at an even byte, as blocks and f16 require.
            Some(to_float) => unsafe { to_float(from.as_ptr().cast(), floats.as_mut_ptr(), self.d as i64) },
            None => {
                floats.iter_mut().zip(from.as_chunks::<STEP>().0).for_each(|(x, &bytes)| *x = f32::from_ne_bytes(bytes))
            }
        }
        match to_traits.from_float_ref {
            // SAFETY: as above.
            Some(from_float) => unsafe { from_float(floats.as_ptr(), to.as_mut_ptr().cast(), self.d as i64) },
            None => to.as_chunks_mut::<STEP>().0.iter_mut().zip(floats).for_each(|(bytes, x)| *bytes = x.to_ne_bytes()),
        }
    }
}

impl Packing {
    pub fn of(layer: &sys::gvote_shim_layer, form: RecallType) -> Self {
        Self(
            [(layer.k, layer.n_embd_head_k), (layer.v, layer.n_embd_head_v)]
                .map(|(storage, d)| Part::new(storage, d, form)),
        )
    }

    /// Formats of key and value.
    pub fn parts(&self) -> impl Iterator<Item = Part> {
        self.0.into_iter()
    }

    fn is_plain(&self) -> bool {
        self.0.iter().all(|part| !part.is_packed)
    }

    fn cached(&self) -> usize {
        self.0.iter().map(Part::cached).sum()
    }

    fn aside(&self) -> usize {
        self.0.iter().map(Part::aside).sum()
    }

    fn pack(&self, cached: &[u8], aside: &mut [u8], floats: &mut Vec<f32>) {
        let (k, v) = cached.split_at(self.0[0].cached());
        let (k_aside, v_aside) = aside.split_at_mut(self.0[0].aside());
        self.0[0].pack(k, k_aside, floats);
        self.0[1].pack(v, v_aside, floats);
    }

    fn unpack(&self, aside: &[u8], cached: &mut [u8], floats: &mut Vec<f32>) {
        let (k_aside, v_aside) = aside.split_at(self.0[0].aside());
        let (k, v) = cached.split_at_mut(self.0[0].cached());
        self.0[0].unpack(k_aside, k, floats);
        self.0[1].unpack(v_aside, v, floats);
    }
}

/// Returns the bytes of an archived row for each KV head, over all layers.
pub(crate) fn row_bytes(layout: &Layout, form: RecallType) -> impl Iterator<Item = usize> + '_ {
    layout
        .layers
        .iter()
        .flat_map(move |layer| std::iter::repeat_n(Packing::of(layer, form).aside(), layer.n_head_kv as usize))
}

/// Returns the size of a head's key or value that is not a multiple of q8_0's block size, or None if all fit.
pub(crate) fn unfit(layout: &Layout, form: RecallType) -> Option<usize> {
    // SAFETY: plain query.
    let block = unsafe { sys::ggml_blck_size(sys::GGML_TYPE_Q8_0) } as usize;
    let mut parts = layout.layers.iter().flat_map(|layer| Packing::of(layer, form).0);
    parts.find(|part| part.is_packed && !part.d.is_multiple_of(block)).map(|part| part.d)
}

/// Copies rows of one layer out of the idle cache. No other thread may use this layer.
pub(super) fn copy_out(
    devices: Option<&mut Devices>,
    layout: &Layout,
    il: usize,
    heads: &mut [host::Leaving],
    form: RecallType,
) -> Result<(), ComputeError> {
    let layer = &layout.layers[il];
    let packing = Packing::of(layer, form);
    let mut devices = devices;
    let mut copy = |heads: &mut [host::Leaving]| match &mut devices {
        Some(devices) => device::copy_out(devices, layout, layer, heads),
        // SAFETY: see above.
        None => unsafe { host::copy_out(layout, layer, heads) },
    };
    if packing.is_plain() {
        return copy(heads);
    }
    let (mut bytes, mut floats) = (Vec::new(), Vec::new());
    for these in chunks(heads.iter().map(Vec::len).max()) {
        let tiles: Vec<_> = heads.iter_mut().map(|head| part_mut(head, &these)).collect();
        bytes.resize(tiles.iter().map(|tile| tile.len()).sum::<usize>() * packing.cached(), 0);
        let mut rows = bytes.chunks_exact_mut(packing.cached());
        let mut leaving: Vec<host::Leaving> =
            tiles.iter().map(|tile| tile.iter().map(|(cell, _)| *cell).zip(rows.by_ref()).collect()).collect();
        copy(&mut leaving)?;
        let rows = bytes.chunks_exact(packing.cached());
        let to = tiles.into_iter().flatten();
        to.zip(rows).for_each(|((_, to), row)| packing.pack(row, to, &mut floats));
    }
    Ok(())
}

/// Copies rows of one layer into the idle cache. No other thread may use this layer.
pub(super) fn copy_in(
    devices: Option<&mut Devices>,
    layout: &Layout,
    il: usize,
    heads: &[host::Coming],
    form: RecallType,
) -> Result<(), ComputeError> {
    let layer = &layout.layers[il];
    let packing = Packing::of(layer, form);
    let mut devices = devices;
    let mut copy = |heads: &[host::Coming]| match &mut devices {
        Some(devices) => device::copy_in(devices, layout, layer, heads),
        // SAFETY: see above.
        None => unsafe { host::copy_in(layout, layer, heads) },
    };
    if packing.is_plain() {
        return copy(heads);
    }
    let (mut bytes, mut floats) = (Vec::new(), Vec::new());
    for these in chunks(heads.iter().map(Vec::len).max()) {
        let tiles: Vec<_> = heads.iter().map(|head| &head[clamped(head.len(), &these)]).collect();
        bytes.resize(tiles.iter().map(|tile| tile.len()).sum::<usize>() * packing.cached(), 0);
        let rows = bytes.chunks_exact_mut(packing.cached());
        let from = tiles.iter().copied().flatten();
        from.zip(rows).for_each(|((_, from), row)| packing.unpack(from, row, &mut floats));
        let mut rows = bytes.chunks_exact(packing.cached());
        let coming: Vec<host::Coming> =
            tiles.iter().map(|tile| tile.iter().map(|(cell, _)| *cell).zip(rows.by_ref()).collect()).collect();
        copy(&coming)?;
    }
    Ok(())
}

/// Splits the longest list into ranges of at most [`AT_ONCE`] rows.
fn chunks(longest: Option<usize>) -> impl Iterator<Item = Range<usize>> {
    let n = longest.unwrap_or(0);
    (0..n).step_by(AT_ONCE).map(move |first| first..(first + AT_ONCE).min(n))
}

fn clamped(len: usize, range: &Range<usize>) -> Range<usize> {
    range.start.min(len)..range.end.min(len)
}

fn part_mut<'a, T>(list: &'a mut [T], range: &Range<usize>) -> &'a mut [T] {
    let range = clamped(list.len(), range);
    &mut list[range]
}
