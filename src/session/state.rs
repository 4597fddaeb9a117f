//! A session as bytes: llama.cpp's state of the sequence, and what gvote knows beside it.

use super::{SEQ, Session, SessionError};
use crate::bytes::{Reader, put_numbers, put_part};
use crate::cache;
use crate::llama::Pos;
use crate::vote::{Saved, Sequence};

impl Session {
    /// The whole session as bytes: llama.cpp's state of the sequence, and what gvote knows beside it.
    pub fn save(&mut self) -> Vec<u8> {
        let known = match &self.voter {
            Some(voter) => self.sequence.save(&voter.capture, &cache::cells(&self.ctx, SEQ)),
            None => Vec::new(),
        };
        let state = self.ctx.save_sequence(SEQ);
        let mut out = Vec::with_capacity(state.len() + known.len() + 4 * self.logits.len() + 64);
        out.extend_from_slice(&self.n_past().to_le_bytes());
        put_numbers(&mut out, self.logits.iter().map(|x| x.to_le_bytes()));
        put_part(&mut out, &known);
        put_part(&mut out, &state);
        out
    }

    /// Replaces this session by a saved one.
    ///
    /// # Errors
    /// [`SessionError::Saved`] or [`LlamaError::State`](crate::llama::LlamaError::State) when the bytes are cut off or belong
    /// to another model, other cache types or a larger context; the session is then as before.
    pub fn load(&mut self, data: &[u8]) -> Result<(), SessionError> {
        const CUT_OFF: SessionError = SessionError::Saved("it is cut off");
        let mut rest = Reader(data);
        let n_past = Pos::from_le_bytes(rest.take().ok_or(CUT_OFF)?);
        let logits: Vec<f32> = rest.numbers().ok_or(CUT_OFF)?.map(f32::from_le_bytes).collect();
        let known = rest.part().ok_or(CUT_OFF)?;
        let state = rest.part().ok_or(CUT_OFF)?;
        if !rest.is_empty() || (logits.len() != self.model().n_vocab() && !logits.is_empty()) {
            return Err(SessionError::Saved("it was made with another model"));
        }
        let saved = match &self.voter {
            Some(voter) => Some(Saved::read(known, &voter.layout, &voter.capture)?),
            None => None,
        };
        let before = self.ctx.save_sequence(SEQ);
        if let Err(error) = self.load_cells(state, saved.as_ref()) {
            self.ctx.remove(SEQ, -1, -1);
            if self.n_past() > 0 {
                self.ctx.load_sequence(SEQ, &before)?;
            }
            return Err(error);
        }
        self.sequence = match (&mut self.voter, saved) {
            (Some(voter), Some(saved)) => saved.restore(SEQ, &mut voter.capture),
            _ => Sequence::at(SEQ, n_past),
        };
        self.mask = None;
        self.logits = logits;
        Ok(())
    }

    fn load_cells(&mut self, state: &[u8], saved: Option<&Saved>) -> Result<(), SessionError> {
        self.ctx.load_sequence(SEQ, state)?;
        let Some(saved) = saved else { return Ok(()) };
        let cells = cache::cells(&self.ctx, SEQ);
        if cells.len() > self.n_ctx {
            return Err(SessionError::Saved("it has more cells than this context (-c)"));
        }
        if !saved.fits(&cells) {
            return Err(SessionError::Saved("its two parts do not belong together"));
        }
        Ok(())
    }
}
