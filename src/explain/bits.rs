//! The positions that each head kept, one bit each.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Serialize, Serializer};

/// A matrix of bits.
///
/// Serialised as the base64 of its rows, one after another. Each row begins with a new byte; within a byte the lowest
/// bit comes first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bits {
    n_columns: usize,
    bytes: Vec<u8>,
}

impl Bits {
    /// Creates a matrix. `rows`: the columns that are set in each row.
    pub(crate) fn new(n_columns: usize, rows: impl ExactSizeIterator<Item = Vec<i32>>) -> Self {
        let stride = n_columns.div_ceil(8);
        let mut bytes = vec![0; rows.len() * stride];
        for (row, columns) in rows.enumerate() {
            for column in columns {
                bytes[row * stride + column as usize / 8] |= 1 << (column % 8);
            }
        }
        Self { n_columns, bytes }
    }

    /// Returns the columns that are set in a row, ascending.
    pub fn row(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        let stride = self.n_columns.div_ceil(8);
        let bytes = &self.bytes[row * stride..][..stride];
        (0..self.n_columns).filter(move |column| bytes[column / 8] >> (column % 8) & 1 == 1)
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.bytes.len() / self.n_columns.div_ceil(8).max(1)
    }

    /// Returns the serialised form.
    pub fn to_base64(&self) -> String {
        STANDARD.encode(&self.bytes)
    }
}

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_base64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_begins_with_a_byte_of_its_own_and_the_lowest_bit_comes_first() {
        let bits = Bits::new(10, [vec![0, 9], vec![], vec![8, 1]].into_iter());
        assert_eq!(bits.to_base64(), STANDARD.encode([0b1, 0b10, 0, 0, 0b10, 0b1]));
        assert_eq!(bits.n_rows(), 3);
        assert_eq!(
            (0..3).map(|row| bits.row(row).collect()).collect::<Vec<Vec<_>>>(),
            [vec![0, 9], vec![], vec![1, 8]]
        );
    }
}
