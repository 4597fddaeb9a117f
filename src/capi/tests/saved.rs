#![forbid(unsafe_code)]

use super::app::*;
use crate::capi::header::*;

const N: usize = 300;

fn params() -> gvote_params {
    gvote_params { max_cells: 200, ..defaults() }
}

fn shape() -> Shape {
    Shape { n_seq_max: 2, ..ONE }
}

#[test]
fn a_saved_sequence_goes_on_in_another_context_and_under_another_id() {
    let model = tiny("llama");
    let app = App::new(&model, &shape());
    let handle = Handle::with(&app, &params());
    app.decode(&[(0, 0, &words(N, 0))]);
    handle.compressed(&app, 0);
    app.decode(&[(0, N as i32, &words(60, 1))]);
    let (state, known) = (app.state(0), handle.save(&app, 0));
    let expected = handle.compressed(&app, 0);
    let kept: Vec<_> = (0..3).map(|layer| handle.positions(&app, 0, layer, 0)).collect();

    let later = App::new(&model, &shape());
    let other = Handle::with(&later, &params());
    later.decode(&[(0, 0, &words(40, 9))]);
    later.load(1, &state);
    assert_eq!(other.compress(&later, 1).0, GVOTE_ERROR_NOT_SEEN, "before it is told");
    assert_eq!(other.load(&later, 1, &known), GVOTE_OK, "{}", other.error());
    assert_eq!(other.cells(&later, 1), (GVOTE_OK, 260));
    let got = other.compressed(&later, 1);
    assert_eq!(
        (got.cells_before, got.cells_after, got.bound),
        (expected.cells_before, expected.cells_after, expected.bound)
    );
    let again: Vec<_> = (0..3).map(|layer| other.positions(&later, 1, layer, 0)).collect();
    assert_eq!(again, kept);
}

#[test]
fn bytes_that_are_cut_off_or_of_another_sequence_are_refused() {
    let model = tiny("llama");
    let app = App::new(&model, &shape());
    let handle = Handle::with(&app, &params());
    app.decode(&[(0, 0, &words(N, 0)), (1, 0, &words(N - 20, 2))]);
    handle.compressed(&app, 0);
    let known = handle.save(&app, 0);
    let cells = handle.cells(&app, 0);

    for len in (0..64).chain((64..known.len()).step_by(997)).chain([known.len() - 1]) {
        assert_eq!(handle.load(&app, 0, &known[..len]), GVOTE_ERROR_STATE, "{len} bytes");
    }
    let longer = [known.as_slice(), &[0]].concat();
    assert_eq!(handle.load(&app, 0, &longer), GVOTE_ERROR_STATE);
    assert_eq!(handle.load(&app, 1, &known), GVOTE_ERROR_STATE, "of another sequence");
    assert!(handle.error().contains("cells"), "{}", handle.error());
    assert_eq!(handle.cells(&app, 0), cells, "what is known stays");
    assert_eq!(handle.load(&app, 0, &known), GVOTE_OK);

    let gemma = App::new(&tiny("gemma2"), &shape());
    let foreign = Handle::with(&gemma, &params());
    gemma.decode(&[(0, 0, &words(N, 0))]);
    assert_eq!(foreign.load(&gemma, 0, &known), GVOTE_ERROR_STATE, "of another model");
    let others = Handle::with(&app, &gvote_params { window: 32, ..params() });
    assert_eq!(others.load(&app, 0, &known), GVOTE_ERROR_STATE, "of another window");
}

/// Every byte is changed in turn: an accepted state still votes, or the vote says why not.
#[test]
fn damaged_bytes_never_do_harm() {
    let app = App::new(&tiny("llama"), &shape());
    let handle = Handle::with(&app, &gvote_params { ratio: 0.9, max_cells: 0, ..params() });
    app.decode(&[(0, 0, &words(140, 0))]);
    let known = handle.save(&app, 0);
    let mut refused = 0;
    let places = (0..160).chain((160..known.len()).step_by(4999));
    for place in places {
        for value in [0x00, 0x7f, 0xff] {
            let mut bytes = known.clone();
            bytes[place] = value;
            match handle.load(&app, 0, &bytes) {
                GVOTE_OK => {
                    assert_eq!(handle.cells(&app, 0), (GVOTE_OK, 140));
                    let status = handle.plan(&app, 0).0;
                    assert!([GVOTE_OK, GVOTE_ERROR_NOT_SEEN].contains(&status), "{place}: {}", handle.error());
                }
                status => {
                    assert_eq!(status, GVOTE_ERROR_STATE, "{place}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 50, "{refused}");
}
