//! Captured data of one sequence.

#![forbid(unsafe_code)]

use std::sync::Arc;

use half::f16;

use super::moments::Moments;
use super::{Layer, Window, zeros};
use crate::llama::{Pos, Token};
use crate::sys;

/// A token that an app decoded, and its cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Index of the cell, in the sequence's stream or over all streams, as llama.cpp counts in its graph.
    pub cell: i64,
    pub pos: Pos,
    /// -1 for embeddings.
    pub token: Token,
}

/// Captured data of one sequence in one layer.
#[derive(Clone)]
pub(super) struct LayerRecord {
    pub moments: Moments,
    /// Floats of one token's queries.
    pub n_q: usize,
    /// `[window][n_q]`; position p has slot p mod window.
    pub window_q: Vec<f16>,
    pub window_pos: Vec<Pos>,
}

/// Number of first tokens that all contribute to the statistics. Of later tokens one in [`SHARE`] does: docs/performance.md shows the cost
/// and the effect.
pub(crate) const FIRST: usize = 256;
pub(super) const SHARE: usize = 16;

/// Captured data of one sequence.
#[derive(Clone)]
pub(super) struct Record {
    /// Copies of a record share a layer until one of them writes to it: most copies are made only in case something fails.
    pub layers: Vec<Arc<LayerRecord>>,
    /// Tokens so far, whether read or not.
    pub n_tokens: usize,
    /// Tokens whose statistics still lie on a device.
    pub waiting: usize,
    /// The tokens of the current ubatch that belong to the sequence: index in the ubatch, and position.
    pub rows: Vec<(usize, Pos)>,
    /// Tokens since the list was last taken, by position. A token removes those at its own and later positions.
    seen: Vec<Seen>,
}

impl LayerRecord {
    /// Returns the window's queries for writing, after assigning new positions to some slots, and whether all slots are written.
    pub fn window_at(this: &mut Arc<Self>, new: impl ExactSizeIterator<Item = (usize, Pos)>) -> (&mut Vec<f16>, bool) {
        let is_whole = new.len() == this.window_pos.len();
        if is_whole && Arc::get_mut(this).is_none() {
            // a shared copy would keep none of the present queries
            let Self { ref moments, n_q, ref window_pos, .. } = **this;
            let (moments, window_pos) = (moments.clone(), window_pos.clone());
            *this = Arc::new(Self { moments, n_q, window_q: Vec::new(), window_pos });
        }
        let own = Arc::make_mut(this);
        new.for_each(|(slot, pos)| own.window_pos[slot] = pos);
        (&mut own.window_q, is_whole)
    }
}

impl Record {
    pub fn new(layers: &[Layer], window: usize) -> Self {
        let layers = layers.iter().map(|layer| LayerRecord {
            moments: Moments::default(),
            n_q: layer.n_q,
            window_q: zeros(window * layer.n_q),
            window_pos: vec![-1; window],
        });
        Self::of(layers.collect(), 0)
    }

    pub fn of(layers: Vec<LayerRecord>, n_tokens: usize) -> Self {
        let layers = layers.into_iter().map(Arc::new).collect();
        Self { layers, n_tokens, waiting: 0, rows: Vec::new(), seen: Vec::new() }
    }

    /// Whether nothing was captured or counted so far.
    pub fn is_new(&self) -> bool {
        self.n_tokens == 0 && !self.has_moments()
    }

    /// Whether the next `n` tokens should contribute to the statistics. A single token is a step of an answer; stopping the graph at every
    /// layer for it is not worth the time unless there are no statistics yet.
    pub fn is_due(&self, n: usize) -> bool {
        let read = self.layers.first().map_or(0.0, |layer| layer.moments.count) as usize + self.waiting;
        read == 0 || (n > 1 && (read < FIRST || SHARE * read <= self.n_tokens))
    }

    /// Records that `n` more tokens were decoded.
    pub fn count(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Forgets the queries of the positions for which `is_gone` holds.
    pub fn forget(&mut self, is_gone: impl Fn(Pos) -> bool) {
        let is_gone = |pos: &Pos| *pos >= 0 && is_gone(*pos);
        for layer in &mut self.layers {
            if layer.window_pos.iter().any(is_gone) {
                let gone = Arc::make_mut(layer).window_pos.iter_mut().filter(|pos| is_gone(pos));
                gone.for_each(|pos| *pos = -1);
            }
        }
    }

    /// Records the tokens of a ubatch. A token at position 0 restarts the sequence.
    pub fn list(&mut self, cells: &[i64], rows: &[sys::gvote_shim_row]) {
        let rows = cells.iter().zip(rows).filter(|(_, row)| row.pos >= 0);
        let mut heard: Vec<_> = rows.map(|(&cell, row)| Seen { cell, pos: row.pos, token: row.token }).collect();
        heard.sort_unstable_by_key(|seen| seen.pos);
        let Some(oldest) = heard.first().map(|seen| seen.pos) else { return };
        self.seen.truncate(self.seen.partition_point(|seen| seen.pos < oldest));
        self.seen.append(&mut heard);
        self.forget(|pos| pos >= oldest);
        // some earlier tokens may have been decoded unobserved
        self.n_tokens = oldest as usize;
        if oldest == 0 {
            for layer in &mut self.layers {
                Arc::make_mut(layer).moments = Moments::default();
            }
        }
    }

    pub fn take_seen(&mut self) -> Vec<Seen> {
        std::mem::take(&mut self.seen)
    }

    /// Returns the indices in the current ubatch of the tokens that contribute to the statistics.
    pub fn counted(&self, skip: usize) -> Vec<u32> {
        self.rows.iter().filter(|(_, pos)| *pos >= skip as Pos).map(|(row, _)| *row as u32).collect()
    }

    pub fn layer_mut(&mut self, layer: usize) -> &mut LayerRecord {
        Arc::make_mut(&mut self.layers[layer])
    }

    /// Returns the queries of a layer's window that ends at `pos_last`, or None if the query at `pos_last` is missing.
    pub fn window(&self, layer: usize, window: usize, pos_last: Pos) -> Option<Window<'_>> {
        let LayerRecord { n_q, window_q, window_pos, .. } = &*self.layers[layer];
        let is_there = |pos: &Pos| window_pos[*pos as usize % window] == *pos;
        let pos: Vec<Pos> = ((pos_last - window as Pos + 1).max(0)..=pos_last).filter(is_there).collect();
        if pos.last() != Some(&pos_last) {
            return None;
        }
        let slots: Vec<usize> = pos.iter().map(|&pos| pos as usize % window).collect();
        let side_by_side = slots.chunk_by(|slot, next| slot + 1 == *next);
        let parts = side_by_side.map(|slots| &window_q[slots[0] * n_q..][..slots.len() * n_q]).collect();
        Some(Window { parts, pos })
    }

    #[cfg(test)]
    pub fn statistics(&self, layer: usize) -> (Vec<f64>, Vec<f64>) {
        let m = &self.layers[layer].moments;
        (m.mean.clone(), m.m2.iter().map(|s| s / m.count.max(1.0)).collect())
    }

    /// Whether every layer has statistics.
    pub fn has_moments(&self) -> bool {
        self.waiting > 0 || self.layers.iter().all(|layer| layer.moments.count >= 1.0)
    }
}
