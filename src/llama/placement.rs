//! Model loading parameters of llama.cpp: placement of the weights, reading of the file, and overrides.

use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::ptr;
use std::str::FromStr;

use super::{LlamaError, device};
use crate::sys;

/// How to load a model; names as in llama.cpp.
#[derive(Clone, Debug)]
pub struct ModelParams {
    /// Number of layers to keep on accelerators (`-ngl`); -1 = all. No effect without an accelerator.
    pub n_gpu_layers: i32,
    /// Names of the devices to use (`--device`), as [`devices`](super::devices) lists them; an empty list uses none.
    /// None: all accelerators.
    pub devices: Option<Vec<String>>,
    /// How the model is split over the devices (`-sm`).
    pub split_mode: SplitMode,
    /// The device that holds everything with [`SplitMode::None`] (`-mg`), as an index into the devices in use;
    /// negative: the CPU.
    pub main_gpu: i32,
    /// Share of the model for each device (`-ts`); empty: proportional to free memory.
    pub tensor_split: Vec<f32>,
    /// How the file is read.
    pub load_mode: LoadMode,
    /// Buffer types for tensors with matching names (`-ot`); the first match applies.
    pub tensor_buffers: Vec<TensorBuffer>,
    /// Metadata values that override those in the file (`--override-kv`).
    pub kv_overrides: Vec<KvOverride>,
    /// Adapters that every context of the model applies, with their scales (`--lora`, `--lora-scaled`).
    pub adapters: Vec<(PathBuf, f32)>,
}

impl Default for ModelParams {
    fn default() -> Self {
        Self {
            n_gpu_layers: -1,
            devices: None,
            split_mode: SplitMode::Layer,
            main_gpu: 0,
            tensor_split: Vec::new(),
            load_mode: LoadMode::Auto,
            tensor_buffers: Vec::new(),
            kv_overrides: Vec::new(),
            adapters: Vec::new(),
        }
    }
}

/// How a model is split over several accelerators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SplitMode {
    /// One accelerator holds everything.
    None,
    /// Each accelerator holds some layers and their cache.
    #[default]
    Layer,
    /// Each accelerator holds some rows of every matrix.
    Row,
    /// Each accelerator holds some heads and rows, and their cache.
    Tensor,
}

/// How a model file is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadMode {
    /// Memory-mapped, unless a device does not support it.
    #[default]
    Auto,
    /// Read into memory.
    None,
    /// Memory-mapped.
    Mmap,
    /// Read into memory that is locked against swapping.
    Mlock,
    /// Memory-mapped and locked against swapping.
    MmapMlock,
    /// Read with direct I/O, past the page cache, if the system supports it.
    DirectIo,
}

impl SplitMode {
    /// Modes with llama.cpp's names.
    pub const NAMES: [(&'static str, Self); 4] =
        [("none", Self::None), ("layer", Self::Layer), ("row", Self::Row), ("tensor", Self::Tensor)];

    fn raw(self) -> sys::llama_split_mode {
        match self {
            Self::None => sys::LLAMA_SPLIT_MODE_NONE,
            Self::Layer => sys::LLAMA_SPLIT_MODE_LAYER,
            Self::Row => sys::LLAMA_SPLIT_MODE_ROW,
            Self::Tensor => sys::LLAMA_SPLIT_MODE_TENSOR,
        }
    }
}

impl LoadMode {
    /// Modes with llama.cpp's names.
    pub const NAMES: [(&'static str, Self); 6] = [
        ("auto", Self::Auto),
        ("none", Self::None),
        ("mmap", Self::Mmap),
        ("mlock", Self::Mlock),
        ("mmap+mlock", Self::MmapMlock),
        ("dio", Self::DirectIo),
    ];

    fn raw(self) -> sys::llama_load_mode {
        match self {
            Self::Auto => sys::LLAMA_LOAD_MODE_AUTO,
            Self::None => sys::LLAMA_LOAD_MODE_NONE,
            Self::Mmap => sys::LLAMA_LOAD_MODE_MMAP,
            Self::Mlock => sys::LLAMA_LOAD_MODE_MLOCK,
            Self::MmapMlock => sys::LLAMA_LOAD_MODE_MMAP_MLOCK,
            Self::DirectIo => sys::LLAMA_LOAD_MODE_DIRECT_IO,
        }
    }
}

/// A buffer type for tensors whose name matches a regular expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorBuffer {
    pattern: CString,
    buffer: String,
}

/// Limit on the length of a pattern. Tensor names have at most 63 bytes, and a deeply nested pattern would overflow the
/// C++ stack.
const PATTERN_MAX: usize = 1024;

/// Why a pattern or its buffer type is invalid.
#[derive(Debug, thiserror::Error)]
pub enum TensorBufferError {
    #[error("PATTERN=BUFFER is expected, as in exps=CPU")]
    Form,
    #[error("the pattern is longer than {PATTERN_MAX} bytes")]
    Long,
    #[error("{0:?} is no regular expression (C++, ECMAScript): {1}")]
    Pattern(String, String),
}

impl TensorBuffer {
    /// Creates an override from a pattern and a buffer type.
    ///
    /// # Errors
    /// [`TensorBufferError`] if the pattern is not a valid C++ regular expression.
    pub fn new(pattern: &str, buffer: &str) -> Result<Self, TensorBufferError> {
        if pattern.len() > PATTERN_MAX {
            return Err(TensorBufferError::Long);
        }
        let c_pattern = CString::new(pattern).map_err(|_| TensorBufferError::Form)?;
        let mut reason = [0_u8; 256];
        // SAFETY: the pattern ends with NUL, and the buffer's true size is passed.
        let is_valid =
            unsafe { sys::gvote_shim_is_regex(c_pattern.as_ptr(), reason.as_mut_ptr().cast(), reason.len()) };
        if !is_valid {
            let reason = CStr::from_bytes_until_nul(&reason).unwrap_or_default().to_string_lossy().into_owned();
            return Err(TensorBufferError::Pattern(pattern.into(), reason));
        }
        Ok(Self { pattern: c_pattern, buffer: buffer.into() })
    }

    /// Places the experts' matrices of one layer, or of all layers, in host memory (`--cpu-moe`, `--n-cpu-moe`).
    pub fn experts(layer: Option<u32>) -> Self {
        let block = layer.map_or_else(String::new, |il| format!(r"blk\.{il}"));
        let pattern = block + r"\.ffn_(up|down|gate|gate_up)_(ch|)exps";
        Self { pattern: CString::new(pattern).expect("there is no NUL in it"), buffer: "CPU".into() }
    }
}

impl FromStr for TensorBuffer {
    type Err = TensorBufferError;

    /// Parses `PATTERN=BUFFER`.
    fn from_str(text: &str) -> Result<Self, TensorBufferError> {
        let (pattern, buffer) = text.split_once('=').ok_or(TensorBufferError::Form)?;
        Self::new(pattern, buffer)
    }
}

/// A metadata value that overrides the one in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct KvOverride {
    pub key: String,
    pub value: KvValue,
}

/// The value of an override.
#[derive(Clone, Debug, PartialEq)]
pub enum KvValue {
    Int(i64),
    Float(f64),
    Bool(bool),
    Str(String),
}

/// Longest key or text, in bytes. llama.cpp stores both in arrays of 128 bytes with a final NUL.
const KV_LENGTH_MAX: usize = 127;

/// Why the text of an override is invalid.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    #[error(
        "KEY=TYPE:VALUE is expected, TYPE one of int, float, bool and str, as in tokenizer.ggml.add_bos_token=bool:false"
    )]
    Form,
    #[error("{0:?} is no value of the type {1}")]
    Value(String, &'static str),
    #[error("{0:?} has more than {KV_LENGTH_MAX} bytes, or a NUL among them")]
    Length(String),
}

impl FromStr for KvOverride {
    type Err = KvError;

    /// Parses `KEY=TYPE:VALUE`.
    fn from_str(text: &str) -> Result<Self, KvError> {
        let (key, rest) = text.split_once('=').ok_or(KvError::Form)?;
        let (kind, value) = rest.split_once(':').ok_or(KvError::Form)?;
        let wrong = |kind| KvError::Value(value.into(), kind);
        let fits = |text: &str| text.len() <= KV_LENGTH_MAX && !text.contains('\0');
        if key.is_empty() {
            return Err(KvError::Form);
        }
        if let Some(long) = [key, value].into_iter().find(|text| !fits(text)) {
            return Err(KvError::Length(long.into()));
        }
        let value = match kind {
            "int" => KvValue::Int(value.parse().map_err(|_| wrong("int"))?),
            "float" => {
                KvValue::Float(value.parse().ok().filter(|x: &f64| x.is_finite()).ok_or_else(|| wrong("float"))?)
            }
            "bool" => KvValue::Bool(value.parse().map_err(|_| wrong("bool"))?),
            "str" => KvValue::Str(value.into()),
            _ => return Err(KvError::Form),
        };
        Ok(Self { key: key.into(), value })
    }
}

impl KvOverride {
    fn raw(&self) -> sys::llama_model_kv_override {
        // SAFETY: numbers and arrays of numbers, for which all-zero bytes are valid: an empty key and text.
        let mut raw: sys::llama_model_kv_override = unsafe { std::mem::zeroed() };
        let copy = |to: &mut [std::ffi::c_char], text: &str| {
            // The last byte stays NUL.
            for (to, from) in to[..KV_LENGTH_MAX].iter_mut().zip(text.bytes()) {
                *to = from as std::ffi::c_char;
            }
        };
        copy(&mut raw.key, &self.key);
        match &self.value {
            KvValue::Int(n) => {
                raw.tag = sys::LLAMA_KV_OVERRIDE_TYPE_INT;
                raw.__bindgen_anon_1.val_i64 = *n;
            }
            KvValue::Float(x) => {
                raw.tag = sys::LLAMA_KV_OVERRIDE_TYPE_FLOAT;
                raw.__bindgen_anon_1.val_f64 = *x;
            }
            KvValue::Bool(b) => {
                raw.tag = sys::LLAMA_KV_OVERRIDE_TYPE_BOOL;
                raw.__bindgen_anon_1.val_bool = *b;
            }
            KvValue::Str(text) => {
                raw.tag = sys::LLAMA_KV_OVERRIDE_TYPE_STR;
                // SAFETY: the array is as large as the union.
                copy(unsafe { &mut raw.__bindgen_anon_1.val_str }, text);
            }
        }
        raw
    }
}

/// llama.cpp's parameters, with the buffers that they point to.
pub(super) struct Raw {
    pub params: sys::llama_model_params,
    _devices: Vec<sys::ggml_backend_dev_t>,
    _tensor_split: Vec<f32>,
    _buffers: Vec<sys::llama_model_tensor_buft_override>,
    _kv: Vec<sys::llama_model_kv_override>,
}

impl ModelParams {
    /// Converts to llama.cpp's parameters. They point to patterns owned by `self`, which must outlive them.
    ///
    /// # Errors
    /// [`LlamaError::Device`], [`LlamaError::Buffer`], [`LlamaError::TensorSplit`] or [`LlamaError::SplitMode`] if this
    /// machine does not have what the parameters name.
    pub(super) fn raw(&self) -> Result<Raw, LlamaError> {
        // SAFETY: returns a plain struct.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.n_gpu_layers = self.n_gpu_layers;
        params.split_mode = self.split_mode.raw();
        params.main_gpu = self.main_gpu;
        params.load_mode = self.load_mode.raw();

        let mut devices = Vec::new();
        for name in self.devices.iter().flatten() {
            devices.push(device::accelerator(name)?);
        }
        devices.push(ptr::null_mut());
        if self.devices.is_some() {
            params.devices = devices.as_mut_ptr();
        }
        let has_devices =
            || devices.len() > 1 || self.devices.is_none() && device::devices().iter().any(|one| one.is_gpu);
        if self.split_mode == SplitMode::Tensor && !has_devices() {
            return Err(LlamaError::SplitMode);
        }

        let mut tensor_split = self.tensor_split.clone();
        if !tensor_split.is_empty() {
            // SAFETY: plain query.
            let most = unsafe { sys::llama_max_devices() };
            let is_share = |x: &f32| x.is_finite() && *x >= 0.0;
            if tensor_split.len() > most || !tensor_split.iter().all(is_share) {
                return Err(LlamaError::TensorSplit { most });
            }
            // llama.cpp reads one share for each possible device.
            tensor_split.resize(most, 0.0);
            params.tensor_split = tensor_split.as_ptr();
        }

        let mut buffers = Vec::new();
        for TensorBuffer { pattern, buffer } in &self.tensor_buffers {
            let buft = device::buffer_type(buffer)?;
            buffers.push(sys::llama_model_tensor_buft_override { pattern: pattern.as_ptr(), buft });
        }
        if !buffers.is_empty() {
            // A null pattern ends the list.
            buffers.push(sys::llama_model_tensor_buft_override { pattern: ptr::null(), buft: ptr::null_mut() });
            params.tensor_buft_overrides = buffers.as_ptr();
        }

        let mut kv: Vec<_> = self.kv_overrides.iter().map(KvOverride::raw).collect();
        if !kv.is_empty() {
            // SAFETY: see `KvOverride::raw`; an empty key ends the list.
            kv.push(unsafe { std::mem::zeroed() });
            params.kv_overrides = kv.as_ptr();
        }
        Ok(Raw { params, _devices: devices, _tensor_split: tensor_split, _buffers: buffers, _kv: kv })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_in_place_of_the_files_have_a_type() {
        let value = |text: &str| text.parse::<KvOverride>().map(|found| (found.key, found.value));
        let is = |key: &str, value| (key.to_owned(), value);
        assert_eq!(value("a.b=int:-7").unwrap(), is("a.b", KvValue::Int(-7)));
        assert_eq!(value("a=float:2.5").unwrap(), is("a", KvValue::Float(2.5)));
        assert_eq!(value("a=bool:false").unwrap(), is("a", KvValue::Bool(false)));
        assert_eq!(value("a=str:x:y=z").unwrap(), is("a", KvValue::Str("x:y=z".into())));
        let long = "a".repeat(128);
        for text in [
            "",
            "a",
            "a=int",
            "=int:1",
            "a=int:x",
            "a=int:9223372036854775808",
            "a=float:nan",
            "a=float:inf",
            "a=bool:1",
            "a=i32:1",
            &format!("{long}=int:1"),
            &format!("a=str:{long}"),
        ] {
            assert!(value(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_pattern_that_is_none_is_refused_with_cpps_reason() {
        for text in ["exps=CPU", r"blk\.(1|2)\..*=CPU", "=CPU"] {
            assert!(text.parse::<TensorBuffer>().is_ok(), "{text}");
        }
        for (text, reason) in
            [("exps", "PATTERN=BUFFER"), ("(=CPU", "\"(\""), ("a{2,1}=CPU", "{2,1}"), ("[b-a]=CPU", "[b-a]")]
        {
            let error = text.parse::<TensorBuffer>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let deep = "(".repeat(1 << 20) + &")".repeat(1 << 20);
        assert!(matches!(TensorBuffer::new(&deep, "CPU"), Err(TensorBufferError::Long)));
        let deepest = "(".repeat(PATTERN_MAX / 2) + &")".repeat(PATTERN_MAX / 2);
        TensorBuffer::new(&deepest, "CPU").unwrap();
    }

    #[test]
    fn what_the_machine_does_not_have_is_named() {
        let error = |params: ModelParams| params.raw().map(drop).unwrap_err().to_string();
        let devices = Some(vec!["CUDA99".to_owned()]);
        assert!(error(ModelParams { devices, ..ModelParams::default() }).contains("\"CUDA99\""));
        let tensor_buffers = vec![TensorBuffer::new("x", "nowhere").unwrap()];
        let unknown = error(ModelParams { tensor_buffers, ..ModelParams::default() });
        assert!(unknown.contains("\"nowhere\"") && unknown.contains("CPU"), "{unknown}");
        for tensor_split in [vec![1.0; 1000], vec![-1.0], vec![f32::NAN]] {
            let tensor_split_error = error(ModelParams { tensor_split, ..ModelParams::default() });
            assert!(tensor_split_error.contains("from 0 up"), "{tensor_split_error}");
        }
        let none = ModelParams { devices: Some(Vec::new()), split_mode: SplitMode::Tensor, ..ModelParams::default() };
        assert!(matches!(none.raw().map(drop), Err(LlamaError::SplitMode)));
    }
}
