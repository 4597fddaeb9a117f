//! The generated bindings, and llama.cpp's own functions behind those that the plugin exports.

/// llama.h.
#[allow(
    dead_code,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub mod llama {
    include!(concat!(env!("OUT_DIR"), "/llama.rs"));
}

/// gvote.h.
#[allow(
    dead_code,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub mod gvote {
    include!(concat!(env!("OUT_DIR"), "/gvote.rs"));
}

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::sync::LazyLock;

use libloading::os::unix::{Library, RTLD_NOW};

use self::llama::Llama;

static NEXT: LazyLock<ManuallyDrop<Llama>> = LazyLock::new(|| {
    // SAFETY: the types are those of the header; what a library lacks is an error in its field.
    let llama = unsafe { Llama::from_library(libloading::Library::from(library())) };
    ManuallyDrop::new(llama.expect("no function is required"))
});

/// The library behind the plugin: the next one in the order of symbols, or one that the program has opened for itself alone.
fn library() -> Library {
    // SAFETY: a pseudo-handle and a string.
    if unsafe { libc::dlsym(libc::RTLD_NEXT, c"llama_init_from_model".as_ptr()) }.is_null() {
        let names = ["libllama.so.0", "libllama.so"];
        // SAFETY: only what is open already.
        let open = |name| unsafe { Library::open(Some(name), RTLD_NOW | libc::RTLD_NOLOAD) };
        if let Some(library) = names.into_iter().find_map(|name| open(name).ok()) {
            return library;
        }
    }
    // SAFETY: a pseudo-handle, which is never closed.
    unsafe { Library::from_raw(libc::RTLD_NEXT) }
}

/// llama.cpp's own functions.
pub fn next() -> &'static Llama {
    &NEXT
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, what this thread calls is llama.cpp's own: libgvote and llama.cpp find the plugin's functions first, too.
pub struct Inside(bool);

impl Inside {
    pub fn enter() -> Self {
        Self(INSIDE.replace(true))
    }

    pub fn is() -> bool {
        INSIDE.get()
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}
