//! The handle, and the boundary between C and Rust.

use std::cell::{RefCell, UnsafeCell};
use std::ffi::{CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::header::*;
use super::ptr;
use crate::attach::{AttachError, Attachment};
use crate::backend::ComputeError;
use crate::capture::CaptureError;
use crate::compact::CompactError;
use crate::llama::LlamaError;
use crate::sys::ggml_tensor;
use crate::vote::VoteError;

/// First field of a living handle: a value unlikely to occur elsewhere.
const ALIVE: u64 = 0x6776_6f74_6520_6865;

/// The type behind `gvote_t *`.
#[allow(non_camel_case_types)]
#[repr(C)]
pub struct gvote_t {
    alive: AtomicU64,
    busy: AtomicBool,
    cancel: Arc<AtomicBool>,
    /// Accessed only by the call that has set `busy`.
    core: UnsafeCell<Core>,
    last_error: UnsafeCell<CString>,
}

/// The part of a handle that a call works on.
pub(super) struct Core {
    pub attachment: Attachment,
    pub log: Option<(unsafe extern "C" fn(gvote_log_level, *const c_char, *mut c_void), *mut c_void)>,
    pub progress: Option<(unsafe extern "C" fn(gvote_stage, *mut c_void) -> bool, *mut c_void)>,
    /// Whether the app was warned that the forward pass cannot be read any more.
    pub has_warned: bool,
}

impl Core {
    pub fn tell(&self, level: gvote_log_level, text: &str) {
        if let Some((log, data)) = self.log {
            let text = c_text(text);
            // SAFETY: the app's own callback and data.
            unsafe { log(level, text.as_ptr(), data) };
        }
    }
}

/// Status of a failed call, with a message.
#[derive(Debug)]
pub(super) struct Failure {
    pub status: gvote_status,
    text: String,
}

impl Failure {
    pub fn new(status: gvote_status, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }
}

impl<E: Into<AttachError>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        Self { status: status_of(&error), text: error.to_string() }
    }
}

fn status_of(error: &AttachError) -> gvote_status {
    match error {
        AttachError::Unsupported(_) | AttachError::Unread(_) => GVOTE_ERROR_UNSUPPORTED,
        AttachError::NotAttached => GVOTE_ERROR_NOT_ATTACHED,
        AttachError::NotSeen { .. } | AttachError::NotThere { .. } => GVOTE_ERROR_NOT_SEEN,
        AttachError::Changed { .. } => GVOTE_ERROR_CHANGED,
        AttachError::Compressed { .. } => GVOTE_ERROR_COMPRESSED,
        AttachError::Fixed(_) => GVOTE_ERROR_PARAMS,
        AttachError::NoToken { .. } => GVOTE_ERROR_DECODE,
        AttachError::TooFew { .. } | AttachError::Full => GVOTE_ERROR_NO_CELLS,
        AttachError::NoSequence { .. } | AttachError::NoLayer(_) | AttachError::NoHead { .. } => {
            GVOTE_ERROR_NO_SEQUENCE
        }
        AttachError::Vote(error) => match error {
            VoteError::Cache(error) | VoteError::Compact(CompactError::Cache(error)) if error.is_memory() => {
                GVOTE_ERROR_MEMORY
            }
            VoteError::Capture(CaptureError::Cache(error)) if error.is_memory() => GVOTE_ERROR_MEMORY,
            VoteError::Llama(LlamaError::Cancelled) => GVOTE_ERROR_CANCELLED,
            VoteError::Llama(LlamaError::NoCells { .. }) | VoteError::Capture(CaptureError::NoCells { .. }) => {
                GVOTE_ERROR_NO_CELLS
            }
            VoteError::Llama(LlamaError::Memory)
            | VoteError::Compute(ComputeError::Memory(_))
            | VoteError::Compact(CompactError::Compute(ComputeError::Memory(_))) => GVOTE_ERROR_MEMORY,
            VoteError::Capture(CaptureError::Empty) => GVOTE_ERROR_NOT_SEEN,
            VoteError::Capture(CaptureError::Panic(_)) => GVOTE_ERROR_INTERNAL,
            VoteError::Cache(_) | VoteError::UnevenHeads | VoteError::Capture(_) => GVOTE_ERROR_UNSUPPORTED,
            VoteError::Policy(_) | VoteError::RecallType { .. } => GVOTE_ERROR_PARAMS,
            VoteError::Compact(CompactError::Archive { .. }) => GVOTE_ERROR_MEMORY,
            VoteError::Compact(CompactError::ArchiveFile { .. }) => GVOTE_ERROR_FILE,
            VoteError::Compact(CompactError::NoCells { .. }) => GVOTE_ERROR_NO_CELLS,
            VoteError::Compact(CompactError::Shared) => GVOTE_ERROR_SHARED,
            VoteError::ReplayCompressed => GVOTE_ERROR_COMPRESSED,
            VoteError::Saved(_) => GVOTE_ERROR_STATE,
            VoteError::Llama(_) | VoteError::Compute(_) => GVOTE_ERROR_DECODE,
            VoteError::Compact(_) => GVOTE_ERROR_INTERNAL,
        },
    }
}

fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).unwrap_or_default()
}

thread_local! {
    /// Message of the last failure on this thread that has no handle to store it in.
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

impl gvote_t {
    pub(super) fn leak(attachment: Attachment) -> *mut Self {
        let cancel = attachment.cancel_flag();
        let core = Core { attachment, log: None, progress: None, has_warned: false };
        Box::into_raw(Box::new(Self {
            alive: AtomicU64::new(ALIVE),
            busy: AtomicBool::new(false),
            cancel,
            core: UnsafeCell::new(core),
            last_error: UnsafeCell::default(),
        }))
    }

    pub(super) fn free(g: *mut Self) -> Result<(), Failure> {
        let handle = living(g)?;
        if handle.busy.swap(true, Ordering::Acquire) {
            return Err(busy());
        }
        handle.alive.store(0, Ordering::Relaxed);
        // SAFETY: made by `leak`, and exclusively ours: any other call finds the handle dead or busy.
        drop(unsafe { Box::from_raw(g) });
        Ok(())
    }
}

fn busy() -> Failure {
    Failure::new(GVOTE_ERROR_BUSY, "another call with this handle is running")
}

fn living<'a>(g: *const gvote_t) -> Result<&'a gvote_t, Failure> {
    if g.is_null() {
        return Err(ptr::null("the handle"));
    }
    let wrong = || Failure::new(GVOTE_ERROR_HANDLE, "this is no handle of gvote, or it was freed");
    if !g.is_aligned() {
        return Err(wrong());
    }
    // SAFETY: the caller guarantees a handle; of anything else only this number is read.
    unsafe {
        if (*g).alive.load(Ordering::Relaxed) != ALIVE {
            return Err(wrong());
        }
        Ok(&*g)
    }
}

/// Runs a function that may fail or panic, and stores the message of a failure for the thread.
pub(super) fn guarded(f: impl FnOnce() -> Result<(), Failure>) -> gvote_status {
    match caught(f) {
        Ok(()) => GVOTE_OK,
        Err(failure) => {
            LAST_ERROR.with_borrow_mut(|last| *last = c_text(&failure.text));
            failure.status
        }
    }
}

fn caught<T>(f: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into());
        Err(Failure::new(GVOTE_ERROR_INTERNAL, format!("internal error: {text}")))
    })
}

/// Releases a handle at the end of a call.
struct Held<'a>(&'a AtomicBool);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Runs a call on a handle, and stores the message of a failure in the handle.
pub(super) fn call(g: *mut gvote_t, f: impl FnOnce(&mut Core) -> Result<(), Failure>) -> gvote_status {
    let mut status = GVOTE_OK;
    let outcome = guarded(|| {
        let handle = living(g)?;
        if handle.busy.swap(true, Ordering::Acquire) {
            return Err(busy());
        }
        let _held = Held(&handle.busy);
        // SAFETY: `busy` was free and is ours until the end of this closure.
        let (core, last_error) = unsafe { (&mut *handle.core.get(), &mut *handle.last_error.get()) };
        let outcome = caught(|| f(core));
        *last_error = CString::default();
        if let Err(failure) = outcome {
            *last_error = c_text(&failure.text);
            status = failure.status;
        }
        Ok(())
    });
    if outcome == GVOTE_OK { status } else { outcome }
}

pub(super) fn last_error(g: *const gvote_t) -> *const c_char {
    match living(g) {
        // SAFETY: the header requires this to be called between two calls, not during one.
        Ok(handle) => unsafe { (*handle.last_error.get()).as_ptr() },
        Err(_) => LAST_ERROR.with_borrow(|last| last.as_ptr()),
    }
}

pub(super) fn set_cancelled(g: *const gvote_t, cancelled: bool) -> Result<(), Failure> {
    living(g)?.cancel.store(cancelled, Ordering::Relaxed);
    Ok(())
}

/// Handles a node of a graph that a context decodes; see [`Attachment::on_node`].
pub(super) fn on_node(g: *const gvote_t, t: *mut ggml_tensor, ask: bool) -> bool {
    // this answer asks for no node and never ends a graph
    let nobody = !ask;
    let Ok(handle) = living(g) else { return nobody };
    if t.is_null() || handle.busy.swap(true, Ordering::Acquire) {
        return nobody;
    }
    let _held = Held(&handle.busy);
    // SAFETY: `busy` was free and is ours until the end of this function.
    let core = unsafe { &mut *handle.core.get() };
    catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: a node that ggml passes to the eval callback.
        let answer = unsafe { core.attachment.on_node(t, ask) };
        if let Some(reason) = core.attachment.unread_reason().filter(|_| !core.has_warned) {
            core.has_warned = true;
            core.tell(GVOTE_LOG_WARN, &format!("the forward pass cannot be read any more: {reason}"));
        }
        answer
    }))
    .unwrap_or(nobody)
}
