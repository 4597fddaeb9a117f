//! Small graphs in the queue of a back end that has other work, too.

use std::ops::Range;

use half::f16;

use super::device::STAGE;
use super::memory::Memory;
use super::{Builder, ComputeError, HostMemory, Tensor};
use crate::sys;

/// The queue of a back end, and memory where it works: the results of graphs stay there until they are read together.
///
/// A back end works its queue off in order. So nobody waits between two pieces of work: the later one may overwrite what the
/// earlier one reads, or needs on the way, and a copy that comes last finds all results. It is the host that has to wait: before
/// it reads what was copied, lets go of what is sent, or gives memory back.
pub(crate) struct Lane {
    /// NULL for the host.
    place: sys::ggml_backend_dev_t,
    /// NULL before the first work.
    backend: sys::ggml_backend_t,
    /// Results and what was sent, until the results are read.
    kept: Memory,
    /// What a single graph needs on the way.
    work: Memory,
    /// A part of what is kept, as it was read, and another that is on its way.
    read: Piece,
    next: Piece,
    /// What the queue may not have taken yet.
    sent: Vec<Vec<u32>>,
    /// Whether anything may be in the queue.
    is_busy: bool,
    /// NULL before there is one, and where a device has none.
    event: sys::ggml_backend_event_t,
    /// Whether the event comes behind all that is ours in the queue.
    is_noted: bool,
}

/// Some bytes of what is kept, on the host.
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

// SAFETY: one thread at a time uses it (&mut), and what it works with is [`Device`]'s.
unsafe impl Send for Lane {}

impl Drop for Lane {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; NULL is fine.
        unsafe { sys::ggml_backend_event_free(self.event) };
    }
}

impl Lane {
    /// Bytes that are read at once, at least.
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

    /// What follows goes into the queue of this back end, after what waits in that of another one on the same device.
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

    /// Whether there is room for some results: bytes of each.
    pub fn has_room(&self, results: &[usize]) -> bool {
        self.kept.has_room(results)
    }

    /// Whether there is room for what a graph needs on the way: bytes of each.
    pub fn has_work_room(&self, work: &[usize]) -> bool {
        self.work.has_room(work)
    }

    /// Takes the memory for `n` times some results, within limits, and for reading them.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn prepare(&mut self, results: &[usize], n: usize) -> Result<(), ComputeError> {
        self.grow(results, n)?;
        [&mut self.read, &mut self.next]
            .into_iter()
            .try_for_each(|piece| piece.host.resize_for(self.place, STAGE / size_of::<f32>()))
    }

    /// Gives up what is kept and makes room for `n` times as much as some results more, within limits, but at least for them.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn grow(&mut self, results: &[usize], n: usize) -> Result<(), ComputeError> {
        self.clear()?;
        self.kept.grow(self.backend, results, n)
    }

    /// Makes room for what a graph needs on the way.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn grow_work(&mut self, work: &[usize]) -> Result<(), ComputeError> {
        self.wait()?;
        self.work.grow(self.backend, work, 0)
    }

    /// Gives a result memory, for which there is room, and says where it will be found.
    pub fn keep(&mut self, t: Tensor) -> usize {
        self.kept.give(t)
    }

    /// Gives memory, for which there is room, to what a graph needs on the way.
    pub fn lend(&mut self, t: Tensor) {
        self.work.give(t);
    }

    /// Sends numbers of rows, for which there is room among the results, and says where they will be.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn send(&mut self, rows: Vec<u32>) -> Result<usize, ComputeError> {
        let b = Builder::new(1)?;
        // SAFETY: the tensor gets as many bytes; they stay as they are until they are there.
        let (at, done) = unsafe {
            let t = sys::ggml_new_tensor_1d(b.ctx, sys::GGML_TYPE_I32, rows.len() as i64);
            let at = self.kept.give(t);
            (self.is_busy, self.is_noted) = (true, false);
            (at, sys::gvote_shim_tensor_set_async(self.backend, t, rows.as_ptr().cast(), 0, size_of_val(&rows[..])))
        };
        self.sent.push(rows);
        if done { Ok(at) } else { Err(ComputeError::Memory("rows")) }
    }

    /// Rows that were sent, as a tensor of another graph.
    pub fn sent(&self, b: &Builder, at: usize, n: usize) -> Tensor {
        // SAFETY: the tensor belongs to the builder's context; it lies where the rows are.
        unsafe {
            let t = sys::ggml_new_tensor_1d(b.ctx, sys::GGML_TYPE_I32, n as i64);
            self.kept.put(t, at);
            t
        }
    }

    /// Puts a graph into the queue, all of whose tensors were given memory, but for views. False: whoever has the back end wants it
    /// to stop, and nothing is computed.
    ///
    /// # Errors
    /// [`ComputeError`].
    ///
    /// # Safety
    /// What the graph reads elsewhere lies on the same device, and is written to by nobody but what comes later in the queue.
    pub unsafe fn enqueue(&mut self, b: &mut Builder) -> Result<bool, ComputeError> {
        (self.is_busy, self.is_noted) = (true, false);
        // the next graph in the queue may have it
        self.work.used = 0;
        // SAFETY: our memory stays until the queue has been waited for.
        match unsafe { b.enqueue(self.backend) } {
            Err(ComputeError::Failed(sys::GGML_STATUS_ABORTED)) => Ok(false),
            done => done.map(|()| true),
        }
    }

    /// Waits until all that is ours in the queue has been done.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn wait(&mut self) -> Result<(), ComputeError> {
        // SAFETY: a back end with work of ours lives, and so does the event.
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

    /// Begins to read all that is kept, so that it can be waited for without what comes later in the queue. False: there is more than a
    /// piece, or the device cannot tell; then it is read as it is asked for.
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

    /// Numbers of a result. What is kept is read piece by piece, in the order in which it was kept.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn floats(&mut self, at: usize, n: usize) -> Result<&[f32], ComputeError> {
        self.load(at, n * size_of::<f32>())?;
        Ok(&self.read.host[(at - self.read.bytes.start) / size_of::<f32>()..][..n])
    }

    /// The same in bytes.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn bytes(&mut self, at: usize, n: usize) -> Result<&[u8], ComputeError> {
        self.load(at, n)?;
        Ok(&self.read.host.as_bytes()[at - self.read.bytes.start..][..n])
    }

    /// The same of some results in halves, which begin at `at`; while the caller looks at them, what is kept behind them is on its way.
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

    /// Sees to it that some bytes of what is kept are on the host.
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
            // what was fetched, or expected to be asked for, may be on its way still
            self.wait()?;
        }
        let Piece { host, bytes: held } = &mut self.next;
        *held = 0..0;
        let len = bytes / size_of::<f32>();
        host.resize_for(self.place, len.max(STAGE / size_of::<f32>()))?;
        let b = Builder::new(1)?;
        // SAFETY: both sides hold as many bytes, and stay until they were waited for.
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

    /// Gives up what is kept.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn clear(&mut self) -> Result<(), ComputeError> {
        self.wait()?;
        (self.kept.used, self.work.used, self.read.bytes, self.next.bytes) = (0, 0, 0..0, 0..0);
        Ok(())
    }
}
