//! The scores of one layer, as the graph leaves them: rows of one number for each cell.

#![forbid(unsafe_code)]

use std::ops::Range;

use crate::backend::ComputeError;
use crate::cache::Cell;
use crate::memory;
use crate::policy::{HeadScores, Needs};

/// Which rows hold what.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rows {
    /// Cells: numbers in a row.
    pub n_kv: usize,
    pub heads: usize,
    pub observed: Block,
    pub future: Block,
    pub fourth_powers: Block,
    pub value_norm: Block,
    pub key_similarity: Block,
    pub expected: Block,
    pub each: Block,
    /// How many there are.
    pub n: usize,
}

/// The same number of rows for each KV head, one head after another.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Block {
    pub first: usize,
    /// 0 where this is not asked for.
    pub of_head: usize,
    /// Rows from one head's to the next's.
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
    /// `n_each`: query heads of a group times future queries.
    pub fn new(n_kv: usize, heads: usize, needs: Needs, n_each: usize) -> Self {
        let mut n = 0;
        let mut block = |is_needed: bool, of_head: usize| {
            let of_head = if is_needed { of_head } else { 0 };
            let first = n;
            n += heads * of_head;
            Block { first, of_head, step: of_head }
        };
        // where both are asked for, they are computed at once: a head's future is the row behind its past
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

    /// Those that come of queries.
    pub fn looks(&self) -> Range<usize> {
        0..self.value_norm.first
    }

    /// Those that come of keys and values by themselves.
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

/// Scores of one layer, indexed by place in the sequence: where the cells are not in order.
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
