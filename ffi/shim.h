// The door to what llama.h does not offer: the layout of a context's KV cache, its cells, and the callbacks and outputs of
// a living context. Private to gvote. The shim only reports and rewrites; it never decides.
//
// No function throws. Those that can fail return NULL on success, or a static string that says why.

#pragma once

#include "ggml-alloc.h"
#include "ggml-backend.h"
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
    uint32_t    index;  // cell in the stream
    llama_pos   pos;
    llama_token token;  // LLAMA_TOKEN_NULL where it is not known: embeddings, or a loaded state
    bool        shared; // another sequence sees this cell too
};

// What was decoded into a cell.
struct gvote_shim_row {
    llama_pos   pos;   // -1: the cell belongs to another sequence
    llama_token token;
};

// Describes the cache behind `ctx`, or says why it cannot be compacted.
const char * gvote_shim_cache_open(struct llama_context * ctx, llama_seq_id seq, struct gvote_shim_cache * out);

// The layers of a cache that gvote_shim_cache_open() accepted; `out` has room for n_layer entries.
const char * gvote_shim_cache_layers(struct llama_context * ctx, struct gvote_shim_layer * out);

// The cells of `seq` ordered by position, then by index. Returns their number; writes at most `n_max` of them. None where there
// is no attention cache, or no such sequence.
uint32_t gvote_shim_cells(struct llama_context * ctx, llama_seq_id seq, struct gvote_shim_cell * out, uint32_t n_max);

// Cells of the sequence's stream that no sequence uses; 0 where there is no attention cache, or no such sequence.
uint32_t gvote_shim_cells_free(struct llama_context * ctx, llama_seq_id seq);

// The first of those cells, ascending. Returns how many it wrote: at most `n_max`.
uint32_t gvote_shim_free_cells(struct llama_context * ctx, llama_seq_id seq, uint32_t * out, uint32_t n_max);

// The cell behind the last one of the sequence's stream that any sequence uses; 0 where there is no attention cache, or no such
// sequence.
uint32_t gvote_shim_cells_end(struct llama_context * ctx, llama_seq_id seq);

// The first position at which a sequence can be cut off, as far as a window cache or recurrent layers go: whoever is decoded
// there sees a whole window, and a state that knows no more. 0 without either.
llama_pos gvote_shim_cut_from(struct llama_context * ctx, llama_seq_id seq);

// Whether a part of a sequence's state cannot be cut at any position: a window cache, the state of recurrent layers, or a memory that we
// do not know.
bool gvote_shim_has_uncut(struct llama_context * ctx);

// What `seq` holds in each of the cells; `index` counts over all streams.
void gvote_shim_rows(
        struct llama_context * ctx, llama_seq_id seq, const int64_t * index, uint32_t n, struct gvote_shim_row * out);

// The sequences that own any of the cells, ascending; `index` counts over all streams. Returns their number; `out` has room
// for llama_max_parallel_sequences() of them.
uint32_t gvote_shim_owners(struct llama_context * ctx, const int64_t * index, uint32_t n, llama_seq_id * out);

// What llama_decode() answers when it raises an exception instead.
#define GVOTE_SHIM_EXCEPTION (-100)
#define GVOTE_SHIM_NO_MEMORY (-101)

// llama_decode(), which lets exceptions through: GVOTE_SHIM_NO_MEMORY for one where memory runs out, GVOTE_SHIM_EXCEPTION for
// any other.
int32_t gvote_shim_decode(struct llama_context * ctx, struct llama_batch batch);

// What follows does as the functions of ggml that are named, which let exceptions through: those become NULL, false, and
// GGML_STATUS_ALLOC_FAILED.

// ggml_backend_dev_init(), or ggml_backend_cpu_init() where `device` is NULL.
ggml_backend_t gvote_shim_backend_init(ggml_backend_dev_t device);

// ggml_backend_buft_alloc_buffer().
ggml_backend_buffer_t gvote_shim_alloc_buffer(ggml_backend_buffer_type_t type, size_t size);

// ggml_gallocr_reserve() and ggml_gallocr_alloc_graph(). An exception leaves an allocator that holds what it has freed: it is
// given up, and `alloc` is NULL then.
bool gvote_shim_alloc_graph(ggml_gallocr_t * alloc, struct ggml_cgraph * graph);

// ggml_backend_graph_compute_async().
enum ggml_status gvote_shim_graph_compute_async(ggml_backend_t backend, struct ggml_cgraph * graph);

// ggml_backend_tensor_set(), ggml_backend_tensor_get(), and the same with `_async`.
bool gvote_shim_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
bool gvote_shim_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
bool gvote_shim_tensor_set_async(
        ggml_backend_t backend, struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
bool gvote_shim_tensor_get_async(
        ggml_backend_t backend, const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);

// ggml_backend_synchronize().
bool gvote_shim_synchronize(ggml_backend_t backend);

// Notes how far the queue of a back end is now, for which an event is made if *event is NULL. False: its device has none.
bool gvote_shim_event_record(ggml_backend_event_t * event, ggml_backend_t backend);

// Waits until a queue is as far as was noted.
bool gvote_shim_event_synchronize(ggml_backend_event_t event);

// Applies what llama.cpp has put off until the next batch: shifts of positions, copies between streams.
void gvote_shim_update(struct llama_context * ctx);

// A sequence whose cells are known as they were, in every cache of the context. Whatever is done to the sequence meanwhile is an
// experiment: unparking brings back every cell, and frees those that came in. Until then no cell that was in use is overwritten,
// of whichever sequence.
struct gvote_shim_parked;

// `n_window`: cells that a window cache shall be able to give meanwhile. Where it has no more of them, cells outside of the
// window make room and are brought back with their rows.
const char * gvote_shim_park(
        struct llama_context * ctx, llama_seq_id seq, uint32_t n_window, struct gvote_shim_parked ** out);

// Takes the cells at positions p0..p1 away from the sequence: in the attention cache, and in a window cache if `window`. Where it
// fails, they all stay.
const char * gvote_shim_parked_hide(struct gvote_shim_parked * parked, llama_pos p0, llama_pos p1, bool window);

// Brings back what is hidden, and frees what came in. After a failure there is no experiment any more: unpark.
const char * gvote_shim_parked_reset(struct gvote_shim_parked * parked);

// Brings back every cell as it was, also after a failure, and lets go of them. Frees `parked`.
void gvote_shim_unpark(struct gvote_shim_parked * parked);

// The cache's new table of cells, built aside. Commit cannot fail.
struct gvote_shim_table;

// Builds the table in which `seq` owns exactly the cells `index[0..n)`, of which the j-th has the position and the token of
// `cells[last[j]]`, and every other sequence owns what it owns now. `cells[0..n_cells)` are those that gvote_shim_cells() gave:
// refused if they have changed since, or do not belong to `seq` alone.
const char * gvote_shim_table_new(
        struct llama_context         * ctx,
        llama_seq_id                   seq,
        const struct gvote_shim_cell * cells,
        uint32_t                       n_cells,
        const uint32_t               * index,
        const uint32_t               * last,
        uint32_t                       n,
        struct gvote_shim_table     ** out);

// The same for cells `index[0..n)` of which each is the sequence's own or free, and the j-th holds `rows[j]`.
const char * gvote_shim_table_of_rows(
        struct llama_context         * ctx,
        llama_seq_id                   seq,
        const struct gvote_shim_cell * cells,
        uint32_t                       n_cells,
        const uint32_t               * index,
        const struct gvote_shim_row  * rows,
        uint32_t                       n,
        struct gvote_shim_table     ** out);

void gvote_shim_table_free(struct gvote_shim_table * table);

// Puts the table in force and frees it. Freed cells are found again by the next batch.
void gvote_shim_table_commit(struct llama_context * ctx, llama_seq_id seq, struct gvote_shim_table * table);

// Take or give the next bytes of a state; false ends the work with an error.
typedef bool (*gvote_shim_write)(const void * data, size_t size, void * user_data);
typedef bool (*gvote_shim_read)(void * data, size_t size, void * user_data);

// llama.cpp's state of a sequence, piece by piece instead of through a buffer of its whole size. `flags`: 0, or
// LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY for that part of it which cannot be cut.
const char * gvote_shim_state_write(
        struct llama_context * ctx, llama_seq_id seq, llama_state_seq_flags flags, gvote_shim_write write, void * user_data);

// Replaces a sequence, or that part of it, by what gvote_shim_state_write() wrote. After an error the sequence, or the part, is
// empty.
const char * gvote_shim_state_read(
        struct llama_context * ctx, llama_seq_id seq, llama_state_seq_flags flags, gvote_shim_read read, void * user_data);

// Steps of a chain of samplers: what llama.cpp's programs take for --samplers.
enum gvote_shim_sampler_kind {
    GVOTE_SHIM_SAMPLER_PENALTIES,
    GVOTE_SHIM_SAMPLER_DRY,
    GVOTE_SHIM_SAMPLER_TOP_N_SIGMA,
    GVOTE_SHIM_SAMPLER_TOP_K,
    GVOTE_SHIM_SAMPLER_TYPICAL_P,
    GVOTE_SHIM_SAMPLER_TOP_P,
    GVOTE_SHIM_SAMPLER_MIN_P,
    GVOTE_SHIM_SAMPLER_XTC,
    GVOTE_SHIM_SAMPLER_TEMPERATURE,
    GVOTE_SHIM_SAMPLER_ADAPTIVE_P,
};

// The settings of a chain of samplers, named as in llama.cpp's common_params_sampling.
struct gvote_shim_sampling {
    uint32_t seed; // not LLAMA_DEFAULT_SEED
    float    temp;
    float    dynatemp_range;
    float    dynatemp_exponent;
    int32_t  top_k;
    float    top_p;
    float    min_p;
    float    typical_p;
    float    top_n_sigma;
    float    xtc_probability;
    float    xtc_threshold;
    int32_t  penalty_last_n;
    float    penalty_repeat;
    float    penalty_freq;
    float    penalty_present;
    float    dry_multiplier;
    float    dry_base;
    int32_t  dry_allowed_length;
    int32_t  dry_penalty_last_n;
    const char * const * dry_sequence_breakers;
    size_t   n_dry_sequence_breakers;
    float    adaptive_target;
    float    adaptive_decay;
    int32_t  mirostat; // 0, 1 or 2
    float    mirostat_tau;
    float    mirostat_eta;
    const enum gvote_shim_sampler_kind * samplers;
    size_t   n_samplers;
    const llama_logit_bias * logit_bias;
    size_t   n_logit_bias;
    bool     ignore_eos;
    const char * grammar; // NULL: none
};

// A chain of samplers, and the grammar that it keeps to.
struct gvote_shim_sampler;

// Whether llama.cpp can work with a grammar; where it cannot, `reason` says why.
bool gvote_shim_grammar_check(const struct llama_vocab * vocab, const char * grammar, char * reason, size_t size);

// `params->grammar` has been checked.
const char * gvote_shim_sampler_new(
        const struct llama_vocab * vocab, const struct gvote_shim_sampling * params, struct gvote_shim_sampler ** out);

void gvote_shim_sampler_free(struct gvote_shim_sampler * sampler);

// Draws a token from the logits of the whole vocabulary, and remembers it.
const char * gvote_shim_sampler_sample(
        struct gvote_shim_sampler * sampler, const float * logits, size_t n, llama_token * out);

// Remembers tokens that were not drawn: of the prompt. A grammar does not hear of them.
const char * gvote_shim_sampler_accept(struct gvote_shim_sampler * sampler, const llama_token * tokens, size_t n);

// What happens to exceptions that nobody catches: `handler` is told what they say, and abort() follows. For programs: it holds
// for the whole process.
void gvote_shim_on_terminate(void (*handler)(const char * what));

// What follows does as the functions of llama.h that are named, which let exceptions through.

// llama_backend_init().
void gvote_shim_llama_init(void);

// llama_model_load_from_file() and llama_init_from_model(); NULL for an exception.
struct llama_model * gvote_shim_model_load(const char * path, struct llama_model_params params);
struct llama_context * gvote_shim_context_new(struct llama_model * model, struct llama_context_params params);

// llama_tokenize(); INT32_MIN for an exception.
int32_t gvote_shim_tokenize(
        const struct llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens, int32_t n_tokens_max,
        bool add_special, bool parse_special);

// llama_token_to_piece() of a token that the vocabulary has; INT32_MIN for an exception.
int32_t gvote_shim_token_to_piece(
        const struct llama_vocab * vocab, llama_token token, char * buf, int32_t length, bool special);

// llama_synchronize().
bool gvote_shim_context_synchronize(struct llama_context * ctx);

// llama_memory_seq_rm() and llama_memory_seq_cp() for sequences that the context has; false for an exception.
bool gvote_shim_seq_rm(struct llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1);
bool gvote_shim_seq_cp(struct llama_context * ctx, llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1);

// ggml_backend_rpc_add_server() and ggml_backend_rpc_start_server(), which were found by their names; NULL and false for an
// exception. The latter ends with its server.
ggml_backend_reg_t gvote_shim_rpc_add_server(void * add_server, const char * endpoint);
bool gvote_shim_rpc_serve(
        void * start_server, const char * endpoint, const char * cache, size_t n_threads, size_t n_devices,
        ggml_backend_dev_t * devices);

// Threads of the CPU back end with a priority (ggml_sched_priority) and a level of polling, for at most `n_threads` at once; null where
// there is no such back end or no memory.
ggml_threadpool_t gvote_shim_threadpool_new(int n_threads, int priority, uint32_t poll);
void gvote_shim_threadpool_free(ggml_threadpool_t pool);

// Whether C++ takes a pattern as a regular expression; where not, `reason` tells why, with a NUL at its end.
bool gvote_shim_is_regex(const char * pattern, char * reason, size_t size);

// What llama_model_desc() writes; nothing for an exception.
void gvote_shim_model_desc(const struct llama_model * model, char * out, size_t size);

// The i-th tensor of a model in the order of its file, and its name; NULL behind the last one.
const struct ggml_tensor * gvote_shim_model_tensor(const struct llama_model * model, uint32_t i, const char ** name);

// Bytes of one kind of memory.
struct gvote_shim_memory_use {
    size_t model;
    size_t repacked; // of the model, what the host may not read: it is never mapped from the file
    size_t cache;
    size_t compute;
};

// What a context and its model take, or would take if the model was loaded with no_alloc.
const char * gvote_shim_memory(
        struct llama_context * ctx, struct gvote_shim_memory_use * host, struct gvote_shim_memory_use * device);

// That part of it which lies in the own memory of one device.
const char * gvote_shim_memory_on(
        struct llama_context * ctx, ggml_backend_dev_t device, struct gvote_shim_memory_use * out);

// Installs, replaces or (NULL) removes the eval callback of a living context.
void gvote_shim_set_eval_callback(
        struct llama_context * ctx, ggml_backend_sched_eval_callback cb, void * user_data);

// Takes the eval callback away until the context builds its next graph; a graph that is reused runs without. May be called from
// the callback where it says no to the last node of a graph: ggml asks about nodes one after another, looks whether there is a
// callback when it begins with a part of the graph, and calls it afterwards only for a node that it said yes to.
void gvote_shim_rest_eval_callback(struct llama_context * ctx);

// What a context shows to its owner, put away while gvote works in it: callbacks, outputs of the last batch, counters.
struct gvote_shim_visit;

// From now on the context has no callbacks and no outputs. The outputs' memory stays where it is.
const char * gvote_shim_visit_begin(struct llama_context * ctx, struct gvote_shim_visit ** out);

// The owner's abort callback and its data.
void gvote_shim_visit_abort(const struct gvote_shim_visit * visit, ggml_abort_callback * callback, void ** data);

// Brings everything back. Frees `visit`.
void gvote_shim_visit_end(struct gvote_shim_visit * visit);

// The eval callback of a context.
void gvote_shim_get_eval_callback(
        struct llama_context * ctx, ggml_backend_sched_eval_callback * callback, void ** user_data);

// Whether the members of a living context lie where the headers that the shim was compiled with say: NULL, or the name of one
// that does not. Looks at addresses only, before anything is followed or changed.
const char * gvote_shim_check_layout(struct llama_context * ctx);

// The graph that the context has in work: for eval callbacks.
struct ggml_cgraph * gvote_shim_graph(struct llama_context * ctx);

// The back end that computes a node of that graph.
ggml_backend_t gvote_shim_backend_of(struct llama_context * ctx, const struct ggml_tensor * node);

// In how many parts the scheduler computes that graph.
int gvote_shim_n_parts(struct llama_context * ctx);

// Puts the nodes of a graph from `first` up to `end` into the queue of a back end, as the scheduler does.
enum ggml_status gvote_shim_graph_compute_part(ggml_backend_t backend, const struct ggml_cgraph * graph, int first, int end);

// Whether something else than this machine's CPU computes a part of the model.
bool gvote_shim_uses_devices(struct llama_context * ctx);

// Whether the CPU may split attention of the next single token into a part of the cells for each thread. What such parts add up
// to depends on the number of threads, in the last bits.
bool gvote_shim_token_in_parts(struct llama_context * ctx);

// Makes the OpenMP runtime of this process know of more threads than there are CPUs, as long as the calling thread lives. `n`: threads
// that another thread's team has. False without OpenMP.
bool gvote_shim_crowd(int n);

// Most rows of outputs that a batch may ask for.
uint32_t gvote_shim_outputs_max(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
