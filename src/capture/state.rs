//! What was captured, as bytes.

use half::f16;

use super::moments::Moments;
use super::{Capture, Inner, LayerCapture, LogitScale, Mode};
use crate::llama::Pos;

impl Capture {
    /// What was captured, as bytes: per layer the moments and the window's queries.
    pub fn save(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for layer in &self.inner.layers {
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
            for x in [layer.scale.pre, layer.scale.post, f32::from(u8::from(layer.scale.softcap))] {
                out.extend_from_slice(&x.to_le_bytes());
            }
        }
        out
    }

    /// A capture like this one that holds what [`Self::save`] wrote; `None` if the bytes do not fit.
    pub fn restored(&self, data: &[u8]) -> Option<Self> {
        fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
            let (head, tail) = rest.split_first_chunk()?;
            *rest = tail;
            Some(*head)
        }
        let old = &self.inner;
        let mut rest = data;
        let mut layers = Vec::with_capacity(old.layers.len());
        for layer in &old.layers {
            let n = usize::try_from(u64::from_le_bytes(take(&mut rest)?)).ok()?;
            if n != 0 && n != old.n_embd {
                return None;
            }
            let count = f64::from_le_bytes(take(&mut rest)?);
            let mut floats =
                |n: usize| -> Option<Vec<f64>> { (0..n).map(|_| Some(f64::from_le_bytes(take(&mut rest)?))).collect() };
            let (mean, m2) = (floats(n)?, floats(n)?);
            let mut window_pos = Vec::with_capacity(old.window);
            for _ in 0..old.window {
                window_pos.push(Pos::from_le_bytes(take(&mut rest)?));
            }
            let mut window_q = Vec::with_capacity(layer.window_q.len());
            for _ in 0..layer.window_q.len() {
                window_q.push(f16::from_le_bytes(take(&mut rest)?));
            }
            let [pre, post, softcap] = [take(&mut rest)?, take(&mut rest)?, take(&mut rest)?].map(f32::from_le_bytes);
            layers.push(LayerCapture {
                moments: Moments { count, mean, m2 },
                window_q,
                window_pos,
                scale: LogitScale { pre, post, softcap: softcap != 0.0 },
                ..*layer
            });
        }
        rest.is_empty().then(|| Self {
            inner: Inner {
                ctx: old.ctx,
                layout: old.layout.clone(),
                n_embd: old.n_embd,
                window: old.window,
                skip: old.skip,
                layers,
                by_il: old.by_il.clone(),
                by_tensor: old.by_tensor.clone(),
                mode: Mode::Prompt(0),
                rows: None,
                pending: Vec::new(),
                scratch: Vec::new(),
            },
        })
    }
}
