//! What leaves the cache, set aside in memory or in a file, so that it can come back.
//!
//! # A row
//! The key and the value that one KV head of one layer holds for one token, bit by bit as llama.cpp stored them ([`RecallType`] has
//! the exception): after RoPE, rotation and quantization. In a cell they lie apart; here the key is followed by the value, channel after
//! channel, also where the cache keeps V transposed. A row is known by its head and its position.
//!
//! Every row of a sequence is in exactly one place: in a cell of the cache, or in the archive. So cells and archive together never
//! hold more rows than tokens were read, and the archive is *whole* where they hold no fewer: then every row that was ever
//! computed can come back. Rows that were dropped while nothing was set aside are the ones that can be missing.
//!
//! # Bytes
//! Rows that leave together form a [`Batch`]. All heads give up the same number of rows, because a cell of llama.cpp holds one of
//! every head; so `n` rows of each head take the bytes of K and V of `n` cells, and 4 more bytes a row for its position. Positions are
//! always in memory; rows are there too, or in a [`RecallFile`].
//!
//! # Owner
//! An archive belongs to a [`Sequence`](crate::vote::Sequence) and is freed with it, or emptied when the sequence is. A batch never
//! changes, so that copies of a sequence can share it. When rows come back, the batches that they lay in are given up; what is
//! left of these becomes a new one.
//!
//! # Failure
//! All memory and all room on a disk is taken, and rows that leave are copied and written, before anything in the cache moves. Where
//! either runs out, the cache and the archive are as they were. Rows of a device are copied within it, and arrive while it goes on
//! (`src/compact/beside.rs`): who asks for them before waits.
//!
//! Rows are copied by [`crate::compact`], the only code that knows where they lie in the cache.

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
    /// Tests set it to be a machine without memory for rows.
    pub(crate) static PRETEND_FULL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// What becomes of rows that a vote, or a lack of cells, takes out of the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Recall {
    /// They are lost.
    #[default]
    Off,
    /// They are set aside in this machine's memory, and can come back.
    Auto,
    /// They are set aside in a file, and can come back.
    File(RecallFile),
}

/// How rows are set aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecallType {
    /// As the cache has them: they come back bit by bit.
    #[default]
    Cache,
    /// Those of a cache of f32, f16 or bf16 as q8_0: they come back rounded. Those of other types as they are.
    Q8_0,
}

impl RecallType {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Q8_0 => "q8_0",
        }
    }
}

/// There is no room for so many bytes of rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    Memory {
        bytes: usize,
    },
    /// In a file that was made with this path. `reason`: what the system says.
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

/// Where the rows of each KV head, counted over all layers, begin in a batch of one row a head.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    /// `[heads + 1]`
    start: Vec<usize>,
}

impl Shape {
    fn n_heads(&self) -> usize {
        self.start.len() - 1
    }

    /// Bytes of a head's row.
    fn row(&self, head: usize) -> usize {
        self.start[head + 1] - self.start[head]
    }

    /// Bytes of a row of every head.
    fn all(&self) -> usize {
        self.start[self.n_heads()]
    }

    /// The rows of each head, of which there are `n`.
    fn split<'a>(&self, n: usize, rows: &'a mut [u8]) -> impl Iterator<Item = &'a mut [u8]> {
        let mut rest = rows;
        (0..self.n_heads()).map(move |head| {
            let (own, others) = std::mem::take(&mut rest).split_at_mut(n * self.row(head));
            rest = others;
            own
        })
    }
}

/// Bytes of rows.
#[derive(Debug)]
enum Rows {
    Memory(Vec<u8>),
    /// They are on their way into memory.
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

/// As many rows of every head.
#[derive(Debug)]
pub(crate) struct Batch {
    shape: Arc<Shape>,
    n: usize,
    /// `[head][n]`, ascending in each head.
    pos: Vec<u32>,
    /// `[head][n][row]`
    rows: Rows,
}

impl Batch {
    /// Room for `n` rows of every head: in the file, or else in memory.
    fn new(shape: &Arc<Shape>, n: usize, file: Option<&RecallFile>) -> Result<Self, NoRoom> {
        let bytes = n.saturating_mul(shape.all());
        let failed = || NoRoom::Memory { bytes };
        #[cfg(test)]
        if PRETEND_FULL.get() {
            return Err(failed());
        }
        let n_pos = n.saturating_mul(shape.n_heads());
        let in_memory = if file.is_some() { n_pos.saturating_mul(size_of::<u32>()) } else { bytes };
        // what a system promises it may take back by ending the process
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

    /// Rows of each head.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Positions of a head's rows, ascending.
    pub fn positions(&self, head: usize) -> &[u32] {
        &self.pos[head * self.n..][..self.n]
    }

    /// The `i`-th row of a head.
    pub fn row(&self, head: usize, i: usize) -> &[u8] {
        let bytes = self.shape.row(head);
        &self.rows[self.n * self.shape.start[head] + i * bytes..][..bytes]
    }

    /// All rows of a head.
    fn rows(&self, head: usize) -> &[u8] {
        &self.rows[self.n * self.shape.start[head]..][..self.n * self.shape.row(head)]
    }

    /// Positions `[n]` and rows `[n][row]` of every head, to be filled.
    pub fn heads_mut(&mut self) -> impl Iterator<Item = (&mut [u32], &mut [u8])> {
        let Self { shape, n, pos, rows } = self;
        // no head has rows where n is 0
        pos.chunks_exact_mut((*n).max(1)).zip(shape.split(*n, rows))
    }

    /// Whether [`Self::fill_later`] can be asked for: what goes to a file has to be there before it leaves the cache.
    pub fn is_in_memory(&self) -> bool {
        matches!(self.rows, Rows::Memory(_))
    }

    /// Has a thread of its own fill the rows `[n][row]` of every head, one head after another.
    pub fn fill_later(&mut self, fill: impl FnOnce(&mut dyn Iterator<Item = &mut [u8]>) + Send + 'static) {
        if let Rows::Memory(rows) = &mut self.rows {
            let (shape, n) = (self.shape.clone(), self.n);
            self.rows = Rows::Coming(Coming::new(std::mem::take(rows), move |rows| fill(&mut shape.split(n, rows))));
        }
    }

    /// Rows in a file leave the memory of the process until they are read.
    fn release(&self) {
        if let Rows::File(rows) = &self.rows {
            rows.release();
        }
    }

    fn bytes(&self) -> usize {
        self.rows.len() + size_of_val(&self.pos[..])
    }
}

/// A row in an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub pos: u32,
    pub batch: usize,
    /// Its number among the head's rows there.
    pub i: usize,
}

/// The rows of one sequence that are not in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Archive {
    shape: Arc<Shape>,
    form: RecallType,
    /// Where rows are set aside; None: in memory.
    file: Option<RecallFile>,
    batches: Vec<Arc<Batch>>,
}

impl Archive {
    /// An empty one for the heads of a cache; None where rows are lost.
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

    /// An empty one for the same heads, in the same place.
    pub fn emptied(&self) -> Self {
        self.with(Vec::new())
    }

    fn with(&self, batches: Vec<Arc<Batch>>) -> Self {
        Self { shape: self.shape.clone(), form: self.form, file: self.file.clone(), batches }
    }

    /// How it sets rows aside.
    pub fn form(&self) -> RecallType {
        self.form
    }

    /// Where it sets rows aside.
    pub fn recall(&self) -> Recall {
        self.file.clone().map_or(Recall::Auto, Recall::File)
    }

    /// Rows of each head.
    pub fn len(&self) -> usize {
        self.batches.iter().map(|batch| batch.n).sum()
    }

    /// Bytes that it takes, in memory and in a file.
    pub fn bytes(&self) -> usize {
        self.batches.iter().map(|batch| batch.bytes()).sum()
    }

    /// Room for `n` more rows of every head, to be filled and handed to [`Self::push`].
    ///
    /// # Errors
    /// [`NoRoom`]; nothing has changed then.
    pub fn room(&mut self, n: usize) -> Result<Batch, NoRoom> {
        self.batches.try_reserve(1).map_err(|_| NoRoom::Memory { bytes: n.saturating_mul(self.shape.all()) })?;
        Batch::new(&self.shape, n, self.file.as_ref())
    }

    /// Takes in what is to leave the cache; what goes to a file is on the disk afterwards.
    ///
    /// # Errors
    /// [`NoRoom`] where the disk fails; nothing has changed then.
    pub fn push(&mut self, batch: Batch) -> Result<(), NoRoom> {
        if let (Rows::File(rows), Some(file)) = (&batch.rows, &self.file) {
            rows.settle().map_err(|error| NoRoom::on_disk(rows.len(), file, &error))?;
        }
        if batch.n > 0 {
            self.batches.push(Arc::new(batch));
        }
        Ok(())
    }

    /// The same rows in batches of at most `most` a head.
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

    /// The same without some of its batches.
    pub fn without(&self, gone: &[bool]) -> Self {
        let left = self.batches.iter().zip(gone).filter(|&(_, &gone)| !gone);
        self.with(left.map(|(batch, _)| batch.clone()).collect())
    }

    /// A head's rows, ascending by position.
    pub fn entries(&self, head: usize) -> Vec<Entry> {
        let of_batch = |(batch, rows): (usize, &Arc<Batch>)| -> Vec<Entry> {
            rows.positions(head).iter().enumerate().map(|(i, &pos)| Entry { pos, batch, i }).collect()
        };
        let mut entries: Vec<Entry> = self.batches.iter().enumerate().flat_map(of_batch).collect();
        entries.sort_unstable_by_key(|entry| entry.pos);
        entries
    }

    /// The row of a head.
    pub fn row(&self, head: usize, entry: Entry) -> &[u8] {
        self.batches[entry.batch].row(head, entry.i)
    }

    /// From this position on nothing is set aside.
    pub fn end(&self) -> Pos {
        let last = self.batches.iter().flat_map(|batch| batch.pos.iter()).max();
        last.map_or(0, |&pos| pos as Pos + 1)
    }

    /// Bytes that [`Self::write`] writes.
    pub fn written(&self) -> usize {
        size_of::<u64>() * (1 + self.batches.len()) + self.bytes()
    }

    /// Writes all of it: the number of batches, and of each the rows of a head; then, for each head, first positions, then rows. A
    /// sequence that was saved must go on as one that never was, so batches stay what they are.
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

    /// An archive for the same heads that [`Self::write`] wrote, of at most `most` rows a head. `is_sound(head, positions)`: whether
    /// a head can have set these aside, which ascend.
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

/// Which of the rows that are set aside come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bring<'a> {
    /// The newest ones of each head, until it has so many in the cache: see [`newest`].
    Newest(usize),
    /// All of the batch with this number.
    Batch(usize),
    /// What the heads held before, and all else leaves: positions `[head][n_cells]`, ascending in each head.
    Held { pos: &'a [u32], n_cells: usize },
}

/// Why an archive could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ReadError {
    CutOff,
    Nonsense,
    NoRoom(NoRoom),
}

/// The positions of which `m` cells hold rows of a head, ascending: those that the cache has, and the newest of those that are set
/// aside. The newest position of all is always among them, because llama.cpp wants the next token to follow upon it; where there
/// is no room for it, the newest one in the cache leaves. Both lists ascend, and `m` is no less than the cache has.
pub(crate) fn newest(cached: &[u32], aside: &[u32], m: usize) -> Vec<u32> {
    let back = m.saturating_sub(cached.len()).min(aside.len());
    let mut positions = [cached, &aside[aside.len() - back..]].concat();
    positions.sort_unstable();
    if let (Some(last), Some(&newest)) = (positions.last_mut(), aside.last()) {
        *last = newest.max(*last);
    }
    positions
}
