//! What a batch holds of each sequence.

use std::collections::BTreeMap;
use std::ffi::c_void;

use super::ffi::llama::{llama_batch, llama_batch_ext};

/// A token in a sequence; as in batch.cpp.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Row {
    pub seq: i32,
    pub pos: i32,
    pub output: bool,
}

/// The tokens of one sequence in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub n: usize,
    /// Whose logits are asked for.
    pub n_outputs: usize,
    pub first: i32,
    pub last: i32,
}

/// The tokens of a batch by sequence.
#[derive(Default)]
pub struct Parts {
    pub of: BTreeMap<i32, Part>,
    pub n_rows: usize,
}

impl Parts {
    fn add(&mut self, row: Row) {
        self.n_rows += 1;
        let part = self.of.entry(row.seq).or_insert(Part { n: 0, n_outputs: 0, first: row.pos, last: row.pos });
        part.n += 1;
        part.n_outputs += usize::from(row.output);
        part.first = part.first.min(row.pos);
        part.last = part.last.max(row.pos);
    }

    /// `end`: the position after a sequence's last one, where the batch names none.
    ///
    /// # Safety
    /// The batch is one that llama.cpp would take.
    pub unsafe fn of(batch: &llama_batch, end: impl Fn(i32) -> i32) -> Self {
        let mut parts = Self::default();
        let n = usize::try_from(batch.n_tokens).unwrap_or_default();
        for i in 0..n {
            // SAFETY: arrays of n_tokens, or NULL, as llama.h says.
            let (seqs, pos, output) = unsafe {
                let seqs = if batch.seq_id.is_null() || batch.n_seq_id.is_null() {
                    &[0][..]
                } else {
                    std::slice::from_raw_parts(*batch.seq_id.add(i), *batch.n_seq_id.add(i) as usize)
                };
                let pos = (!batch.pos.is_null()).then(|| *batch.pos.add(i));
                let output = if batch.logits.is_null() { i + 1 == n } else { *batch.logits.add(i) != 0 };
                (seqs, pos, output)
            };
            for &seq in seqs {
                let next = || parts.of.get(&seq).map_or_else(|| end(seq), |part| part.last + 1);
                let pos = pos.unwrap_or_else(next);
                parts.add(Row { seq, pos, output });
            }
        }
        parts
    }

    /// # Safety
    /// A living batch.
    pub unsafe fn of_ext(batch: *const llama_batch_ext) -> Self {
        unsafe extern "C" {
            fn gvote_plugin_rows(
                batch: *const llama_batch_ext,
                each: extern "C" fn(*const Row, *mut c_void),
                data: *mut c_void,
            );
        }
        extern "C" fn each(row: *const Row, parts: *mut c_void) {
            // SAFETY: both come from the call below, and live as long as it.
            unsafe { (*parts.cast::<Parts>()).add(*row) }
        }
        let mut parts = Self::default();
        // SAFETY: the caller's batch; `parts` outlives the call.
        unsafe { gvote_plugin_rows(batch, each, (&raw mut parts).cast()) };
        parts
    }
}
