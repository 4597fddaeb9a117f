// A guest in an app's context: what the app sees of it is put away and brought back.

#include "shim.hpp"

namespace {

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
