//! Rows that left the cache come back from a file on disk.

use super::recall::{N, assert_comes_back_from, hundred, started_as};
use super::*;
use crate::archive::RecallFile;
use crate::compact::CompactError;
use crate::disk::PRETEND_DISK;
use crate::tests::fixture::{F16, F16_FLASH, Q8_0, on_device};

fn file() -> RecallFile {
    let folder = tempfile::tempdir().unwrap();
    RecallFile::create(&folder.path().join("rows")).unwrap()
}

#[test]
fn a_vote_and_an_expansion_leave_every_byte_and_nothing_in_the_file() {
    let file = file();
    let recall = Recall::File(file.clone());
    for setup in [F16, F16_FLASH, Q8_0] {
        assert_comes_back_from(&recall, "llama", setup, &hundred());
        on_device(|| assert_comes_back_from(&recall, "llama", setup, &hundred()));
        assert_comes_back_from(&recall, "gemma2", setup, &hundred());
        assert_eq!(file.disk_bytes(), 0);
    }
}

#[test]
fn what_is_forgotten_takes_no_room_any_more() {
    let file = file();
    let mut session = started_as("llama", F16, hundred(), Recall::File(file.clone()));
    let compressed = |session: &mut Session| {
        session.compress().unwrap();
        assert_eq!(session.recall(), Recall::File(file.clone()));
        assert!(file.disk_bytes() as usize > session.bytes_aside() / 2);
    };
    compressed(&mut session);
    session.clear();
    assert_eq!(file.disk_bytes(), 0);
    read(&mut session, &words(N, 1));
    compressed(&mut session);
    session.truncate(60).unwrap();
    assert_eq!((file.disk_bytes(), session.recall()), (0, Recall::File(file.clone())));
    read(&mut session, &words(N - 60, 1));
    compressed(&mut session);
    session.set_recall(Recall::Auto);
    assert_eq!((file.disk_bytes(), session.rows_aside()), (0, 0));
}

/// A chat of many turns in which rows are set aside, come back and are paged gives the same with a file as in memory.
#[test]
fn turns_in_few_cells_are_the_same_with_a_file_and_saved_the_same() {
    let file = file();
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::model("llama");
    let open = |recall| open_as(&model, F16, N_CTX, hundred(), recall);
    let mut sessions = [Recall::Auto, Recall::File(file.clone())].map(open);
    for i in 0..20 {
        let logits = sessions.each_mut().map(|session| {
            session.prefill_long(&words(30 + 7 * i % 23, i), |_, _| ControlFlow::Continue(())).unwrap();
            session.compress().unwrap();
            answer(session, 5);
            (session.logits().to_vec(), session.bytes_aside())
        });
        assert!(logits[0] == logits[1], "turn {i}");
    }
    assert!(sessions[0].n_past() as usize > 2 * N_CTX);
    let path = folder.path().join("chat");
    let saved = sessions.each_mut().map(|session| {
        session.save_to(&path, b"").unwrap();
        std::fs::read(&path).unwrap()
    });
    assert!(saved[0] == saved[1]);
    // each file can be loaded into either kind of session
    let loaded = [Recall::Auto, Recall::File(file)].map(|recall| {
        let mut session = open(recall);
        session.load_from(&path, |_| Ok(())).unwrap();
        session.prefill_long(&words(40, 3), |_, _| ControlFlow::Continue(())).unwrap();
        session.save()
    });
    assert!(loaded[0] == loaded[1]);
}

#[test]
fn on_a_full_disk_a_vote_is_refused_and_nothing_has_changed() {
    let file = file();
    for setup in [F16, F16_FLASH, Q8_0] {
        let mut session = started_as("llama", setup, hundred(), Recall::File(file.clone()));
        let refused = |session: &mut Session, work: &dyn Fn(&mut Session) -> Result<(), SessionError>| {
            let (before, on_disk) = (session.save(), file.disk_bytes());
            PRETEND_DISK.set(on_disk + 4096);
            let error = work(session).unwrap_err();
            PRETEND_DISK.set(u64::MAX);
            let text = error.to_string();
            assert!(text.contains("on the disk") && text.contains(file.path().to_str().unwrap()), "{text}");
            let is_full = matches!(error, SessionError::Vote(VoteError::Compact(CompactError::ArchiveFile { .. })));
            assert!(is_full && session.save() == before && file.disk_bytes() == on_disk, "{error:?}");
        };
        let vote = |session: &mut Session| session.compress().map(|_| ());
        refused(&mut session, &vote);
        on_device(|| refused(&mut session, &vote));
        session.compress().unwrap();
        let saved = session.save();
        let mut other = started_as("llama", setup, hundred(), Recall::File(file.clone()));
        refused(&mut other, &|session| session.load(&saved));
        other.load(&saved).unwrap();
        session.limit_cells(180);
        refused(&mut session, &|session| session.expand().map(|_| ()));
        assert_eq!(session.expand().unwrap().cells_after, 180);
    }
}
