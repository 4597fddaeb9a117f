//! The ways that memory of a device takes, walked on the host: they give what the direct ways give.

use super::fixture::*;
use crate::cache::{Layout, PRETEND_DEVICE};
use crate::compact::compact;
use crate::llama::Pos;

const N: usize = 300;

/// Runs `f` as if no memory were within the host's reach.
pub fn on_device<T>(f: impl FnOnce() -> T) -> T {
    PRETEND_DEVICE.set(true);
    let out = f();
    PRETEND_DEVICE.set(false);
    out
}

#[test]
fn capture_and_probe_see_the_same() {
    let model = model();
    let tokens = tokens(&model, N);
    for setup in [F16, F16_FLASH, Q8_0] {
        let run = || {
            let mut ctx = context(&model, setup, 512, 64);
            let mut capture = captured(&mut ctx, &tokens);
            let probe = capture.probe(&mut ctx, 0, N as Pos - 1, 40, 3).unwrap();
            let window = capture.window(0, 7, N as Pos - 1).unwrap();
            (capture.statistics(0, 7), window.data, probe[7].data.clone(), probe[29].data.clone(), cells(&ctx))
        };
        let (host, device) = (run(), on_device(run));
        assert!(host.0 == device.0, "{setup:?}: statistics");
        assert!(host.1 == device.1, "{setup:?}: window");
        assert!(host.4 == device.4, "{setup:?}: cells");
        for (host, device) in [(&host.2, &device.2), (&host.3, &device.3)] {
            let error: f64 = host.iter().zip(device).map(|(a, b)| (a.to_f64() - b.to_f64()).powi(2)).sum();
            let norm: f64 = host.iter().map(|a| a.to_f64().powi(2)).sum();
            assert!((error / norm).sqrt() < 1e-2, "{setup:?}: synthetic queries differ by {}", (error / norm).sqrt());
        }
    }
}

#[test]
fn compaction_moves_the_same_rows() {
    let model = model();
    let tokens = tokens(&model, N + 1);
    for setup in [F16, F16_FLASH, Q8_0, Q4_0] {
        let run = || {
            let mut ctx = context(&model, setup, 512, 64);
            decode(&mut ctx, &tokens[..N], 0, 0);
            let layout = Layout::of(&ctx, 0).unwrap();
            compact(&mut ctx, 0, &random_heads(&layout, N, 120, 5)).unwrap();
            next_logits(&mut ctx, tokens[N], N as Pos)
        };
        assert!(run() == on_device(run), "{setup:?}");
    }
}
