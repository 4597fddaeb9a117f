//! Rows that left the cache, stored in memory or in a file so that they can come back.
//!
//! # A row
//! A row is the key and the value that one KV head of one layer holds for one token: the bits that llama.cpp stored,
//! after RoPE, rotation and quantization (see [`RecallType`] for the exception). In the cache, key and value lie apart.
//! Here the value follows the key, channel by channel, even where the cache stores V transposed. A row is identified by
//! its head and its position.
//!
//! Every row of a sequence is in exactly one place: in a cell of the cache, or in the archive. So cells and archive
//! together never hold more rows than tokens were read. An archive is *whole* if they hold just as many: then every row
//! ever computed can come back. Rows can only be missing if they were dropped while nothing was set aside.
//!
//! # Bytes
//! Rows that leave the cache together form a [`Batch`]. All heads give up the same number of rows, because a cell of
//! llama.cpp holds one row of every head. So `n` rows of each head take the bytes of K and V in `n` cells, plus 4 bytes
//! a row for its position. Positions are always in memory; rows are in memory or in a [`RecallFile`].
//!
//! # Owner
//! An archive belongs to a [`Sequence`](crate::vote::Sequence). It is freed with the sequence, and emptied with it. A
//! batch is immutable, so that copies of a sequence can share it. When rows come back, the batches that contain them
//! are dropped; the rows that remain form a new batch.
//!
//! # Failure
//! Before anything in the cache moves, all memory and disk space is allocated, and the rows that leave are copied and
//! written. If memory or disk space runs out, the cache and the archive are unchanged. Rows on a device are copied
//! within the device, and are transferred while it continues to compute (`src/compact/beside.rs`); access to them waits
//! for the transfer.
//!
//! [`crate::compact`] copies the rows: only that module knows where they lie in the cache.

#![forbid(unsafe_code)]

mod coming;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::Arc;

use self::coming::Coming;
use crate::cache::Layout;
pub use crate::disk::{RecallFile, RecallFileError};
use crate::llama::Pos;
use crate::{compact, disk, machine, memory};

#[cfg(test)]
thread_local! {
    /// Set by tests to simulate a machine without memory for rows.
    pub(crate) static PRETEND_FULL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// What happens to rows that a vote, or a lack of cells, removes from the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Recall {
    /// Rows are lost.
    #[default]
    Off,
    /// Rows are set aside in main memory, and can come back.
    Auto,
    /// Rows are set aside in a file, and can come back.
    File(RecallFile),
}

/// Storage type of rows that are set aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecallType {
    /// The cache's own type: rows come back bit by bit.
    #[default]
    Cache,
    /// q8_0 for rows of an f32, f16 or bf16 cache, which come back rounded. Rows of other cache types stay as they are.
    Q8_0,
}

impl RecallType {
    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Q8_0 => "q8_0",
        }
    }
}

/// No memory or disk space for rows of so many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    Memory {
        bytes: usize,
    },
    /// No space in the file that was created at this path. `reason`: the system's error message.
    Disk {
        bytes: usize,
        path: PathBuf,
        reason: String,
    },
}

impl NoRoom {
    fn on_disk(bytes: usize, file: &RecallFile, error: &io::Error) -> Self {
        Self::Disk { bytes, path: file.path().into(), reason: error.to_string() }
    }
}

/// Byte offset of each KV head, counted over all layers, in a batch of one row a head.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    /// `[heads + 1]`
    start: Vec<usize>,
}

impl Shape {
    fn n_heads(&self) -> usize {
        self.start.len() - 1
    }

    /// Bytes of one row of a head.
    fn row(&self, head: usize) -> usize {
        self.start[head + 1] - self.start[head]
    }

    /// Bytes of one row of every head.
    fn all(&self) -> usize {
        self.start[self.n_heads()]
    }

    /// Splits `rows` by head, with `n` rows for each.
    fn split<'a>(&self, n: usize, rows: &'a mut [u8]) -> impl Iterator<Item = &'a mut [u8]> {
        let mut rest = rows;
        (0..self.n_heads()).map(move |head| {
            let (own, others) = std::mem::take(&mut rest).split_at_mut(n * self.row(head));
            rest = others;
            own
        })
    }
}

/// Storage of a batch's rows.
#[derive(Debug)]
enum Rows {
    Memory(Vec<u8>),
    /// In transfer into memory by a thread.
    Coming(Coming),
    File(disk::Rows),
}

impl Deref for Rows {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Memory(rows) => rows,
            Self::Coming(rows) => rows.wait(),
            Self::File(rows) => rows,
        }
    }
}

impl DerefMut for Rows {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Memory(rows) => rows,
            Self::Coming(rows) => rows.wait_mut(),
            Self::File(rows) => rows,
        }
    }
}

impl Rows {
    fn len(&self) -> usize {
        match self {
            Self::Memory(rows) => rows.len(),
            Self::Coming(rows) => rows.len(),
            Self::File(rows) => rows.len(),
        }
    }
}

/// Rows that left the cache together: the same number of every head.
#[derive(Debug)]
pub(crate) struct Batch {
    shape: Arc<Shape>,
    n: usize,
    /// Positions, `[head][n]`, ascending in each head.
    pos: Vec<u32>,
    /// `[head][n][row]`
    rows: Rows,
}

impl Batch {
    /// Allocates `n` rows of every head: in `file`, or in memory if None.
    fn new(shape: &Arc<Shape>, n: usize, file: Option<&RecallFile>) -> Result<Self, NoRoom> {
        let bytes = n.saturating_mul(shape.all());
        let failed = || NoRoom::Memory { bytes };
        #[cfg(test)]
        if PRETEND_FULL.get() {
            return Err(failed());
        }
        let n_pos = n.saturating_mul(shape.n_heads());
        let in_memory = if file.is_some() { n_pos.saturating_mul(size_of::<u32>()) } else { bytes };
        // an overcommitting system grants memory that it does not have, and may end the process later
        if machine::available().is_some_and(|available| in_memory > available) {
            return Err(failed());
        }
        let mut pos = Vec::new();
        pos.try_reserve_exact(n_pos).map_err(|_| failed())?;
        pos.resize(n_pos, 0);
        let rows = match file {
            Some(file) if bytes > 0 => {
                Rows::File(disk::Rows::new(file, bytes).map_err(|error| NoRoom::on_disk(bytes, file, &error))?)
            }
            _ => Rows::Memory(memory::zeros(bytes).ok_or_else(failed)?),
        };
        Ok(Self { shape: shape.clone(), n, pos, rows })
    }

    /// Number of rows of each head.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Positions of a head's rows, ascending.
    pub fn positions(&self, head: usize) -> &[u32] {
        &self.pos[head * self.n..][..self.n]
    }

    /// Returns the `i`-th row of a head.
    pub fn row(&self, head: usize, i: usize) -> &[u8] {
        let bytes = self.shape.row(head);
        &self.rows[self.n * self.shape.start[head] + i * bytes..][..bytes]
    }

    /// Returns all rows of a head.
    fn rows(&self, head: usize) -> &[u8] {
        &self.rows[self.n * self.shape.start[head]..][..self.n * self.shape.row(head)]
    }

    /// Returns the positions `[n]` and rows `[n][row]` of every head, for writing.
    pub fn heads_mut(&mut self) -> impl Iterator<Item = (&mut [u32], &mut [u8])> {
        let Self { shape, n, pos, rows } = self;
        // an empty batch yields no heads
        pos.chunks_exact_mut((*n).max(1)).zip(shape.split(*n, rows))
    }

    /// Whether [`Self::fill_later`] may be used. Rows for a file must be written before they leave the cache.
    pub fn is_in_memory(&self) -> bool {
        matches!(self.rows, Rows::Memory(_))
    }

    /// Fills the rows `[n][row]` of every head, one head after another, on a thread of its own.
    pub fn fill_later(&mut self, fill: impl FnOnce(&mut dyn Iterator<Item = &mut [u8]>) + Send + 'static) {
        if let Rows::Memory(rows) = &mut self.rows {
            let (shape, n) = (self.shape.clone(), self.n);
            self.rows = Rows::Coming(Coming::new(std::mem::take(rows), move |rows| fill(&mut shape.split(n, rows))));
        }
    }

    /// Removes rows in a file from the memory of the process, until they are read.
    fn release(&self) {
        if let Rows::File(rows) = &self.rows {
            rows.release();
        }
    }

    fn bytes(&self) -> usize {
        self.rows.len() + size_of_val(&self.pos[..])
    }
}

/// Place of a row in an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub pos: u32,
    pub batch: usize,
    /// Index of the row among the head's rows in the batch.
    pub i: usize,
}

/// Rows of one sequence that are not in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Archive {
    shape: Arc<Shape>,
    form: RecallType,
    /// File for the rows; None for rows in memory.
    file: Option<RecallFile>,
    batches: Vec<Arc<Batch>>,
}

impl Archive {
    /// Creates an empty archive for the heads of a cache; None under [`Recall::Off`].
    pub fn new(layout: &Layout, recall: &Recall, form: RecallType) -> Option<Self> {
        let file = match recall {
            Recall::Off => return None,
            Recall::Auto => None,
            Recall::File(file) => Some(file.clone()),
        };
        let mut start = vec![0];
        for bytes in compact::row_bytes(layout, form) {
            start.push(start[start.len() - 1] + bytes);
        }
        Some(Self { shape: Arc::new(Shape { start }), form, file, batches: Vec::new() })
    }

    /// Creates an empty archive for the same heads, in the same place.
    pub fn emptied(&self) -> Self {
        self.with(Vec::new())
    }

    fn with(&self, batches: Vec<Arc<Batch>>) -> Self {
        Self { shape: self.shape.clone(), form: self.form, file: self.file.clone(), batches }
    }

    /// Storage type of the rows.
    pub fn form(&self) -> RecallType {
        self.form
    }

    /// Place of the rows.
    pub fn recall(&self) -> Recall {
        self.file.clone().map_or(Recall::Auto, Recall::File)
    }

    /// Number of rows of each head.
    pub fn len(&self) -> usize {
        self.batches.iter().map(|batch| batch.n).sum()
    }

    /// Bytes in memory and in the file.
    pub fn bytes(&self) -> usize {
        self.batches.iter().map(|batch| batch.bytes()).sum()
    }

    /// Allocates `n` rows of every head, to be filled and passed to [`Self::push`].
    ///
    /// # Errors
    /// [`NoRoom`]; the archive is then unchanged.
    pub fn room(&mut self, n: usize) -> Result<Batch, NoRoom> {
        self.batches.try_reserve(1).map_err(|_| NoRoom::Memory { bytes: n.saturating_mul(self.shape.all()) })?;
        Batch::new(&self.shape, n, self.file.as_ref())
    }

    /// Adds a batch of rows that leave the cache. Rows in a file are on disk afterwards.
    ///
    /// # Errors
    /// [`NoRoom`] where the disk fails; the archive is then unchanged.
    pub fn push(&mut self, batch: Batch) -> Result<(), NoRoom> {
        if let (Rows::File(rows), Some(file)) = (&batch.rows, &self.file) {
            rows.settle().map_err(|error| NoRoom::on_disk(rows.len(), file, &error))?;
        }
        if batch.n > 0 {
            self.batches.push(Arc::new(batch));
        }
        Ok(())
    }

    /// Returns the same rows in batches of at most `most` rows a head.
    ///
    /// # Errors
    /// [`NoRoom`].
    pub fn paged(&self, most: usize) -> Result<Self, NoRoom> {
        let mut paged = self.emptied();
        for batch in &self.batches {
            if batch.n <= most {
                paged.batches.push(batch.clone());
                continue;
            }
            for first in (0..batch.n).step_by(most.max(1)) {
                let mut page = paged.room(most.max(1).min(batch.n - first))?;
                for (head, (positions, rows)) in page.heads_mut().enumerate() {
                    positions.copy_from_slice(&batch.positions(head)[first..][..positions.len()]);
                    let from = batch.n * batch.shape.start[head] + first * batch.shape.row(head);
                    rows.copy_from_slice(&batch.rows[from..][..rows.len()]);
                }
                paged.push(page)?;
            }
            batch.release();
        }
        Ok(paged)
    }

    pub fn batches(&self) -> &[Arc<Batch>] {
        &self.batches
    }

    /// Returns the archive without the batches that `gone` marks.
    pub fn without(&self, gone: &[bool]) -> Self {
        let left = self.batches.iter().zip(gone).filter(|&(_, &gone)| !gone);
        self.with(left.map(|(batch, _)| batch.clone()).collect())
    }

    /// Returns a head's rows, ascending by position.
    pub fn entries(&self, head: usize) -> Vec<Entry> {
        let of_batch = |(batch, rows): (usize, &Arc<Batch>)| -> Vec<Entry> {
            rows.positions(head).iter().enumerate().map(|(i, &pos)| Entry { pos, batch, i }).collect()
        };
        let mut entries: Vec<Entry> = self.batches.iter().enumerate().flat_map(of_batch).collect();
        entries.sort_unstable_by_key(|entry| entry.pos);
        entries
    }

    /// Returns a row of a head.
    pub fn row(&self, head: usize, entry: Entry) -> &[u8] {
        self.batches[entry.batch].row(head, entry.i)
    }

    /// Returns the position after the last one that is set aside.
    pub fn end(&self) -> Pos {
        let last = self.batches.iter().flat_map(|batch| batch.pos.iter()).max();
        last.map_or(0, |&pos| pos as Pos + 1)
    }

    /// Number of bytes that [`Self::write`] writes.
    pub fn written(&self) -> usize {
        size_of::<u64>() * (1 + self.batches.len()) + self.bytes()
    }

    /// Writes the archive: the number of batches, and for each batch the number of rows of a head; then, for each head,
    /// the positions and the rows. The batches are kept, so that a loaded sequence behaves as if never saved.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&(self.batches.len() as u64).to_le_bytes())?;
        for batch in &self.batches {
            out.write_all(&(batch.n as u64).to_le_bytes())?;
            for head in 0..self.shape.n_heads() {
                for pos in batch.positions(head) {
                    out.write_all(&pos.to_le_bytes())?;
                }
                out.write_all(batch.rows(head))?;
            }
            batch.release();
        }
        Ok(())
    }

    /// Reads an archive for the same heads that [`Self::write`] wrote, of at most `most` rows a head.
    /// `is_sound(head, positions)`: whether a head can have set aside these positions, which ascend.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read(
        &self,
        from: &mut dyn Read,
        most: usize,
        is_sound: impl Fn(usize, &[u32]) -> bool,
    ) -> Result<Self, ReadError> {
        let number = |from: &mut dyn Read, most: usize| {
            let mut n = [0; size_of::<u64>()];
            from.read_exact(&mut n).map_err(|_| ReadError::CutOff)?;
            usize::try_from(u64::from_le_bytes(n)).ok().filter(|&n| n <= most).ok_or(ReadError::Nonsense)
        };
        let mut read = self.emptied();
        for _ in 0..number(from, most)? {
            let n = number(from, most - read.len())?;
            if n == 0 {
                return Err(ReadError::Nonsense);
            }
            let mut batch = read.room(n).map_err(ReadError::NoRoom)?;
            for (positions, rows) in batch.heads_mut() {
                for pos in positions.iter_mut() {
                    let mut bytes = [0; size_of::<u32>()];
                    from.read_exact(&mut bytes).map_err(|_| ReadError::CutOff)?;
                    *pos = u32::from_le_bytes(bytes);
                }
                if !positions.is_sorted_by(|a, b| a < b) {
                    return Err(ReadError::Nonsense);
                }
                from.read_exact(rows).map_err(|_| ReadError::CutOff)?;
            }
            read.push(batch).map_err(ReadError::NoRoom)?;
        }
        let positions = |head| read.entries(head).iter().map(|entry| entry.pos).collect::<Vec<_>>();
        let all_sound = (0..self.shape.n_heads()).all(|head| is_sound(head, &positions(head)));
        if all_sound { Ok(read) } else { Err(ReadError::Nonsense) }
    }
}

/// Selects which of the rows set aside come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bring<'a> {
    /// The newest rows of each head, until the cache holds so many of the head: see [`newest`].
    Newest(usize),
    /// All rows of the batch with this index.
    Batch(usize),
    /// The rows that the heads held before; all others leave. Positions `[head][n_cells]`, ascending in each head.
    Held { pos: &'a [u32], n_cells: usize },
}

/// Errors of reading an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ReadError {
    CutOff,
    Nonsense,
    NoRoom(NoRoom),
}

/// Returns the positions of the rows that `m` cells hold of a head, ascending: all that are cached, and the newest of
/// those set aside. The newest position of all is always included, because llama.cpp requires the next token to follow
/// it. Where it does not fit, it replaces the newest cached one. Both inputs ascend, and `m` is at least the number of
/// cached rows.
pub(crate) fn newest(cached: &[u32], aside: &[u32], m: usize) -> Vec<u32> {
    let back = m.saturating_sub(cached.len()).min(aside.len());
    let mut positions = [cached, &aside[aside.len() - back..]].concat();
    positions.sort_unstable();
    if let (Some(last), Some(&newest)) = (positions.last_mut(), aside.last()) {
        *last = newest.max(*last);
    }
    positions
}
