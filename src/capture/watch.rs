//! llama.cpp's eval callback: a watcher sees the nodes of the current graph, and may change their data.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::node::Node;
use crate::llama::{Context, LlamaError};
use crate::sys;

/// A watcher of graph nodes.
pub(crate) trait Watch {
    type Error: From<LlamaError>;

    /// Called before a node is computed. Returns whether to call [`Watch::read`] once it is computed.
    fn ask(&mut self, node: &Node) -> Result<bool, Self::Error>;

    /// Called after a node that was asked for. Returns false to end the graph.
    fn read(&mut self, node: &Node) -> Result<bool, Self::Error>;

    /// Converts a panic in one of the methods above to an error.
    fn panicked(text: String) -> Self::Error;
}

/// Runs `f`, which decodes, with `watch` installed as the eval callback.
///
/// # Errors
/// The first error of `watch`, or the error of `f`.
pub(crate) fn during<W: Watch, T>(
    watch: &mut W,
    ctx: &mut Context,
    f: impl FnOnce(&mut Context) -> Result<T, LlamaError>,
) -> Result<T, W::Error> {
    let mut watching = Watching { watch, error: None };
    let data: *mut Watching<W> = &raw mut watching;
    // SAFETY: `watching` outlives the guard, and is not touched by us before the guard is gone.
    unsafe { sys::gvote_shim_set_eval_callback(ctx.as_ptr(), Some(on_eval::<W>), data.cast()) };
    let installed = Installed(ctx.as_ptr());
    let result = f(ctx);
    drop(installed);
    match watching.error {
        Some(error) => Err(error),
        None => Ok(result?),
    }
}

struct Watching<'a, W: Watch> {
    watch: &'a mut W,
    error: Option<W::Error>,
}

/// Guard that removes the callback on every way out: the callback must not outlive its data.
struct Installed(*mut sys::llama_context);

impl Drop for Installed {
    fn drop(&mut self) {
        // SAFETY: `during` holds the context.
        unsafe { sys::gvote_shim_set_eval_callback(self.0, None, std::ptr::null_mut()) };
    }
}

unsafe extern "C" fn on_eval<W: Watch>(t: *mut sys::ggml_tensor, ask: bool, data: *mut c_void) -> bool {
    // SAFETY: `data` is what `during` installed with this very function; ggml calls from one thread at a time.
    let Watching { watch, error } = unsafe { &mut *data.cast::<Watching<W>>() };
    if error.is_some() {
        // The result is lost already; let the graph run to its end.
        return !ask;
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: ggml passes a node of the current graph, computed if `ask` is false.
        let node = unsafe { Node::new(t) };
        if ask { watch.ask(&node) } else { watch.read(&node) }
    }));
    match outcome {
        Ok(Ok(answer)) => return answer,
        Ok(Err(found)) => *error = Some(found),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map_or("panic", |s| s);
            *error = Some(W::panicked(text.into()));
        }
    }
    !ask
}
