//! What tells a model from another.

use std::ffi::{CStr, c_char};

use super::Model;
use crate::sys;

impl Model {
    /// Tells models apart wherever their files lie: a hash over the metadata (lists such as the vocabulary left out), the
    /// name, type and shape of every tensor, and the values of those with one dimension (norms and biases), in hexadecimal.
    /// The large weights are not read, so that it takes no time worth mentioning: two trainings of one model that agree in
    /// all of this are one to it.
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            // the length ends it: "ab", "c" is not "a", "bc"
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        // SAFETY: plain query of a valid model.
        let n_meta = unsafe { sys::llama_model_meta_count(self.as_ptr()) };
        let of = [sys::llama_model_meta_key_by_index, sys::llama_model_meta_val_str_by_index];
        // SAFETY: both write at most so many bytes, and i is below the count.
        let entry = |i| of.map(|of| text(|buffer, size| unsafe { of(self.as_ptr(), i, buffer, size) }));
        // llama.cpp keeps them in the order of a hash table
        let mut entries: Vec<_> = (0..n_meta).map(entry).collect();
        entries.sort_unstable();
        entries.as_flattened().iter().for_each(|text| add(text));
        // where layers lie changes the order of the tensors, and an output that shares the embedding's is there twice
        let mut tensors: Vec<_> = (0..).map_while(|i| self.tensor(i)).collect();
        tensors.sort_unstable_by_key(|&(name, _)| name);
        tensors.dedup_by_key(|&mut (name, _)| name);
        let mut values = Vec::new();
        for (name, tensor) in tensors {
            add(name.to_bytes());
            add(&tensor.type_.to_le_bytes());
            add(tensor.ne.map(i64::to_le_bytes).as_flattened());
            // a simulated model has no values
            if tensor.ne[1..] == [1; 3] && !tensor.buffer.is_null() {
                // SAFETY: the tensor has as many bytes.
                let is_read = unsafe {
                    values.resize(sys::ggml_nbytes(tensor), 0);
                    sys::gvote_shim_tensor_get(tensor, values.as_mut_ptr().cast(), 0, values.len())
                };
                // what a device cannot give is as good as another model
                add(if is_read { &values } else { b"unread" });
            }
        }
        hash.finalize().to_hex().to_string()
    }

    /// A weight and its name; none past the last one.
    fn tensor(&self, i: u32) -> Option<(&CStr, &sys::ggml_tensor)> {
        let mut name = std::ptr::null();
        // SAFETY: the name is set where a tensor is answered; both belong to the model.
        unsafe {
            let tensor = sys::gvote_shim_model_tensor(self.as_ptr(), i, &raw mut name).as_ref()?;
            Some((CStr::from_ptr(name), tensor))
        }
    }
}

/// What llama.cpp writes into a buffer, whose size it tells.
fn text(write: impl Fn(*mut c_char, usize) -> i32) -> Vec<u8> {
    let len = usize::try_from(write(std::ptr::null_mut(), 0)).unwrap_or(0);
    let mut buffer = vec![0u8; len + 1];
    write(buffer.as_mut_ptr().cast(), buffer.len());
    buffer.truncate(len);
    buffer
}
