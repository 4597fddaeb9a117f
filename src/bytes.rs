//! Numbers and parts in a row of bytes, little-endian. What is read may come from anywhere, and may be cut off anywhere.

#![forbid(unsafe_code)]

/// Bytes still to be read.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `N` bytes; None at the end.
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    /// A part that was written by [`put_part`].
    pub fn part(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(u64::from_le_bytes(self.take()?)).ok()?;
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    /// A part of whole numbers of four bytes each.
    pub fn numbers(&mut self) -> Option<impl ExactSizeIterator<Item = [u8; 4]> + use<'a>> {
        let (numbers, rest) = self.part()?.as_chunks();
        rest.is_empty().then(|| numbers.iter().copied())
    }

    /// Whether all was read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Appends a part with its length.
pub(crate) fn put_part(out: &mut Vec<u8>, part: &[u8]) {
    out.extend_from_slice(&(part.len() as u64).to_le_bytes());
    out.extend_from_slice(part);
}

/// Appends numbers of four bytes as a part.
pub(crate) fn put_numbers(out: &mut Vec<u8>, numbers: impl ExactSizeIterator<Item = [u8; 4]>) {
    out.extend_from_slice(&(4 * numbers.len() as u64).to_le_bytes());
    for number in numbers {
        out.extend_from_slice(&number);
    }
}
