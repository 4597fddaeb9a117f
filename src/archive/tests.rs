//! Rows in an archive, in memory and in a file, are found again.

use super::*;
use crate::disk::PRETEND_DISK;

/// Returns archives of two heads with rows of 3 and 5 bytes: one in memory, one in a file.
fn archives() -> [Archive; 2] {
    let folder = tempfile::tempdir().unwrap();
    let file = RecallFile::create(&folder.path().join("rows")).unwrap();
    let shape = Arc::new(Shape { start: vec![0, 3, 8] });
    [None, Some(file)].map(|file| Archive { shape: shape.clone(), form: RecallType::Cache, file, batches: Vec::new() })
}

/// Sets rows of each head aside, at the given positions. Every byte of a row is its position.
fn push(archive: &mut Archive, positions: [&[u32]; 2]) {
    let mut batch = archive.room(positions[0].len()).unwrap();
    for ((to, rows), positions) in batch.heads_mut().zip(positions) {
        to.copy_from_slice(positions);
        let bytes = rows.len() / positions.len();
        rows.chunks_mut(bytes).zip(positions).for_each(|(row, &pos)| row.fill(pos as u8));
    }
    archive.push(batch).unwrap();
}

fn two_batches() -> [Archive; 2] {
    archives().map(|mut archive| {
        push(&mut archive, [&[3, 9], &[1, 4]]);
        push(&mut archive, [&[2, 5, 11], &[7, 8, 12]]);
        archive
    })
}

fn disk_bytes(archive: &Archive) -> u64 {
    archive.file.as_ref().map_or(0, RecallFile::disk_bytes)
}

#[test]
fn rows_are_found_by_head_and_position() {
    for archive in two_batches() {
        assert_eq!((archive.len(), archive.bytes(), archive.end()), (5, 5 * 8 + 10 * 4, 13));
        for (head, expected, bytes) in [(0, [2, 3, 5, 9, 11], 3), (1, [1, 4, 7, 8, 12], 5)] {
            let entries = archive.entries(head);
            assert_eq!(entries.iter().map(|entry| entry.pos).collect::<Vec<_>>(), expected);
            for entry in entries {
                assert_eq!(archive.row(head, entry), vec![entry.pos as u8; bytes]);
            }
        }
        let left = archive.without(&[true, false]);
        assert_eq!((left.len(), left.end(), left.recall()), (3, 13, archive.recall()));
        let emptied = archive.emptied();
        assert_eq!((emptied.len(), emptied.bytes(), emptied.end()), (0, 0, 0));
        assert_eq!(emptied.recall(), archive.recall());
    }
}

#[test]
fn what_is_given_up_takes_no_room_on_the_disk() {
    let [_, archive] = two_batches();
    let both = disk_bytes(&archive);
    let left = archive.without(&[true, false]);
    let copy = left.clone();
    drop(archive);
    assert!(disk_bytes(&left) < both && disk_bytes(&left) > 0, "{both}");
    let emptied = left.emptied();
    drop(left);
    assert_eq!((copy.row(0, copy.entries(0)[2]), disk_bytes(&emptied) > 0), (&[11; 3][..], true));
    drop(copy);
    assert_eq!(disk_bytes(&emptied), 0);
}

#[test]
fn what_was_written_is_read_and_nothing_else() {
    for (archive, empty) in two_batches().into_iter().zip(archives()) {
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();
        assert_eq!(bytes.len(), archive.written());
        let read = |bytes: &[u8], most| empty.read(&mut &bytes[..], most, |_, pos| pos.is_sorted_by(|a, b| a < b));
        let again = read(&bytes, 5).unwrap();
        let mut written = Vec::new();
        again.write(&mut written).unwrap();
        assert_eq!(written, bytes);
        assert_eq!((again.entries(1).len(), again.recall()), (5, empty.recall()));
        for len in 0..bytes.len() {
            assert_eq!(read(&bytes[..len], 5).unwrap_err(), ReadError::CutOff, "{len}");
        }
        assert_eq!(read(&bytes, 4).unwrap_err(), ReadError::Nonsense);
        // the second position of the first head, behind two numbers: not ascending, then one that the other batch has
        for value in [0, 5] {
            bytes[20] = value;
            assert_eq!(read(&bytes, 5).unwrap_err(), ReadError::Nonsense);
        }
        let mut nothing = Vec::new();
        empty.write(&mut nothing).unwrap();
        assert_eq!((nothing.len(), read(&nothing, 0).unwrap().len()), (8, 0));
    }
}

#[test]
fn one_from_a_file_is_written_as_one_from_memory() {
    let [memory, file] = two_batches().map(|archive| {
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();
        bytes
    });
    assert_eq!(memory, file);
}

#[test]
fn pages_hold_the_same_rows() {
    for archive in two_batches() {
        let paged = archive.paged(2).unwrap();
        assert_eq!(paged.batches().iter().map(|batch| batch.len()).collect::<Vec<_>>(), [2, 2, 1]);
        assert!(Arc::ptr_eq(&paged.batches()[0], &archive.batches()[0]), "what is no larger is shared");
        for head in 0..2 {
            let rows = [&archive, &paged].map(|archive| {
                let rows = archive.entries(head).into_iter();
                rows.map(|entry| (entry.pos, archive.row(head, entry))).collect::<Vec<_>>()
            });
            assert_eq!(rows[0], rows[1]);
        }
    }
}

#[test]
fn the_newest_rows_come_back_first() {
    assert_eq!(newest(&[0, 4, 9], &[1, 2, 3, 7], 5), [0, 3, 4, 7, 9]);
    assert_eq!(newest(&[0, 4, 9], &[1, 2], 5), [0, 1, 2, 4, 9]);
    assert_eq!(newest(&[0, 4], &[], 2), [0, 4]);
    // without room, the newest one replaces the one before it
    assert_eq!(newest(&[0, 4], &[1, 7], 2), [0, 7]);
    assert_eq!(newest(&[0, 4], &[1], 2), [0, 4]);
}

#[test]
fn without_memory_nothing_is_set_aside() {
    for mut archive in two_batches() {
        PRETEND_FULL.set(true);
        let refused = archive.room(3).unwrap_err();
        PRETEND_FULL.set(false);
        assert_eq!((refused, archive.len()), (NoRoom::Memory { bytes: 24 }, 5));
    }
}

#[test]
fn on_a_full_disk_nothing_is_set_aside() {
    let [mut memory, mut file] = two_batches();
    PRETEND_DISK.set(0);
    memory.room(3).unwrap();
    let Err(NoRoom::Disk { bytes: 24, path, reason }) = file.room(3) else { panic!("there is room") };
    assert!(path.ends_with("rows") && reason.contains("no storage space"), "{reason}");
    assert!(matches!(file.paged(1), Err(NoRoom::Disk { .. })));
    PRETEND_DISK.set(u64::MAX);
    assert_eq!((file.len(), file.row(1, file.entries(1)[0])), (5, &[1; 5][..]));
}
