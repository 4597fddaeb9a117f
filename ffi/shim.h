// Access to parts of llama.cpp that llama.h does not expose: the layout of a context's KV cache, its cells, and the callbacks
// and outputs of a live context. Private to gvote. The shim only reads and rewrites state; it makes no decisions.
//
// No function throws. Functions that can fail return NULL on success, or a static string with the reason.

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

// Attention cache of a context, from the point of view of one sequence.
struct gvote_shim_cache {
    uint32_t n_cells;     // cells in the sequence's stream
    uint32_t n_layer;     // layers that store K and V in this cache (only the base cache if there is a window cache)
    uint32_t stream;      // index of the sequence's stream in the storage tensors
    bool     v_trans;     // V is stored transposed (flash attention off)
    bool     has_window;  // the context also has a sliding-window cache
    bool     offload_kqv; // attention runs on the device that holds the cache
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
    llama_token token;  // LLAMA_TOKEN_NULL if unknown: embeddings, or a loaded state
    bool        shared; // other sequences own this cell too
};

// Position and token of a cell.
struct gvote_shim_row {
    llama_pos   pos;   // -1: the cell belongs to another sequence
    llama_token token;
};

// Describes the cache of `ctx`, or returns the reason why it cannot be compacted.
const char * gvote_shim_cache_open(struct llama_context * ctx, llama_seq_id seq, struct gvote_shim_cache * out);

// Describes the layers of a cache that gvote_shim_cache_open() accepted; `out` has room for n_layer entries.
const char * gvote_shim_cache_layers(struct llama_context * ctx, struct gvote_shim_layer * out);

// Writes the cells of `seq`, ordered by position, then by index; at most `n_max` of them. Returns their total number; 0 if
// there is no attention cache or no such sequence.
uint32_t gvote_shim_cells(struct llama_context * ctx, llama_seq_id seq, struct gvote_shim_cell * out, uint32_t n_max);

// Returns the number of unused cells in the sequence's stream; 0 if there is no attention cache or no such sequence.
uint32_t gvote_shim_cells_free(struct llama_context * ctx, llama_seq_id seq);

// Writes the indices of the first unused cells in ascending order, at most `n_max`. Returns how many it wrote.
uint32_t gvote_shim_free_cells(struct llama_context * ctx, llama_seq_id seq, uint32_t * out, uint32_t n_max);

// Returns the index after the last used cell of the sequence's stream; 0 if there is no attention cache or no such sequence.
uint32_t gvote_shim_cells_end(struct llama_context * ctx, llama_seq_id seq);

// Returns the first position at which the sequence can be truncated, considering a window cache and recurrent layers. A token
// decoded there sees a complete window, and the recurrent state contains no later token. 0 if the context has neither.
llama_pos gvote_shim_cut_from(struct llama_context * ctx, llama_seq_id seq);

// Whether a part of a sequence's state cannot be truncated at every position: a window cache, the state of recurrent layers, or
// an unknown kind of memory.
bool gvote_shim_has_uncut(struct llama_context * ctx);

// Writes the position and token that `seq` has in each of the cells; `index` counts over all streams.
void gvote_shim_rows(
        struct llama_context * ctx, llama_seq_id seq, const int64_t * index, uint32_t n, struct gvote_shim_row * out);

// Writes the sequences that own any of the cells, ascending; `index` counts over all streams. Returns their number; `out` has
// room for llama_max_parallel_sequences() of them.
uint32_t gvote_shim_owners(struct llama_context * ctx, const int64_t * index, uint32_t n, llama_seq_id * out);

// Results of gvote_shim_decode() for exceptions.
#define GVOTE_SHIM_EXCEPTION (-100)
#define GVOTE_SHIM_NO_MEMORY (-101)

// Calls llama_decode(), which does not catch exceptions. Returns GVOTE_SHIM_NO_MEMORY for std::bad_alloc and
// GVOTE_SHIM_EXCEPTION for any other exception.
int32_t gvote_shim_decode(struct llama_context * ctx, struct llama_batch batch);

// The following functions call the named functions of ggml, which do not catch exceptions. An exception becomes NULL, false, or
// GGML_STATUS_ALLOC_FAILED.

// ggml_backend_dev_init(), or ggml_backend_cpu_init() if `device` is NULL.
ggml_backend_t gvote_shim_backend_init(ggml_backend_dev_t device);

// ggml_backend_buft_alloc_buffer().
ggml_backend_buffer_t gvote_shim_alloc_buffer(ggml_backend_buffer_type_t type, size_t size);

// ggml_gallocr_reserve() and ggml_gallocr_alloc_graph(). An exception leaves an allocator with pointers to freed memory: the
// allocator is then leaked, and `*alloc` set to NULL.
bool gvote_shim_alloc_graph(ggml_gallocr_t * alloc, struct ggml_cgraph * graph);

// ggml_backend_graph_compute_async().
enum ggml_status gvote_shim_graph_compute_async(ggml_backend_t backend, struct ggml_cgraph * graph);

// ggml_backend_tensor_set(), ggml_backend_tensor_get(), and their `_async` variants.
bool gvote_shim_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
bool gvote_shim_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
bool gvote_shim_tensor_set_async(
        ggml_backend_t backend, struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
bool gvote_shim_tensor_get_async(
        ggml_backend_t backend, const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);

// ggml_backend_synchronize().
bool gvote_shim_synchronize(ggml_backend_t backend);

// Records an event in the queue of a back end; creates `*event` if it is NULL. Returns false if the device has no events.
bool gvote_shim_event_record(ggml_backend_event_t * event, ggml_backend_t backend);

// Waits until the queue has reached the recorded event.
bool gvote_shim_event_synchronize(ggml_backend_event_t event);

// Applies the changes that llama.cpp defers until the next batch: position shifts and copies between streams.
void gvote_shim_update(struct llama_context * ctx);

// A sequence whose cells are recorded in every cache of the context, so that the sequence can be changed for an experiment.
// Unparking restores every cell and frees cells added since. Until then, no cell that was in use is overwritten, whichever
// sequence owns it.
struct gvote_shim_parked;

// Parks a sequence. `n_window`: number of cells that the window cache must have available during the experiment. If fewer are
// free, cells outside the window are evicted and later restored with their rows.
const char * gvote_shim_park(
        struct llama_context * ctx, llama_seq_id seq, uint32_t n_window, struct gvote_shim_parked ** out);

// Removes the cells at positions p0..p1 from the sequence: in the attention cache, and in a window cache if `window`. Removes
// none if it fails.
const char * gvote_shim_parked_hide(struct gvote_shim_parked * parked, llama_pos p0, llama_pos p1, bool window);

// Restores hidden cells and frees cells added since. After a failure the experiment cannot continue: unpark.
const char * gvote_shim_parked_reset(struct gvote_shim_parked * parked);

// Restores every cell as it was, even after a failure. Frees `parked`.
void gvote_shim_unpark(struct gvote_shim_parked * parked);

// A new table of cells, built aside. Committing it cannot fail.
struct gvote_shim_table;

// Builds a table in which `seq` owns exactly the cells `index[0..n)`; the j-th has the position and token of `cells[last[j]]`.
// Other sequences keep their cells. `cells[0..n_cells)` is the result of gvote_shim_cells(); fails if the cells have changed
// since, or do not belong to `seq` alone.
const char * gvote_shim_table_new(
        struct llama_context         * ctx,
        llama_seq_id                   seq,
        const struct gvote_shim_cell * cells,
        uint32_t                       n_cells,
        const uint32_t               * index,
        const uint32_t               * last,
        uint32_t                       n,
        struct gvote_shim_table     ** out);

// Builds a table in which `seq` owns exactly the cells `index[0..n)`, each of which is its own or free; the j-th holds
// `rows[j]`.
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

// Installs the table and frees it. The next batch finds the freed cells.
void gvote_shim_table_commit(struct llama_context * ctx, llama_seq_id seq, struct gvote_shim_table * table);

// Callbacks that consume or supply the next bytes of a state; returning false aborts with an error.
typedef bool (*gvote_shim_write)(const void * data, size_t size, void * user_data);
typedef bool (*gvote_shim_read)(void * data, size_t size, void * user_data);

// Writes llama.cpp's state of a sequence in pieces instead of through a buffer of the whole size. `flags`: 0, or
// LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY for the part of the state that cannot be truncated.
const char * gvote_shim_state_write(
        struct llama_context * ctx, llama_seq_id seq, llama_state_seq_flags flags, gvote_shim_write write, void * user_data);

// Replaces a sequence, or that part of its state, by the output of gvote_shim_state_write(). After an error the sequence, or
// the part, is empty.
const char * gvote_shim_state_read(
        struct llama_context * ctx, llama_seq_id seq, llama_state_seq_flags flags, gvote_shim_read read, void * user_data);

// Steps of a sampler chain, as llama.cpp's programs accept for --samplers.
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

// Settings of a sampler chain, named as in llama.cpp's common_params_sampling.
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

// A sampler chain with an optional grammar.
struct gvote_shim_sampler;

// Whether llama.cpp can use a grammar; if not, writes the reason to `reason`.
bool gvote_shim_grammar_check(const struct llama_vocab * vocab, const char * grammar, char * reason, size_t size);

// Creates a sampler. `params->grammar` must have passed gvote_shim_grammar_check().
const char * gvote_shim_sampler_new(
        const struct llama_vocab * vocab, const struct gvote_shim_sampling * params, struct gvote_shim_sampler ** out);

void gvote_shim_sampler_free(struct gvote_shim_sampler * sampler);

// Draws a token from the logits of the whole vocabulary, and accepts it in the chain and the grammar.
const char * gvote_shim_sampler_sample(
        struct gvote_shim_sampler * sampler, const float * logits, size_t n, llama_token * out);

// Accepts tokens that were not drawn, such as those of the prompt, in the chain but not in the grammar.
const char * gvote_shim_sampler_accept(struct gvote_shim_sampler * sampler, const llama_token * tokens, size_t n);

// Installs a terminate handler: on an uncaught exception, `handler` receives its message, then abort() is called. Intended for
// programs, since it applies to the whole process.
void gvote_shim_on_terminate(void (*handler)(const char * what));

// The following functions call the named functions of llama.h, which do not catch exceptions.

// llama_backend_init().
void gvote_shim_llama_init(void);

// llama_model_load_from_file() and llama_init_from_model(); NULL after an exception.
struct llama_model * gvote_shim_model_load(const char * path, struct llama_model_params params);
struct llama_context * gvote_shim_context_new(struct llama_model * model, struct llama_context_params params);

// llama_tokenize(); INT32_MIN after an exception.
int32_t gvote_shim_tokenize(
        const struct llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens, int32_t n_tokens_max,
        bool add_special, bool parse_special);

// llama_token_to_piece() for a token of the vocabulary; INT32_MIN after an exception.
int32_t gvote_shim_token_to_piece(
        const struct llama_vocab * vocab, llama_token token, char * buf, int32_t length, bool special);

// llama_synchronize(); false after an exception.
bool gvote_shim_context_synchronize(struct llama_context * ctx);

// llama_memory_seq_rm() and llama_memory_seq_cp() for sequences of the context; false after an exception.
bool gvote_shim_seq_rm(struct llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1);
bool gvote_shim_seq_cp(struct llama_context * ctx, llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1);

// ggml_backend_rpc_add_server() and ggml_backend_rpc_start_server(), passed as pointers because they are looked up by name;
// NULL and false after an exception. The latter returns only when its server ends.
ggml_backend_reg_t gvote_shim_rpc_add_server(void * add_server, const char * endpoint);
bool gvote_shim_rpc_serve(
        void * start_server, const char * endpoint, const char * cache, size_t n_threads, size_t n_devices,
        ggml_backend_dev_t * devices);

// Creates a CPU thread pool for at most `n_threads` threads, with a priority (ggml_sched_priority) and a polling level. NULL if
// there is no CPU back end or no memory.
ggml_threadpool_t gvote_shim_threadpool_new(int n_threads, int priority, uint32_t poll);
void gvote_shim_threadpool_free(ggml_threadpool_t pool);

// Whether std::regex accepts a pattern; if not, writes the reason to `reason`, NUL-terminated.
bool gvote_shim_is_regex(const char * pattern, char * reason, size_t size);

// llama_model_desc(); writes an empty string after an exception.
void gvote_shim_model_desc(const struct llama_model * model, char * out, size_t size);

// Returns the i-th tensor of a model in file order, and its name; NULL after the last one.
const struct ggml_tensor * gvote_shim_model_tensor(const struct llama_model * model, uint32_t i, const char ** name);

// Bytes in one kind of memory.
struct gvote_shim_memory_use {
    size_t model;
    size_t repacked; // part of `model` in buffers that the host cannot read: never mapped from the file
    size_t cache;
    size_t compute;
};

// Returns the memory that a context and its model take, or would take if the model was loaded with no_alloc.
const char * gvote_shim_memory(
        struct llama_context * ctx, struct gvote_shim_memory_use * host, struct gvote_shim_memory_use * device);

// Returns the part of that memory in one device's own memory.
const char * gvote_shim_memory_on(
        struct llama_context * ctx, ggml_backend_dev_t device, struct gvote_shim_memory_use * out);

// Installs, replaces or (with NULL) removes the eval callback of a live context.
void gvote_shim_set_eval_callback(
        struct llama_context * ctx, ggml_backend_sched_eval_callback cb, void * user_data);

// Removes the eval callback until the context builds its next graph; a reused graph runs without it. May be called from the
// callback when it declines the last node of a graph: ggml asks the callback about nodes in order, checks whether there is a
// callback when it starts a part of the graph, and afterwards calls it only for nodes that it accepted.
void gvote_shim_rest_eval_callback(struct llama_context * ctx);

// State of a context that its owner can observe, saved while gvote works in the context: callbacks, outputs of the last batch,
// counters.
struct gvote_shim_visit;

// Saves that state. Leaves the context without callbacks and outputs; the memory of the outputs stays where it is.
const char * gvote_shim_visit_begin(struct llama_context * ctx, struct gvote_shim_visit ** out);

// Returns the owner's abort callback and its data.
void gvote_shim_visit_abort(const struct gvote_shim_visit * visit, ggml_abort_callback * callback, void ** data);

// Restores everything. Frees `visit`.
void gvote_shim_visit_end(struct gvote_shim_visit * visit);

// Returns the eval callback of a context.
void gvote_shim_get_eval_callback(
        struct llama_context * ctx, ggml_backend_sched_eval_callback * callback, void ** user_data);

// Checks that the members of a live context lie where the headers used to compile the shim say. Returns NULL, or the name of a
// member that does not. Only compares addresses and values; changes nothing.
const char * gvote_shim_check_layout(struct llama_context * ctx);

// Returns the graph that the context is computing; for eval callbacks.
struct ggml_cgraph * gvote_shim_graph(struct llama_context * ctx);

// Returns the back end that computes a node of that graph.
ggml_backend_t gvote_shim_backend_of(struct llama_context * ctx, const struct ggml_tensor * node);

// Returns the number of parts (splits) in which the scheduler computes that graph.
int gvote_shim_n_parts(struct llama_context * ctx);

// Queues the nodes of a graph from `first` up to `end` on a back end, as the scheduler does.
enum ggml_status gvote_shim_graph_compute_part(ggml_backend_t backend, const struct ggml_cgraph * graph, int first, int end);

// Whether any device other than this machine's CPU computes a part of the model.
bool gvote_shim_uses_devices(struct llama_context * ctx);

// Whether the CPU may split the attention of the next single token over threads, each with a part of the cells. The last bits
// of the result then depend on the number of threads.
bool gvote_shim_token_in_parts(struct llama_context * ctx);

// Makes this process's OpenMP runtime manage more threads than there are CPUs, as long as the calling thread lives. `n`: number
// of threads in another thread's team. Returns false without OpenMP.
bool gvote_shim_crowd(int n);

// Returns the maximum number of output rows of a batch.
uint32_t gvote_shim_outputs_max(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
