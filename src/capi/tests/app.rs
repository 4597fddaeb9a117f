//! An app for the tests: raw llama.cpp, and a handle.

use std::ffi::CStr;
use std::ptr;

use crate::capi::handle::gvote_t;
use crate::capi::*;
use crate::llama::{Batch, Model, Pos, SeqId, Token};
use crate::sys;
use crate::tests::tiny::N_VOCAB;
pub use crate::tests::tiny::model as tiny;

/// Returns tokens of a tiny model that differ for each `kind`.
pub fn words(n: usize, kind: i32) -> Vec<Token> {
    (0..n as i32).map(|i| (7 * i + (3 + kind) * i * i / 5 + kind).rem_euclid(N_VOCAB as i32)).collect()
}

/// A context, created as an app does.
pub struct App {
    pub ctx: *mut sys::llama_context,
    pub model: Model,
}

// SAFETY: used by one thread at a time.
unsafe impl Send for App {}

pub struct Shape {
    pub n_ctx: u32,
    pub n_seq_max: u32,
    pub unified: bool,
    pub flash: bool,
}

pub const ONE: Shape = Shape { n_ctx: 768, n_seq_max: 1, unified: true, flash: false };

impl App {
    pub fn new(model: &Model, shape: &Shape) -> Self {
        Self::with(model, shape, |_| {})
    }

    pub fn with(model: &Model, shape: &Shape, change: impl FnOnce(&mut sys::llama_context_params)) -> Self {
        // SAFETY: the model outlives the context.
        unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = shape.n_ctx;
            params.n_batch = shape.n_ctx;
            params.n_ubatch = 128;
            params.n_seq_max = shape.n_seq_max;
            params.kv_unified = shape.unified;
            params.n_threads = 2;
            params.n_threads_batch = 2;
            params.flash_attn_type =
                if shape.flash { sys::LLAMA_FLASH_ATTN_TYPE_ENABLED } else { sys::LLAMA_FLASH_ATTN_TYPE_DISABLED };
            change(&mut params);
            let ctx = sys::llama_init_from_model(model.as_ptr(), params);
            assert!(!ctx.is_null());
            Self { ctx, model: model.clone() }
        }
    }

    pub fn memory(&self) -> sys::llama_memory_t {
        // SAFETY: valid context.
        unsafe { sys::llama_get_memory(self.ctx) }
    }

    /// Decodes one batch; the last token of each part outputs logits.
    pub fn decode(&self, parts: &[(SeqId, Pos, &[Token])]) {
        let mut batch = Batch::new(parts.iter().map(|part| part.2.len()).sum());
        for (seq, first, tokens) in parts {
            for (i, &token) in tokens.iter().enumerate() {
                batch.add(token, first + i as Pos, *seq, i + 1 == tokens.len()).unwrap();
            }
        }
        // SAFETY: valid context and batch.
        assert_eq!(unsafe { sys::llama_decode(self.ctx, batch.raw()) }, 0);
    }

    /// Address and values of the logits after the i-th token of the last batch.
    pub fn logits(&self, i: i32) -> (*const f32, Vec<f32>) {
        // SAFETY: valid context; as many values as the vocabulary has.
        unsafe {
            let logits = sys::llama_get_logits_ith(self.ctx, i);
            assert!(!logits.is_null());
            (logits, std::slice::from_raw_parts(logits, self.model.n_vocab()).to_vec())
        }
    }

    pub fn state(&self, seq: SeqId) -> Vec<u8> {
        // SAFETY: the buffer has the size that llama.cpp asks for.
        unsafe {
            let mut data = vec![0; sys::llama_state_seq_get_size(self.ctx, seq)];
            let n = sys::llama_state_seq_get_data(self.ctx, data.as_mut_ptr(), data.len(), seq);
            data.truncate(n);
            data
        }
    }

    pub fn load(&self, seq: SeqId, state: &[u8]) {
        // SAFETY: valid context; llama.cpp checks the bytes.
        assert!(unsafe { sys::llama_state_seq_set_data(self.ctx, state.as_ptr(), state.len(), seq) } > 0);
    }

    pub fn remove(&self, seq: SeqId, p0: Pos, p1: Pos) {
        // SAFETY: valid memory.
        assert!(unsafe { sys::llama_memory_seq_rm(self.memory(), seq, p0, p1) });
    }
}

impl Drop for App {
    fn drop(&mut self) {
        // SAFETY: freed once.
        unsafe { sys::llama_free(self.ctx) };
    }
}

/// A handle, freed on drop.
pub struct Handle(pub *mut gvote_t);

// SAFETY: used by one thread at a time, cancellation aside.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

pub fn defaults() -> gvote_params {
    let mut params = gvote_params { size: size_of::<gvote_params>(), ..Default::default() };
    // SAFETY: a struct of the size that it states.
    assert_eq!(unsafe { gvote_params_init(&raw mut params) }, GVOTE_OK);
    params
}

pub fn report() -> gvote_report {
    gvote_report { size: size_of::<gvote_report>(), ..Default::default() }
}

impl Handle {
    pub fn new(params: &gvote_params) -> Self {
        let mut status = 99;
        // SAFETY: both are alive during the call.
        let g = unsafe { gvote_new(params, &raw mut status) };
        assert_eq!(status, GVOTE_OK, "{}", error_of(ptr::null()));
        Self(g)
    }

    /// Creates a handle with the default settings and attaches it to an app.
    pub fn at(app: &App) -> Self {
        Self::with(app, &defaults())
    }

    pub fn with(app: &App, params: &gvote_params) -> Self {
        let handle = Self::new(params);
        // SAFETY: both objects are alive.
        assert_eq!(unsafe { gvote_attach(handle.0, app.ctx) }, GVOTE_OK, "{}", handle.error());
        handle
    }

    /// The raw handle, for another thread.
    pub fn raw(&self) -> *mut gvote_t {
        self.0
    }

    pub fn compress(&self, app: &App, seq: SeqId) -> (gvote_status, gvote_report) {
        let mut out = report();
        // SAFETY: both objects are alive.
        (unsafe { gvote_compress(self.0, app.ctx, seq, &raw mut out) }, out)
    }

    /// Returns the report of the vote, if there was one.
    pub fn vote_if_due(&self, app: &App, seq: SeqId, start: Pos) -> (gvote_status, Option<gvote_report>) {
        let (mut out, mut has_voted) = (report(), false);
        // SAFETY: all objects are alive.
        let status = unsafe { gvote_vote_if_due(self.0, app.ctx, seq, start, &raw mut has_voted, &raw mut out) };
        (status, has_voted.then_some(out))
    }

    pub fn make_room(&self, app: &App, seq: SeqId, needed: usize, ahead: &[Token]) -> (gvote_status, gvote_report) {
        let mut out = report();
        // SAFETY: all objects are alive, and `ahead` has `ahead.len()` tokens.
        let status =
            unsafe { gvote_make_room(self.0, app.ctx, seq, needed as u32, ahead.as_ptr(), ahead.len(), &raw mut out) };
        (status, out)
    }

    /// Returns the number of cells afterwards.
    pub fn expand(&self, app: &App, seq: SeqId, needed: usize) -> (gvote_status, u32) {
        let mut n = 0;
        // SAFETY: both objects are alive.
        (unsafe { gvote_expand(self.0, app.ctx, seq, needed as u32, &raw mut n) }, n)
    }

    pub fn exact_from(&self, app: &App, seq: SeqId) -> Pos {
        let mut pos = -1;
        // SAFETY: both objects are alive.
        assert_eq!(unsafe { gvote_seq_exact_from(self.0, app.ctx, seq, &raw mut pos) }, GVOTE_OK, "{}", self.error());
        pos
    }

    pub fn truncate(&self, app: &App, seq: SeqId, pos: Pos) -> gvote_status {
        // SAFETY: both objects are alive.
        unsafe { gvote_seq_truncate(self.0, app.ctx, seq, pos) }
    }

    pub fn plan(&self, app: &App, seq: SeqId) -> (gvote_status, gvote_report) {
        let mut out = report();
        // SAFETY: both objects are alive.
        (unsafe { gvote_plan(self.0, app.ctx, seq, &raw mut out) }, out)
    }

    #[track_caller]
    pub fn compressed(&self, app: &App, seq: SeqId) -> gvote_report {
        let (status, report) = self.compress(app, seq);
        assert_eq!(status, GVOTE_OK, "{}", self.error());
        assert!(report.cells_after < report.cells_before, "{report:?}");
        report
    }

    pub fn cells(&self, app: &App, seq: SeqId) -> (gvote_status, u32) {
        let mut n = 0;
        // SAFETY: both objects are alive.
        (unsafe { gvote_seq_cells(self.0, app.ctx, seq, &raw mut n) }, n)
    }

    pub fn positions(&self, app: &App, seq: SeqId, layer: i32, head: u32) -> Vec<Pos> {
        let (mut out, mut n) = (vec![-1; 4096], 0);
        // SAFETY: the buffer has 4096 places.
        let status =
            unsafe { gvote_seq_positions(self.0, app.ctx, seq, layer, head, out.as_mut_ptr(), 4096, &raw mut n) };
        assert_eq!(status, GVOTE_OK, "{}", self.error());
        out.truncate(n as usize);
        out
    }

    pub fn protect(&self, app: &App, seq: SeqId, p0: Pos, p1: Pos, stays: bool) -> gvote_status {
        // SAFETY: both objects are alive.
        unsafe { gvote_seq_protect(self.0, app.ctx, seq, p0, p1, stays) }
    }

    pub fn save(&self, app: &App, seq: SeqId) -> Vec<u8> {
        let (mut size, mut written) = (0, 0);
        // SAFETY: the buffer has the size that is asked for.
        unsafe {
            assert_eq!(gvote_state_size(self.0, app.ctx, seq, &raw mut size), GVOTE_OK, "{}", self.error());
            let mut data = vec![0u8; size];
            let status = gvote_state_get(self.0, app.ctx, seq, data.as_mut_ptr().cast(), size, &raw mut written);
            assert_eq!(status, GVOTE_OK, "{}", self.error());
            assert_eq!(size, written);
            data
        }
    }

    pub fn load(&self, app: &App, seq: SeqId, data: &[u8]) -> gvote_status {
        // SAFETY: `data` has `data.len()` bytes.
        unsafe { gvote_state_set(self.0, app.ctx, seq, data.as_ptr().cast(), data.len()) }
    }

    pub fn error(&self) -> String {
        error_of(self.0)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: freed once.
        unsafe { gvote_free(self.0) };
    }
}

pub fn error_of(g: *const gvote_t) -> String {
    // SAFETY: a living handle or NULL; the text is never NULL.
    unsafe { CStr::from_ptr(gvote_last_error(g)) }.to_string_lossy().into_owned()
}
