//! What a compaction drops, copied to an archive before anything moves.

#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::pack::copy_out;
use super::{CompactError, host};
use crate::archive::Archive;
use crate::backend::{ComputeError, Devices};
use crate::cache::{Cell, Layout};
use crate::policy::Selection;
use crate::threads;

/// Where rows go that leave the cache.
pub(crate) struct Aside<'a> {
    pub archive: &'a mut Archive,
    /// The position that a head, counted over all layers, holds in the cell at a place.
    pub pos: &'a (dyn Fn(usize, usize) -> u32 + Sync),
    /// How long that takes.
    pub time: &'a mut Duration,
}

/// Positions and rows of a head that are to be filled in.
type Room<'a> = (&'a mut [u32], &'a mut [u8]);

impl Aside<'_> {
    /// Sets aside what `selection`, which was checked, does not keep of `cells`. The cache is idle.
    ///
    /// # Errors
    /// [`CompactError::Archive`] and [`CompactError::Compute`]; the archive is then as it was.
    pub(super) fn copy_dropped(
        self,
        layout: &Layout,
        cells: &[Cell],
        selection: &Selection,
        n_threads: usize,
        devices: &mut Devices,
    ) -> Result<(), CompactError> {
        let clock = Instant::now();
        let n = cells.len() - selection.n_cells();
        if n == 0 {
            return Ok(());
        }
        let (form, mut batch) = (self.archive.form(), self.archive.room(n)?);
        let layers: Vec<_> = {
            let (mut rooms, mut first) = (batch.heads_mut(), 0);
            let layer = |(il, n_heads)| {
                first += n_heads;
                (il, first - n_heads, rooms.by_ref().take(n_heads).collect::<Vec<_>>())
            };
            layout.n_head_kv().enumerate().map(layer).collect()
        };
        let copy = |(il, first, rooms): (usize, usize, Vec<Room>), devices: Option<&mut Devices>| {
            let mut heads: Vec<host::Leaving> = Vec::new();
            for (head, (positions, rows)) in (first..).zip(rooms) {
                let places = || dropped(selection.kept_by(head), cells.len());
                positions.iter_mut().zip(places()).for_each(|(pos, place)| *pos = (self.pos)(head, place));
                let mut leaving = Vec::with_capacity(n);
                leaving.extend(places().map(|place| cells[place].index).zip(rows.chunks_exact_mut(rows.len() / n)));
                heads.push(leaving);
            }
            copy_out(devices, layout, il, &mut heads, form)
        };
        each_layer(layout, n_threads, devices, layers, copy)?;
        self.archive.push(batch)?;
        *self.time = clock.elapsed();
        Ok(())
    }
}

/// Does `work` to each of `parts`, of which each is about one layer: in at most `n_threads` threads where the host can reach the cache,
/// else one after another with `devices`.
pub(super) fn each_layer<T: Send>(
    layout: &Layout,
    n_threads: usize,
    devices: &mut Devices,
    parts: Vec<T>,
    work: impl Fn(T, Option<&mut Devices>) -> Result<(), ComputeError> + Sync,
) -> Result<(), ComputeError> {
    if !layout.is_host() {
        return parts.into_iter().try_for_each(|part| work(part, Some(devices)));
    }
    let n_threads = n_threads.clamp(1, parts.len().max(1));
    let done = Mutex::new(Ok(()));
    let work = |part| {
        if let Err(error) = work(part, None) {
            *done.lock().expect("noting an error does not panic") = Err(error);
        }
    };
    threads::share_out(n_threads, parts.into_iter(), work, || ());
    done.into_inner().expect("noting an error does not panic")
}

/// The places of `n` that are not in `kept`, which ascends; None: all are.
fn dropped(kept: Option<&[u32]>, n: usize) -> impl Iterator<Item = usize> {
    let end = if kept.is_some() { n } else { 0 };
    let mut kept = kept.unwrap_or_default().iter().map(|&place| place as usize).peekable();
    (0..end).filter(move |place| kept.next_if_eq(place).is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_are_not_kept_are_dropped() {
        let dropped_of = |kept: Option<&[u32]>, n| dropped(kept, n).collect::<Vec<_>>();
        assert_eq!(dropped_of(Some(&[1, 2, 5]), 7), [0, 3, 4, 6]);
        assert_eq!(dropped_of(Some(&[]), 2), [0, 1]);
        assert_eq!(dropped_of(Some(&[0, 1]), 2), [0; 0]);
        assert_eq!(dropped_of(None, 3), [0; 0]);
    }
}
