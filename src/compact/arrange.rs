//! Brings rows back: gives each head another choice of its rows, from those in the cache and those in the archive.
//!
//! 1. **Plan** for each head which rows its cells will hold, which of them come from the archive, and which leave for it.
//! 2. **Prepare** everything that can fail: free cells, the cell table, memory, and a copy of the rows that leave.
//! 3. **Move**: returning rows are written to cells that the head no longer needs, its own or free ones. Then all rows of the head are put
//!    in order, in place, as in a compaction, and the table is committed.
//!
//! Labels are those of composite cells: see [`super`]. If every head holds all positions, each label is a true position again.

use std::ops::Range;

use super::aside::each_layer;
use super::device::Mover;
use super::pack::{copy_in, copy_out};
use super::{CompactError, Order, Table, give_up, host, move_rows};
use crate::archive::{Archive, Batch, Bring, Entry, newest};
use crate::backend::Devices;
use crate::cache::{self, Cell, Layout};
use crate::llama::{Context, Pos, SeqId, Token};
use crate::policy::threads;
use crate::sys;

/// The rows of a sequence before the change.
pub(crate) struct Held<'a> {
    pub cells: &'a [Cell],
    /// Position that a head, counted over all layers, holds in the cell at a place.
    pub pos: &'a (dyn Fn(usize, usize) -> u32 + Sync),
    pub archive: &'a Archive,
    /// Tokens by position.
    pub tokens: &'a [Token],
}

/// The rows of a sequence after the change.
pub(crate) struct Arranged {
    pub cells: Vec<Cell>,
    /// `[head][cells]` positions.
    pub pos: Vec<u32>,
    pub archive: Archive,
}

/// Planned changes to the rows of one head.
#[derive(Default)]
struct Plan {
    /// Positions that the head's cells will hold, ascending.
    pos: Vec<u32>,
    /// Source place of each of these rows.
    source: Vec<u32>,
    /// Rows from the archive, by position, and the places where they are written first.
    coming: Vec<(Entry, u32)>,
    /// Places and positions of rows that go to the archive.
    leaving: Vec<(u32, u32)>,
}

/// Rearranges the cells of `seq` to hold rows at positions before `end`: all rows of the cache, and those that `bring` selects. Rows at
/// `end` or later are discarded. [`Bring::Newest`] must ask for at least as many rows as any head has in the cache, and no more than a head
/// has in total.
///
/// # Errors
/// [`CompactError`]; cache and archive are then as they were.
pub(crate) fn arrange(
    ctx: &mut Context,
    seq: SeqId,
    held: &Held,
    end: Pos,
    bring: Bring,
    devices: &mut [Devices],
) -> Result<Arranged, CompactError> {
    let layout = Layout::of(ctx, seq)?;
    let (cells, n) = (held.cells, held.cells.len());
    let m = match bring {
        Bring::Newest(m) => m,
        Bring::Batch(batch) => n + held.archive.batches()[batch].len(),
        Bring::Held { n_cells, .. } => n_cells,
    };
    if cells.iter().any(|cell| cell.shared) {
        return Err(CompactError::Shared);
    }
    let n_threads = ctx.n_threads_batch();
    let n_heads: usize = layout.n_head_kv().sum();
    let mut plans: Vec<Plan> = (0..n_heads).map(|_| Plan::default()).collect();
    let plan = |(head, plan): (usize, &mut Plan)| *plan = Plan::of(held, head, end as u32, bring);
    threads::share_out(n_threads, plans.iter_mut().enumerate(), plan, || ());
    let gone = gone(held.archive, &plans, end as u32);
    let n_aside_of = |(head, plan): (usize, &Plan)| {
        let there = gone_batches(held.archive, &gone).map(|(_, batch)| below(batch.positions(head), end as u32).len());
        plan.leaving.len() + there.sum::<usize>() - plan.coming.len()
    };
    let n_aside = plans.iter().enumerate().map(n_aside_of).collect::<Vec<_>>();
    let is_even = n_aside.windows(2).all(|pair| pair[0] == pair[1]);
    if !is_even || plans.iter().any(|plan| plan.pos.len() != m) {
        return Err(CompactError::Malformed { n, heads: n_heads, n_cells: m });
    }
    let n_aside = n_aside.first().copied().unwrap_or(0);

    let (needed, mut places) = (m.saturating_sub(n), cells.to_vec());
    let free = cache::free_cells(ctx, seq, needed);
    if free.len() < needed {
        return Err(CompactError::NoCells { needed, found: free.len() });
    }
    places.extend(free.into_iter().map(|index| Cell { index, pos: -1, token: -1, shared: false }));
    let mut to: Vec<u32> = places.iter().map(|cell| cell.index).collect();
    to.sort_unstable();
    to.truncate(m);
    let mut labels = vec![0; m];
    for plan in &plans {
        labels.iter_mut().zip(&plan.pos).for_each(|(label, &pos)| *label = pos.max(*label));
    }
    let row =
        |pos: u32| sys::gvote_shim_row { pos: pos as Pos, token: held.tokens.get(pos as usize).copied().unwrap_or(-1) };
    let rows: Vec<_> = labels.into_iter().map(row).collect();
    let mut mover = Mover::new(devices, &layout, m)?;
    let table = Table::of_rows(ctx, seq, cells, &to, &rows)?;
    // llama.cpp may still be computing into the cache
    // SAFETY: valid context.
    unsafe { sys::gvote_shim_context_synchronize(ctx.as_ptr()) };
    let mut archive = held.archive.without(&gone);
    if n_aside > 0 {
        let rest = |head: usize| rest(held.archive, &plans[head], head, &gone, end as u32);
        let batch = set_aside(&layout, held, &plans, &rest, archive.room(n_aside)?, n_threads, mover.devices())?;
        archive.push(batch)?;
    }

    bring_in(&layout, held, &places, &plans, n_threads, mover.devices());
    let sources = |head: usize| Some((&plans[head].source[..]).into());
    let order = Order { to: &to, cells: &places, sources: &sources, ascending: false };
    move_rows(&layout, &mut mover, &order, n_threads, || table.commit(ctx, seq));
    let cells = to.iter().zip(&rows).map(|(&index, row)| Cell { index, pos: row.pos, token: row.token, shared: false });
    Ok(Arranged { cells: cells.collect(), pos: plans.into_iter().flat_map(|plan| plan.pos).collect(), archive })
}

impl Plan {
    fn of(held: &Held, head: usize, end: u32, bring: Bring) -> Self {
        let n = held.cells.len();
        let mut cached: Vec<u32> = (0..n).map(|place| (held.pos)(head, place)).collect();
        cached.truncate(cached.partition_point(|&pos| pos < end));
        let mut entries = held.archive.entries(head);
        entries.truncate(entries.partition_point(|entry| entry.pos < end));
        let pos = match bring {
            Bring::Newest(m) => newest(&cached, &entries.iter().map(|entry| entry.pos).collect::<Vec<_>>(), m),
            Bring::Batch(batch) => {
                let mut all = [&cached, held.archive.batches()[batch].positions(head)].concat();
                all.sort_unstable();
                all
            }
            Bring::Held { pos, n_cells } => pos[head * n_cells..][..n_cells].to_vec(),
        };
        let mut plan = Self { pos, ..Self::default() };

        let mut places = (0..).zip(&cached).peekable();
        let mut entries = entries.into_iter();
        let mut coming = Vec::new();
        for &pos in &plan.pos {
            while let Some((place, &left)) = places.next_if(|&(_, &left)| left < pos) {
                plan.leaving.push((place, left));
            }
            let is_there = places.next_if(|&(_, &there)| there == pos);
            if is_there.is_none() {
                coming.extend(entries.find(|entry| entry.pos == pos));
            }
            // the places of returning rows are assigned below
            plan.source.push(is_there.map_or(u32::MAX, |(place, _)| place));
        }
        plan.leaving.extend(places.map(|(place, &left)| (place, left)));

        let unused = plan.leaving.iter().map(|&(place, _)| place).chain(cached.len() as u32..);
        plan.coming = coming.into_iter().zip(unused).collect();
        let to_find = plan.source.iter_mut().filter(|source| **source == u32::MAX);
        to_find.zip(&plan.coming).for_each(|(source, &(_, place))| *source = place);
        plan
    }
}

/// Returns the part of ascending positions that lies before `end`.
fn below(positions: &[u32], end: u32) -> &[u32] {
    &positions[..positions.partition_point(|&pos| pos < end)]
}

/// Whether each batch must be dissolved: some of its rows come back, or lie at `end` or later.
fn gone(archive: &Archive, plans: &[Plan], end: u32) -> Vec<bool> {
    let mut gone = vec![false; archive.batches().len()];
    for (head, plan) in plans.iter().enumerate() {
        plan.coming.iter().for_each(|(entry, _)| gone[entry.batch] = true);
        for (gone, batch) in gone.iter_mut().zip(archive.batches()) {
            *gone |= below(batch.positions(head), end).len() < batch.positions(head).len();
        }
    }
    gone
}

/// Returns the dissolved batches with their numbers.
fn gone_batches<'a>(archive: &'a Archive, gone: &'a [bool]) -> impl Iterator<Item = (usize, &'a Batch)> {
    archive.batches().iter().enumerate().filter(|&(batch, _)| gone[batch]).map(|(number, batch)| (number, &**batch))
}

/// Returns a head's rows in dissolved batches that stay in the archive.
fn rest(archive: &Archive, plan: &Plan, head: usize, gone: &[bool], end: u32) -> Vec<Entry> {
    let entries = |(number, batch): (usize, &Batch)| -> Vec<Entry> {
        let positions = below(batch.positions(head), end);
        positions.iter().enumerate().map(|(i, &pos)| Entry { pos, batch: number, i }).collect()
    };
    let comes = |entry: &Entry| plan.coming.binary_search_by_key(&entry.pos, |(coming, _)| coming.pos).is_ok();
    gone_batches(archive, gone).flat_map(entries).filter(|entry| !comes(entry)).collect()
}

/// Copies the rows that leave, and the `rest` of each head, into a new batch with room for them.
fn set_aside(
    layout: &Layout,
    held: &Held,
    plans: &[Plan],
    rest: &(dyn Fn(usize) -> Vec<Entry> + Sync),
    mut batch: Batch,
    n_threads: usize,
    devices: &mut [Devices],
) -> Result<Batch, CompactError> {
    let layers: Vec<_> = {
        let mut rooms = batch.heads_mut().zip(plans).enumerate();
        layout.n_head_kv().map(|n_heads| rooms.by_ref().take(n_heads).collect::<Vec<_>>()).collect()
    };
    type Room<'a> = (usize, ((&'a mut [u32], &'a mut [u8]), &'a Plan));
    let copy = |(il, rooms): (usize, Vec<Room>), devices: Option<&mut Devices>| {
        let mut heads = Vec::new();
        for (head, ((positions, rows), plan)) in rooms {
            heads.push(fill(held, head, plan, rest(head), positions, rows));
        }
        copy_out(devices, layout, il, &mut heads, held.archive.form())
    };
    each_layer(layout, n_threads, devices, layers.into_iter().enumerate().collect(), copy)?;
    Ok(batch)
}

/// Records the positions of all rows that a head archives, and copies those that were in the archive already. Returns the cells of the
/// other rows, with the memory for each.
fn fill<'a>(
    held: &Held,
    head: usize,
    plan: &Plan,
    rest: Vec<Entry>,
    positions: &mut [u32],
    rows: &'a mut [u8],
) -> host::Leaving<'a> {
    /// Present location of a row.
    enum Origin {
        Cell(u32),
        Archive(Entry),
    }
    let cells = plan.leaving.iter().map(|&(place, pos)| (pos, Origin::Cell(held.cells[place as usize].index)));
    let entries = rest.into_iter().map(|entry| (entry.pos, Origin::Archive(entry)));
    let mut all: Vec<(u32, Origin)> = cells.chain(entries).collect();
    all.sort_unstable_by_key(|&(pos, _)| pos);
    let bytes = rows.len() / positions.len();
    let mut from_cells = Vec::new();
    for ((to, room), (pos, origin)) in positions.iter_mut().zip(rows.chunks_exact_mut(bytes)).zip(all) {
        *to = pos;
        match origin {
            Origin::Cell(index) => from_cells.push((index, room)),
            Origin::Archive(entry) => room.copy_from_slice(held.archive.row(head, entry)),
        }
    }
    from_cells
}

/// Writes the returning rows to their planned places.
fn bring_in(layout: &Layout, held: &Held, places: &[Cell], plans: &[Plan], n_threads: usize, devices: &mut [Devices]) {
    let copy = |(il, heads): (usize, Range<usize>), devices: Option<&mut Devices>| {
        let coming = |head: usize| -> host::Coming {
            let rows = plans[head].coming.iter();
            rows.map(|&(entry, place)| (places[place as usize].index, held.archive.row(head, entry))).collect()
        };
        let heads: Vec<_> = heads.map(coming).collect();
        if heads.iter().all(|coming| coming.is_empty()) {
            return Ok(());
        }
        copy_in(devices, layout, il, &heads, held.archive.form())
    };
    if let Err(error) = each_layer(layout, n_threads, devices, layout.heads().into_iter().enumerate().collect(), copy) {
        give_up(error);
    }
}
