//! Applies a [`Selection`] in place: the sequence then has fewer cells.
//!
//! 1. **Check** everything that could fail, and build the new cell table separately (the shim).
//! 2. **Set aside** the rows that leave, if they are to come back: see `src/archive.rs`. Running out of memory or disk space here is the
//!    last possible error.
//! 3. **Move** rows: for each layer and KV head the kept rows of K and V are gathered into the first C cells that the sequence owns. If
//!    cells and positions ascend together, a source never lies before its destination, so ascending copies need no temporary; otherwise one
//!    head's rows go through a buffer. If the host cannot reach the memory, a small graph on the layer's device does the same; its memory
//!    is allocated before the first row moves. Rows that no graph can move (V stored transposed, without flash attention) are fetched,
//!    moved on the host, and written back.
//! 4. **Commit** the table while the rows move: freeing llama.cpp's old table takes as long as moving some layers. Neither 3 nor 4 can
//!    fail, so a failed compaction leaves the cache as it was.
//!
//! If all heads keep the same tokens (`--evict cells`), the result is that of `llama_memory_seq_rm` on the dropped positions followed by
//! closing the holes. Both happen in one step because a removal cannot be undone if closing fails.
//!
//! Composite cells: cell c of the result holds, for every (layer, KV head), the c-th key and value that *this head* kept. Its label is the
//! largest position that it holds. So labels ascend, the last one is the sequence's last position, and removing the cells from some
//! position on never leaves a newer key behind.

mod arrange;
mod aside;
mod beside;
mod device;
mod host;
mod mask;
mod pack;
mod pages;

use std::borrow::Cow;
use std::fmt::Display;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Mutex;

pub(crate) use self::arrange::{Arranged, Held, arrange};
pub(crate) use self::aside::Aside;
use self::device::Mover;
pub(crate) use self::pack::{row_bytes, unfit};
pub(crate) use self::pages::give_back;
use crate::archive::NoRoom;
use crate::backend::{ComputeError, DEVICE_LAYERS, Devices};
use crate::cache::{self, CacheError, Cell, Layout};
use crate::llama::{Context, SeqId};
use crate::policy::threads;
use crate::policy::{Kept, Selection};
use crate::sys;

pub(crate) use mask::Mask;
pub use mask::MaskError;

/// Reasons why a compaction was refused. The cache is unchanged.
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
    #[error(transparent)]
    Compute(#[from] ComputeError),
    #[error("the heads keep different numbers of tokens, which the cells of llama.cpp cannot: see `exact`")]
    Ragged,
    #[error(
        "there is no memory to set {} MiB of K and V aside that leave the cache: free some, or let them be lost (`recall` off)",
        bytes.div_ceil(1 << 20)
    )]
    Archive { bytes: usize },
    #[error(
        "there is no room on the disk to set {} MiB of K and V aside that leave the cache (`recall` {}: {reason}): free some, or let \
         them be lost (`recall` off)",
        bytes.div_ceil(1 << 20),
        path.display()
    )]
    ArchiveFile { bytes: usize, path: PathBuf, reason: String },
    #[error("the cells that rows come back to were taken since: {found} are free, and {needed} are needed")]
    NoCells { needed: usize, found: usize },
}

impl From<NoRoom> for CompactError {
    fn from(error: NoRoom) -> Self {
        match error {
            NoRoom::Memory { bytes } => Self::Archive { bytes },
            NoRoom::Disk { bytes, path, reason } => Self::ArchiveFile { bytes, path, reason },
        }
    }
}

/// Moves of one head's rows.
struct Moves<'a> {
    /// Destination cells.
    to: &'a [u32],
    /// Cells of the sequence, by position.
    cells: &'a [Cell],
    /// Source places in `cells`, one per destination; `None`: all places, in order.
    from: Option<Cow<'a, [u32]>>,
}

impl Moves<'_> {
    fn from(&self, c: usize) -> usize {
        let place = self.from.as_ref().map_or(c, |from| from[c] as usize);
        self.cells[place].index as usize
    }

    /// Appends the source cells, in order.
    fn sources(&self, out: &mut Vec<u32>) {
        match &self.from {
            Some(from) => out.extend(from.iter().map(|&place| self.cells[place as usize].index)),
            None => out.extend(self.cells[..self.to.len()].iter().map(|cell| cell.index)),
        }
    }
}

/// Moves of all heads' rows.
struct Order<'a> {
    /// See [`Moves`].
    to: &'a [u32],
    cells: &'a [Cell],
    /// Returns [`Moves::from`] for a head, counted over all layers.
    sources: &'a (dyn Fn(usize) -> Option<Cow<'a, [u32]>> + Sync),
    /// Whether no cell receives a row before its own row has been read.
    ascending: bool,
}

impl<'a> Order<'a> {
    /// Returns the moves of each of these heads.
    fn of(&self, heads: Range<usize>) -> Vec<Moves<'a>> {
        let Self { to, cells, .. } = *self;
        heads.map(|head| Moves { to, cells, from: (self.sources)(head) }).collect()
    }
}

/// The rows of a sequence, to be permuted and restored.
pub(crate) struct Reorder {
    layout: Layout,
    cells: Vec<Cell>,
    mover: Mover<Vec<Devices>>,
}

impl Reorder {
    /// Prepares to reorder the rows of `seq`.
    ///
    /// # Errors
    /// [`CompactError`] if the cells cannot be rearranged.
    pub fn of(ctx: &Context, seq: SeqId) -> Result<Self, CompactError> {
        let layout = Layout::of(ctx, seq)?;
        let cells = cache::cells(ctx, seq);
        if cells.iter().any(|c| c.shared) {
            return Err(CompactError::Shared);
        }
        let devices = (0..DEVICE_LAYERS).map(|_| Devices::new(1)).collect();
        let mover = Mover::new(devices, &layout, cells.len())?;
        Ok(Self { layout, cells, mover })
    }

    /// Permutes the rows, head by head: the cell at place c (in the order of positions) receives the row from place `sources(head)[c]`, a
    /// permutation of all places. No row is lost: the inverse permutation restores everything. Positions are unchanged, and the sequence
    /// keeps its cells.
    pub fn permute(&mut self, ctx: &mut Context, sources: &(dyn Fn(usize) -> Vec<u32> + Sync)) {
        let to: Vec<u32> = self.cells.iter().map(|c| c.index).collect();
        // SAFETY: valid context; llama.cpp may still be computing into the cache.
        unsafe { sys::gvote_shim_context_synchronize(ctx.as_ptr()) };
        let sources = |head| Some(Cow::Owned(sources(head)));
        let order = Order { to: &to, cells: &self.cells, sources: &sources, ascending: false };
        move_rows(&self.layout, &mut self.mover, &order, ctx.n_threads_batch(), || ());
    }
}

/// Keeps those of `cells`, the cells of `seq`, that `selection` names, frees the others, and leaves other sequences untouched. Returns the
/// cells of `seq` afterwards. `devices`: the back ends that move rows, see [`Scorer::devices`](crate::score::Scorer::devices). `aside`:
/// receives the dropped rows; None: they are lost.
///
/// # Errors
/// [`CompactError`]; the cache is then as it was.
pub(crate) fn compact(
    ctx: &mut Context,
    seq: SeqId,
    cells: &[Cell],
    selection: &Selection,
    devices: &mut [Devices],
    aside: Option<Aside>,
) -> Result<Vec<Cell>, CompactError> {
    if let Kept::Ragged { .. } = selection.kept {
        return Err(CompactError::Ragged);
    }
    let layout = Layout::of(ctx, seq)?;
    let n_threads = ctx.n_threads_batch();
    let last = check(layout.n_head_kv().sum(), cells, selection, n_threads)?;
    if matches!(selection.kept, Kept::All) {
        return Ok(cells.to_vec());
    }
    let n_cells = selection.n_cells();

    let mut slots: Vec<u32> = cells.iter().map(|c| c.index).collect();
    slots.sort_unstable();
    let to = &slots[..n_cells];
    let mut mover = Mover::new(devices, &layout, n_cells)?;
    let table = Table::new(ctx, seq, cells, to, &last)?;

    // llama.cpp may still be computing into the cache
    // SAFETY: valid context.
    unsafe { sys::gvote_shim_context_synchronize(ctx.as_ptr()) };
    if let Some(aside) = aside {
        aside.copy_dropped(&layout, cells, selection, n_threads, mover.devices())?;
    }
    let order = Order {
        to,
        cells,
        sources: &|head| selection.kept_by(head).map(Cow::Borrowed),
        ascending: cells.windows(2).all(|w| w[0].index < w[1].index),
    };
    // moving rows does not read the table
    move_rows(&layout, &mut mover, &order, n_threads, || table.commit(ctx, seq));
    Ok(to.iter().zip(&last).map(|(&index, &place)| Cell { index, ..cells[place as usize] }).collect())
}

/// A new cell table that is not yet in force.
struct Table(NonNull<sys::gvote_shim_table>);

impl Table {
    /// Builds a table in which `seq`, whose cells are `cells`, has only the cells `to`. Each takes the position and token of the entry of
    /// `cells` that `last` names.
    ///
    /// # Errors
    /// [`CacheError`], also if the cells have changed.
    fn new(ctx: &Context, seq: SeqId, cells: &[Cell], to: &[u32], last: &[u32]) -> Result<Self, CacheError> {
        debug_assert!(to.len() == last.len() && last.iter().all(|&place| (place as usize) < cells.len()));
        let cells: Vec<_> = cells.iter().map(Cell::raw).collect();
        let mut table = std::ptr::null_mut();
        // SAFETY: a context whose layout was accepted; the lengths passed are those of the arrays.
        unsafe {
            cache::ok(sys::gvote_shim_table_new(
                ctx.as_ptr(),
                seq,
                cells.as_ptr(),
                cells.len() as u32,
                to.as_ptr(),
                last.as_ptr(),
                to.len() as u32,
                &raw mut table,
            ))?;
        }
        Self::made(table)
    }

    /// Builds a table in which `seq`, whose cells are `cells`, has only the cells `to`, its own or free ones, with the positions and tokens
    /// of `rows`.
    ///
    /// # Errors
    /// As [`Self::new`].
    fn of_rows(
        ctx: &Context,
        seq: SeqId,
        cells: &[Cell],
        to: &[u32],
        rows: &[sys::gvote_shim_row],
    ) -> Result<Self, CacheError> {
        debug_assert_eq!(to.len(), rows.len());
        let cells: Vec<_> = cells.iter().map(Cell::raw).collect();
        let mut table = std::ptr::null_mut();
        // SAFETY: a context whose layout was accepted; the lengths passed are those of the arrays.
        unsafe {
            cache::ok(sys::gvote_shim_table_of_rows(
                ctx.as_ptr(),
                seq,
                cells.as_ptr(),
                cells.len() as u32,
                to.as_ptr(),
                rows.as_ptr(),
                to.len() as u32,
                &raw mut table,
            ))?;
        }
        Self::made(table)
    }

    fn made(table: *mut sys::gvote_shim_table) -> Result<Self, CacheError> {
        NonNull::new(table).map(Self).ok_or_else(|| CacheError(CacheError::OUT_OF_MEMORY.into()))
    }

    /// Puts the table in force for the sequence that it was made for.
    fn commit(self, ctx: &Context, seq: SeqId) {
        let table = ManuallyDrop::new(self).0;
        // SAFETY: the cells have not changed since the table was built; the shim frees the table.
        unsafe { sys::gvote_shim_table_commit(ctx.as_ptr(), seq, table.as_ptr()) };
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { sys::gvote_shim_table_free(self.0.as_ptr()) };
    }
}

/// Checks that `selection` can be applied to `cells`, with `n_heads` KV heads over all layers. Returns for each cell of the result the last
/// place that any head keeps in it; the cell takes the position of that place.
fn check(n_heads: usize, cells: &[Cell], selection: &Selection, n_threads: usize) -> Result<Vec<u32>, CompactError> {
    let n = cells.len();
    if selection.n != n {
        return Err(CompactError::Changed { expected: selection.n, found: n });
    }
    if cells.iter().any(|c| c.shared) {
        return Err(CompactError::Shared);
    }
    let n_cells = selection.n_cells();
    let malformed = CompactError::Malformed { n, heads: n_heads, n_cells };
    let (n_lists, complete) = match &selection.kept {
        Kept::All => return Ok((0..n as u32).collect()),
        Kept::Tokens(_) => (1, true),
        Kept::Heads { index, .. } => (n_heads, index.len() == n_heads * n_cells),
        Kept::Ragged { end, index } => {
            (n_heads, end.len() == n_heads && end.last() == Some(&index.len()) && end.is_sorted())
        }
    };
    if !complete {
        return Err(malformed);
    }
    let all = Mutex::new(Lists { last: vec![0; n_cells], ascend: true, keep_newest: false });
    let share = share(n_lists, n_cells, n_threads);
    let look_through = |first: usize| {
        let mut lists = Lists { last: vec![0; n_cells], ascend: true, keep_newest: false };
        let heads = first..(first + share).min(n_lists);
        heads.filter_map(|head| selection.kept_by(head)).for_each(|kept| lists.add(kept, n));
        all.lock().expect(ALIVE).add_all(&lists);
    };
    threads::share_out(n_lists.div_ceil(share), (0..n_lists).step_by(share), look_through, || ());
    let all = all.into_inner().expect(ALIVE);
    if !all.ascend {
        return Err(malformed);
    }
    if !all.keep_newest {
        return Err(CompactError::LastDropped);
    }
    Ok(all.last)
}

const ALIVE: &str = "reading lists does not panic";

/// Summary of the lists of some heads.
struct Lists {
    /// Largest place that any head keeps in each cell of the result.
    last: Vec<u32>,
    /// Whether each list ascends and stays below the number of places.
    ascend: bool,
    /// Whether any list ends with the last place.
    keep_newest: bool,
}

impl Lists {
    fn add(&mut self, kept: &[u32], n: usize) {
        // without a branch, so that the compiler can vectorise it
        let behind = kept.get(1..).unwrap_or_default();
        self.ascend &= kept.iter().zip(behind).fold(true, |ascend, (a, b)| ascend & (a < b));
        if let Some(&last) = kept.last() {
            self.ascend &= (last as usize) < n;
            self.keep_newest |= last as usize + 1 == n;
        }
        self.last.iter_mut().zip(kept).for_each(|(last, &place)| *last = (*last).max(place));
    }

    fn add_all(&mut self, other: &Self) {
        self.ascend &= other.ascend;
        self.keep_newest |= other.keep_newest;
        self.last.iter_mut().zip(&other.last).for_each(|(last, &place)| *last = (*last).max(place));
    }
}

/// Returns how many of `n_lists` lists with `len` entries each of at most `n_threads` threads gets.
pub(crate) fn share(n_lists: usize, len: usize, n_threads: usize) -> usize {
    /// Number of entries that take some 50 us: fewer do not amortise a thread.
    const A_THREAD: usize = 1 << 17;
    let threads = n_threads.min(n_lists * len / A_THREAD).max(1);
    n_lists.div_ceil(threads).max(1)
}

/// Aborts the process, as ggml does when a device fails: rows of other layers have moved, and this cannot be undone.
fn give_up(reason: impl Display) -> ! {
    eprintln!("gvote: rows of the KV cache could not be moved, and others were: {reason}");
    std::process::abort();
}

/// Moves the rows of all layers, and runs `meanwhile` at the same time.
fn move_rows(
    layout: &Layout,
    mover: &mut Mover<impl AsMut<[Devices]>>,
    order: &Order,
    n_threads: usize,
    meanwhile: impl FnOnce(),
) {
    let heads = layout.heads();
    let moves_of = |il: usize| order.of(heads[il].clone());
    let n_layer = layout.n_layer();
    let n_threads = n_threads.clamp(1, n_layer);
    if !layout.is_host() {
        return mover.move_layers(layout, order, &moves_of, n_threads, meanwhile);
    }
    // SAFETY: the cache is idle and no other thread works on this layer.
    let move_layer =
        |il: usize| unsafe { host::move_layer(layout, &layout.layers[il], &moves_of(il), order.ascending) };
    threads::share_out(n_threads, 0..n_layer, move_layer, meanwhile);
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::llama::Pos;
    use crate::policy::Bound;

    const N_HEADS: usize = 7;
    const N: usize = 90_000;
    const C: usize = 60_000;

    fn cells() -> Vec<Cell> {
        (0..N as u32).map(|i| Cell { index: i, pos: i as Pos, token: 0, shared: false }).collect()
    }

    /// `[head][C]`; only one head keeps the newest place.
    fn lists() -> Vec<u32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let list = |_| {
            let mut places = rand::seq::index::sample(&mut rng, N - 1, C).into_vec();
            places.sort_unstable();
            places.into_iter().map(|place| place as u32)
        };
        let mut lists: Vec<u32> = (0..N_HEADS).flat_map(list).collect();
        lists[5 * C - 1] = N as u32 - 1;
        lists
    }

    fn checked(index: Vec<u32>, n_threads: usize) -> Result<Vec<u32>, CompactError> {
        let kept = Kept::Heads { n_cells: C, index };
        check(N_HEADS, &cells(), &Selection { kept, bound: Bound::Ratio, ..Selection::all(N) }, n_threads)
    }

    #[test]
    fn many_threads_look_through_lists_as_one_does() {
        assert_eq!(share(N_HEADS, C, 3), 3);
        let lists = lists();
        let last: Vec<u32> =
            (0..C).map(|c| lists.iter().skip(c).step_by(C).copied().max().unwrap_or_default()).collect();
        let malformed = |at: usize, place: u32, n_threads: usize| {
            let mut lists = lists.clone();
            lists[at] = place;
            matches!(checked(lists, n_threads), Err(CompactError::Malformed { .. }))
        };
        for n_threads in [1, 2, 3, 100] {
            assert!(checked(lists.clone(), n_threads).unwrap() == last, "{n_threads} threads");
            for head in 0..N_HEADS {
                let first = head * C;
                assert!(malformed(first + 1, lists[first], n_threads), "{n_threads} threads, head {head}: twice");
                assert!(malformed(first + C - 1, N as u32, n_threads), "{n_threads} threads, head {head}: beyond");
            }
        }
        let mut older = lists.clone();
        older[4 * C..5 * C].copy_from_slice(&lists[..C]);
        assert!(matches!(checked(older, 3), Err(CompactError::LastDropped)));
    }
}
