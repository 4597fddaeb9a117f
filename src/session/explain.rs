//! Votes that record what they chose and why.

use super::{Session, SessionError};
use crate::cache;
use crate::explain::{self, Bits, Explanation, Recalled};
use crate::llama::{Pos, Token};
use crate::vote::{CompressReport, Notes, Way};

impl Session {
    /// Starts to record which rows leave the cache, where rows are set aside, and which come back, for the next
    /// [`Session::explain`]. Takes 4 bytes for each row.
    pub fn note_recall(&mut self) {
        self.voter.iter_mut().for_each(|voter| voter.way = Some(Way::default()));
    }

    /// Votes and compacts like [`Session::compress`], and returns the reasons for the choice. Takes about 12 bytes more
    /// for each head and cell while the vote runs. A mask ([`crate::policy::Params::exact`]) drops nothing from the
    /// cache, so that the explanation reports every row as kept.
    ///
    /// # Errors
    /// Errors of `compress`, and [`SessionError::NoVote`] under the policy `full`; the cache is then as before.
    pub fn explain(&mut self) -> Result<Explanation, SessionError> {
        let voter = self.voter.as_mut().ok_or(SessionError::NoVote)?;
        let way = voter.way.take();
        voter.notes = Some(Notes::default());
        let report = self.compress();
        let notes = self.voter.as_mut().and_then(|voter| voter.notes.take());
        Ok(self.explained(report?, notes.unwrap_or_default(), way))
    }

    fn explained(&self, report: CompressReport, notes: Notes, way: Option<Way>) -> Explanation {
        let (sequence, layout) = (self.sequence(), self.layout());
        let layers: Vec<i32> = layout.iter().flat_map(|layout| &layout.layers).map(|layer| layer.il).collect();
        let n_heads: usize = layout.iter().flat_map(|layout| layout.n_head_kv()).sum();
        let cells = cache::cells(self.context(), sequence.id());
        let n = sequence.n_past() as usize;
        let kept: Vec<Vec<Pos>> = (0..n_heads).map(|head| sequence.positions(&cells, head)).collect();
        let mut kept_by = vec![0; n];
        kept.iter().flatten().for_each(|&pos| kept_by[pos as usize] += 1);
        let shown = |tokens: &[Token]| {
            let pieces: Vec<Vec<u8>> = tokens.iter().map(|&token| self.model().piece(token, true)).collect();
            explain::shown(&pieces)
        };
        let kept = Bits::new(n, kept.into_iter());
        Explanation {
            report,
            recall: way.and_then(|way| Recalled::new(&way, &kept, n)),
            policy: self.policy().clone(),
            texts: shown(&sequence.tokens),
            tokens: sequence.tokens.clone(),
            n_head_kv: n_heads / layers.len().max(1),
            layers,
            kept,
            kept_by,
            heads: notes.heads,
            curve: notes.curve,
            bar: notes.bar,
            draft: shown(&notes.draft),
            real: notes.real,
            synthetic: notes.synthetic,
        }
    }
}
