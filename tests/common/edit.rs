//! Changes to valid bytes, described by other bytes: from a fuzzer, or drawn by a test.

/// Bytes that describe one change: the operation, the place, and a number.
pub const EDIT: usize = 1 + size_of::<u32>() + size_of::<u64>();

/// Returns `bytes` with the changes that `data` describes.
pub fn edited(mut bytes: Vec<u8>, data: &[u8]) -> Vec<u8> {
    for edit in data.chunks_exact(EDIT) {
        let (place, number) = edit[1..].split_at(size_of::<u32>());
        let place = u32::from_le_bytes(place.try_into().expect("four bytes"));
        let place = place as usize % bytes.len().max(1);
        let length = match edit[0] % 8 {
            0 | 1 => 1,
            2..=4 => 4,
            5 => 8,
            6 => {
                bytes.truncate(place);
                continue;
            }
            _ => {
                let n = usize::from(number[0]);
                bytes.splice(place.., number[1..].iter().cycle().take(n).copied().collect::<Vec<_>>());
                continue;
            }
        };
        let end = (place + length).min(bytes.len());
        bytes[place.min(end)..end].copy_from_slice(&number[..end - place.min(end)]);
    }
    bytes
}
