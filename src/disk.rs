//! A file on disk for rows that are set aside.
//!
//! Rows are accessed through shared memory mappings of parts of the file. The space for a batch is allocated before
//! anything moves, so that a full disk causes an error and not a fault during an access. Once a batch is written, its
//! pages leave the memory of the process. Dropped space is returned to the disk.
//!
//! The file has no name once it is open. No other process can open, change or truncate it while it is mapped, and the
//! system frees it when the process ends, in whatever way.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use memmap2::{MmapMut, MmapOptions, UncheckedAdvice};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

#[cfg(test)]
thread_local! {
    /// Set by tests to simulate a disk of so many bytes.
    pub(crate) static PRETEND_DISK: std::cell::Cell<u64> = const { std::cell::Cell::new(u64::MAX) };
}

/// Errors of creating a file for rows.
#[derive(Debug, thiserror::Error)]
pub enum RecallFileError {
    #[error("{} is there already and is not an empty file: name one that is not there", path.display())]
    Exists { path: PathBuf },
    #[error("{} cannot be made: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// An open file without a name, for rows that leave the cache. Clones share the file, whose space is freed with the
/// last of them. Several sessions may share a file.
#[derive(Clone, Debug)]
pub struct RecallFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    name: CString,
    file: File,
    /// Used ranges in bytes: start to end.
    taken: Mutex<BTreeMap<u64, u64>>,
}

impl PartialEq for RecallFile {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for RecallFile {}

impl RecallFile {
    /// Creates a file, allocates space in it as a test, and removes its name, so that only this process can reach it.
    /// An existing empty file is used, and loses its name too.
    ///
    /// # Errors
    /// [`RecallFileError`], with the path.
    pub fn create(path: &Path) -> Result<Self, RecallFileError> {
        let failed = |error| RecallFileError::Io { path: path.into(), error };
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| failed(error.into()))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let file = match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let there = fs::metadata(path).map_err(failed)?;
                if !there.is_file() || there.len() > 0 {
                    return Err(RecallFileError::Exists { path: path.into() });
                }
                options.open(path).map_err(failed)?
            }
            made => made.map_err(failed)?,
        };
        fs::remove_file(path).map_err(failed)?;
        let made = Self(Arc::new(Inner { path: path.into(), name, file, taken: Mutex::default() }));
        Rows::new(&made, 1).and_then(|rows| rows.settle()).map_err(failed)?;
        Ok(made)
    }

    /// Returns the path that the file was created with.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Returns the same path for C.
    pub(crate) fn name(&self) -> &CStr {
        &self.0.name
    }

    /// Number of bytes that the file takes on disk; 0 where the system does not tell.
    pub fn disk_bytes(&self) -> u64 {
        /// Unit of `st_blocks`, whatever the block size of the file system.
        const BLOCK: u64 = 512;
        self.0.file.metadata().map_or(0, |file| file.blocks() * BLOCK)
    }
}

impl Inner {
    fn taken(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.taken.lock().expect("who takes space does not panic")
    }

    /// Returns unused bytes to the disk. A file system that cannot punch holes keeps those before the end of the used
    /// space.
    fn discard(&self, taken: &BTreeMap<u64, u64>, start: u64, end: u64) {
        let used = taken.last_key_value().map_or(0, |(_, &end)| end);
        #[cfg(target_os = "linux")]
        if start < used {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = retry_on_intr(|| fallocate(&self.file, hole, start, end - start));
        }
        if end > used {
            let _ = self.file.set_len(used);
        }
    }
}

/// An allocated range of the file.
#[derive(Debug)]
struct Space {
    file: RecallFile,
    start: u64,
}

impl Space {
    /// Allocates `bytes`, a multiple of the page size, in the first gap that is large enough.
    fn take(file: &RecallFile, bytes: u64) -> io::Result<Self> {
        let inner = &file.0;
        let mut taken = inner.taken();
        let mut start = 0;
        for (&next, &end) in &*taken {
            if next - start >= bytes {
                break;
            }
            start = end;
        }
        let end = start.checked_add(bytes).ok_or(io::ErrorKind::StorageFull)?;
        #[cfg(test)]
        if taken.iter().map(|(start, end)| end - start).sum::<u64>() + bytes > PRETEND_DISK.get() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if let Err(error) = allocate(&inner.file, start, bytes) {
            inner.discard(&taken, start, end);
            return Err(error);
        }
        taken.insert(start, end);
        Ok(Self { file: file.clone(), start })
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let inner = &self.file.0;
        let mut taken = inner.taken();
        if let Some(end) = taken.remove(&self.start) {
            inner.discard(&taken, self.start, end);
        }
    }
}

/// Allocates disk space; writes zeros where the file system cannot allocate otherwise.
fn allocate(file: &File, start: u64, bytes: u64) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), start, bytes)) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        done => return Ok(done?),
    }
    let mut at = start;
    while at < start + bytes {
        let n = ZEROS.len().min((start + bytes - at) as usize);
        file.write_all_at(&ZEROS[..n], at)?;
        at += n as u64;
    }
    Ok(())
}

/// Rows in the file, mapped into memory.
#[derive(Debug)]
pub(crate) struct Rows {
    // dropped first: the mapping must end before its space is freed
    map: MmapMut,
    _space: Space,
}

impl Rows {
    /// Allocates and maps `bytes` bytes, at least one. Their contents are unspecified.
    ///
    /// # Errors
    /// The system's error, where the disk is full or the file system does not support this.
    pub fn new(file: &RecallFile, bytes: usize) -> io::Result<Self> {
        let whole = bytes.checked_next_multiple_of(rustix::param::page_size()).ok_or(io::ErrorKind::StorageFull)?;
        let space = Space::take(file, whole as u64)?;
        // SAFETY: no other process can open the nameless file to change or truncate it; it reaches to the end of its last range,
        // and no two ranges overlap.
        let map = unsafe { MmapOptions::new().offset(space.start).len(bytes).map_mut(&file.0.file)? };
        Ok(Self { map, _space: space })
    }

    /// Writes the bytes to disk and removes them from the memory of the process. They are read back on access.
    ///
    /// # Errors
    /// The disk's error.
    pub fn settle(&self) -> io::Result<()> {
        self.map.flush()?;
        self.release();
        Ok(())
    }

    /// Removes the bytes from the memory of the process.
    pub fn release(&self) {
        // SAFETY: the mapping is shared: written bytes stay in the file, and are read back from there.
        let _ = unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) };
    }
}

impl Deref for Rows {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl DerefMut for Rows {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn file(folder: &tempfile::TempDir) -> RecallFile {
        RecallFile::create(&folder.path().join("rows")).unwrap()
    }

    fn filled(file: &RecallFile, bytes: usize, value: u8) -> Rows {
        let mut rows = Rows::new(file, bytes).unwrap();
        rows.fill(value);
        rows.settle().unwrap();
        rows
    }

    #[test]
    fn what_is_given_up_is_used_again_and_nothing_stays_on_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(&folder);
        assert_eq!((file.disk_bytes(), fs::read_dir(folder.path()).unwrap().count()), (0, 0));
        let mut all: Vec<Option<Rows>> = (0..5).map(|i| Some(filled(&file, 100 * PAGE + i, i as u8))).collect();
        let full = file.disk_bytes();
        assert!(full >= 504 * PAGE as u64, "{full}");
        all[1] = None;
        assert!(file.disk_bytes() <= full - 100 * PAGE as u64, "a hole is not given back");
        let two = [filled(&file, 60 * PAGE, 8), filled(&file, 41 * PAGE, 9)];
        assert_eq!(two[1]._space.start, two[0]._space.start + 60 * PAGE as u64, "they lie in the hole");
        for (i, rows) in all.iter().enumerate() {
            assert!(rows.iter().all(|rows| rows.iter().all(|&byte| byte == i as u8)), "{i}");
        }
        assert!(two[0].iter().all(|&byte| byte == 8) && two[1].iter().all(|&byte| byte == 9));
        all.reverse();
        while let Some(rows) = all.pop() {
            drop(rows);
        }
        drop(two);
        assert_eq!((file.disk_bytes(), file.0.file.metadata().unwrap().len()), (0, 0));
    }

    #[test]
    fn a_full_disk_is_an_error_and_what_is_there_stays() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(&folder);
        let rows = filled(&file, 10 * PAGE, 7);
        let before = file.disk_bytes();
        PRETEND_DISK.set(15 * PAGE as u64);
        assert_eq!(Rows::new(&file, 6 * PAGE).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(Rows::new(&file, 5 * PAGE).is_ok());
        PRETEND_DISK.set(u64::MAX);
        // more bytes than any disk has
        Rows::new(&file, 1 << 60).unwrap_err();
        Rows::new(&file, usize::MAX).unwrap_err();
        assert_eq!(file.disk_bytes(), before);
        assert!(rows.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn a_file_that_holds_something_is_refused_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes");
        fs::write(&path, "mine").unwrap();
        for path in [&path, folder.path(), Path::new("/dev/null")] {
            let error = RecallFile::create(path).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            assert!(matches!(error, RecallFileError::Exists { .. }), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        let nowhere = RecallFile::create(&path.join("x")).unwrap_err().to_string();
        assert!(nowhere.contains("notes/x") && nowhere.contains("Not a directory"), "{nowhere}");
        // an empty file, as mktemp creates it
        fs::write(&path, "").unwrap();
        let file = RecallFile::create(&path).unwrap();
        assert!(!path.exists());
        assert_eq!(filled(&file, 3, 1)[..], [1; 3]);
    }

    #[test]
    fn what_was_written_is_not_in_memory_until_it_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let rows = filled(&file(&folder), 64 << 20, 3);
        let resident = || {
            let text = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
            let own = format!("{:x}-", rows.as_ptr().addr());
            let line = text.lines().skip_while(|line| !line.starts_with(&own)).find(|line| line.starts_with("Rss:"));
            line.and_then(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok())
        };
        if cfg!(target_os = "linux") {
            assert_eq!(resident(), Some(0));
            assert!(rows.iter().all(|&byte| byte == 3));
            assert_eq!(resident(), Some(64 << 10));
            rows.release();
            assert_eq!(resident(), Some(0));
        }
    }
}
