//! Sessions in files.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::llama::{ModelParams, RopeParams};
use crate::tests::fixture::{F16, F16_FLASH, Q4_0, Q8_0};
use crate::tests::tiny;

const TURNS: usize = 200;

/// Runs one turn as a chat does: marks, a message, an occasional vote, an answer.
fn turn(session: &mut Session, i: usize) -> Vec<Token> {
    session.mark();
    session.prefill_long(&words(5 + 7 * i % 23, i), |_, _| ControlFlow::Continue(())).unwrap();
    if i % 4 == 3 {
        session.compress().unwrap();
    }
    session.mark();
    answer(session, (3 + i % 9) as i32)
}

fn chat_with_and_without_saving(arch: &str, setup: Setup, turns: usize, policy: &Params) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat");
    let mut never = open(arch, setup, N_CTX, policy.clone());
    let mut always = open(arch, setup, N_CTX, policy.clone());
    for i in 0..turns {
        let name = format!("{arch}, {setup:?}, turn {i}");
        assert_eq!(turn(&mut always, i), turn(&mut never, i), "{name}");
        assert_same(&always, &never, arch, &name);
        assert_eq!((always.n_past(), always.cells_used()), (never.n_past(), never.cells_used()), "{name}");
        always.save_to(&path, b"").unwrap();
        always = open(arch, setup, N_CTX, policy.clone());
        assert!(always.load_from(&path, keep).unwrap().is_empty(), "{name}");
        // generate again; of a window cache, only the cells that the next token sees are saved
        if i % 10 == 9 && !has_window(arch) {
            let [again, expected] = [&mut always, &mut never].map(|session| {
                let pos = session.marks.last().unwrap().pos;
                session.truncate(pos).unwrap();
                answer(session, 6)
            });
            assert_eq!(again, expected, "{name}, once more");
        }
    }
    if !has_window(arch) {
        assert!(always.save() == never.save(), "{arch}, {setup:?}");
    }
}

fn has_window(arch: &str) -> bool {
    arch == "gemma2"
}

/// Compares two sessions. A saved window cache lacks the cells outside the window, so that the others are loaded into
/// other cells, and sums add up in another order.
fn assert_same(a: &Session, b: &Session, arch: &str, name: &str) {
    let apart = a.logits().iter().zip(b.logits()).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(if has_window(arch) { apart < 0.05 } else { a.logits() == b.logits() }, "{name}: {apart}");
}

#[test]
fn a_chat_of_200_turns_saved_and_loaded_at_every_turn_goes_on_as_one_never_saved() {
    chat_with_and_without_saving("llama", F16, TURNS, &quick());
}

#[test]
fn so_it_does_with_every_cache_type_beside_a_window_and_under_the_full_policy() {
    for setup in [F16_FLASH, Q8_0, Q4_0] {
        chat_with_and_without_saving("llama", setup, 24, &quick());
    }
    // a choice that rounding cannot change
    let recent = Params { max_cells: Some(200), ..Params::new(Kind::StreamingLlm) };
    for setup in [F16, F16_FLASH, Q8_0] {
        chat_with_and_without_saving("gemma2", setup, 24, &recent);
    }
    chat_with_and_without_saving("qwen3", F16, 10, &Params::new(Kind::Full));
}

/// Accepts any note.
fn keep(note: &[u8]) -> Result<Vec<u8>, String> {
    Ok(note.to_vec())
}

/// Returns a session after several turns, and its file.
fn saved(folder: &Path) -> (Session, PathBuf) {
    let path = folder.join("chat");
    let mut session = open("llama", F16, N_CTX, quick());
    read(&mut session, &words(250, 1));
    session.compress().unwrap();
    session.mark();
    read(&mut session, &words(20, 2));
    session.save_to(&path, b"a note").unwrap();
    (session, path)
}

/// Tries to load a file, and checks that the session is unchanged.
fn refused(session: &mut Session, path: &Path) -> FileError {
    let before = session.save();
    let error = session.load_from(path, keep).unwrap_err();
    assert!(session.save() == before, "{error}");
    error
}

#[test]
fn a_file_keeps_the_note_and_may_be_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (mut session, path) = saved(folder.path());
    assert_eq!(session.load_from(&path, keep).unwrap(), b"a note");
    for note in [&b"another"[..], b""] {
        session.save_to(&path, note).unwrap();
        assert_eq!(session.load_from(&path, keep).unwrap(), note);
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
}

#[cfg(unix)]
#[test]
fn a_file_behind_symbolic_links_is_written_and_the_links_stay() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let (mut session, _) = saved(folder.path());
    let [elsewhere, links] = ["elsewhere", "links"].map(|name| folder.path().join(name));
    [&elsewhere, &links].into_iter().for_each(|folder| fs::create_dir(folder).unwrap());
    let (target, first, second) = (elsewhere.join("chat"), links.join("first"), links.join("second"));
    symlink("../elsewhere/chat", &first).unwrap();
    symlink(&first, &second).unwrap();
    // first a new file, then a replacement
    for note in [&b"one"[..], b"two"] {
        session.save_to(&second, note).unwrap();
        assert_eq!(session.load_from(&target, keep).unwrap(), note);
    }
    assert_eq!(session.load_from(&second, keep).unwrap(), b"two");
    assert!([&first, &second].iter().all(|link| link.is_symlink()) && !target.is_symlink());
    assert_eq!([&elsewhere, &links].map(|folder| fs::read_dir(folder).unwrap().count()), [1, 2], "no temporary file");
    let circle = links.join("circle");
    symlink("circle", &circle).unwrap();
    let error = session.save_to(&circle, b"").unwrap_err().to_string();
    assert!(error.contains("symbolic links"), "{error}");
}

#[test]
fn a_note_that_its_reader_refuses_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (mut session, path) = saved(folder.path());
    read(&mut session, &words(10, 5));
    let before = session.save();
    let error = session.load_from(&path, |_| Err::<(), _>("it is in Latin".into())).unwrap_err();
    assert!(error.to_string().contains("Latin"), "{error}");
    assert!(session.save() == before);
}

#[test]
fn a_session_without_tokens_is_saved_too_and_empties_the_one_it_replaces() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty");
    open("llama", F16, N_CTX, quick()).save_to(&path, b"nothing yet").unwrap();
    let (mut session, _) = saved(folder.path());
    assert_eq!(session.load_from(&path, keep).unwrap(), b"nothing yet");
    assert_eq!((session.n_past(), session.cells_used()), (0, 0));
    assert!(session.logits().is_empty());
}

#[test]
fn a_failed_save_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let (mut session, path) = saved(folder.path());
    let before = fs::read(&path).unwrap();
    let blocked = folder.path().join("folder");
    fs::create_dir(&blocked).unwrap();
    assert!(session.save_to(&blocked, b"").is_err());
    let error = session.save_to(&folder.path().join("none/chat"), b"").unwrap_err().to_string();
    assert!(error.contains("No such file") && !error.contains(".tmp"), "{error}");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "no temporary file is left");
    assert!(fs::read(&path).unwrap() == before);
}

/// Places to cut and to flip: all of the head, and some of the rest.
fn places(len: usize) -> impl Iterator<Item = usize> {
    (0..600).chain((600..len - 40).step_by(len / 150)).chain(len - 40..len)
}

#[test]
fn a_file_that_is_cut_off_is_refused_wherever_that_is() {
    let folder = tempfile::tempdir().unwrap();
    let (mut session, path) = saved(folder.path());
    let whole = fs::read(&path).unwrap();
    for len in places(whole.len()) {
        fs::write(&path, &whole[..len]).unwrap();
        let error = refused(&mut session, &path);
        assert!(matches!(error, FileError::Damaged | FileError::Foreign), "{len}: {error}");
    }
    fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
    assert!(matches!(refused(&mut session, &path), FileError::Damaged), "longer than it was");
    fs::write(&path, &whole).unwrap();
    session.load_from(&path, keep).unwrap();
}

#[test]
fn a_file_with_one_wrong_byte_is_refused_wherever_that_is() {
    let folder = tempfile::tempdir().unwrap();
    let (mut session, path) = saved(folder.path());
    let whole = fs::read(&path).unwrap();
    for place in places(whole.len()) {
        let mut flipped = whole.clone();
        flipped[place] ^= 1 << (place % 8);
        fs::write(&path, flipped).unwrap();
        let error = refused(&mut session, &path);
        let expected = match place {
            0..8 => matches!(error, FileError::Foreign),
            // another version that can be read
            8 => matches!(error, FileError::Damaged),
            9..12 => matches!(error, FileError::Version { .. }),
            _ => matches!(error, FileError::Damaged),
        };
        assert!(expected, "byte {place}: {error}");
    }
}

#[test]
fn a_file_of_other_settings_is_refused_with_the_one_to_change() {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = saved(folder.path());
    let f16_k_only = Setup { k: Q8_0.k, ..F16_FLASH };
    let with = |change: fn(&mut Params)| {
        let mut policy = quick();
        change(&mut policy);
        policy
    };
    for (setup, n_ctx, policy, setting) in [
        (f16_k_only, N_CTX, quick(), "`type_k` f16"),
        (Setup { v: Q8_0.v, ..F16_FLASH }, N_CTX, quick(), "`type_v` f16"),
        (F16_FLASH, N_CTX, quick(), "`flash_attn` off"),
        (F16, 100, with(|p| p.max_cells = Some(90)), "`n_ctx` 220"),
        (F16, N_CTX, with(|p| p.window = 32), "`window` 64"),
        (F16, N_CTX, with(|p| p.sinks = 8), "`sinks` 4"),
        (F16, N_CTX, Params::new(Kind::Full), "`policy` gvote"),
    ] {
        let mut session = open("llama", setup, n_ctx, policy);
        read(&mut session, &words(80, 3));
        let error = refused(&mut session, &path).to_string();
        assert!(error.contains(setting), "{setting}: {error}");
        // the session can continue
        assert_eq!(answer(&mut session, 3).len(), 3);
    }
}

#[test]
fn a_file_of_another_model_is_refused_and_one_of_the_same_elsewhere_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = saved(folder.path());
    for arch in ["qwen2", "qwen3", "gemma2"] {
        let mut session = open(arch, F16, N_CTX, quick());
        read(&mut session, &words(80, 3));
        let error = refused(&mut session, &path);
        assert!(matches!(error, FileError::Model { .. }), "{error}");
        assert!(error.to_string().contains("llama"), "it is named: {error}");
    }
    // the same file under another name, and one with another norm
    let spec = tiny::SPECS[0];
    let same = tiny::Tiny::new(folder.path(), spec);
    assert_eq!(same.model.fingerprint(), tiny::model("llama").fingerprint());
    let norm: Vec<u8> = same.weights["output_norm.weight"].iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut bytes = fs::read(&same.path).unwrap();
    let at = bytes.windows(norm.len()).position(|window| window == norm).unwrap();
    bytes[at] ^= 1;
    let other = folder.path().join("other.gguf");
    fs::write(&other, bytes).unwrap();
    let other = Model::load(&other, &ModelParams::default(), |_| true).unwrap();
    assert_ne!(other.fingerprint(), same.model.fingerprint());
}

#[test]
fn a_file_whose_keys_came_about_otherwise_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let plain = tiny::Tiny::new(folder.path(), tiny::SPECS[0]);
    let lora = plain.adapter(folder.path()).path;
    let adapted = |scale| ModelParams { adapters: vec![(lora.clone(), scale)], ..ModelParams::default() };
    let overridden = ModelParams { kv_overrides: vec!["llama.rope.scale=float:2".parse().unwrap()], ..adapted(1.0) };
    let load = |params| Model::load(&plain.path, &params, |_| true).unwrap();
    let mut all = [ModelParams::default(), adapted(1.0), adapted(0.5), overridden].map(load).map(|model| {
        let mut session = open_with(&model, F16, N_CTX, quick());
        read(&mut session, &words(80, 1));
        session
    });
    let stretched =
        ContextParams { rope: RopeParams { freq_scale: 0.5, ..RopeParams::default() }, ..all[0].context.clone() };
    let stretched = SessionParams { context: stretched, policy: quick(), ..Default::default() };
    let mut stretched = Session::new(all[0].model(), &stretched).unwrap();
    read(&mut stretched, &words(80, 1));

    let path = folder.path().join("chat");
    for i in 0..all.len() {
        all[i].save_to(&path, b"").unwrap();
        assert!(matches!(refused(&mut stretched, &path), FileError::Altered));
        for (j, other) in all.iter_mut().enumerate() {
            if i == j {
                other.load_from(&path, keep).unwrap();
            } else {
                assert!(matches!(refused(other, &path), FileError::Altered), "{i} {j}");
            }
        }
    }
}

/// Replaces the settings in a file, and updates the checksum.
fn forge(path: &Path, change: impl Fn(&str) -> String) {
    let bytes = fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[12..20].try_into().unwrap()) as usize;
    let made = change(std::str::from_utf8(&bytes[20..20 + len]).unwrap());
    let mut out = bytes[..12].to_vec();
    crate::bytes::put_part(&mut out, made.as_bytes());
    out.extend_from_slice(&bytes[20 + len..bytes.len() - blake3::OUT_LEN]);
    let checksum = blake3::hash(&out);
    out.extend_from_slice(checksum.as_bytes());
    fs::write(path, out).unwrap();
}

#[test]
fn a_file_of_another_llama_cpp_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (mut session, path) = saved(folder.path());
    forge(&path, |made| made.replace("llama.cpp 0", "llama.cpp 9"));
    let error = refused(&mut session, &path);
    assert!(matches!(error, FileError::Llama { .. }) && error.to_string().contains("llama.cpp 9"), "{error}");
}

/// With a valid checksum, only llama.cpp can still refuse the file.
#[test]
fn a_file_that_lies_is_refused_by_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = saved(folder.path());
    forge(&path, |made| made.replace("\"type_k\":\"f16\"", "\"type_k\":\"q8_0\"").replace("false", "true"));
    let mut session = open("llama", Setup { k: Q8_0.k, ..F16_FLASH }, N_CTX, quick());
    read(&mut session, &words(80, 3));
    let error = refused(&mut session, &path);
    assert!(matches!(error, FileError::Session(SessionError::Llama(LlamaError::State(_)))), "{error}");
    assert_eq!(answer(&mut session, 3).len(), 3);
}

#[test]
fn what_is_not_a_session_is_told_from_a_damaged_one() {
    let folder = tempfile::tempdir().unwrap();
    let (mut session, path) = saved(folder.path());
    fs::write(&path, "{\"messages\": []}").unwrap();
    assert!(matches!(refused(&mut session, &path), FileError::Foreign));
    fs::write(&path, "").unwrap();
    assert!(matches!(refused(&mut session, &path), FileError::Foreign));
    assert!(matches!(refused(&mut session, &folder.path().join("none")), FileError::Io(_)));
    assert!(matches!(refused(&mut session, folder.path()), FileError::Io(_)), "a folder");
}
