//! Runs the rest of a part of llama.cpp's graph directly in the queue of its back end.
//!
//! After each node that an eval callback asked for, ggml waits for the device. The device then runs idle once or twice in each layer, and
//! the host cannot prepare the next ubatch before this one is done. To stop a device only once, the first node that is read in a part
//! starts this shortcut: we queue the remaining nodes of the part as ggml would, each followed by our own computations on it. Then we tell
//! ggml that the part has ended, and it continues with the next one.
//!
//! A part is what ggml's scheduler calls a split: consecutive nodes of one back end that need no copies in between. The scheduler does not
//! expose the boundaries. Each change of back end is a boundary; if the number of changes matches the number of parts, there are no others.

use super::graph::nodes;
use super::node::Node;
use super::watch::Watch;
use super::{Inner, Reads};
use crate::sys;

/// The nodes of a part that are still to be computed.
pub(super) struct Part {
    backend: sys::ggml_backend_t,
    graph: *mut sys::ggml_cgraph,
    first: usize,
    end: usize,
}

impl Part {
    /// Iterates over the nodes with their indices in the graph.
    fn nodes<'a>(&self) -> impl Iterator<Item = (usize, Node<'a>)> + use<'a> {
        let graph = self.graph;
        // SAFETY: a node of the current graph.
        (self.first..self.end).map(move |i| (i, unsafe { Node::new(sys::ggml_graph_node(graph, i as i32)) }))
    }
}

impl Inner {
    /// Returns the nodes that follow `node` in its part, if the part lies on a device. None also if the boundaries of parts cannot be
    /// determined.
    pub(super) fn part_behind(&self, node: &Node) -> Option<Part> {
        if node.place().is_null() {
            return None;
        }
        let mut n_parts = 0;
        let mut last = std::ptr::null_mut();
        let (mut at, mut backend, mut end, mut n) = (None, last, None, 0);
        // SAFETY: called from inside the graph.
        for (i, other) in unsafe { nodes(self.ctx) }.enumerate() {
            n = i + 1;
            if !other.is_view() {
                // SAFETY: a node of the current graph.
                let own = unsafe { sys::gvote_shim_backend_of(self.ctx, other.0) };
                if own != last {
                    n_parts += 1;
                    last = own;
                    if at.is_some() && end.is_none() {
                        end = Some(i);
                    }
                }
            }
            if std::ptr::eq(other.0, node.0) {
                (at, backend) = (Some(i), last);
            }
        }
        // SAFETY: called from inside the graph; its back ends live as long as the context.
        let is_known = unsafe {
            n_parts == sys::gvote_shim_n_parts(self.ctx)
                && !backend.is_null()
                && sys::ggml_backend_get_device(backend) == node.place()
        };
        let first = at.filter(|_| is_known)? + 1;
        // SAFETY: as above.
        Some(Part { backend, graph: unsafe { sys::gvote_shim_graph(self.ctx) }, first, end: end.unwrap_or(n) })
    }

    /// Queues a part, with the computations on the nodes that are read. Returns false if the back end rejected a graph; the scheduler then
    /// runs the part. If a computation of ours fails, llama.cpp's nodes are computed all the same.
    pub(super) fn go_on(&mut self, part: &Part) -> bool {
        let mut first = part.first;
        let mut is_last = false;
        for (i, node) in part.nodes() {
            let is_wanted = self.ask(&node).unwrap_or_else(|error| {
                self.failed = Some(error);
                false
            });
            if !is_wanted && i + 1 < part.end {
                continue;
            }
            // SAFETY: nodes of one back end, whose inputs are available; earlier nodes are in its queue.
            let status =
                unsafe { sys::gvote_shim_graph_compute_part(part.backend, part.graph, first as i32, i as i32 + 1) };
            if status != sys::GGML_STATUS_SUCCESS {
                // ggml asks about all nodes of the part again: the ubatch is not examined twice, and no more of it is read
                let begun = part.nodes().any(|(_, node)| self.stores_first_k(&node));
                self.reads = Reads { begun, ..Reads::default() };
                return false;
            }
            first = i + 1;
            if is_wanted {
                match self.take(&node) {
                    Ok(is_done) => is_last |= is_done,
                    Err(error) => self.failed = Some(error),
                }
            }
        }
        if is_last && let Err(error) = self.end_ubatch() {
            self.failed = Some(error);
        }
        true
    }
}
