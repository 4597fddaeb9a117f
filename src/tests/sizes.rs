//! Compares the sizes that llama.cpp computes without weights with those of real contexts.

#![forbid(unsafe_code)]

use super::tiny::{SPECS, Tiny};
use crate::SessionParams;
use crate::llama::{CacheType, Context, ContextParams, FlashAttention, ModelParams, Simulation};

#[test]
fn a_simulation_allocates_what_a_real_context_does() {
    let dir = tempfile::tempdir().unwrap();
    for spec in SPECS {
        let tiny = Tiny::new(dir.path(), spec);
        let simulation = Simulation::load(&tiny.path, &ModelParams::default()).unwrap();
        for (n_ctx, n_ubatch, flash_attn, cache_type) in [
            (300, 512, FlashAttention::On, CacheType::Q8_0),
            (900, 64, FlashAttention::Off, CacheType::F16),
            (700, 128, FlashAttention::Auto, CacheType::Q4_0),
        ] {
            let context =
                ContextParams { n_ubatch, flash_attn, type_k: cache_type, type_v: cache_type, ..Default::default() };
            let params = SessionParams { context, ..Default::default() }.with_spare_cells(n_ctx);
            let real = Context::new(&tiny.model, &params).unwrap().buffers();
            let simulated = simulation.memory(&params).unwrap();
            assert_eq!(simulated, real, "{spec:?} {params:?}");
            assert!(real.host.cache > 0 && real.host.compute > 0 && real.host.weights >= tiny.model.size() as usize);
        }
    }
}

#[test]
fn a_simulation_refuses_what_a_context_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new(dir.path(), SPECS[0]);
    let simulation = Simulation::load(&tiny.path, &ModelParams::default()).unwrap();
    let params = ContextParams { flash_attn: FlashAttention::Off, type_v: CacheType::Q4_0, ..Default::default() };
    assert!(simulation.memory(&params).unwrap_err().to_string().contains("flash attention"));
    assert!(Simulation::load(dir.path().join("none").as_path(), &ModelParams::default()).is_err());
}
