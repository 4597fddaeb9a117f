//! Checks that the header and the exports agree. Types come from the header; only signatures and names can differ.

use std::collections::BTreeSet;

use super::header;

/// Fails to compile unless the export and the header's declaration have the same type, and lists the names for the test
/// below.
macro_rules! same {
    ($($name:ident $arguments:tt;)+) => {
        $(const _: () = {
            const fn of_one_type<F: Copy>(_: F, _: F) {}
            of_one_type(
                super::$name as same!(@fn $arguments),
                header::$name as same!(@fn $arguments),
            );
        };)+
        pub(super) const NAMES: &[&str] = &[$(stringify!($name)),+];
    };
    (@fn ()) => { unsafe extern "C" fn() -> _ };
    (@fn (_)) => { unsafe extern "C" fn(_) -> _ };
    (@fn (_, _)) => { unsafe extern "C" fn(_, _) -> _ };
    (@fn (_, _, _)) => { unsafe extern "C" fn(_, _, _) -> _ };
    (@fn (_, _, _, _)) => { unsafe extern "C" fn(_, _, _, _) -> _ };
    (@fn (_, _, _, _, _)) => { unsafe extern "C" fn(_, _, _, _, _) -> _ };
    (@fn (_, _, _, _, _, _)) => { unsafe extern "C" fn(_, _, _, _, _, _) -> _ };
    (@fn (_, _, _, _, _, _, _)) => { unsafe extern "C" fn(_, _, _, _, _, _, _) -> _ };
    (@fn (_, _, _, _, _, _, _, _)) => { unsafe extern "C" fn(_, _, _, _, _, _, _, _) -> _ };
}

same! {
    gvote_version();
    gvote_llama_version();
    gvote_status_string(_);
    gvote_params_init(_);
    gvote_new(_, _);
    gvote_free(_);
    gvote_last_error(_);
    gvote_set_params(_, _);
    gvote_get_params(_, _);
    gvote_set_log_callback(_, _, _);
    gvote_set_progress_callback(_, _, _);
    gvote_cancel(_);
    gvote_cancel_clear(_);
    gvote_attach(_, _);
    gvote_detach(_, _);
    gvote_cb_eval(_, _, _);
    gvote_set_next_callback(_, _, _);
    gvote_compress(_, _, _, _);
    gvote_plan(_, _, _, _);
    gvote_vote_if_due(_, _, _, _, _, _);
    gvote_make_room(_, _, _, _, _, _, _);
    gvote_expand(_, _, _, _, _);
    gvote_seq_cells(_, _, _, _);
    gvote_seq_exact_from(_, _, _, _);
    gvote_seq_positions(_, _, _, _, _, _, _, _);
    gvote_seq_protect(_, _, _, _, _, _);
    gvote_seq_truncate(_, _, _, _);
    gvote_state_size(_, _, _, _);
    gvote_state_get(_, _, _, _, _, _);
    gvote_state_set(_, _, _, _, _);
}

const HEADER: &str = include_str!("../../ffi/gvote.h");

#[test]
fn every_function_of_the_header_is_exported_and_no_other() {
    let declared: BTreeSet<&str> = HEADER
        .lines()
        .filter_map(|line| line.strip_prefix("GVOTE_API "))
        .filter_map(|line| line.split('(').next()?.split([' ', '*']).next_back())
        .collect();
    let names: BTreeSet<&str> = NAMES.iter().copied().collect();
    assert_eq!(declared, names);
    let exported: BTreeSet<&str> = include_str!("../capi.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("pub unsafe extern \"C\" fn ")?.split('(').next())
        .collect();
    assert_eq!(exported, names);
}

#[test]
fn every_function_is_documented() {
    let lines: Vec<&str> = HEADER.lines().collect();
    for (i, line) in lines.iter().enumerate().filter(|(_, line)| line.starts_with("GVOTE_API ")) {
        assert!(lines[i - 1].trim_end().ends_with("*/"), "{line} has no comment before it");
    }
}

#[test]
fn the_header_names_the_version_of_the_package() {
    let version = [header::GVOTE_VERSION_MAJOR, header::GVOTE_VERSION_MINOR, header::GVOTE_VERSION_PATCH];
    assert_eq!(version.map(|n| n.to_string()).join("."), env!("CARGO_PKG_VERSION"));
}
