//! The functions of llama.h that the plugin stands in front of.

use std::ffi::{CStr, c_char};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::batch::Parts;
use super::context::{self, Home, lock};
use super::ffi::llama::*;
use super::ffi::{Inside, next};
use super::handle::loaded;
use super::report;
use super::state::{Knowledge, split, to_bytes};

/// What is ours to do, and never the program's to suffer from.
fn guarded<T>(f: impl FnOnce() -> T) -> Option<T> {
    let _inside = Inside::enter();
    let done = catch_unwind(AssertUnwindSafe(f));
    if done.is_err() {
        report::line("a fault of gvote: please report it; the request goes on");
    }
    done.ok()
}

/// A context that is looked after, for a call that the program itself makes.
fn of_context(ctx: *const llama_context) -> Option<Arc<Mutex<Home>>> {
    if Inside::is() { None } else { context::of_context(ctx) }
}

fn of_memory(memory: llama_memory_t) -> Option<Arc<Mutex<Home>>> {
    if Inside::is() { None } else { context::of_memory(memory) }
}

/// Calls llama.cpp's own function, whose calls of others are not the program's.
macro_rules! own {
    ($name:ident($($arg:expr),*)) => {{
        let _inside = Inside::enter();
        // SAFETY: the program's own arguments, or such as it could pass.
        unsafe { next().$name($($arg),*) }
    }};
}

/// Settings of a context, and what a later llama.cpp may have behind them: enough is passed on to one that is not looked after.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ContextParams {
    known: llama_context_params,
    beyond: [usize; 32],
}

type InitFromModel = unsafe extern "C-unwind" fn(*mut llama_model, ContextParams) -> *mut llama_context;

/// # Safety
/// That of llama.h, as for all functions here.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_init_from_model(
    model: *mut llama_model,
    params: ContextParams,
) -> *mut llama_context {
    let is_inside = Inside::is();
    let ctx = {
        let _inside = Inside::enter();
        let own = *next().llama_init_from_model.as_ref().expect("the program has llama.cpp");
        // SAFETY: the same function; of its structs by value it reads as much as it knows.
        let own: InitFromModel = unsafe { std::mem::transmute(own as *const ()) };
        // SAFETY: the program's own arguments.
        unsafe { own(model, params) }
    };
    if !ctx.is_null() && !is_inside {
        // SAFETY: a context that was made just now.
        guarded(|| unsafe { look_after(ctx, &params.known) });
    }
    ctx
}

/// # Safety
/// A context that nobody else uses yet.
unsafe fn look_after(ctx: *mut llama_context, params: &llama_context_params) {
    let Some(loaded) = loaded() else { return };
    let other = if params.embeddings
        || ![LLAMA_POOLING_TYPE_UNSPECIFIED, LLAMA_POOLING_TYPE_NONE].contains(&params.pooling_type)
    {
        Some("it makes embeddings")
    } else if params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT {
        Some("it drafts for another one")
    } else if !params.ctx_other.is_null() {
        Some("it belongs to another one")
    } else {
        None
    };
    let text = match other {
        Some(reason) => format!("a context stays as it is: {reason}"),
        // SAFETY: passed on.
        None => match unsafe { context::add(loaded, ctx) } {
            Ok(()) => format!("looks after a context of {} cells; GVOTE=off switches that off", params.n_ctx),
            Err(failure) => format!("a context stays as it is: {}", failure.text),
        },
    };
    report::line(&text);
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_free(ctx: *mut llama_context) {
    if !Inside::is() {
        guarded(|| context::remove(ctx));
    }
    own!(llama_free(ctx));
}

/// Decodes a batch, with what its sequences need before.
fn decode(home: &Mutex<Home>, parts: impl FnOnce(&Home) -> Parts, own: impl FnOnce() -> i32) -> i32 {
    let parts = guarded(|| {
        let mut home = lock(home);
        let parts = parts(&home);
        home.before_decode(&parts);
        parts
    });
    let status = own();
    if let (Some(parts), 0) = (parts, status) {
        guarded(|| lock(home).after_decode(&parts));
    }
    status
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_decode(ctx: *mut llama_context, batch: llama_batch) -> i32 {
    let own = || own!(llama_decode(ctx, batch));
    match of_context(ctx) {
        // SAFETY: the program's batch.
        Some(home) => decode(&home, |home| unsafe { Parts::of(&batch, |seq| home.handle.end(seq)) }, own),
        None => own(),
    }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_process(
    ctx: *mut llama_context,
    kind: llama_process_type,
    batch: *mut llama_batch_ext,
) -> i32 {
    let own = || own!(llama_process(ctx, kind, batch));
    match of_context(ctx) {
        // SAFETY: the program's batch; that this is the version whose structures are known was checked.
        Some(home) if kind == LLAMA_PROCESS_TYPE_DECODE => decode(&home, |_| unsafe { Parts::of_ext(batch) }, own),
        _ => own(),
    }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_memory_clear(memory: llama_memory_t, data: bool) {
    if let Some(home) = of_memory(memory) {
        guarded(|| lock(&home).sequences.clear());
    }
    own!(llama_memory_clear(memory, data));
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_memory_seq_rm(
    memory: llama_memory_t,
    seq: llama_seq_id,
    p0: llama_pos,
    p1: llama_pos,
) -> bool {
    let done = of_memory(memory).and_then(|home| guarded(|| lock(&home).before_remove(seq, p0, p1)).flatten());
    done.unwrap_or_else(|| own!(llama_memory_seq_rm(memory, seq, p0, p1)))
}

impl Home {
    /// Before positions are removed. The answer, where nothing is left to do.
    fn before_remove(&mut self, seq: i32, p0: i32, p1: i32) -> Option<bool> {
        if p0 <= 0 && p1 < 0 {
            self.sequences.retain(|&id, _| seq >= 0 && id != seq);
            return None;
        }
        if seq < 0 {
            self.make_whole(seq, "llama_memory_seq_rm");
            self.sequences.values_mut().for_each(|sequence| sequence.was_changed());
            return None;
        }
        let end = self.handle.end(seq);
        if p0 >= end {
            return None;
        }
        if p1 >= 0 && p1 < end {
            self.make_whole(seq, "llama_memory_seq_rm");
            self.sequence(seq).was_changed();
            return None;
        }
        let done = self.cut(seq, p0.max(0));
        if done != Some(false) {
            self.sequence(seq).was_cut(p0);
        }
        done
    }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_memory_seq_cp(
    memory: llama_memory_t,
    from: llama_seq_id,
    to: llama_seq_id,
    p0: llama_pos,
    p1: llama_pos,
) {
    if let Some(home) = of_memory(memory).filter(|_| from != to) {
        guarded(|| {
            let mut home = lock(&home);
            let end = home.handle.end(from);
            if p0 > 0 || (p1 >= 0 && p1 < end) {
                home.make_whole(from, "llama_memory_seq_cp");
            }
            let is_voted = home.sequence(from).is_voted;
            let copy = home.sequence(to);
            copy.was_changed();
            copy.is_voted = is_voted;
        });
    }
    own!(llama_memory_seq_cp(memory, from, to, p0, p1));
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_memory_seq_keep(memory: llama_memory_t, seq: llama_seq_id) {
    if let Some(home) = of_memory(memory) {
        guarded(|| lock(&home).sequences.retain(|&id, _| id == seq));
    }
    own!(llama_memory_seq_keep(memory, seq));
}

/// Before the positions of a sequence change.
fn before_move(memory: llama_memory_t, seq: llama_seq_id, what: &str) {
    if let Some(home) = of_memory(memory) {
        guarded(|| {
            let mut home = lock(&home);
            home.make_whole(seq, what);
            let moved = home.sequences.iter_mut().filter(|(id, _)| seq < 0 || **id == seq);
            moved.for_each(|(_, sequence)| sequence.was_changed());
        });
    }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_memory_seq_add(
    memory: llama_memory_t,
    seq: llama_seq_id,
    p0: llama_pos,
    p1: llama_pos,
    delta: llama_pos,
) {
    before_move(memory, seq, "llama_memory_seq_add");
    own!(llama_memory_seq_add(memory, seq, p0, p1, delta));
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_memory_seq_div(
    memory: llama_memory_t,
    seq: llama_seq_id,
    p0: llama_pos,
    p1: llama_pos,
    d: i32,
) {
    before_move(memory, seq, "llama_memory_seq_div");
    own!(llama_memory_seq_div(memory, seq, p0, p1, d));
}

/// The first position from which on the sequence can be cut: a program that asks for less reads its text again.
///
/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_memory_seq_pos_min(memory: llama_memory_t, seq: llama_seq_id) -> llama_pos {
    let pos = own!(llama_memory_seq_pos_min(memory, seq));
    let Some(home) = of_memory(memory).filter(|_| pos >= 0) else { return pos };
    let exact_from = guarded(|| {
        let home = lock(&home);
        if home.voted(seq).is_empty() { 0 } else { home.exact_from(seq) }
    });
    pos.max(exact_from.unwrap_or(0))
}

/// How many bytes a state takes: llama.cpp's own, and what is known of sequences that still lack something.
fn state_size(home: &Mutex<Home>, seq: i32, own: impl FnOnce() -> usize) -> usize {
    let added = guarded(|| {
        let mut home = lock(home);
        let lacking = home.before_save(seq);
        to_bytes(&home.knowledge(lacking)).len()
    });
    match own() {
        0 => 0,
        size => size + added.unwrap_or(0),
    }
}

/// Writes a state: llama.cpp's own bytes, and others behind them where something is lacking. `seqs`: which are saved.
///
/// # Safety
/// A buffer of `size` bytes.
unsafe fn save(home: &Mutex<Home>, seq: i32, dst: *mut u8, size: usize, own: impl FnOnce(usize) -> usize) -> usize {
    let added = guarded(|| {
        let mut home = lock(home);
        let lacking = home.before_save(seq);
        to_bytes(&home.knowledge(lacking))
    });
    let added = added.unwrap_or_default();
    let Some(room) = size.checked_sub(added.len()) else { return 0 };
    let n = own(room);
    if n == 0 || dst.is_null() {
        return n;
    }
    // SAFETY: llama.cpp has written so many bytes, and behind them there is room for ours.
    let (state, end) =
        unsafe { (std::slice::from_raw_parts(dst, n), std::slice::from_raw_parts_mut(dst.add(n), added.len())) };
    end.copy_from_slice(&added);
    guarded(|| {
        let mut home = lock(home);
        let whole = home.sequences.iter().filter(|(id, sequence)| (seq < 0 || **id == seq) && !sequence.is_voted);
        let whole: Vec<i32> = whole.map(|(&id, _)| id).collect();
        let knowledge = home.knowledge(whole);
        if !knowledge.is_empty() {
            home.remembered.insert(state, knowledge);
        }
    });
    n + added.len()
}

/// Reads a state, and takes over what is known of the sequences in it. `to`: where a single one goes.
///
/// # Safety
/// A buffer of `size` bytes.
unsafe fn load(
    home: &Mutex<Home>,
    to: Option<i32>,
    src: *const u8,
    size: usize,
    own: impl FnOnce(usize) -> usize,
) -> usize {
    // SAFETY: the program's buffer.
    let bytes = if src.is_null() { &[][..] } else { unsafe { std::slice::from_raw_parts(src, size) } };
    let (n_own, mut knowledge) = guarded(|| split(bytes)).unwrap_or((size, Knowledge::new()));
    let read = own(n_own);
    guarded(|| {
        let mut home = lock(home);
        match to {
            Some(seq) => home.was_loaded(seq, None),
            None => home.sequences.clear(),
        }
        if read == 0 {
            return;
        }
        knowledge.extend(home.remembered.get(&bytes[..read.min(n_own)]));
        for (seq, known) in &knowledge {
            home.was_loaded(to.unwrap_or(*seq), Some(known));
        }
    });
    if read == n_own { size } else { read }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_get_size(ctx: *mut llama_context) -> usize {
    let own = || own!(llama_state_get_size(ctx));
    of_context(ctx).map_or_else(own, |home| state_size(&home, -1, own))
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_get_data(ctx: *mut llama_context, dst: *mut u8, size: usize) -> usize {
    let own = |size| own!(llama_state_get_data(ctx, dst, size));
    match of_context(ctx) {
        // SAFETY: the program's buffer.
        Some(home) => unsafe { save(&home, -1, dst, size, own) },
        None => own(size),
    }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_set_data(ctx: *mut llama_context, src: *const u8, size: usize) -> usize {
    let own = |size| own!(llama_state_set_data(ctx, src, size));
    match of_context(ctx) {
        // SAFETY: the program's buffer.
        Some(home) => unsafe { load(&home, None, src, size, own) },
        None => own(size),
    }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_save_file(
    ctx: *mut llama_context,
    path: *const c_char,
    tokens: *const llama_token,
    n_tokens: usize,
) -> bool {
    if let Some(home) = of_context(ctx) {
        let lacking = guarded(|| lock(&home).before_save(-1)).unwrap_or_default();
        if !lacking.is_empty() {
            // llama.cpp takes no file that has more in it
            report::line("the state is not saved: the cache has no room for what votes set aside");
            return false;
        }
    }
    own!(llama_state_save_file(ctx, path, tokens, n_tokens))
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_load_file(
    ctx: *mut llama_context,
    path: *const c_char,
    tokens: *mut llama_token,
    n_max: usize,
    n_tokens: *mut usize,
) -> bool {
    let is_loaded = own!(llama_state_load_file(ctx, path, tokens, n_max, n_tokens));
    if let Some(home) = of_context(ctx) {
        guarded(|| lock(&home).sequences.clear());
    }
    is_loaded
}

/// Only what a sliding window or a recurrent state has: no vote touches that.
fn is_partial(flags: llama_state_seq_flags) -> bool {
    flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY != 0
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_seq_get_size_ext(
    ctx: *mut llama_context,
    seq: llama_seq_id,
    flags: llama_state_seq_flags,
) -> usize {
    let own = || own!(llama_state_seq_get_size_ext(ctx, seq, flags));
    of_context(ctx).filter(|_| !is_partial(flags)).map_or_else(own, |home| state_size(&home, seq, own))
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_seq_get_data_ext(
    ctx: *mut llama_context,
    dst: *mut u8,
    size: usize,
    seq: llama_seq_id,
    flags: llama_state_seq_flags,
) -> usize {
    let own = |size| own!(llama_state_seq_get_data_ext(ctx, dst, size, seq, flags));
    match of_context(ctx).filter(|_| !is_partial(flags)) {
        // SAFETY: the program's buffer.
        Some(home) => unsafe { save(&home, seq, dst, size, own) },
        None => own(size),
    }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_seq_set_data_ext(
    ctx: *mut llama_context,
    src: *const u8,
    size: usize,
    to: llama_seq_id,
    flags: llama_state_seq_flags,
) -> usize {
    let own = |size| own!(llama_state_seq_set_data_ext(ctx, src, size, to, flags));
    match of_context(ctx).filter(|_| !is_partial(flags)) {
        // SAFETY: the program's buffer.
        Some(home) => unsafe { load(&home, Some(to), src, size, own) },
        None => own(size),
    }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_seq_get_size(ctx: *mut llama_context, seq: llama_seq_id) -> usize {
    // SAFETY: passed on.
    unsafe { llama_state_seq_get_size_ext(ctx, seq, LLAMA_STATE_SEQ_FLAGS_NONE) }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_seq_get_data(
    ctx: *mut llama_context,
    dst: *mut u8,
    size: usize,
    seq: llama_seq_id,
) -> usize {
    // SAFETY: passed on.
    unsafe { llama_state_seq_get_data_ext(ctx, dst, size, seq, LLAMA_STATE_SEQ_FLAGS_NONE) }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_seq_set_data(
    ctx: *mut llama_context,
    src: *const u8,
    size: usize,
    to: llama_seq_id,
) -> usize {
    // SAFETY: passed on.
    unsafe { llama_state_seq_set_data_ext(ctx, src, size, to, LLAMA_STATE_SEQ_FLAGS_NONE) }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_seq_save_file(
    ctx: *mut llama_context,
    path: *const c_char,
    seq: llama_seq_id,
    tokens: *const llama_token,
    n_tokens: usize,
) -> usize {
    let home = of_context(ctx);
    if let Some(home) = &home {
        guarded(|| lock(home).before_save(seq));
    }
    let n = own!(llama_state_seq_save_file(ctx, path, seq, tokens, n_tokens));
    let Some(home) = home.filter(|_| n > 0) else { return n };
    let added = guarded(|| {
        let home = lock(&home);
        let added = to_bytes(&home.knowledge([seq]));
        let written = OpenOptions::new().append(true).open(file(path)).and_then(|mut file| file.write_all(&added));
        let is_lacking = !home.voted(seq).is_empty();
        written.map_err(|error| (error, is_lacking))
    });
    match added {
        Some(Err((error, is_lacking))) => {
            report::line(&format!("{}: {error}", file(path).display()));
            if is_lacking { 0 } else { n }
        }
        _ => n,
    }
}

/// # Safety
/// That of llama.h.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn llama_state_seq_load_file(
    ctx: *mut llama_context,
    path: *const c_char,
    to: llama_seq_id,
    tokens: *mut llama_token,
    n_max: usize,
    n_tokens: *mut usize,
) -> usize {
    let n = own!(llama_state_seq_load_file(ctx, path, to, tokens, n_max, n_tokens));
    if let Some(home) = of_context(ctx).filter(|_| !tokens.is_null()) {
        guarded(|| {
            let known = if n > 0 { rest_of(path, n) } else { Vec::new() };
            let (_, knowledge) = split(&known);
            lock(&home).was_loaded(to, knowledge.first().map(|(_, known)| known.as_slice()));
        });
    }
    n
}

/// A path of the program's.
fn file<'a>(path: *const c_char) -> &'a Path {
    // SAFETY: llama.cpp has opened it already.
    Path::new(std::ffi::OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes()))
}

/// What a file has behind the first `n` bytes. One that cannot be read has nothing.
fn rest_of(path: *const c_char, n: usize) -> Vec<u8> {
    let mut rest = Vec::new();
    let read = File::open(file(path)).and_then(|mut file| {
        file.seek(SeekFrom::Start(n as u64))?;
        file.read_to_end(&mut rest)
    });
    if read.is_err() {
        rest.clear();
    }
    rest
}

/// That each function has the signature of the header: or else this does not compile.
#[allow(dead_code)]
fn signatures(llama: &mut Llama) {
    llama.llama_free = Ok(llama_free);
    llama.llama_decode = Ok(llama_decode);
    llama.llama_process = Ok(llama_process);
    llama.llama_memory_clear = Ok(llama_memory_clear);
    llama.llama_memory_seq_rm = Ok(llama_memory_seq_rm);
    llama.llama_memory_seq_cp = Ok(llama_memory_seq_cp);
    llama.llama_memory_seq_keep = Ok(llama_memory_seq_keep);
    llama.llama_memory_seq_add = Ok(llama_memory_seq_add);
    llama.llama_memory_seq_div = Ok(llama_memory_seq_div);
    llama.llama_memory_seq_pos_min = Ok(llama_memory_seq_pos_min);
    llama.llama_state_get_size = Ok(llama_state_get_size);
    llama.llama_state_get_data = Ok(llama_state_get_data);
    llama.llama_state_set_data = Ok(llama_state_set_data);
    llama.llama_state_save_file = Ok(llama_state_save_file);
    llama.llama_state_load_file = Ok(llama_state_load_file);
    llama.llama_state_seq_get_size = Ok(llama_state_seq_get_size);
    llama.llama_state_seq_get_data = Ok(llama_state_seq_get_data);
    llama.llama_state_seq_set_data = Ok(llama_state_seq_set_data);
    llama.llama_state_seq_get_size_ext = Ok(llama_state_seq_get_size_ext);
    llama.llama_state_seq_get_data_ext = Ok(llama_state_seq_get_data_ext);
    llama.llama_state_seq_set_data_ext = Ok(llama_state_seq_set_data_ext);
    llama.llama_state_seq_save_file = Ok(llama_state_seq_save_file);
    llama.llama_state_seq_load_file = Ok(llama_state_seq_load_file);
}
