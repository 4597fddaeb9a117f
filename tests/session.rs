//! Tests of a session's guarantees, on which programs that use the crate rely.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use gvote::llama::{
    Batch, CacheType, Context, ContextParams, FlashAttention, LlamaError, Model, ModelParams, Sampler, SamplerParams,
    Token,
};
use gvote::policy::{Bound, Evict, Kind, Params};
use gvote::session::Stop;
use gvote::{Session, SessionError, SessionParams};

const N: usize = 450;

fn model() -> Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL
        .get_or_init(|| {
            let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(
                || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"),
                PathBuf::from,
            );
            let path = cache.join("gvote/models/SmolLM2-135M-Instruct.Q4_1.gguf");
            assert!(path.exists(), "{} is missing: run `make setup`", path.display());
            Model::load(&path, &ModelParams::default(), |_| true).expect("the model loads")
        })
        .clone()
}

fn tokens(n: usize) -> Vec<Token> {
    let mut tokens = model().tokenize(include_str!("../src/tests/text.txt"), true, false).unwrap();
    tokens.truncate(n);
    tokens
}

fn params(n_ctx: u32) -> SessionParams {
    let mut params = SessionParams::default();
    params.context.n_ctx = n_ctx;
    params.context.n_threads = 2;
    params.context.n_threads_batch = 2;
    params
}

fn prefilled(params: &SessionParams) -> Session {
    let mut session = Session::new(&model(), params).unwrap();
    prefill(&mut session, &tokens(N)).unwrap();
    session
}

fn prefill(session: &mut Session, tokens: &[Token]) -> Result<(), SessionError> {
    session.prefill(tokens, |_, _| ControlFlow::Continue(())).map(|_| ())
}

/// Generates a greedy continuation.
fn generate(session: &mut Session, n: i32) -> (Vec<Token>, Stop) {
    let mut sampler =
        Sampler::new(session.model(), &SamplerParams { temp: 0.0, ..SamplerParams::default() }, 0).unwrap();
    let mut tokens = Vec::new();
    let report = session
        .generate(&mut sampler, n, |token| {
            tokens.push(token);
            ControlFlow::Continue(())
        })
        .unwrap();
    (tokens, report.stop)
}

#[test]
fn compresses_and_goes_on() {
    let mut session = prefilled(&params(1024));
    let logits = session.logits().to_vec();
    let report = session.compress().unwrap();
    assert_eq!(report.policy, Kind::Gvote);
    assert_eq!(report.cells_before, N);
    assert!(report.cells_after < N, "{report:?}");
    assert_eq!(session.cells_used(), report.cells_after);
    assert_eq!(report.kv_bytes_before, N * session.bytes_per_cell().unwrap());
    assert_eq!(report.kv_bytes_after, report.cells_after * session.bytes_per_cell().unwrap());
    assert_eq!(report.bound, Bound::Trial);
    let within = |count| report.tried.iter().any(|&(tried, kl)| tried == count && kl < 0.02);
    assert!(within(report.cells_after), "{report:?}");
    assert!(session.logits() == logits, "the vote leaves the next-token logits alone");
    let (answer, _) = generate(&mut session, 20);
    assert_eq!(session.n_past(), (N + answer.len()) as i32);
    assert_eq!(session.cells_used(), report.cells_after + answer.len());
}

#[test]
fn its_cells_go_on_in_a_context_of_several_sequences() {
    for flash_attn in [FlashAttention::Off, FlashAttention::On] {
        let mut params = params(1024);
        params.context.flash_attn = flash_attn;
        // with several threads, flash attention sums a single token in parts, but not the tokens of a batch
        params.context.n_threads = 1;
        let mut session = prefilled(&params);
        session.compress().unwrap();
        let (cells, n_past) = (session.copy_cells().unwrap(), session.n_past());

        // streams smaller than the prompt
        let each = session.cells_used().next_multiple_of(256) as u32;
        assert!(each < N as u32 + 256);
        let many = ContextParams { n_ctx: 3 * each, n_seq_max: 3, kv_unified: false, ..params.context };
        let mut ctx = Context::new(&model(), &many).unwrap();
        ctx.adopt_sequence(0, &cells).unwrap();
        ctx.copy(0, 1).unwrap();
        ctx.copy(0, 2).unwrap();
        let next = [7, 345, 1234];
        let mut batch = Batch::new(3);
        for (seq, &token) in (0..).zip(&next) {
            batch.add(token, n_past, seq, true).unwrap();
        }
        ctx.decode(&batch).unwrap();

        for (seq, &token) in (0..).zip(&next) {
            session.decode(token).unwrap();
            let together = ctx.logits_at(seq).unwrap();
            let off = together.iter().zip(session.logits()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // multiplying one row uses other kernels than three rows
            assert!(off < 0.3, "{flash_attn:?}, sequence {seq}: {off}");
            session.truncate(n_past).unwrap();
        }
        assert!(ctx.adopt_sequence(0, &cells[..cells.len() / 2]).is_err());
        assert!(ctx.adopt_sequence(0, &[]).is_err());
    }
}

#[test]
fn the_same_seed_gives_the_same_cells_and_tokens() {
    let run = |seed| {
        let mut params = params(1024);
        params.policy.seed = seed;
        (params.policy.target_kl, params.policy.lost_mass) = (None, 0.1);
        let mut session = prefilled(&params);
        let report = session.compress().unwrap();
        (report.cells_after, generate(&mut session, 12).0, session.logits().to_vec())
    };
    let (a, b) = (run(1), run(1));
    assert_eq!((a.0, &a.1), (b.0, &b.1));
    assert!(a.2 == b.2);
    assert!(run(2).2 != a.2, "another seed votes differently");
}

#[test]
fn following_says_what_single_steps_say_and_leaves_no_trace() {
    // two ubatches
    let mut params = params(1024);
    params.context.n_ubatch = 64;
    let next: Vec<Token> = tokens(N + 70).split_off(N);
    let mut session = prefilled(&params);
    session.compress().unwrap();
    let (cells, n_past, logits) = (session.cells_used(), session.n_past(), session.logits().to_vec());

    let top = |logits: &[f32]| (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
    let follow = |session: &mut Session| {
        let mut tops = Vec::new();
        session
            .follow(&next, |i, logits| {
                assert_eq!(i, tops.len());
                tops.push(top(logits));
            })
            .unwrap();
        tops
    };
    let followed = follow(&mut session);
    assert_eq!((session.cells_used(), session.n_past()), (cells, n_past));
    assert!(session.logits() == logits);
    assert_eq!(follow(&mut session), followed);

    let mut same = 0;
    for (&token, top_followed) in next.iter().zip(&followed) {
        session.decode(token).unwrap();
        same += usize::from(top(session.logits()) == *top_followed);
    }
    assert!(same >= 65, "{same} of {}", next.len());
    let too_many = vec![next[0]; 1024];
    assert!(matches!(session.follow(&too_many, |_, _| {}), Err(SessionError::PromptTooLong { .. })));
}

#[test]
fn every_policy_mapping_and_cache_type_works() {
    for (kind, evict) in [
        (Kind::Gvote, Evict::Composite),
        (Kind::Gvote, Evict::Cells),
        (Kind::GvotePaper, Evict::Composite),
        (Kind::GvotePaper, Evict::Cells),
        (Kind::Full, Evict::Composite),
    ] {
        let mut params = params(1024);
        params.policy = Params { evict, max_cells: (kind != Kind::Full).then_some(300), ..Params::new(kind) };
        let mut session = prefilled(&params);
        let report = session.compress().unwrap();
        if kind == Kind::Full {
            assert_eq!((report.cells_after, report.bound), (N, Bound::All));
        } else {
            assert!(report.cells_after <= 300, "{kind} {evict:?}: {report:?}");
        }
        assert_eq!(generate(&mut session, 5).0.len(), 5);
    }
    for (name, flash) in
        [("bf16", false), ("q8_0", true), ("q4_0", true), ("q5_0", true), ("q5_1", true), ("iq4_nl", true)]
    {
        let mut params = params(1024);
        let type_: CacheType = name.parse().unwrap();
        params.context.type_k = type_;
        params.context.type_v = type_;
        params.context.flash_attn = if flash { FlashAttention::On } else { FlashAttention::Off };
        params.account_error = true;
        params.policy.max_cells = Some(300);
        let mut session = prefilled(&params);
        let report = session.compress().unwrap();
        assert!(report.cells_after <= 300, "{name}: {report:?}");
        assert_eq!(generate(&mut session, 5).0.len(), 5, "{name}");
    }
}

#[test]
fn short_prompts_are_left_alone_unless_a_cap_says_otherwise() {
    let mut session = Session::new(&model(), &params(512)).unwrap();
    prefill(&mut session, &tokens(100)).unwrap();
    let report = session.compress().unwrap();
    assert_eq!((report.cells_after, report.bound), (100, Bound::All));

    let mut params = params(512);
    params.policy.max_cells = Some(80);
    let mut session = Session::new(&model(), &params).unwrap();
    prefill(&mut session, &tokens(100)).unwrap();
    assert!(session.compress().unwrap().cells_after <= 80);
}

#[test]
fn a_grown_cache_is_compressed_again() {
    let mut params = params(2048);
    (params.policy.target_kl, params.policy.lost_mass) = (None, 0.1);
    let mut session = prefilled(&params);
    let first = session.compress().unwrap();
    let more = tokens(N + 500)[N..].to_vec();
    prefill(&mut session, &more).unwrap();
    let second = session.compress().unwrap();
    assert_eq!(second.cells_before, first.cells_after + 500);
    assert!(second.cells_after < second.cells_before);
    assert_eq!(session.n_past(), N as i32 + 500);
    assert_eq!(generate(&mut session, 8).0.len(), 8);
}

#[test]
fn a_prompt_that_does_not_fit_loses_nothing() {
    let mut session = Session::new(&model(), &params(256)).unwrap();
    let error = prefill(&mut session, &tokens(N)).unwrap_err();
    assert!(matches!(error, SessionError::PromptTooLong { tokens: N, room: 256, .. }), "{error}");
    assert!(error.to_string().contains("`n_ctx`"), "{error}");
    prefill(&mut session, &tokens(150)).unwrap();
    let before = session.logits().to_vec();
    assert!(prefill(&mut session, &tokens(150)).is_err());
    assert_eq!(session.n_past(), 150);
    assert!(session.logits() == before);
    assert!(matches!(prefill(&mut session, &[]).unwrap_err(), SessionError::Empty));
}

#[test]
fn a_full_cache_ends_a_generation_cleanly() {
    let mut params = params(256);
    params.policy = Params::new(Kind::Full);
    let mut session = Session::new(&model(), &params).unwrap();
    prefill(&mut session, &tokens(250)).unwrap();
    let (answer, stop) = generate(&mut session, -1);
    assert_eq!((answer.len(), stop), (6, Stop::ContextFull));
}

#[test]
fn cancelling_loses_nothing() {
    let mut session = Session::new(&model(), &params(1024)).unwrap();
    prefill(&mut session, &tokens(100)).unwrap();
    let before = session.logits().to_vec();

    let by_callback = session
        .prefill(&tokens(600), |done, _| if done >= 512 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) });
    assert!(matches!(by_callback, Err(SessionError::Llama(LlamaError::Cancelled))));
    assert_eq!((session.n_past(), session.cells_used()), (100, 100));

    let flag = session.cancel_flag();
    flag.store(true, Ordering::Relaxed);
    assert!(matches!(prefill(&mut session, &tokens(600)), Err(SessionError::Llama(LlamaError::Cancelled))));
    assert_eq!(generate(&mut session, 5).1, Stop::Cancelled);
    assert_eq!((session.n_past(), session.cells_used()), (100, 100));
    flag.store(false, Ordering::Relaxed);
    assert!(session.logits() == before);
    assert_eq!(generate(&mut session, 5).0.len(), 5);
}

#[test]
fn a_cancelled_vote_leaves_the_cache_as_it_was() {
    let mut session = prefilled(&params(1024));
    session.cancel_flag().store(true, Ordering::Relaxed);
    assert!(session.compress().is_err());
    assert_eq!(session.cells_used(), N);
    session.cancel_flag().store(false, Ordering::Relaxed);
    assert!(session.compress().unwrap().cells_after < N);
}

#[test]
fn truncation_is_exact_or_refused() {
    let mut params = params(1024);
    (params.policy.target_kl, params.policy.lost_mass) = (None, 0.1);
    let mut session = prefilled(&params);
    session.compress().unwrap();
    let (first, _) = generate(&mut session, 10);

    let last = tokens(N)[N - 1];
    session.truncate(N as i32 - 1).unwrap();
    prefill(&mut session, &[last]).unwrap();
    // the first token now comes from the compressed cache, so only the lengths must agree
    let (again, _) = generate(&mut session, 10);
    assert_eq!(first.len(), again.len());

    let error = session.truncate(300).unwrap_err();
    assert!(matches!(error, SessionError::Compressed(300, _)), "{error}");
    assert_eq!(session.n_past(), (N + again.len()) as i32);
    session.truncate(0).unwrap();
    assert_eq!((session.n_past(), session.cells_used()), (0, 0));
}

#[test]
fn a_saved_session_goes_on_as_if_never_saved() {
    let mut params = params(2048);
    (params.policy.target_kl, params.policy.lost_mass) = (None, 0.1);
    let mut session = prefilled(&params);
    session.compress().unwrap();
    let saved = session.save();
    let turn = tokens(N + 200)[N..].to_vec();
    let go_on = |session: &mut Session| {
        prefill(session, &turn).unwrap();
        let report = session.compress().unwrap();
        (report.cells_after, generate(session, 10).0)
    };
    let expected = go_on(&mut session);
    let mut other = Session::new(&model(), &params).unwrap();
    other.load(&saved).unwrap();
    assert_eq!(go_on(&mut other), expected);
}

#[test]
fn a_bad_saved_session_is_refused_and_changes_nothing() {
    let mut session = prefilled(&params(1024));
    let saved = session.save();
    let logits = session.logits().to_vec();
    for len in [0, 3, 8, 20, 1000, saved.len() / 2, saved.len() - 1] {
        assert!(session.load(&saved[..len]).is_err(), "{len} of {} bytes", saved.len());
        assert_eq!((session.n_past(), session.cells_used()), (N as i32, N));
        assert!(session.logits() == logits);
    }
    // other cache types, too few cells
    let mut quantized = params(1024);
    quantized.context.type_k = CacheType::Q8_0;
    quantized.context.flash_attn = FlashAttention::On;
    assert!(Session::new(&model(), &quantized).unwrap().load(&saved).is_err());
    let mut small = Session::new(&model(), &params(256)).unwrap();
    prefill(&mut small, &tokens(50)).unwrap();
    assert!(small.load(&saved).is_err());
    assert_eq!(small.cells_used(), 50);
    assert_eq!(generate(&mut small, 3).0.len(), 3);
}

#[test]
fn unequal_budgets_are_masked_until_the_session_starts_over() {
    for kind in [Kind::AdaKv, Kind::GvotePaper] {
        let mut params = params(1024);
        params.policy = Params { exact: true, ..Params::new(kind) };
        params.context.flash_attn = FlashAttention::On;
        let error = prefilled(&params).compress().unwrap_err().to_string();
        assert!(error.contains("`flash_attn` off"), "{error}");

        params.context.flash_attn = FlashAttention::Off;
        let mut session = prefilled(&params);
        let full = session.save();
        let report = session.compress().unwrap();
        let ragged = report.ragged.unwrap();
        assert!(ragged.min < ragged.max, "{report:?}");
        assert_eq!(report.cells_after, ragged.mean.ceil() as usize);
        if kind == Kind::AdaKv {
            assert_eq!(report.cells_after, N / 2);
        }
        // nothing is freed, and the report agrees
        assert_eq!((session.cells_used(), report.kv_bytes_after), (N, report.kv_bytes_before));
        let turn = tokens(N + 70)[N..].to_vec();
        let go_on = |session: &mut Session| {
            prefill(session, &turn).unwrap();
            session.logits().to_vec()
        };
        let masked = go_on(&mut session);
        let error = session.compress().unwrap_err().to_string();
        assert!(error.contains("again"), "{error}");

        session.load(&full).unwrap();
        let unmasked = go_on(&mut session);
        assert!(masked != unmasked);
        session.clear();
        prefill(&mut session, &tokens(N)).unwrap();
        // the two agree up to rounding: a restored cache may lie in other cells
        let again = go_on(&mut session);
        let apart = again.iter().zip(&unmasked).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(apart < 0.1, "{apart}");
    }
}

#[test]
fn nonsense_settings_are_refused_before_anything_is_allocated() {
    for (name, change) in [
        ("`lost_mass`", (|p| p.lost_mass = -1.0) as fn(&mut Params)),
        ("`samples`", |p| p.samples = 0),
        ("`recent`", |p| p.recent = 10),
        ("`max_cells`", |p| p.max_cells = Some(5)),
    ] {
        let mut params = params(512);
        change(&mut params.policy);
        let error = Session::new(&model(), &params).err().expect(name).to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_quantized_v_cache_without_flash_attention_is_refused() {
    let mut params = params(512);
    params.context.type_v = CacheType::Q4_0;
    params.context.flash_attn = FlashAttention::Off;
    let error = Session::new(&model(), &params).err().expect("refused").to_string();
    assert!(error.contains("`flash_attn`") && error.contains("q4_0"), "{error}");
}
