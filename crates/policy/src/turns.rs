//! Merges two opinions on the entries of a head into one ranking by taking turns.

use std::ops::Range;

use half::f16;

use super::rank::Forced;

/// Number of possible scores: the bit patterns of a non-negative f16, which sort like its values.
const SCORES: usize = 1 << 15;
/// The score of an entry that ranks before all others, in both opinions.
const FORCED: u32 = 0x7fff_7fff;

/// Number of entries checked at a time. Whether an entry is still left is unpredictable, and a mispredicted branch
/// costs more than the check. So this many entries are checked without a branch, and each is checked again, with a
/// predictable branch, on its turn.
const LOOK_AHEAD: usize = 64;

/// Packs two scores of an entry into the number that [`Turns::rank`] takes. Scores must not be negative.
#[inline]
pub(super) fn pair(first: f16, second: f16) -> u32 {
    u32::from(first.to_bits()) << 16 | u32::from(second.to_bits())
}

/// Returns the first score of a [`pair`].
#[inline]
pub(super) fn first(pair: u32) -> f16 {
    f16::from_bits((pair >> 16) as u16)
}

/// Returns the second score of a [`pair`].
#[inline]
pub(super) fn second(pair: u32) -> f16 {
    f16::from_bits(pair as u16)
}

/// Buffers to rank one head after another: 16 bytes an entry and 256 KiB.
pub(super) struct Turns {
    /// `[n]` each opinion's entries from best to worst.
    lists: [Vec<Listed>; 2],
    /// `[SCORES]` for either list: the number of entries that have the score, then the place of the next such entry.
    places: Vec<[u32; 2]>,
}

/// An entry in one list, and its place in the other.
#[derive(Clone, Copy, Default)]
struct Listed {
    entry: u32,
    elsewhere: u32,
}

impl Turns {
    /// Allocates buffers for heads of `n` entries.
    pub fn new(n: usize) -> Self {
        let list = || vec![Listed::default(); n];
        Self { lists: [list(), list()], places: vec![[0; 2]; SCORES] }
    }

    /// Turns the `[n]` scores of a KV head, each a [`pair`], into its entries from best to worst: the forced ones,
    /// ascending, then the best remaining entry of the first list, the best remaining entry of the second list, and so
    /// on.
    pub fn rank(&mut self, forced: &Forced, head: usize, scores: &mut [u32]) {
        forced.entries(head).for_each(|entry| scores[entry as usize] = FORCED);
        self.sort(scores);
        self.take(forced.count_of(head), scores);
    }

    /// Fills `order` with the `forced` entries, which come first in both lists, and then by turns.
    fn take(&self, forced: usize, order: &mut [u32]) {
        let (first, others) = order.split_at_mut(forced);
        first.iter_mut().zip(&self.lists[0]).for_each(|(to, listed)| *to = listed.entry);
        let [mut ours, mut theirs] = self.lists.each_ref().map(|list| Left::new(list, forced));
        let (pairs, last) = others.as_chunks_mut();
        for [first, second] in pairs {
            *first = ours.take(theirs.passed);
            *second = theirs.take(ours.passed);
        }
        last.iter_mut().for_each(|last| *last = ours.take(theirs.passed));
    }

    /// Sorts both lists, the highest score first; among equal scores, the older entry first. A counting sort suffices
    /// because there are few possible scores.
    fn sort(&mut self, scores: &[u32]) {
        let Self { lists: [ours, theirs], places } = self;
        let halves = |pair: u32| [(pair >> 16) as usize % SCORES, pair as usize % SCORES];
        let places = &mut places[..SCORES];
        places.fill([0; 2]);
        for &pair in scores {
            let [a, b] = halves(pair);
            places[a][0] += 1;
            places[b][1] += 1;
        }
        let mut next = [0; 2];
        for [a, b] in places.iter_mut().rev() {
            next[0] += std::mem::replace(a, next[0]);
            next[1] += std::mem::replace(b, next[1]);
        }
        for (entry, &pair) in (0..).zip(scores) {
            let [a, b] = halves(pair);
            let place = [places[a][0], places[b][1]];
            places[a][0] += 1;
            places[b][1] += 1;
            ours[place[0] as usize] = Listed { entry, elsewhere: place[1] };
            theirs[place[1] as usize] = Listed { entry, elsewhere: place[0] };
        }
    }
}

/// The remaining entries of a list.
struct Left<'a> {
    list: &'a [Listed],
    /// All entries before this place are taken.
    passed: u32,
    /// Entries from this place on have not been checked.
    unseen: usize,
    /// Places of entries that were left when they were checked, and the range of them still to be used.
    ahead: [u32; LOOK_AHEAD],
    next: Range<usize>,
}

impl<'a> Left<'a> {
    /// Starts after the first `taken` entries of the list.
    fn new(list: &'a [Listed], taken: usize) -> Self {
        Self { list, passed: taken as u32, unseen: taken, ahead: [0; LOOK_AHEAD], next: 0..0 }
    }

    /// Takes the best remaining entry. The other list has taken its entries before `passed`, so its other entries are
    /// left. Each list holds every entry once, so an entry is left as long as the ranking has a free place.
    #[inline(always)] // as calls, one for each entry, the turns take a third longer
    fn take(&mut self, passed: u32) -> u32 {
        loop {
            for i in &mut self.next {
                let place = self.ahead[i];
                let Listed { entry, elsewhere } = self.list[place as usize];
                if elsewhere >= passed {
                    self.passed = place + 1;
                    return entry;
                }
            }
            let part = &self.list[self.unseen..];
            let part = &part[..part.len().min(LOOK_AHEAD)];
            let mut end = 0;
            for (place, listed) in (self.unseen as u32..).zip(part) {
                self.ahead[end] = place;
                end += usize::from(listed.elsewhere >= passed);
            }
            self.unseen += part.len();
            self.next = 0..end;
            if part.is_empty() {
                return 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Params, Protected};
    use super::*;

    /// A simple version that searches both lists from the start at every turn.
    fn naive(forced: &[u32], scores: &[[f32; 2]]) -> Vec<u32> {
        let lists = [0, 1].map(|side| {
            let mut list: Vec<u32> = (0..scores.len() as u32).collect();
            list.sort_by(|&i, &j| scores[j as usize][side].total_cmp(&scores[i as usize][side]).then(i.cmp(&j)));
            list
        });
        let mut order = forced.to_vec();
        for turn in 0..scores.len() - forced.len() {
            let best = lists[turn % 2].iter().find(|entry| !order.contains(entry));
            order.extend(best);
        }
        order
    }

    #[test]
    fn opinions_take_turns() {
        let mut state = 7_u32;
        let mut random = move |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % below
        };
        let params = Params { sinks: 2, recent: 3, ..Params::default() };
        for n in [1, 5, 6, 63, 64, 197, 1500] {
            let protected = Protected::by_head(vec![vec![], (6..n as u32).step_by(50).collect()]);
            let forced = Forced::new(&params, n, &protected);
            let mut turns = Turns::new(n);
            // few and many different scores, from 0 to half of the range, for one head after another
            for (head, step) in [(0, 0x3c00), (1, 0x300), (0, 1), (1, 1)] {
                let mut score = || f16::from_bits((random(0x7800 / step + 1) * step) as u16);
                let scores: Vec<[f16; 2]> = (0..n).map(|_| [score(), score()]).collect();
                let mut order: Vec<u32> = scores.iter().map(|&[a, b]| pair(a, b)).collect();
                assert!(order.iter().zip(&scores).all(|(&pair, scores)| [first(pair), second(pair)] == *scores));
                turns.rank(&forced, head, &mut order);
                let forced: Vec<u32> = (0..n as u32).filter(|&j| forced.contains(head, j as usize)).collect();
                let scores: Vec<_> = scores.iter().map(|pair| pair.map(f16::to_f32)).collect();
                assert_eq!(order, naive(&forced, &scores), "{n} entries, head {head}, step {step}");
            }
        }
    }
}
