//! What no vote may drop: the chat template's markers and the system message.

use super::{Vote, Voter};
use crate::cache::Cell;
use crate::llama::{Model, Pos, Token};
use crate::policy::Protected;

impl Voter {
    /// Whether the token at a position always stays.
    fn protects(&self, model: &Model, pos: Pos, token: Token) -> bool {
        // embeddings are no markup
        pos < self.system_end || (token >= 0 && model.is_control(token))
    }

    /// The positions that always stay among those of `tokens`, the first of which is at `first`; none unless the settings
    /// ask for it.
    pub(crate) fn protected<'a>(
        &'a self,
        model: &'a Model,
        first: Pos,
        tokens: &'a [Token],
    ) -> impl Iterator<Item = Pos> + 'a {
        let tokens = if self.policy.protect { tokens } else { &[] };
        (first..).zip(tokens).filter(|&(pos, &token)| self.protects(model, pos, token)).map(|(pos, _)| pos)
    }
}

impl Vote<'_> {
    /// The entries of `cells` that always stay. A head that has lost a token before it was protected does without.
    pub fn protected(&self, cells: &[Cell]) -> Protected {
        let sequence = &*self.sequence;
        let mut stays = vec![false; if self.voter.policy.protect { sequence.tokens.len() } else { 0 }];
        self.voter.protected(self.ctx.model(), 0, &sequence.tokens).for_each(|pos| stays[pos as usize] = true);
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
