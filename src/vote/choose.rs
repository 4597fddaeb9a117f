//! The steps of a vote: from queries to fewer cells.

use std::panic::resume_unwind;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use super::replay::Replayed;
use super::trial::Trial;
use super::{CompressReport, Notes, Stage, Vote, VoteError, Voter, chunk, enter, uniform_shape};
use crate::backend::{self, ComputeError};
use crate::cache::{self, Cell, Layout, Parked};
use crate::capture::{self, CaptureError, SyntheticQueries};
use crate::compact;
use crate::llama::{Batch, LlamaError, Pos, Token};
use crate::memory;
use crate::policy::{self, Bound, Decision, HeadScores, Kind, Policy, Ranking, Selection, Zeros};
use crate::score::LayerQueries;

impl Vote<'_> {
    /// Lets the policy vote and returns its selection. Changes nothing yet.
    ///
    /// # Errors
    /// [`VoteError`]; the cache is then as before.
    pub fn choose(&mut self, cells: &[Cell]) -> Result<(Selection, CompressReport), VoteError> {
        // in a context of several streams each sequence lies elsewhere
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

    /// Selects the `most` cells that stay when no more fit. `ahead`: text that is still to come, whose queries vote instead of the
    /// observation window's; may be empty.
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

    /// Makes the queries of the newest tokens available. Tokens whose queries were not captured, such as those of an answer or of an app's
    /// prompt, are decoded again. The cache is unchanged afterwards. `ahead`: see [`Self::choose_most`]; if it is not empty, the newest
    /// token's queries are enough. If no statistics exist, because nothing of the sequence was captured, they are gathered from these
    /// tokens and some more.
    ///
    /// # Errors
    /// [`VoteError`]; the cache is then as before.
    pub fn observe_newest(&mut self, ahead: &[Token]) -> Result<(), VoteError> {
        let wanted = if ahead.is_empty() { self.voter.policy.window } else { 1 };
        let last = self.last_voter();
        let known = self.voter.capture.window(self.sequence.id, 0, last).map_or(0, |queries| queries.pos.len());
        self.observe(last + 1, wanted, known)
    }

    /// Position of the newest token that votes.
    fn last_voter(&self) -> Pos {
        self.sequence.n_past - self.held_out() as Pos - 1
    }

    /// Computes the queries of the newest tokens even if they are known: their attention changes when rows have come back.
    pub fn observe_again(&mut self) -> Result<(), VoteError> {
        self.observe(self.sequence.n_past, self.voter.policy.window, 0)
    }

    /// Computes the queries of the `wanted` tokens before position `end`, unless that many are `known`.
    fn observe(&mut self, end: Pos, wanted: usize, known: usize) -> Result<(), VoteError> {
        let chunk = chunk(self.ctx);
        let Self { ctx, voter, sequence, .. } = self;
        let seq = sequence.id;
        // the first tokens contribute no statistics
        let is_blind = !voter.capture.has_statistics(seq) && end as usize > voter.policy.sinks;
        // a sliding-window cache has no room for so many
        let more = if is_blind && !voter.layout.info.has_window { capture::FIRST } else { 0 };
        let most = wanted.max(more).min((end - sequence.exact_from) as usize).min(cache::cells_free(ctx, seq));
        let read = &sequence.tokens[..end as usize];
        // embeddings cannot be decoded again
        let n = read.iter().rev().take(most).take_while(|token| **token >= 0).count();
        if n == 0 || (known >= n && !is_blind) {
            return Ok(());
        }
        let tokens = &read[read.len() - n..];
        let first = end - n as Pos;
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

    /// Applies a selection to the cache. Returns the sequence's cells afterwards.
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
        // the back ends that computed the scores are running already
        let devices = self.voter.scorer.devices();
        let (seq, ctx) = (self.sequence.id, &mut *self.ctx);
        let left = self.sequence.setting_aside(cells, &mut report.aside_time, |aside| {
            compact::compact(ctx, seq, cells, &selection, devices, aside)
        })?;
        self.sequence.compacted(cells, selection, self.voter.policy.recent, self.ctx.n_threads_batch());
        self.sequence.bound(&left);
        if let Some(way) = &mut self.voter.way {
            way.voted(self.sequence, cells.len(), left.len(), self.voter.layout.n_head_kv().sum());
        }
        report.compact_time = clock.elapsed() - report.aside_time;
        Ok(left)
    }

    /// Shows the policy the scores that it needs, and returns its decision.
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
        policy.allocate_with(Zeros { of_u32: memory::must_have_zeros, of_u16: memory::must_have_zeros });
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

    /// Returns the index of the newest turn's first token if a question may still follow: the prompt is in a chat format, and more text
    /// follows its last marker than the first words of an answer.
    pub fn open_turn(&self) -> Option<usize> {
        if self.voter.answer.is_some() {
            return None;
        }
        let (model, tokens) = (self.ctx.model(), &self.sequence.tokens);
        // the end of a turn does not open the next one, and embeddings are no markers
        let opens = |&token: &Token| token >= 0 && model.is_control(token) && !model.is_eog(token);
        let markup = tokens.iter().rposition(opens)?;
        let text = tokens.len() - markup - 1;
        (markup > 0 && text > self.voter.policy.window).then_some(markup + 1)
    }

    /// Whether all cells stay because nothing can be tested: the question is still unknown, and no number of cells was requested.
    fn is_blind(&self, n: usize) -> bool {
        let policy = &self.voter.policy;
        let fits = policy.max_cells.is_none_or(|cap| n <= cap);
        policy.tries() && fits && !policy.leaves_alone(n) && self.open_turn().is_some()
    }

    /// Whether a later question may need dropped rows that cannot come back.
    fn must_not_lose(&self) -> bool {
        self.voter.more_questions && self.sequence.archive.is_none()
    }

    /// Makes a stand-in for a question that is not in the prompt yet: reads the whole context again, or the first words of the turn, which
    /// often state its topic.
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

    /// Probes, scores, and passes the scores to the policy.
    fn score(
        &mut self,
        cells: &[Cell],
        reread: Option<&Replayed>,
        policy: &mut (dyn Policy + Send),
        report: &mut CompressReport,
    ) -> Result<(), VoteError> {
        let needs = policy.needs();
        let (seq, pos_last, last_voter) = (self.sequence.id, self.sequence.n_past - 1, self.last_voter());
        self.enter(if needs.samples() { Stage::Probe } else { Stage::Score })?;
        let Self { ctx, voter, progress, .. } = self;
        let Voter { layout, capture, scorer, policy: params, account_error, notes, .. } = &mut **voter;
        let is_replay = params.replay;
        let show = |first, heads: &[HeadScores]| {
            let heads = (first..).zip(heads.iter().copied()).map(|(head, scores)| match reread {
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
        };

        let mut clock = Instant::now();
        let mut synthetic = SyntheticQueries::default();
        thread::scope(|scope| {
            let (tell, told) = mpsc::sync_channel::<Vec<LayerQueries>>(1);
            let mut queries = Vec::new().into_iter();
            let (layout, account_error) = (&*layout, *account_error);
            let score = move || {
                scorer.score(
                    layout,
                    cells,
                    needs,
                    account_error,
                    |il| {
                        if il == 0 {
                            // nothing arrives if the probe has failed
                            queries = told.recv().unwrap_or_default().into_iter();
                        }
                        queries.next().ok_or(VoteError::Llama(LlamaError::Cancelled))
                    },
                    show,
                )?;
                // on a device the compaction reuses this memory
                Ok::<_, VoteError>(if layout.is_host() { scorer.release() } else { scorer.compute_bytes() })
            };
            // a device scores keys and values while the probe decodes
            let scored: Box<dyn FnOnce() -> Result<usize, VoteError> + '_> = if needs.samples() && !layout.is_host() {
                let thread = backend::start(scope, score).map_err(ComputeError::from)?;
                Box::new(|| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            } else {
                Box::new(score)
            };
            if needs.samples() {
                synthetic = capture.probe(ctx, seq, pos_last, params.samples, params.seed)?;
            }
            let (capture, synthetic) = (&*capture, &synthetic);
            let queries = (0..layout.n_layer()).map(|il| {
                let (window, scale) = (capture.window(seq, il, last_voter)?, capture.logit_scale(il));
                Ok(LayerQueries::of_window(&window, synthetic.layer(il), synthetic.pos(), scale))
            });
            let queries = queries.collect::<Result<Vec<_>, CaptureError>>()?;
            report.probe_time = clock.elapsed();
            if needs.samples() {
                enter(ctx, *progress, Stage::Score)?;
            }
            clock = Instant::now();
            // the receiver is gone if scoring has failed
            let _ = tell.send(queries);
            report.compute_bytes = scored()?;
            report.score_time = clock.elapsed();
            Ok(())
        })
    }

    /// Determines how much of a ranking stays.
    fn settle(&mut self, ranking: Ranking, report: &mut CompressReport) -> Result<Selection, VoteError> {
        let (n, (least, most)) = (ranking.n(), ranking.range());
        if self.open_turn().is_some() {
            // a cap requires fewer cells, and only the ranking can say which
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
                // an answer that needs nothing of the text says nothing about later questions
                if count == least && self.must_not_lose() {
                    let all = Selection { bound: Bound::Blind, ..Selection::all(n) };
                    return Ok(if most == n { all } else { ranking.keep(most, Bound::MaxCells) });
                }
                // a cap is not tested: it holds whatever is lost
                let rule = if count == most && most < n { Bound::MaxCells } else { Bound::Trial };
                ranking.keep(count, rule)
            }
        };
        report.select_time += clock.elapsed();
        Ok(selection)
    }
}
