//! Invariants of the C interface for arbitrary settings and saved states. Used by the tests and by cargo-fuzz.
//!
//! The functions are the library's own, by their C names. The listener for saved states is created once: a tiny random model, a context, a
//! recorded sequence. A program that includes this file has `edit` and `tiny` at its root, and `use gvote::llama` for the latter.

use std::ffi::{CStr, c_char, c_void};
use std::mem::offset_of;
use std::ptr;

use gvote::llama::{Batch, Context, ContextParams, FlashAttention};

use crate::edit::edited;
use crate::tiny;

/// `gvote_params` of `gvote.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Params {
    size: usize,
    policy: u32,
    evict: u32,
    flags: u32,
    target_kl: f32,
    lost_mass: f32,
    ratio: f32,
    max_cells: u32,
    min_cells: u32,
    sinks: u32,
    recent: u32,
    window: u32,
    samples: u32,
    draft: u32,
    span_back: u32,
    span_forward: u32,
    pool: u32,
    head_mix: f32,
    p_nuc: f32,
    seed: u64,
    recall: u32,
    recall_type: u32,
    recall_file: usize,
    when: u32,
    vote_after: u32,
}

#[repr(C)]
struct Handle {
    opaque: [u8; 0],
}

unsafe extern "C" {
    fn gvote_params_init(params: *mut Params) -> u32;
    fn gvote_new(params: *const c_void, status: *mut u32) -> *mut Handle;
    fn gvote_free(g: *mut Handle);
    fn gvote_last_error(g: *const Handle) -> *const c_char;
    fn gvote_set_params(g: *mut Handle, params: *const c_void) -> u32;
    fn gvote_get_params(g: *mut Handle, params: *mut Params) -> u32;
    fn gvote_attach(g: *mut Handle, ctx: *mut c_void) -> u32;
    fn gvote_plan(g: *mut Handle, ctx: *mut c_void, seq: i32, report: *mut c_void) -> u32;
    fn gvote_seq_cells(g: *mut Handle, ctx: *mut c_void, seq: i32, n: *mut u32) -> u32;
    fn gvote_seq_exact_from(g: *mut Handle, ctx: *mut c_void, seq: i32, pos: *mut i32) -> u32;
    fn gvote_seq_positions(
        g: *mut Handle,
        ctx: *mut c_void,
        seq: i32,
        layer: i32,
        head: u32,
        positions: *mut i32,
        n_max: u32,
        n: *mut u32,
    ) -> u32;
    fn gvote_compress(g: *mut Handle, ctx: *mut c_void, seq: i32, report: *mut c_void) -> u32;
    fn gvote_state_size(g: *mut Handle, ctx: *mut c_void, seq: i32, size: *mut usize) -> u32;
    fn gvote_state_get(
        g: *mut Handle,
        ctx: *mut c_void,
        seq: i32,
        data: *mut c_void,
        size: usize,
        written: *mut usize,
    ) -> u32;
    fn gvote_state_set(g: *mut Handle, ctx: *mut c_void, seq: i32, data: *const c_void, size: usize) -> u32;
}

pub const OK: u32 = 0;
pub const ERROR_NULL: u32 = 1;
pub const ERROR_SIZE: u32 = 3;
pub const ERROR_PARAMS: u32 = 4;
pub const ERROR_NOT_SEEN: u32 = 9;
pub const ERROR_STATE: u32 = 17;
const FLAG_PROTECT: u32 = 1 << 2;
const POLICY_FULL: u32 = 2;
const POLICY_GVOTE: u32 = 0;

/// Maximum size of the structs created here; their size field may claim more.
const MAX_STRUCT: usize = 512;

fn error_of(g: *const Handle) -> String {
    // SAFETY: a living handle or NULL; the text is never NULL.
    unsafe { CStr::from_ptr(gvote_last_error(g)) }.to_str().expect("it is text").to_owned()
}

fn defaults() -> Params {
    let mut params = Params { size: size_of::<Params>(), ..Params::default() };
    // SAFETY: a struct of the size that it says.
    assert_eq!(unsafe { gvote_params_init(&raw mut params) }, OK, "the header has another struct");
    params
}

/// Checks one input. Its first byte selects settings or a saved state, given as they are or as changes to valid ones.
pub fn check(data: &[u8]) -> u32 {
    let (kind, data) = data.split_first().unwrap_or((&0, &[]));
    match kind % 4 {
        0 => check_params(data.to_vec()),
        1 => {
            let sound = defaults();
            // SAFETY: numbers without gaps between them.
            let sound = unsafe { std::slice::from_raw_parts((&raw const sound).cast::<u8>(), size_of::<Params>()) };
            check_params(edited(sound.to_vec(), data))
        }
        2 => LISTENER.with(|listener| listener.check(data.to_vec())),
        _ => LISTENER.with(|listener| listener.check(edited(listener.sound.clone(), data))),
    }
}

/// Checks settings of any size and content: refused with a reason, or within the limits that the header names.
fn check_params(mut bytes: Vec<u8>) -> u32 {
    bytes.resize(bytes.len().max(size_of::<usize>()), 0);
    let size = usize::from_le_bytes(bytes[..size_of::<usize>()].try_into().expect("as many bytes"));
    // allocate exactly the claimed size, so that a read beyond it is detected
    bytes.resize(size.clamp(size_of::<usize>(), MAX_STRUCT), 0);
    // a pointer is the caller's responsibility; no file is created here
    if let Some(recall_file) = bytes.get_mut(offset_of!(Params, recall_file)..offset_of!(Params, when)) {
        recall_file.fill(0);
    }
    let given = bytes.into_boxed_slice();
    let mut status = u32::MAX;
    // SAFETY: see above; a size beyond what this library knows is not read.
    let g = unsafe { gvote_new(given.as_ptr().cast(), &raw mut status) };
    if g.is_null() {
        assert!([ERROR_NULL, ERROR_SIZE, ERROR_PARAMS].contains(&status), "{status}");
        let error = error_of(ptr::null());
        assert!(!error.is_empty() && !error.contains("--"), "{error}");
        return status;
    }
    assert_eq!(status, OK);
    let mut params = Params { size: size_of::<Params>(), ..Params::default() };
    // SAFETY: both live; what a handle answers is what it takes.
    unsafe {
        assert_eq!(gvote_get_params(g, &raw mut params), OK);
        assert_eq!(gvote_set_params(g, (&raw const params).cast()), OK, "{}", error_of(g));
        gvote_free(g);
    }
    assert!(params.policy < 8 && params.evict < 2 && params.flags < 8 && params.when < 3, "{params:?}");
    assert!((1..=1024).contains(&params.window), "{params:?}");
    if params.policy != POLICY_FULL {
        assert!((0.0..=10.0).contains(&params.target_kl), "{params:?}");
        assert!(params.lost_mass > 0.0 && params.lost_mass < 1.0, "{params:?}");
        assert!((0.0..=1.0).contains(&params.ratio), "{params:?}");
        assert!(params.p_nuc > 0.0 && params.p_nuc <= 1.0, "{params:?}");
        assert!((0.0..=1000.0).contains(&params.head_mix), "{params:?}");
        assert!((1..=256).contains(&params.samples) && (1..=256).contains(&params.draft), "{params:?}");
        assert!(params.span_back <= 1024 && params.span_forward <= 1024, "{params:?}");
        assert!(params.pool % 2 == 1 && params.pool <= 63 && params.recent > 0, "{params:?}");
    }
    if params.policy == POLICY_GVOTE {
        assert!(params.recent >= params.window, "{params:?}");
    }
    OK
}

/// Tokens before the vote, and after it.
const N: [i32; 2] = [220, 20];
const CELLS: u32 = 120;
/// Tokens of the vocabulary that are not markup: chat markers would prevent the vote.
const N_TEXT: i32 = (tiny::N_VOCAB - tiny::MARKUP.len()) as i32;

/// A handle that has recorded and compressed a sequence.
struct Listener {
    g: *mut Handle,
    ctx: Context,
    /// Saved state of the sequence.
    sound: Vec<u8>,
    n_head_kv: u32,
}

thread_local! {
    static LISTENER: Listener = Listener::new();
}

impl Listener {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("there is room for a model");
        // with a vocabulary, since tokens are looked up
        let spec = tiny::Spec { vocabulary: true, ..tiny::SPECS[0] };
        let model = tiny::Tiny::new(dir.path(), spec).model;
        let shape = ContextParams {
            n_ctx: 512,
            n_batch: 512,
            n_ubatch: 256,
            n_threads: 1,
            n_threads_batch: 1,
            flash_attn: FlashAttention::Off,
            ..ContextParams::default()
        };
        let mut ctx = Context::new(&model, &shape).expect("a context is made");
        // a small state, most of which is the captured observation window
        let params =
            Params { window: 4, target_kl: 0.0, max_cells: CELLS, samples: 2, flags: FLAG_PROTECT, ..defaults() };
        let mut status = u32::MAX;
        // SAFETY: both live.
        let g = unsafe { gvote_new((&raw const params).cast(), &raw mut status) };
        assert_eq!(status, OK);
        // SAFETY: the context outlives the handle.
        unsafe { assert_eq!(gvote_attach(g, ctx.as_ptr().cast()), OK, "{}", error_of(g)) };
        for (first, n) in [(0, N[0]), (N[0], N[1])] {
            let mut batch = Batch::new(n as usize);
            for pos in first..first + n {
                let token = (7 * pos + pos * pos / 5) % N_TEXT;
                batch.add(token, pos, 0, pos + 1 == first + n).expect("it has room");
            }
            ctx.decode(&batch).expect("the model decodes");
            if first == 0 {
                // SAFETY: both live.
                unsafe {
                    assert_eq!(gvote_compress(g, ctx.as_ptr().cast(), 0, ptr::null_mut()), OK, "{}", error_of(g))
                };
            }
        }
        let mut listener = Self { g, ctx, sound: Vec::new(), n_head_kv: spec.n_head_kv as u32 };
        listener.sound = listener.save();
        listener
    }

    fn ctx(&self) -> *mut c_void {
        self.ctx.as_ptr().cast()
    }

    fn save(&self) -> Vec<u8> {
        let (mut size, mut written) = (0, 0);
        // SAFETY: a buffer of the size that is asked for.
        unsafe {
            assert_eq!(gvote_state_size(self.g, self.ctx(), 0, &raw mut size), OK, "{}", error_of(self.g));
            let mut data = vec![0_u8; size];
            let to = data.as_mut_ptr().cast();
            assert_eq!(gvote_state_get(self.g, self.ctx(), 0, to, size, &raw mut written), OK);
            assert_eq!(written, size);
            data
        }
    }

    fn load(&self, data: &[u8]) -> u32 {
        // SAFETY: as many bytes as it says.
        unsafe { gvote_state_set(self.g, self.ctx(), 0, data.as_ptr().cast(), data.len()) }
    }

    /// Checks that bytes are refused with a reason and the state is unchanged, or that the new state makes sense.
    fn check(&self, bytes: Vec<u8>) -> u32 {
        assert_eq!(self.load(&self.sound), OK, "{}", error_of(self.g));
        let status = self.load(&bytes.into_boxed_slice());
        let n_cells = CELLS + N[1] as u32;
        if status != OK {
            assert_eq!(status, ERROR_STATE);
            assert!(!error_of(self.g).is_empty());
            assert!(self.save() == self.sound, "a refused state left something behind");
            return status;
        }
        let (mut n, mut exact_from) = (0, -1);
        // SAFETY: all live.
        unsafe {
            assert_eq!(gvote_seq_cells(self.g, self.ctx(), 0, &raw mut n), OK);
            assert_eq!(gvote_seq_exact_from(self.g, self.ctx(), 0, &raw mut exact_from), OK);
        }
        assert_eq!(n, n_cells);
        assert!((0..=N[0] + N[1]).contains(&exact_from));
        for layer in 0..tiny::N_LAYER as i32 {
            for head in 0..self.n_head_kv {
                let mut positions = vec![-1; n as usize];
                let to = positions.as_mut_ptr();
                // SAFETY: room for as many positions as it says.
                let status =
                    unsafe { gvote_seq_positions(self.g, self.ctx(), 0, layer, head, to, n_cells, ptr::null_mut()) };
                assert_eq!(status, OK);
                assert!(positions.is_sorted_by(|a, b| a < b), "layer {layer}, head {head}: {positions:?}");
                assert!(positions[0] >= 0 && positions[n as usize - 1] < N[0] + N[1], "{positions:?}");
            }
        }
        // the new state can be saved and loaded again
        let again = self.save();
        assert_eq!(self.load(&again), OK, "{}", error_of(self.g));
        assert!(self.save() == again);
        // SAFETY: all live.
        let status = unsafe { gvote_plan(self.g, self.ctx(), 0, ptr::null_mut()) };
        assert!([OK, ERROR_NOT_SEEN].contains(&status), "{status}: {}", error_of(self.g));
        OK
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // SAFETY: freed once, before the context.
        unsafe { gvote_free(self.g) };
    }
}
