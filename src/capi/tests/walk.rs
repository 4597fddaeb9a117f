//! Random walks of an app with three sequences, in one stream and in three. A vote, a plan or a truncation of one
//! sequence leaves the others unchanged, byte by byte; shared cells are refused; and the record of a sequence equals
//! its contents.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;

use super::app::*;
use crate::cache::{self, Layout};
use crate::capi::*;
use crate::llama::{Context, Pos, SeqId, Token};
use crate::sys;
use crate::tests::fixture::row;

const N_SEQ: usize = 3;
/// Most cells of a sequence: three of them and the spare cells of a vote fit into the cache.
const MOST: usize = 180;
const N_CTX: u32 = 768;
const SINKS: u32 = 4;
const RECENT: u32 = 16;
const MAX_CELLS: u32 = 60;

#[derive(Clone, Debug)]
enum Step {
    Decode(usize, usize),
    /// Decodes tokens like `Decode`, one at a time.
    Answer(usize, usize),
    /// Decodes one more token for all sequences that are not empty, in one batch.
    Together,
    Compress(usize),
    /// Votes on an answer that began at a place in thousandths of the sequence.
    Due(usize, usize),
    Expand(usize),
    Plan(usize),
    /// Protects so many tokens from a place on, or ends the protection.
    Protect(usize, usize, Pos, bool),
    /// Truncates at a place in thousandths of the sequence: by gvote, or by llama.cpp alone.
    Truncate(usize, usize),
    Remove(usize, usize),
    /// Truncates by gvote, at the first possible position.
    TruncateMost(usize),
    /// Copies into another, emptied sequence with `llama_memory_seq_cp()`.
    Copy(usize, usize),
    Clear(usize),
    /// Saves both states and loads them into the emptied sequence.
    SaveAndLoad(usize),
    /// Saves and loads llama.cpp's state alone.
    Reload(usize),
}
use Step::*;

fn step() -> impl Strategy<Value = Step> {
    let seq = || 0..N_SEQ;
    let share = || 0..1000usize;
    prop_oneof![
        6 => (seq(), 1..110usize).prop_map(|(seq, n)| Decode(seq, n)),
        3 => (seq(), 1..8usize).prop_map(|(seq, n)| Answer(seq, n)),
        2 => Just(Together),
        6 => seq().prop_map(Compress),
        3 => (seq(), share()).prop_map(|(seq, start)| Due(seq, start)),
        3 => seq().prop_map(Expand),
        1 => seq().prop_map(Plan),
        2 => (seq(), share(), 1..8, any::<bool>()).prop_map(|(seq, at, n, stays)| Protect(seq, at, n, stays)),
        3 => (seq(), share()).prop_map(|(seq, to)| Truncate(seq, to)),
        2 => (seq(), share()).prop_map(|(seq, to)| Remove(seq, to)),
        1 => seq().prop_map(TruncateMost),
        2 => (seq(), 1..N_SEQ).prop_map(|(seq, by)| Copy(seq, (seq + by) % N_SEQ)),
        1 => seq().prop_map(Clear),
        2 => seq().prop_map(SaveAndLoad),
        1 => seq().prop_map(Reload),
    ]
}

/// Simple model of a sequence.
#[derive(Clone, Default)]
struct Expected {
    n_past: Pos,
    /// A unique name for every cell, by the cell's position. Cells that two sequences share have the same name in both.
    cells: BTreeMap<Pos, usize>,
    /// Whether gvote can interpret the cells.
    known: bool,
    /// Whether the newest token was never cut off, so that its queries can vote.
    asks: bool,
    exact_from: Pos,
    /// Positions by head.
    held: Vec<BTreeSet<Pos>>,
    /// Positions that stay in the heads that hold them.
    protected: BTreeSet<Pos>,
    /// Keys by head and position.
    keys: BTreeMap<(usize, Pos), Vec<f32>>,
}

impl Expected {
    /// Whether the tokens that always stay may exceed the cap.
    fn is_cramped(&self) -> bool {
        self.protected.len() as u32 + SINKS + RECENT >= MAX_CELLS
    }
}

struct Walk {
    app: App,
    handle: Handle,
    unified: bool,
    recall: gvote_recall,
    expected: Vec<Expected>,
    /// Counter for the names of cells and the kinds of words.
    drawn: usize,
}

impl Walk {
    fn new(unified: bool, flash: bool, evict: gvote_evict, recall: gvote_recall) -> Self {
        let app = App::new(&tiny("llama"), &Shape { n_ctx: N_CTX, n_seq_max: N_SEQ as u32, unified, flash });
        let params = gvote_params {
            target_kl: 0.0,
            max_cells: MAX_CELLS,
            sinks: SINKS,
            recent: RECENT,
            window: RECENT,
            samples: 8,
            draft: 8,
            evict,
            recall,
            when: GVOTE_WHEN_AFTER,
            ..defaults()
        };
        let handle = Handle::with(&app, &params);
        Self {
            app,
            handle,
            unified,
            recall,
            expected: vec![Expected { known: true, ..Expected::default() }; N_SEQ],
            drawn: 0,
        }
    }

    fn draw(&mut self, n: usize) -> Vec<Token> {
        self.drawn += 1;
        words(n, self.drawn as i32)
    }

    /// Adds new cells at the next positions.
    fn grow(&mut self, seq: usize, n: usize) {
        let expected = &mut self.expected[seq];
        for _ in 0..n {
            self.drawn += 1;
            expected.cells.insert(expected.n_past, self.drawn);
            expected.n_past += 1;
            expected.asks = true;
        }
    }

    fn is_shared(&self, seq: usize) -> bool {
        let others = self.expected.iter().enumerate().filter(|(other, _)| *other != seq);
        let names: BTreeSet<_> = others.flat_map(|(_, other)| other.cells.values()).collect();
        self.expected[seq].cells.values().any(|name| names.contains(name))
    }

    /// Runs an operation on one sequence. Checks that it leaves the others unchanged, and that a failed one changes
    /// nothing.
    fn alone(&mut self, seq: usize, work: impl FnOnce(&mut Self) -> gvote_status) -> gvote_status {
        let states = |walk: &Self| (0..N_SEQ).map(|seq| walk.app.state(seq as SeqId)).collect::<Vec<_>>();
        let before = states(self);
        let status = work(self);
        for (other, (now, before)) in states(self).iter().zip(&before).enumerate() {
            assert!(now == before || (other == seq && status == GVOTE_OK), "sequence {other} was changed");
        }
        status
    }

    fn cut(&mut self, seq: usize, pos: Pos) {
        let expected = &mut self.expected[seq];
        expected.asks &= pos >= expected.n_past;
        expected.cells.retain(|&label, _| label < pos);
        expected.n_past = expected.n_past.min(pos);
        expected.held.iter_mut().for_each(|held| held.retain(|&at| at < pos));
        expected.keys.retain(|&(_, at), _| at < pos);
        expected.protected.retain(|&at| at < pos);
        if pos == 0 {
            *expected = Expected { known: true, ..Expected::default() };
        }
    }

    fn place(&self, seq: usize, share: usize) -> Pos {
        (share * self.expected[seq].n_past as usize / 1000) as Pos
    }

    fn clear(&mut self, seq: usize) {
        self.app.remove(seq as SeqId, -1, -1);
        self.cut(seq, 0);
        // gvote notices at its next call
        assert_eq!(self.handle.cells(&self.app, seq as SeqId).0, GVOTE_ERROR_NOT_SEEN);
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Decode(seq, n) => {
                let n = n.min(MOST.saturating_sub(self.expected[seq].cells.len()));
                if n > 0 {
                    let tokens = self.draw(n);
                    self.app.decode(&[(seq as SeqId, self.expected[seq].n_past, &tokens)]);
                    self.grow(seq, n);
                }
            }
            Answer(seq, n) => {
                for _ in 0..n {
                    self.take(&Decode(seq, 1));
                }
            }
            Together => {
                let fits = |expected: &Expected| expected.n_past > 0 && expected.cells.len() < MOST;
                let seqs: Vec<usize> = (0..N_SEQ).filter(|&seq| fits(&self.expected[seq])).collect();
                let token = self.draw(1);
                let parts: Vec<_> =
                    seqs.iter().map(|&seq| (seq as SeqId, self.expected[seq].n_past, &token[..])).collect();
                if !parts.is_empty() {
                    self.app.decode(&parts);
                    seqs.into_iter().for_each(|seq| self.grow(seq, 1));
                }
            }
            Compress(seq) | Due(seq, _) => {
                let (is_shared, before) = (self.is_shared(seq), self.expected[seq].clone());
                let start = if let Due(_, start) = *step { Some(self.place(seq, start)) } else { None };
                let (mut is_due, mut after, mut came) = (true, 0, 0);
                let status = self.alone(seq, |walk| {
                    let (status, report) = match start {
                        None => {
                            let (status, report) = walk.handle.compress(&walk.app, seq as SeqId);
                            (status, Some(report))
                        }
                        Some(start) => walk.handle.vote_if_due(&walk.app, seq as SeqId, start),
                    };
                    is_due = status != GVOTE_OK || report.is_some();
                    (after, came) = report.map_or((0, 0), |report| (report.cells_after as usize, report.rows_back));
                    status
                });
                if status == GVOTE_ERROR_PARAMS {
                    let stays = start.map_or(0, |start| before.n_past - start) as u32 + RECENT;
                    let is_cramped = start.is_some() && before.protected.len() as u32 + stays + SINKS >= MAX_CELLS;
                    assert!(is_cramped || before.is_cramped(), "{}", self.handle.error());
                } else if !is_due {
                    // this answer was voted on before, or the sequence is too short for a vote
                    assert!(start.is_some() && before.n_past > 0);
                } else if before.n_past == 0 {
                    assert_eq!(status, GVOTE_ERROR_NOT_SEEN);
                } else if !before.known {
                    let refusals = [GVOTE_ERROR_NOT_SEEN, GVOTE_ERROR_CHANGED];
                    assert!(refusals.contains(&status), "{status}: {}", self.handle.error());
                } else if !before.asks {
                    assert!([GVOTE_OK, GVOTE_ERROR_NOT_SEEN, GVOTE_ERROR_SHARED].contains(&status), "{status}");
                    if status == GVOTE_OK && (after < before.cells.len() || came > 0) {
                        self.relabel(seq);
                    }
                } else if is_shared && after < before.cells.len() && status != GVOTE_OK {
                    assert_eq!(status, GVOTE_ERROR_SHARED, "{}", self.handle.error());
                } else {
                    assert_eq!(status, GVOTE_OK, "{}", self.handle.error());
                    if after < before.cells.len() || came > 0 {
                        assert!(!is_shared, "cells of another sequence were rewritten");
                        self.relabel(seq);
                    }
                }
            }
            Expand(seq) => {
                let (is_shared, before) = (self.is_shared(seq), self.expected[seq].clone());
                let (n, free) = (before.cells.len(), cache::cells_free(&self.context(), seq as SeqId));
                // the sequence must not take the cells of the others
                let needed = free.saturating_sub(RECENT as usize).saturating_sub(MOST.saturating_sub(n));
                let mut after = 0;
                let status = self.alone(seq, |walk| {
                    let (status, cells) = walk.handle.expand(&walk.app, seq as SeqId, needed);
                    after = cells as usize;
                    status
                });
                let room = free.saturating_sub(RECENT as usize).saturating_sub(needed);
                let aside = if self.recall == GVOTE_RECALL_AUTO { before.n_past as usize - n } else { 0 };
                let comes = aside.min(room);
                if before.n_past == 0 {
                    assert_eq!(status, GVOTE_ERROR_NOT_SEEN);
                } else if !before.known {
                    let refusals = [GVOTE_ERROR_NOT_SEEN, GVOTE_ERROR_CHANGED];
                    assert!(refusals.contains(&status), "{status}: {}", self.handle.error());
                } else if is_shared && comes > 0 {
                    assert_eq!(status, GVOTE_ERROR_SHARED, "{}", self.handle.error());
                } else {
                    assert_eq!((status, after), (GVOTE_OK, n + comes), "{}", self.handle.error());
                    if comes > 0 {
                        self.come_back(seq);
                    }
                }
            }
            Plan(seq) => {
                let mut plan = GVOTE_OK;
                self.alone(seq, |walk| {
                    plan = walk.handle.plan(&walk.app, seq as SeqId).0;
                    // counts as failed, because a plan leaves this sequence unchanged as well
                    GVOTE_ERROR_CHANGED
                });
                let expected = &self.expected[seq];
                let Expected { known, asks, n_past, .. } = *expected;
                assert!(
                    (plan == GVOTE_OK) == (known && n_past > 0)
                        || (!asks && plan == GVOTE_ERROR_NOT_SEEN)
                        || (expected.is_cramped() && plan == GVOTE_ERROR_PARAMS),
                    "{plan}"
                );
            }
            Protect(seq, at, n, stays) => {
                let p0 = self.place(seq, at);
                let p1 = (p0 + n).min(self.expected[seq].n_past);
                let status = self.alone(seq, |walk| walk.handle.protect(&walk.app, seq as SeqId, p0, p1, stays));
                let Expected { known, n_past, protected, .. } = &mut self.expected[seq];
                assert_eq!(status == GVOTE_OK, *known && *n_past > 0, "{status}: {}", self.handle.error());
                if status == GVOTE_OK && stays {
                    protected.extend(p0..p1);
                } else if status == GVOTE_OK {
                    protected.retain(|pos| !(p0..p1).contains(pos));
                }
            }
            Truncate(seq, _) | TruncateMost(seq) => {
                let before = self.expected[seq].clone();
                let pos = if let Truncate(_, to) = *step { self.place(seq, to) } else { before.exact_from };
                let status = self.alone(seq, |walk| {
                    // SAFETY: both objects are alive.
                    unsafe { gvote_seq_truncate(walk.handle.0, walk.app.ctx, seq as SeqId, pos) }
                });
                let inside = pos > 0 && pos < before.exact_from;
                let comes_back = self.recall == GVOTE_RECALL_AUTO && !self.is_shared(seq);
                let fits = pos == 0 || (before.known && (!inside || comes_back));
                assert_eq!(status == GVOTE_OK, fits, "{status} at {pos} of {}", before.n_past);
                if status == GVOTE_OK {
                    self.cut(seq, pos);
                    if inside {
                        assert_eq!(self.cells(seq).len(), before.cells.len().min(pos as usize));
                        self.come_back(seq);
                    }
                }
            }
            Remove(seq, to) => {
                let pos = self.place(seq, to);
                self.app.remove(seq as SeqId, pos, -1);
                let left: Vec<Pos> = self.expected[seq].cells.range(..pos).map(|(label, _)| *label).collect();
                let is_whole = left.iter().copied().eq(0..left.len() as Pos);
                let inside = pos > 0 && pos < self.expected[seq].exact_from && !is_whole;
                self.cut(seq, if is_whole { left.len() as Pos } else { pos });
                let is_heard = is_whole && !left.is_empty() && self.handle.cells(&self.app, seq as SeqId).0 == GVOTE_OK;
                let expected = &mut self.expected[seq];
                expected.exact_from = expected.exact_from.min(expected.n_past);
                if is_heard && !expected.known {
                    // its first tokens are left, each in a cell of its own
                    expected.known = true;
                    expected.held.clear();
                    expected.keys.clear();
                }
                // a token at position 0 begins the sequence anew
                expected.known &= !inside;
                if !expected.known && pos > 0 {
                    // the app continues behind the remaining cells
                    expected.n_past = expected.cells.last_key_value().map_or(0, |(label, _)| label + 1);
                    if expected.cells.is_empty() {
                        self.clear(seq);
                    }
                }
            }
            Copy(from, to) => {
                self.clear(to);
                if self.expected[from].n_past == 0 {
                    return;
                }
                // SAFETY: valid memory.
                unsafe { sys::llama_memory_seq_cp(self.app.memory(), from as SeqId, to as SeqId, -1, -1) };
                if !self.unified {
                    // SAFETY: valid context; the copy is put off until then.
                    unsafe { sys::gvote_shim_update(self.app.ctx) };
                }
                let cells = self.cells(to);
                // a copy of a loaded sequence counts as loaded
                let is_loaded = cells.len() > 1 && cells[..2].iter().all(|cell| cell.token == 0);
                let is_whole = cells.iter().map(|cell| cell.pos).eq(0..cells.len() as Pos);
                let original = self.expected[from].clone();
                let mut copy = if original.known && !is_loaded && !is_whole {
                    original
                } else {
                    Expected {
                        known: !is_loaded && is_whole,
                        exact_from: 0,
                        held: Vec::new(),
                        protected: BTreeSet::new(),
                        keys: BTreeMap::new(),
                        ..original
                    }
                };
                if !self.unified {
                    // another stream has cells of its own
                    copy.cells.values_mut().for_each(|name| {
                        self.drawn += 1;
                        *name = self.drawn;
                    });
                }
                self.expected[to] = copy;
            }
            Clear(seq) => self.clear(seq),
            SaveAndLoad(seq) | Reload(seq) => {
                let before = self.expected[seq].clone();
                if before.n_past == 0 || !before.known || self.is_shared(seq) {
                    return;
                }
                let (state, known) = (self.app.state(seq as SeqId), self.handle.save(&self.app, seq as SeqId));
                self.app.remove(seq as SeqId, -1, -1);
                self.app.load(seq as SeqId, &state);
                if let Reload(_) = step {
                    // the tokens of a sequence that was loaded earlier were unknown anyway: it is the same again
                    if self.handle.cells(&self.app, seq as SeqId).0 != GVOTE_OK {
                        let unknown = Expected { held: Vec::new(), keys: BTreeMap::new(), ..before };
                        self.expected[seq] = Expected { known: false, exact_from: 0, ..unknown };
                    }
                    return;
                }
                assert_eq!(self.handle.load(&self.app, seq as SeqId, &known), GVOTE_OK, "{}", self.handle.error());
                assert!(self.app.state(seq as SeqId) == state);
                assert!(self.handle.save(&self.app, seq as SeqId) == known);
            }
        }
    }

    /// After a compaction: other cells, of which only the newest hold their own positions.
    fn relabel(&mut self, seq: usize) {
        let cells = self.cells(seq);
        let expected = &mut self.expected[seq];
        expected.exact_from = expected.exact_from.max(expected.n_past - RECENT as Pos);
        self.rename(seq, cells);
    }

    /// After rows came back: other cells, and a new first position from which no head lacks a token.
    fn come_back(&mut self, seq: usize) {
        let missing = |positions: Vec<Pos>| {
            let n_past = self.expected[seq].n_past;
            (0..n_past).rev().find(|pos| positions.binary_search(pos).is_err()).map_or(0, |pos| pos + 1)
        };
        let layout = Layout::of(&self.context(), seq as SeqId).unwrap();
        let heads = layout.n_head_kv().enumerate().flat_map(|(il, n)| (0..n as u32).map(move |head| (il as i32, head)));
        let positions = heads.map(|(il, head)| self.handle.positions(&self.app, seq as SeqId, il, head));
        let exact_from = positions.map(missing).max().unwrap_or(0);
        let cells = self.cells(seq);
        let expected = &mut self.expected[seq];
        expected.exact_from = exact_from;
        self.rename(seq, cells);
    }

    /// Takes `cells` as the present ones. Where the sequence can be cut, the position before must exist.
    fn rename(&mut self, seq: usize, cells: Vec<cache::Cell>) {
        let expected = &mut self.expected[seq];
        if expected.exact_from > 0 && !cells.iter().any(|cell| cell.pos == expected.exact_from - 1) {
            expected.exact_from += 1;
        }
        expected.cells.clear();
        for cell in cells {
            self.drawn += 1;
            expected.cells.insert(cell.pos, self.drawn);
        }
    }

    fn context(&self) -> Context {
        // SAFETY: a valid context, used here alone.
        unsafe { Context::lent(std::ptr::NonNull::new(self.app.ctx).unwrap(), Default::default()) }
    }

    fn cells(&self, seq: usize) -> Vec<cache::Cell> {
        cache::cells(&self.context(), seq as SeqId)
    }

    fn check(&mut self) {
        for seq in 0..N_SEQ {
            let cells = self.cells(seq);
            let labels: Vec<Pos> = self.expected[seq].cells.keys().copied().collect();
            assert!(cells.iter().map(|cell| cell.pos).eq(labels), "sequence {seq} has other cells");
            if self.unified {
                let is_shared = self.is_shared(seq);
                assert_eq!(cells.iter().any(|cell| cell.shared), is_shared, "sequence {seq}");
            }
            if self.expected[seq].known && !cells.is_empty() {
                self.check_known(seq, &cells);
            }
        }
    }

    fn check_known(&mut self, seq: usize, cells: &[cache::Cell]) {
        assert_eq!(
            self.handle.cells(&self.app, seq as SeqId),
            (GVOTE_OK, cells.len() as u32),
            "{}",
            self.handle.error()
        );
        let ctx = self.context();
        let layout = Layout::of(&ctx, seq as SeqId).unwrap();
        let heads: Vec<_> = layout.n_head_kv().enumerate().flat_map(|(il, n)| (0..n).map(move |kv| (il, kv))).collect();
        let positions: Vec<_> = heads
            .iter()
            .map(|&(il, kv)| self.handle.positions(&self.app, seq as SeqId, il as i32, kv as u32))
            .collect();
        let Expected { n_past, exact_from, held, protected, keys, .. } = &mut self.expected[seq];
        held.resize(heads.len(), BTreeSet::new());
        for (head, (positions, held)) in positions.iter().zip(held).enumerate() {
            assert!(positions.windows(2).all(|pair| pair[0] < pair[1]), "{positions:?}");
            let now: BTreeSet<Pos> = positions.iter().copied().collect();
            assert!((*exact_from..*n_past).all(|pos| now.contains(&pos)));
            assert!(protected.intersection(held).all(|pos| now.contains(pos)), "{protected:?} should stay");
            for (&pos, cell) in positions.iter().zip(cells) {
                assert!(pos <= cell.pos);
                if !self.unified {
                    // the fixture reads the first stream only
                    continue;
                }
                let (il, kv) = heads[head];
                let key = row(&layout, il, false, kv, cell);
                match keys.get(&(head, pos)) {
                    Some(expected) => {
                        let comes_back = self.recall == GVOTE_RECALL_AUTO;
                        assert!(comes_back || held.contains(&pos), "{pos} was dropped and is back");
                        assert!(*expected == key, "sequence {seq}, head {head}: this is not what came in at {pos}");
                    }
                    None => drop(keys.insert((head, pos), key)),
                }
            }
            *held = now;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_meets_the_cells_of_another(
        unified in any::<bool>(),
        flash in any::<bool>(),
        evict in prop::sample::select(vec![GVOTE_EVICT_COMPOSITE, GVOTE_EVICT_CELLS]),
        recall in prop::sample::select(vec![GVOTE_RECALL_AUTO, GVOTE_RECALL_OFF]),
        steps in vec(step(), 1..30),
    ) {
        let mut walk = Walk::new(unified, flash, evict, recall);
        for step in &steps {
            walk.take(step);
            walk.check();
        }
    }
}

/// The first sequence shares the first cells of the third one as well.
#[test]
fn a_copy_of_a_copy_that_went_on_is_followed() {
    for recall in [GVOTE_RECALL_AUTO, GVOTE_RECALL_OFF] {
        for unified in [true, false] {
            let mut walk = Walk::new(unified, false, GVOTE_EVICT_COMPOSITE, recall);
            for step in [Decode(1, 61), Compress(1), Copy(1, 0), Decode(0, 1), Copy(0, 2), Compress(1), Decode(2, 1)] {
                walk.take(&step);
                walk.check();
            }
        }
    }
}
