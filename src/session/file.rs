//! Saves a session to a file, and loads it.
//!
//! | bytes | content |
//! | --- | --- |
//! | 8 | magic |
//! | 4 | version |
//! | 8 + n | length and text of the settings that the session was made with, JSON |
//! | 8 + n | length and bytes of the caller's note |
//! | 8 + n | length and bytes of gvote's own state |
//! | 8 | number of batches of rows that are set aside; absent in version 2 |
//! | ... | for each batch: the number of rows of a head (8); for each head their positions, 4 bytes each, and the rows, key then value |
//! | ... | llama.cpp's state of the sequence |
//! | 32 | BLAKE3 hash of all bytes before |
//!
//! Numbers are little-endian. Cells are written and read piece by piece. A file is read twice: once to check the
//! checksum, and only then to use its contents.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Recall, RecallType, SEQ, Session, SessionError};
use crate::bytes::put_part;
use crate::cache::Layout;
use crate::llama::RopeParams;
use crate::policy::Kind;

const MAGIC: [u8; 8] = *b"gvotesn\0";
const VERSION: u32 = 3;
/// Oldest version that can be read. It has no rows set aside.
const OLDEST: u32 = 2;
const LLAMA: &str = concat!("llama.cpp ", env!("GVOTE_LLAMA_VERSION"), ", ggml ", env!("GVOTE_GGML_VERSION"));
/// Largest size in bytes of the settings in a file.
const MADE_MAX: u64 = 1 << 16;

/// Errors of saving and loading a session. The running session is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it is not a session saved by gvote")]
    Foreign,
    #[error(
        "it has version {found} of the format, and this gvote reads versions {OLDEST} to {VERSION}: load it with the gvote that saved it"
    )]
    Version { found: u32 },
    #[error("the file is damaged or cut off: it cannot be used, start a new one")]
    Damaged,
    #[error("it was saved with {found}, and this gvote has {LLAMA}: load it with the gvote that saved it")]
    Llama { found: String },
    #[error("it was saved with another model ({found}): start with that one (`model`)")]
    Model { found: String },
    #[error(
        "it was saved with other adapters, other values in place of the model file's, or another RoPE: start with the same ones (`lora`, `lora_scaled`, `override_kv`, `rope_scaling` and the like)"
    )]
    Altered,
    #[error(
        "it was saved with `{setting}` {found}, and this session has `{setting}` {here}: start with `{setting}` {found}"
    )]
    Setting { setting: &'static str, found: String, here: String },
    #[error("it holds {found} cells and there are {here}: start with `n_ctx` {found} or more")]
    Cells { found: usize, here: usize },
    #[error("its note makes no sense: {0}")]
    Note(String),
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Settings that a session was made with. A session must agree with them to load the file.
#[derive(Serialize, Deserialize)]
struct Made {
    llama: String,
    /// Description of the model, shown in the error message.
    model: String,
    fingerprint: String,
    /// See [`Session::altered`].
    #[serde(default)]
    altered: String,
    type_k: String,
    type_v: String,
    /// None where the layout of the cache is not known.
    flash_attn: Option<bool>,
    /// Whether the session can vote, so that the file contains captured data.
    votes: bool,
    policy: Kind,
    window: usize,
    sinks: usize,
    cells: usize,
    /// Number of rows of each head that are set aside.
    #[serde(default)]
    aside: usize,
    /// Storage type of these rows, a [`RecallType::name`]. Absent in older files, whose rows have the cache's own type.
    #[serde(default)]
    recall_type: Option<String>,
}

impl Session {
    /// Saves the session, with a note of the caller's own, to a file. The file is written atomically: a file that
    /// exists at `path` stays until the new one is complete. The new file is readable by its owner alone, or has the
    /// permissions of the file that it replaces. A symbolic link stays, and the file that it points to is written.
    ///
    /// Takes hardly any memory beyond the session's own.
    ///
    /// # Errors
    /// [`FileError::Io`]; [`FileError::Session`] for a session behind a mask ([`policy::Params::exact`](crate::policy::Params)).
    pub fn save_to(&mut self, path: &Path, note: &[u8]) -> Result<(), FileError> {
        self.check_unmasked()?;
        let path = &followed(path)?;
        if path.file_name().is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "that is no file name").into());
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // otherwise the error of a missing folder would name the temporary file
        fs::metadata(folder)?;
        let mut file = tempfile::Builder::new().prefix(".gvote-").suffix(".tmp").tempfile_in(folder)?;
        self.write_file(file.as_file_mut(), note)?;
        if let Ok(replaced) = fs::metadata(path) {
            file.as_file().set_permissions(replaced.permissions())?;
        }
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        sync_folder(folder)?;
        Ok(())
    }

    fn write_file(&mut self, file: &mut File, note: &[u8]) -> Result<(), FileError> {
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&VERSION.to_le_bytes());
        put_part(&mut head, &serde_json::to_vec(&self.made()).map_err(io::Error::from)?);
        put_part(&mut head, note);
        let mut out = Hashing { inner: BufWriter::new(file), hash: blake3::Hasher::new() };
        out.write_all(&head)?;
        self.write(&mut out)?;
        let checksum = out.hash.finalize();
        out.inner.write_all(checksum.as_bytes())?;
        Ok(out.inner.flush()?)
    }

    /// Replaces this session by a saved one. Returns the result of `read_note` on the note.
    ///
    /// Takes as much memory as the cells in use now, until the file is known to fit.
    ///
    /// # Errors
    /// [`FileError`], with advice; the session is then as before.
    pub fn load_from<T>(
        &mut self,
        path: &Path,
        read_note: impl FnOnce(&[u8]) -> Result<T, String>,
    ) -> Result<T, FileError> {
        let mut file = File::open(path)?;
        let (len, version) = checked(&mut file)?;
        let mut from = BufReader::new(file).take(len);
        // `checked` has verified these bytes
        let _ = numbers::<{ MAGIC.len() + size_of::<u32>() }>(&mut from)?;
        let made = part(&mut from, MADE_MAX)?;
        let made: Made = serde_json::from_slice(&made).map_err(|_| FileError::Damaged)?;
        self.check_made(&made)?;
        let note = read_note(&part(&mut from, len)?).map_err(FileError::Note)?;
        self.read(&mut from, version > OLDEST)?;
        Ok(note)
    }

    fn made(&self) -> Made {
        let [type_k, type_v] =
            [self.context.type_k, self.context.type_v].map(|cache_type| cache_type.name().to_owned());
        Made {
            llama: LLAMA.into(),
            model: self.model().description(),
            fingerprint: self.model().fingerprint(),
            altered: self.altered(),
            type_k,
            type_v,
            flash_attn: Layout::of(&self.ctx, SEQ).ok().map(|layout| !layout.info.v_trans),
            votes: self.voter.is_some(),
            policy: self.policy.policy,
            window: self.policy.window,
            sinks: self.policy.sinks,
            cells: self.cells_used(),
            aside: self.rows_aside(),
            recall_type: Some(self.recall_type().name().into()),
        }
    }

    /// Hashes everything besides the model file that keys and values depend on: adapters, overridden metadata, RoPE
    /// settings. Empty where there is nothing.
    fn altered(&self) -> String {
        let rope = &self.context.rope;
        let mut what = self.model().alterations();
        if *rope != RopeParams::default() {
            what.push(format!("{rope:?}"));
        }
        if what.is_empty() { String::new() } else { blake3::hash(what.join("\n").as_bytes()).to_string() }
    }

    fn check_made(&self, found: &Made) -> Result<(), FileError> {
        let here = self.made();
        if found.llama != here.llama {
            return Err(FileError::Llama { found: found.llama.clone() });
        }
        if found.fingerprint != here.fingerprint {
            return Err(FileError::Model { found: found.model.clone() });
        }
        if found.altered != here.altered {
            return Err(FileError::Altered);
        }
        let on_off =
            |flash_attn: Option<bool>| flash_attn.map_or("auto", |on| if on { "on" } else { "off" }).to_owned();
        for (setting, found, here) in [
            ("type_k", found.type_k.clone(), here.type_k),
            ("type_v", found.type_v.clone(), here.type_v),
            ("flash_attn", on_off(found.flash_attn), on_off(here.flash_attn)),
        ] {
            if found != here {
                return Err(FileError::Setting { setting, found, here });
            }
        }
        if found.votes != here.votes {
            let [found, here] = [found.policy, here.policy].map(|kind| kind.to_string());
            return Err(FileError::Setting { setting: "policy", found, here });
        }
        for (setting, found, here) in [("window", found.window, here.window), ("sinks", found.sinks, here.sinks)] {
            if found != here {
                let [found, here] = [found, here].map(|n| n.to_string());
                return Err(FileError::Setting { setting, found, here });
            }
        }
        if found.aside > 0 && self.recall() == Recall::Off {
            return Err(FileError::Setting { setting: "recall", found: "auto".into(), here: "off".into() });
        }
        let found_type = found.recall_type.as_deref().unwrap_or(RecallType::Cache.name());
        let here_type = self.recall_type().name();
        if found.aside > 0 && found_type != here_type {
            let [found, here] = [found_type, here_type].map(str::to_owned);
            return Err(FileError::Setting { setting: "recall_type", found, here });
        }
        if found.cells > self.n_ctx_most() {
            return Err(FileError::Cells { found: found.cells, here: self.n_ctx_most() });
        }
        Ok(())
    }
}

/// Verifies the checksum. Returns the number of bytes before the checksum, and the version. Rewinds the file.
fn checked(file: &mut File) -> Result<(u64, u32), FileError> {
    let len = file.metadata()?.len().saturating_sub(blake3::OUT_LEN as u64);
    let mut from = BufReader::new(&mut *file);
    let magic: [u8; MAGIC.len()] = match numbers(&mut from) {
        Err(FileError::Damaged) => return Err(FileError::Foreign),
        magic => magic?,
    };
    if magic != MAGIC {
        return Err(FileError::Foreign);
    }
    let version: [u8; size_of::<u32>()] = numbers(&mut from)?;
    let found = u32::from_le_bytes(version);
    if !(OLDEST..=VERSION).contains(&found) {
        return Err(FileError::Version { found });
    }
    let rest = len.checked_sub((MAGIC.len() + version.len()) as u64).ok_or(FileError::Damaged)?;
    let mut hash = blake3::Hasher::new();
    hash.update(&magic).update(&version);
    hash.update_reader((&mut from).take(rest))?;
    if numbers::<{ blake3::OUT_LEN }>(&mut from)? != *hash.finalize().as_bytes() {
        return Err(FileError::Damaged);
    }
    file.seek(SeekFrom::Start(0))?;
    Ok((len, found))
}

/// Reads the next `N` bytes.
fn numbers<const N: usize>(from: &mut impl Read) -> Result<[u8; N], FileError> {
    let mut bytes = [0; N];
    match from.read_exact(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(FileError::Damaged),
        read => Ok(read.map(|()| bytes)?),
    }
}

/// Reads a part that `put_part` wrote, of at most `most` bytes.
fn part(from: &mut impl Read, most: u64) -> Result<Vec<u8>, FileError> {
    let len = u64::from_le_bytes(numbers(from)?);
    let mut part = Vec::new();
    if len > most || from.take(len).read_to_end(&mut part)? as u64 != len {
        return Err(FileError::Damaged);
    }
    Ok(part)
}

/// Writer that adds all bytes to the checksum and passes them on.
struct Hashing<W> {
    inner: W,
    hash: blake3::Hasher,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Follows symbolic links to the final path, which need not exist yet.
fn followed(path: &Path) -> io::Result<PathBuf> {
    /// The limit of Linux.
    const LINKS: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match fs::read_link(&path) {
            // a relative target begins in the folder of the link
            Ok(target) => path = path.parent().unwrap_or(Path::new("")).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("there are too many symbolic links on the way"))
}

/// Syncs a folder, which makes a rename in it durable.
fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // not every file system can sync a folder
        Err(error) if error.kind() == io::ErrorKind::InvalidInput || cfg!(not(unix)) => Ok(()),
        synced => synced,
    }
}
