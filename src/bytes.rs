//! Serialises numbers and parts as bytes, little-endian. The reader accepts untrusted and truncated input.

#![forbid(unsafe_code)]

/// Bytes that are yet to be read.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// Reads the next `N` bytes; None where fewer are left.
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    /// Reads a part that [`put_part`] wrote.
    pub fn part(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(u64::from_le_bytes(self.take()?)).ok()?;
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    /// Reads a part of four-byte numbers; None where its length is not a multiple of four.
    pub fn numbers(&mut self) -> Option<impl ExactSizeIterator<Item = [u8; 4]> + use<'a>> {
        let (numbers, rest) = self.part()?.as_chunks();
        rest.is_empty().then(|| numbers.iter().copied())
    }

    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Appends a part, preceded by its length.
pub(crate) fn put_part(out: &mut Vec<u8>, part: &[u8]) {
    out.extend_from_slice(&(part.len() as u64).to_le_bytes());
    out.extend_from_slice(part);
}

/// Appends four-byte numbers as a part.
pub(crate) fn put_numbers(out: &mut Vec<u8>, numbers: impl ExactSizeIterator<Item = [u8; 4]>) {
    out.extend_from_slice(&(4 * numbers.len() as u64).to_le_bytes());
    for number in numbers {
        out.extend_from_slice(&number);
    }
}
