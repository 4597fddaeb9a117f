//! Nodes of the graph that llama.cpp is computing, and the path from a hidden state to its queries.

use std::ffi::{CStr, CString};

use super::CaptureError;
use crate::backend::{self, ComputeError};
use crate::sys;

/// Limit on the nodes between a hidden state and its queries; the architectures of the pinned llama.cpp have about ten.
pub(super) const MAX_PATH: usize = 64;

/// The nodes between a layer's hidden state and its queries, in order of computation.
pub(super) struct Path<'a> {
    il: i32,
    graph: *const sys::ggml_cgraph,
    pub hidden: Option<Node<'a>>,
    pub nodes: Vec<*mut sys::ggml_tensor>,
    /// Whether everything that the path's nodes read is available from the start of the graph: weights, inputs, and each other.
    is_local: bool,
}

impl<'a> Path<'a> {
    /// `graph`: the current one.
    pub fn new(il: i32, graph: *const sys::ggml_cgraph) -> Self {
        Self { il, graph, hidden: None, nodes: Vec::new(), is_local: true }
    }

    pub fn collect(&mut self, node: Node<'a>) -> Result<(), CaptureError> {
        let ptr = std::ptr::from_ref(node.0).cast_mut();
        if node.0.op == sys::GGML_OP_NONE {
            self.is_local &= !node.is_copy(self.graph);
            return Ok(());
        }
        if self.nodes.contains(&ptr) {
            return Ok(());
        }
        if node.layer_after("attn_norm") == Some(self.il) {
            self.hidden = Some(node);
            return Ok(());
        }
        for src in (0..node.0.src.len()).filter_map(|i| node.src(i)) {
            self.collect(src)?;
        }
        if self.nodes.len() == MAX_PATH {
            return Err(CaptureError::NoHidden(self.il));
        }
        self.nodes.push(ptr);
        Ok(())
    }

    /// Whether the path can be computed by itself, before the rest of the graph.
    pub fn is_complete(&self) -> bool {
        self.hidden.is_some() && self.is_local
    }
}

/// A node of the graph that llama.cpp is computing.
#[derive(Clone, Copy)]
pub(crate) struct Node<'a>(pub &'a sys::ggml_tensor);

impl<'a> Node<'a> {
    /// # Safety
    /// `t` is a valid tensor for `'a`.
    pub unsafe fn new(t: *const sys::ggml_tensor) -> Self {
        // SAFETY: see above.
        Self(unsafe { &*t })
    }

    pub fn name(&self) -> &'a CStr {
        CStr::from_bytes_until_nul(
            // SAFETY: c_char and u8 have the same layout; the array lives in the tensor.
            unsafe { &*(std::ptr::from_ref(&self.0.name[..]) as *const [u8]) },
        )
        .unwrap_or_default()
    }

    /// Returns the layer in a name like `attn_norm-7`.
    pub fn layer_after(&self, prefix: &str) -> Option<i32> {
        let name = self.name().to_str().ok()?;
        name.strip_prefix(prefix)?.strip_prefix('-')?.parse().ok()
    }

    pub fn src(&self, i: usize) -> Option<Node<'a>> {
        // SAFETY: a node's sources live as long as the graph.
        unsafe { self.0.src[i].as_ref().map(Node) }
    }

    /// Returns the tensor that owns this node's memory.
    pub fn storage(&self) -> *const sys::ggml_tensor {
        let mut t = self.0;
        // SAFETY: view sources live as long as their views.
        while let Some(src) = unsafe { t.view_src.as_ref() } {
            t = src;
        }
        t
    }

    pub fn param(&self, i: usize) -> f32 {
        f32::from_bits(self.0.op_params[i].cast_unsigned())
    }

    /// Returns the buffer that holds the tensor; for a view, the buffer of its source.
    pub fn buffer(&self) -> sys::ggml_backend_buffer_t {
        // SAFETY: view sources live as long as their views.
        unsafe { self.0.view_src.as_ref().map_or(self.0.buffer, |src| src.buffer) }
    }

    /// Whether the node is a view, so that nothing is computed.
    pub fn is_view(&self) -> bool {
        matches!(self.0.op, sys::GGML_OP_VIEW | sys::GGML_OP_RESHAPE | sys::GGML_OP_PERMUTE | sys::GGML_OP_TRANSPOSE)
    }

    /// Whether this leaf of the graph is copied by the scheduler from one back end to another during the graph: a weight in host memory
    /// that a device computes with, or a result of another back end. Inputs are copied before the graph starts.
    fn is_copy(&self, graph: *const sys::ggml_cgraph) -> bool {
        let buffer = self.buffer();
        // SAFETY: a valid buffer.
        let is_computed = !buffer.is_null()
            && unsafe { sys::ggml_backend_buffer_get_usage(buffer) } == sys::GGML_BACKEND_BUFFER_USAGE_COMPUTE;
        is_computed && !self.is_input() && !self.original(graph).is_some_and(|original| original.is_input())
    }

    fn is_input(&self) -> bool {
        self.0.flags & sys::GGML_TENSOR_FLAG_INPUT as i32 != 0
    }

    /// Returns the tensor that the scheduler copied to make this one, if it is a copy. Copies are named `BACKEND#NAME#NUMBER`.
    pub fn original(&self, graph: *const sys::ggml_cgraph) -> Option<Node<'a>> {
        if self.0.op != sys::GGML_OP_NONE {
            return None;
        }
        let (_, name) = self.name().to_str().ok()?.split_once('#')?;
        let name = CString::new(name.rsplit_once('#')?.0).ok()?;
        // SAFETY: the current graph, whose tensors live as long as this one.
        unsafe { sys::ggml_graph_get_tensor(graph, name.as_ptr()).as_ref().map(Node) }
    }

    /// Returns the device that holds the tensor: see [`backend::place`].
    pub fn place(&self) -> sys::ggml_backend_dev_t {
        // SAFETY: the nodes of the current graph have been allocated.
        unsafe { backend::place(self.buffer()) }
    }

    pub fn shape_error(&self) -> CaptureError {
        CaptureError::Shape(self.name().to_string_lossy().into_owned())
    }

    /// Reads the bytes `offset..offset + out.len()` of the tensor, from host or device memory.
    ///
    /// # Errors
    /// [`ComputeError`] if the device fails.
    pub fn get(&self, offset: usize, out: &mut [u8]) -> Result<(), ComputeError> {
        // SAFETY: callers stay inside the tensor (ggml checks it again).
        let is_read = unsafe { sys::gvote_shim_tensor_get(self.0, out.as_mut_ptr().cast(), offset, out.len()) };
        if is_read { Ok(()) } else { Err(ComputeError::Memory("reading")) }
    }

    /// Returns all floats of a contiguous f32 tensor in host memory.
    ///
    /// # Safety
    /// The tensor has been computed, and is not written to for `'a`.
    pub unsafe fn floats(&self) -> &'a [f32] {
        // SAFETY: ggml allocates tensors aligned for their type and a computed node has data.
        unsafe { std::slice::from_raw_parts(self.0.data.cast(), sys::ggml_nelements(self.0) as usize) }
    }

    /// Changes all floats of a contiguous f32 tensor that has been computed: in place if it lies in host memory, otherwise through a copy
    /// in `scratch`.
    ///
    /// # Errors
    /// [`ComputeError`] if the device fails.
    pub fn change_floats(&self, scratch: &mut Vec<f32>, change: impl FnOnce(&mut [f32])) -> Result<(), ComputeError> {
        // SAFETY: a computed node has data, aligned for its type, of as many elements; nobody else uses it while ggml waits
        // for the eval callback.
        unsafe {
            let n = sys::ggml_nelements(self.0) as usize;
            if self.place().is_null() {
                change(std::slice::from_raw_parts_mut(self.0.data.cast(), n));
                return Ok(());
            }
            scratch.resize(n, 0.0);
            let bytes = n * size_of::<f32>();
            let tensor = std::ptr::from_ref(self.0).cast_mut();
            if !sys::gvote_shim_tensor_get(tensor, scratch.as_mut_ptr().cast(), 0, bytes) {
                return Err(ComputeError::Memory("reading"));
            }
            change(scratch);
            let is_set = sys::gvote_shim_tensor_set(tensor, scratch.as_ptr().cast(), 0, bytes);
            if is_set { Ok(()) } else { Err(ComputeError::Memory("sending")) }
        }
    }
}
