//! The C interface, `ffi/gvote.h`: a thin layer. Types are those of the header. Every export must have the signature in
//! the header, or compilation fails (see `drift`).
//!
//! Only [`ptr`] turns pointers into references. [`handle::call`] is the boundary of every call: it turns a NULL or a
//! panic into a status. C++ exceptions are caught in the shim.

#[cfg(test)]
mod drift;
pub(crate) mod handle;
mod params;
mod ptr;
mod report;
#[cfg(test)]
pub(crate) mod tests;
mod version;

use std::ffi::{CStr, c_char, c_void};

use self::handle::{Failure, call, guarded, gvote_t};
use self::header::*;
use crate::archive::Recall;
use crate::attach::Attachment;
use crate::sys::{ggml_tensor, llama_context};

/// Bindings that bindgen generates from `ffi/gvote.h`.
#[allow(
    dead_code,
    improper_ctypes,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub(crate) mod header {
    include!(concat!(env!("OUT_DIR"), "/gvote_h.rs"));
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_llama_version() -> *const c_char {
    concat!(env!("GVOTE_LLAMA_VERSION"), "\0").as_ptr().cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_status_string(status: gvote_status) -> *const c_char {
    let text: &CStr = match status {
        GVOTE_OK => c"success",
        GVOTE_ERROR_NULL => c"an argument is NULL",
        GVOTE_ERROR_HANDLE => c"not a living handle",
        GVOTE_ERROR_SIZE => c"unknown struct size, or buffer too small",
        GVOTE_ERROR_PARAMS => c"a setting is out of bounds",
        GVOTE_ERROR_VERSION => c"another llama.cpp than gvote was built for",
        GVOTE_ERROR_UNSUPPORTED => c"model or context cannot be compressed",
        GVOTE_ERROR_NOT_ATTACHED => c"not attached to this context",
        GVOTE_ERROR_NO_SEQUENCE => c"no such sequence, layer or head",
        GVOTE_ERROR_NOT_SEEN => c"nothing is known of the sequence",
        GVOTE_ERROR_CHANGED => c"the sequence was changed without gvote",
        GVOTE_ERROR_SHARED => c"cells are shared with another sequence",
        GVOTE_ERROR_COMPRESSED => c"the position lies inside the compressed part",
        GVOTE_ERROR_NO_CELLS => c"too few free cells",
        GVOTE_ERROR_MEMORY => c"out of memory",
        GVOTE_ERROR_CANCELLED => c"cancelled",
        GVOTE_ERROR_DECODE => c"llama.cpp could not compute",
        GVOTE_ERROR_STATE => c"the saved bytes do not fit",
        GVOTE_ERROR_BUSY => c"another call with this handle is running",
        GVOTE_ERROR_INTERNAL => c"internal error",
        GVOTE_ERROR_FILE => c"the file to set rows aside in cannot be made, or is full",
        _ => c"unknown status",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_params_init(params: *mut gvote_params) -> gvote_status {
    guarded(|| params::write(params, &params::defaults()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_new(params: *const gvote_params, status: *mut gvote_status) -> *mut gvote_t {
    let mut made = std::ptr::null_mut();
    let outcome = guarded(|| {
        version::check_libraries()?;
        let settings = params::read(params, &Recall::Off)?;
        made = gvote_t::leak(Attachment::new(settings).map_err(Failure::from)?);
        Ok(())
    });
    ptr::put(status, outcome);
    made
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_free(g: *mut gvote_t) {
    guarded(|| if g.is_null() { Ok(()) } else { gvote_t::free(g) });
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_last_error(g: *const gvote_t) -> *const c_char {
    handle::last_error(g)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_set_params(g: *mut gvote_t, params: *const gvote_params) -> gvote_status {
    call(g, |core| {
        let settings = params::read(params, &core.attachment.settings().recall)?;
        Ok(core.attachment.set(settings)?)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_get_params(g: *mut gvote_t, params: *mut gvote_params) -> gvote_status {
    call(g, |core| params::write(params, &params::of(core.attachment.settings())))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_set_log_callback(
    g: *mut gvote_t,
    callback: gvote_log_callback,
    user_data: *mut c_void,
) -> gvote_status {
    call(g, |core| {
        core.log = callback.map(|callback| (callback, user_data));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_set_progress_callback(
    g: *mut gvote_t,
    callback: gvote_progress_callback,
    user_data: *mut c_void,
) -> gvote_status {
    call(g, |core| {
        core.progress = callback.map(|callback| (callback, user_data));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_cancel(g: *mut gvote_t) -> gvote_status {
    guarded(|| handle::set_cancelled(g, true))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_cancel_clear(g: *mut gvote_t) -> gvote_status {
    guarded(|| handle::set_cancelled(g, false))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_attach(g: *mut gvote_t, ctx: *mut llama_context) -> gvote_status {
    call(g, |core| {
        let ctx = ptr::context(ctx)?;
        version::check_context(ctx)?;
        // SAFETY: the app guarantees a living context that nothing else uses during this call.
        Ok(unsafe { core.attachment.attach(ctx, (gvote_cb_eval, g.cast())) }?)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_detach(g: *mut gvote_t, ctx: *mut llama_context) -> gvote_status {
    call(g, |core| Ok(core.attachment.detach(ptr::context(ctx)?, (gvote_cb_eval, g.cast()))?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_cb_eval(t: *mut ggml_tensor, ask: bool, user_data: *mut c_void) -> bool {
    handle::on_node(user_data.cast(), t, ask)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_set_next_callback(
    g: *mut gvote_t,
    callback: gvote_eval_callback,
    user_data: *mut c_void,
) -> gvote_status {
    call(g, |core| {
        core.attachment.set_next_callback(callback.map(|callback| (callback, user_data)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_compress(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    report: *mut gvote_report,
) -> gvote_status {
    call(g, |core| report::vote(core, ctx, seq, false, report))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_plan(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    report: *mut gvote_report,
) -> gvote_status {
    call(g, |core| report::vote(core, ctx, seq, true, report))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_vote_if_due(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    start: i32,
    has_voted: *mut bool,
    report: *mut gvote_report,
) -> gvote_status {
    call(g, |core| {
        let is_due = report::vote_if_due(core, ctx, seq, start, report)?;
        ptr::put(has_voted, is_due);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_make_room(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    needed: u32,
    ahead: *const i32,
    n_ahead: usize,
    report: *mut gvote_report,
) -> gvote_status {
    call(g, |core| {
        let ahead = ptr::last_tokens(ahead, n_ahead, core.attachment.settings().policy.window)?;
        report::make_room(core, ctx, seq, needed, &ahead, report)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_expand(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    needed: u32,
    n_cells: *mut u32,
) -> gvote_status {
    call(g, |core| {
        let n = core.attachment.expand(ptr::context(ctx)?, seq, needed as usize)?;
        ptr::put(n_cells, n as u32);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_seq_cells(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    n_cells: *mut u32,
) -> gvote_status {
    call(g, |core| {
        let n = core.attachment.sequence(ptr::context(ctx)?, seq)?.0.len();
        ptr::write(n_cells, n as u32)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_seq_exact_from(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    pos: *mut i32,
) -> gvote_status {
    call(g, |core| {
        let exact_from = core.attachment.exact_from(ptr::context(ctx)?, seq)?;
        ptr::write(pos, exact_from)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_seq_positions(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    layer: i32,
    head: u32,
    positions: *mut i32,
    n_max: u32,
    n: *mut u32,
) -> gvote_status {
    call(g, |core| {
        let found = core.attachment.positions(ptr::context(ctx)?, seq, layer, head)?;
        let wanted = found.len().min(n_max as usize);
        ptr::copy_to(&found[..wanted], positions)?;
        ptr::put(n, found.len() as u32);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_seq_protect(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    p0: i32,
    p1: i32,
    stays: bool,
) -> gvote_status {
    call(g, |core| Ok(core.attachment.protect(ptr::context(ctx)?, seq, p0..p1, stays)?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_seq_truncate(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    pos: i32,
) -> gvote_status {
    call(g, |core| Ok(core.attachment.truncate(ptr::context(ctx)?, seq, pos)?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_state_size(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    size: *mut usize,
) -> gvote_status {
    call(g, |core| {
        let bytes = core.attachment.saved_bytes(ptr::context(ctx)?, seq)?;
        ptr::write(size, bytes)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_state_get(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    data: *mut c_void,
    size: usize,
    written: *mut usize,
) -> gvote_status {
    call(g, |core| {
        let state = core.attachment.save(ptr::context(ctx)?, seq)?;
        if state.len() > size {
            let text = format!("the state has {} bytes, the buffer {size}", state.len());
            return Err(Failure::new(GVOTE_ERROR_SIZE, text));
        }
        ptr::copy_to(&state, data.cast())?;
        ptr::put(written, state.len());
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gvote_state_set(
    g: *mut gvote_t,
    ctx: *mut llama_context,
    seq: i32,
    data: *const c_void,
    size: usize,
) -> gvote_status {
    call(g, |core| Ok(core.attachment.load(ptr::context(ctx)?, seq, ptr::bytes(data, size)?)?))
}
