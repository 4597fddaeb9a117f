//! What a model file tells, against models and contexts that really exist.

use gvote::Layout;
use gvote::llama::{self, CacheType, Context, ContextParams, FlashAttention, Model, ModelParams};
use gvote_gguf::{Gguf, Support};

#[allow(dead_code)] // it serves other tests too
#[path = "../../../src/tests/tiny.rs"]
mod tiny;

use tiny::{RECURRENT, SPECS, Tiny};

#[test]
fn a_file_tells_the_sizes_of_every_architecture() {
    let dir = tempfile::tempdir().unwrap();
    for spec in SPECS {
        let tiny = Tiny::new(dir.path(), spec);
        let file = Gguf::open(&tiny.path).unwrap();
        assert_eq!((file.n_params(), file.n_bytes()), (tiny.model.n_params(), tiny.model.size()), "{spec:?}");
        let expected = if spec.arch == "gemma2" { Support::BaseOnly } else { Support::Composite };
        assert_eq!(file.info.support(), expected, "{spec:?}");
        for cache_type in [CacheType::F16, CacheType::Q8_0, CacheType::Q4_0, CacheType::Iq4Nl] {
            let params = ContextParams {
                n_ctx: 256,
                flash_attn: FlashAttention::On,
                type_k: cache_type,
                type_v: cache_type,
                ..Default::default()
            };
            let context = Context::new(&tiny.model, &params).unwrap();
            let layout = Layout::of(&context, 0).unwrap();
            assert_eq!(
                file.info.kv_bytes_per_cell(cache_type, cache_type),
                layout.bytes_per_cell(),
                "{spec:?} {cache_type:?}"
            );
        }
    }
}

#[test]
fn a_file_is_refused_for_the_reason_that_its_model_is() {
    let dir = tempfile::tempdir().unwrap();
    for arch in RECURRENT {
        let path = tiny::recurrent(dir.path(), arch);
        let model = Model::load(&path, &ModelParams::default(), |_| true).unwrap();
        let Support::Refused(reason) = gvote_gguf::read(&path).unwrap().support() else {
            panic!("{arch} is not refused")
        };
        assert!(reason.contains("recurrent"), "{reason}");
        assert_eq!(model.unsupported(), Some(&*reason));
    }
}
