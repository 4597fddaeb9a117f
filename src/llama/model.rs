use std::ffi::{CStr, CString, c_char};
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{LlamaError, ModelParams, log, rpc};
use crate::sys;

/// An index into the model's vocabulary.
pub type Token = i32;

struct Owned {
    ptr: NonNull<sys::llama_model>,
    /// The app owns the model.
    is_lent: bool,
    /// Adapters that every context applies, with their scales. Freed with the model.
    adapters: Vec<(NonNull<sys::llama_adapter_lora>, f32)>,
    /// See [`Model::alterations`].
    alterations: Vec<String>,
}

impl Owned {
    fn add_adapter(&mut self, path: &Path, scale: f32) -> Result<(), LlamaError> {
        log::clear_reason();
        let c_path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| LlamaError::PathNul(path.into()))?;
        // SAFETY: a valid model, and a path that outlives the call.
        let adapter = unsafe { sys::llama_adapter_lora_init(self.ptr.as_ptr(), c_path.as_ptr()) };
        let adapter = NonNull::new(adapter)
            .ok_or_else(|| LlamaError::Adapter { path: path.into(), reason: log::take_reason() })?;
        self.adapters.push((adapter, scale));
        self.alterations.push(format!("adapter {} {scale}", hash_of(path)?));
        Ok(())
    }
}

fn hash_of(path: &Path) -> Result<blake3::Hash, LlamaError> {
    let unread = |source: io::Error| LlamaError::Adapter { path: path.into(), reason: source.to_string() };
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).map_err(unread)?).map_err(unread)?;
    Ok(hasher.finalize())
}

// SAFETY: a loaded model is read-only; llama.cpp documents sharing one between contexts of different threads.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.is_lent {
            // SAFETY: the last owner frees it; contexts hold a clone of the Arc and are gone by now.
            unsafe { sys::llama_model_free(self.ptr.as_ptr()) };
        }
    }
}

/// A loaded model and its vocabulary. Cheap to clone.
#[derive(Clone)]
pub struct Model(Arc<Owned>);

impl Model {
    /// Loads a GGUF file (the first one of a split model).
    ///
    /// # Errors
    /// [`LlamaError::Load`] with llama.cpp's own reason. `progress` (0..1) returning false cancels the load.
    pub fn load(path: &Path, params: &ModelParams, mut progress: impl FnMut(f32) -> bool) -> Result<Self, LlamaError> {
        Self::load_with(path, params, false, &mut progress)
    }

    /// Loads a model. `no_alloc`: load metadata and vocabulary without weights; such a model must never compute.
    pub(super) fn load_with(
        path: &Path,
        params: &ModelParams,
        no_alloc: bool,
        mut progress: impl FnMut(f32) -> bool,
    ) -> Result<Self, LlamaError> {
        super::init();
        log::clear_reason();
        let c_path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| LlamaError::PathNul(path.into()))?;

        unsafe extern "C" fn trampoline<F: FnMut(f32) -> bool>(value: f32, data: *mut std::ffi::c_void) -> bool {
            // Panics must not cross into the calling C++ code; a panic cancels the load.
            // SAFETY: `data` is the closure below, alive and not borrowed elsewhere while the model loads.
            catch_unwind(AssertUnwindSafe(|| unsafe { (*data.cast::<F>())(value) })).unwrap_or(false)
        }
        fn callback_of<F: FnMut(f32) -> bool>(_: &F) -> sys::llama_progress_callback {
            Some(trampoline::<F>)
        }

        let owned = params.raw()?;
        let mut raw = owned.params;
        if no_alloc {
            raw.no_alloc = true;
            raw.load_mode = sys::LLAMA_LOAD_MODE_NONE; // as in llama.cpp's own memory fit: nothing is mapped either
        }
        raw.progress_callback = callback_of(&progress);
        raw.progress_callback_user_data = (&raw mut progress).cast();
        // SAFETY: the path, the closure and everything the parameters point to outlive the call.
        let ptr = unsafe { sys::gvote_shim_model_load(c_path.as_ptr(), raw) };
        rpc::watch_workers();
        let ptr =
            NonNull::new(ptr).ok_or_else(|| LlamaError::Load { path: path.into(), reason: log::take_reason() })?;
        let overrides = params.kv_overrides.iter().map(|one| format!("{one:?}")).collect();
        let mut owned = Owned { ptr, is_lent: false, adapters: Vec::new(), alterations: overrides };
        // A simulation computes nothing, so it needs no adapters.
        for (path, scale) in params.adapters.iter().filter(|_| !no_alloc) {
            owned.add_adapter(path, *scale)?;
        }
        Ok(Self(Arc::new(owned)))
    }

    pub(crate) fn as_ptr(&self) -> *mut sys::llama_model {
        self.0.ptr.as_ptr()
    }

    /// Wraps a model owned by the app.
    ///
    /// # Safety
    /// `ptr` is a valid model and stays valid until the last use of the returned value or of a clone.
    pub(crate) unsafe fn lent(ptr: NonNull<sys::llama_model>) -> Self {
        Self(Arc::new(Owned { ptr, is_lent: true, adapters: Vec::new(), alterations: Vec::new() }))
    }

    /// Returns the changes to the file's model (overrides, adapters) in order, for comparisons.
    pub(crate) fn alterations(&self) -> Vec<String> {
        self.0.alterations.clone()
    }

    /// Returns the adapters that contexts of this model apply, with their scales.
    pub(super) fn adapters(&self) -> &[(NonNull<sys::llama_adapter_lora>, f32)] {
        &self.0.adapters
    }

    pub(super) fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe { sys::llama_model_get_vocab(self.as_ptr()) }
    }

    /// Returns true if the file has a tokenizer. Without one, llama.cpp aborts when asked for the text of a token.
    pub(super) fn has_tokenizer(&self) -> bool {
        // SAFETY: valid vocabulary.
        unsafe { sys::llama_vocab_type(self.vocab()) != sys::LLAMA_VOCAB_TYPE_NONE }
    }

    /// Number of tokens in the vocabulary.
    pub fn n_vocab(&self) -> usize {
        // SAFETY: valid vocabulary.
        unsafe { sys::llama_vocab_n_tokens(self.vocab()) as usize }
    }

    /// Context length that the model was trained with, in tokens.
    pub fn n_ctx_train(&self) -> usize {
        // SAFETY: valid model. The file stores the length as an unsigned number.
        unsafe { sys::llama_model_n_ctx_train(self.as_ptr()) as u32 as usize }
    }

    /// Number of positions with a learned vector (GPT-2, StarCoder). None if positions are computed and may exceed the
    /// training length.
    pub fn n_positions(&self) -> Option<usize> {
        for i in 0.. {
            let mut name = std::ptr::null();
            // SAFETY: the name is set if a tensor is returned; both belong to the model.
            unsafe {
                let tensor = sys::gvote_shim_model_tensor(self.as_ptr(), i, &raw mut name).as_ref()?;
                if CStr::from_ptr(name) == c"position_embd.weight" {
                    return Some(tensor.ne[1] as usize);
                }
            }
        }
        None
    }

    /// Width of the hidden state.
    pub fn n_embd(&self) -> usize {
        // SAFETY: valid model.
        unsafe { sys::llama_model_n_embd(self.as_ptr()) as usize }
    }

    /// Number of layers.
    pub fn n_layer(&self) -> usize {
        // SAFETY: valid model.
        unsafe { sys::llama_model_n_layer(self.as_ptr()) as usize }
    }

    /// Size of all tensors in bytes.
    pub fn size(&self) -> u64 {
        // SAFETY: valid model.
        unsafe { sys::llama_model_size(self.as_ptr()) }
    }

    /// Number of values in all tensors.
    pub fn n_params(&self) -> u64 {
        // SAFETY: valid model.
        unsafe { sys::llama_model_n_params(self.as_ptr()) }
    }

    /// One-line description of the model: architecture, size, file type.
    pub fn description(&self) -> String {
        let mut buf = vec![0u8; 256];
        // SAFETY: the buffer's true size is passed.
        unsafe { sys::gvote_shim_model_desc(self.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
        string_of(&buf)
    }

    /// Returns a metadata value as text, for example of `general.architecture`.
    pub fn meta(&self, key: &str) -> Option<String> {
        let key = CString::new(key).ok()?;
        // SAFETY: with a NULL buffer of size 0 only the length is returned.
        let len = unsafe { sys::llama_model_meta_val_str(self.as_ptr(), key.as_ptr(), std::ptr::null_mut(), 0) };
        let mut buf = vec![0u8; usize::try_from(len).ok()? + 1];
        // SAFETY: the buffer's true size is passed.
        unsafe { sys::llama_model_meta_val_str(self.as_ptr(), key.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
        Some(string_of(&buf))
    }

    /// Returns the reason why this model has no supported attention cache, or None if it has one.
    pub fn unsupported(&self) -> Option<&'static str> {
        let model = self.as_ptr();
        // SAFETY: valid model; plain queries.
        unsafe {
            if sys::llama_model_is_recurrent(model) {
                Some("it is recurrent and keeps no attention cache")
            } else if sys::llama_model_is_hybrid(model) {
                Some("it mixes recurrent and attention layers, a layout that is not supported yet")
            } else if sys::llama_model_is_diffusion(model) {
                Some("it is a diffusion model and keeps no attention cache")
            } else if sys::llama_model_has_encoder(model) || !sys::llama_model_has_decoder(model) {
                Some("it has an encoder; only decoder-only models keep the cache that gvote works on")
            } else {
                None
            }
        }
    }

    /// Returns true if the model has recurrent layers. Tokens cannot be removed from their state.
    pub(crate) fn is_recurrent(&self) -> bool {
        let model = self.as_ptr();
        // SAFETY: valid model; plain queries.
        unsafe { sys::llama_model_is_recurrent(model) || sys::llama_model_is_hybrid(model) }
    }

    /// Returns the chat template stored in the GGUF.
    pub fn chat_template(&self) -> Option<String> {
        // SAFETY: returns NULL or a string owned by the model.
        unsafe {
            let ptr = sys::llama_model_chat_template(self.as_ptr(), std::ptr::null());
            (!ptr.is_null()).then(|| CStr::from_ptr(ptr).to_string_lossy().into_owned())
        }
    }

    /// Returns true if the vocabulary has a token with this id.
    pub fn has_token(&self, token: Token) -> bool {
        usize::try_from(token).is_ok_and(|token| token < self.n_vocab())
    }

    /// Returns true if a token is markup, such as a chat template's, and not text. False for an id outside the
    /// vocabulary.
    pub fn is_control(&self, token: Token) -> bool {
        // SAFETY: the vocabulary has texts and the token; llama.cpp checks neither.
        self.has_tokenizer() && self.has_token(token) && unsafe { sys::llama_vocab_is_control(self.vocab(), token) }
    }

    /// Returns true if the token ends a generation (end of text, end of turn).
    pub fn is_eog(&self, token: Token) -> bool {
        // SAFETY: valid vocabulary; llama.cpp accepts any token id here.
        unsafe { sys::llama_vocab_is_eog(self.vocab(), token) }
    }

    /// Returns the text of the token that begins a sequence; empty if there is none.
    pub fn bos_text(&self) -> String {
        // SAFETY: valid vocabulary.
        self.special_text(unsafe { sys::llama_vocab_bos(self.vocab()) })
    }

    /// Returns the text of the token that ends a sequence; empty if there is none.
    pub fn eos_text(&self) -> String {
        // SAFETY: valid vocabulary.
        self.special_text(unsafe { sys::llama_vocab_eos(self.vocab()) })
    }

    fn special_text(&self, token: Token) -> String {
        if token < 0 { String::new() } else { String::from_utf8_lossy(&self.piece(token, true)).into_owned() }
    }

    /// Returns true if the tokenizer adds a BOS token by itself.
    pub fn adds_bos(&self) -> bool {
        // SAFETY: valid vocabulary.
        unsafe { sys::llama_vocab_get_add_bos(self.vocab()) }
    }

    /// Returns the bytes of one token; not necessarily complete UTF-8, see [`Pieces`]. Empty for an id outside the
    /// vocabulary, and if the model has no texts.
    pub fn piece(&self, token: Token, special: bool) -> Vec<u8> {
        if !self.has_tokenizer() || !self.has_token(token) {
            return Vec::new();
        }
        // Longer pieces are rare.
        let mut buf = vec![0u8; 32];
        loop {
            let (start, len) = (buf.as_mut_ptr().cast::<c_char>(), i32::try_from(buf.len()).unwrap_or(i32::MAX));
            // SAFETY: a token of the vocabulary; the buffer has at least that size.
            let n = unsafe { sys::gvote_shim_token_to_piece(self.vocab(), token, start, len, special) };
            if n == i32::MIN {
                return Vec::new();
            }
            if n >= 0 {
                buf.truncate(n as usize);
                return buf;
            }
            buf.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// Converts tokens to text.
    pub fn detokenize(&self, tokens: &[Token], special: bool) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&t| self.piece(t, special)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Joins token pieces into text for streaming: a character split over tokens is held back until complete.
#[derive(Default)]
pub struct Pieces(Vec<u8>);

impl Pieces {
    /// Adds a piece and returns the text that is complete so far.
    pub fn push(&mut self, piece: &[u8]) -> String {
        self.0.extend_from_slice(piece);
        let whole = match std::str::from_utf8(&self.0) {
            Ok(_) => self.0.len(),
            // Incomplete characters at the end are held back; invalid bytes in the middle become replacement
            // characters.
            Err(e) if e.error_len().is_none() => e.valid_up_to(),
            Err(_) => self.0.len(),
        };
        let rest = self.0.split_off(whole);
        let text = String::from_utf8_lossy(&self.0).into_owned();
        self.0 = rest;
        text
    }

    /// Returns the remaining text at the end of a stream.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.0)).into_owned()
    }
}

fn string_of(buf: &[u8]) -> String {
    CStr::from_bytes_until_nul(buf)
        .map_or_else(|_| String::from_utf8_lossy(buf).into_owned(), |s| s.to_string_lossy().into_owned())
}
