use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::busy::Busy;
use super::rope::RopeParams;
use super::threads::{Pool, ThreadParams};
use super::{Batch, LlamaError, Model, Pos, SeqId, TensorType, log};
use crate::sys;

/// Whether attention runs as one fused kernel (`-fa`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlashAttention {
    /// llama.cpp decides by the abilities of the back end.
    #[default]
    Auto,
    On,
    Off,
}

/// Storage type of the K or V cache (`-ctk`, `-ctv`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    F32,
    #[default]
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Iq4Nl,
    Q5_0,
    Q5_1,
}

impl CacheType {
    const NAMES: [(&'static str, Self, sys::ggml_type); 9] = [
        ("f32", Self::F32, sys::GGML_TYPE_F32),
        ("f16", Self::F16, sys::GGML_TYPE_F16),
        ("bf16", Self::Bf16, sys::GGML_TYPE_BF16),
        ("q8_0", Self::Q8_0, sys::GGML_TYPE_Q8_0),
        ("q4_0", Self::Q4_0, sys::GGML_TYPE_Q4_0),
        ("q4_1", Self::Q4_1, sys::GGML_TYPE_Q4_1),
        ("iq4_nl", Self::Iq4Nl, sys::GGML_TYPE_IQ4_NL),
        ("q5_0", Self::Q5_0, sys::GGML_TYPE_Q5_0),
        ("q5_1", Self::Q5_1, sys::GGML_TYPE_Q5_1),
    ];

    fn entry(self) -> &'static (&'static str, Self, sys::ggml_type) {
        Self::NAMES.iter().find(|e| e.1 == self).expect("every variant has a row")
    }

    /// Returns ggml's name of the type.
    pub fn name(self) -> &'static str {
        self.entry().0
    }

    pub(crate) fn raw(self) -> sys::ggml_type {
        self.entry().2
    }

    /// Returns the storage type in ggml.
    pub fn stored(self) -> TensorType {
        TensorType::of(self.raw()).expect("a cache type is a tensor type")
    }

    /// All types, from the most to the least exact.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q5_1, Self::Q5_0, Self::Q4_1, Self::Iq4Nl, Self::Q4_0]
            .into_iter()
    }

    /// Returns true if the type stores blocks with a scale.
    pub fn is_quantized(self) -> bool {
        // SAFETY: plain query.
        unsafe { sys::ggml_is_quantized(self.raw()) }
    }
}

impl FromStr for CacheType {
    type Err = LlamaError;

    fn from_str(name: &str) -> Result<Self, LlamaError> {
        Self::NAMES.iter().find(|e| e.0 == name).map(|e| e.1).ok_or_else(|| LlamaError::CacheType(name.into()))
    }
}

/// How to create a context; names as in llama.cpp.
#[derive(Clone, Debug)]
pub struct ContextParams {
    /// Cells of the KV cache (`-c`); 0 = the model's training length.
    pub n_ctx: u32,
    /// Maximum number of tokens in a decode call (`-b`).
    pub n_batch: u32,
    /// Maximum number of tokens computed at once (`-ub`).
    pub n_ubatch: u32,
    /// Maximum number of sequences in the cache.
    pub n_seq_max: u32,
    /// Whether all sequences share all cells (`-kvu`), as votes require. Otherwise each sequence has its own part of
    /// the cells, which is faster to read.
    pub kv_unified: bool,
    /// Threads for decoding single tokens (`-t`), at most [`Self::THREADS_MAX`].
    pub n_threads: i32,
    /// Threads for prompts (`-tb`), at most [`Self::THREADS_MAX`].
    pub n_threads_batch: i32,
    pub threads: ThreadParams,
    /// Whether every single token is decoded with fewer threads while other processes occupy cores. If false, the
    /// number of threads does not change where it affects the last bits of an answer: with flash attention, an f16 or
    /// f32 cache, and more than 240 cells.
    pub yields_threads: bool,
    pub flash_attn: FlashAttention,
    pub type_k: CacheType,
    pub type_v: CacheType,
    /// Whether layers with a sliding window keep all cells, not only those of the window (`--swa-full`). Such a cache
    /// can be cut anywhere.
    pub swa_full: bool,
    /// Whether the cache is stored with its layers, including on GPUs; otherwise in host memory (`-nkvo`).
    pub offload_kqv: bool,
    pub rope: RopeParams,
}

impl ContextParams {
    /// Maximum number of threads in ggml.
    pub const THREADS_MAX: i32 = sys::GGML_MAX_N_THREADS as i32;
}

impl Default for ContextParams {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(4, |n| n.get() as i32).min(Self::THREADS_MAX);
        Self {
            n_ctx: 0,
            n_batch: 2048,
            n_ubatch: 512,
            n_seq_max: 1,
            kv_unified: true,
            n_threads: threads,
            n_threads_batch: threads,
            threads: ThreadParams::default(),
            yields_threads: false,
            flash_attn: FlashAttention::Auto,
            type_k: CacheType::F16,
            type_v: CacheType::F16,
            swa_full: false,
            offload_kqv: true,
            rope: RopeParams::default(),
        }
    }
}

/// A context: a model, a KV cache, and the logits of the last decoded batch. Owned, or attached from an app.
pub struct Context {
    ptr: NonNull<sys::llama_context>,
    model: Model,
    /// See [`Model::n_positions`].
    n_positions: Option<usize>,
    abort: Box<Abort>,
    is_guest: bool,
    /// Declared last, so that it is dropped after the context.
    _pool: Option<Pool>,
}

/// State read by llama.cpp's abort callback, which keeps a raw pointer to it.
struct Abort {
    /// Set by the caller to cancel.
    cancel: Arc<AtomicBool>,
    /// Adapts the number of threads on a busy machine.
    busy: Busy,
    /// The current graph must run to its end, because a recurrent state cannot be rolled back.
    to_the_end: AtomicBool,
    /// Lets tests count the checks and set the flag at one of them.
    #[cfg(test)]
    asked: Asked,
    /// Abort callback of the app that owns the context, with its user data.
    of_app: Option<(unsafe extern "C" fn(*mut c_void) -> bool, *mut c_void)>,
}

#[cfg(test)]
#[derive(Default)]
struct Asked {
    times: std::sync::atomic::AtomicUsize,
    /// Number of checks after which the flag is set; 0: never.
    cancel_at: std::sync::atomic::AtomicUsize,
}

impl Abort {
    fn new(cancel: Arc<AtomicBool>, yields_threads: bool) -> Self {
        Self {
            cancel,
            busy: Busy::new(yields_threads),
            to_the_end: AtomicBool::new(false),
            #[cfg(test)]
            asked: Asked::default(),
            of_app: None,
        }
    }

    fn is_cancelled(&self) -> bool {
        #[cfg(test)]
        {
            let times = self.asked.times.fetch_add(1, Ordering::Relaxed) + 1;
            if times == self.asked.cancel_at.load(Ordering::Relaxed) {
                self.cancel.store(true, Ordering::Relaxed);
            }
        }
        self.cancel.load(Ordering::Relaxed)
    }
}

// SAFETY: a context may move between threads; one thread uses it at a time (&mut).
unsafe impl Send for Context {}

impl Context {
    /// Creates a context.
    ///
    /// # Errors
    /// [`LlamaError::QuantizedV`], [`LlamaError::Rope`], [`LlamaError::Threads`], or [`LlamaError::Context`] with
    /// llama.cpp's reason.
    pub fn new(model: &Model, params: &ContextParams) -> Result<Self, LlamaError> {
        params.rope.check(model)?;
        if params.type_v.is_quantized() && params.flash_attn == FlashAttention::Off {
            return Err(LlamaError::QuantizedV(params.type_v.name()));
        }
        log::clear_reason();
        // SAFETY: returns a plain struct.
        let mut raw = unsafe { sys::llama_context_default_params() };
        raw.n_ctx = params.n_ctx;
        raw.n_batch = params.n_batch;
        raw.n_ubatch = params.n_ubatch;
        raw.n_seq_max = params.n_seq_max;
        raw.n_threads = params.n_threads;
        raw.n_threads_batch = params.n_threads_batch;
        raw.flash_attn_type = match params.flash_attn {
            FlashAttention::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
            FlashAttention::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
            FlashAttention::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
        };
        raw.type_k = params.type_k.raw();
        raw.type_v = params.type_v.raw();
        raw.kv_unified = params.kv_unified;
        raw.swa_full = params.swa_full;
        raw.offload_kqv = params.offload_kqv;
        params.rope.apply(&mut raw);
        raw.no_perf = true;
        let pool = Pool::new(params.threads, params.n_threads.max(params.n_threads_batch))?;
        // SAFETY: the model is valid and kept alive by the clone below.
        let ptr = unsafe { sys::gvote_shim_context_new(model.as_ptr(), raw) };
        let ptr = NonNull::new(ptr).ok_or_else(|| LlamaError::Context { reason: log::take_reason() })?;
        let abort = Box::new(Abort::new(Arc::default(), params.yields_threads));
        let context =
            Self { ptr, model: model.clone(), n_positions: model.n_positions(), abort, is_guest: false, _pool: pool };
        if let Some(pool) = &context._pool {
            // SAFETY: valid context, which is freed first.
            unsafe { pool.serve(context.as_ptr()) };
        }
        context.listen();
        context.apply_adapters();
        Ok(context)
    }

    /// Applies the model's adapters to the context.
    fn apply_adapters(&self) {
        let (mut adapters, mut scales): (Vec<_>, Vec<_>) =
            self.model.adapters().iter().map(|(adapter, scale)| (adapter.as_ptr(), *scale)).unzip();
        // SAFETY: valid adapters of the context's model, as many as there are scales.
        unsafe {
            sys::llama_set_adapters_lora(self.as_ptr(), adapters.as_mut_ptr(), adapters.len(), scales.as_mut_ptr())
        };
    }

    /// Wraps an attached context, which the app owns. Use it only during a [`Visit`].
    ///
    /// # Safety
    /// `ptr` is a valid context and stays valid until the last use of the returned value. Nothing else uses it
    /// meanwhile.
    pub(crate) unsafe fn lent(ptr: NonNull<sys::llama_context>, cancel: Arc<AtomicBool>) -> Self {
        // SAFETY: the model of a valid context is valid, and its owner keeps it as long.
        let model = unsafe { Model::lent(NonNull::new_unchecked(sys::llama_get_model(ptr.as_ptr()).cast_mut())) };
        let n_positions = model.n_positions();
        Self { ptr, model, n_positions, abort: Box::new(Abort::new(cancel, false)), is_guest: true, _pool: None }
    }

    /// Makes the other context's cancel flag cancel this context, too.
    pub(crate) fn is_cancelled_with(&mut self, other: &Self) {
        self.abort.cancel = other.abort.cancel.clone();
    }

    /// Returns an error if `n` tokens from position `first` on exceed the model's positions.
    ///
    /// # Errors
    /// [`LlamaError::NoPositions`].
    pub(crate) fn check_positions(&self, first: Pos, n: usize) -> Result<(), LlamaError> {
        let last = (first as usize + n).saturating_sub(1);
        match self.n_positions {
            Some(most) if last >= most => Err(LlamaError::NoPositions { pos: last as Pos, n: most }),
            _ => Ok(()),
        }
    }

    /// Installs the abort callback.
    fn listen(&self) {
        let flags = std::ptr::from_ref(&*self.abort).cast_mut().cast();
        // SAFETY: the flags are boxed and live as long as the context; the end of a visit removes the callback.
        unsafe { sys::llama_set_abort_callback(self.as_ptr(), Some(should_abort), flags) };
    }

    /// Returns true if the caller has cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.abort.is_cancelled()
    }

    /// Makes the `n`-th check of the cancel flag set it; 0: never. Returns the number of checks since the last call.
    #[cfg(test)]
    pub(crate) fn cancel_at(&self, n: usize) -> usize {
        self.abort.cancel.store(false, Ordering::Relaxed);
        self.abort.asked.cancel_at.store(n, Ordering::Relaxed);
        self.abort.asked.times.swap(0, Ordering::Relaxed)
    }

    /// Returns the raw context for `llama.h` and `gvote.h`. `self` keeps ownership.
    pub fn as_ptr(&self) -> *mut sys::llama_context {
        self.ptr.as_ptr()
    }

    fn memory(&self) -> sys::llama_memory_t {
        // SAFETY: valid context.
        unsafe { sys::llama_get_memory(self.as_ptr()) }
    }

    /// The model this context runs.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Returns a flag. While it is true, running and later decode calls return [`LlamaError::Cancelled`].
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.abort.cancel.clone()
    }

    /// Number of cells of the KV cache, as allocated (llama.cpp rounds up).
    pub fn n_ctx(&self) -> usize {
        // SAFETY: valid context.
        unsafe { sys::llama_n_ctx(self.as_ptr()) as usize }
    }

    /// Maximum number of tokens in a decode call.
    pub fn n_batch(&self) -> usize {
        // SAFETY: valid context.
        unsafe { sys::llama_n_batch(self.as_ptr()) as usize }
    }

    /// Maximum number of tokens computed at once.
    pub fn n_ubatch(&self) -> usize {
        // SAFETY: valid context.
        unsafe { sys::llama_n_ubatch(self.as_ptr()) as usize }
    }

    /// Maximum number of sequences.
    pub fn n_seq_max(&self) -> usize {
        // SAFETY: valid context.
        unsafe { sys::llama_n_seq_max(self.as_ptr()) as usize }
    }

    /// Maximum number of tokens of a batch with logits.
    pub(crate) fn n_outputs_max(&self) -> usize {
        // SAFETY: valid context.
        unsafe { sys::gvote_shim_outputs_max(self.as_ptr()).max(1) as usize }
    }

    pub(crate) fn n_threads_batch(&self) -> usize {
        // SAFETY: valid context.
        unsafe { sys::llama_n_threads_batch(self.as_ptr()).max(1) as usize }
    }

    /// Decodes a batch. Afterwards the cache holds its tokens or, on an error, none of them. With recurrent layers, the
    /// cache may hold some of them after an error, and a single token is decoded to its end despite cancellation.
    ///
    /// # Errors
    /// [`LlamaError::NoCells`], [`LlamaError::NoPositions`], [`LlamaError::Cancelled`], [`LlamaError::Memory`] or [`LlamaError::Decode`].
    pub fn decode(&mut self, batch: &Batch) -> Result<(), LlamaError> {
        if self.is_cancelled() {
            return Err(LlamaError::Cancelled);
        }
        // llama.cpp would end the process.
        if let Some(n) = self.n_positions
            && let Some((pos, _)) = batch.places().find(|&(pos, _)| pos as usize >= n)
        {
            return Err(LlamaError::NoPositions { pos, n });
        }
        self.abort.to_the_end.store(batch.len() == 1 && self.model.is_recurrent(), Ordering::Relaxed);
        // SAFETY: the batch's arrays hold n_tokens entries, and the context is valid.
        let status = unsafe {
            let _entered = self.abort.busy.enter(self.as_ptr(), batch.len());
            sys::gvote_shim_decode(self.as_ptr(), batch.raw())
        };
        match status {
            0 => Ok(()),
            1 => Err(LlamaError::NoCells {
                needed: batch.len(),
                free: crate::cache::cells_free(self, 0),
                size: self.n_ctx(),
            }),
            status => {
                // Completed ubatches stay in the cache: remove them.
                for (pos, seq) in batch.places() {
                    self.remove(seq, pos, pos.saturating_add(1));
                }
                Err(match status {
                    2 => LlamaError::Cancelled,
                    sys::GVOTE_SHIM_NO_MEMORY => LlamaError::Memory,
                    status => LlamaError::Decode(status),
                })
            }
        }
    }

    /// Returns the next-token logits of the last decoded token with logits: `[n_vocab]`.
    ///
    /// # Errors
    /// [`LlamaError::NoLogits`].
    pub fn logits(&mut self) -> Result<&[f32], LlamaError> {
        self.logits_at(-1)
    }

    /// Returns the next-token logits of token `i` of the last decoded batch; negative counts from the end of the tokens
    /// with logits.
    ///
    /// # Errors
    /// [`LlamaError::NoLogits`].
    pub fn logits_at(&mut self, i: i32) -> Result<&[f32], LlamaError> {
        // SAFETY: returns NULL or n_vocab floats that live until the next decode, which needs &mut self.
        unsafe {
            let ptr = sys::llama_get_logits_ith(self.as_ptr(), i);
            if ptr.is_null() {
                return Err(LlamaError::NoLogits);
            }
            Ok(std::slice::from_raw_parts(ptr, self.model.n_vocab()))
        }
    }

    /// Returns the next-token logits after each of the `n` tokens of the last batch, all of which requested logits:
    /// `[n][n_vocab]`.
    ///
    /// # Errors
    /// [`LlamaError::NoLogits`].
    pub fn logits_of(&mut self, n: usize) -> Result<Vec<&[f32]>, LlamaError> {
        let n_vocab = self.model.n_vocab();
        // SAFETY: as in `logits_at`.
        let row = |i| unsafe {
            let row = sys::llama_get_logits_ith(self.as_ptr(), i);
            (!row.is_null()).then(|| std::slice::from_raw_parts(row, n_vocab)).ok_or(LlamaError::NoLogits)
        };
        (0..n as i32).map(row).collect()
    }

    /// Removes the cells of `seq` whose position (for a composite cell: its label) lies in `p0..p1`; -1 = open end.
    /// Returns false if that is impossible: recurrent layers cannot be cut, or the sequence does not exist.
    pub fn remove(&mut self, seq: SeqId, p0: Pos, p1: Pos) -> bool {
        // SAFETY: valid context and sequence.
        self.has_sequence(seq) && unsafe { sys::gvote_shim_seq_rm(self.as_ptr(), seq, p0, p1) }
    }

    /// Adds the cells of sequence `from` to sequence `to`.
    ///
    /// # Errors
    /// [`LlamaError::NoSequence`], [`LlamaError::Memory`].
    pub fn copy(&mut self, from: SeqId, to: SeqId) -> Result<(), LlamaError> {
        self.check_sequence(from)?;
        self.check_sequence(to)?;
        // SAFETY: valid context and sequences; -1 is an open end.
        if unsafe { sys::gvote_shim_seq_cp(self.as_ptr(), from, to, -1, -1) } {
            Ok(())
        } else {
            Err(LlamaError::Memory)
        }
    }

    fn has_sequence(&self, seq: SeqId) -> bool {
        usize::try_from(seq).is_ok_and(|seq| seq < self.n_seq_max())
    }

    /// Checks that the context has a sequence: llama.cpp ends the process otherwise.
    pub(super) fn check_sequence(&self, seq: SeqId) -> Result<(), LlamaError> {
        let n_seq_max = self.n_seq_max();
        if self.has_sequence(seq) { Ok(()) } else { Err(LlamaError::NoSequence { seq, n_seq_max }) }
    }

    /// Empties the cache.
    pub fn clear(&mut self) {
        // SAFETY: valid memory. The data may stay: unused cells are masked.
        unsafe { sys::llama_memory_clear(self.memory(), false) };
    }

    /// Returns the largest position of a sequence; None if the sequence is empty.
    pub fn pos_max(&self, seq: SeqId) -> Option<Pos> {
        if !self.has_sequence(seq) {
            return None;
        }
        // SAFETY: valid memory and sequence.
        let pos = unsafe { sys::llama_memory_seq_pos_max(self.memory(), seq) };
        (pos >= 0).then_some(pos)
    }

    /// Total time of all graphs so far, as measured by llama.cpp. Does not advance if the app has disabled measuring
    /// (`no_perf`).
    pub(crate) fn decode_time(&self) -> Duration {
        // SAFETY: valid context.
        let perf = unsafe { sys::llama_perf_context(self.as_ptr()) };
        Duration::try_from_secs_f64((perf.t_p_eval_ms + perf.t_eval_ms) / 1000.0).unwrap_or_default()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if !self.is_guest {
            // SAFETY: freed once; the model is dropped later.
            unsafe { sys::llama_free(self.ptr.as_ptr()) };
        }
    }
}

/// A period of work in an attached context. Saves the app's callbacks, outputs and counters, and restores them on drop.
pub(crate) struct Visit<'a> {
    ctx: &'a mut Context,
    raw: NonNull<sys::gvote_shim_visit>,
}

impl<'a> Visit<'a> {
    /// Begins the work.
    ///
    /// # Errors
    /// [`LlamaError::Memory`]; the context is then unchanged.
    pub fn new(ctx: &'a mut Context) -> Result<Self, LlamaError> {
        let (mut raw, mut callback, mut data) = (std::ptr::null_mut(), None, std::ptr::null_mut());
        // SAFETY: valid context; the shim sets `raw` when it returns NULL, and `raw` is freed in drop.
        let raw = unsafe {
            let failed = !sys::gvote_shim_visit_begin(ctx.as_ptr(), &raw mut raw).is_null();
            let raw = NonNull::new(raw).filter(|_| !failed).ok_or(LlamaError::Memory)?;
            sys::gvote_shim_visit_abort(raw.as_ptr(), &raw mut callback, &raw mut data);
            raw
        };
        ctx.abort.of_app = callback.map(|callback| (callback, data));
        ctx.listen();
        Ok(Self { ctx, raw })
    }
}

impl Deref for Visit<'_> {
    type Target = Context;

    fn deref(&self) -> &Context {
        self.ctx
    }
}

impl DerefMut for Visit<'_> {
    fn deref_mut(&mut self) -> &mut Context {
        self.ctx
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        // SAFETY: begun in `new`, ended once.
        unsafe { sys::gvote_shim_visit_end(self.raw.as_ptr()) };
        self.ctx.abort.of_app = None;
        self.ctx.abort.busy.rest();
    }
}

unsafe extern "C" fn should_abort(flags: *mut c_void) -> bool {
    // SAFETY: points to the context's boxed flags.
    let flags = unsafe { &*flags.cast::<Abort>() };
    flags.busy.tick();
    let app_wants_out = || {
        // SAFETY: the app's own callback with the app's own data, as llama.cpp would call it without gvote.
        flags.of_app.is_some_and(|(callback, data)| unsafe { callback(data) })
    };
    !flags.to_the_end.load(Ordering::Relaxed) && (flags.is_cancelled() || app_wants_out())
}
