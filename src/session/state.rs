//! Serialises a session: gvote's own state, the rows that are set aside, and llama.cpp's state of the sequence.

use std::io::{self, Read, Write};

use super::marks::{Mark, SAVED_MARKS};
use super::{SEQ, Session, SessionError};
use crate::archive::{Archive, ReadError};
use crate::bytes::{Reader, put_numbers, put_part};
use crate::cache;
#[cfg(doc)]
use crate::llama::Context;
use crate::llama::{LlamaError, Pos, Token};
use crate::vote::{Saved, Sequence, VoteError};

const CUT_OFF: SessionError = SessionError::Saved("it is cut off");
const OTHER_MODEL: SessionError = SessionError::Saved("it was made with another model, `window` or `policy`");
const NONSENSE: SessionError = SessionError::Saved("its numbers contradict each other");
const OTHER_PART: SessionError = SessionError::Saved("its two parts do not belong together");
const SET_ASIDE: SessionError =
    SessionError::Saved("a part of it is set aside, and this session sets nothing aside (`recall` off)");
const OTHER_POLICY: SessionError = SessionError::Saved("either it was made with `policy` full, or this session was");

/// Serialised form of an archive without rows.
const NOTHING_ASIDE: [u8; size_of::<u64>()] = [0; size_of::<u64>()];

/// Parts of a saved session that are read before the cells are touched.
struct Head {
    /// None under the policy `full`, where the tokens are all there is to know.
    saved: Option<Saved>,
    tokens: Vec<Token>,
    logits: Vec<f32>,
    marks: Vec<Mark>,
}

impl Session {
    /// Serialises the whole session in memory; [`Session::save_to`] writes a file.
    pub fn save(&mut self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.ctx.sequence_size(SEQ));
        self.write(&mut out).expect("a vector takes all that memory holds");
        out
    }

    /// Copies the cells alone, as llama.cpp's state of a sequence. Other contexts with the same model, cache types and
    /// flash attention setting load them with [`Context::adopt_sequence`] and continue at position [`Session::n_past`].
    ///
    /// # Errors
    /// [`LlamaError::Memory`].
    pub fn copy_cells(&mut self) -> Result<Vec<u8>, LlamaError> {
        self.ctx.copy_sequence(SEQ)
    }

    /// Writes the whole session without copying the cells in memory.
    pub(super) fn write(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let head = self.head();
        out.write_all(&(head.len() as u64).to_le_bytes())?;
        out.write_all(&head)?;
        match &self.sequence.archive {
            Some(archive) => archive.write(out)?,
            None => out.write_all(&NOTHING_ASIDE)?,
        }
        self.ctx.write_sequence(SEQ, out)
    }

    fn head(&mut self) -> Vec<u8> {
        let put_logits = |out: &mut Vec<u8>, logits: &[f32]| put_numbers(out, logits.iter().map(|x| x.to_le_bytes()));
        let mut out = vec![u8::from(self.voter.is_some())];
        put_logits(&mut out, &self.logits);
        match &mut self.voter {
            Some(voter) => put_part(&mut out, &self.sequence.save(&mut voter.capture, &cache::cells(&self.ctx, SEQ))),
            None => put_numbers(&mut out, self.sequence.tokens.iter().map(|token| token.to_le_bytes())),
        }
        for mark in &self.marks[self.marks.len().saturating_sub(SAVED_MARKS)..] {
            out.extend_from_slice(&mark.pos.to_le_bytes());
            put_logits(&mut out, &mark.logits);
            if let (Some(voter), Some(captured)) = (&self.voter, &mark.captured) {
                put_part(&mut out, &voter.capture.encode(captured));
            }
        }
        out
    }

    /// Replaces this session by one that [`Session::save`] wrote.
    ///
    /// # Errors
    /// [`SessionError::Saved`] or [`LlamaError::State`] when the bytes are cut off or belong to another model, other
    /// cache types or a larger context; the session is then as before.
    pub fn load(&mut self, data: &[u8]) -> Result<(), SessionError> {
        self.read(&mut &*data, true)
    }

    /// Replaces this session by the output of [`Session::write`], reading `from` to its end. First copies the cells in
    /// use, to restore them if the saved session does not fit. `has_archive`: false for the older format, which
    /// contains no rows set aside.
    pub(super) fn read(&mut self, from: &mut dyn Read, has_archive: bool) -> Result<(), SessionError> {
        let mut len = [0; size_of::<u64>()];
        from.read_exact(&mut len).map_err(|_| CUT_OFF)?;
        let len = u64::from_le_bytes(len);
        let mut head = Vec::new();
        // allocates as bytes arrive, not by the stated length
        from.take(len).read_to_end(&mut head).map_err(|_| CUT_OFF)?;
        if head.len() as u64 != len {
            return Err(CUT_OFF);
        }
        let Head { saved, tokens, logits, marks } = self.read_head(&head)?;
        let archive =
            if has_archive { self.read_archive(from, saved.as_ref())? } else { self.sequence.emptied().archive };
        self.grow_until(saved.as_ref().map_or(tokens.len(), Saved::n_cells));
        let before = (self.n_past() > 0).then(|| self.ctx.copy_sequence(SEQ)).transpose()?;
        let n_past = saved.as_ref().map_or(tokens.len(), Saved::n_past);
        if let Err(error) = self.read_cells(from, n_past, saved.as_ref()) {
            self.ctx.remove(SEQ, -1, -1);
            if let Some(before) = before
                && self.ctx.read_sequence(SEQ, &mut &before[..]).is_err()
            {
                // no memory to restore the old cells either
                self.clear();
            }
            return Err(error);
        }
        self.sequence = Sequence::new(SEQ);
        match (&mut self.voter, saved) {
            (Some(voter), Some(saved)) => self.sequence = saved.restore(SEQ, &mut voter.capture),
            _ => self.sequence.extend(&tokens),
        }
        self.sequence.archive = archive;
        self.mask = None;
        self.logits = logits;
        self.marks = marks;
        Ok(())
    }

    /// Reads the rows that were set aside in a saved session.
    fn read_archive(&self, from: &mut dyn Read, saved: Option<&Saved>) -> Result<Option<Archive>, SessionError> {
        let (Some(archive), Some(saved)) = (&self.sequence.archive, saved) else {
            let mut nothing = NOTHING_ASIDE;
            from.read_exact(&mut nothing).map_err(|_| CUT_OFF)?;
            return if nothing == NOTHING_ASIDE { Ok(None) } else { Err(SET_ASIDE) };
        };
        saved.read_archive(archive, from).map(Some).map_err(|error| match error {
            ReadError::CutOff => CUT_OFF,
            ReadError::Nonsense => NONSENSE,
            error => VoteError::from(error).into(),
        })
    }

    fn read_head(&self, head: &[u8]) -> Result<Head, SessionError> {
        let n_vocab = self.model().n_vocab();
        let logits_of = |rest: &mut Reader| -> Result<Vec<f32>, SessionError> {
            let logits: Vec<f32> = rest.numbers().ok_or(CUT_OFF)?.map(f32::from_le_bytes).collect();
            if !logits.is_empty() && logits.len() != n_vocab {
                return Err(OTHER_MODEL);
            }
            // false for NaN as well
            if logits.iter().all(|&logit| logit < f32::INFINITY) { Ok(logits) } else { Err(NONSENSE) }
        };
        let mut rest = Reader(head);
        if rest.take() != Some([u8::from(self.voter.is_some())]) {
            return Err(OTHER_POLICY);
        }
        let logits = logits_of(&mut rest)?;
        let (mut saved, mut tokens) = (None, Vec::new());
        match &self.voter {
            Some(voter) => {
                let part = rest.part().ok_or(CUT_OFF)?;
                let (read, rest) = Saved::read(part, self.model(), &voter.layout, &voter.capture)?;
                if !rest.is_empty() {
                    return Err(NONSENSE);
                }
                saved = Some(read);
            }
            None => tokens = rest.numbers().ok_or(CUT_OFF)?.map(Token::from_le_bytes).collect(),
        }
        if !tokens.iter().all(|&token| self.model().has_token(token)) {
            return Err(OTHER_MODEL);
        }
        let n_past = saved.as_ref().map_or(tokens.len(), Saved::n_past);
        let mut marks: Vec<Mark> = Vec::new();
        while !rest.is_empty() {
            let pos = Pos::from_le_bytes(rest.take().ok_or(CUT_OFF)?);
            let is_next = marks.last().is_none_or(|last| last.pos < pos);
            if marks.len() == SAVED_MARKS || !is_next || usize::try_from(pos).is_ok_and(|pos| pos > n_past) || pos < 0 {
                return Err(NONSENSE);
            }
            let logits = logits_of(&mut rest)?;
            let captured = match &self.voter {
                Some(voter) => {
                    let captured = voter.capture.read(rest.part().ok_or(CUT_OFF)?).ok_or(OTHER_MODEL)?;
                    Some(captured.into())
                }
                None => None,
            };
            marks.push(Mark { pos, logits, captured });
        }
        Ok(Head { saved, tokens, logits, marks })
    }

    /// Loads the cells and checks that they belong to `n_past` tokens.
    fn read_cells(&mut self, from: &mut dyn Read, n_past: usize, saved: Option<&Saved>) -> Result<(), SessionError> {
        self.ctx.read_sequence(SEQ, from)?;
        if !matches!(from.read(&mut [0]), Ok(0)) {
            return Err(SessionError::Saved("it is longer than it should be"));
        }
        let cells = cache::cells(&self.ctx, SEQ);
        let n_cells = if saved.is_some() { cells.len() } else { n_past };
        if n_cells > self.n_ctx {
            return Err(SessionError::Saved("it has more cells than this context (`n_ctx`)"));
        }
        // checks a sliding-window cache or recurrent state beside the cells as well
        let last = n_past.checked_sub(1).map(|last| last as Pos);
        let is_last = self.ctx.pos_max(SEQ) == last && cells.last().is_none_or(|cell| Some(cell.pos) == last);
        if !is_last || saved.is_some_and(|saved| !saved.fits(&cells)) {
            return Err(OTHER_PART);
        }
        Ok(())
    }
}
