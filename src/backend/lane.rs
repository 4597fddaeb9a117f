//! Runs small graphs in the queue of a back end that also has other work.

use std::ops::Range;

use half::f16;

use super::device::STAGE;
use super::memory::Memory;
use super::{Builder, ComputeError, HostMemory, Tensor};
use crate::sys;

/// The queue of a back end, with memory on its device: the results of graphs stay there until they are read together.
///
/// A back end processes its queue in order. So there is no wait between two graphs: the later one may overwrite the inputs or the working
/// memory of the earlier one, and a copy that is queued last finds all results. Only the host has to wait: before it reads copied results,
/// frees sent data, or frees device memory.
pub(crate) struct Lane {
    /// NULL for the host.
    place: sys::ggml_backend_dev_t,
    /// NULL before the first use.
    backend: sys::ggml_backend_t,
    /// Results and sent data, until the results are read.
    kept: Memory,
    /// Working memory of a single graph.
    work: Memory,
    /// The part of `kept` that was read last; `next`: the part that is being read.
    read: Piece,
    next: Piece,
    /// Sent data that the queue may not have copied yet.
    sent: Vec<Vec<u32>>,
    /// Whether the queue may hold unfinished work of this lane.
    is_busy: bool,
    /// NULL until it is created, and if the device has no events.
    event: sys::ggml_backend_event_t,
    /// Whether the event was recorded after all queued work of this lane.
    is_noted: bool,
}

/// Some bytes of `kept`, copied to the host.
#[derive(Default)]
struct Piece {
    host: HostMemory,
    bytes: Range<usize>,
}

impl Piece {
    fn holds(&self, at: usize, bytes: usize) -> bool {
        self.bytes.start <= at && at + bytes <= self.bytes.end
    }
}

// SAFETY: one thread at a time uses it (&mut), and its back end belongs to a [`Device`].
unsafe impl Send for Lane {}

impl Drop for Lane {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; NULL is fine.
        unsafe { sys::ggml_backend_event_free(self.event) };
    }
}

impl Lane {
    /// Minimum number of bytes that are read at once.
    pub const PIECE: usize = STAGE;

    /// `place`: see [`super::place`].
    pub fn new(place: sys::ggml_backend_dev_t) -> Self {
        let (kept, work, read, next) = Default::default();
        let (backend, event) = (std::ptr::null_mut(), std::ptr::null_mut());
        let sent = Vec::new();
        Self { place, backend, kept, work, read, next, sent, is_busy: false, event, is_noted: false }
    }

    pub fn place(&self) -> sys::ggml_backend_dev_t {
        self.place
    }

    /// Switches to the queue of another back end on the same device, after waiting for the work in the present queue.
    ///
    /// # Errors
    /// As [`Self::wait`].
    ///
    /// # Safety
    /// The back end lives until [`Self::wait`], or is not used any more.
    pub unsafe fn enter(&mut self, backend: sys::ggml_backend_t) -> Result<(), ComputeError> {
        if self.backend != backend {
            self.wait()?;
            self.backend = backend;
        }
        Ok(())
    }

    /// Whether there is room for results of these sizes in bytes.
    pub fn has_room(&self, results: &[usize]) -> bool {
        self.kept.has_room(results)
    }

    /// Whether there is room for a graph's intermediate tensors of these sizes in bytes.
    pub fn has_work_room(&self, work: &[usize]) -> bool {
        self.work.has_room(work)
    }

    /// Allocates memory for `n` times these results, within limits, and for reading them.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn prepare(&mut self, results: &[usize], n: usize) -> Result<(), ComputeError> {
        self.grow(results, n)?;
        [&mut self.read, &mut self.next]
            .into_iter()
            .try_for_each(|piece| piece.host.resize_for(self.place, STAGE / size_of::<f32>()))
    }

    /// Discards the results and makes room for `n` times these sizes more, within limits, but at least for the sizes themselves.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn grow(&mut self, results: &[usize], n: usize) -> Result<(), ComputeError> {
        self.clear()?;
        self.kept.grow(self.backend, results, n)
    }

    /// Makes room for a graph's intermediate tensors.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn grow_work(&mut self, work: &[usize]) -> Result<(), ComputeError> {
        self.wait()?;
        self.work.grow(self.backend, work, 0)
    }

    /// Places a result, for which there must be room, and returns its offset.
    pub fn keep(&mut self, t: Tensor) -> usize {
        self.kept.give(t)
    }

    /// Places an intermediate tensor, for which there must be room.
    pub fn lend(&mut self, t: Tensor) {
        self.work.give(t);
    }

    /// Sends row indices, for which there must be room among the results, and returns their offset.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn send(&mut self, rows: Vec<u32>) -> Result<usize, ComputeError> {
        let b = Builder::new(1)?;
        // SAFETY: the tensor has the size of `rows`, which stays in `sent` until the queue has been waited for.
        let (at, done) = unsafe {
            let t = sys::ggml_new_tensor_1d(b.ctx, sys::GGML_TYPE_I32, rows.len() as i64);
            let at = self.kept.give(t);
            (self.is_busy, self.is_noted) = (true, false);
            (at, sys::gvote_shim_tensor_set_async(self.backend, t, rows.as_ptr().cast(), 0, size_of_val(&rows[..])))
        };
        self.sent.push(rows);
        if done { Ok(at) } else { Err(ComputeError::Memory("rows")) }
    }

    /// Returns sent row indices as a tensor of another graph.
    pub fn sent(&self, b: &Builder, at: usize, n: usize) -> Tensor {
        // SAFETY: the tensor belongs to the builder's context; `at` is the offset of the rows.
        unsafe {
            let t = sys::ggml_new_tensor_1d(b.ctx, sys::GGML_TYPE_I32, n as i64);
            self.kept.put(t, at);
            t
        }
    }

    /// Queues a graph whose tensors, except views, have all been placed. Returns false if the back end's abort callback stopped it; nothing
    /// is computed then.
    ///
    /// # Errors
    /// [`ComputeError`].
    ///
    /// # Safety
    /// The tensors of other graphs that this one reads lie on the same device, and only later work in the queue writes to them.
    pub unsafe fn enqueue(&mut self, b: &mut Builder) -> Result<bool, ComputeError> {
        (self.is_busy, self.is_noted) = (true, false);
        // the next graph in the queue may reuse this memory
        self.work.used = 0;
        // SAFETY: our memory stays until the queue has been waited for.
        match unsafe { b.enqueue(self.backend) } {
            Err(ComputeError::Failed(sys::GGML_STATUS_ABORTED)) => Ok(false),
            done => done.map(|()| true),
        }
    }

    /// Waits until all queued work of this lane is done.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn wait(&mut self) -> Result<(), ComputeError> {
        // SAFETY: a back end with work of this lane lives, and so does the event.
        let done = unsafe {
            match (self.is_busy, self.is_noted) {
                (false, _) => true,
                (true, true) => sys::gvote_shim_event_synchronize(self.event),
                (true, false) => sys::gvote_shim_synchronize(self.backend),
            }
        };
        if !done {
            return Err(ComputeError::Memory("waiting"));
        }
        (self.is_busy, self.is_noted) = (false, false);
        self.sent.clear();
        Ok(())
    }

    /// Starts reading all results, so that they can be waited for independently of later work in the queue. Returns false if they exceed
    /// one piece or the device has no events; they are then read on demand.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn fetch(&mut self) -> Result<bool, ComputeError> {
        if !(1..=STAGE).contains(&self.kept.used) {
            return Ok(self.kept.used == 0);
        }
        self.begin_loading(0, self.kept.used)?;
        std::mem::swap(&mut self.read, &mut self.next);
        // SAFETY: the back end lives.
        self.is_noted = unsafe { sys::gvote_shim_event_record(&raw mut self.event, self.backend) };
        Ok(self.is_noted)
    }

    /// Returns numbers of a result. Results are read piece by piece, in the order in which they were placed.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn floats(&mut self, at: usize, n: usize) -> Result<&[f32], ComputeError> {
        self.load(at, n * size_of::<f32>())?;
        Ok(&self.read.host[(at - self.read.bytes.start) / size_of::<f32>()..][..n])
    }

    /// Returns bytes of a result.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn bytes(&mut self, at: usize, n: usize) -> Result<&[u8], ComputeError> {
        self.load(at, n)?;
        Ok(&self.read.host.as_bytes()[at - self.read.bytes.start..][..n])
    }

    /// Returns f16 numbers of one or more results that begin at `at`. While the caller uses them, the following results are being read.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn halves(&mut self, at: usize, n: usize) -> Result<&[f16], ComputeError> {
        let bytes = n * size_of::<f16>();
        self.load(at, bytes)?;
        let end = at + bytes.next_multiple_of(size_of::<f32>());
        if end < self.kept.used {
            self.begin_loading(end, STAGE.min(self.kept.used - end))?;
        }
        Ok(&self.read.host.halves()[(at - self.read.bytes.start) / size_of::<f16>()..][..n])
    }

    /// Makes some bytes of the results available on the host.
    fn load(&mut self, at: usize, bytes: usize) -> Result<(), ComputeError> {
        if !self.read.holds(at, bytes) {
            if !self.next.holds(at, bytes) {
                self.begin_loading(at, bytes.max(STAGE).min(self.kept.used - at))?;
            }
            std::mem::swap(&mut self.read, &mut self.next);
        }
        self.wait()
    }

    fn begin_loading(&mut self, at: usize, bytes: usize) -> Result<(), ComputeError> {
        if self.is_noted || !self.next.bytes.is_empty() {
            // a fetch or a read ahead may still be in progress
            self.wait()?;
        }
        let Piece { host, bytes: held } = &mut self.next;
        *held = 0..0;
        let len = bytes / size_of::<f32>();
        host.resize_for(self.place, len.max(STAGE / size_of::<f32>()))?;
        let b = Builder::new(1)?;
        // SAFETY: both sides have the same size, and stay until the queue has been waited for.
        let done = unsafe {
            let t = sys::ggml_new_tensor_1d(b.ctx, sys::GGML_TYPE_F32, len as i64);
            self.kept.put(t, at);
            (self.is_busy, self.is_noted) = (true, false);
            sys::gvote_shim_tensor_get_async(self.backend, t, host.as_mut_ptr().cast(), 0, sys::ggml_nbytes(t))
        };
        if !done {
            return Err(ComputeError::Memory("reading"));
        }
        *held = at..at + bytes;
        Ok(())
    }

    /// Discards all results.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn clear(&mut self) -> Result<(), ComputeError> {
        self.wait()?;
        (self.kept.used, self.work.used, self.read.bytes, self.next.bytes) = (0, 0, 0..0, 0..0);
        Ok(())
    }
}
