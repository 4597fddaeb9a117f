//! Promises that need a look inside a session:
//! - `replay`: what a second reading measures equals float64;
//! - `failure`: whatever is cancelled or finds no room leaves no trace;
//! - `long`: more tokens than cells;
//! - `disk`: a session saved and loaded at every turn goes on as one never saved, and a file that does not fit is refused;
//! - `blind`: a chat turn that is still open keeps everything, unless told otherwise.

mod blind;
mod disk;
mod failure;
mod long;
mod replay;

use std::ops::ControlFlow;

use super::*;
use crate::llama::FlashAttention;
use crate::policy::Params;
use crate::tests::fixture::{self, Setup};

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
    Session::new(&fixture::model(), &SessionParams { context, policy, account_error: false }).unwrap()
}

fn read(session: &mut Session, tokens: &[Token]) {
    session.prefill(tokens, |_, _| ControlFlow::Continue(())).unwrap();
}

/// A session that has read the first `n` tokens of a real text.
fn after(n: usize, setup: Setup, n_ctx: usize, n_ubatch: u32, policy: Params) -> Session {
    let mut session = session(setup, n_ctx, n_ubatch, policy);
    read(&mut session, &fixture::tokens(&fixture::model(), n));
    session
}
