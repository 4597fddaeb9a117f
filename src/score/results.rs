//! The scores of one layer as the graph writes them: rows with one number per cell.

#![forbid(unsafe_code)]

use std::ops::Range;

use crate::backend::ComputeError;
use crate::cache::Cell;
use crate::memory;
use crate::policy::{HeadScores, Needs};

/// Layout of the rows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rows {
    /// Number of cells: the length of a row.
    pub n_kv: usize,
    pub heads: usize,
    pub observed: Block,
    pub future: Block,
    pub fourth_powers: Block,
    pub value_norm: Block,
    pub key_similarity: Block,
    pub expected: Block,
    pub each: Block,
    /// Total number of rows.
    pub n: usize,
}

/// Rows of one kind of score, the same number for each KV head.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Block {
    pub first: usize,
    /// Rows per head; 0 if this score was not requested.
    pub of_head: usize,
    /// Distance in rows between consecutive heads.
    step: usize,
}

impl Block {
    /// The first row of a head.
    pub fn at(self, head: usize) -> usize {
        self.first + head * self.step
    }

    fn of_head(self, head: usize, n_kv: usize) -> Range<usize> {
        self.at(head) * n_kv..(self.at(head) + self.of_head) * n_kv
    }
}

impl Rows {
    /// `n_each`: query heads per group times future queries.
    pub fn new(n_kv: usize, heads: usize, needs: Needs, n_each: usize) -> Self {
        let mut n = 0;
        let mut block = |is_needed: bool, of_head: usize| {
            let of_head = if is_needed { of_head } else { 0 };
            let first = n;
            n += heads * of_head;
            Block { first, of_head, step: of_head }
        };
        // if both are requested, one product computes them: a head's future row follows its observed row
        let foresees = needs.future || needs.each;
        let sums = block(needs.observed || foresees, usize::from(needs.observed) + usize::from(foresees));
        let sum = |is_needed: bool, place: usize| Block {
            first: sums.first + place,
            of_head: usize::from(is_needed),
            step: sums.step,
        };
        Self {
            observed: sum(needs.observed, 0),
            future: sum(foresees, usize::from(needs.observed)),
            fourth_powers: block(needs.observed && needs.fourth_powers, 1),
            each: block(needs.each, n_each),
            value_norm: block(needs.value_norm, 1),
            key_similarity: block(needs.key_similarity, 1),
            expected: block(needs.expected, 1),
            n_kv,
            heads,
            n,
        }
    }

    /// Rows of scores that depend on queries.
    pub fn looks(&self) -> Range<usize> {
        0..self.value_norm.first
    }

    /// Rows of scores that depend on keys and values alone.
    pub fn measures(&self) -> Range<usize> {
        self.value_norm.first..self.expected.first
    }
}

/// The scores of one layer.
#[derive(Default)]
pub(super) struct LayerScores {
    pub rows: Rows,
    /// `[rows.n][rows.n_kv]`
    pub data: Vec<f32>,
}

impl LayerScores {
    /// Makes room for these rows.
    ///
    /// # Errors
    /// [`ComputeError::Memory`].
    pub fn resize(&mut self, rows: Rows) -> Result<(), ComputeError> {
        let n = rows.n * rows.n_kv;
        if self.data.len() < n {
            self.data = Vec::new();
            self.data = memory::zeros(n).ok_or(ComputeError::Memory("scores"))?;
        }
        self.data.truncate(n);
        self.rows = rows;
        Ok(())
    }

    pub fn head(&self, head: usize) -> HeadScores<'_> {
        head_of(&self.rows, &self.data, head)
    }
}

/// Scores of one layer, indexed by place in the sequence, for cells that are not in order.
#[derive(Default)]
pub(super) struct Gathered {
    rows: Rows,
    data: Vec<f32>,
}

impl Gathered {
    pub fn fill(&mut self, from: &LayerScores, cells: &[Cell]) {
        self.rows = Rows { n_kv: cells.len(), ..from.rows };
        self.data.clear();
        for row in from.data.chunks_exact(from.rows.n_kv) {
            self.data.extend(cells.iter().map(|c| row[c.index as usize]));
        }
    }

    pub fn head(&self, head: usize) -> HeadScores<'_> {
        head_of(&self.rows, &self.data, head)
    }
}

fn head_of<'a>(rows: &Rows, data: &'a [f32], head: usize) -> HeadScores<'a> {
    let of = |block: Block| &data[block.of_head(head, rows.n_kv)];
    HeadScores {
        future: of(rows.future),
        observed: of(rows.observed),
        each: of(rows.each),
        expected: of(rows.expected),
        value_norm: of(rows.value_norm),
        key_similarity: of(rows.key_similarity),
        fourth_powers: of(rows.fourth_powers),
        replayed: &[],
    }
}
