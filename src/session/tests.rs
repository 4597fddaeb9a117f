//! Tests of a session's internals:
//! - `replay`: the replay's measurements equal a float64 reference;
//! - `failure`: a cancelled or failed operation changes nothing;
//! - `long`: prompts with more tokens than cells;
//! - `endless`: an endless answer needs no more cells and no more memory;
//! - `protect`: markers and the system message stay if the settings say so;
//! - `walk`: after random sequences of operations the cache holds the expected rows;
//! - `cut`: truncation is exact or refused;
//! - `disk`: a session that is saved and loaded at every turn equals one that never is, and invalid files are refused;
//! - `recall`: rows that left the cache come back unchanged;
//! - `recall_file`: rows come back from a file too, and its space is freed;
//! - `recall_type`: rows set aside as q8_0 take half the space and are rounded once;
//! - `grow`: a session that outgrows its cells moves into a larger context;
//! - `hostile`: no changed number in a saved session does harm;
//! - `blind`: a vote in an open chat turn keeps everything, unless the settings limit the cells.

mod blind;
mod cut;
mod disk;
mod endless;
mod failure;
mod grow;
mod hostile;
mod long;
mod protect;
mod recall;
mod recall_file;
mod recall_type;
mod replay;
mod walk;
mod when;

use std::ops::ControlFlow;

use super::*;
use crate::llama::{FlashAttention, SamplerParams};
use crate::policy::Params;
use crate::tests::fixture::{self, Setup};
use crate::tests::tiny::{self, N_VOCAB};

fn session(setup: Setup, n_ctx: usize, n_ubatch: u32, policy: Params) -> Session {
    let flash_attn = if setup.flash { FlashAttention::On } else { FlashAttention::Off };
    let context = ContextParams {
        n_ctx: n_ctx as u32,
        n_ubatch,
        n_threads: 2,
        n_threads_batch: 2,
        flash_attn,
        type_k: setup.k,
        type_v: setup.v,
        ..ContextParams::default()
    };
    Session::new(&fixture::model(), &SessionParams { context, policy, ..Default::default() }).unwrap()
}

fn read(session: &mut Session, tokens: &[Token]) {
    session.prefill(tokens, |_, _| ControlFlow::Continue(())).unwrap();
}

/// Returns a session that has read the first `n` tokens of a real text.
fn after(n: usize, setup: Setup, n_ctx: usize, n_ubatch: u32, policy: Params) -> Session {
    let mut session = session(setup, n_ctx, n_ubatch, policy);
    read(&mut session, &fixture::tokens(&fixture::model(), n));
    session
}

/// Cells of a session with a tiny model.
const N_CTX: usize = 320;

/// Opens a session with a tiny random model, which is fast.
fn open(arch: &str, setup: Setup, n_ctx: usize, policy: Params) -> Session {
    open_with(&tiny::model(arch), setup, n_ctx, policy)
}

/// Opens such a session that sets rows aside when they leave the cache.
fn open_recalling(arch: &str, setup: Setup, n_ctx: usize, policy: Params) -> Session {
    open_as(&tiny::model(arch), setup, n_ctx, policy, Recall::Auto)
}

fn open_with(model: &Model, setup: Setup, n_ctx: usize, policy: Params) -> Session {
    open_as(model, setup, n_ctx, policy, Recall::Off)
}

fn open_as(model: &Model, setup: Setup, n_ctx: usize, policy: Params, recall: Recall) -> Session {
    let params = SessionParams { policy, recall, ..params(setup, n_ctx) };
    Session::new(model, &params).unwrap()
}

fn params(setup: Setup, n_ctx: usize) -> SessionParams {
    let flash_attn = if setup.flash { FlashAttention::On } else { FlashAttention::Off };
    let context = ContextParams {
        n_ctx: n_ctx as u32,
        n_ubatch: 64,
        n_threads: 1,
        n_threads_batch: 1,
        flash_attn,
        type_k: setup.k,
        type_v: setup.v,
        ..ContextParams::default()
    };
    SessionParams { context, ..Default::default() }
}

/// Settings of a fast vote without a trial; the cap decides every vote of a long chat.
fn quick() -> Params {
    Params { target_kl: None, lost_mass: 0.1, max_cells: Some(200), ..Params::default() }
}

fn words(n: usize, kind: usize) -> Vec<Token> {
    (0..n).map(|i| ((7 * i + (3 + kind) * i * i / 5 + 11 * kind) % N_VOCAB) as Token).collect()
}

fn answer(session: &mut Session, n: i32) -> Vec<Token> {
    let mut sampler =
        Sampler::new(session.model(), &SamplerParams { temp: 0.0, ..SamplerParams::default() }, 0).unwrap();
    let mut tokens = Vec::new();
    let each = |token| {
        tokens.push(token);
        ControlFlow::Continue(())
    };
    session.generate(&mut sampler, n, each).unwrap();
    tokens
}
