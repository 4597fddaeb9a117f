//! Protects the chat template's markers and the system message in a prompt that does not fit.

use super::*;
use crate::policy::Evict;
use crate::tests::fixture::F16;

const CELLS: usize = 256;

/// Returns a chat of several turns that is longer than the cache, and the number of tokens of its system message.
fn chat() -> (Vec<Token>, usize) {
    let model = fixture::model();
    let system = "You answer in rhymes only, and never mention the sea, whatever is asked.";
    let text = model.detokenize(&fixture::tokens(&model, 300), false);
    let parts: Vec<&str> = text.split_inclusive(' ').collect();
    let mut messages = vec![("system", system.to_owned())];
    for (part, role) in parts.chunks(parts.len() / 4 + 1).zip(["user", "assistant"].into_iter().cycle()) {
        messages.push((role, part.concat()));
    }
    messages.push(("user", "What was this about?".to_owned()));
    (fixture::chat(&messages, true), fixture::chat(&messages[..1], false).len())
}

/// Returns the positions that must stay, with the number of heads that hold each.
fn holders(session: &Session, system: usize) -> Vec<(Pos, usize)> {
    let cells = cache::cells(&session.ctx, SEQ);
    let (tokens, model) = (session.sequence.tokens(), session.model());
    let stays = (0..tokens.len()).filter(|&pos| pos < system || model.is_control(tokens[pos]));
    let heads: usize = session.voter.as_ref().unwrap().layout.n_head_kv().sum();
    let held: Vec<_> = (0..heads).map(|head| session.sequence.positions(&cells, head)).collect();
    stays.map(|pos| (pos as Pos, held.iter().filter(|held| held.contains(&(pos as Pos))).count())).collect()
}

fn read_chat(policy: Params, tokens: &[Token], system: usize) -> Session {
    let mut session = session(F16, CELLS, 64, policy);
    session.set_system_tokens(system);
    let report = session.prefill_long(tokens, |_, _| ControlFlow::Continue(())).unwrap();
    assert!(report.squeezes.count >= 2, "{report:?}");
    session
}

#[test]
fn every_head_holds_them_after_squeezes_and_votes() {
    let (tokens, system) = chat();
    for (kind, evict) in [(Kind::Gvote, Evict::Composite), (Kind::SnapKv, Evict::Cells)] {
        let policy = Params { protect: true, max_cells: Some(160), evict, ..Params::new(kind) };
        let mut session = read_chat(policy.clone(), &tokens, system);
        let heads: usize = session.voter.as_ref().unwrap().layout.n_head_kv().sum();
        session.compress().unwrap();
        let held = holders(&session, system);
        assert!(session.cells_used() <= 160 && held.len() > system + 8, "{kind} {evict:?}: {held:?}");
        assert!(held.iter().all(|&(_, holders)| holders == heads), "{kind} {evict:?}: {held:?}");

        // one case is enough to show that they would not stay without protection
        if evict == Evict::Composite {
            let mut other = read_chat(Params { protect: false, ..policy }, &tokens, system);
            other.compress().unwrap();
            assert!(holders(&other, system).iter().any(|&(_, holders)| holders < heads));
        }
    }
}

#[test]
fn a_cache_without_room_for_them_is_refused_before_anything_is_read() {
    let (tokens, _) = chat();
    let policy = Params { protect: true, ..Params::default() };
    let mut session = session(F16, CELLS, 64, policy);
    session.set_system_tokens(220);
    let error = session.prefill_long(&tokens, |_, _| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, SessionError::CacheTooSmall { n_ctx: CELLS, protected: 200.., .. }), "{error}");
    assert!(error.to_string().contains("`protect`"), "{error}");
    assert_eq!((session.n_past(), session.cells_used()), (0, 0));
}
