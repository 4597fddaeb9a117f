//! Devices, with a back end of gvote's own on each.

use std::ops::{Deref, DerefMut};

use half::f16;

use super::memory::Memory;
use super::{Builder, ComputeError, Tensor};
use crate::cache::{self, Layout};
use crate::sys;

/// A back end of gvote's own on one device.
pub(crate) struct Device {
    /// NULL for the host.
    place: sys::ggml_backend_dev_t,
    backend: sys::ggml_backend_t,
    /// NULL until it is needed.
    alloc: sys::ggml_gallocr_t,
    is_warm: bool,
    has_out_prod: bool,
    /// Staging buffer for transfers between host and device; `sent`: its bytes that hold inputs in transfer.
    stage: HostMemory,
    sent: usize,
    /// Whether an input was sent directly from the caller's memory because the stage was full.
    sends_straight: bool,
    /// Device memory for the inputs of a graph that are sent together, as large as the stage; empty if they are sent one by one.
    inputs: Memory,
    /// Results that are read after other graphs have been computed.
    kept: Memory,
}

/// Bytes of a stage. A driver takes half a millisecond to allocate half as much pinned memory; transfers with other memory take several
/// times as long, and other threads wait for the driver meanwhile. In tests the stage is small, so that their inputs and results need more
/// than one.
pub(crate) const STAGE: usize = if cfg!(test) { 4096 } else { 2 << 20 };
/// Bytes of a result that are read at once.
const PIECE: usize = STAGE / 2;

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; NULL is fine for an allocator.
        unsafe {
            sys::ggml_gallocr_free(self.alloc);
            sys::ggml_backend_free(self.backend);
        }
    }
}

// SAFETY: a back end and its allocator are used by one thread at a time (&mut).
unsafe impl Send for Device {}

impl Device {
    /// `place`: see [`place`].
    ///
    /// # Errors
    /// [`ComputeError::Backend`].
    pub fn new(place: sys::ggml_backend_dev_t, n_threads: usize) -> Result<Self, ComputeError> {
        // SAFETY: the result is checked; NULL stands for the CPU.
        unsafe {
            let backend = sys::gvote_shim_backend_init(place);
            if backend.is_null() {
                return Err(ComputeError::Backend);
            }
            if sys::ggml_backend_is_cpu(backend) {
                sys::ggml_backend_cpu_set_n_threads(backend, n_threads as i32);
            }
            let alloc = std::ptr::null_mut();
            let mut device = Self {
                place,
                backend,
                alloc,
                is_warm: false,
                has_out_prod: true,
                stage: HostMemory::default(),
                sent: 0,
                sends_straight: false,
                inputs: Memory::default(),
                kept: Memory::default(),
            };
            device.has_out_prod = device.can_sum_columns()?;
            Ok(device)
        }
    }

    fn can_sum_columns(&self) -> Result<bool, ComputeError> {
        let mut b = Builder::new(8)?;
        let a = b.input([1, 1, 1], vec![0.0]);
        // SAFETY: a node of this context.
        Ok(unsafe { sys::ggml_backend_supports_op(self.backend, b.out_prod(a, a)) })
    }

    /// Computes a small product once, so that the back end loads what matrix products need.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn warm_up(&mut self) -> Result<(), ComputeError> {
        /// More rows and columns than the kernels for small matrices take.
        const N: usize = 64;
        if std::mem::replace(&mut self.is_warm, true) {
            return Ok(());
        }
        self.set_stage();
        let mut b = Builder::on(self, 16)?;
        let a = b.input([N, N, 1], vec![1.0; N * N]);
        // SAFETY: square matrices.
        unsafe {
            let product = sys::ggml_mul_mat(b.ctx, a, a);
            b.run(b.out_prod(product, a));
        }
        b.compute(self)
    }

    /// Allocates the stage and the device memory for inputs if the device's driver has pinned memory. A failure is ignored: both are
    /// optional.
    fn set_stage(&mut self) {
        let mut stage = HostMemory::default();
        if has_own_host_memory(self.place)
            && self.stage.is_empty()
            && stage.resize(self, STAGE / size_of::<f32>()).is_ok()
        {
            self.stage = stage;
            let _ = self.inputs.grow(self.backend, &[STAGE], 0);
        }
    }

    /// Whether there is room for this many bytes of results, which are kept until [`Devices::release`]. The first call allocates `n` times
    /// as many, within limits.
    pub fn has_room(&mut self, bytes: usize, n: usize) -> bool {
        if self.kept.bytes() == 0 && self.kept.grow(self.backend, &[bytes], n).is_err() {
            return false;
        }
        self.kept.has_room(&[bytes])
    }

    pub(super) fn kept(&mut self) -> &mut Memory {
        &mut self.kept
    }

    /// Reads kept results.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn read_kept(&mut self, out: &mut [f32], at: usize) -> Result<(), ComputeError> {
        let b = Builder::new(1)?;
        // SAFETY: the context has room for the tensor, which lies where the results are.
        let t = unsafe { sys::ggml_new_tensor_1d(b.ctx, sys::GGML_TYPE_F32, out.len() as i64) };
        self.kept.put(t, at);
        self.read(out, t)
    }

    /// Whether the queued work no longer needs the caller's memory: all of its inputs are in the stage.
    pub fn is_on_its_own(&self) -> bool {
        !self.sends_straight
    }

    /// Device memory for inputs that are sent together.
    pub(super) fn inputs(&mut self) -> &mut Memory {
        &mut self.inputs
    }

    /// Waits until all queued work is done.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn wait(&mut self) -> Result<(), ComputeError> {
        // SAFETY: the back end lives.
        let done = unsafe { sys::gvote_shim_synchronize(self.backend) };
        (self.sent, self.sends_straight) = (0, false);
        if done { Ok(()) } else { Err(ComputeError::Memory("waiting")) }
    }

    /// Prepares to send the inputs of another graph.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub(super) fn begin_sending(&mut self) -> Result<(), ComputeError> {
        if self.sent > 0 { self.wait() } else { Ok(()) }
    }

    /// Starts sending the whole of `t`, which begins where [`Self::inputs`] begins, in one transfer. `inputs`: the offset of each input,
    /// and its parts in order.
    ///
    /// # Errors
    /// [`ComputeError`].
    ///
    /// # Safety
    /// The tensor has memory, and all parts lie inside it; nothing else was sent since [`Self::begin_sending`].
    pub(super) unsafe fn send_together<'b>(
        &mut self,
        t: Tensor,
        inputs: impl Iterator<Item = (usize, Vec<&'b [u8]>)>,
    ) -> Result<(), ComputeError> {
        let stage: *mut u8 = self.stage.as_mut_ptr().cast();
        for (mut at, parts) in inputs {
            for part in parts {
                // SAFETY: see above; the stage is as large as the inputs' memory.
                unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), stage.add(at), part.len()) };
                at += part.len();
            }
        }
        // SAFETY: a tensor with memory; the stage is unchanged until the transfer has been waited for.
        let done = unsafe {
            self.sent = sys::ggml_nbytes(t);
            sys::gvote_shim_tensor_set_async(self.backend, t, stage.cast(), 0, sys::ggml_nbytes(t))
        };
        if done { Ok(()) } else { Err(ComputeError::Memory("inputs")) }
    }

    /// Starts sending the data of a tensor, through the stage if there is room.
    ///
    /// # Errors
    /// [`ComputeError`].
    ///
    /// # Safety
    /// The tensor has memory of the back end for all parts; the parts stay unchanged until [`Self::wait`].
    pub(super) unsafe fn send(&mut self, t: Tensor, parts: &[&[u8]]) -> Result<(), ComputeError> {
        let mut offset = 0;
        for part in parts {
            let mut from = part.as_ptr();
            if self.sent + part.len() <= self.stage.len() * size_of::<f32>() {
                // SAFETY: there is room for it.
                unsafe {
                    let own: *mut u8 = self.stage.as_mut_ptr().cast::<u8>().add(self.sent);
                    std::ptr::copy_nonoverlapping(from, own, part.len());
                    from = own;
                }
                self.sent += part.len();
            } else {
                self.sends_straight = true;
            }
            // SAFETY: see above.
            if !unsafe { sys::gvote_shim_tensor_set_async(self.backend, t, from.cast(), offset, part.len()) } {
                return Err(ComputeError::Memory("sending"));
            }
            offset += part.len();
        }
        Ok(())
    }

    /// Waits for a contiguous result and reads `out.len()` elements, whose type must have the size of `T`.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn read<T: Copy>(&mut self, out: &mut [T], t: Tensor) -> Result<(), ComputeError> {
        self.read_from(0, out, t)
    }

    /// As [`Self::read`], for the elements from `first` on.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn read_from<T: Copy>(&mut self, first: usize, out: &mut [T], t: Tensor) -> Result<(), ComputeError> {
        // SAFETY: a valid tensor.
        debug_assert_eq!(unsafe { sys::ggml_type_size((*t).type_) }, size_of::<T>());
        self.set_stage();
        let (start, bytes) = (first * size_of::<T>(), size_of_val(out));
        let to: *mut u8 = out.as_mut_ptr().cast();
        if self.stage.is_empty() {
            self.wait()?;
            // SAFETY: the tensor was computed and stays allocated until the next graph; ggml checks that it is as large.
            let is_read = unsafe { sys::gvote_shim_tensor_get(t, to.cast(), start, bytes) };
            return if is_read { Ok(()) } else { Err(ComputeError::Memory("reading")) };
        }
        // one half of the stage receives a piece while the previous piece is copied out of the other
        let stage: *mut u8 = self.stage.as_mut_ptr().cast();
        let n_pieces = bytes.div_ceil(PIECE);
        let piece = |i: usize| (i % 2 * PIECE, i * PIECE, PIECE.min(bytes - i * PIECE));
        for i in 0..=n_pieces {
            if i > 0 {
                self.wait()?;
            }
            if i < n_pieces {
                let (half, offset, n) = piece(i);
                // SAFETY: see above. The half has as many bytes, is waited for, and was copied out. Inputs have left the stage by then:
                // the queue is worked off in order.
                let begun = unsafe {
                    let half = stage.add(half).cast();
                    sys::gvote_shim_tensor_get_async(self.backend, t, half, start + offset, n)
                };
                if !begun {
                    return Err(ComputeError::Memory("reading"));
                }
            }
            if i > 0 {
                let (half, offset, n) = piece(i - 1);
                // SAFETY: `out` has as many bytes from `offset` on, and any bits that ggml stores are an element.
                unsafe { std::ptr::copy_nonoverlapping(stage.add(half), to.add(offset), n) };
            }
        }
        Ok(())
    }

    /// Bytes of memory that are free on the device now; None for the host.
    pub fn free_bytes(&self) -> Option<usize> {
        if self.place.is_null() {
            return None;
        }
        let (mut free, mut total) = (0, 0);
        // SAFETY: a valid device.
        unsafe { sys::ggml_backend_dev_memory(self.place, &raw mut free, &raw mut total) };
        Some(free)
    }

    /// Whether the back end supports OUT_PROD: see [`Builder::out_prod`].
    pub(super) fn has_out_prod(&self) -> bool {
        self.has_out_prod
    }

    pub fn place(&self) -> sys::ggml_backend_dev_t {
        self.place
    }

    pub fn backend(&self) -> sys::ggml_backend_t {
        self.backend
    }

    /// Returns the allocator of graphs; makes one if there is none.
    pub(super) fn allocator(&mut self) -> &mut sys::ggml_gallocr_t {
        if self.alloc.is_null() {
            // SAFETY: the back end lives.
            self.alloc = unsafe { sys::ggml_gallocr_new(sys::ggml_backend_get_default_buffer_type(self.backend)) };
        }
        &mut self.alloc
    }

    /// Bytes of the compute buffer and of kept results.
    fn compute_bytes(&self) -> usize {
        // SAFETY: a valid allocator, with one buffer.
        let own = if self.alloc.is_null() { 0 } else { unsafe { sys::ggml_gallocr_get_buffer_size(self.alloc, 0) } };
        own + self.kept.bytes()
    }
}

/// f32 numbers in host memory that a device accesses directly (pinned memory), if its driver provides it; otherwise in plain host memory.
#[derive(Default)]
pub(crate) struct HostMemory {
    /// NULL until memory is allocated.
    buffer: sys::ggml_backend_buffer_t,
    /// NULL for the host.
    place: sys::ggml_backend_dev_t,
    len: usize,
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; NULL is fine.
        unsafe { sys::ggml_backend_buffer_free(self.buffer) };
    }
}

// SAFETY: plain memory.
unsafe impl Send for HostMemory {}
// SAFETY: shared access only reads it.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Provides `len` numbers to exchange with a device: zeros, or the previous content.
    ///
    /// # Errors
    /// [`ComputeError::Memory`].
    pub fn resize(&mut self, device: &Device, len: usize) -> Result<(), ComputeError> {
        self.resize_for(device.place, len)
    }

    /// As [`Self::resize`], for a [`place`].
    ///
    /// # Errors
    /// [`ComputeError::Memory`].
    pub fn resize_for(&mut self, place: sys::ggml_backend_dev_t, len: usize) -> Result<(), ComputeError> {
        self.len = 0;
        if self.place != place || self.bytes() < len * size_of::<f32>() {
            // SAFETY: a valid device; NULL stands for a device without pinned memory, and for the host.
            unsafe {
                sys::ggml_backend_buffer_free(std::mem::replace(&mut self.buffer, std::ptr::null_mut()));
                let own = match place.is_null() {
                    true => std::ptr::null_mut(),
                    false => sys::ggml_backend_dev_host_buffer_type(place),
                };
                let kind = if own.is_null() { sys::ggml_backend_cpu_buffer_type() } else { own };
                self.buffer = sys::gvote_shim_alloc_buffer(kind, len * size_of::<f32>());
            }
            if self.buffer.is_null() {
                return Err(ComputeError::Memory("scores"));
            }
            // SAFETY: a valid buffer.
            unsafe { sys::ggml_backend_buffer_clear(self.buffer, 0) };
            self.place = place;
        }
        self.len = len;
        Ok(())
    }

    /// The same memory as bytes.
    pub fn as_bytes(&self) -> &[u8] {
        let numbers: &[f32] = self;
        // SAFETY: numbers without padding.
        unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
    }

    /// The same memory as f16 numbers, two for each f32.
    pub fn halves(&self) -> &[f16] {
        let numbers: &[f32] = self;
        // SAFETY: any bits are a valid f16, and memory for f32 is aligned for it.
        unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), 2 * numbers.len()) }
    }

    pub fn bytes(&self) -> usize {
        // SAFETY: a valid buffer.
        if self.buffer.is_null() { 0 } else { unsafe { sys::ggml_backend_buffer_get_size(self.buffer) } }
    }
}

impl Deref for HostMemory {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: the buffer holds `len` numbers, aligned for any tensor, and all of it was written.
        unsafe { std::slice::from_raw_parts(sys::ggml_backend_buffer_get_base(self.buffer).cast(), self.len) }
    }
}

impl DerefMut for HostMemory {
    fn deref_mut(&mut self) -> &mut [f32] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: see above.
        unsafe { std::slice::from_raw_parts_mut(sys::ggml_backend_buffer_get_base(self.buffer).cast(), self.len) }
    }
}

/// Back ends on the devices that have been used so far.
pub(crate) struct Devices {
    met: Vec<Device>,
    n_threads: usize,
}

impl Devices {
    /// `n_threads`: threads of a back end on the host.
    pub fn new(n_threads: usize) -> Self {
        Self { met: Vec::new(), n_threads }
    }

    /// Returns the back end on the device that holds this buffer.
    ///
    /// # Errors
    /// [`ComputeError::Backend`].
    ///
    /// # Safety
    /// The buffer is valid.
    pub unsafe fn at(&mut self, buffer: sys::ggml_backend_buffer_t) -> Result<&mut Device, ComputeError> {
        // SAFETY: passed on.
        let place = unsafe { place(buffer) };
        let i = match self.met.iter().position(|device| device.place == place) {
            Some(i) => i,
            None => {
                self.met.push(Device::new(place, self.n_threads)?);
                self.met.len() - 1
            }
        };
        Ok(&mut self.met[i])
    }

    /// Starts the back ends of the devices that hold a cache: loading CUDA and its libraries takes as long as scoring a short prompt.
    ///
    /// # Errors
    /// [`ComputeError`].
    pub fn start(&mut self, layout: &Layout) -> Result<(), ComputeError> {
        for layer in &layout.layers {
            // SAFETY: K's storage lives as long as the context, which the caller holds.
            unsafe { self.at((*layer.k).buffer)?.warm_up()? };
        }
        Ok(())
    }

    /// Bytes of compute memory.
    pub fn compute_bytes(&self) -> usize {
        self.met.iter().map(Device::compute_bytes).sum()
    }

    /// Discards the kept results.
    pub fn forget_kept(&mut self) {
        self.met.iter_mut().for_each(|device| device.kept.used = 0);
    }

    /// Frees the compute memory and returns its bytes. Back ends on devices other than the host stay: starting one takes long.
    pub fn release(&mut self) -> usize {
        let bytes = self.compute_bytes();
        self.met.retain(|device| !device.place.is_null());
        for device in &mut self.met {
            // SAFETY: ours; NULL is fine, and stands for none.
            unsafe { sys::ggml_gallocr_free(std::mem::replace(&mut device.alloc, std::ptr::null_mut())) };
            device.kept = Memory::default();
        }
        bytes
    }
}

/// Whether a device's driver provides pinned host memory. Such drivers support several threads. `place`: see [`place`].
pub(crate) fn has_own_host_memory(place: sys::ggml_backend_dev_t) -> bool {
    // SAFETY: a valid device, or NULL for the host.
    let has_own = unsafe { !place.is_null() && !sys::ggml_backend_dev_host_buffer_type(place).is_null() };
    #[cfg(test)]
    let has_own = has_own || cache::PRETEND_DEVICE.get();
    has_own
}

/// Returns the device that holds a buffer, or NULL for memory that the host can access in place.
///
/// # Safety
/// The buffer is valid.
pub(crate) unsafe fn place(buffer: sys::ggml_backend_buffer_t) -> sys::ggml_backend_dev_t {
    // SAFETY: passed on.
    unsafe {
        if cache::is_host(buffer) {
            return std::ptr::null_mut();
        }
        let device = sys::ggml_backend_buft_get_device(sys::ggml_backend_buffer_get_type(buffer));
        // a test may pretend that host memory is device memory
        if device.is_null() { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) } else { device }
    }
}
