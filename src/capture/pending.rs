//! Results of the current ubatch that still lie on the device that computed them.
//!
//! If a node lies on a device, its results are computed in the queue of llama.cpp's own back end, after the node and before anything
//! overwrites it, as if they were one more node of llama.cpp's graph. No layer has to wait for them. All results are read with one wait:
//! queries after the last layer, statistics alone when they are needed or when the next ubatch begins. If a decode ends before its last
//! layer, none of its results are read.

use std::ops::Range;

use half::f16;

use super::graph::{Attention, Wanted, by_token};
use super::moments::{Block, Rows, Sums};
use super::node::Node;
use super::record::LayerRecord;
use super::{CaptureError, Inner, Mode};
use crate::backend::{Builder, ComputeError, Lane};
use crate::cache::Layout;
use crate::llama::SeqId;
use crate::policy::threads;
use crate::sys;

/// Results on one device.
pub(super) struct Pending {
    lane: Lane,
    /// Whether the queue is llama.cpp's. If not, the host waits for each graph before llama.cpp goes on.
    is_theirs: bool,
    taken: Vec<Taken>,
    /// Row numbers on the device for sequences whose rows are not contiguous.
    sent: Vec<(SeqId, usize)>,
}

/// A result for one layer, and its location.
enum Taken {
    Sums { seq: SeqId, layer: usize, sums: Sums },
    Queries(TakenQueries),
}

/// Queries of `n` tokens, beginning with token `first`.
struct TakenQueries {
    layer: usize,
    first: usize,
    n: usize,
    wanted: Vec<Wanted>,
    at: usize,
}

/// Limit on copying threads: more threads would wait for memory.
const COPYING_THREADS: usize = 4;

/// A copy of a layer's queries into an observation window.
struct Filing<'a> {
    /// `[window][n_q]`; the previous content is not used if the whole window is replaced.
    to: &'a mut Vec<f16>,
    n_q: usize,
    is_whole: bool,
    /// Queries of the tokens from `first` on.
    from: &'a [f16],
    first: usize,
    wanted: &'a [Wanted],
}

impl Filing<'_> {
    fn file(self) {
        let Self { to, n_q, from, first, .. } = self;
        let of = |wanted: &Wanted| &from[(wanted.row - first) * n_q..][..n_q];
        if self.is_whole {
            let mut by_slot: Vec<&Wanted> = self.wanted.iter().collect();
            by_slot.sort_unstable_by_key(|wanted| wanted.slot);
            to.clear();
            to.reserve_exact(by_slot.len() * n_q);
            by_slot.into_iter().for_each(|wanted| to.extend_from_slice(of(wanted)));
        } else {
            self.wanted.iter().for_each(|wanted| to[wanted.slot * n_q..][..n_q].copy_from_slice(of(wanted)));
        }
    }
}

impl Pending {
    /// Discards results that were not read.
    fn clear(&mut self) -> Result<(), CaptureError> {
        self.taken.clear();
        self.sent.clear();
        Ok(self.lane.clear()?)
    }

    fn rows(&mut self, seq: SeqId, rows: &[u32]) -> Result<Rows, CaptureError> {
        if is_range(rows) {
            return Ok(Rows::From(rows.first().map_or(0, |&row| row as usize)));
        }
        // the rows are the same in every layer
        if let Some((_, at)) = self.sent.iter().find(|(of, _)| *of == seq) {
            return Ok(Rows::Sent(*at));
        }
        let at = self.lane.send(rows.to_vec())?;
        self.sent.push((seq, at));
        Ok(Rows::Sent(at))
    }
}

fn is_range(rows: &[u32]) -> bool {
    rows.windows(2).all(|w| w[0] + 1 == w[1])
}

impl Inner {
    /// Queues the statistics of some rows of a hidden state that lies on a device.
    pub(super) fn take_sums(
        &mut self,
        node: &Node,
        seq: SeqId,
        layer: usize,
        rows: &[u32],
    ) -> Result<(), CaptureError> {
        let row = self.n_embd * size_of::<f32>();
        let (numbers, picked) = if is_range(rows) { (0, 0) } else { (size_of_val(rows), rows.len() * row) };
        let i = self.pending_for(node, node, &[row, row, numbers], &[rows.len() * row, picked])?;
        let pending = &mut self.pending[i];
        let picked = pending.rows(seq, rows)?;
        // SAFETY: the node has been computed, and llama.cpp goes on behind us in the same queue, or after our wait.
        if let Some(sums) = unsafe { Sums::enqueue(&mut pending.lane, node.0, picked, rows.len())? } {
            pending.taken.push(Taken::Sums { seq, layer, sums });
        }
        self.collect_unordered(i)
    }

    /// Queues the queries of some tokens in every stream, of which some are wanted.
    pub(super) fn take_queries(
        &mut self,
        attention: &Attention,
        tokens: Range<usize>,
        wanted: Vec<Wanted>,
    ) -> Result<(), CaptureError> {
        let (q, layer) = (attention.q, attention.layer);
        let (first, n) = (tokens.start, tokens.len() * q.0.ne[3] as usize);
        let bytes = n * self.layers[layer].n_q * size_of::<f16>();
        let i = self.pending_for(&attention.op, &q, &[bytes], &[])?;
        let pending = &mut self.pending[i];
        let mut b = Builder::new(8)?;
        // SAFETY: as in `take_sums`.
        let is_done = unsafe {
            let rounded = sys::ggml_cast(b.ctx, by_token(&b, q, tokens), sys::GGML_TYPE_F16);
            let at = pending.lane.keep(rounded);
            b.run(rounded);
            pending.lane.enqueue(&mut b)?.then_some(at)
        };
        if let Some(at) = is_done {
            pending.taken.push(Taken::Queries(TakenQueries { layer, first, n, wanted, at }));
        }
        self.collect_unordered(i)
    }

    /// Returns the index of the pending results on the device that holds `t`. `op` has computed `t` or is about to read it. Provides room
    /// for the bytes of `results` and of intermediate `work`.
    fn pending_for(&mut self, op: &Node, t: &Node, results: &[usize], work: &[usize]) -> Result<usize, CaptureError> {
        // SAFETY: nodes of the current graph, which have buffers; a back end of the context lives as long as the context, and ours
        // until it is released.
        let i = unsafe {
            let device = self.devices.at(t.buffer())?;
            let place = device.place();
            let theirs = sys::gvote_shim_backend_of(self.ctx, op.0);
            let is_theirs = !place.is_null() && !theirs.is_null() && sys::ggml_backend_get_device(theirs) == place;
            let i = self.pending.iter().position(|pending| pending.lane.place() == place).unwrap_or_else(|| {
                let (taken, sent) = (Vec::new(), Vec::new());
                self.pending.push(Pending { lane: Lane::new(place), is_theirs, taken, sent });
                self.pending.len() - 1
            });
            self.pending[i].is_theirs = is_theirs;
            self.pending[i].lane.enter(if is_theirs { theirs } else { device.backend() })?;
            i
        };
        if !self.pending[i].lane.has_room(results) {
            self.collect(i..i + 1)?;
            self.pending[i].clear()?;
            self.pending[i].lane.grow(results, self.layers.len())?;
        }
        if !self.pending[i].lane.has_work_room(work) {
            self.pending[i].lane.grow_work(work)?;
        }
        Ok(i)
    }

    /// Allocates the memory for a ubatch's results on each device in advance: a driver can take as long for some of it as for one layer of
    /// the prefill.
    ///
    /// # Errors
    /// [`ComputeError::Memory`].
    pub(super) fn prepare(&mut self, layout: &Layout) -> Result<(), ComputeError> {
        for layer in &layout.layers {
            // SAFETY: K's storage and the back ends live as long as this.
            unsafe {
                let device = self.devices.at((*layer.k).buffer)?;
                let place = device.place();
                if place.is_null() || self.pending.iter().any(|pending| pending.lane.place() == place) {
                    continue;
                }
                let mut lane = Lane::new(place);
                lane.enter(device.backend())?;
                let (moments, queries) =
                    (self.n_embd * size_of::<f32>(), self.window * self.layers[0].n_q * size_of::<f16>());
                lane.prepare(&[moments, moments, queries], self.layers.len())?;
                self.pending.push(Pending { lane, is_theirs: false, taken: Vec::new(), sent: Vec::new() });
            }
        }
        Ok(())
    }

    /// Collects results from a queue in which llama.cpp does not go on.
    fn collect_unordered(&mut self, i: usize) -> Result<(), CaptureError> {
        if self.pending[i].is_theirs { Ok(()) } else { self.collect(i..i + 1) }
    }

    /// Ends the ubatch after its last layer. Queries are read now; statistics may wait, so that the next ubatch is prepared while the
    /// device computes.
    pub(super) fn end_ubatch(&mut self) -> Result<(), CaptureError> {
        self.is_whole = true;
        let mut is_on_its_way = !self.reads.queries;
        for pending in &mut self.pending {
            is_on_its_way = is_on_its_way && pending.lane.fetch()?;
        }
        if is_on_its_way { Ok(()) } else { self.settle() }
    }

    /// Reads the pending results of a whole ubatch, or discards those of a decode that failed or was cancelled.
    pub(super) fn settle(&mut self) -> Result<(), CaptureError> {
        if std::mem::take(&mut self.is_whole) { self.collect(0..self.pending.len()) } else { self.give_up() }
    }

    /// Discards all pending results.
    pub(super) fn give_up(&mut self) -> Result<(), CaptureError> {
        self.is_whole = false;
        self.records.values_mut().for_each(|record| record.waiting = 0);
        self.pending.iter_mut().try_for_each(Pending::clear)
    }

    /// Reads the pending results of some devices.
    fn collect(&mut self, which: Range<usize>) -> Result<(), CaptureError> {
        let mut pending = std::mem::take(&mut self.pending);
        let done = pending[which].iter_mut().try_for_each(|pending| self.merge(pending));
        self.pending = pending;
        done
    }

    fn merge(&mut self, pending: &mut Pending) -> Result<(), CaptureError> {
        let all = std::mem::take(&mut pending.taken);
        let mut left = &all[..];
        while let Some(first) = left.first() {
            // as many layers as fit into one read
            let most = self.bytes(first).start + Lane::PIECE;
            let n = left.iter().take_while(|taken| self.bytes(taken).end <= most).count().max(1);
            let (piece, others) = left.split_at(n);
            left = others;

            let mut queries = Vec::new();
            for taken in piece {
                match taken {
                    Taken::Sums { seq, layer, sums } => {
                        if let Some(record) = self.records.get_mut(seq) {
                            record.waiting = 0;
                            let block = Block::fetched(&mut pending.lane, sums, self.n_embd)?;
                            record.layer_mut(*layer).moments.merge(&block);
                        }
                    }
                    Taken::Queries(taken) => queries.push(taken),
                }
            }
            if let ([first, ..], Some(last)) = (&queries[..], piece.last()) {
                let n = (self.bytes(last).end - first.at) / size_of::<f16>();
                self.file_queries(&queries, pending.lane.halves(first.at, n)?);
            }
        }
        pending.clear()
    }

    /// Byte range of a result.
    fn bytes(&self, taken: &Taken) -> Range<usize> {
        match taken {
            Taken::Sums { sums, .. } => sums.bytes(self.n_embd),
            Taken::Queries(taken) => taken.at..taken.at + taken.n * self.layers[taken.layer].n_q * size_of::<f16>(),
        }
    }

    /// Copies the wanted queries of some layers to their places. `queries`: from those of the first layer on.
    fn file_queries(&mut self, taken: &[&TakenQueries], queries: &[f16]) {
        let start = taken.first().map_or(0, |taken| taken.at);
        let of = |taken: &TakenQueries| &queries[(taken.at - start) / size_of::<f16>()..];
        let Self { mode, records, layers, .. } = self;
        let copy = |to: &mut [f16], taken: &TakenQueries, n_q: usize| {
            for Wanted { row, slot, .. } in &taken.wanted {
                to[slot * n_q..][..n_q].copy_from_slice(&of(taken)[(row - taken.first) * n_q..][..n_q]);
            }
        };
        let n_q = |taken: &TakenQueries| layers[taken.layer].n_q;
        match mode {
            Mode::Probe(probe) => {
                taken.iter().for_each(|taken| copy(probe.queries.layer_mut(taken.layer), taken, n_q(taken)));
            }
            Mode::Replay(_, replayed) => {
                for taken in taken {
                    let out = &mut replayed[taken.layer];
                    out.data.resize(taken.wanted.len() * n_q(taken), f16::ZERO);
                    out.pos = taken.wanted.iter().map(|wanted| wanted.pos).collect();
                    copy(&mut out.data, taken, n_q(taken));
                }
            }
            Mode::Listen | Mode::Prompt { .. } | Mode::Again => {
                let mut filings = Vec::new();
                for (seq, record) in records {
                    for (layer, of_layer) in record.layers.iter_mut().enumerate() {
                        let Some(taken) = taken.iter().find(|taken| taken.layer == layer) else { continue };
                        let mut of_seq = taken.wanted.chunk_by(|a, b| a.seq == b.seq);
                        let Some(wanted) = of_seq.find(|wanted| wanted[0].seq == *seq) else { continue };
                        let new = wanted.iter().map(|wanted| (wanted.slot, wanted.pos));
                        let (to, is_whole) = LayerRecord::window_at(of_layer, new);
                        let (n_q, from, first) = (n_q(taken), of(taken), taken.first);
                        filings.push(Filing { to, n_q, is_whole, from, first, wanted });
                    }
                }
                let n_threads = filings.len().min(COPYING_THREADS);
                threads::share_out(n_threads, filings.into_iter(), Filing::file, || ());
            }
        }
    }
}

#[cfg(test)]
impl super::Capture {
    /// Number of results that lie on devices.
    pub(crate) fn pending(&self) -> usize {
        self.inner.pending.iter().map(|pending| pending.taken.len()).sum()
    }
}
