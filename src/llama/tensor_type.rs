//! Storage types of tensors in ggml.

use std::ffi::CStr;

use crate::sys;

/// One of ggml's tensor types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorType {
    /// ggml's name, such as `q4_K`.
    pub name: &'static str,
    /// Values in a block.
    pub block: u64,
    /// Bytes of a block.
    pub bytes: u64,
}

impl TensorType {
    /// Returns the type with this number (`ggml_type`); None if llama.cpp does not know the type or has removed it.
    pub fn of(number: u32) -> Option<Self> {
        let known = number < sys::GGML_TYPE_COUNT;
        // SAFETY: ggml's tables are static, and the number lies inside them.
        known
            .then(|| unsafe {
                Self {
                    name: CStr::from_ptr(sys::ggml_type_name(number)).to_str().unwrap_or_default(),
                    block: sys::ggml_blck_size(number) as u64,
                    bytes: sys::ggml_type_size(number) as u64,
                }
            })
            .filter(|found| found.block > 0 && found.bytes > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::TensorType;

    #[test]
    fn every_number_is_a_type_or_none() {
        let found = |name, block, bytes| Some(TensorType { name, block, bytes });
        assert_eq!(TensorType::of(0), found("f32", 1, 4));
        assert_eq!(TensorType::of(12), found("q4_K", 256, 144));
        // MXFP4 and NVFP4: gguf-rs computes too large a size for the first and panics on the second
        assert_eq!(TensorType::of(39), found("mxfp4", 32, 17));
        assert_eq!(TensorType::of(40), found("nvfp4", 64, 36));
        // removed types; out of range
        assert_eq!([4, 31, 1_000, u32::MAX].map(TensorType::of), [None; 4]);
    }
}
