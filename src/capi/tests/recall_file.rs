//! Rows that a vote removed from the cache lie in a file of the app's choice.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use super::app::*;
use crate::capi::*;
use crate::disk::PRETEND_DISK;

const N: usize = 300;

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn in_file(path: &CStr) -> gvote_params {
    gvote_params { max_cells: 150, recall: GVOTE_RECALL_FILE, recall_file: path.as_ptr(), ..defaults() }
}

fn heard(params: &gvote_params) -> (App, Handle) {
    let app = App::new(&tiny("llama"), &Shape { n_seq_max: 2, n_ctx: 1024, ..ONE });
    let handle = Handle::with(&app, params);
    app.decode(&[(0, 0, &words(N, 0))]);
    (app, handle)
}

fn params_of(handle: &Handle) -> gvote_params {
    let mut params = defaults();
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_get_params(handle.0, &raw mut params) }, GVOTE_OK);
    params
}

#[test]
fn every_byte_comes_back_from_the_file_and_the_file_has_no_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = c_path(&folder.path().join("rows"));
    let (app, handle) = heard(&in_file(&path));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let before = app.state(0);
    let report = handle.compressed(&app, 0);
    let (other, in_memory) = heard(&gvote_params { max_cells: 150, ..defaults() });
    assert_eq!(in_memory.compressed(&other, 0).bytes_aside, report.bytes_aside);
    assert!(report.bytes_aside > 0 && app.state(0) == other.state(0));
    assert!(handle.save(&app, 0) == in_memory.save(&other, 0), "the place is no part of what is saved");
    // the state of each handle can be loaded by the other
    let known = in_memory.save(&other, 0);
    assert_eq!(handle.load(&app, 0, &known), GVOTE_OK, "{}", handle.error());
    assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, N as u32));
    assert!(app.state(0) == before);
}

#[test]
fn a_file_that_cannot_be_made_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("notes");
    fs::write(&there, "mine").unwrap();
    let refused = |params: &gvote_params, expected: gvote_status, words: &[&str]| {
        let mut status = GVOTE_OK;
        // SAFETY: both objects are alive.
        let g = unsafe { gvote_new(params, &raw mut status) };
        let error = error_of(ptr::null());
        assert!(g.is_null() && status == expected, "{status}: {error}");
        assert!(error.contains("recall_file") && words.iter().all(|word| error.contains(word)), "{error}");
    };
    let at = |path: &Path| c_path(path);
    refused(&in_file(&at(&there)), GVOTE_ERROR_FILE, &["notes", "name one that is not there"]);
    refused(&in_file(&at(&folder.path().join("no/rows"))), GVOTE_ERROR_FILE, &["no/rows", "No such file"]);
    refused(&in_file(c""), GVOTE_ERROR_FILE, &["No such file"]);
    refused(&in_file(c"/tmp/\xff"), GVOTE_ERROR_PARAMS, &["UTF-8"]);
    refused(&gvote_params { recall_file: ptr::null(), ..in_file(c"") }, GVOTE_ERROR_NULL, &["NULL"]);
    assert_eq!(fs::read(&there).unwrap(), b"mine");
    // where rows go elsewhere, the pointer is not read
    let nonsense = ptr::without_provenance(1);
    drop(Handle::new(&gvote_params { recall_file: nonsense, ..defaults() }));
}

#[test]
fn the_settings_name_the_file_and_the_same_name_is_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let [path, other] = ["rows", "others"].map(|name| c_path(&folder.path().join(name)));
    let (app, handle) = heard(&in_file(&path));
    let params = params_of(&handle);
    assert_eq!(params.recall, GVOTE_RECALL_FILE);
    // SAFETY: the text lives as long as the settings.
    assert_eq!(unsafe { CStr::from_ptr(params.recall_file) }, path.as_c_str());
    handle.compressed(&app, 0);
    let change = |params: &gvote_params| {
        // SAFETY: both objects are alive.
        unsafe { gvote_set_params(handle.0, params) }
    };
    assert_eq!(change(&gvote_params { max_cells: 120, ..params }), GVOTE_OK, "{}", handle.error());
    assert_eq!(change(&in_file(&other)), GVOTE_ERROR_PARAMS);
    assert!(handle.error().contains("`recall` cannot change"), "{}", handle.error());
    assert_eq!(change(&defaults()), GVOTE_ERROR_PARAMS);
    assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, N as u32));
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_detach(handle.0, app.ctx) }, GVOTE_OK);
    assert_eq!(change(&in_file(&other)), GVOTE_OK, "{}", handle.error());
    assert_eq!(change(&defaults()), GVOTE_OK);
    assert!(params_of(&handle).recall_file.is_null());
    // a caller whose struct has no `recall_file`: rows are set aside in memory
    let old = gvote_params { size: size_of::<gvote_params>() - size_of::<usize>(), ..defaults() };
    drop(Handle::new(&old));
    let of_old = gvote_params { recall: GVOTE_RECALL_FILE, ..old };
    // SAFETY: the struct is alive.
    assert!(unsafe { gvote_new(&raw const of_old, ptr::null_mut()) }.is_null());
}

#[test]
fn as_q8_0_it_takes_half_the_room() {
    let params = gvote_params { max_cells: 150, ..defaults() };
    let q8_0 = gvote_params { recall_type: GVOTE_RECALL_TYPE_Q8_0, ..params };
    let [(app, exact), (other, rounded)] = [params, q8_0].map(|params| heard(&params));
    assert_eq!(params_of(&rounded).recall_type, GVOTE_RECALL_TYPE_Q8_0);
    let before = app.state(0);
    let [bytes, half] = [exact.compressed(&app, 0), rounded.compressed(&other, 0)].map(|report| report.bytes_aside);
    // 34 bytes for 64, plus the positions
    assert!(half < bytes * 6 / 10, "{half} of {bytes}");
    // each refuses the bytes of the other
    assert_eq!(exact.load(&app, 0, &rounded.save(&other, 0)), GVOTE_ERROR_STATE);
    assert_eq!(rounded.load(&other, 0, &exact.save(&app, 0)), GVOTE_ERROR_STATE);
    for (app, handle) in [(&app, &exact), (&other, &rounded)] {
        assert_eq!(handle.expand(app, 0, 0), (GVOTE_OK, N as u32));
    }
    assert!(app.state(0) == before && other.state(0) != before);
    // SAFETY: both objects are alive.
    assert_eq!(unsafe { gvote_set_params(rounded.0, &raw const params) }, GVOTE_ERROR_PARAMS);
    assert!(rounded.error().contains("recall_type"), "{}", rounded.error());
    let nonsense = gvote_params { recall_type: 2, ..params };
    // SAFETY: the struct is alive.
    assert!(unsafe { gvote_new(&raw const nonsense, ptr::null_mut()) }.is_null());
}

#[test]
fn on_a_full_disk_nothing_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let (app, handle) = heard(&in_file(&c_path(&folder.path().join("rows"))));
    let (before, known) = (app.state(0), handle.save(&app, 0));
    PRETEND_DISK.set(4096);
    let status = handle.compress(&app, 0).0;
    PRETEND_DISK.set(u64::MAX);
    assert_eq!(status, GVOTE_ERROR_FILE, "{}", handle.error());
    assert!(handle.error().contains("rows") && !handle.error().contains("--"), "{}", handle.error());
    assert!(app.state(0) == before && handle.save(&app, 0) == known);
    handle.compressed(&app, 0);
    assert_eq!(handle.expand(&app, 0, 0), (GVOTE_OK, N as u32));
    assert!(app.state(0) == before);
}
