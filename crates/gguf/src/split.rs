//! Models in several files: `NAME-00001-of-00003.gguf` and so on (`llama_split_path()`).

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::entry::{Entry, Kind};
use super::info::Keys;
use super::walk::bad;
use super::{Gguf, GgufError, OneFile, Part, check, info, open_file};

/// Maximum number of files of a model: the format counts them in 16 bits.
const PARTS_MAX: u64 = u16::MAX as u64;

/// Reads the other files of a model and combines all of them.
pub(super) fn join(path: &Path, mut first: OneFile) -> Result<Gguf, GgufError> {
    let size = first.size;
    let fault = |fault| GgufError::of(fault, path, size);
    let number = |key| first.entry(key).and_then(|entry| Some((entry.as_u64()?, entry.offset)));
    let (count, at) = number("split.count").unwrap_or((1, 0));
    if count > PARTS_MAX {
        return Err(fault(bad(at, format!("it counts {count} parts (split.count)"))));
    }
    let no = number("split.no").map_or(0, |(no, _)| no);
    let total = number("split.tensors.count");
    let mut faults = Vec::new();
    if count > 1 && no > 0 {
        let first = part_path(path, no, count, 0).unwrap_or_else(|| part_name("NAME", 0, count).into());
        return Err(GgufError::NotFirstPart { path: path.to_owned(), part: no + 1, count, first });
    }

    let mut parts = vec![Part { path: path.to_owned(), size }];
    let mut tensors = std::mem::take(&mut first.found.tensors);
    let mut names: HashSet<String> = HashSet::new();
    if count > 1 {
        names.extend(tensors.iter().map(|tensor| tensor.name.clone()));
    }
    for i in 1..count {
        let Some(part_path) = part_path(path, 0, count, i) else {
            let should = part_name("NAME", 0, count);
            return Err(GgufError::PartName { path: path.to_owned(), count, should });
        };
        let missing = |_| GgufError::MissingPart { path: part_path.clone(), part: i + 1, count };
        fs::metadata(&part_path).map_err(missing)?;
        let (file, size) = open_file(&part_path)?;
        let part = OneFile::parse(&part_path, file, size)?;
        let fault = |fault| GgufError::of(fault, &part_path, size);
        let number = part.entry("split.no");
        if number.and_then(Entry::as_u64) != Some(i) {
            let at = number.map_or(0, |entry| entry.offset);
            return Err(fault(bad(at, format!("its split.no is not {i}, as its name says"))));
        }
        // llama.cpp asserts this type.
        if number.is_some_and(|entry| entry.kind != Kind::U16) {
            faults.push(format!("split.no of part {} of {count} is no 16-bit number", i + 1));
        }
        for mut tensor in part.found.tensors {
            if !names.insert(tensor.name.clone()) {
                return Err(fault(bad(tensor.offset, format!("the tensor {:?} is in two parts", tensor.name))));
            }
            tensor.part = parts.len();
            tensors.push(tensor);
        }
        parts.push(Part { path: part_path, size });
    }

    if let Some((total, at)) = total
        && count > 1
        && total != tensors.len() as u64
    {
        let what = format!("its parts hold {} tensors, and it counts {total} (split.tensors.count)", tensors.len());
        return Err(fault(bad(at, what)));
    }
    let (version, alignment, entries) = (first.version, first.found.alignment, first.found.entries);
    let keys = Keys::of(&entries).map_err(fault)?;
    let info = info::describe(&keys, &tensors).map_err(fault)?;
    faults.extend(check::faults(&keys, &info, &tensors, first.found.twins.as_ref()));
    Ok(Gguf { version, alignment, parts, entries, tensors, info, faults })
}

fn part_name(prefix: &str, no: u64, count: u64) -> String {
    format!("{prefix}-{:05}-of-{count:05}.gguf", no + 1)
}

/// Returns the path of part `no`, beside part `known` of the same model; None if part `known` is named differently.
fn part_path(path: &Path, known: u64, count: u64, no: u64) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let prefix = name.strip_suffix(&part_name("", known, count))?;
    Some(path.with_file_name(part_name(prefix, no, count)))
}
