//! What gvote knows of sequences goes along with their saved states.
//!
//! A state is saved with everything that votes set aside back in the cache, so that its bytes are those that llama.cpp alone would
//! have written. What gvote knows then lies here, beside a hash of the bytes. Where the cache has no room for all of it, the bytes
//! themselves carry what is missing, behind llama.cpp's own; and files of one sequence always carry it, which llama.cpp allows.

use std::collections::VecDeque;

use blake3::Hash;

use super::context::Home;
use super::ffi::gvote::Gvote;

/// What is known of sequences: their numbers, and bytes of the library.
pub type Knowledge = Vec<(i32, Vec<u8>)>;

/// States that something is remembered of. The oldest are forgotten: votes are refused then on what they bring back.
const MAX_REMEMBERED: usize = 64;

#[derive(Default)]
pub struct Remembered(VecDeque<(usize, Hash, Knowledge)>);

impl Remembered {
    pub fn insert(&mut self, state: &[u8], knowledge: Knowledge) {
        let hash = blake3::hash(state);
        self.0.retain(|entry| entry.1 != hash);
        self.0.truncate(MAX_REMEMBERED - 1);
        self.0.push_front((state.len(), hash, knowledge));
    }

    pub fn get(&self, state: &[u8]) -> Knowledge {
        if !self.0.iter().any(|entry| entry.0 == state.len()) {
            return Knowledge::new();
        }
        let hash = blake3::hash(state);
        self.0.iter().find(|entry| entry.1 == hash).map(|entry| entry.2.clone()).unwrap_or_default()
    }
}

/// What ends the bytes that are added to a state.
const MAGIC: &[u8; 16] = b"gvote sequences\x01";

/// Knowledge as bytes: for each sequence its bytes, their number and its own; the number of sequences, and the end.
pub fn to_bytes(knowledge: &Knowledge) -> Vec<u8> {
    let mut bytes = Vec::new();
    if knowledge.is_empty() {
        return bytes;
    }
    for (seq, known) in knowledge {
        bytes.extend_from_slice(known);
        bytes.extend_from_slice(&(known.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&seq.to_le_bytes());
    }
    bytes.extend_from_slice(&(knowledge.len() as u32).to_le_bytes());
    bytes.extend_from_slice(MAGIC);
    bytes
}

/// Takes knowledge off the end of a state: how many bytes are llama.cpp's, and the rest. Without any, all are.
pub fn split(state: &[u8]) -> (usize, Knowledge) {
    read(state).unwrap_or((state.len(), Knowledge::new()))
}

fn read(state: &[u8]) -> Option<(usize, Knowledge)> {
    let mut rest = state.strip_suffix(MAGIC)?;
    let mut number = |width: usize| {
        let (before, bytes) = rest.split_at_checked(rest.len().checked_sub(width)?)?;
        rest = before;
        Some(bytes)
    };
    let n = u32::from_le_bytes(number(4)?.try_into().ok()?);
    let mut knowledge = Knowledge::new();
    for _ in 0..n {
        let seq = i32::from_le_bytes(number(4)?.try_into().ok()?);
        let len = u64::from_le_bytes(number(8)?.try_into().ok()?);
        let known = number(usize::try_from(len).ok()?)?;
        knowledge.push((seq, known.to_vec()));
    }
    knowledge.reverse();
    Some((rest.len(), knowledge))
}

impl Home {
    /// What the library knows of a sequence, as bytes; none of one that it cannot vote on.
    fn known(&self, seq: i32) -> Option<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the handle's own context, between two calls of llama_decode(); room for the answer.
        self.handle.call(|lib, g, ctx| unsafe { lib.gvote_state_size(g, ctx, seq, &mut size) }).ok()?;
        let mut bytes = vec![0_u8; size];
        let data = bytes.as_mut_ptr().cast();
        // SAFETY: a buffer of that size.
        let got = |lib: &Gvote, g, ctx| unsafe { lib.gvote_state_get(g, ctx, seq, data, size, &mut size) };
        self.handle.call(got).ok()?;
        bytes.truncate(size);
        Some(bytes)
    }

    /// What is known of these sequences.
    pub fn knowledge(&self, seqs: impl IntoIterator<Item = i32>) -> Knowledge {
        seqs.into_iter().filter_map(|seq| Some((seq, self.known(seq)?))).collect()
    }

    /// Before a sequence is saved, or all (`seq` < 0): brings back what votes set aside. The sequences that still lack something.
    pub fn before_save(&mut self, seq: i32) -> Vec<i32> {
        self.voted(seq).into_iter().filter(|&seq| !self.expand(seq, 0)).collect()
    }

    /// A sequence was loaded: takes over what is known of it.
    pub fn was_loaded(&mut self, seq: i32, known: Option<&[u8]>) {
        *self.sequence(seq) = Default::default();
        let Some(known) = known else { return };
        let (data, size) = (known.as_ptr().cast(), known.len());
        // SAFETY: the handle's own context; the bytes live for the call.
        let set = self.handle.call(|lib, g, ctx| unsafe { lib.gvote_state_set(g, ctx, seq, data, size) });
        let mut n_cells = 0;
        // SAFETY: as above, with room for the answer.
        let cells = |lib: &Gvote, g, ctx| unsafe { lib.gvote_seq_cells(g, ctx, seq, &mut n_cells) };
        let is_known = set.and_then(|()| self.handle.call(cells));
        match is_known {
            Ok(()) => self.sequence(seq).is_voted = i64::from(n_cells) < i64::from(self.handle.end(seq)),
            Err(failure) => super::report::line(&format!("sequence {seq}: loaded without votes: {}", failure.text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knowledge_comes_off_a_state_as_it_was_added() {
        let knowledge = vec![(3, b"three".to_vec()), (0, Vec::new())];
        let state = [&b"llama.cpp's own"[..], &to_bytes(&knowledge)].concat();
        assert_eq!(split(&state), (15, knowledge));
    }

    #[test]
    fn without_knowledge_nothing_is_added() {
        assert!(to_bytes(&Vec::new()).is_empty());
        assert_eq!(split(b"llama.cpp's own"), (15, Vec::new()));
    }

    #[test]
    fn bytes_that_are_cut_off_are_llama_cpps() {
        let whole = to_bytes(&vec![(1, b"known".to_vec())]);
        for from in 1..whole.len() {
            let cut = &whole[from..];
            assert_eq!(split(cut), (cut.len(), Vec::new()), "{from}");
        }
    }

    #[test]
    fn a_state_is_known_again_until_many_others_came() {
        let mut remembered = Remembered::default();
        let known = |n: usize| vec![(0, vec![n as u8])];
        for n in 0..=MAX_REMEMBERED {
            remembered.insert(&[n as u8; 9], known(n));
        }
        assert_eq!(remembered.get(&[1; 9]), known(1));
        assert_eq!(remembered.get(&[0; 9]), Vec::new(), "the oldest");
        assert_eq!(remembered.get(&[1; 8]), Vec::new(), "another length");
    }
}
