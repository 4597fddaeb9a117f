//! Votes within the answers of a session.

#![forbid(unsafe_code)]

use super::{Session, SessionError};
use crate::llama::{LlamaError, Pos};
use crate::policy::Kind;
pub use crate::vote::When;
use crate::vote::{CompressReport, Meter, Work};

/// A vote within an answer.
#[derive(Clone, Debug)]
pub struct AnswerVote {
    /// Tokens of the answer before the vote.
    pub after: usize,
    pub report: CompressReport,
}

impl Session {
    /// Sets when [`Session::generate`] votes on the next answers. With [`When::Prompt`], the caller votes.
    pub fn set_vote(&mut self, when: When) {
        self.when = when;
    }

    pub(super) fn meter(&self) -> Meter {
        let votes = self.policy.policy != Kind::Full && self.mask.is_none();
        let when = if votes { self.when } else { When::Prompt };
        let work = Work::of(&self.policy, self.cells_used());
        Meter::new(when, self.known, work, self.bytes_per_cell().unwrap_or(0), self.model().size())
    }

    /// Votes on an unfinished answer that began at position `start`. Besides the newest tokens, keeps the tokens that
    /// were newest when the answer began, because they contain the question.
    ///
    /// # Errors
    /// Errors of [`Session::compress`]; the cache is then as before.
    pub fn compress_answer(&mut self, start: Pos) -> Result<CompressReport, SessionError> {
        let answers_from = |session: &mut Self, start| {
            if let Some(voter) = &mut session.voter {
                voter.answer = start;
            }
        };
        answers_from(self, Some(start));
        let report = self.compress();
        answers_from(self, None);
        report
    }
}

/// Whether an error of a vote ends the answer. Only cancellation does: without memory for a vote, the answer continues
/// with the present cells.
pub(super) fn ends_answer(error: &SessionError) -> bool {
    matches!(error, SessionError::Llama(LlamaError::Cancelled))
}
