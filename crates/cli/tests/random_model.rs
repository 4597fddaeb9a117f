//! Tests of models with random weights, in the program and the library.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/random_model.rs"]
mod random_model;

use std::ops::ControlFlow;

use cli::{bare, finish};
use gvote::llama::{ContextParams, Model, ModelParams, Token};
use gvote::policy::{Kind, Params};
use gvote::{Session, SessionParams};
use random_model::{Shape, Weights};

const SHAPE: Shape = Shape {
    weights: Weights::Q4_0,
    n_layer: 4,
    n_embd: 256,
    n_head: 8,
    n_head_kv: 2,
    n_ff: 512,
    n_vocab: 512,
    n_ctx: 2048,
};

fn written(shape: Shape) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("random.gguf");
    let size = shape.write(&path, 1).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
    (dir, path)
}

/// Returns the root mean square.
fn spread(values: &[f32]) -> f32 {
    (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt()
}

#[test]
fn logits_are_finite_and_spread_as_those_of_a_real_model() {
    for weights in [Weights::Q4_0, Weights::Q8_0] {
        let (_dir, path) = written(Shape { weights, n_layer: 24, ..SHAPE });
        let model = Model::load(&path, &ModelParams::default(), |_| true).unwrap();
        assert_eq!((model.n_layer(), model.n_vocab(), model.n_ctx_train()), (24, 512, 2048));
        let params = SessionParams {
            context: ContextParams { n_ctx: 1024, n_threads: 1, n_threads_batch: 1, ..ContextParams::default() },
            policy: Params { max_cells: Some(300), ..Params::new(Kind::Gvote) },
            ..SessionParams::default()
        };
        let mut session = Session::new(&model, &params).unwrap();
        let tokens: Vec<Token> = (0..600).map(|i| i * 37 % 512).collect();
        session.prefill(&tokens, |_, _| ControlFlow::Continue(())).unwrap();
        let before = spread(session.logits());
        assert!((1.0..10.0).contains(&before), "{weights:?}: {before}");
        let report = session.compress().unwrap();
        assert!(report.cells_after <= 300, "{report:?}");
        session.decode(7).unwrap();
        let after = spread(session.logits());
        assert!((1.0..10.0).contains(&after), "{weights:?}: {after}");
    }
}

#[test]
fn one_seed_makes_one_file() {
    let (_dir, path) = written(SHAPE);
    let (_other_dir, other) = written(SHAPE);
    assert!(std::fs::read(&path).unwrap() == std::fs::read(other).unwrap());
    SHAPE.write(&path, 2).unwrap();
    assert!(std::fs::read(&path).unwrap() != std::fs::read(written(SHAPE).1).unwrap());
}

#[test]
fn a_shape_that_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (shape, hint) in [
        (Shape { n_embd: 250, ..SHAPE }, "--n-head"),
        (Shape { n_head_kv: 3, ..SHAPE }, "--n-head-kv"),
        (Shape { n_ff: 500, ..SHAPE }, "multiples of 32"),
        (Shape { n_layer: 0, ..SHAPE }, "0"),
    ] {
        let error = shape.write(&dir.path().join("random.gguf"), 1).unwrap_err();
        assert!(error.to_string().contains(hint), "{error}");
    }
}

#[test]
fn gvote_bench_runs_it_with_random_tokens() {
    let (_dir, path) = written(SHAPE);
    let file = path.to_str().unwrap();
    let flags = ["-p", "0", "-n", "2", "-d", "300", "-r", "1", "-t", "1", "--max-cells", "150", "-o", "jsonl"];
    let done = finish(&mut bare(&[&["bench", "-m", file], &flags[..]].concat())).ok();
    let rows = done.json();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0]["model_type"], "llama ?B Q4_0", "{}", rows[0]);
    assert_eq!(rows[0]["cells"], 300);
    assert!(rows[1]["cells"].as_u64().unwrap() <= 150, "{}", rows[1]);
}
