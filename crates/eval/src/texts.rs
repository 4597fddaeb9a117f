//! Texts for continuations: a file, or the source code below a folder.

use std::path::Path;

use super::tasks::TaskError;
use crate::text;

/// Extensions of source code files.
const CODE: &[&str] =
    &["c", "cc", "cpp", "cs", "cu", "go", "h", "hpp", "java", "js", "kt", "py", "rb", "rs", "sh", "swift", "ts"];

/// Reads a text file, or all source files below a folder, one after another in order of their names. In a folder,
/// hidden folders and files that are not UTF-8 are left out.
///
/// # Errors
/// [`TaskError::Io`]; [`TaskError::NoCode`] for a folder without source files.
pub fn read(path: &Path) -> Result<String, TaskError> {
    let at = |error| TaskError::Io(path.to_owned(), error);
    if !path.is_dir() {
        return text::read(path).map_err(at);
    }
    let mut text = String::new();
    add_folder(path, &mut text)?;
    if text.is_empty() { Err(TaskError::NoCode(path.to_owned())) } else { Ok(text) }
}

fn add_folder(folder: &Path, text: &mut String) -> Result<(), TaskError> {
    let at = |error| TaskError::Io(folder.to_owned(), error);
    let mut entries: Vec<_> = std::fs::read_dir(folder).map_err(at)?.collect::<Result<_, _>>().map_err(at)?;
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let (path, kind) = (entry.path(), entry.file_type().map_err(at)?);
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        if kind.is_dir() && !is_hidden {
            add_folder(&path, text)?;
        } else if kind.is_file() && path.extension().is_some_and(|e| CODE.iter().any(|known| e == *known)) {
            text.push_str(&text::read(&path).unwrap_or_default());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_its_source_files_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let add = |name: &str, text: &[u8]| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        add("b.rs", b"two ");
        add("a/deep/z.py", b"one ");
        add("c.cpp", b"three");
        add("data.json", b"{}");
        add("b2.rs", b"\xef\xbb\xbfmore ");
        add("d.rs", &[0xFF, 0xFE]);
        add(".git/hook.sh", b"no");
        assert_eq!(read(folder.path()).unwrap(), "one two more three");
        assert_eq!(read(&folder.path().join("data.json")).unwrap(), "{}");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let message = read(folder.path()).unwrap_err().to_string();
        assert_eq!(message, format!("{}: no source files (--code)", folder.path().display()));
        assert!(read(Path::new("/nowhere")).unwrap_err().to_string().starts_with("/nowhere: "));
    }
}
