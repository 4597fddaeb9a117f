//! Tokens that no vote may drop: the chat template's markers, the system message, ranges that an app protects, and an answer with its
//! question.

use super::{Sequence, Vote, Voter};
use crate::cache::Cell;
use crate::llama::{Model, Pos, Token};
use crate::policy::Protected;

impl Voter {
    /// Whether the token at this position always stays.
    fn protects(&self, model: &Model, pos: Pos, token: Token) -> bool {
        // an embedding is no template marker
        pos < self.system_end || (token >= 0 && model.is_control(token))
    }

    /// Returns the positions among `tokens` that the setting `protect` keeps; `first` is the position of the first token.
    fn protected<'a>(&'a self, model: &'a Model, first: Pos, tokens: &'a [Token]) -> impl Iterator<Item = Pos> + 'a {
        let tokens = if self.policy.protect { tokens } else { &[] };
        (first..).zip(tokens).filter(|&(pos, &token)| self.protects(model, pos, token)).map(|(pos, _)| pos)
    }

    /// Whether each token of a sequence always stays, `[position]`.
    fn stays(&self, model: &Model, sequence: &Sequence) -> Vec<bool> {
        let mut stays = sequence.protected().to_vec();
        stays.resize(sequence.tokens.len(), false);
        self.protected(model, 0, &sequence.tokens).for_each(|pos| stays[pos as usize] = true);
        if let Some(start) = self.answer {
            let question = (start.max(0) as usize).saturating_sub(self.policy.recent);
            stays.iter_mut().skip(question).for_each(|stays| *stays = true);
        }
        stays
    }

    /// Upper bound per head on the protected tokens between the sinks and the recent tokens, once `more` tokens follow those of the
    /// sequence.
    pub(crate) fn protected_with(&self, model: &Model, sequence: &Sequence, more: &[Token]) -> usize {
        let n_past = sequence.n_past;
        let between = self.policy.sinks as Pos..n_past + more.len() as Pos - self.policy.recent as Pos;
        let stays = self.stays(model, sequence);
        let read = (0..).zip(stays).filter(|&(_, stays)| stays).map(|(pos, _)| pos);
        read.chain(self.protected(model, n_past, more)).filter(|pos| between.contains(pos)).count()
    }
}

impl Vote<'_> {
    /// Returns the entries of `cells` that always stay. A token that a head lost before it was protected is left out for that head.
    pub fn protected(&self, cells: &[Cell]) -> Protected {
        let sequence = &*self.sequence;
        let stays = self.voter.stays(self.ctx.model(), sequence);
        if !stays.contains(&true) {
            return Protected::default();
        }
        let of_head = |head| {
            let held = (0..).zip(sequence.positions(cells, head));
            held.filter(|&(_, pos)| stays[pos as usize]).map(|(entry, _)| entry).collect()
        };
        if sequence.is_composite() {
            Protected::by_head((0..self.voter.layout.n_head_kv().sum()).map(of_head).collect())
        } else {
            Protected::everywhere(of_head(0))
        }
    }
}
