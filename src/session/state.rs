//! A session as bytes: llama.cpp's state of the sequence, and what gvote knows beside it.

use super::{SEQ, Session, SessionError};
use crate::cache;
use crate::llama::{Pos, Token};

impl Session {
    /// The whole session as bytes: llama.cpp's state of the sequence, and what gvote knows beside it.
    pub fn save(&mut self) -> Vec<u8> {
        let capture = self.voter.as_ref().map_or_else(Vec::new, |v| v.capture.save());
        let state = self.ctx.save_sequence(SEQ);
        let mut out = Vec::with_capacity(state.len() + capture.len() + 4 * self.logits.len() + 64);
        out.extend_from_slice(&self.n_past.to_le_bytes());
        out.extend_from_slice(&self.exact_from.to_le_bytes());
        let tokens = self.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        for part in [bytes_of_f32(&self.logits), tokens, capture, state] {
            out.extend_from_slice(&(part.len() as u64).to_le_bytes());
            out.extend_from_slice(&part);
        }
        out
    }

    /// Replaces this session by a saved one.
    ///
    /// # Errors
    /// [`SessionError::Saved`] or [`LlamaError::State`](crate::llama::LlamaError::State) when the bytes are cut off or belong to another model, other cache
    /// types or a larger context; the session is then as before.
    pub fn load(&mut self, data: &[u8]) -> Result<(), SessionError> {
        let mut rest = data;
        let n_past = Pos::from_le_bytes(take(&mut rest)?);
        let exact_from = Pos::from_le_bytes(take(&mut rest)?);
        let logits = take_part(&mut rest)?;
        let tokens = take_part(&mut rest)?;
        let capture = take_part(&mut rest)?;
        let state = take_part(&mut rest)?;
        if !rest.is_empty() || (logits.len() != 4 * self.model().n_vocab() && !logits.is_empty()) {
            return Err(SessionError::Saved("it was made with another model"));
        }
        let restored = match &self.voter {
            Some(v) => Some(
                v.capture
                    .restored(capture)
                    .ok_or(SessionError::Saved("it was made with another model, --window or --policy"))?,
            ),
            None => None,
        };
        let before = self.ctx.save_sequence(SEQ);
        let mut loaded = self.ctx.load_sequence(SEQ, state).map_err(SessionError::from);
        if loaded.is_ok() && self.voter.is_some() && cache::cells(&self.ctx, SEQ).len() > self.n_ctx {
            loaded = Err(SessionError::Saved("it has more cells than this context (-c)"));
        }
        if let Err(error) = loaded {
            self.ctx.remove(SEQ, -1, -1);
            if self.n_past > 0 {
                self.ctx.load_sequence(SEQ, &before)?;
            }
            return Err(error);
        }
        if let (Some(voter), Some(restored)) = (&mut self.voter, restored) {
            voter.capture = restored;
            voter.mask = None;
        }
        self.n_past = n_past;
        self.tokens =
            tokens.chunks_exact(4).map(|b| Token::from_le_bytes(b.try_into().expect("chunks of four"))).collect();
        self.exact_from = exact_from;
        self.logits =
            logits.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("chunks of four"))).collect();
        Ok(())
    }
}

fn bytes_of_f32(data: &[f32]) -> Vec<u8> {
    data.iter().flat_map(|x| x.to_le_bytes()).collect()
}

const CUT_OFF: SessionError = SessionError::Saved("it is cut off");

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], SessionError> {
    let (head, tail) = rest.split_first_chunk().ok_or(CUT_OFF)?;
    *rest = tail;
    Ok(*head)
}

fn take_part<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], SessionError> {
    let len = usize::try_from(u64::from_le_bytes(take(rest)?)).map_err(|_| CUT_OFF)?;
    let (head, tail) = rest.split_at_checked(len).ok_or(CUT_OFF)?;
    *rest = tail;
    Ok(head)
}
