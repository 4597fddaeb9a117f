//! A vote, from queries to fewer cells.

use std::time::Instant;

use super::replay::Replayed;
use super::trial::Trial;
use super::{CompressReport, SEQ, Session, SessionError, Voter, uniform_shape};
use crate::cache::{self, Cell};
use crate::capture::{Capture, Queries};
use crate::compact;
use crate::llama::{Pos, Token};
use crate::policy::{self, Bound, Decision, HeadScores, Kept, Kind, Policy, Ranking, Selection};
use crate::score::LayerQueries;

impl Session {
    /// Lets the policy vote and compacts the cache. The next-token logits stay.
    ///
    /// # Errors
    /// [`SessionError`]; the cache is then as before.
    pub fn compress(&mut self) -> Result<CompressReport, SessionError> {
        let bytes_per_cell = self.bytes_per_cell().unwrap_or(0);
        self.check_unmasked()?;
        if self.voter.is_none() {
            return Ok(CompressReport::untouched(Kind::Full, self.cells_used(), bytes_per_cell));
        }
        let cells = cache::cells(&self.ctx, SEQ);
        let mut report = CompressReport::untouched(self.policy.policy, cells.len(), bytes_per_cell);
        if self.is_blind(cells.len()) {
            report.bound = Bound::Blind;
            return Ok(report);
        }
        let selection = match self.decide(&cells, &mut report)? {
            Decision::Selection(selection) => selection,
            Decision::Ranking(ranking) => self.settle(ranking, &mut report)?,
        };

        let clock = Instant::now();
        match selection.kept {
            Kept::Ragged { .. } => self.mask(&selection)?,
            _ => {
                compact::compact(&mut self.ctx, SEQ, &selection)?;
                report.kv_bytes_after = selection.n_cells() * bytes_per_cell;
            }
        }
        report.compact_time = clock.elapsed();

        if selection.kept != Kept::All {
            self.exact_from = self.exact_from.max(self.n_past - self.policy.recent as Pos);
        }
        report.cells_after = selection.n_cells();
        report.lost_mass = selection.lost_mass;
        report.bound = selection.bound;
        report.ragged = selection.ragged;
        Ok(report)
    }

    /// Shows the policy what it needs to see, and hears what it comes to.
    pub(super) fn decide(&mut self, cells: &[Cell], report: &mut CompressReport) -> Result<Decision, SessionError> {
        let Some(voter) = &self.voter else { return Ok(Decision::Selection(Selection::all(cells.len()))) };
        let mut policy = policy::build(&self.policy, uniform_shape(&voter.layout, cells.len())?)?;
        if !policy.needs().nothing() {
            let reread = self.reread(cells, report)?;
            self.score(cells, reread.as_ref(), policy.as_mut(), report)?;
        }
        let clock = Instant::now();
        let decision = policy.decide();
        report.select_time = clock.elapsed();
        Ok(decision)
    }

    /// Where the newest turn begins, if a question may still follow it: the prompt is in a chat's format, and behind its
    /// last markup there is more text than an answer's first words.
    pub(super) fn open_turn(&self) -> Option<usize> {
        let model = self.model();
        // what ends a turn says nothing about the next one
        let opens = |&token: &Token| model.is_control(token) && !model.is_eog(token);
        let markup = self.tokens.iter().rposition(opens)?;
        let text = self.tokens.len() - markup - 1;
        (markup > 0 && text > self.policy.window).then_some(markup + 1)
    }

    /// Whether everything stays, because nothing could be tried: what will be asked is not known, and no number of cells was
    /// asked for.
    fn is_blind(&self, n: usize) -> bool {
        let fits = self.policy.max_cells.is_none_or(|cap| n <= cap);
        self.policy.tries() && fits && !self.policy.leaves_alone(n) && self.open_turn().is_some()
    }

    /// What stands in for a question that is not in sight: the whole context read again, or the first words of the turn,
    /// which often say what it is about.
    fn reread(&mut self, cells: &[Cell], report: &mut CompressReport) -> Result<Option<Replayed>, SessionError> {
        let clock = Instant::now();
        let reread = if self.policy.replay {
            Some(self.replay(cells)?)
        } else if self.policy.policy == Kind::Gvote
            && let Some(start) = self.open_turn()
            && cells.len() == self.tokens.len()
        {
            Some(self.read_again(cells, start..start + self.policy.window)?)
        } else {
            None
        };
        report.replay_time = clock.elapsed();
        Ok(reread)
    }

    /// Probes, scores, and lets the policy see it.
    fn score(
        &mut self,
        cells: &[Cell],
        reread: Option<&Replayed>,
        policy: &mut dyn Policy,
        report: &mut CompressReport,
    ) -> Result<(), SessionError> {
        let Self { ctx, voter: Some(Voter { layout, capture, scorer, .. }), .. } = self else { return Ok(()) };
        let needs = policy.needs();
        let pos_last = self.n_past - 1;
        let clock = Instant::now();
        let mut future = match needs.samples() {
            true => capture.probe(ctx, pos_last, self.policy.samples, self.policy.seed)?,
            false => vec![Queries::default(); layout.n_layer()],
        };
        report.probe_time = clock.elapsed();

        let clock = Instant::now();
        let is_replay = self.policy.replay;
        scorer.score(
            layout,
            cells,
            needs,
            self.account_error,
            |il| layer_queries(capture, il, pos_last, std::mem::take(&mut future[il])),
            |head, scores| match reread {
                Some(reread) if is_replay => policy.observe(
                    head,
                    &HeadScores {
                        replayed: reread.mean_of(head),
                        fourth_powers: reread.fourth_powers_of(head),
                        ..*scores
                    },
                ),
                Some(reread) => policy.observe(head, &HeadScores { observed: reread.mean_of(head), ..*scores }),
                None => policy.observe(head, scores),
            },
        )?;
        report.score_time = clock.elapsed();
        report.compute_bytes = scorer.release();
        Ok(())
    }

    /// Finds out how much of a ranking stays.
    fn settle(&mut self, ranking: Ranking, report: &mut CompressReport) -> Result<Selection, SessionError> {
        let (n, (_, most)) = (ranking.n(), ranking.range());
        if self.open_turn().is_some() {
            // a cap asks for fewer, and nothing else than the ranking knows which
            return Ok(ranking.keep(most, Bound::MaxCells));
        }
        let clock = Instant::now();
        let trial = self.try_out(&ranking)?;
        report.trial_time = clock.elapsed();
        let Some(Trial { count, tried, rounding }) = trial else { return Ok(ranking.by_lost_mass()) };
        (report.tried, report.rounding) = (tried, rounding);
        // a cap is not tried: it holds whatever is lost
        let rule = if count == most && most < n { Bound::MaxCells } else { Bound::Trial };
        Ok(ranking.keep(count, rule))
    }
}

/// The queries that vote in one layer: the observation window, and the synthetic queries with the current one behind them.
fn layer_queries(
    capture: &Capture,
    layer: usize,
    pos_last: Pos,
    mut future: Queries,
) -> Result<LayerQueries, SessionError> {
    let observed = capture.window(layer, pos_last)?;
    let n_q = observed.data.len() / observed.pos.len();
    future.data.extend_from_slice(&observed.data[observed.data.len() - n_q..]);
    future.pos.push(pos_last);
    Ok(LayerQueries { observed, future, scale: capture.logit_scale(layer) })
}
