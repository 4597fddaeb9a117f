//! A file on disk for rows that are set aside.
//!
//! Rows are reached through shared mappings of parts of it. The space for a batch is taken before anything moves, so that a full disk
//! is an error and no fault in the middle; once a batch is written, its pages leave the memory of the process. What is given up goes
//! back to the disk.
//!
//! The file has no name from the moment that it is open: nobody else can open it, change it or cut it short while it is mapped, and the
//! system frees it when the process ends, however that ends.

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
    /// Tests set it to have a disk of so many bytes.
    pub(crate) static PRETEND_DISK: std::cell::Cell<u64> = const { std::cell::Cell::new(u64::MAX) };
}

/// Why there is no file to set rows aside in.
#[derive(Debug, thiserror::Error)]
pub enum RecallFileError {
    #[error("{} is there already and is not an empty file: name one that is not there", path.display())]
    Exists { path: PathBuf },
    #[error("{} cannot be made: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// An open file without a name, for rows that leave the cache. Clones are the same file; with the last one its space is free again.
/// Several sessions may share it.
#[derive(Clone, Debug)]
pub struct RecallFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    name: CString,
    file: File,
    /// Beginnings and ends of what is in use, in bytes.
    taken: Mutex<BTreeMap<u64, u64>>,
}

impl PartialEq for RecallFile {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for RecallFile {}

impl RecallFile {
    /// Makes a file, takes space in it to try it, and takes its name away. Only this process can reach it then. An empty file that is
    /// there is used, and loses its name too.
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

    /// The name that it was made with.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The same for C.
    pub(crate) fn name(&self) -> &CStr {
        &self.0.name
    }

    /// Bytes of the disk that it takes; 0 where the system does not tell.
    pub fn disk_bytes(&self) -> u64 {
        /// Of what the system counts in, whatever the file system's own blocks are.
        const BLOCK: u64 = 512;
        self.0.file.metadata().map_or(0, |file| file.blocks() * BLOCK)
    }
}

impl Inner {
    fn taken(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.taken.lock().expect("who takes space does not panic")
    }

    /// Gives bytes back to the disk that nobody uses any more; a file system that cannot keeps those before the end.
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

/// A part of the file.
#[derive(Debug)]
struct Space {
    file: RecallFile,
    start: u64,
}

impl Space {
    /// Takes so many bytes, a multiple of a page, where the first gap has room for them.
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

/// Takes room on the disk, with zeros where the file system has no other way.
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

/// Bytes in the file.
#[derive(Debug)]
pub(crate) struct Rows {
    // ends before its space is given back
    map: MmapMut,
    _space: Space,
}

impl Rows {
    /// Room for some bytes, one at least. What they are is not said.
    ///
    /// # Errors
    /// That of the system, where the disk is full or the file system cannot do this.
    pub fn new(file: &RecallFile, bytes: usize) -> io::Result<Self> {
        let whole = bytes.checked_next_multiple_of(rustix::param::page_size()).ok_or(io::ErrorKind::StorageFull)?;
        let space = Space::take(file, whole as u64)?;
        // SAFETY: the file has no name and is not handed out, so that nobody else changes or shortens it; it is as long as its last
        // space that is taken, and no two spaces overlap.
        let map = unsafe { MmapOptions::new().offset(space.start).len(bytes).map_mut(&file.0.file)? };
        Ok(Self { map, _space: space })
    }

    /// Writes them to the disk, and takes them out of the memory of the process; they come back when they are read.
    ///
    /// # Errors
    /// That of the disk.
    pub fn settle(&self) -> io::Result<()> {
        self.map.flush()?;
        self.release();
        Ok(())
    }

    /// Takes them out of the memory of the process.
    pub fn release(&self) {
        // SAFETY: a shared mapping of a file: what was written stays in the file, and is read from there.
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
        // more than any disk has
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
        // as mktemp makes it
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
