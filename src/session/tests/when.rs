//! Votes within answers.

use super::*;
use crate::archive::PRETEND_FULL;
use crate::policy::Bound;
use crate::tests::fixture::{F16, F16_FLASH};

const QUESTION: usize = 500;

fn begun(setup: Setup, when: When, recall: Recall) -> Session {
    let mut session = open_as(&tiny::model("llama"), setup, 800, quick(), recall);
    session.set_vote(when);
    read(&mut session, &words(QUESTION, 0));
    session
}

/// Returns the tokens of an answer, the logits that each was sampled from, and the report.
fn answer(session: &mut Session, n: i32) -> (Vec<Token>, GenerateReport) {
    let params = SamplerParams { temp: 0.0, ignore_eos: true, ..SamplerParams::default() };
    let mut sampler = session.sampler(&params, n).unwrap();
    let mut tokens = Vec::new();
    let report = session.generate(&mut sampler, n, |token| {
        tokens.push(token);
        ControlFlow::Continue(())
    });
    (tokens, report.unwrap())
}

#[test]
fn an_answer_is_the_full_cache_s_until_the_vote() {
    for setup in [F16, F16_FLASH] {
        let [mut voting, mut full] = [When::After(20), When::Prompt].map(|when| begun(setup, when, Recall::Off));
        let [before, expected] = [&mut voting, &mut full].map(|session| answer(session, 20));
        assert_eq!(before.0, expected.0);
        let bits = |session: &Session| session.logits().iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
        assert!(before.1.vote.is_none() && bits(&voting) == bits(&full), "{setup}");

        let mut session = begun(setup, When::After(20), Recall::Off);
        let (tokens, report) = answer(&mut session, 40);
        assert_eq!(tokens[..20], expected.0);
        let vote = report.vote.expect("the answer has more tokens");
        assert_eq!((vote.after, vote.report.cells_before), (20, QUESTION + 20));
        assert_eq!((vote.report.cells_after, session.cells_used()), (200, 220));
        assert_eq!(report.tokens, 40);
    }
}

/// The newest tokens before the answer, which contain the question, stay besides the newest tokens of the answer.
#[test]
fn the_question_stays_in_every_head() {
    let mut session = begun(F16, When::After(50), Recall::Auto);
    let (_, report) = answer(&mut session, 51);
    assert!(report.vote.is_some());
    let recent = session.policy().recent as Pos;
    let cells = cache::cells(session.context(), SEQ);
    for head in 0..4 {
        let held = session.sequence().positions(&cells, head);
        let wanted = QUESTION as Pos - recent..QUESTION as Pos + 51;
        assert!(wanted.clone().all(|pos| held.contains(&pos)), "{head}: {held:?}");
    }
    // only during this answer: a later vote may drop the question
    read(&mut session, &words(100, 3));
    session.compress().unwrap();
    let cells = cache::cells(session.context(), SEQ);
    let held = session.sequence().positions(&cells, 0);
    assert!((QUESTION as Pos - recent..QUESTION as Pos).any(|pos| !held.contains(&pos)));
}

#[test]
fn an_answer_that_ends_early_has_paid_nothing() {
    let mut session = begun(F16, When::Auto, Recall::Off);
    let (_, report) = answer(&mut session, 63);
    assert!(report.vote.is_none());
    assert_eq!(session.cells_used(), QUESTION + 63);
}

#[test]
fn without_memory_for_a_vote_the_answer_goes_on_with_all_cells() {
    let mut session = begun(F16, When::After(10), Recall::Auto);
    PRETEND_FULL.set(true);
    let (_, report) = answer(&mut session, 30);
    PRETEND_FULL.set(false);
    assert!(report.vote.is_none() && report.unvoted.is_some() && report.tokens == 30);
    assert_eq!(session.cells_used(), QUESTION + 30);
}

/// A long answer is not an open message, behind which a question may follow.
#[test]
fn a_long_answer_in_a_chat_is_voted_on() {
    let model = fixture::model();
    let text = fixture::tokens(&model, 400);
    let turn = |role: &str| model.tokenize(&format!("<|im_start|>{role}\n"), false, true).unwrap();
    let end = model.tokenize("<|im_end|>\n", false, true).unwrap();
    let mut session = session(F16, 960, 512, Params { ratio: Some(0.5), target_kl: None, ..Params::default() });
    session.set_vote(When::After(100));
    read(&mut session, &[turn("user"), text, end, turn("assistant")].concat());
    let (_, report) = answer(&mut session, 101);
    let vote = report.vote.unwrap().report;
    assert!(vote.bound != Bound::Blind && vote.cells_after < vote.cells_before, "{vote:?}");
}
