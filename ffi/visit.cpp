// A guest in an app's context: what the app sees of it is put away and brought back.

#include "shim.hpp"

#include "llama-ext.h"

namespace {

GVOTE_REVEAL(llama_context, cparams);
GVOTE_REVEAL(llama_context, memory);
GVOTE_REVEAL(llama_context, sched);
GVOTE_REVEAL(llama_context, gf_res_reserve);
GVOTE_REVEAL(llama_kv_cache, v_cells_impl);
GVOTE_REVEAL(llama_kv_cache, n_stream);

GVOTE_REVEAL(llama_context, abort_callback);
GVOTE_REVEAL(llama_context, abort_callback_data);
GVOTE_REVEAL(llama_context, n_outputs);
GVOTE_REVEAL(llama_context, output_ids);
GVOTE_REVEAL(llama_context, output_swaps);
GVOTE_REVEAL(llama_context, buf_output);
GVOTE_REVEAL(llama_context, logits);
GVOTE_REVEAL(llama_context, embd);
GVOTE_REVEAL(llama_context, embd_nextn);
GVOTE_REVEAL(llama_context, embd_layer_inp);
GVOTE_REVEAL(llama_context, embd_batch_idxs);
GVOTE_REVEAL(llama_context, embd_seq);
GVOTE_REVEAL(llama_context, sampling);
GVOTE_REVEAL(llama_context, t_eval_us);
GVOTE_REVEAL(llama_context, t_p_eval_us);
GVOTE_REVEAL(llama_context, n_eval);
GVOTE_REVEAL(llama_context, n_p_eval);
GVOTE_REVEAL(llama_context, n_reused);

// The value of a private member, and a place to put it aside.
#define GVOTE_MEMBER(ctx, member) ((ctx)->*member_of(llama_context_##member{}))
#define GVOTE_ASIDE(member) std::remove_reference_t<decltype(GVOTE_MEMBER((llama_context *) nullptr, member))> member

} // namespace

struct gvote_shim_visit {
    llama_context * ctx;

    ggml_backend_sched_eval_callback cb_eval;
    void *                           cb_eval_user_data;
    bool                             embeddings;

    GVOTE_ASIDE(abort_callback);
    GVOTE_ASIDE(abort_callback_data);

    GVOTE_ASIDE(n_outputs);
    GVOTE_ASIDE(output_ids);
    GVOTE_ASIDE(output_swaps);
    GVOTE_ASIDE(buf_output);
    GVOTE_ASIDE(logits);
    GVOTE_ASIDE(embd);
    GVOTE_ASIDE(embd_nextn);
    GVOTE_ASIDE(embd_layer_inp);
    GVOTE_ASIDE(embd_batch_idxs);
    GVOTE_ASIDE(embd_seq);
    GVOTE_ASIDE(sampling);

    GVOTE_ASIDE(t_eval_us);
    GVOTE_ASIDE(t_p_eval_us);
    GVOTE_ASIDE(n_eval);
    GVOTE_ASIDE(n_p_eval);
    GVOTE_ASIDE(n_reused);

    // Swaps what is aside with what the context has.
    void swap() {
        std::swap(n_outputs,       GVOTE_MEMBER(ctx, n_outputs));
        std::swap(output_ids,      GVOTE_MEMBER(ctx, output_ids));
        std::swap(output_swaps,    GVOTE_MEMBER(ctx, output_swaps));
        std::swap(buf_output,      GVOTE_MEMBER(ctx, buf_output));
        std::swap(logits,          GVOTE_MEMBER(ctx, logits));
        std::swap(embd,            GVOTE_MEMBER(ctx, embd));
        std::swap(embd_nextn,      GVOTE_MEMBER(ctx, embd_nextn));
        std::swap(embd_layer_inp,  GVOTE_MEMBER(ctx, embd_layer_inp));
        std::swap(embd_batch_idxs, GVOTE_MEMBER(ctx, embd_batch_idxs));
        std::swap(embd_seq,        GVOTE_MEMBER(ctx, embd_seq));
        // with it go the samplers: a draft must not move them on
        std::swap(sampling,        GVOTE_MEMBER(ctx, sampling));
        std::swap(t_eval_us,       GVOTE_MEMBER(ctx, t_eval_us));
        std::swap(t_p_eval_us,     GVOTE_MEMBER(ctx, t_p_eval_us));
        std::swap(n_eval,          GVOTE_MEMBER(ctx, n_eval));
        std::swap(n_p_eval,        GVOTE_MEMBER(ctx, n_p_eval));
        std::swap(n_reused,        GVOTE_MEMBER(ctx, n_reused));
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
