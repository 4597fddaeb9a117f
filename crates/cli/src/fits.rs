//! Checks that the machine has enough memory for a model and its context. Otherwise the system would kill this program, or another one,
//! during allocation.

use std::env;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use gvote::llama::{Buffers, ContextParams, ModelParams, Simulation, devices};
use gvote::{SessionParams, machine};
use gvote_gguf::{Gguf, ModelInfo, Support};

use super::words::{bytes, count};

/// Variable that lets CUDA use the machine's memory when a GPU's own is full.
const UNIFIED_MEMORY: &str = "GGML_CUDA_ENABLE_UNIFIED_MEMORY";
/// Bytes of llama.cpp's bookkeeping per cell in the machine's memory, wherever the cell lies; also allocated when only sizes are computed.
const BOOKKEEPING: usize = 56;
/// Allowance for everything a context takes besides the KV cache and the buffers that grow with it.
const SLACK: usize = 512 << 20;

/// The model of a command, with its load parameters.
pub struct Loaded {
    path: PathBuf,
    params: ModelParams,
    info: ModelInfo,
}

impl Loaded {
    pub fn new(file: &Gguf, params: ModelParams) -> Self {
        Self { path: file.parts[0].path.clone(), params, info: file.info.clone() }
    }

    /// Refuses a model whose weights do not fit. Weights that llama.cpp maps from the file do not count.
    ///
    /// # Errors
    /// Names the sizes.
    pub fn check_weights(&self, file: &Gguf) -> Result<()> {
        let Some(available) = machine::available().filter(|&n| n < file.n_bytes() as usize) else { return Ok(()) };
        let least = ContextParams { n_ctx: 1, ..ContextParams::default() };
        let Ok(needed) = Simulation::load(&self.path, &self.params).and_then(|model| model.memory(&least)) else {
            // the load will fail, and llama.cpp reports the reason
            return Ok(());
        };
        let needed = needed.host.repacked;
        if needed > available {
            bail!(
                "{}: llama.cpp takes {} of memory for its weights, and {} are available: take a smaller model (-m), or more \
                 layers to a GPU (-ngl)",
                self.path.display(),
                bytes(needed, needed),
                bytes(available, available),
            );
        }
        Ok(())
    }

    /// Refuses a context that does not fit beside the model.
    ///
    /// # Errors
    /// Names the sizes, and the flags to change.
    pub fn check_context(&self, session: &SessionParams) -> Result<()> {
        let Some(available) = machine::available() else { return Ok(()) };
        let cells = session.context.n_ctx as usize;
        let context = session.with_spare_cells(cells);
        let has_device = devices().iter().any(|device| device.is_gpu);
        let cache = self.cache_bytes(&context);
        let least = context.n_ctx as usize * BOOKKEEPING + if has_device { 0 } else { cache };
        if least > available {
            return Err(too_large(cells, "", Buffers { cache: least, ..Buffers::default() }, available));
        }
        let is_known = !matches!(self.info.support(), Support::Refused(_));
        if is_known && !has_device && cache.saturating_add(self.compute_bytes(&context)) < available {
            return Ok(());
        }
        let Ok(model) = Simulation::load(&self.path, &self.params) else { return Ok(()) };
        let (Ok(memory), Ok(on_devices)) = (model.memory(&context), model.devices(&context)) else { return Ok(()) };
        let beside = |buffers: Buffers| Buffers { weights: 0, ..buffers };
        let host = beside(memory.host);
        if host.total() > available {
            return Err(too_large(cells, "", host, available));
        }
        for (device, buffers) in on_devices.into_iter().filter(|_| env::var_os(UNIFIED_MEMORY).is_none()) {
            let free = device.memory().filter(|memory| memory.total > 0).map(|memory| memory.free);
            if let Some(free) = free.filter(|&free| beside(buffers).total() > free) {
                return Err(too_large(cells, &format!(" on {}", device.name), beside(buffers), free));
            }
        }
        Ok(())
    }

    fn cache_bytes(&self, context: &ContextParams) -> usize {
        let (info, cells) = (&self.info, context.n_ctx as usize);
        let in_window = if context.swa_full { cells } else { info.window_cells(cells, context.n_ubatch as usize) };
        let (type_k, type_v) = (context.type_k, context.type_v);
        let window = info.kv_bytes_per_window_cell(type_k, type_v).saturating_mul(in_window);
        info.kv_bytes_per_cell(type_k, type_v).saturating_mul(cells).saturating_add(window)
    }

    /// Estimates at least the compute buffers of a batch: its logits and, without flash attention, the attention of each head to each cell.
    fn compute_bytes(&self, context: &ContextParams) -> usize {
        /// Attention scores and probabilities, in f32; the mask takes no more than one head.
        const A_HEAD_AND_CELL: usize = 8;
        let (info, n) = (&self.info, context.n_ubatch as usize);
        let attention = (context.n_ctx as usize).saturating_mul((info.n_head + 1) * A_HEAD_AND_CELL);
        let logits = info.n_vocab.unwrap_or(0) as usize * size_of::<f32>();
        n.saturating_mul(attention.saturating_add(logits)).saturating_add(SLACK)
    }
}

fn too_large(cells: usize, place: &str, needed: Buffers, available: usize) -> anyhow::Error {
    let size = |n| bytes(n, n);
    let compute = match needed.compute {
        0 => String::new(),
        n => format!(" and {} of compute buffers", size(n)),
    };
    anyhow!(
        "a context of {} cells takes {} of KV cache{compute}{place}, and {} are available: lower -c or -ub, or take other types \
         with -ctk and -ctv (see gvote plan)",
        count(cells),
        size(needed.cache),
        size(available),
    )
}
