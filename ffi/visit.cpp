// gvote in an app's context: what the app sees of it is put away and brought back.

#include "llama_context_members.h" // written by build.rs
#include "shim.hpp"
#include "versions.hpp"

#include "llama-ext.h"

#include <algorithm>
#include <string_view>

namespace {

// Members of llama_context that a visit exchanges: the outputs and timings that the app sees of its last batch. With `sampling` go
// the samplers: a draft must not move them on.
#define GVOTE_EXCHANGED(X) \
    X(n_outputs)           \
    X(output_ids)          \
    X(output_swaps)        \
    X(buf_output)          \
    X(logits)              \
    X(embd)                \
    X(embd_nextn)          \
    X(embd_layer_inp)      \
    X(embd_batch_idxs)     \
    X(embd_seq)            \
    X(sampling)            \
    X(t_eval_us)           \
    X(t_p_eval_us)         \
    X(n_eval)              \
    X(n_p_eval)            \
    X(n_reused)

#define GVOTE_REVEAL_MEMBER(member) GVOTE_REVEAL(llama_context, member);
GVOTE_EXCHANGED(GVOTE_REVEAL_MEMBER)

GVOTE_REVEAL(llama_context, cparams);
GVOTE_REVEAL(llama_context, memory);
GVOTE_REVEAL(llama_context, sched);
GVOTE_REVEAL(llama_context, gf_res_reserve);
GVOTE_REVEAL(llama_context, abort_callback);
GVOTE_REVEAL(llama_context, abort_callback_data);
GVOTE_REVEAL(llama_context, t_start_us);
GVOTE_REVEAL(llama_context, t_load_us);
GVOTE_REVEAL(llama_kv_cache, v_cells_impl);
GVOTE_REVEAL(llama_kv_cache, n_stream);

// All other members, each with the reason why a visit may leave it in place.
constexpr std::string_view LEFT_IN_PLACE[] = {
    // what the context is made of: no batch changes it
    "model", "cparams", "cvec", "loras", "memory", "backend_cpu", "backends", "set_n_threads_fns", "backend_ptrs", "backend_buft",
    "backend_buf_exp_size", "threadpool", "threadpool_batch", "opt_ctx", "graph_reuse_disable", "moe_cache",
    // put back by hand: see gvote_shim_visit_end()
    "abort_callback", "abort_callback_data",
    // scratch of a batch, filled anew by the next one
    "balloc", "copy_experts",
    // the graph and its scheduler: llama.cpp compares them with the next batch and builds them anew where they do not fit
    "sched", "sched_need_reserve", "n_input_tensors", "gf_res_prev", "gf_res_prev_active", "gf_res_reserve", "graph_has_logits",
    "hadamard_verified", "n_reallocs_same", "n_reallocs_diff",
    // of encoder-decoder models, which gvote refuses
    "cross",
    // states that an app has put aside on the device: a visit makes none
    "mem_storage",
    // set once, by the first batch: an app that attaches has decoded
    "has_evaluated_once", "t_start_us", "t_load_us",
    // empty between batches: a visit begins and ends with llama_synchronize()
    "t_compute_start_us", "n_queued_tokens",
};

constexpr bool is_decided(std::string_view member) {
#define GVOTE_IS_MEMBER(name) \
    if (member == #name) {    \
        return true;          \
    }
    GVOTE_EXCHANGED(GVOTE_IS_MEMBER)
    for (const std::string_view left : LEFT_IN_PLACE) {
        if (member == left) {
            return true;
        }
    }
    return false;
}

#define GVOTE_CHECK_DECIDED(member) \
    static_assert(is_decided(#member), "decide in ffi/visit.cpp what a visit does with llama_context::" #member);
LLAMA_CONTEXT_MEMBERS(GVOTE_CHECK_DECIDED)

// The value of a private member, and a place to put it aside.
#define GVOTE_MEMBER(ctx, member) ((ctx)->*member_of(llama_context_##member{}))
#define GVOTE_ASIDE(member) std::remove_reference_t<decltype(GVOTE_MEMBER((llama_context *) nullptr, member))> member;

} // namespace

struct gvote_shim_visit {
    llama_context * ctx;

    ggml_backend_sched_eval_callback cb_eval;
    void *                           cb_eval_user_data;
    bool                             embeddings;

    GVOTE_ASIDE(abort_callback)
    GVOTE_ASIDE(abort_callback_data)
    GVOTE_EXCHANGED(GVOTE_ASIDE)

    // Swaps what is aside with what the context has.
    void swap() {
#define GVOTE_SWAP(member) std::swap(member, GVOTE_MEMBER(ctx, member));
        GVOTE_EXCHANGED(GVOTE_SWAP)
    }
};

const char * gvote_shim_visit_begin(llama_context * ctx, gvote_shim_visit ** out) {
    return guarded([&]() -> const char * {
        // rows may still be on their way into the outputs
        llama_synchronize(ctx);

        auto visit = std::make_unique<gvote_shim_visit>();
        visit->ctx = ctx;
        gvote_shim_get_eval_callback(ctx, &visit->cb_eval, &visit->cb_eval_user_data);
        visit->abort_callback      = GVOTE_MEMBER(ctx, abort_callback);
        visit->abort_callback_data = GVOTE_MEMBER(ctx, abort_callback_data);
        // one entry for each layer, filled or not
        visit->embd_layer_inp.resize(GVOTE_MEMBER(ctx, embd_layer_inp).size(), { nullptr, 0 });
        visit->embeddings = ctx->get_cparams().embeddings;

        visit->swap();
        const_cast<llama_cparams &>(ctx->get_cparams()).embeddings = false;
        gvote_shim_set_eval_callback(ctx, nullptr, nullptr);
        *out = visit.release();
        return nullptr;
    });
}

void gvote_shim_visit_abort(const gvote_shim_visit * visit, ggml_abort_callback * callback, void ** data) {
    *callback = visit->abort_callback;
    *data     = visit->abort_callback_data;
}

void gvote_shim_visit_end(gvote_shim_visit * visit) {
    llama_context * ctx = visit->ctx;
    guarded([&]() -> const char * {
        llama_synchronize(ctx);
        return nullptr;
    });
    visit->swap();
    const_cast<llama_cparams &>(ctx->get_cparams()).embeddings = visit->embeddings;
    gvote_shim_set_eval_callback(ctx, visit->cb_eval, visit->cb_eval_user_data);
    llama_set_abort_callback(ctx, visit->abort_callback, visit->abort_callback_data);
    delete visit;
}

// get_cparams() and the like are functions of the library: what they answer tells where its compiler put the members.
const char * gvote_shim_check_layout(llama_context * ctx) {
    return guarded([&]() -> const char * {
        if (&ctx->get_cparams() != &GVOTE_MEMBER(ctx, cparams)) {
            return "llama_context::cparams";
        }
        const llama_cparams & cparams = ctx->get_cparams();
        if (cparams.n_ctx != llama_n_ctx(ctx) || cparams.n_batch != llama_n_batch(ctx) ||
            cparams.n_ubatch != llama_n_ubatch(ctx) || cparams.n_seq_max != llama_n_seq_max(ctx) ||
            cparams.causal_attn != ctx->get_causal_attn() || cparams.pooling_type != ctx->pooling_type()) {
            return "a member of llama_cparams";
        }
        const llama_model & model = ctx->get_model();
        if (model.hparams.n_swa != (uint32_t) llama_model_n_swa(&model) ||
            model.hparams.n_ctx_train != (uint32_t) llama_model_n_ctx_train(&model) ||
            model.hparams.rope_freq_scale_train != llama_model_rope_freq_scale_train(&model)) {
            return "a member of llama_hparams";
        }
        if (ctx->get_memory() != GVOTE_MEMBER(ctx, memory).get()) {
            return "llama_context::memory";
        }
        if (ctx->get_sched() != GVOTE_MEMBER(ctx, sched).get()) {
            return "llama_context::sched";
        }
        // one of the last members: what lies before it, among them the outputs, has the size that it should have
        if (ctx->get_gf_res_reserve() != GVOTE_MEMBER(ctx, gf_res_reserve).get()) {
            return "llama_context::gf_res_reserve";
        }
        // the last members of all
        const llama_perf_context_data perf = llama_perf_context(ctx);
        if (perf.t_start_ms != 1e-3*GVOTE_MEMBER(ctx, t_start_us) || perf.t_load_ms != 1e-3*GVOTE_MEMBER(ctx, t_load_us) ||
            perf.t_p_eval_ms != 1e-3*GVOTE_MEMBER(ctx, t_p_eval_us) || perf.t_eval_ms != 1e-3*GVOTE_MEMBER(ctx, t_eval_us) ||
            perf.n_p_eval != std::max(1, GVOTE_MEMBER(ctx, n_p_eval)) || perf.n_eval != std::max(1, GVOTE_MEMBER(ctx, n_eval)) ||
            perf.n_reused != std::max(0, GVOTE_MEMBER(ctx, n_reused))) {
            return "a counter of llama_context";
        }
        for (llama_kv_cache * kv : { base_cache(ctx), ctx->get_memory() != nullptr ? window_cache(ctx) : nullptr }) {
            if (kv == nullptr) {
                continue;
            }
            if (kv->get_n_stream() != kv->*member_of(llama_kv_cache_n_stream{})) {
                return "llama_kv_cache::n_stream";
            }
            // the search heads lie between the two
            const auto & cells = kv->*member_of(llama_kv_cache_v_cells_impl{});
            if (!cells || &kv->get_cells(0) != &cells->at(kv->get_stream(0)) ||
                (kv->*member_of(llama_kv_cache_v_heads{})).size() != kv->get_n_stream()) {
                return "llama_kv_cache::v_cells";
            }
        }
        return nullptr;
    });
}
