// The door to what llama.h does not offer: the layout of a context's KV cache, its cells, and the eval callback
// of a living context. Private to gvote. The shim only reports and rewrites; it never decides.
//
// No function throws. Those that can fail return NULL on success, or a static string that says why.

#pragma once

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The attention cache of a context as seen by one sequence.
struct gvote_shim_cache {
    uint32_t n_cells;     // cells in the sequence's stream
    uint32_t n_layer;     // layers that store K and V here (the base cache only, where there is a window cache)
    uint32_t stream;      // index of the sequence's stream in the storage tensors
    bool     v_trans;     // V is stored transposed (flash attention off)
    bool     has_window;  // a sliding-window cache lives beside this one
    bool     offload_kqv; // attention runs where the cache lives
    float    softcap;     // attention logit softcap, 0 = none
};

// One layer of the cache.
struct gvote_shim_layer {
    int32_t  il;          // layer index in the model
    uint32_t n_head;      // query heads
    uint32_t n_head_kv;   // KV heads
    uint32_t n_embd_head_k;
    uint32_t n_embd_head_v;
    struct ggml_tensor * k; // [n_embd_k_gqa, n_cells, n_stream]
    struct ggml_tensor * v; // [n_embd_v_gqa, n_cells, n_stream], per stream transposed in memory if v_trans
};

struct gvote_shim_cell {
    uint32_t  index;  // cell in the stream
    llama_pos pos;
    bool      shared; // another sequence sees this cell too
};

// Describes the cache behind `ctx`, or says why it cannot be compacted.
const char * gvote_shim_cache_open(struct llama_context * ctx, llama_seq_id seq, struct gvote_shim_cache * out);

// The layers of a cache that gvote_shim_cache_open() accepted; `out` has room for n_layer entries.
const char * gvote_shim_cache_layers(struct llama_context * ctx, struct gvote_shim_layer * out);

// The cells of `seq` ordered by position, then by index. Returns their number; writes at most `n_max` of them.
uint32_t gvote_shim_cells(struct llama_context * ctx, llama_seq_id seq, struct gvote_shim_cell * out, uint32_t n_max);

// Cells of the sequence's stream that no sequence uses.
uint32_t gvote_shim_cells_free(struct llama_context * ctx, llama_seq_id seq);

// Takes the cells at positions p0..p1 away from `seq` in this cache alone: a window cache beside it keeps its own.
void gvote_shim_hide(struct llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1);

// The position of each cell of the sequence's stream, -1 where `seq` does not own it.
void gvote_shim_cells_pos(
        struct llama_context * ctx, llama_seq_id seq, const uint32_t * index, uint32_t n, llama_pos * out);

// The cache's new table of cells, built aside. Commit cannot fail.
struct gvote_shim_table;

// Builds the table in which `seq` owns exactly the cells `index[0..n)` at positions `pos[0..n)`, and every other
// sequence what it owns now. Every index must belong to `seq` alone now.
const char * gvote_shim_table_new(
        struct llama_context * ctx,
        llama_seq_id           seq,
        const uint32_t       * index,
        const llama_pos      * pos,
        uint32_t               n,
        struct gvote_shim_table ** out);

void gvote_shim_table_free(struct gvote_shim_table * table);

// Puts the table in force and frees it. Freed cells are found again by the next batch.
void gvote_shim_table_commit(struct llama_context * ctx, llama_seq_id seq, struct gvote_shim_table * table);

// Bytes of one kind of memory.
struct gvote_shim_memory_use {
    size_t model;
    size_t cache;
    size_t compute;
};

// What a context and its model take, or would take if the model was loaded with no_alloc.
const char * gvote_shim_memory(
        struct llama_context * ctx, struct gvote_shim_memory_use * host, struct gvote_shim_memory_use * device);

// Installs, replaces or (NULL) removes the eval callback of a living context.
void gvote_shim_set_eval_callback(
        struct llama_context * ctx, ggml_backend_sched_eval_callback cb, void * user_data);

#ifdef __cplusplus
}
#endif
