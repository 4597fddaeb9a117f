#include "shim.hpp"

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml-rpc.h"
#include "llama-ext.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <regex>

struct gvote_shim_table {
    llama_kv_cells cells;
};


const char * gvote_shim_cache_open(llama_context * ctx, llama_seq_id seq, gvote_shim_cache * out) {
    return guarded([&]() -> const char * {
        if (llama_get_memory(ctx) == nullptr) {
            return "the model keeps no attention cache";
        }
        const llama_kv_cache * kv = base_cache(ctx);
        if (kv == nullptr) {
            return "the model's memory is recurrent, hybrid or of a layout that is not supported yet";
        }
        if (ctx->get_cparams().ctx_other != nullptr) {
            return "the context shares its cache with another context";
        }
        const auto & hparams = ctx->get_model().hparams;
        if (hparams.f_max_alibi_bias > 0.0f) {
            return "the model uses ALiBi: its attention needs one position a cell for all heads";
        }
        if (hparams.is_mla()) {
            return "the model uses multi-head latent attention: its cache has no V";
        }
        if (ctx->get_cparams().ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
            return "the context drafts for another one";
        }
        if (!ctx->get_cparams().causal_attn) {
            return "attention is not causal: every token sees those that follow it";
        }
        if (kv->get_n_seq_max() > (uint32_t) GUARD) {
            return "n_seq_max leaves no owner of cells for gvote: lower it by one";
        }
        if (!has_sequence(*kv, seq)) {
            return "no such sequence: raise n_seq_max";
        }
        const auto ids = kv->get_layer_ids();
        if (ids.empty()) {
            return "every layer of the model uses a sliding window";
        }
        if (kv->get_has_shift()) {
            return "a shift of positions is pending: decode once first";
        }

        const auto meta = new_meta();
        if (!meta) {
            return "out of memory";
        }
        const llama_kv_cells & cells = kv->get_cells(seq);

        out->n_cells     = cells.size();
        out->n_layer     = ids.size();
        out->stream      = kv->get_stream(seq);
        out->v_trans     = is_v_trans(v_view(*kv, meta.get(), ids[0]));
        out->has_window  = typeid(*llama_get_memory(ctx)) == typeid(llama_kv_cache_iswa);
        out->offload_kqv = ctx->get_cparams().offload_kqv;
        out->softcap     = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
        return nullptr;
    });
}

const char * gvote_shim_cache_layers(llama_context * ctx, gvote_shim_layer * out) {
    return guarded([&]() -> const char * {
        const llama_kv_cache * kv = base_cache(ctx);
        const auto & hparams = ctx->get_model().hparams;
        for (const uint32_t il : kv->get_layer_ids()) {
            const auto meta = new_meta();
            if (!meta) {
                return "out of memory";
            }
            out->il            = il;
            out->n_head        = hparams.n_head(il);
            out->n_head_kv     = hparams.n_head_kv(il);
            out->n_embd_head_k = hparams.n_embd_head_k(il);
            out->n_embd_head_v = hparams.n_embd_head_v(il);
            out->k             = kv->get_k_storage(il);
            out->v             = v_view(*kv, meta.get(), il)->view_src;
            out++;
        }
        return nullptr;
    });
}

uint32_t gvote_shim_cells(llama_context * ctx, llama_seq_id seq, gvote_shim_cell * out, uint32_t n_max) {
    const llama_kv_cache * kv = base_cache(ctx);
    if (kv == nullptr || !has_sequence(*kv, seq)) {
        return 0;
    }
    const llama_kv_cells & cells = kv->get_cells(seq);
    const auto & by_pos = cells.seq_pos_get(seq);
    uint32_t n = 0;
    for (auto cell = by_pos.begin(); cell != by_pos.end() && n < n_max; ++cell) {
        const auto & [pos, i] = *cell;
        const bool shared = cells.seq_count(i) > 1 && owners_beside(cells, i, seq) > 0;
        out[n++] = { i, pos, cells.ext_get(i).tok, shared };
    }
    return by_pos.size();
}

uint32_t gvote_shim_cells_free(llama_context * ctx, llama_seq_id seq) {
    const llama_kv_cache * kv = base_cache(ctx);
    if (kv == nullptr || !has_sequence(*kv, seq)) {
        return 0;
    }
    const llama_kv_cells & cells = kv->get_cells(seq);
    return cells.size() - cells.get_used();
}

uint32_t gvote_shim_cells_end(llama_context * ctx, llama_seq_id seq) {
    const llama_kv_cache * kv = base_cache(ctx);
    return kv == nullptr || !has_sequence(*kv, seq) ? 0 : kv->get_cells(seq).used_max_p1();
}

uint32_t gvote_shim_free_cells(llama_context * ctx, llama_seq_id seq, uint32_t * out, uint32_t n_max) {
    const llama_kv_cache * kv = base_cache(ctx);
    if (kv == nullptr || !has_sequence(*kv, seq)) {
        return 0;
    }
    const llama_kv_cells & cells = kv->get_cells(seq);
    uint32_t n = 0;
    for (uint32_t i = 0; i < cells.size() && n < n_max; ++i) {
        if (cells.is_empty(i)) {
            out[n++] = i;
        }
    }
    return n;
}

bool gvote_shim_has_uncut(llama_context * ctx) {
    const llama_model * model = &ctx->get_model();
    return llama_model_is_recurrent(model) || llama_model_is_hybrid(model) || base_cache(ctx) == nullptr || window_cache(ctx) != nullptr;
}

llama_pos gvote_shim_cut_from(llama_context * ctx, llama_seq_id seq) {
    const llama_model * model = &ctx->get_model();
    if (llama_model_is_recurrent(model) || llama_model_is_hybrid(model)) {
        return llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
    }
    const llama_kv_cache * kv = window_cache(ctx);
    if (kv == nullptr || !has_sequence(*kv, seq)) {
        return 0;
    }
    const llama_kv_cells & cells = kv->get_cells(seq);
    const auto & by_pos = cells.seq_pos_get(seq);
    int64_t whole_from = (int64_t) cells.seq_pos_max(seq) + 1;
    for (auto cell = by_pos.rbegin(); cell != by_pos.rend() && cell->first >= whole_from - 1; ++cell) {
        whole_from = cell->first;
    }
    // a token sees n_swa tokens, including itself: see is_masked_swa()
    const int64_t cut_from = whole_from == 0 ? 0 : whole_from + ctx->get_model().hparams.n_swa - 1;
    return std::min<int64_t>(cut_from, std::numeric_limits<llama_pos>::max());
}

void gvote_shim_rows(
        llama_context * ctx, llama_seq_id seq, const int64_t * index, uint32_t n, gvote_shim_row * out) {
    llama_kv_cache * kv = base_cache(ctx);
    const llama_kv_cells & cells = kv->get_cells(seq);
    const int64_t first = (int64_t) kv->get_stream(seq)*cells.size();
    for (uint32_t j = 0; j < n; ++j) {
        const int64_t i = index[j] - first;
        const bool owned = i >= 0 && i < cells.size() && !cells.is_empty(i) && cells.seq_has(i, seq);
        out[j] = owned ? gvote_shim_row{ cells.pos_get(i), cells.ext_get(i).tok } : gvote_shim_row{ -1, LLAMA_TOKEN_NULL };
    }
}

uint32_t gvote_shim_owners(llama_context * ctx, const int64_t * index, uint32_t n, llama_seq_id * out) {
    llama_kv_cache * kv = base_cache(ctx);
    llama_kv_cells::seq_set_t owners;
    const uint32_t n_stream = kv->get_n_stream();
    // with streams, each sequence has its own; without, every sequence gives access to all cells
    for (uint32_t s = 0; s < n_stream; ++s) {
        const llama_kv_cells & cells = kv->get_cells(s);
        const int64_t first = (int64_t) s*cells.size();
        for (uint32_t j = 0; j < n; ++j) {
            const int64_t i = index[j] - first;
            if (i >= 0 && i < cells.size()) {
                owners |= cells.seq_get_all(i);
            }
        }
    }
    uint32_t n_owners = 0;
    for (llama_seq_id s = 0; s < GUARD; ++s) {
        if (owners.test(s)) {
            out[n_owners++] = s;
        }
    }
    return n_owners;
}

int32_t gvote_shim_decode(llama_context * ctx, llama_batch batch) {
    int32_t status = 0;
    const char * reason = guarded([&]() -> const char * {
        status = llama_decode(ctx, batch);
        return nullptr;
    });
    if (reason == nullptr) {
        return status;
    }
    mend(ctx);
    return reason == OUT_OF_MEMORY ? GVOTE_SHIM_NO_MEMORY : GVOTE_SHIM_EXCEPTION;
}

static void (*terminate_handler)(const char * what) = nullptr;

static void terminate_by_handler() {
    const char * what = "an exception that nobody catches";
    try {
        if (const std::exception_ptr exception = std::current_exception()) {
            std::rethrow_exception(exception);
        }
        terminate_handler(what);
    } catch (const std::exception & e) {
        terminate_handler(e.what());
    } catch (...) {
        terminate_handler(what);
    }
    abort();
}

void gvote_shim_on_terminate(void (*handler)(const char * what)) {
    terminate_handler = handler;
    std::set_terminate(terminate_by_handler);
}

void gvote_shim_llama_init(void) {
    is_done([&] { llama_backend_init(); });
}

llama_model * gvote_shim_model_load(const char * path, llama_model_params params) {
    return or_else((llama_model *) nullptr, [&] { return llama_model_load_from_file(path, params); });
}

llama_context * gvote_shim_context_new(llama_model * model, llama_context_params params) {
    return or_else((llama_context *) nullptr, [&] { return llama_init_from_model(model, params); });
}

int32_t gvote_shim_tokenize(
        const llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens, int32_t n_tokens_max,
        bool add_special, bool parse_special) {
    return or_else(INT32_MIN, [&] {
        return llama_tokenize(vocab, text, text_len, tokens, n_tokens_max, add_special, parse_special);
    });
}

int32_t gvote_shim_token_to_piece(
        const llama_vocab * vocab, llama_token token, char * buf, int32_t length, bool special) {
    return or_else(INT32_MIN, [&] { return llama_token_to_piece(vocab, token, buf, length, 0, special); });
}

bool gvote_shim_context_synchronize(llama_context * ctx) {
    return is_done([&] { llama_synchronize(ctx); });
}

bool gvote_shim_seq_rm(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1) {
    return or_else(false, [&] { return llama_memory_seq_rm(llama_get_memory(ctx), seq, p0, p1); });
}

bool gvote_shim_seq_cp(llama_context * ctx, llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1) {
    return is_done([&] { llama_memory_seq_cp(llama_get_memory(ctx), from, to, p0, p1); });
}

ggml_backend_reg_t gvote_shim_rpc_add_server(void * add_server, const char * endpoint) {
    const auto f = reinterpret_cast<decltype(&ggml_backend_rpc_add_server)>(add_server);
    return or_else((ggml_backend_reg_t) nullptr, [&] { return f(endpoint); });
}

bool gvote_shim_rpc_serve(
        void * start_server, const char * endpoint, const char * cache, size_t n_threads, size_t n_devices,
        ggml_backend_dev_t * devices) {
    const auto f = reinterpret_cast<decltype(&ggml_backend_rpc_start_server)>(start_server);
    return is_done([&] { f(endpoint, cache, n_threads, n_devices, devices); });
}

// Returns a function of the CPU back end, which may be a separate library.
template <typename F> static F of_cpu(const char * name) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return cpu ? (F) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), name) : nullptr;
}

ggml_threadpool_t gvote_shim_threadpool_new(int n_threads, int priority, uint32_t poll) {
    const auto make = of_cpu<decltype(&ggml_threadpool_new)>("ggml_threadpool_new");
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    params.prio = (ggml_sched_priority) priority;
    params.poll = poll;
    return make ? or_else((ggml_threadpool_t) nullptr, [&] { return make(&params); }) : nullptr;
}

void gvote_shim_threadpool_free(ggml_threadpool_t pool) {
    if (const auto free = of_cpu<decltype(&ggml_threadpool_free)>("ggml_threadpool_free")) {
        free(pool);
    }
}

bool gvote_shim_is_regex(const char * pattern, char * reason, size_t size) {
    try {
        const std::regex compiled(pattern);
        return true;
    } catch (const std::exception & error) {
        std::snprintf(reason, size, "%s", error.what());
    } catch (...) {
        reason[0] = '\0';
    }
    return false;
}

void gvote_shim_model_desc(const llama_model * model, char * out, size_t size) {
    out[0] = '\0';
    guarded([&]() -> const char * {
        llama_model_desc(model, out, size);
        return nullptr;
    });
}

ggml_backend_t gvote_shim_backend_init(ggml_backend_dev_t device) {
    ggml_backend_t backend = nullptr;
    guarded([&]() -> const char * {
        backend = device != nullptr ? ggml_backend_dev_init(device, nullptr) : ggml_backend_cpu_init();
        return nullptr;
    });
    return backend;
}

ggml_backend_buffer_t gvote_shim_alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = nullptr;
    guarded([&]() -> const char * {
        buffer = ggml_backend_buft_alloc_buffer(type, size);
        return nullptr;
    });
    return buffer;
}

bool gvote_shim_alloc_graph(ggml_gallocr_t * alloc, ggml_cgraph * graph) {
    bool done = false;
    const char * reason = guarded([&]() -> const char * {
        done = ggml_gallocr_reserve(*alloc, graph) && ggml_gallocr_alloc_graph(*alloc, graph);
        return nullptr;
    });
    if (reason != nullptr) {
        *alloc = nullptr;
    }
    return done;
}

ggml_status gvote_shim_graph_compute_async(ggml_backend_t backend, ggml_cgraph * graph) {
    ggml_status status = GGML_STATUS_ALLOC_FAILED;
    guarded([&]() -> const char * {
        status = ggml_backend_graph_compute_async(backend, graph);
        return nullptr;
    });
    return status;
}

bool gvote_shim_tensor_set(ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    return is_done([&] { ggml_backend_tensor_set(tensor, data, offset, size); });
}

bool gvote_shim_tensor_get(const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    return is_done([&] { ggml_backend_tensor_get(tensor, data, offset, size); });
}

bool gvote_shim_tensor_set_async(
        ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    return is_done([&] { ggml_backend_tensor_set_async(backend, tensor, data, offset, size); });
}

bool gvote_shim_tensor_get_async(
        ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    return is_done([&] { ggml_backend_tensor_get_async(backend, tensor, data, offset, size); });
}

bool gvote_shim_synchronize(ggml_backend_t backend) {
    return is_done([&] { ggml_backend_synchronize(backend); });
}

bool gvote_shim_event_record(ggml_backend_event_t * event, ggml_backend_t backend) {
    return nullptr == guarded([&]() -> const char * {
        if (*event == nullptr) {
            *event = ggml_backend_event_new(ggml_backend_get_device(backend));
        }
        if (*event == nullptr) {
            return "no events";
        }
        ggml_backend_event_record(*event, backend);
        return nullptr;
    });
}

bool gvote_shim_event_synchronize(ggml_backend_event_t event) {
    return is_done([&] { ggml_backend_event_synchronize(event); });
}

void gvote_shim_update(llama_context * ctx) {
    guarded([&]() -> const char * {
        ctx->memory_update(false);
        return nullptr;
    });
}

// Returns the reason why a table cannot be built from `cells`, which were read earlier; NULL if it can.
static const char * changed_since(
        const llama_kv_cells & now, llama_seq_id seq, const gvote_shim_cell * cells, uint32_t n_cells) {
    if (now.seq_pos_get(seq).size() != n_cells) {
        return "the sequence has changed since its cells were read";
    }
    for (uint32_t j = 0; j < n_cells; ++j) {
        const auto & [i, pos, token, shared] = cells[j];
        if (i >= now.size() || now.is_empty(i) || !now.seq_has(i, seq) || now.pos_get(i) != pos) {
            return "the sequence has changed since its cells were read";
        }
        if (now.seq_count(i) != 1) {
            return "a cell does not belong to the sequence alone";
        }
    }
    return nullptr;
}

const char * gvote_shim_table_new(
        llama_context         * ctx,
        llama_seq_id            seq,
        const gvote_shim_cell * cells,
        uint32_t                n_cells,
        const uint32_t        * index,
        const uint32_t        * last,
        uint32_t                n,
        gvote_shim_table     ** out) {
    return guarded([&]() -> const char * {
        const llama_kv_cells & now = base_cache(ctx)->get_cells(seq);
        if (const char * changed = changed_since(now, seq, cells, n_cells)) {
            return changed;
        }

        auto table = std::make_unique<gvote_shim_table>();
        llama_kv_cells & next = table->cells;
        next = without(now, seq);

        // the extra data of a cell belongs to its position, not to its index
        for (uint32_t j = 0; j < n; ++j) {
            const uint32_t i = index[j];
            if (i >= now.size() || now.is_empty(i) || !now.seq_has(i, seq) || !next.is_empty(i)) {
                return "a cell to keep is not the sequence's own, or kept twice";
            }
            const gvote_shim_cell & old = cells[last[j]];
            next.pos_set(i, old.pos);
            next.ext_set(i, now.ext_get(old.index));
            next.seq_add(i, seq);
        }

        *out = table.release();
        return nullptr;
    });
}

const char * gvote_shim_table_of_rows(
        llama_context         * ctx,
        llama_seq_id            seq,
        const gvote_shim_cell * cells,
        uint32_t                n_cells,
        const uint32_t        * index,
        const gvote_shim_row  * rows,
        uint32_t                n,
        gvote_shim_table     ** out) {
    return guarded([&]() -> const char * {
        const llama_kv_cells & now = base_cache(ctx)->get_cells(seq);
        if (const char * changed = changed_since(now, seq, cells, n_cells)) {
            return changed;
        }
        // 2D positions are set as in apply_ubatch() for text
        const bool is_pos_2d = ctx->get_model().hparams.n_pos_per_embd() >= 3;

        auto table = std::make_unique<gvote_shim_table>();
        llama_kv_cells & next = table->cells;
        next = without(now, seq);

        for (uint32_t j = 0; j < n; ++j) {
            const uint32_t i = index[j];
            if (i >= now.size() || !next.is_empty(i)) {
                return "a cell is not the sequence's own and not free, or named twice";
            }
            llama_kv_cell_ext ext;
            if (is_pos_2d) {
                ext.x = rows[j].pos;
                ext.y = rows[j].pos;
            }
            ext.tok = rows[j].token;
            next.pos_set(i, rows[j].pos);
            next.ext_set(i, ext);
            next.seq_add(i, seq);
        }

        *out = table.release();
        return nullptr;
    });
}

void gvote_shim_table_free(gvote_shim_table * table) {
    delete table;
}

void gvote_shim_table_commit(llama_context * ctx, llama_seq_id seq, gvote_shim_table * table) {
    llama_kv_cache * kv = base_cache(ctx);
    cells_of(*kv, seq) = std::move(table->cells);
    head_of(*kv, seq) = 0;
    delete table;
}

static void add(
        gvote_shim_memory_use & sum, ggml_backend_buffer_type_t buft, const llama_memory_breakdown_data & use) {
    sum.model    += use.model;
    sum.repacked += ggml_backend_buft_is_host(buft) ? 0 : use.model;
    sum.cache    += use.context;
    sum.compute  += use.compute;
}

const char * gvote_shim_memory_on(llama_context * ctx, ggml_backend_dev_t device, gvote_shim_memory_use * out) {
    return guarded([&]() -> const char * {
        *out = {};
        for (const auto & [buft, use] : llama_get_memory_breakdown(ctx)) {
            if (ggml_backend_buft_get_device(buft) == device && !ggml_backend_buft_is_host(buft)) {
                add(*out, buft, use);
            }
        }
        return nullptr;
    });
}

const char * gvote_shim_memory(llama_context * ctx, gvote_shim_memory_use * host, gvote_shim_memory_use * device) {
    return guarded([&]() -> const char * {
        *host   = {};
        *device = {};
        for (const auto & [buft, use] : llama_get_memory_breakdown(ctx)) {
            // buffers of repacked weights belong to the CPU, though the host must not read them
            const ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
            const auto type = dev == nullptr ? GGML_BACKEND_DEVICE_TYPE_CPU : ggml_backend_dev_type(dev);
            const bool is_gpu = type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
            add(is_gpu && !ggml_backend_buft_is_host(buft) ? *device : *host, buft, use);
        }
        return nullptr;
    });
}

void gvote_shim_set_eval_callback(llama_context * ctx, ggml_backend_sched_eval_callback cb, void * user_data) {
    // The context installs cparams.cb_eval whenever it builds a graph; the scheduler keeps its own copy for reused graphs.
    auto & cparams = const_cast<llama_cparams &>(ctx->get_cparams());
    cparams.cb_eval           = cb;
    cparams.cb_eval_user_data = user_data;
    ggml_backend_sched_set_eval_callback(ctx->get_sched(), cb, user_data);
}

void gvote_shim_get_eval_callback(llama_context * ctx, ggml_backend_sched_eval_callback * cb, void ** user_data) {
    *cb        = ctx->get_cparams().cb_eval;
    *user_data = ctx->get_cparams().cb_eval_user_data;
}

void gvote_shim_rest_eval_callback(llama_context * ctx) {
    ggml_backend_sched_set_eval_callback(ctx->get_sched(), nullptr, nullptr);
}

ggml_cgraph * gvote_shim_graph(llama_context * ctx) {
    llm_graph_result * active = ctx->*member_of(llama_context_gf_res_prev_active{});
    return active == nullptr ? nullptr : active->get_gf();
}

ggml_backend_t gvote_shim_backend_of(llama_context * ctx, const ggml_tensor * node) {
    return ggml_backend_sched_get_tensor_backend(ctx->get_sched(), const_cast<ggml_tensor *>(node));
}

int gvote_shim_n_parts(llama_context * ctx) {
    return ggml_backend_sched_get_n_splits(ctx->get_sched());
}

ggml_status gvote_shim_graph_compute_part(ggml_backend_t backend, const ggml_cgraph * graph, int first, int end) {
    // uses of nodes are looked up in the whole graph, so nodes are fused as usual; leafs are not computed
    ggml_cgraph part = *graph;
    part.nodes   = graph->nodes + first;
    part.n_nodes = end - first;
    part.n_leafs = 0;
    part.uid     = 0;
    return gvote_shim_graph_compute_async(backend, &part);
}

uint32_t gvote_shim_outputs_max(llama_context * ctx) {
    return ctx->get_cparams().n_outputs_max;
}
