//! Copies the rows that a compaction drops to an archive, before any row moves.

#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::beside::Gathered;
use super::pack::copy_out;
use super::{CompactError, give_up, host};
use crate::archive::Archive;
use crate::backend::{self, ComputeError, Devices};
use crate::cache::{Cell, Layout};
use crate::policy::Selection;
use crate::policy::threads;

/// Destination of the rows that leave the cache.
pub(crate) struct Aside<'a> {
    pub archive: &'a mut Archive,
    /// Position that a head, counted over all layers, holds in the cell at a place.
    pub pos: &'a (dyn Fn(usize, usize) -> u32 + Sync),
    /// Receives the time that copying takes.
    pub time: &'a mut Duration,
}

/// Positions and rows of a head, to be filled in.
type Room<'a> = (&'a mut [u32], &'a mut [u8]);

impl Aside<'_> {
    /// Archives those of `cells` that `selection`, which must have been checked, does not keep. The cache is idle.
    ///
    /// # Errors
    /// [`CompactError::Archive`], [`CompactError::ArchiveFile`] and [`CompactError::Compute`]; the archive is then as it was.
    pub(super) fn copy_dropped(
        self,
        layout: &Layout,
        cells: &[Cell],
        selection: &Selection,
        n_threads: usize,
        devices: &mut [Devices],
    ) -> Result<(), CompactError> {
        let clock = Instant::now();
        let n = cells.len() - selection.n_cells();
        if n == 0 {
            return Ok(());
        }
        let (form, mut batch) = (self.archive.form(), self.archive.room(n)?);
        let dropped_by = |head: usize| dropped(selection.kept_by(head), cells.len());
        let note = |(head, (positions, _)): (usize, Room)| {
            positions.iter_mut().zip(dropped_by(head)).for_each(|(pos, place)| *pos = (self.pos)(head, place));
        };
        threads::share_out(n_threads, batch.heads_mut().enumerate(), note, || ());
        let heads_of = layout.heads();
        let cells_by = |head: usize| dropped_by(head).map(|place| cells[place].index);
        let cells_of = |il: usize| heads_of[il].clone().flat_map(cells_by).collect();
        let gathered = if batch.is_in_memory() { Gathered::new(layout, form, n, &cells_of)? } else { None };
        if let Some(gathered) = gathered {
            batch.fill_later(|rooms| gathered.deliver(rooms).unwrap_or_else(|error| give_up(error)));
        } else {
            let mut rooms = batch.heads_mut();
            let layers = heads_of.iter().enumerate();
            let layers = layers.map(|(il, heads)| (il, rooms.by_ref().take(heads.len()).collect::<Vec<_>>())).collect();
            let copy = |(il, rooms): (usize, Vec<Room>), devices: Option<&mut Devices>| {
                let mut heads: Vec<host::Leaving> = Vec::new();
                for (head, (_, rows)) in heads_of[il].clone().zip(rooms) {
                    let bytes = rows.len() / n;
                    heads.push(cells_by(head).zip(rows.chunks_exact_mut(bytes)).collect());
                }
                copy_out(devices, layout, il, &mut heads, form)
            };
            each_layer(layout, n_threads, devices, layers, copy)?;
        }
        self.archive.push(batch)?;
        *self.time = clock.elapsed();
        Ok(())
    }
}

/// Runs `work` on each of `parts`, each of which belongs to one layer: on at most `n_threads` threads if the host can access the cache,
/// otherwise on one thread for each of `devices`.
pub(super) fn each_layer<T: Send>(
    layout: &Layout,
    n_threads: usize,
    devices: &mut [Devices],
    parts: Vec<T>,
    work: impl Fn(T, Option<&mut Devices>) -> Result<(), ComputeError> + Sync,
) -> Result<(), ComputeError> {
    let done = Mutex::new(Ok(()));
    let work = |part, devices: Option<&mut Devices>| {
        if let Err(error) = work(part, devices) {
            *done.lock().expect(ALIVE) = Err(error);
        }
    };
    if layout.is_host() {
        let n_threads = n_threads.clamp(1, parts.len().max(1));
        threads::share_out(n_threads, parts.into_iter(), |part| work(part, None), || ());
    } else if let Some((own, others)) = devices.split_first_mut() {
        let parts = Mutex::new(parts.into_iter());
        let work_on = |devices: &mut Devices| {
            let next = || parts.lock().expect(ALIVE).next();
            while let Some(part) = next() {
                work(part, Some(&mut *devices));
            }
        };
        let work_on = &work_on;
        threads::scope(|crew| {
            for devices in others {
                crew.start(backend::elsewhere(move || work_on(devices)));
            }
            work_on(own);
        });
    }
    done.into_inner().expect(ALIVE)
}

const ALIVE: &str = "taking a part and noting an error do not panic";

/// Returns the places below `n` that are not in `kept`, which ascends; None keeps all places.
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
