//! The file of a saved conversation.
//!
//! | bytes | content |
//! | --- | --- |
//! | 8 | magic |
//! | 4 | version |
//! | 8 + n | length and text of the head, JSON |
//! | 8 + n | length and bytes of the cache |
//! | 8 | FNV-1a of all before |
//!
//! Numbers are little-endian.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

const MAGIC: &[u8; 8] = b"gvotechT";
const VERSION: u32 = 2;
const CHECKSUM_LEN: usize = size_of::<u64>();

/// Writes a file that is there whole or not at all; one that it replaces stays until then.
pub fn write(path: &Path, head: &impl Serialize, cache: &[u8]) -> Result<()> {
    let temporary = temporary_beside(path)?;
    let written = write_new(&temporary, &encode(head, cache)?).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // the error that matters is the first one
        let _ = fs::remove_file(&temporary);
        return Err(error.into());
    }
    Ok(())
}

/// Reads a file back.
///
/// # Errors
/// When it is not such a file, of another version, or damaged.
pub fn read<H: DeserializeOwned>(path: &Path) -> Result<(H, Vec<u8>)> {
    decode(&fs::read(path)?)
}

fn temporary_beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().context("that is no file name")?;
    let mut temporary = name.to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    Ok(path.with_file_name(temporary))
}

fn write_new(path: &Path, data: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(data)?;
    file.sync_all()?;
    drop(file);
    // a rename is lasting once the folder is on disk, where folders can be opened
    if let Some(Ok(folder)) = path.parent().map(File::open) {
        let _ = folder.sync_all();
    }
    Ok(())
}

fn encode(head: &impl Serialize, cache: &[u8]) -> Result<Vec<u8>> {
    let head = serde_json::to_vec(head)?;
    let mut out = Vec::with_capacity(MAGIC.len() + head.len() + cache.len() + 4 * CHECKSUM_LEN);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    for part in [&head[..], cache] {
        out.extend_from_slice(&(part.len() as u64).to_le_bytes());
        out.extend_from_slice(part);
    }
    out.extend_from_slice(&fnv1a(&out).to_le_bytes());
    Ok(out)
}

fn decode<H: DeserializeOwned>(data: &[u8]) -> Result<(H, Vec<u8>)> {
    const DAMAGED: &str = "the file is damaged or cut off";
    let Some(rest) = data.strip_prefix(MAGIC) else {
        bail!("it is not a conversation saved by gvote");
    };
    let (version, rest) = rest.split_first_chunk().context(DAMAGED)?;
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        bail!("it has version {version} of the format, and this gvote reads version {VERSION}");
    }
    let (body, checksum) = data.split_last_chunk().context(DAMAGED)?;
    if fnv1a(body) != u64::from_le_bytes(*checksum) {
        bail!(DAMAGED);
    }
    let (head, rest) = split_part(rest).context(DAMAGED)?;
    let (cache, _) = split_part(rest).context(DAMAGED)?;
    Ok((serde_json::from_slice(head).context("its head makes no sense")?, cache.to_vec()))
}

fn split_part(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = data.split_first_chunk()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)
}

/// FNV-1a, 64 bits: finds accidents, not forgeries.
fn fnv1a(data: &[u8]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    data.iter().fold(OFFSET, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Vec<u8> {
        encode(&vec!["a", "head"], b"and a cache").unwrap()
    }

    #[test]
    fn the_checksum_is_fnv1a() {
        // the vectors of the reference implementation
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chat");
        for cache in [&b"one"[..], b"", b"three"] {
            write(&path, &vec!["head"], cache).unwrap();
            let (head, read_back): (Vec<String>, _) = read(&path).unwrap();
            assert_eq!((head, &read_back[..]), (vec!["head".to_owned()], cache));
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn damage_is_noticed() {
        let whole = example();
        assert!(decode::<Vec<String>>(&whole).is_ok());
        for len in 0..whole.len() {
            assert!(decode::<Vec<String>>(&whole[..len]).is_err(), "cut off at {len}");
        }
        for i in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[i] ^= 1;
            assert!(decode::<Vec<String>>(&flipped).is_err(), "a bit flipped in byte {i}");
        }
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("folder");
        fs::create_dir(&path).unwrap();
        assert!(write(&path, &1, b"").is_err());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }
}
