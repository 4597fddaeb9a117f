//! The trial: finds how few cells continue this request as the full cache does.
//!
//! The test consists of the newest tokens of the answer, which did not vote; if the answer is too short, the full cache drafts the rest
//! while the sequence is parked. The full cache reads the test once more in one batch to record its expected next tokens. Then each head's
//! rows are sorted by rank, in place: for any count C the first C cells are now those that a compaction to C would keep. A sequence that
//! sees only these cells continues exactly as the compacted cache would, with llama.cpp's own kernels, on any back end. The test is decoded
//! this way in one batch. The damage at C is the mean KL divergence from the full cache's expectations, less the KL that the new order
//! alone causes: quantized weights turn the last bit of a sum into a KL of some 0.003 on a small model. A search finds the fewest cells
//! whose damage is within the target, and abandons a count as soon as its damage exceeds the target. Then the rows return to their places.
//! The cache is not copied, and nothing is lost if the trial fails or is cancelled.

use std::ops::{ControlFlow, Range};

use super::{Sequence, Stage, Vote, VoteError, Voter, chunk, enter, follow};
use crate::cache::{self, Parked};
use crate::compact::Reorder;
use crate::divergence::Likely;
use crate::llama::{Batch, Pos, Token};
use crate::policy::{self, Ranking, threads};

/// Share of the target that the test may use up: later text, and text that the model did not write itself, drift further. Chosen on 38
/// requests so that at most one in five misses its target, and checked on others: see docs/results.md.
const MARGIN: f64 = 0.15;

/// Counts that are tried. Each halves the range that contains the smallest sufficient count, on a logarithmic scale: from a twelfth to all
/// of the cells, four tries leave a step of 17 %.
const TRIES: i32 = 4;

/// Newest tokens of an answer that must vote before any are held out for the test. Without them only the end of the prompt votes, and its
/// ranking is worse.
const VOTERS: usize = 32;

/// Length of the test of a long answer, as a multiple of a draft's length. Written tokens predict the continuation less well than drafted
/// ones but cost nothing to make.
const WRITTEN: usize = 2;

/// Limit on llama.cpp's logits buffer for the test, as a share of the model's bytes or of the sequence's K and V, whichever is larger.
const LOGITS_SHARE: f64 = 0.02;
/// Smallest batch: below this a batch is hardly faster than single steps.
const LEAST_AT_ONCE: usize = 4;

/// Result of a trial.
pub(crate) struct Trial {
    /// The smallest count that met the target.
    pub count: usize,
    /// Each tested count and its mean KL, less that caused by rounding, in nats a token, in the order of the tries. A value above the
    /// target is a lower bound.
    pub tried: Vec<(usize, f32)>,
    /// Mean KL that rounding alone causes, in nats a token.
    pub rounding: f32,
}

/// A test: tokens and the full cache's expectations.
struct Test {
    /// Position of the first token. The newest tokens of the answer lie there already.
    first: Pos,
    tokens: Vec<Token>,
    /// Distribution that the full cache expects after each token.
    expected: Vec<Likely>,
}

/// A sequence that is parked for a trial. Dropping this restores it.
struct Trying<'a> {
    parked: Parked<'a>,
    voter: &'a Voter,
    sequence: &'a Sequence,
    progress: &'a dyn Fn(Stage) -> ControlFlow<()>,
}

/// The rows of a sequence in the order of a ranking. Dropping this restores their order.
struct Reordered<'a, 'b> {
    trying: &'a mut Trying<'b>,
    rows: Reorder,
    ranking: &'a Ranking,
}

impl<'a, 'b> Reordered<'a, 'b> {
    fn new(trying: &'a mut Trying<'b>, ranking: &'a Ranking) -> Result<Self, VoteError> {
        let mut rows = Reorder::of(&trying.parked, trying.sequence.id)?;
        rows.permute(&mut trying.parked, &|head| by_rank(ranking, head));
        Ok(Self { trying, rows, ranking })
    }
}

impl Drop for Reordered<'_, '_> {
    fn drop(&mut self) {
        let ranking = self.ranking;
        self.rows.permute(&mut self.trying.parked, &|head| inverse(&by_rank(ranking, head)));
    }
}

/// Maximum number of tokens in a test.
pub(crate) fn most_tokens(policy: &policy::Params) -> usize {
    policy.draft.max(most_held_out(policy))
}

/// llama.cpp requires the cell before the first held-out token, so it has to be one of the recent cells.
fn most_held_out(policy: &policy::Params) -> usize {
    (WRITTEN * policy.draft).min(policy.recent.saturating_sub(1))
}

impl Vote<'_> {
    /// Number of newest answer tokens that the test uses. They do not vote: testing on the voters themselves would be too easy.
    pub fn held_out(&self) -> usize {
        let policy = &self.voter.policy;
        let Some(start) = self.voter.answer.filter(|_| policy.tries()) else { return 0 };
        let sequence = &*self.sequence;
        let written = (sequence.n_past - start.max(sequence.exact_from)).max(0) as usize;
        let most = most_held_out(policy).min(written.saturating_sub(VOTERS));
        // embeddings cannot be decoded again
        sequence.tokens.iter().rev().take(most).take_while(|token| **token >= 0).count()
    }

    /// Tests counts of a ranking of the sequence's cells. None if there is nothing to compare: the model would end its turn at once, or the
    /// newest token is not known.
    ///
    /// # Errors
    /// [`VoteError`]; the cache is as before, with an error and without.
    pub fn try_out(&mut self, ranking: &Ranking) -> Result<Option<Trial>, VoteError> {
        let Some(target) = self.voter.policy.target_kl else { return Ok(None) };
        let bar = MARGIN * f64::from(target);
        let held_out = self.held_out();
        let mut trying = self.trying()?;
        trying.enter(Stage::Draft)?;
        let test = trying.test(held_out)?;
        if test.tokens.is_empty() {
            return Ok(None);
        }
        let trial = Reordered::new(&mut trying, ranking)?.trying.search(ranking, &test, bar)?;
        drop(trying);
        if let Some(notes) = &mut self.voter.notes {
            (notes.draft, notes.bar) = (test.tokens, Some(bar as f32));
        }
        Ok(Some(trial))
    }

    fn trying(&mut self) -> Result<Trying<'_>, VoteError> {
        let Self { ctx, voter, sequence, progress } = self;
        let parked = Parked::new(ctx, sequence.id, most_tokens(&voter.policy))?;
        Ok(Trying { parked, voter, sequence, progress: *progress })
    }
}

impl Trying<'_> {
    fn enter(&self, stage: Stage) -> Result<(), VoteError> {
        enter(&self.parked, self.progress, stage)
    }

    /// Makes the test: the newest `held_out` tokens of the answer, and the full cache's continuation.
    fn test(&mut self, held_out: usize) -> Result<Test, VoteError> {
        let sequence = self.sequence;
        let mut tokens = sequence.tokens[sequence.tokens.len() - held_out..].to_vec();
        tokens.extend(self.draft(self.voter.policy.draft.saturating_sub(held_out))?);
        let mut test = Test { first: sequence.n_past - held_out as Pos, tokens, expected: Vec::new() };
        // in a batch, as smaller caches will read it: its kernels round differently from those of single steps
        let mut expected = Vec::with_capacity(test.tokens.len());
        self.lead(&test, 0..0, |_, logits| {
            expected.extend(of_rows(logits, |_, row| Likely::of(row)));
            ControlFlow::Continue(())
        })?;
        test.expected = expected;
        Ok(test)
    }

    /// Returns the full cache's own continuation of at most `n` tokens, up to the end of its turn.
    fn draft(&mut self, n: usize) -> Result<Vec<Token>, VoteError> {
        if n == 0 {
            return Ok(Vec::new());
        }
        let (seq, n_past) = (self.sequence.id, self.sequence.n_past);
        let Some(&newest) = self.sequence.tokens.last().filter(|&&token| token >= 0) else { return Ok(Vec::new()) };
        let parked = &mut self.parked;
        let model = parked.model().clone();
        let mut batch = Batch::new(1);
        let mut next = |parked: &mut Parked, token, pos| -> Result<Token, VoteError> {
            batch.clear();
            batch.add(token, pos, seq, true)?;
            parked.decode(&batch)?;
            Ok(argmax(parked.logits()?))
        };
        // the logits after the newest token went to whoever decoded it, so it is decoded again
        parked.hide_from(n_past - 1)?;
        let mut token = next(parked, newest, n_past - 1)?;
        parked.reset()?;
        let mut tokens = Vec::new();
        while tokens.len() < n && !model.is_eog(token) {
            tokens.push(token);
            token = next(parked, token, n_past + tokens.len() as Pos - 1)?;
        }
        parked.reset()?;
        Ok(tokens)
    }

    /// Decodes a test with the cells at the positions `hidden` masked, and passes the logits to `each`: see [`follow`].
    fn lead(
        &mut self,
        test: &Test,
        hidden: Range<Pos>,
        each: impl FnMut(usize, &[&[f32]]) -> ControlFlow<()>,
    ) -> Result<(), VoteError> {
        let Test { first, tokens, .. } = test;
        if tokens.is_empty() {
            return Ok(());
        }
        let at_once = self.at_once(tokens.len());
        let seq = self.sequence.id;
        self.parked.hide(hidden)?;
        if *first < self.sequence.n_past {
            self.parked.hide_from(*first)?;
        }
        follow::<VoteError>(&mut self.parked, seq, *first, tokens, at_once, |ctx, batch| Ok(ctx.decode(batch)?), each)?;
        Ok(self.parked.reset()?)
    }

    /// Batch size for a test of `n` tokens.
    fn at_once(&self, n: usize) -> usize {
        let ctx = &self.parked;
        let kv = cache::cells(ctx, self.sequence.id).len() * self.voter.layout.bytes_per_cell();
        let row = ctx.model().n_vocab() * size_of::<f32>();
        let most = kv.max(ctx.model().size() as usize);
        let worthwhile = ((LOGITS_SHARE * most as f64) as usize / row).max(LEAST_AT_ONCE);
        let most = worthwhile.min(chunk(ctx)).min(ctx.n_outputs_max());
        n.div_ceil(n.div_ceil(most))
    }

    fn search(&mut self, ranking: &Ranking, test: &Test, target: f64) -> Result<Trial, VoteError> {
        let (least, most) = ranking.range();
        // all cells in another order: the difference is rounding, not loss
        let rounding = self.damage(ranking, test, ranking.n(), f64::INFINITY)?;
        let mut tried = Vec::new();
        let (mut too_few, mut enough) = (0, 1 << TRIES);
        let step = (most as f64 / least as f64).powf(1.0 / f64::from(enough - 1));
        let count = |place: i32| ((most as f64 / step.powi((1 << TRIES) - place)).round() as usize).clamp(least, most);
        while enough - too_few > 1 && count(too_few + 1) < count(enough) {
            self.enter(Stage::Try)?;
            let middle = (too_few + enough) / 2;
            let kl = self.damage(ranking, test, count(middle), rounding + target)? - rounding;
            // not `f64::max`, which would hide a NaN
            let kl = if kl < 0.0 { 0.0 } else { kl };
            tried.push((count(middle), kl as f32));
            if kl <= target { enough = middle } else { too_few = middle }
        }
        Ok(Trial { count: count(enough), tried, rounding: rounding as f32 })
    }

    /// Mean KL on the test of the first `count` reordered cells from the full cache. Stops early, with a lower bound, once the mean exceeds
    /// `limit`.
    fn damage(&mut self, ranking: &Ranking, test: &Test, count: usize, limit: f64) -> Result<f64, VoteError> {
        let (_, tail) = ranking.forced();
        let cells = cache::cells(&self.parked, self.sequence.id);
        let first_hidden = count - (ranking.n() - tail);
        let hidden = if first_hidden < tail { cells[first_hidden].pos..cells[tail].pos } else { 0..0 };
        let mut mean = 0.0;
        self.lead(test, hidden, |start, logits| {
            let apart = of_rows(logits, |i, row| test.expected[start + i].kl(row));
            mean += apart.iter().sum::<f64>() / test.tokens.len() as f64;
            if mean > limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(mean)
    }
}

/// Maps each row of logits through `work(i, row)`, on several threads: a vocabulary of 150,000 tokens takes as long as a tenth of a GPU's
/// step.
fn of_rows<T: Send>(rows: &[&[f32]], work: impl Fn(usize, &[f32]) -> T + Sync) -> Vec<T> {
    let mut made: Vec<Option<T>> = rows.iter().map(|_| None).collect();
    let parts = rows.iter().zip(&mut made).enumerate();
    let n_threads = threads::at_most().min(rows.len());
    threads::share_out(n_threads, parts, |(i, (row, made))| *made = Some(work(i, row)), || ());
    made.into_iter().flatten().collect()
}

/// Order of a head's entries for the trial: sinks and recent entries in place, the others from best to worst between them.
fn by_rank(ranking: &Ranking, head: usize) -> Vec<u32> {
    let (sinks, tail) = ranking.forced();
    let mut order: Vec<u32> = (0..ranking.n() as u32).collect();
    let between = |&&entry: &&u32| (sinks..tail).contains(&(entry as usize));
    let ranked = ranking.of_head(head).iter().filter(between);
    order[sinks..tail].iter_mut().zip(ranked).for_each(|(to, &entry)| *to = entry);
    order
}

fn inverse(order: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; order.len()];
    for (place, &entry) in (0..).zip(order) {
        inverse[entry as usize] = place;
    }
    inverse
}

/// Index of the first maximum, as in llama.cpp's greedy sampler, which allocates and throws when it cannot.
fn argmax(logits: &[f32]) -> Token {
    let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
    best.unwrap_or(0) as Token
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Cell;
    use crate::llama::{CacheType, Context, ContextParams, FlashAttention, LlamaError};
    use crate::policy::{Bound, Decision, Evict, Kind, Params};
    use crate::tests::{fixture, tiny};
    use crate::vote::{CompressReport, Notes};
    use crate::{Session, SessionParams};

    fn session(flash_attn: FlashAttention, cache: CacheType, evict: Evict) -> Session {
        let model = fixture::model();
        let context = ContextParams { n_ctx: 512, flash_attn, type_k: cache, type_v: cache, ..Default::default() };
        let policy = Params { evict, ..Params::default() };
        let mut session = Session::new(&model, &SessionParams { context, policy, ..Default::default() }).unwrap();
        session.prefill(&fixture::tokens(&model, 400), |_, _| ControlFlow::Continue(())).unwrap();
        session
    }

    fn ranking(session: &mut Session, cells: &[Cell]) -> Ranking {
        let mut report = CompressReport::untouched(Kind::Gvote, cells.len(), 0);
        match session.vote().unwrap().decide(cells, &[], &mut report).unwrap() {
            Decision::Ranking(ranking) => ranking,
            Decision::Selection(_) => panic!("the default settings want a trial"),
        }
    }

    /// Checks that the KL of a trial equals that of a compaction to the same count, and that every byte is restored afterwards.
    ///
    /// `answer`: where the answer that is voted on begins. `rounding`: tolerance for kernels that add up in another order when cells are
    /// hidden; the root of a KL, because the KL is quadratic in the difference of the logits.
    fn assert_foretold(session: &mut Session, answer: Option<Pos>, rounding: f64, name: &str) -> Vec<Token> {
        let mut vote = session.vote().unwrap();
        (vote.voter.answer, vote.voter.notes) = (answer, Some(Notes::default()));
        vote.observe_newest(&[]).unwrap();
        drop(vote);
        let before = session.save();
        let cells = cache::cells(session.context(), 0);
        let ranking = ranking(session, &cells);
        let trial = session.vote().unwrap().try_out(&ranking).unwrap().unwrap();
        assert!(session.save() == before, "{name}");
        assert!(trial.tried.len() > 1, "{name}: {:?}", trial.tried);

        let held_out = session.vote().unwrap().held_out();
        let test = session.vote().unwrap().trying().unwrap().test(held_out).unwrap();
        for &(count, kl) in &trial.tried {
            session.load(&before).unwrap();
            let selection = ranking.clone().keep(count, Bound::Trial);
            assert_eq!(selection.n_cells(), count);
            let vote = session.vote().unwrap();
            crate::compact::compact(vote.ctx, 0, &cells, &selection, vote.voter.scorer.devices(), None).unwrap();
            assert!(vote.ctx.remove(0, test.first, -1));
            let mut real = 0.0;
            let each = |_: usize, logits: &[&[f32]]| {
                let apart = test.expected.iter().zip(logits).map(|(expected, row)| expected.kl(row));
                real += apart.sum::<f64>() / test.tokens.len() as f64;
                ControlFlow::Continue(())
            };
            let decode = |ctx: &mut Context, batch: &Batch| ctx.decode(batch);
            follow::<LlamaError>(vote.ctx, 0, test.first, &test.tokens, test.tokens.len(), decode, each).unwrap();
            let foretold = f64::from(kl + trial.rounding);
            let apart = real.sqrt() - foretold.sqrt();
            // a count that does too much damage is measured only until that is certain
            let is_whole = count == trial.count;
            assert!(apart > -rounding && (apart < rounding || !is_whole), "{name}, {count}: {foretold}, really {real}");
        }
        session.load(&before).unwrap();
        let notes = session.vote().unwrap().voter.notes.take();
        notes.unwrap().draft
    }

    #[test]
    fn a_trial_foretells_the_compaction_and_leaves_no_trace() {
        for (flash, cache, evict) in [
            (FlashAttention::Off, CacheType::F16, Evict::Composite),
            (FlashAttention::On, CacheType::Q8_0, Evict::Composite),
            (FlashAttention::Off, CacheType::F16, Evict::Cells),
        ] {
            // a model in 4 bits rounds its activations to 8
            let name = format!("{cache:?} {evict:?}");
            let mut session = session(flash, cache, evict);
            assert_foretold(&mut session, None, 0.03, &name);
            if (cache, evict) != (CacheType::F16, Evict::Composite) {
                continue;
            }

            // 56 tokens of an answer: 32 vote, 24 are held out, and 8 are drafted behind them
            let start = session.n_past();
            let written = fixture::tokens(session.model(), 500)[400..456].to_vec();
            session.prefill(&written, |_, _| ControlFlow::Continue(())).unwrap();
            let tested = assert_foretold(&mut session, Some(start), 0.03, &format!("{name}, an answer"));
            assert_eq!((tested.len(), &tested[..24]), (32, &written[32..]), "{name}");
        }
    }

    /// With few recent cells, all but one are decoded again: llama.cpp requires the cell before the first token of a batch.
    #[test]
    fn a_test_may_be_as_long_as_what_always_stays() {
        let model = fixture::model();
        let context = ContextParams { n_ctx: 512, ..Default::default() };
        let policy = Params { recent: 16, window: 16, target_kl: Some(1e-3), ..Params::default() };
        let mut session = Session::new(&model, &SessionParams { context, policy, ..Default::default() }).unwrap();
        session.prefill(&fixture::tokens(&model, 400), |_, _| ControlFlow::Continue(())).unwrap();
        session.vote().unwrap().voter.notes = Some(Notes::default());
        session.compress_answer(session.n_past() - 100).unwrap();
        let vote = session.vote().unwrap();
        let tested = &vote.voter.notes.as_ref().unwrap().draft;
        assert_eq!((tested.len(), &tested[..15]), (32, &fixture::tokens(vote.ctx.model(), 400)[385..]));
    }

    /// The test of a long answer is free: nothing is drafted.
    #[test]
    fn the_newest_tokens_of_an_answer_are_the_test_and_do_not_vote() {
        let mut session = session(FlashAttention::Off, CacheType::F16, Evict::Composite);
        session.vote().unwrap().voter.notes = Some(Notes::default());
        let (start, last) = (session.n_past() - 100, session.n_past() - 64);
        session.compress_answer(start).unwrap();
        let expected = fixture::tokens(session.model(), 400);
        let vote = session.vote().unwrap();
        let voter = &vote.voter;
        assert_eq!(voter.notes.as_ref().unwrap().draft, expected[337..]);
        let voters = voter.capture.window(0, 0, last).unwrap().pos;
        assert_eq!(voters, (last - 63..=last).collect::<Vec<_>>());
        assert!(voter.capture.window(0, 0, last + 63).is_err(), "the queries of the test were not asked for");
    }

    /// Window layers see their whole window whatever cells the trial hides.
    #[test]
    fn a_trial_beside_window_layers_foretells_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let spec = tiny::SPECS.into_iter().find(|spec| spec.arch == "gemma2").unwrap();
        let model = tiny::Tiny::new(dir.path(), spec).model;
        for flash_attn in [FlashAttention::Off, FlashAttention::On] {
            let context = ContextParams { n_ctx: 768, n_ubatch: 100, flash_attn, ..Default::default() };
            // so small a target that the search has to go on, and fewer protected cells than the window holds
            let policy = Params { target_kl: Some(1e-4), window: 16, recent: 16, ..Params::default() };
            let params = SessionParams { context, policy, ..Default::default() };
            let mut session = Session::new(&model, &params).unwrap();
            let tokens: Vec<_> = (0..500).map(|i| (7 * i + i * i / 5) % tiny::N_VOCAB as Token).collect();
            session.prefill(&tokens, |_, _| ControlFlow::Continue(())).unwrap();
            assert_foretold(&mut session, None, 1e-3, &format!("{flash_attn:?}"));
            let answer = session.n_past() - 60;
            assert_foretold(&mut session, Some(answer), 1e-3, &format!("{flash_attn:?}, an answer"));
        }
    }
}
