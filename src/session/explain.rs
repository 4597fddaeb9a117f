//! A vote that tells what it saw.

use super::{Session, SessionError};
use crate::explain::Explanation;
use crate::vote::{Notes, Way};

impl Session {
    /// From now on notes which rows leave the cache, where they are set aside, and which come back, for the next
    /// [`Session::explain`]. Takes 4 bytes for each of them.
    pub fn note_recall(&mut self) {
        self.voter.iter_mut().for_each(|voter| voter.way = Some(Way::default()));
    }

    /// [`Session::compress`], with what went into the choice. Takes some 12 bytes more for each head and cell meanwhile. A
    /// mask ([`crate::policy::Params::exact`]) drops nothing from the cache, so that everything is told to be kept.
    ///
    /// # Errors
    /// Those of `compress`, and [`SessionError::NoVote`] under the policy `full`; the cache is then as before.
    pub fn explain(&mut self) -> Result<Explanation, SessionError> {
        let voter = self.voter.as_mut().ok_or(SessionError::NoVote)?;
        let way = voter.way.take();
        voter.notes = Some(Notes::default());
        let report = self.compress();
        let notes = self.voter.as_mut().and_then(|voter| voter.notes.take());
        Ok(Explanation::new(self, report?, notes.unwrap_or_default(), way))
    }
}
