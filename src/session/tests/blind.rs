//! Votes in a chat turn that is still open: no question is known yet.

use super::*;
use crate::policy::{Bound, Kept};
use crate::tests::fixture::F16;

/// Tokens of a message that is long enough for a vote.
const LONG: usize = 300;

/// Returns a chat in the model's format, up to the end of its last message, or, if the turn is `open`, up to the last
/// word.
fn chat(message: &str, open: bool) -> Vec<Token> {
    const BEFORE: &str = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
        <|im_start|>user\n";
    let tokens = |text: &str, starts, has_markers| fixture::model().tokenize(text, starts, has_markers).unwrap();
    let mut chat = tokens(BEFORE, true, true);
    // split, so that a marker in the message is read as text
    message.split_inclusive('<').for_each(|part| chat.extend(tokens(part, false, false)));
    if !open {
        chat.extend(tokens("<|im_end|>\n<|im_start|>assistant\n", false, true));
    }
    chat
}

fn long_message() -> String {
    let text = include_str!("../../tests/text.txt");
    text.chars().take(4 * LONG).collect()
}

fn after_chat(message: &str, open: bool, policy: Params) -> Session {
    let mut session = session(F16, 960, 512, policy);
    read(&mut session, &chat(message, open));
    session
}

fn open_turn(session: &mut Session) -> Option<usize> {
    session.vote().unwrap().open_turn()
}

#[test]
fn a_turn_is_open_while_a_question_may_follow() {
    let mut open = after_chat(&long_message(), true, Params::default());
    let start = open_turn(&mut open).expect("the prompt ends inside the user's message");
    assert!(open.model().is_control(open.sequence.tokens[start - 1]));
    assert!(open.sequence.tokens[start..].iter().all(|&token| !open.model().is_control(token)));
    assert!(open.sequence.tokens.len() - start > LONG / 2);

    let mut asked = after_chat(&long_message(), false, Params::default());
    assert_eq!(open_turn(&mut asked), None, "the assistant's turn has begun");
    let mut short = after_chat("Hi! Here is what I know so far.", true, Params::default());
    assert_eq!(open_turn(&mut short), None, "a few words are no document");
    let mut raw = after(LONG, F16, 960, 512, Params::default());
    assert_eq!(open_turn(&mut raw), None, "a plain text has no turns");
    assert_eq!(open_turn(&mut session(F16, 192, 64, Params::default())), None);
}

/// Markers may be quoted in a document; only the template's own markers begin a turn.
#[test]
fn a_quoted_marker_opens_no_turn() {
    let message = long_message();
    let plain = after_chat(&message, true, Params::default());
    let quoting = format!("{message} <|im_start|>system");
    let mut session = after_chat(&quoting, true, Params::default());
    let control =
        |session: &Session| session.sequence.tokens.iter().filter(|&&token| session.model().is_control(token)).count();
    assert_eq!(control(&session), control(&plain));
    let start = open_turn(&mut session).expect("the prompt ends inside the user's message");
    assert!(session.sequence.tokens.len() - start > LONG / 2, "all of the message is one turn");
}

#[test]
fn an_answer_in_progress_is_no_open_turn_until_it_is_long() {
    let mut session = after_chat(&long_message(), false, Params::default());
    let words = fixture::tokens(&fixture::model(), 40);
    read(&mut session, &words);
    assert_eq!(open_turn(&mut session), None);
}

#[test]
fn an_open_turn_keeps_everything_and_says_why() {
    let mut session = after_chat(&long_message(), true, Params::default());
    let n = session.cells_used();
    let before = session.save();
    let report = session.compress().unwrap();
    assert_eq!((report.bound, report.cells_after, report.lost_mass), (Bound::Blind, n, Some(0.0)));
    assert!(report.tried.is_empty(), "there is nothing to try it on");
    assert!(session.save() == before);
}

#[test]
fn an_open_turn_is_compressed_where_that_is_asked_for() {
    for (policy, bound) in [
        (Params { ratio: Some(0.5), ..Params::default() }, Bound::Ratio),
        (Params { max_cells: Some(150), ..Params::default() }, Bound::MaxCells),
        (Params { target_kl: None, lost_mass: 0.1, ..Params::default() }, Bound::LostMass),
        (Params { replay: true, lost_mass: 0.1, ..Params::default() }, Bound::LostMass),
    ] {
        let mut session = after_chat(&long_message(), true, policy.clone());
        let n = session.cells_used();
        let report = session.compress().unwrap();
        assert_eq!(report.bound, bound, "{policy:?}");
        assert!(report.cells_after < n, "{report:?}");
        assert_eq!(session.cells_used(), report.cells_after);
    }
}

/// The first words of the turn vote in place of a question: the observed attention is theirs.
#[test]
fn the_first_words_of_an_open_turn_vote() {
    let policy = Params { ratio: Some(0.5), ..Params::default() };
    let kept = |look_alike: bool| {
        let mut session = after_chat(&long_message(), true, policy.clone());
        if look_alike {
            // hide the chat markers from the vote; the cache stays
            let plain = session.model().tokenize(" ", false, false).unwrap()[0];
            session.sequence.tokens.fill(plain);
        }
        let cells = cache::cells(&session.ctx, SEQ);
        let mut report = CompressReport::untouched(policy.policy, cells.len(), 0);
        match session.vote().unwrap().decide(&cells, &[], &mut report).unwrap() {
            policy::Decision::Selection(selection) => selection.kept,
            policy::Decision::Ranking(_) => panic!("a share was asked for"),
        }
    };
    let (open, plain) = (kept(false), kept(true));
    assert_ne!(open, plain);
    assert!(matches!(open, Kept::Heads { .. }));
}

/// An answer that needs nothing of the text, such as "OK.", says nothing about later questions. If dropped rows would
/// be lost and more questions may come, such a vote must drop nothing. If rows can come back, or no question follows,
/// it may drop them.
#[test]
fn an_answer_that_does_not_look_at_the_text_is_no_reason_to_lose_it() {
    // a trial with this limit always accepts the fewest cells
    let policy = || Params { target_kl: Some(10.0), min_cells: 100, ..Params::default() };
    let vote = |recall: Recall, more_questions: bool, policy: Params| {
        let mut session = after_chat(&long_message(), false, policy);
        session.set_recall(recall);
        session.set_more_questions(more_questions);
        let report = session.compress().unwrap();
        assert_eq!(session.cells_used(), report.cells_after);
        (report.bound, report.cells_after, report.cells_before)
    };
    for (recall, more_questions) in [(Recall::Off, false), (Recall::Auto, true), (Recall::Auto, false)] {
        let (bound, after, before) = vote(recall.clone(), more_questions, policy());
        assert!(bound == Bound::Trial && after < before / 2, "{recall:?}, {more_questions}: {bound:?}, {after}");
    }
    let (bound, after, before) = vote(Recall::Off, true, policy());
    assert_eq!((bound, after), (Bound::Blind, before));
    // a cap holds, whatever is lost by it
    let capped = Params { max_cells: Some(120), ..policy() };
    let (bound, after, ..) = vote(Recall::Off, true, capped);
    assert_eq!((bound, after), (Bound::MaxCells, 120));
}
