//! Fingerprints that distinguish models.

use std::ffi::{CStr, c_char};

use super::Model;
use crate::sys;

impl Model {
    /// Returns a hexadecimal hash that identifies the model regardless of its file's location.
    ///
    /// Hashes the metadata (except lists such as the vocabulary), the name, type and shape of every tensor, and the
    /// values of tensors with one dimension (norms and biases). The large weights are not read, so the time is
    /// negligible. Two trainings of one model that agree in all of this have the same fingerprint.
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            // Prefixes the length: "ab", "c" must differ from "a", "bc".
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        // SAFETY: plain query of a valid model.
        let n_meta = unsafe { sys::llama_model_meta_count(self.as_ptr()) };
        let of = [sys::llama_model_meta_key_by_index, sys::llama_model_meta_val_str_by_index];
        // SAFETY: both write at most `size` bytes, and `i` is below the count.
        let entry = |i| of.map(|of| text(|buffer, size| unsafe { of(self.as_ptr(), i, buffer, size) }));
        // llama.cpp stores the entries in hash table order.
        let mut entries: Vec<_> = (0..n_meta).map(entry).collect();
        entries.sort_unstable();
        entries.as_flattened().iter().for_each(|text| add(text));
        // The placement of layers changes the order of the tensors, and an output tensor that shares the embedding is
        // listed twice.
        let mut tensors: Vec<_> = (0..).map_while(|i| self.tensor(i)).collect();
        tensors.sort_unstable_by_key(|&(name, _)| name);
        tensors.dedup_by_key(|&mut (name, _)| name);
        let mut values = Vec::new();
        for (name, tensor) in tensors {
            add(name.to_bytes());
            add(&tensor.type_.to_le_bytes());
            add(tensor.ne.map(i64::to_le_bytes).as_flattened());
            // A simulated model has no values.
            if tensor.ne[1..] == [1; 3] && !tensor.buffer.is_null() {
                // SAFETY: `values` has the size of the tensor.
                let is_read = unsafe {
                    values.resize(sys::ggml_nbytes(tensor), 0);
                    sys::gvote_shim_tensor_get(tensor, values.as_mut_ptr().cast(), 0, values.len())
                };
                // Values that a device cannot return change the fingerprint.
                add(if is_read { &values } else { b"unread" });
            }
        }
        hash.finalize().to_hex().to_string()
    }

    /// Returns tensor `i` and its name; None past the last one.
    fn tensor(&self, i: u32) -> Option<(&CStr, &sys::ggml_tensor)> {
        let mut name = std::ptr::null();
        // SAFETY: the name is set if a tensor is returned; both belong to the model.
        unsafe {
            let tensor = sys::gvote_shim_model_tensor(self.as_ptr(), i, &raw mut name).as_ref()?;
            Some((CStr::from_ptr(name), tensor))
        }
    }
}

/// Calls a C function that fills a buffer and returns the length, first to find the length.
fn text(write: impl Fn(*mut c_char, usize) -> i32) -> Vec<u8> {
    let len = usize::try_from(write(std::ptr::null_mut(), 0)).unwrap_or(0);
    let mut buffer = vec![0u8; len + 1];
    write(buffer.as_mut_ptr().cast(), buffer.len());
    buffer.truncate(len);
    buffer
}
