//! Random walks: after any sequence of operations, the cache holds the rows that a simple model predicts. A session
//! that is saved and loaded on the way equals one that never is, byte by byte.

use std::collections::{BTreeSet, HashMap};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::tests::fixture::{F16, F16_FLASH, Q8_0, key_and_value, row};

/// Small, so that the cache is often full.
const N_CTX: usize = 192;

#[derive(Clone, Debug)]
enum Step {
    /// Reads so many tokens, at times more than there are cells.
    Prefill(usize),
    Decode(usize),
    Answer(i32),
    Compress,
    Expand,
    Mark,
    /// Truncates to a place, in thousandths of the sequence.
    Truncate(usize),
    /// Truncates to the first possible position.
    TruncateMost,
    /// Truncates to one of the marks.
    Back(usize),
    SaveAndLoad,
    /// Saves, continues, and loads the saved session.
    Return(usize),
    /// Loads a file that is cut off, at a place in thousandths.
    BadLoad(usize),
    /// Cancels a prefill of so many tokens, and a vote, at the n-th check of the flag.
    CancelledPrefill(usize, usize),
    CancelledCompress(usize),
}
use Step::*;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..90usize).prop_map(Prefill),
        1 => (150..260usize).prop_map(Prefill),
        2 => (1..4usize).prop_map(Decode),
        1 => (1..12i32).prop_map(Answer),
        4 => Just(Compress),
        1 => Just(Expand),
        1 => Just(Mark),
        3 => (0..1000usize).prop_map(Truncate),
        1 => Just(TruncateMost),
        1 => (0..4usize).prop_map(Back),
        2 => Just(SaveAndLoad),
        1 => (1..40usize).prop_map(Return),
        1 => (0..1000usize).prop_map(BadLoad),
        1 => (1..80usize, 1..1500usize).prop_map(|(n, at)| CancelledPrefill(n, at)),
        1 => (1..1500usize).prop_map(CancelledCompress),
    ]
}

/// Architecture, cache, policy, and recall.
type Way = (&'static str, Setup, Params, Recall);

/// Caches and policies. Most run without a trial, which takes longer than everything else.
fn ways() -> impl Strategy<Value = Way> {
    let small = Params { window: 16, recent: 16, samples: 8, max_cells: Some(60), ..quick() };
    let setups = prop::sample::select(vec![F16, F16_FLASH, Q8_0]);
    let policies = prop::sample::select(vec![
        small.clone(),
        Params { evict: policy::Evict::Cells, ..small.clone() },
        Params { target_kl: Some(1e-4), draft: 8, max_cells: None, ..small.clone() },
        Params { ratio: Some(0.6), max_cells: None, policy: Kind::SnapKv, ..small.clone() },
        Params { policy: Kind::StreamingLlm, ..small },
    ]);
    let archs = prop::sample::select(vec!["llama", "llama", "gemma2"]);
    (archs, setups, policies, prop::sample::select(vec![Recall::Off, Recall::Auto]))
}

/// Rows of K and V by layer, head and position, as first decoded.
type Rows = HashMap<(usize, usize, Pos), [Vec<f32>; 2]>;

/// Simple model of a session.
#[derive(Default)]
struct Expected {
    tokens: Vec<Token>,
    rows: Rows,
    /// Positions that each head held after the last step.
    held: Vec<BTreeSet<Pos>>,
}

struct Walk {
    arch: &'static str,
    setup: Setup,
    policy: Params,
    recall: Recall,
    /// `saved` is saved and loaded on the way, `never` is not.
    saved: Session,
    never: Session,
    expected: Expected,
    /// Counter that tokens are made of, so that all of them differ.
    drawn: usize,
}

impl Walk {
    fn new((arch, setup, policy, recall): Way) -> Self {
        let [saved, never] = [(); 2].map(|()| {
            let mut session = open_as(&tiny::model(arch), setup, N_CTX, policy.clone(), recall.clone());
            // learns how the model scales its attention; nothing of the sequence stays
            read(&mut session, &[1]);
            session.clear();
            session
        });
        Self { arch, setup, policy, recall, saved, never, expected: Expected::default(), drawn: 0 }
    }

    fn draw(&mut self, n: usize) -> Vec<Token> {
        self.drawn += 1;
        words(n, self.drawn)
    }

    /// Does the same with both sessions, and checks that the results are equal.
    fn both<T: PartialEq + std::fmt::Debug>(&mut self, work: impl Fn(&mut Session) -> T) -> T {
        let one = work(&mut self.saved);
        assert_eq!(work(&mut self.never), one);
        one
    }

    /// Does something that fails or is undone, and checks that nothing has changed.
    fn without_trace(&mut self, work: impl FnOnce(&mut Session)) {
        let before = self.saved.save();
        work(&mut self.saved);
        assert!(self.saved.save() == before);
        self.realign();
    }

    /// Aligns the sessions where needed: a loaded window lies in other cells, so that sums add up in another order.
    fn realign(&mut self) {
        // marks of earlier turns are not saved
        let more = self.never.marks.len().saturating_sub(self.saved.marks.len());
        self.never.marks.drain(..more);
        if has_window(self.arch) {
            let bytes = self.saved.save();
            [self.saved, self.never] = [(); 2].map(|()| self.opened(&bytes));
        }
    }

    fn opened(&self, bytes: &[u8]) -> Session {
        let mut session = open_as(&tiny::model(self.arch), self.setup, N_CTX, self.policy.clone(), self.recall.clone());
        session.load(bytes).unwrap();
        session
    }

    /// Does something that is cancelled at the n-th check of the flag, or finishes before. Returns whether it finished.
    fn cancelled(&mut self, at: usize, work: impl Fn(&mut Session) -> Result<(), SessionError>) -> bool {
        let before = self.saved.save();
        self.saved.ctx.cancel_at(at);
        let done = work(&mut self.saved);
        self.saved.ctx.cancel_at(0);
        match done {
            Ok(()) => {
                work(&mut self.never).unwrap();
                true
            }
            Err(SessionError::Llama(LlamaError::Cancelled)) => {
                assert!(self.saved.save() == before, "cancelled at {at}");
                self.realign();
                false
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Prefill(n) => {
                let tokens = self.draw(n);
                self.both(|session| session.prefill_long(&tokens, ON).unwrap().tokens);
                self.expected.tokens.extend(&tokens);
            }
            Decode(n) => {
                for token in self.draw(n.min(self.saved.room())) {
                    self.both(|session| session.decode(token).unwrap());
                    self.expected.tokens.push(token);
                }
            }
            Answer(n) => {
                if !self.saved.logits().is_empty() {
                    let tokens = self.both(|session| answer(session, n));
                    self.expected.tokens.extend(&tokens);
                }
            }
            Compress => {
                if self.can_vote() {
                    self.both(|session| session.compress().unwrap().cells_after);
                }
            }
            Expand => {
                let left = self.both(|session| session.expand().map(|_| session.rows_aside()).unwrap());
                assert!(left == 0 || self.saved.room() == 0, "{left} rows a head are left aside");
            }
            Mark => self.both(Session::mark),
            Truncate(share) => {
                let pos = (share * self.expected.tokens.len() / 1000) as Pos;
                self.truncate(pos);
            }
            TruncateMost => {
                let pos = self.saved.exact_from().max(self.never.exact_from());
                assert!(self.truncate(pos));
            }
            Back(i) => {
                let Some(mark) = self.saved.marks.iter().rev().nth(i) else { return };
                let (pos, logits, elsewhere) = (mark.pos, mark.logits.clone(), mark.pos < self.saved.n_past());
                if self.truncate(pos) && elsewhere {
                    assert!(pos == 0 || self.saved.logits() == logits);
                }
            }
            SaveAndLoad => {
                let bytes = self.saved.save();
                self.saved = self.opened(&bytes);
                self.realign();
            }
            Return(n) => {
                let tokens = self.draw(n);
                self.without_trace(|session| {
                    let bytes = session.save();
                    session.prefill_long(&tokens, ON).unwrap();
                    session.compress().unwrap();
                    session.load(&bytes).unwrap();
                });
            }
            BadLoad(share) => self.without_trace(|session| {
                let mut bytes = session.save();
                bytes.truncate(share * bytes.len() / 1000);
                assert!(session.load(&bytes).is_err());
            }),
            CancelledPrefill(n, at) => {
                let tokens = self.draw(n.min(self.saved.room()));
                // rows that came back stay in the cache after a cancelled prefill
                self.both(|session| session.expand_beside(tokens.len()).unwrap().cells_after);
                if !tokens.is_empty() && self.cancelled(at, |session| session.prefill(&tokens, ON).map(|_| ())) {
                    self.expected.tokens.extend(&tokens);
                }
            }
            CancelledCompress(at) => {
                if self.can_vote() {
                    self.cancelled(at, |session| session.compress().map(|_| ()));
                }
            }
        }
    }

    /// A vote needs a token behind the compressed part, whose queries vote.
    fn can_vote(&self) -> bool {
        self.saved.n_past() > self.saved.sequence().exact_from()
    }

    /// Truncates, exactly or not at all.
    fn truncate(&mut self, pos: Pos) -> bool {
        let fits = pos == 0 || pos >= self.saved.exact_from();
        let done = self.both(|session| session.truncate(pos).is_ok());
        assert_eq!(done, fits);
        if done {
            self.expected.tokens.truncate(pos as usize);
            self.expected.rows.retain(|&(_, _, at), _| at < pos);
            self.expected.held.iter_mut().for_each(|held| held.retain(|&at| at < pos));
        }
        done
    }

    /// Compares both sessions with each other and with the model.
    fn check(&mut self) {
        assert!(self.saved.save() == self.never.save(), "the saved session is another");
        assert!(self.saved.logits() == self.never.logits());
        let (session, Expected { tokens, rows, held }) = (&self.saved, &mut self.expected);
        let n_past = tokens.len() as Pos;
        assert_eq!((session.n_past(), session.sequence().tokens()), (n_past, &tokens[..]));
        let cells = cache::cells(&session.ctx, SEQ);
        assert!(cells.len() <= N_CTX);
        assert_eq!(cells.last().map_or(0, |cell| cell.pos + 1), n_past);

        let layout = Layout::of(&session.ctx, SEQ).unwrap();
        let heads: Vec<_> =
            layout.n_head_kv().enumerate().flat_map(|(layer, n)| (0..n).map(move |kv| (layer, kv))).collect();
        held.resize(heads.len(), BTreeSet::new());
        let mut highest = vec![-1; cells.len()];
        for (head, (&(layer, kv), held)) in heads.iter().zip(held).enumerate() {
            let positions = session.sequence().positions(&cells, head);
            assert!(positions.windows(2).all(|pair| pair[0] < pair[1]), "{positions:?}");
            let now: BTreeSet<Pos> = positions.iter().copied().collect();
            for exact in session.sequence().exact_from()..n_past {
                assert!(now.contains(&exact), "{exact} of {n_past} is gone");
            }
            for ((&pos, cell), highest) in positions.iter().zip(&cells).zip(&mut highest) {
                let got = [false, true].map(|is_v| row(&layout, layer, is_v, kv, cell));
                match rows.get(&(layer, kv, pos)) {
                    Some(expected) => {
                        let can_come_back = session.recall() == Recall::Auto;
                        assert!(can_come_back || held.contains(&pos), "{pos} was dropped and is back");
                        assert!(*expected == got, "layer {layer}, head {kv}: this is not what came in at {pos}");
                    }
                    None => drop(rows.insert((layer, kv, pos), got)),
                }
                *highest = pos.max(*highest);
            }
            *held = now;
        }
        // truncation by cell positions must leave no newer row behind
        assert!(
            highest.iter().zip(&cells).all(|(&pos, cell)| pos <= cell.pos),
            "a label is older than what its cell holds"
        );
        self.check_archive(cells.len());
    }

    /// Checks that every row is unchanged and in exactly one place: in the cache or set aside.
    fn check_archive(&mut self, n_cells: usize) {
        let Some(archive) = &self.saved.sequence.archive else { return };
        let layout = Layout::of(&self.saved.ctx, SEQ).unwrap();
        let n_past = self.saved.n_past();
        let n_aside = n_past as usize - n_cells;
        let bytes = layout.bytes_per_cell() + size_of::<u32>() * layout.n_head_kv().sum::<usize>();
        assert_eq!((archive.len(), archive.bytes()), (n_aside, n_aside * bytes));
        let heads = layout.n_head_kv().enumerate().flat_map(|(layer, n)| (0..n).map(move |kv| (layer, kv)));
        for (head, (layer, kv)) in heads.enumerate() {
            let entries = archive.entries(head);
            let aside: BTreeSet<Pos> = entries.iter().map(|entry| entry.pos as Pos).collect();
            let all: BTreeSet<Pos> = aside.union(&self.expected.held[head]).copied().collect();
            assert!(all.into_iter().eq(0..n_past) && aside.is_disjoint(&self.expected.held[head]));
            for entry in entries {
                let got = key_and_value(&layout, layer, archive.row(head, entry));
                let place = (layer, kv, entry.pos as Pos);
                let expected = self.expected.rows.entry(place).or_insert_with(|| got.clone());
                assert!(*expected == got, "{place:?}: this is not what came in");
            }
        }
        assert!(self.saved.exact_from() == cache::cut_from(&self.saved.ctx, SEQ).min(n_past));
    }

    /// Compares first-layer keys with those of a session that dropped nothing: they depend on token and position alone.
    fn check_keys(&self) {
        let tokens = &self.expected.tokens;
        let mut full = open(self.arch, self.setup, tokens.len() + 1, Params::new(Kind::Full));
        if !tokens.is_empty() {
            read(&mut full, tokens);
        }
        let layout = Layout::of(&full.ctx, SEQ).unwrap();
        let cells = cache::cells(&full.ctx, SEQ);
        for (&(layer, kv, pos), [key, _]) in self.expected.rows.iter().filter(|((layer, ..), _)| *layer == 0) {
            let expected = row(&layout, layer, false, kv, &cells[pos as usize]);
            let apart = key.iter().zip(expected).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(apart < 0.1, "head {kv} holds another key at {pos}: {apart}");
        }
    }
}

fn has_window(arch: &str) -> bool {
    arch == "gemma2"
}

/// Progress callback that never cancels.
const ON: fn(usize, usize) -> ControlFlow<()> = |_, _| ControlFlow::Continue(());

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_cache_holds_what_a_simple_model_says(way in ways(), steps in vec(step(), 1..24)) {
        let mut walk = Walk::new(way);
        for step in &steps {
            walk.take(step);
            walk.check();
        }
        walk.check_keys();
    }
}
