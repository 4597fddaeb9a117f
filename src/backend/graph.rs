//! Small graphs that are built, computed and discarded.

use std::borrow::Cow;
use std::cell::Cell;
use std::ffi::{CStr, c_char};
use std::ops::Range;

use half::f16;

use super::device::STAGE;
use super::{ComputeError, Device};
use crate::sys;

pub(crate) type Tensor = *mut sys::ggml_tensor;

/// A graph under construction, with the data of its inputs.
pub(crate) struct Builder<'a> {
    pub(crate) ctx: *mut sys::ggml_context,
    graph: *mut sys::ggml_cgraph,
    /// Memory for the descriptions in `ctx`; only its capacity is used.
    memory: Vec<u128>,
    inputs: Vec<Input<'a>>,
    /// Tensor that covers all inputs sent in one transfer; NULL if there are none.
    together: Tensor,
    has_out_prod: bool,
}

/// Rows of a graph's results, to be read with [`Device::read`].
pub(crate) struct Results {
    pub tensor: Tensor,
    /// Index of the first row.
    first: usize,
    /// Whether each row has been written.
    written: Vec<bool>,
    /// Whether the rows stay on the device when other graphs are computed.
    is_kept: bool,
}

impl Results {
    /// Places the rows in memory that was requested with [`Device::has_room`], and returns their offset.
    pub fn keep(&mut self, device: &mut Device) -> usize {
        self.is_kept = true;
        device.kept().give(self.tensor)
    }
}

/// An input and its data.
struct Input<'a> {
    tensor: Tensor,
    data: Data<'a>,
    /// Byte offset in the common transfer; None: sent by itself.
    at: Option<usize>,
}

enum Data<'a> {
    Floats(Cow<'a, [f32]>),
    /// Parts that are concatenated.
    Halves(Vec<&'a [f16]>),
    Rows(Cow<'a, [u32]>),
}

impl Data<'_> {
    /// Returns the bytes of each part, in order.
    fn parts(&self) -> Vec<&[u8]> {
        match self {
            Self::Floats(data) => vec![bytes(data)],
            Self::Rows(data) => vec![bytes(data)],
            Self::Halves(parts) => parts.iter().map(|part| bytes(part)).collect(),
        }
    }
}

fn bytes<T: Copy>(data: &[T]) -> &[u8] {
    // SAFETY: numbers without padding, any byte of which may be read.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

thread_local! {
    /// Memory that the next graph's descriptions reuse: allocating fresh memory would take longer than writing them.
    static MEMORY: Cell<Vec<u128>> = const { Cell::new(Vec::new()) };
}

impl Drop for Builder<'_> {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once; the tensors' data belongs to the allocator.
        unsafe { sys::ggml_free(self.ctx) };
        MEMORY.set(std::mem::take(&mut self.memory));
    }
}

impl<'a> Builder<'a> {
    /// Makes a graph of at most `n_nodes` tensors.
    pub fn new(n_nodes: usize) -> Result<Self, ComputeError> {
        // SAFETY: a context for descriptions only, whose memory the builder keeps; sizes come from ggml.
        unsafe {
            // one more for the common transfer of inputs
            let mem_size =
                (n_nodes + 1) * sys::ggml_tensor_overhead() + sys::ggml_graph_overhead_custom(n_nodes, false);
            let mut memory = MEMORY.take();
            memory
                .try_reserve_exact(mem_size.div_ceil(size_of::<u128>()))
                .map_err(|_| ComputeError::Memory("graph"))?;
            let mem_buffer = memory.as_mut_ptr().cast();
            let ctx = sys::ggml_init(sys::ggml_init_params { mem_size, mem_buffer, no_alloc: true });
            if ctx.is_null() {
                return Err(ComputeError::Memory("graph"));
            }
            let graph = sys::ggml_new_graph_custom(ctx, n_nodes, false);
            let together = std::ptr::null_mut();
            Ok(Self { ctx, graph, memory, inputs: Vec::new(), together, has_out_prod: true })
        }
    }

    /// Makes a graph for a device that may lack some operations.
    pub fn on(device: &Device, n_nodes: usize) -> Result<Self, ComputeError> {
        let mut builder = Self::new(n_nodes)?;
        builder.has_out_prod = device.has_out_prod();
        Ok(builder)
    }

    /// Sums the columns of `a` `[m, k, heads]`, weighted with each row of `b` `[n, k, heads]`. `[m, n, heads]`
    pub fn out_prod(&self, a: Tensor, b: Tensor) -> Tensor {
        // SAFETY: tensors of this context, of shapes as noted.
        unsafe {
            if self.has_out_prod {
                return sys::ggml_out_prod(self.ctx, a, b);
            }
            let across = |t| sys::ggml_cont(self.ctx, sys::ggml_transpose(self.ctx, t));
            sys::ggml_mul_mat(self.ctx, across(a), across(b))
        }
    }

    pub fn input(&mut self, ne: [usize; 3], data: impl Into<Cow<'a, [f32]>>) -> Tensor {
        let data = data.into();
        debug_assert_eq!(data.len(), ne.iter().product::<usize>());
        self.add_input(sys::GGML_TYPE_F32, ne, Data::Floats(data))
    }

    /// Adds an f16 input whose data is the concatenation of `parts`.
    pub fn halves(&mut self, ne: [usize; 3], parts: Vec<&'a [f16]>) -> Tensor {
        debug_assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), ne.iter().product::<usize>());
        self.add_input(sys::GGML_TYPE_F16, ne, Data::Halves(parts))
    }

    /// Adds an input of row indices.
    pub fn rows(&mut self, ne: [usize; 3], data: impl Into<Cow<'a, [u32]>>) -> Tensor {
        let data = data.into();
        debug_assert_eq!(data.len(), ne.iter().product::<usize>());
        self.add_input(sys::GGML_TYPE_I32, ne, Data::Rows(data))
    }

    fn add_input(&mut self, type_: sys::ggml_type, ne: [usize; 3], data: Data<'a>) -> Tensor {
        // SAFETY: the context has room for the tensor.
        let tensor = unsafe {
            let t = sys::ggml_new_tensor_3d(self.ctx, type_, ne[0] as i64, ne[1] as i64, ne[2] as i64);
            sys::ggml_set_input(t);
            t
        };
        self.inputs.push(Input { tensor, data, at: None });
        tensor
    }

    /// Adds a tensor that another graph computes or has computed; this graph does not compute it again.
    ///
    /// # Safety
    /// `t` has memory, and only this graph changes it until this graph has been computed.
    pub unsafe fn elsewhere(&self, t: &sys::ggml_tensor) -> Tensor {
        // SAFETY: see above; the context has room for the tensor.
        unsafe {
            let leaf = sys::ggml_new_tensor_4d(self.ctx, t.type_, t.ne[0], t.ne[1], t.ne[2], t.ne[3]);
            (*leaf).nb = t.nb;
            (*leaf).buffer = t.view_src.as_ref().map_or(t.buffer, |src| src.buffer);
            (*leaf).data = t.data;
            leaf
        }
    }

    /// Makes a node, which is not a view, write to the memory of another graph's tensor of the same shape.
    ///
    /// # Safety
    /// As for [`Self::elsewhere`].
    pub unsafe fn place(&self, node: Tensor, t: &sys::ggml_tensor) {
        // SAFETY: see above; a node of this context.
        unsafe {
            debug_assert!((*node).ne == t.ne && (*node).nb == t.nb);
            (*node).buffer = t.view_src.as_ref().map_or(t.buffer, |src| src.buffer);
            (*node).data = t.data;
        }
    }

    /// Appends a node of another graph, to be computed in place.
    ///
    /// # Safety
    /// The node has memory, and its inputs have been computed by its turn; both stay until this graph has been computed.
    pub unsafe fn run_other(&mut self, node: Tensor) {
        // SAFETY: see above, and the graph has room.
        unsafe { sys::ggml_graph_add_node(self.graph, node) };
    }

    /// Appends a node; ggml keeps the order of these calls.
    pub fn run(&mut self, t: Tensor) -> Tensor {
        // SAFETY: the tensor belongs to this context.
        unsafe { sys::ggml_build_forward_expand(self.graph, t) };
        t
    }

    /// Appends a node that reads or changes a tensor of which `before` changed a part in place; NULL: no part was changed.
    ///
    /// ggml keeps memory until every view of it has been read, but no other node reads such a part. So `before` becomes an additional
    /// source of the node, in the last place, which none of the operations used here read.
    pub fn run_after(&mut self, before: Tensor, t: Tensor) -> Tensor {
        // SAFETY: tensors of this context.
        unsafe { (*t).src[sys::GGML_MAX_SRC as usize - 1] = before };
        self.run(t)
    }

    pub fn output(&mut self, t: Tensor) -> Tensor {
        // SAFETY: the tensor belongs to this context.
        unsafe { sys::ggml_set_output(t) };
        self.run(t)
    }

    /// Adds results: some rows, `rows` of a larger table, of `n` numbers each, to which other nodes write.
    pub fn results(&mut self, n: usize, rows: Range<usize>) -> Results {
        let tensor = self.written_to(sys::GGML_TYPE_F32, n, rows.len());
        Results { tensor, first: rows.start, written: vec![false; rows.len()], is_kept: false }
    }

    /// Adds `n` f16 numbers to which other nodes write.
    pub fn half_results(&mut self, n: usize) -> Tensor {
        self.written_to(sys::GGML_TYPE_F16, n, 1)
    }

    fn written_to(&self, type_: sys::ggml_type, n: usize, rows: usize) -> Tensor {
        // SAFETY: the context has room for the tensor; an input has memory from the start, and an output keeps it.
        unsafe {
            let t = sys::ggml_new_tensor_2d(self.ctx, type_, n as i64, rows as i64);
            sys::ggml_set_input(t);
            sys::ggml_set_output(t);
            t
        }
    }

    /// Writes all of `t` to f16 results from `start` on.
    pub fn write_halves(&mut self, to: Tensor, start: usize, t: Tensor) {
        // SAFETY: tensors of this context; the view has the shape of `t`, and ggml checks that it lies inside.
        unsafe {
            let [n0, n1, n2, n3] = (*t).ne;
            let half = size_of::<f16>();
            let nb1 = n0 as usize * half;
            let (nb2, nb3) = (nb1 * n1 as usize, nb1 * (n1 * n2) as usize);
            let view = sys::ggml_view_4d(self.ctx, to, n0, n1, n2, n3, nb1, nb2, nb3, start * half);
            self.run(sys::ggml_cpy(self.ctx, t, view));
        }
    }

    /// Makes the node `t`, with `n` numbers per row, the results themselves if it covers all rows and none was written yet: this saves a
    /// copy.
    fn is_all(&mut self, to: &mut Results, rows: usize, n: i64, t: Tensor) -> bool {
        // SAFETY: tensors of this context.
        unsafe {
            let is_all = !to.is_kept
                && rows == to.written.len()
                && n == (*to.tensor).ne[0]
                && !to.written.contains(&true)
                && (*t).view_src.is_null();
            if is_all {
                to.tensor = self.output(t);
                to.written.fill(true);
            }
            is_all
        }
    }

    /// Writes `t`, which is contiguous and has whole rows, to the rows from `first` on; adds to rows that were written before.
    pub fn write(&mut self, to: &mut Results, first: usize, t: Tensor) {
        // SAFETY: tensors of this context; the view has the shape of `t`, and ggml checks that it lies inside.
        unsafe {
            let (n, row, first) = ((*to.tensor).ne[0], (*to.tensor).nb[1], first - to.first);
            let rows = sys::ggml_nelements(t) / n;
            if self.is_all(to, rows as usize, n, t) {
                return;
            }
            let view = sys::ggml_view_2d(self.ctx, to.tensor, n, rows, row, first * row);
            let t = sys::ggml_reshape_2d(self.ctx, t, n, rows);
            let written = &mut to.written[first..first + rows as usize];
            let node = if written.iter().all(|&written| written) {
                sys::ggml_add_inplace(self.ctx, view, t)
            } else {
                sys::ggml_cpy(self.ctx, t, view)
            };
            written.fill(true);
            self.run(node);
        }
    }

    /// Writes `t` `[n, rows]` into as many rows from `first` on, beginning at column `start`.
    pub fn write_part(&mut self, to: &mut Results, first: usize, start: usize, t: Tensor) {
        // SAFETY: as in `write`.
        unsafe {
            let [n, rows, ..] = (*t).ne;
            if self.is_all(to, rows as usize, n, t) {
                return;
            }
            let (row, first) = ((*to.tensor).nb[1], first - to.first);
            let view = sys::ggml_view_2d(self.ctx, to.tensor, n, rows, row, first * row + start * size_of::<f32>());
            to.written[first..first + rows as usize].fill(true);
            let node = sys::ggml_cpy(self.ctx, t, view);
            self.run(node);
        }
    }

    /// Allocates the memory that the graph needs, so that [`Self::compute`] of this graph, or a smaller one, need not.
    pub fn reserve(&mut self, device: &mut Device) -> Result<(), ComputeError> {
        self.put_together(device);
        // planned anew each time: a plan for a graph of the same size would be reused although other tensors must stay
        // SAFETY: the graph is complete.
        let done = unsafe { sys::gvote_shim_alloc_graph(device.allocator(), self.graph) };
        if done { Ok(()) } else { Err(ComputeError::Memory("compute buffer")) }
    }

    /// Places inputs side by side in device memory, where one transfer can send them, as long as there is room. The allocator places the
    /// other inputs, and all that the graph writes.
    fn put_together(&mut self, device: &mut Device) {
        let memory = device.inputs();
        if memory.bytes() == 0 {
            return;
        }
        memory.used = 0;
        // SAFETY: nodes of a complete graph, and what they read.
        let leaves: Vec<Tensor> = unsafe {
            let sources = self.nodes().flat_map(|node| (*node).src);
            sources.filter(|&t| t.as_ref().is_some_and(|t| t.op == sys::GGML_OP_NONE)).collect()
        };
        let mut end = 0;
        for input in &mut self.inputs {
            // SAFETY: tensors of this context; there is room.
            unsafe {
                let bytes = sys::ggml_nbytes(input.tensor);
                let is_read = leaves.contains(&input.tensor);
                if is_read && (*input.tensor).buffer.is_null() && memory.used + bytes <= STAGE {
                    let at = memory.give(input.tensor);
                    (input.at, end) = (Some(at), at + bytes);
                }
            }
        }
        if end > 0 {
            // SAFETY: the context has room for the tensor, which covers exactly the memory of the inputs.
            unsafe {
                self.together = sys::ggml_new_tensor_1d(self.ctx, sys::GGML_TYPE_I8, end as i64);
                memory.put(self.together, 0);
            }
        }
    }

    /// Computes the graph.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn compute(&mut self, device: &mut Device) -> Result<(), ComputeError> {
        self.begin(device)?;
        device.wait()
    }

    /// Starts computing the graph. [`Device::read`] waits for the results that it reads. The builder must live until then, or until
    /// [`Device::wait`].
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn begin(&mut self, device: &mut Device) -> Result<(), ComputeError> {
        device.begin_sending()?;
        self.reserve(device)?;
        self.check(device.backend())?;
        if !self.together.is_null() {
            // this overwrites inputs of the previous graph: both are in this device's queue, where a copy waits for earlier kernels
            let inputs = self.inputs.iter().filter_map(|input| Some((input.at?, input.data.parts())));
            // SAFETY: the tensor has memory up to the end of the last input.
            unsafe { device.send_together(self.together, inputs)? };
        }
        for Input { tensor, data, .. } in self.inputs.iter().filter(|input| input.at.is_none()) {
            // SAFETY: an input is allocated before it is set, and sized as declared; one that no node reads has no memory. What is sent
            // stays as it is until all has been computed.
            unsafe {
                if !(**tensor).buffer.is_null() {
                    device.send(*tensor, &data.parts())?;
                }
            }
        }
        // SAFETY: every tensor of the graph has memory; the inputs' data is ours until all has been computed.
        outcome(unsafe { sys::gvote_shim_graph_compute_async(device.backend(), self.graph) })
    }

    /// Queues the graph on a back end.
    ///
    /// # Safety
    /// All its tensors except views have memory, which stays theirs until the back end has been waited for.
    pub(super) unsafe fn enqueue(&mut self, backend: sys::ggml_backend_t) -> Result<(), ComputeError> {
        for node in self.nodes() {
            // SAFETY: the source of a view has memory.
            unsafe {
                if !(*node).view_src.is_null() && (*node).buffer.is_null() {
                    sys::ggml_backend_view_init(node);
                }
            }
        }
        self.check(backend)?;
        // SAFETY: see above. Back ends take what they need of the description before they return: llama.cpp's own lives no longer.
        outcome(unsafe { sys::gvote_shim_graph_compute_async(backend, self.graph) })
    }

    fn nodes(&self) -> impl Iterator<Item = Tensor> {
        let graph = self.graph;
        // SAFETY: the graph of this builder, and valid indices.
        unsafe { (0..sys::ggml_graph_n_nodes(graph)).map(move |i| sys::ggml_graph_node(graph, i)) }
    }

    /// Checks that the back end can compute every node: otherwise it would end the process.
    fn check(&self, backend: sys::ggml_backend_t) -> Result<(), ComputeError> {
        // SAFETY: nodes of a complete graph.
        match self.nodes().find(|&node| unsafe { !sys::ggml_backend_supports_op(backend, node) }) {
            // SAFETY: as above.
            Some(node) => Err(unsafe { unsupported(node) }),
            None => Ok(()),
        }
    }
}

fn outcome(status: sys::ggml_status) -> Result<(), ComputeError> {
    match status {
        sys::GGML_STATUS_SUCCESS => Ok(()),
        sys::GGML_STATUS_ALLOC_FAILED => Err(ComputeError::Memory("computing")),
        status => Err(ComputeError::Failed(status)),
    }
}

/// Describes a node that a back end cannot compute.
///
/// # Safety
/// `node` is a valid tensor.
unsafe fn unsupported(node: *const sys::ggml_tensor) -> ComputeError {
    // SAFETY: a valid node; the names are static.
    unsafe {
        let text = |name: *const c_char| CStr::from_ptr(name).to_string_lossy().into_owned();
        let of = (*node).src[0].as_ref().map_or(String::new(), |src| text(sys::ggml_type_name(src.type_)));
        ComputeError::Unsupported(format!("{} of {of}", text(sys::ggml_op_name((*node).op))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::PRETEND_DEVICE;

    /// Metal and other back ends have no OUT_PROD.
    #[test]
    fn sums_of_columns_are_the_same_without_the_operation_for_it() {
        let (m, n, k, heads) = (70, 2, 40, 3);
        let numbers = |len: usize, step: usize| (0..len).map(|i| (i * step % 17) as f32 - 8.0).collect::<Vec<_>>();
        let mut device = Device::new(std::ptr::null_mut(), 1).unwrap();
        let mut run = |has_out_prod| {
            let mut b = Builder::new(16).unwrap();
            b.has_out_prod = has_out_prod;
            let x = b.input([m, k, heads], numbers(m * k * heads, 7));
            let y = b.input([n, k, heads], numbers(n * k * heads, 5));
            let sums = b.out_prod(x, y);
            b.output(sums);
            b.compute(&mut device).unwrap();
            let mut out = vec![0.0_f32; m * n * heads];
            device.read(&mut out, sums).unwrap();
            out
        };
        let (with, without) = (run(true), run(false));
        assert!(with.iter().any(|x| *x != 0.0) && with == without);
    }

    #[test]
    fn inputs_arrive_as_they_are_together_and_by_themselves() {
        PRETEND_DEVICE.set(true);
        // SAFETY: the host is always there.
        let host = unsafe { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) };
        let floats = |n: usize, start: usize| (start..start + n).map(|i| i as f32).collect::<Vec<_>>();
        let compute = |device: &mut Device, start: usize| {
            let halves: Vec<f16> = floats(33, start).into_iter().map(f16::from_f32).collect();
            let numbers: Vec<u32> = (0..100).map(|i| ((7 * i + start) % 100) as u32).collect();
            let (first, large, late, last) =
                (floats(700, start), floats(2000, start), floats(300, start), [start as f32]);
            let mut b = Builder::new(32).unwrap();
            let inputs = [
                b.input([700, 1, 1], &first[..]),
                b.input([10, 1, 1], &first[..10]),
                b.halves([33, 1, 1], vec![&halves[..10], &[], &halves[10..]]),
                b.input([20, 100, 1], &large[..]),
                b.rows([100, 1, 1], &numbers[..]),
                b.input([300, 1, 1], &late[..]),
                b.input([1, 1, 1], &last[..]),
            ];
            let copied = [0, 2, 5, 6].map(|i| {
                // SAFETY: a tensor of this context.
                let t = unsafe { sys::ggml_cast(b.ctx, inputs[i], sys::GGML_TYPE_F32) };
                b.output(t)
            });
            // SAFETY: the indices are below the number of rows.
            let picked = unsafe { sys::ggml_get_rows(b.ctx, inputs[3], inputs[4]) };
            b.output(picked);
            b.begin(device).unwrap();
            for (t, expected) in copied.into_iter().zip([&first[..], &floats(33, start), &late, &last]) {
                let mut out = vec![0.0; expected.len()];
                device.read(&mut out, t).unwrap();
                assert!(out == expected, "{} numbers from {start} on", out.len());
            }
            let mut out = vec![0.0; 2000];
            device.read(&mut out, picked).unwrap();
            let rows = numbers.iter().flat_map(|&number| &large[20 * number as usize..][..20]);
            assert!(out.iter().eq(rows), "rows from {start} on");
            let mut part = vec![0.0; 1700];
            device.read_from(150, &mut part, picked).unwrap();
            assert!(part == out[150..1850], "a part of the rows from {start} on");
            b.inputs.iter().map(|input| input.at.is_some()).collect::<Vec<_>>()
        };
        let mut device = Device::new(host, 1).unwrap();
        assert_eq!(compute(&mut device, 1), [false; 7], "there is no stage yet");
        for start in [2, 50] {
            // one input is read by no node, one is larger than the stage, and one is larger than the rest of the stage
            assert_eq!(compute(&mut device, start), [true, false, true, false, true, false, true]);
        }
        PRETEND_DEVICE.set(false);
    }

    #[test]
    fn a_node_that_holds_all_rows_is_the_results() {
        let mut device = Device::new(std::ptr::null_mut(), 1).unwrap();
        // rows that each node covers, in order
        for parts in [[0..3, 0..3], [1..3, 0..1]] {
            let mut b = Builder::new(32).unwrap();
            let numbers = b.input([5, 3, 1], (0..15).map(|i| i as f32).collect::<Vec<_>>());
            let mut out = b.results(5, 7..10);
            let mut nodes = Vec::new();
            for Range { start, end } in parts.clone() {
                // SAFETY: rows of a contiguous tensor of this context.
                let node = unsafe {
                    let row = (*numbers).nb[1];
                    sys::ggml_sqr(b.ctx, sys::ggml_view_2d(b.ctx, numbers, 5, (end - start) as i64, row, start * row))
                };
                b.write(&mut out, 7 + start, node);
                nodes.push(node);
            }
            b.compute(&mut device).unwrap();
            let mut read_out = vec![0.0; 15];
            device.read(&mut read_out, out.tensor).unwrap();
            let twice = parts[0] == parts[1];
            let square = |i: usize| (i * i * if twice { 2 } else { 1 }) as f32;
            assert!(read_out.into_iter().eq((0..15).map(square)), "{parts:?}");
            assert_eq!(out.tensor == nodes[0], twice, "{parts:?}");
        }
    }
}
