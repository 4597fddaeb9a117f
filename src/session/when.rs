//! Votes on the answers of a session.

#![forbid(unsafe_code)]

use super::{Session, SessionError};
use crate::llama::{LlamaError, Pos};
use crate::policy::Kind;
pub use crate::vote::When;
use crate::vote::{CompressReport, Meter, Work};

/// A vote on an answer that was begun.
#[derive(Clone, Debug)]
pub struct AnswerVote {
    /// Tokens of the answer that came before it.
    pub after: usize,
    pub report: CompressReport,
}

impl Session {
    /// Chooses when the next answers are voted on, by [`Session::generate`]; with [`When::Prompt`] the caller votes.
    pub fn set_vote(&mut self, when: When) {
        self.when = when;
    }

    pub(super) fn meter(&self) -> Meter {
        let votes = self.policy.policy != Kind::Full && self.mask.is_none();
        let when = if votes { self.when } else { When::Prompt };
        let work = Work::of(&self.policy, self.cells_used());
        Meter::new(when, self.known, work, self.bytes_per_cell().unwrap_or(0), self.model().size())
    }

    /// Votes on an answer that began at position `start` and is not finished. Beside the newest tokens those stay that were the newest
    /// before the answer: the question is among them.
    ///
    /// # Errors
    /// Those of [`Session::compress`]; the cache is then as before.
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

/// Whether an error ends the answer: without memory for a vote it goes on with the cells that there are.
pub(super) fn ends_answer(error: &SessionError) -> bool {
    matches!(error, SessionError::Llama(LlamaError::Cancelled))
}
