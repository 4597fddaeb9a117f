//! Text files.

use std::path::Path;
use std::str::Utf8Error;
use std::{fs, io};

const BYTE_ORDER_MARK: &str = "\u{feff}";

/// Removes the byte-order mark that some editors put at the start of a text.
pub fn without_mark(text: &str) -> &str {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Works like [`without_mark`] for bytes that may not be text.
pub fn bytes_without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BYTE_ORDER_MARK.as_bytes()).unwrap_or(bytes)
}

/// Returns the text of a file without a byte-order mark.
///
/// # Errors
/// [`Utf8Error`] if the bytes are not UTF-8.
pub fn of_bytes(bytes: &[u8]) -> Result<String, Utf8Error> {
    str::from_utf8(bytes_without_mark(bytes)).map(str::to_owned)
}

/// Reads a text file without a byte-order mark.
///
/// # Errors
/// Those of reading; `InvalidData` if the file is not UTF-8.
pub fn read(path: &Path) -> io::Result<String> {
    of_bytes(&fs::read(path)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("not UTF-8 text: {error}")))
}
