//! Serializes the captured data of a sequence.

#![forbid(unsafe_code)]

use half::f16;

use super::moments::Moments;
use super::record::{LayerRecord, Record};
use super::{Capture, LogitScale};
use crate::llama::{Pos, SeqId};

/// Upper bound on the tokens of a sequence. Leaves room for multiplying numbers of tokens by small factors.
const MOST_TOKENS: u64 = 1 << 48;

/// Output of [`Capture::save`], read and validated.
pub struct Restored {
    record: Record,
    scales: Vec<LogitScale>,
}

/// Copy of the captured data of a sequence at some moment; None if there was none.
#[derive(Clone)]
pub(crate) struct Captured(Option<Record>);

impl From<Restored> for Captured {
    fn from(restored: Restored) -> Self {
        Self(Some(restored.record))
    }
}

impl Capture {
    /// Copies the captured data of a sequence, for [`Self::set_back`].
    pub(crate) fn captured(&mut self, seq: SeqId) -> Captured {
        self.settle();
        Captured(self.inner.records.get(&seq).filter(|record| !record.is_new()).cloned())
    }

    /// Sets the captured data of a sequence back to an earlier copy.
    pub(crate) fn set_back(&mut self, seq: SeqId, captured: Captured) {
        if let Err(error) = self.inner.give_up() {
            self.inner.failed = Some(error);
        }
        let record = captured.0.unwrap_or_else(|| Record::new(&self.inner.layers, self.inner.window));
        self.inner.records.insert(seq, record);
    }

    /// Serializes the captured data of a sequence: the number of tokens, and per layer the moments and the window's queries.
    pub fn save(&mut self, seq: SeqId) -> Vec<u8> {
        let captured = self.captured(seq);
        self.encode(&captured)
    }

    /// Serializes an earlier copy, as [`Self::save`] does.
    pub(crate) fn encode(&self, captured: &Captured) -> Vec<u8> {
        let new;
        let record = match &captured.0 {
            Some(record) => record,
            None => {
                new = Record::new(&self.inner.layers, self.inner.window);
                &new
            }
        };
        let mut out = (record.n_tokens as u64).to_le_bytes().to_vec();
        for (layer, shape) in record.layers.iter().zip(&self.inner.layers) {
            let n = layer.moments.mean.len() as u64;
            out.extend_from_slice(&n.to_le_bytes());
            out.extend_from_slice(&layer.moments.count.to_le_bytes());
            for x in layer.moments.mean.iter().chain(&layer.moments.m2) {
                out.extend_from_slice(&x.to_le_bytes());
            }
            for pos in &layer.window_pos {
                out.extend_from_slice(&pos.to_le_bytes());
            }
            for x in &layer.window_q {
                out.extend_from_slice(&x.to_le_bytes());
            }
            let scale = shape.scale;
            for x in [scale.pre, scale.post, f32::from(u8::from(scale.softcap))] {
                out.extend_from_slice(&x.to_le_bytes());
            }
        }
        out
    }

    /// Reads the output of [`Self::save`]; `None` if the bytes do not fit this capture, or contain values that no capture writes.
    pub fn read(&self, data: &[u8]) -> Option<Restored> {
        fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
            let (head, tail) = rest.split_first_chunk()?;
            *rest = tail;
            Some(*head)
        }
        let inner = &self.inner;
        let mut rest = data;
        let n_tokens = Some(u64::from_le_bytes(take(&mut rest)?)).filter(|&n| n <= MOST_TOKENS)?;
        let n_tokens = usize::try_from(n_tokens).ok()?;
        let mut layers = Vec::with_capacity(inner.layers.len());
        let mut scales = Vec::with_capacity(inner.layers.len());
        for shape in &inner.layers {
            let n = usize::try_from(u64::from_le_bytes(take(&mut rest)?)).ok()?;
            let count = f64::from_le_bytes(take(&mut rest)?);
            // either no token was counted, or every channel has values
            if n != if count > 0.0 { inner.n_embd } else { 0 } || !(0.0..=MOST_TOKENS as f64).contains(&count) {
                return None;
            }
            let mut floats =
                |n: usize| -> Option<Vec<f64>> { (0..n).map(|_| Some(f64::from_le_bytes(take(&mut rest)?))).collect() };
            let (mean, m2) = (floats(n)?, floats(n)?);
            // samples are drawn from these values in f32
            let is_mean = |x: &f64| (*x as f32).is_finite();
            let is_sum = |x: &f64| *x >= 0.0 && ((x / count) as f32).is_finite();
            if !mean.iter().all(is_mean) || !m2.iter().all(is_sum) {
                return None;
            }
            let mut window_pos = Vec::with_capacity(inner.window);
            for slot in 0..inner.window {
                let pos = Pos::from_le_bytes(take(&mut rest)?);
                if pos != -1 && (pos < 0 || pos as usize % inner.window != slot) {
                    return None;
                }
                window_pos.push(pos);
            }
            let mut window_q = Vec::with_capacity(inner.window * shape.n_q);
            for _ in 0..inner.window * shape.n_q {
                window_q.push(f16::from_le_bytes(take(&mut rest)?));
            }
            let [pre, post, softcap] = [take(&mut rest)?, take(&mut rest)?, take(&mut rest)?].map(f32::from_le_bytes);
            if !(pre.is_finite() && post.is_finite()) {
                return None;
            }
            layers.push(LayerRecord { moments: Moments { count, mean, m2 }, n_q: shape.n_q, window_q, window_pos });
            scales.push(LogitScale { pre, post, softcap: softcap != 0.0 });
        }
        rest.is_empty().then(|| Restored { record: Record::of(layers, n_tokens), scales })
    }

    /// Replaces the captured data of a sequence.
    pub fn restore(&mut self, seq: SeqId, restored: Restored) {
        self.settle();
        for (layer, scale) in self.inner.layers.iter_mut().zip(restored.scales) {
            layer.scale = scale;
        }
        self.inner.records.insert(seq, restored.record);
    }
}
