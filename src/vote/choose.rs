//! A vote, from queries to fewer cells.

use std::thread;
use std::time::Instant;

use super::replay::Replayed;
use super::trial::Trial;
use super::{CompressReport, Notes, Stage, Vote, VoteError, Voter, chunk, uniform_shape};
use crate::backend::{self, ComputeError};
use crate::cache::{self, Cell, Layout, Parked};
use crate::capture::{self, Capture, Queries};
use crate::compact;
use crate::llama::{Batch, Pos, SeqId, Token};
use crate::policy::{self, Bound, Decision, HeadScores, Kind, Needs, Policy, Ranking, Selection};
use crate::score::LayerQueries;

impl Vote<'_> {
    /// Lets the policy vote and says what stays; nothing has changed yet.
    ///
    /// # Errors
    /// [`VoteError`]; the cache is then as before.
    pub fn choose(&mut self, cells: &[Cell]) -> Result<(Selection, CompressReport), VoteError> {
        // a context of several streams keeps each sequence elsewhere
        self.voter.layout = Layout::of(self.ctx, self.sequence.id)?;
        let bytes_per_cell = self.voter.layout.bytes_per_cell();
        let mut report = CompressReport::untouched(self.voter.policy.policy, cells.len(), bytes_per_cell);
        if self.is_blind(cells.len()) {
            report.bound = Bound::Blind;
            return Ok((Selection { bound: Bound::Blind, ..Selection::all(cells.len()) }, report));
        }
        let selection = match self.decide(cells, &[], &mut report)? {
            Decision::Selection(selection) => selection,
            Decision::Ranking(ranking) => self.settle(ranking, &mut report)?,
        };
        report.note(&selection, bytes_per_cell);
        let n_heads = self.voter.layout.n_head_kv().sum();
        if let Some(notes) = &mut self.voter.notes {
            notes.selected(&selection, self.sequence, cells, n_heads);
        }
        Ok((selection, report))
    }

    /// Says which `most` of the cells stay, because no more have room. `ahead`: text that is still to come, whose queries
    /// vote in place of the observation window's; may be empty.
    ///
    /// # Errors
    /// [`VoteError`]; the cache is then as before.
    pub fn choose_most(
        &mut self,
        cells: &[Cell],
        most: usize,
        ahead: &[Token],
    ) -> Result<(Selection, CompressReport), VoteError> {
        self.voter.layout = Layout::of(self.ctx, self.sequence.id)?;
        let bytes_per_cell = self.voter.layout.bytes_per_cell();
        let mut report = CompressReport::untouched(self.voter.policy.policy, cells.len(), bytes_per_cell);
        let n = cells.len();
        let params = policy::Params {
            ratio: Some(most.min(n) as f32 / n as f32),
            max_cells: Some(most),
            min_cells: 0,
            replay: false,
            ..self.voter.policy.clone()
        };
        let asked = std::mem::replace(&mut self.voter.policy, params);
        let decision = self.decide(cells, ahead, &mut report);
        self.voter.policy = asked;
        let selection = match decision? {
            Decision::Selection(selection) => selection,
            Decision::Ranking(ranking) => ranking.keep(most, Bound::MaxCells),
        };
        report.note(&selection, bytes_per_cell);
        report.bound = Bound::MaxCells;
        Ok((selection, report))
    }

    /// Sees to it that the queries of the newest tokens are known, those of an answer or of an app's prompt too, of which none
    /// were read: they are computed once more. The cache is as before afterwards. `ahead`: see [`Self::choose_most`]; where there is
    /// some, the newest token's are enough. Where there are no statistics, because none of the sequence was heard, they are taken of
    /// these tokens, and of some more.
    ///
    /// # Errors
    /// [`VoteError`]; the cache is then as before.
    pub fn observe_newest(&mut self, ahead: &[Token]) -> Result<(), VoteError> {
        let wanted = if ahead.is_empty() { self.voter.policy.window } else { 1 };
        let chunk = chunk(self.ctx);
        let Self { ctx, voter, sequence, .. } = self;
        let (seq, n_past) = (sequence.id, sequence.n_past);
        // the first tokens give no statistics
        let is_blind = !voter.capture.has_statistics(seq) && n_past as usize > voter.policy.sinks;
        // a cache of a sliding window has no room for so many
        let more = if is_blind && !voter.layout.info.has_window { capture::FIRST } else { 0 };
        let known = voter.capture.window(seq, 0, n_past - 1).map_or(0, |queries| queries.pos.len());
        let most = wanted.max(more).min((n_past - sequence.exact_from) as usize).min(cache::cells_free(ctx, seq));
        // embeddings cannot be decoded once more
        let n = sequence.tokens.iter().rev().take(most).take_while(|token| **token >= 0).count();
        if n == 0 || (known >= n && !is_blind) {
            return Ok(());
        }
        let tokens = &sequence.tokens[sequence.tokens.len() - n..];
        let first = n_past - n as Pos;
        let mut parked = Parked::new(ctx, seq, n)?;
        parked.hide_from(first)?;
        let mut batch = Batch::new(chunk);
        for (start, part) in (0..).step_by(chunk).zip(tokens.chunks(chunk)) {
            batch.clear();
            for (i, &token) in part.iter().enumerate() {
                batch.add(token, first + (start + i) as Pos, seq, false)?;
            }
            voter.capture.decode_again(&mut parked, &batch)?;
        }
        Ok(())
    }

    /// Puts a choice in force. The sequence's cells afterwards.
    ///
    /// # Errors
    /// [`VoteError::Compact`]; the cache is then as before.
    pub fn compact(
        &mut self,
        cells: &[Cell],
        selection: Selection,
        report: &mut CompressReport,
    ) -> Result<Vec<Cell>, VoteError> {
        self.enter(Stage::Compact)?;
        let clock = Instant::now();
        let left = compact::compact(self.ctx, self.sequence.id, cells, &selection)?;
        self.sequence.compacted(cells, selection, self.voter.policy.recent, self.ctx.n_threads_batch());
        self.sequence.bound(&left);
        report.compact_time = clock.elapsed();
        Ok(left)
    }

    /// Shows the policy what it needs to see, and hears what it comes to.
    ///
    /// `ahead`: see [`Self::choose_most`].
    pub fn decide(
        &mut self,
        cells: &[Cell],
        ahead: &[Token],
        report: &mut CompressReport,
    ) -> Result<Decision, VoteError> {
        let shape = uniform_shape(&self.voter.layout, cells.len())?;
        let protected = self.protected(cells);
        let mut policy = policy::build_protecting(&self.voter.policy, shape, &protected)?;
        if !policy.needs().nothing() {
            let reread = match ahead {
                [] => self.reread(cells, report)?,
                ahead if policy.needs().observed => Some(self.read_ahead(cells, ahead)?),
                _ => None,
            };
            let params = &self.voter.policy;
            self.voter.notes.iter_mut().for_each(|notes| notes.begin(params, shape, &protected));
            self.score(cells, reread.as_ref(), policy.as_mut(), report)?;
        }
        let clock = Instant::now();
        let decision = match &mut self.voter.notes {
            Some(notes) => {
                let (decision, ranking) = policy.explain();
                notes.ranked(ranking);
                decision
            }
            None => policy.decide(),
        };
        report.select_time = clock.elapsed();
        Ok(decision)
    }

    /// Where the newest turn begins, if a question may still follow it: the prompt is in a chat's format, and behind its
    /// last markup there is more text than an answer's first words.
    pub fn open_turn(&self) -> Option<usize> {
        let (model, tokens) = (self.ctx.model(), &self.sequence.tokens);
        // what ends a turn says nothing about the next one, and embeddings are no markup
        let opens = |&token: &Token| token >= 0 && model.is_control(token) && !model.is_eog(token);
        let markup = tokens.iter().rposition(opens)?;
        let text = tokens.len() - markup - 1;
        (markup > 0 && text > self.voter.policy.window).then_some(markup + 1)
    }

    /// Whether everything stays, because nothing could be tried: what will be asked is not known, and no number of cells was
    /// asked for.
    fn is_blind(&self, n: usize) -> bool {
        let policy = &self.voter.policy;
        let fits = policy.max_cells.is_none_or(|cap| n <= cap);
        policy.tries() && fits && !policy.leaves_alone(n) && self.open_turn().is_some()
    }

    /// What stands in for a question that is not in sight: the whole context read again, or the first words of the turn,
    /// which often say what it is about.
    fn reread(&mut self, cells: &[Cell], report: &mut CompressReport) -> Result<Option<Replayed>, VoteError> {
        let clock = Instant::now();
        let policy = &self.voter.policy;
        let (is_gvote, window) = (policy.policy == Kind::Gvote, policy.window);
        let reread = if policy.replay {
            self.enter(Stage::Replay)?;
            Some(self.replay(cells)?)
        } else if is_gvote
            && let Some(start) = self.open_turn()
            && self.is_whole(cells)
        {
            self.enter(Stage::Replay)?;
            Some(self.read_again(cells, start..start + window)?)
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
    ) -> Result<(), VoteError> {
        let mut needs = policy.needs();
        let (seq, pos_last) = (self.sequence.id, self.sequence.n_past - 1);
        let clock = Instant::now();
        let mut measured = Measured::default();
        let mut future = if needs.samples() {
            self.enter(Stage::Probe)?;
            if self.voter.layout.is_host() || needs.of_cells().nothing() {
                self.probe(pos_last)?
            } else {
                let (future, of_cells) = self.probe_and_measure(cells, needs.of_cells(), pos_last)?;
                (measured, needs) = (of_cells, needs.of_queries());
                future
            }
        } else {
            vec![Queries::default(); self.voter.layout.n_layer()]
        };
        report.probe_time = clock.elapsed();

        self.enter(Stage::Score)?;
        let clock = Instant::now();
        let Voter { layout, capture, scorer, policy: params, account_error, notes, .. } = &mut *self.voter;
        let is_replay = params.replay;
        scorer.score(
            layout,
            cells,
            needs,
            *account_error,
            |il| layer_queries(capture, seq, il, pos_last, std::mem::take(&mut future[il])),
            |first, heads| {
                let heads = (first..).zip(heads).map(|(head, scores)| (head, measured.with(head, *scores)));
                let heads = heads.map(|(head, scores)| match reread {
                    Some(reread) if is_replay => HeadScores {
                        replayed: reread.mean_of(head),
                        fourth_powers: reread.fourth_powers_of(head),
                        ..scores
                    },
                    Some(reread) => HeadScores { observed: reread.mean_of(head), ..scores },
                    None => scores,
                });
                let heads: Vec<_> = heads.collect();
                if let Some(opinions) = notes.as_mut().and_then(Notes::opinions) {
                    heads.iter().for_each(|scores| opinions.observe(scores));
                }
                policy.observe_heads(first, &heads);
            },
        )?;
        report.score_time = clock.elapsed();
        report.compute_bytes = scorer.release();
        Ok(())
    }

    /// Synthetic queries of each layer, that follow `pos_last`.
    fn probe(&mut self, pos_last: Pos) -> Result<Vec<Queries>, VoteError> {
        let Voter { capture, policy, .. } = &mut *self.voter;
        Ok(capture.probe(self.ctx, self.sequence.id, pos_last, policy.samples, policy.seed)?)
    }

    /// The same, while a device measures keys and values: it has little to do for the probe.
    fn probe_and_measure(
        &mut self,
        cells: &[Cell],
        needs: Needs,
        pos_last: Pos,
    ) -> Result<(Vec<Queries>, Measured), VoteError> {
        let Self { ctx, voter, sequence, .. } = self;
        let Voter { layout, capture, scorer, policy, .. } = &mut **voter;
        let mut measured = Measured::new(needs, layout.n_head_kv().sum::<usize>() * cells.len());
        thread::scope(|scope| {
            let measure = || {
                let none = |_| Ok::<_, ComputeError>(LayerQueries::none());
                scorer.score(layout, cells, needs, false, none, |_, heads| measured.take(heads))
            };
            let measuring = backend::start(scope, measure).map_err(ComputeError::from)?;
            let future = capture.probe(ctx, sequence.id, pos_last, policy.samples, policy.seed);
            measuring.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok(future?)
        })
        .map(|future| (future, measured))
    }

    /// Finds out how much of a ranking stays.
    fn settle(&mut self, ranking: Ranking, report: &mut CompressReport) -> Result<Selection, VoteError> {
        let (n, (_, most)) = (ranking.n(), ranking.range());
        if self.open_turn().is_some() {
            // a cap asks for fewer, and nothing else than the ranking knows which
            return Ok(ranking.keep(most, Bound::MaxCells));
        }
        let clock = Instant::now();
        let trial = self.try_out(&ranking)?;
        report.trial_time = clock.elapsed();
        let clock = Instant::now();
        let selection = match trial {
            None => ranking.by_lost_mass(),
            Some(Trial { count, tried, rounding }) => {
                (report.tried, report.rounding) = (tried, rounding);
                // a cap is not tried: it holds whatever is lost
                let rule = if count == most && most < n { Bound::MaxCells } else { Bound::Trial };
                ranking.keep(count, rule)
            }
        };
        report.select_time += clock.elapsed();
        Ok(selection)
    }
}

/// What was measured of keys and values before queries met them. `[head][n]` each; empty where it was not.
#[derive(Default)]
struct Measured {
    n: usize,
    value_norm: Vec<f32>,
    key_similarity: Vec<f32>,
}

impl Measured {
    fn new(needs: Needs, len: usize) -> Self {
        let room = |is_needed| Vec::with_capacity(if is_needed { len } else { 0 });
        Self { n: 0, value_norm: room(needs.value_norm), key_similarity: room(needs.key_similarity) }
    }

    /// Takes in the heads that follow.
    fn take(&mut self, heads: &[HeadScores]) {
        for scores in heads {
            self.n = scores.value_norm.len().max(scores.key_similarity.len());
            self.value_norm.extend_from_slice(scores.value_norm);
            self.key_similarity.extend_from_slice(scores.key_similarity);
        }
    }

    /// The scores of a head with it.
    fn with<'a>(&'a self, head: usize, scores: HeadScores<'a>) -> HeadScores<'a> {
        let row = head * self.n..(head + 1) * self.n;
        let of_head =
            |all: &'a [f32], own: &'a [f32]| all.get(row.clone()).filter(|row| !row.is_empty()).unwrap_or(own);
        HeadScores {
            value_norm: of_head(&self.value_norm, scores.value_norm),
            key_similarity: of_head(&self.key_similarity, scores.key_similarity),
            ..scores
        }
    }
}

/// The queries that vote in one layer: the observation window, and the synthetic queries with the current one behind them.
fn layer_queries(
    capture: &Capture,
    seq: SeqId,
    layer: usize,
    pos_last: Pos,
    synthetic: Queries,
) -> Result<LayerQueries<'_>, VoteError> {
    let window = capture.window(seq, layer, pos_last)?;
    Ok(LayerQueries::of_window(&window, synthetic, capture.logit_scale(layer)))
}
