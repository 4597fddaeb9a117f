//! libgvote, opened when it is needed, and its handles.

use std::ffi::{c_char, c_void};
use std::mem::ManuallyDrop;
use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::ffi::gvote::*;
use super::ffi::llama::llama_context;
use super::ffi::next;
use super::report;
use super::settings::{Settings, text};

/// The library, and what the environment asks for.
pub struct Loaded {
    pub gvote: ManuallyDrop<Gvote>,
    pub settings: Settings,
}

/// The version whose structures the plugin knows.
const LLAMA: &str = env!("GVOTE_PLUGIN_LLAMA_VERSION");

/// libgvote, by the name that its major version has.
const LIBRARY: &str = concat!("libgvote.so.", env!("CARGO_PKG_VERSION_MAJOR"));

/// The library, opened once. `None` where it cannot be used, or `GVOTE=off`: a line said why.
pub fn loaded() -> Option<&'static Loaded> {
    static LOADED: OnceLock<Option<Loaded>> = OnceLock::new();
    let load = || match load() {
        Ok(loaded) => loaded,
        Err(reason) => {
            report::line(&format!("off: {reason}"));
            None
        }
    };
    LOADED.get_or_init(load).as_ref()
}

fn load() -> Result<Option<Loaded>, String> {
    if std::env::var("GVOTE").is_ok_and(|value| ["off", "0", "false", "disabled"].contains(&value.as_str())) {
        return Ok(None);
    }
    // SAFETY: its initialisers are those of Rust and C++.
    let library = unsafe { Library::open(Some(LIBRARY), RTLD_NOW | RTLD_LOCAL) };
    let library = library.map_err(|error| format!("{LIBRARY} cannot be opened: {error}"))?;
    // SAFETY: the types are those of the header; all that is missing is an error in its field.
    let gvote =
        unsafe { Gvote::from_library(libloading::Library::from(library)) }.map_err(|error| error.to_string())?;
    // never closed: handles live as long as contexts
    let gvote = ManuallyDrop::new(gvote);
    if gvote.gvote_state_set.is_err() || gvote.gvote_vote_if_due.is_err() {
        return Err(format!("{LIBRARY} lacks functions that this plugin calls"));
    }
    // SAFETY: static strings.
    let (found, of_library) = unsafe { (text(next().llama_version()), text(gvote.gvote_llama_version())) };
    // what comes behind the number says how it was built
    let number = found.split(['-', '+']).next().unwrap_or_default();
    if number != LLAMA || of_library != LLAMA {
        return Err(format!(
            "the program has llama.cpp {found}, this plugin was built for {LLAMA} and {LIBRARY} for {of_library}: \
            make plugin LLAMA=DIR builds both for the llama.cpp in DIR"
        ));
    }
    let mut params = gvote_params { size: size_of::<gvote_params>(), ..Default::default() };
    // SAFETY: a struct with its size.
    if unsafe { gvote.gvote_params_init(&raw mut params) } != GVOTE_OK {
        return Err(format!("{LIBRARY} has other settings than this plugin"));
    }
    let settings = Settings::read(params, |name| std::env::var(name).ok())?;
    Ok(Some(Loaded { gvote, settings }))
}

/// A handle that is attached to a context, and freed with it.
pub struct Handle {
    pub lib: &'static Gvote,
    g: NonNull<gvote_t>,
    ctx: *mut llama_context,
}

// SAFETY: whoever has the handle is its only user, as the header asks for.
unsafe impl Send for Handle {}

/// What a call answered: the status, and more words about it.
pub struct Failure {
    pub status: gvote_status,
    pub text: String,
}

impl Handle {
    /// Attaches a new handle.
    ///
    /// # Safety
    /// A living context.
    pub unsafe fn attach(loaded: &'static Loaded, ctx: *mut llama_context) -> Result<Self, Failure> {
        let lib: &'static Gvote = &loaded.gvote;
        let mut status = GVOTE_OK;
        // SAFETY: settings with their size, and room for a status.
        let g = unsafe { lib.gvote_new(&loaded.settings.params, &raw mut status) };
        let Some(g) = NonNull::new(g) else {
            // SAFETY: the reason of this thread's last failure.
            return Err(Failure { status, text: unsafe { text(lib.gvote_last_error(null_mut())) } });
        };
        let handle = Self { lib, g, ctx };
        // SAFETY: a living handle, and a callback that needs no data.
        unsafe { lib.gvote_set_log_callback(g.as_ptr(), Some(on_log), null_mut()) };
        // SAFETY: the caller's context.
        handle.call(|lib, g, ctx| unsafe { lib.gvote_attach(g, ctx) })?;
        Ok(handle)
    }

    /// Calls the library with handle and context.
    pub fn call(
        &self,
        f: impl FnOnce(&Gvote, *mut gvote_t, *mut llama_context) -> gvote_status,
    ) -> Result<(), Failure> {
        let status = f(self.lib, self.g.as_ptr(), self.ctx);
        if status == GVOTE_OK {
            return Ok(());
        }
        // SAFETY: a living handle.
        Err(Failure { status, text: unsafe { text(self.lib.gvote_last_error(self.g.as_ptr())) } })
    }

    /// The context's last position of a sequence.
    pub fn end(&self, seq: i32) -> i32 {
        // SAFETY: a living context, which has a memory, or NULL, which answers -1.
        unsafe { next().llama_memory_seq_pos_max(next().llama_get_memory(self.ctx), seq) + 1 }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: freed once; the context still lives, and lets go of the callback.
        unsafe {
            self.lib.gvote_detach(self.g.as_ptr(), self.ctx);
            self.lib.gvote_free(self.g.as_ptr());
        }
    }
}

/// Warnings alone: votes have a line of their own.
unsafe extern "C-unwind" fn on_log(level: gvote_log_level, line: *const c_char, _data: *mut c_void) {
    if level == GVOTE_LOG_WARN {
        report::line(&text(line));
    }
}
