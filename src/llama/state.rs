//! The state of a sequence in llama.cpp's serialisation, in memory or streamed.

use std::ffi::{CStr, c_void};
use std::io::{self, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Context, LlamaError, SeqId};
use crate::sys;

/// Possible reasons why llama.cpp rejects a state; its log contains the actual one.
const UNFIT: &str = ": another model, other cache types or flash attention, or too few cells";

/// A reader or writer for a C callback, with the result of the last operation.
struct Stream<T> {
    inner: T,
    result: io::Result<()>,
}

impl<T> Stream<T> {
    /// Runs one operation. Returns false if it failed.
    fn run(&mut self, step: impl FnOnce(&mut T) -> io::Result<()>) -> bool {
        // Panics must not cross into the calling C++ code.
        let inner = &mut self.inner;
        let outcome = catch_unwind(AssertUnwindSafe(|| step(inner)));
        self.result = outcome.unwrap_or_else(|_| Err(io::Error::other("panic")));
        self.result.is_ok()
    }
}

impl Context {
    /// Copies the state of one sequence, for [`Self::read_sequence`].
    ///
    /// # Errors
    /// [`LlamaError::Memory`].
    pub(crate) fn copy_sequence(&mut self, seq: SeqId) -> Result<Vec<u8>, LlamaError> {
        self.copy_state(seq, 0)
    }

    /// Copies the part of a sequence's state that cannot be cut: a window cache, the state of recurrent layers. Empty
    /// if the sequence has no such part.
    ///
    /// # Errors
    /// [`LlamaError::Memory`].
    pub(crate) fn copy_uncut(&mut self, seq: SeqId) -> Result<Vec<u8>, LlamaError> {
        // For a plain cache, llama.cpp would write all cells, whatever the flag says.
        // SAFETY: valid context.
        if !unsafe { sys::gvote_shim_has_uncut(self.as_ptr()) } {
            return Ok(Vec::new());
        }
        self.copy_state(seq, sys::LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
    }

    fn copy_state(&mut self, seq: SeqId, flags: sys::llama_state_seq_flags) -> Result<Vec<u8>, LlamaError> {
        self.check_sequence(seq)?;
        let mut data = Vec::new();
        // SAFETY: valid context and sequence.
        let size = unsafe { sys::llama_state_seq_get_size_ext(self.as_ptr(), seq, flags) };
        data.try_reserve_exact(size).map_err(|_| LlamaError::Memory)?;
        self.write_state(seq, flags, &mut data).map_err(|_| LlamaError::Memory)?;
        Ok(data)
    }

    /// Restores the result of [`Self::copy_uncut`]. The rest of the state does not change.
    ///
    /// # Errors
    /// Those of [`Self::read_sequence`]; the part of the state that cannot be cut is then lost.
    pub(crate) fn load_uncut(&mut self, seq: SeqId, mut data: &[u8]) -> Result<(), LlamaError> {
        self.read_state(seq, sys::LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY, &mut data)
    }

    /// Returns the size of one sequence's state in bytes.
    pub(crate) fn sequence_size(&self, seq: SeqId) -> usize {
        // SAFETY: valid context.
        unsafe { sys::llama_state_seq_get_size(self.as_ptr(), seq) }
    }

    /// Writes the state of one sequence as a stream, without a buffer for all of it. For [`Self::read_sequence`].
    ///
    /// # Errors
    /// Those of `out`, and [`io::ErrorKind::OutOfMemory`].
    pub(crate) fn write_sequence(&mut self, seq: SeqId, out: &mut dyn Write) -> io::Result<()> {
        self.write_state(seq, 0, out)
    }

    fn write_state(&mut self, seq: SeqId, flags: sys::llama_state_seq_flags, out: &mut dyn Write) -> io::Result<()> {
        self.check_sequence(seq).map_err(io::Error::other)?;
        unsafe extern "C" fn write(data: *const c_void, size: usize, stream: *mut c_void) -> bool {
            // SAFETY: `stream` is the `Stream` below, used nowhere else meanwhile; `data` has `size` bytes.
            let (stream, data) = unsafe {
                (&mut *stream.cast::<Stream<&mut dyn Write>>(), std::slice::from_raw_parts(data.cast::<u8>(), size))
            };
            stream.run(|out| out.write_all(data))
        }
        let mut stream = Stream { inner: out, result: Ok(()) };
        // SAFETY: valid context; the stream outlives the call.
        let failed =
            unsafe { sys::gvote_shim_state_write(self.as_ptr(), seq, flags, Some(write), (&raw mut stream).cast()) };
        stream.result?;
        if failed.is_null() { Ok(()) } else { Err(io::ErrorKind::OutOfMemory.into()) }
    }

    /// Replaces a sequence with one written by [`Self::write_sequence`]. After an error the sequence is empty.
    ///
    /// # Errors
    /// [`LlamaError::State`] if llama.cpp rejects the state or the data is truncated; [`LlamaError::Memory`].
    pub(crate) fn read_sequence(&mut self, seq: SeqId, from: &mut dyn Read) -> Result<(), LlamaError> {
        self.read_state(seq, 0, from)
    }

    fn read_state(
        &mut self,
        seq: SeqId,
        flags: sys::llama_state_seq_flags,
        from: &mut dyn Read,
    ) -> Result<(), LlamaError> {
        unsafe extern "C" fn read(data: *mut c_void, size: usize, stream: *mut c_void) -> bool {
            // SAFETY: `stream` is the `Stream` below, used nowhere else meanwhile; `data` has room for `size` bytes,
            // which are zeroed before use because they may be uninitialised.
            unsafe {
                let stream = &mut *stream.cast::<Stream<&mut dyn Read>>();
                data.cast::<u8>().write_bytes(0, size);
                stream.run(|from| from.read_exact(std::slice::from_raw_parts_mut(data.cast(), size)))
            }
        }
        self.check_sequence(seq)?;
        let mut stream = Stream { inner: from, result: Ok(()) };
        // SAFETY: valid context; the stream outlives the call.
        let failed =
            unsafe { sys::gvote_shim_state_read(self.as_ptr(), seq, flags, Some(read), (&raw mut stream).cast()) };
        if stream.result.is_err() {
            return Err(LlamaError::State(": it is cut off"));
        }
        if failed.is_null() {
            return Ok(());
        }
        // SAFETY: a static string.
        let reason = unsafe { CStr::from_ptr(failed) };
        Err(if reason == c"out of memory" { LlamaError::Memory } else { LlamaError::State(UNFIT) })
    }

    /// Replaces a sequence in a context whose sequences have separate caches with one saved from a unified cache: see
    /// [`ContextParams::kv_unified`](super::ContextParams::kv_unified).
    ///
    /// # Errors
    /// [`LlamaError::State`] if llama.cpp rejects the state, and for models that also have a window cache.
    pub fn adopt_sequence(&mut self, seq: SeqId, data: &[u8]) -> Result<(), LlamaError> {
        let data = in_parts(data, self.n_seq_max() as u32).ok_or(LlamaError::State(UNFIT))?;
        self.read_sequence(seq, &mut &data[..])
    }
}

/// Bytes of a number in llama.cpp's state of a sequence.
const NUMBER: usize = size_of::<u32>();

/// Converts the state of a sequence from a cache with one part to a cache with `parts` parts. The state begins with the
/// number of parts. The cells of each part follow, preceded by their number; all other parts are empty here.
fn in_parts(state: &[u8], parts: u32) -> Option<Vec<u8>> {
    let (&found, cells) = state.split_first_chunk::<NUMBER>()?;
    if u32::from_le_bytes(found) != 1 {
        return None;
    }
    let empty = vec![0; NUMBER * (parts as usize).saturating_sub(1)];
    Some([&parts.to_le_bytes(), cells, &empty].concat())
}
