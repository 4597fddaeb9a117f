/*
 * gvote: an adaptive KV cache for llama.cpp.
 *
 * The app keeps its models, contexts, batches and samplers. It creates a handle, attaches it to a context, and asks it to
 * compress a sequence after a prompt:
 *
 *     gvote_params p = gvote_params_default();
 *     gvote_t * g = gvote_new(&p, NULL);
 *     struct llama_context * ctx = llama_init_from_model(model, cparams);
 *     gvote_attach(g, ctx);
 *     ...                                             // llama_decode(ctx, prompt)
 *     gvote_report r = { .size = sizeof r };
 *     if (gvote_compress(g, ctx, 0, &r) != GVOTE_OK) {
 *         puts(gvote_last_error(g));
 *     }
 *     ...                                             // llama_decode() continues at the next position
 *     llama_free(ctx);
 *     gvote_free(g);
 *
 * A vote takes time that only a long answer earns back. gvote_vote_if_due(), called before each llama_decode() of an answer
 * instead of gvote_compress() before it, votes once that pays.
 *
 * A vote is a bet on what will be asked. What it takes out of the cache is therefore set aside, in memory or in a file, in
 * as many bytes as the freed cells held. gvote_expand() brings it back before the next question is decoded:
 *
 *     gvote_expand(g, ctx, 0, n_tokens, NULL);        // n_tokens: tokens of the question
 *     ...                                             // llama_decode(ctx, question)
 *     gvote_compress(g, ctx, 0, NULL);
 *
 * A vote needs free cells in the stream of the sequence: as many as the largest of `samples`, `window` and twice `draft`,
 * and some 300 with GVOTE_FLAG_REPLAY. It works in the context's own buffers and makes no copy of the cache.
 *
 * Supported are decoder-only models with an attention cache; beside sliding-window layers, the other layers are compressed.
 * Recurrent, hybrid, encoder and MLA models, ALiBi, learned attention sinks, and contexts that share their cache with
 * another one are GVOTE_ERROR_UNSUPPORTED, with the reason.
 *
 * Conventions, for every function unless it says otherwise:
 *
 *   Errors     A function that can fail returns a gvote_status; GVOTE_OK is 0. After any other status the context, its
 *              cache, its outputs and the handle are as they were before the call, and gvote_last_error() describes the
 *              error. No C++ exception and no panic crosses this interface. Every call can return GVOTE_ERROR_NULL for a
 *              required argument that is NULL, GVOTE_ERROR_HANDLE for an invalid handle, and GVOTE_ERROR_INTERNAL; the
 *              comments below name the others.
 *   Threads    Handles are independent. Use a handle, and the context it is attached to, from one thread at a time; a
 *              second call meanwhile returns GVOTE_ERROR_BUSY and does nothing. Only gvote_cancel() and
 *              gvote_cancel_clear() may be called at any time from any thread.
 *   Ownership  The app owns its models, contexts and buffers. gvote keeps a pointer to the attached context, and uses it
 *              only in calls that name it. Strings that gvote returns belong to gvote.
 *   Units      A cell is a slot of the cache; a position is a token's logical place in its sequence (llama_pos). Sizes are
 *              in bytes, times in seconds, KL divergences in nats a token.
 *   Outputs    A call preserves what llama_get_logits_ith() and llama_get_embeddings_ith() return for the last batch, the
 *              pointers they returned before, and the context's eval and abort callbacks, counters (llama_perf_context())
 *              and samplers.
 *   Growth     gvote_params and gvote_report begin with their size. A caller compiled against an older header, with a
 *              smaller struct, keeps working; an unknown size is GVOTE_ERROR_SIZE. Enumerations may get more values.
 */

#ifndef GVOTE_H
#define GVOTE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef GVOTE_API
#    if defined(_WIN32)
#        define GVOTE_API
#    else
#        define GVOTE_API __attribute__((visibility("default")))
#    endif
#endif

#define GVOTE_VERSION_MAJOR 0
#define GVOTE_VERSION_MINOR 1
#define GVOTE_VERSION_PATCH 0

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context; /* llama.h */
struct ggml_tensor;   /* ggml.h */

/* A handle: settings, and the state of the sequences of one context. Opaque. */
typedef struct gvote_handle gvote_t;

/* The result of a call. gvote_status_string() describes each in a few words. */
typedef enum gvote_status {
    GVOTE_OK                    = 0,
    GVOTE_ERROR_NULL            = 1,  /* a required argument is NULL */
    GVOTE_ERROR_HANDLE          = 2,  /* not a handle: not from gvote_new(), or freed */
    GVOTE_ERROR_SIZE            = 3,  /* a struct has a size that this library does not know, or a buffer is too small */
    GVOTE_ERROR_PARAMS          = 4,  /* a setting is out of range, or cannot change any more */
    GVOTE_ERROR_VERSION         = 5,  /* the llama.cpp in the process is not the one gvote was built for */
    GVOTE_ERROR_UNSUPPORTED     = 6,  /* this model or context cannot be compressed */
    GVOTE_ERROR_NOT_ATTACHED    = 7,  /* gvote_attach() was not called for this context */
    GVOTE_ERROR_NO_SEQUENCE     = 8,  /* no such sequence, layer or head */
    GVOTE_ERROR_NOT_SEEN        = 9,  /* the sequence is empty, or was decoded while gvote was not attached */
    GVOTE_ERROR_CHANGED         = 10, /* its cells were moved, removed or replaced behind gvote's back */
    GVOTE_ERROR_SHARED          = 11, /* its cells are shared with another sequence: compress before llama_memory_seq_cp() */
    GVOTE_ERROR_COMPRESSED      = 12, /* the position, or text for GVOTE_FLAG_REPLAY, lies inside the compressed part */
    GVOTE_ERROR_NO_CELLS        = 13, /* a vote needs more free cells than there are, or they cannot be freed */
    GVOTE_ERROR_MEMORY          = 14, /* out of memory */
    GVOTE_ERROR_CANCELLED       = 15, /* cancelled by gvote_cancel(), the progress callback or the context's abort callback */
    GVOTE_ERROR_DECODE          = 16, /* llama.cpp could not compute what the vote needs */
    GVOTE_ERROR_STATE           = 17, /* the saved bytes are truncated, damaged, or belong to another sequence */
    GVOTE_ERROR_BUSY            = 18, /* another call with this handle is running */
    GVOTE_ERROR_INTERNAL        = 19, /* a bug in gvote: please report it */
    GVOTE_ERROR_FILE            = 20, /* `recall_file` cannot be created, or its disk is full */
    GVOTE_STATUS_FORCE_32_BITS  = 0x7fffffff
} gvote_status;

/* The method that chooses what stays. The first two also choose how much; the others keep the share `ratio`. */
typedef enum gvote_policy {
    GVOTE_POLICY_GVOTE              = 0, /* real and synthetic queries; a trial chooses the number of cells */
    GVOTE_POLICY_GVOTE_PAPER        = 1, /* votes and budget of arXiv 2509.03136 */
    GVOTE_POLICY_FULL               = 2, /* everything */
    GVOTE_POLICY_STREAMING_LLM      = 3, /* first and last tokens (arXiv 2309.17453) */
    GVOTE_POLICY_SNAPKV             = 4, /* attention of the last queries (arXiv 2404.14469) */
    GVOTE_POLICY_ADAKV              = 5, /* the same, with a budget shared by the heads of a layer (arXiv 2407.11550) */
    GVOTE_POLICY_EXPECTED_ATTENTION = 6, /* Gaussian future queries (arXiv 2510.00636) */
    GVOTE_POLICY_KEYDIFF            = 7, /* keys unlike the others (arXiv 2504.15364) */
    GVOTE_POLICY_FORCE_32_BITS      = 0x7fffffff
} gvote_policy;

/* What a cell holds after a vote. */
typedef enum gvote_evict {
    GVOTE_EVICT_COMPOSITE     = 0, /* for every layer and KV head, a token of that head's own choice */
    GVOTE_EVICT_CELLS         = 1, /* the same token for all layers and heads */
    GVOTE_EVICT_FORCE_32_BITS = 0x7fffffff
} gvote_evict;

/* What happens to keys and values that a vote takes out of the cache. */
typedef enum gvote_recall {
    GVOTE_RECALL_AUTO          = 0, /* set aside in the memory of the process; gvote_expand() brings them back */
    GVOTE_RECALL_OFF           = 1, /* they are lost */
    GVOTE_RECALL_FILE          = 2, /* as GVOTE_RECALL_AUTO, but in a file on disk: `recall_file` */
    GVOTE_RECALL_FORCE_32_BITS = 0x7fffffff
} gvote_recall;

/* The type in which they are set aside. */
typedef enum gvote_recall_type {
    GVOTE_RECALL_TYPE_CACHE         = 0, /* as in the cache: they return bit for bit */
    GVOTE_RECALL_TYPE_Q8_0          = 1, /* f32, f16 and bf16 as q8_0: half the bytes of f16; they return rounded */
    GVOTE_RECALL_TYPE_FORCE_32_BITS = 0x7fffffff
} gvote_recall_type;

/* When gvote_vote_if_due() votes on an answer. */
typedef enum gvote_when {
    GVOTE_WHEN_AUTO          = 0, /* once fewer cells would have saved as much time as a vote is expected to take */
    GVOTE_WHEN_AFTER         = 1, /* after `vote_after` tokens of it */
    GVOTE_WHEN_NEVER         = 2, /* only gvote_compress() votes */
    GVOTE_WHEN_FORCE_32_BITS = 0x7fffffff
} gvote_when;

/* The rule that decided the number of cells. */
typedef enum gvote_bound {
    GVOTE_BOUND_ALL           = 0, /* nothing could be dropped, or the sequence is too short to be worth it */
    GVOTE_BOUND_TRIAL         = 1, /* the fewest cells that stayed close enough to the full cache in a trial */
    GVOTE_BOUND_LOST_MASS     = 2, /* the fewest cells that lose no more attention mass than allowed */
    GVOTE_BOUND_BLIND         = 3, /* everything stays: a chat turn is still open, so the question is unknown */
    GVOTE_BOUND_BUDGET        = 4, /* the paper's budget */
    GVOTE_BOUND_RATIO         = 5, /* `ratio` */
    GVOTE_BOUND_MAX_CELLS     = 6, /* `max_cells` */
    GVOTE_BOUND_MIN_CELLS     = 7, /* `min_cells` */
    GVOTE_BOUND_FORCED        = 8, /* sinks and recent tokens alone exceed what the rule asked for */
    GVOTE_BOUND_FORCE_32_BITS = 0x7fffffff
} gvote_bound;

/* The steps of a vote, in order. Not every vote has all of them; the steps of a trial repeat. */
typedef enum gvote_stage {
    GVOTE_STAGE_REPLAY        = 0, /* part of the context is read again */
    GVOTE_STAGE_PROBE         = 1, /* synthetic queries are computed */
    GVOTE_STAGE_SCORE         = 2, /* keys are scored */
    GVOTE_STAGE_DRAFT         = 3, /* the full cache drafts a continuation */
    GVOTE_STAGE_TRY           = 4, /* a number of cells is tried */
    GVOTE_STAGE_COMPACT       = 5, /* rows are moved and cells freed */
    GVOTE_STAGE_FORCE_32_BITS = 0x7fffffff
} gvote_stage;

typedef enum gvote_log_level {
    GVOTE_LOG_INFO          = 0, /* the result of a vote */
    GVOTE_LOG_WARN          = 1, /* a condition that will make later calls fail */
    GVOTE_LOG_FORCE_32_BITS = 0x7fffffff
} gvote_log_level;

/* Flags of gvote_params. */
enum {
    GVOTE_FLAG_REPLAY        = 1, /* policy gvote: read the context twice, for questions that are not known yet */
    GVOTE_FLAG_ACCOUNT_ERROR = 2, /* account for the rounding of a quantized K cache */
    GVOTE_FLAG_PROTECT       = 4  /* keep the chat template's markers (control tokens); see also gvote_seq_protect() */
};

/* Settings. Initialise with gvote_params_default(), then change fields. Do not zero the struct: 0 has a meaning in some
 * fields. */
typedef struct gvote_params {
    size_t   size;         /* sizeof this struct in the caller */
    uint32_t policy;       /* gvote_policy */
    uint32_t evict;        /* gvote_evict */
    uint32_t flags;        /* GVOTE_FLAG_... */
    float    target_kl;    /* policy gvote: allowed mean KL divergence of a continuation from the full cache, nats a token, up
                              to 10; 0.005 is safe, 0.02 the default, 0.1 bold; 0: no trial, `lost_mass` decides */
    float    lost_mass;    /* policy gvote: largest share of attention mass lost if there is no trial; above 0, below 1 */
    float    ratio;        /* share of the cells to keep, above 0, up to 1; 0: the policy's own rule */
    uint32_t max_cells;    /* largest number of cells of the sequence; 0: no limit */
    uint32_t min_cells;    /* smallest number of cells */
    uint32_t sinks;        /* first tokens that always stay */
    uint32_t recent;       /* last tokens that always stay; at least `window` */
    uint32_t window;       /* number of last real queries that vote; 1 to 1024 */
    uint32_t samples;      /* number of synthetic queries; 1 to 256 */
    uint32_t draft;        /* policy gvote: tokens that the trial drafts; of a long answer twice as many; 1 to 256 */
    uint32_t span_back;    /* policy gvote: tokens before a hit that stay with it; up to 1024 */
    uint32_t span_forward; /* policy gvote: tokens after a hit that stay with it; up to 1024 */
    uint32_t pool;         /* policy gvote: number of positions over which observed attention is averaged; odd, up to 63 */
    float    head_mix;     /* policy gvote: weight of the mean over all heads, added to each head's own score; 0 to 1000 */
    float    p_nuc;        /* GVOTE_POLICY_GVOTE_PAPER: share of attention that sets the budget; above 0, up to 1 */
    uint64_t seed;         /* of the synthetic queries; the same seed gives the same choice */
    uint32_t recall;       /* gvote_recall; fixed while the handle is attached */
    uint32_t recall_type;  /* gvote_recall_type; fixed while the handle is attached. GVOTE_RECALL_TYPE_Q8_0 needs heads of a
                              multiple of 32 numbers, or gvote_attach() is GVOTE_ERROR_PARAMS */
    const char * recall_file; /* GVOTE_RECALL_FILE: path in UTF-8; otherwise ignored. Must not exist, or be an empty file. The
                                 file is unlinked as soon as it is open, and its space is released when the handle is freed or
                                 the process ends. gvote_new() and gvote_set_params() copy the string; the one that
                                 gvote_get_params() returns is valid until the settings change or the handle is freed */
    uint32_t when;         /* gvote_when; applies to answers that begin later */
    uint32_t vote_after;   /* GVOTE_WHEN_AFTER: tokens of an answer before the vote */
} gvote_params;

/* One attempt of a trial. */
typedef struct gvote_try {
    uint32_t cells; /* number of visible cells */
    float    kl;    /* mean KL from the full cache minus that of rounding, nats a token; above the target a lower bound */
} gvote_try;

/* Capacity of gvote_report.tried. */
#define GVOTE_MAX_TRIED 8

/* What a vote did, or would do. Set `size`; the call fills in the rest. */
typedef struct gvote_report {
    size_t    size;            /* sizeof this struct in the caller */
    uint32_t  policy;          /* gvote_policy */
    uint32_t  bound;           /* gvote_bound */
    uint32_t  cells_before;    /* cells of the sequence */
    uint32_t  cells_after;
    uint64_t  kv_bytes_before; /* bytes of K and V in those cells */
    uint64_t  kv_bytes_after;
    float     lost_mass;       /* the policy's estimate of the attention mass lost, 0 to 1; NaN: not estimated */
    float     rounding;        /* mean KL divergence that rounding alone causes in the trial, nats a token */
    uint32_t  n_tried;         /* number of attempts of the trial; 0 without a trial */
    gvote_try tried[GVOTE_MAX_TRIED]; /* in order */
    uint32_t  rows_back;       /* rows of each head that were set aside and returned before the vote */
    uint64_t  compute_bytes;   /* bytes of temporary buffers for scoring */
    double    replay_s;        /* seconds of each step */
    double    probe_s;
    double    score_s;
    double    select_s;
    double    trial_s;
    double    compact_s;
    double    aside_s;         /* setting aside what left the cache */
    uint64_t  bytes_aside;     /* bytes now set aside for the sequence, in memory or in `recall_file` */
    double    recall_s;        /* bringing rows back, and choosing among them if not all had room at once */
} gvote_report;

/* Callbacks are called from inside gvote: they must not throw an exception or leave by longjmp(). */

/* An eval callback, as in llama_context_params.cb_eval (ggml_backend_sched_eval_callback). */
typedef bool (*gvote_eval_callback)(struct ggml_tensor * t, bool ask, void * user_data);

/* Called when a step begins, from inside gvote_compress(), gvote_plan(), gvote_vote_if_due() and gvote_make_room().
 * Return false to cancel. Must not call gvote with the same handle, except gvote_cancel(). */
typedef bool (*gvote_progress_callback)(gvote_stage stage, void * user_data);

/* Receives a line of text without a newline. `text` is valid during the call. */
typedef void (*gvote_log_callback)(gvote_log_level level, const char * text, void * user_data);

/* ---- versions ------------------------------------------------------------------------------------------------------------ */

/* The version of this library, such as "0.1.0". Never NULL; static. Any thread. */
GVOTE_API const char * gvote_version(void);

/* The llama.cpp version that this library was built for: major, minor and patch. Never NULL; static. Any thread. */
GVOTE_API const char * gvote_llama_version(void);

/* A short description of a status. Never NULL, not even for an unknown number; static. Any thread. */
GVOTE_API const char * gvote_status_string(gvote_status status);

/* ---- settings ------------------------------------------------------------------------------------------------------------ */

/* Fills `params` with the defaults of the policy gvote, as far as its `size` reaches.
 * Errors: GVOTE_ERROR_NULL, GVOTE_ERROR_SIZE. Any thread. */
GVOTE_API gvote_status gvote_params_init(gvote_params * params);

/* The default settings. */
static inline gvote_params gvote_params_default(void) {
    gvote_params params;
    params.size = sizeof(params);
    (void) gvote_params_init(&params); /* the size is right */
    return params;
}

/* ---- a handle ------------------------------------------------------------------------------------------------------------ */

/* Creates a handle. `params` NULL: the defaults. Free it with gvote_free().
 * Returns NULL on failure; `status` (may be NULL) and gvote_last_error(NULL) tell why.
 * Errors: GVOTE_ERROR_SIZE, GVOTE_ERROR_PARAMS, GVOTE_ERROR_MEMORY; GVOTE_ERROR_VERSION if the llama.cpp in the process
 * has another version than gvote was built for; with GVOTE_RECALL_FILE also GVOTE_ERROR_NULL without a `recall_file`, and
 * GVOTE_ERROR_FILE if it cannot be created. */
GVOTE_API gvote_t * gvote_new(const gvote_params * params, gvote_status * status);

/* Frees a handle; NULL is allowed. Does not touch a context: free the context first, or call gvote_detach(). If another
 * call with the handle is running, nothing is freed. */
GVOTE_API void gvote_free(gvote_t * g);

/* The last error of this handle, or "" after a success. Valid until the next call with the handle. With NULL: the last
 * failure of gvote_new(), or of a call with a NULL or invalid handle, in this thread. Never NULL. */
GVOTE_API const char * gvote_last_error(const gvote_t * g);

/* Changes the settings of later votes. `params` NULL: the defaults. `window`, `sinks` and the fields that begin with
 * `recall` cannot change while the handle is attached. A `recall_file` that the handle already uses is not created again.
 * Errors: GVOTE_ERROR_SIZE, GVOTE_ERROR_PARAMS, and those of gvote_new() for `recall_file`. */
GVOTE_API gvote_status gvote_set_params(gvote_t * g, const gvote_params * params);

/* Writes the current settings to `params`, as far as the `size` reaches that the caller has set in it. Errors:
 * GVOTE_ERROR_SIZE. */
GVOTE_API gvote_status gvote_get_params(gvote_t * g, gvote_params * params);

/* Sets the log callback. It receives a line about each vote, and warnings, in the thread that votes or decodes. NULL
 * (default) disables logging. `user_data` is passed on and belongs to the app. */
GVOTE_API gvote_status gvote_set_log_callback(gvote_t * g, gvote_log_callback callback, void * user_data);

/* Sets the progress callback. It is called at each step of a vote, in the thread that votes. NULL (default) disables it.
 * `user_data` is passed on and belongs to the app. */
GVOTE_API gvote_status gvote_set_progress_callback(gvote_t * g, gvote_progress_callback callback, void * user_data);

/* Stops a running vote and every later one, until gvote_cancel_clear(): they return GVOTE_ERROR_CANCELLED. Does not
 * affect the app's own decoding. Any thread, as long as the handle lives. */
GVOTE_API gvote_status gvote_cancel(gvote_t * g);

/* Allows votes again. Any thread, as long as the handle lives. */
GVOTE_API gvote_status gvote_cancel_clear(gvote_t * g);

/* ---- observing ----------------------------------------------------------------------------------------------------------- */

/* Observes all sequences of a context from now on. Call it after llama_init_from_model() and before the prompt; gvote
 * does not know what was decoded earlier.
 *
 * An eval callback that the context already has is called beside gvote's. Otherwise gvote removes its callback while
 * answers are written (one token of each sequence at a time): it leaves at the end of a step and returns with the next
 * graph that llama.cpp builds, at the latest for the next prompt. Tokens decoded meanwhile are taken from the cells.
 *
 * Attaching to the same context again only restores the callback at once. Attaching to another context forgets the first
 * one, which is not touched and may be freed already.
 * Before anything changes, the structures of the context are compared with those that gvote was built for.
 * Errors: GVOTE_ERROR_UNSUPPORTED, GVOTE_ERROR_VERSION, GVOTE_ERROR_MEMORY. */
GVOTE_API gvote_status gvote_attach(gvote_t * g, struct llama_context * ctx);

/* Stops observing, forgets the sequences, and restores the eval callback that the context had. Call it before
 * llama_free() if the handle lives on, and before gvote_free() if the context does.
 * Errors: GVOTE_ERROR_NOT_ATTACHED. */
GVOTE_API gvote_status gvote_detach(gvote_t * g, struct llama_context * ctx);

/* The eval callback that gvote_attach() installs, with the handle as `user_data`. An app may set it in
 * llama_context_params.cb_eval itself, or call it from its own callback: with `ask` return true if either returns true,
 * else if both do. Nodes are ignored until gvote_attach() has named the context. Called by ggml, in the thread that
 * decodes. */
GVOTE_API bool gvote_cb_eval(struct ggml_tensor * t, bool ask, void * user_data);

/* Sets an eval callback that is called beside gvote's, for every node that it asks for, in the thread that decodes. NULL:
 * none. `user_data` is passed on and belongs to the app. gvote_attach() does this for a callback that it finds in the
 * context. If the context is already writing an answer and gvote's callback is removed, the other one is called from the
 * next prompt on, or at once after gvote_attach() to the same context. */
GVOTE_API gvote_status gvote_set_next_callback(gvote_t * g, gvote_eval_callback callback, void * user_data);

/* ---- votes --------------------------------------------------------------------------------------------------------------- */

/* Chooses the cells that the sequence `seq` needs, keeps those and frees the others. Call it between two calls of
 * llama_decode(); decoding continues at the next position.
 *
 * It can be called again later: the choice is then made among everything that was ever read. Rows that earlier calls set
 * aside return first, all at once if there are cells for them, else a quarter of the cells that the sequence can have at
 * a time, with a vote for each part. A call can therefore leave more cells than it found. `report` may be NULL; its
 * `size` must be set.
 * Errors: GVOTE_ERROR_SIZE; all from GVOTE_ERROR_UNSUPPORTED on except GVOTE_ERROR_STATE; GVOTE_ERROR_COMPRESSED if
 * GVOTE_FLAG_REPLAY is set and the sequence was compressed before. */
GVOTE_API gvote_status gvote_compress(gvote_t * g, struct llama_context * ctx, int32_t seq, gvote_report * report);

/* A dry run of gvote_compress() on the cells that the sequence has now, without rows set aside: fills `report` (may be
 * NULL) and changes nothing. Takes as long.
 * Errors as gvote_compress(). */
GVOTE_API gvote_status gvote_plan(gvote_t * g, struct llama_context * ctx, int32_t seq, gvote_report * report);

/* Votes on an answer when the setting `when` says so. Call it before every llama_decode() of the answer, instead of
 * gvote_compress() before the first. Until it votes, every token is the full cache's own. With GVOTE_WHEN_AUTO the first
 * 64 tokens always are, and an answer that ends early has paid nothing.
 *
 * `start` is the position of the answer's first token; a negative `start` is 0. The tokens from there on vote, and their
 * number tells how long the answer is. All of them stay, and so do the `recent` tokens before `start`, where the question
 * is.
 *
 * A call before the vote is due takes about a microsecond: it reads counters of the context and waits for no device. The
 * time of a step comes from llama_perf_context(), or with `no_perf` from the time between calls; work of the app between
 * two steps then counts only if every step includes it. In a batch, call it for each sequence; each has its own vote.
 *
 * An answer gets at most one vote, whether it drops anything or not, and none after gvote_compress() has voted on it.
 * Another `start` is another answer; so is an answer that is cut or written again from its start. Rows that earlier votes
 * set aside stay aside, unlike with gvote_compress(): call that one where cells are needed at once.
 *
 * `has_voted` (may be NULL) tells whether a vote was taken; only then is `report` (may be NULL; its `size` must be set)
 * written. A failed vote is reported once: the cache is unchanged, the answer continues, and later calls do not retry.
 * Errors: GVOTE_ERROR_NOT_SEEN if the sequence is empty or ends before `start`; GVOTE_ERROR_SIZE; when a vote is due,
 * those of gvote_compress(). */
GVOTE_API gvote_status gvote_vote_if_due(
        gvote_t              * g,
        struct llama_context * ctx,
        int32_t                seq,
        int32_t                start,
        bool                 * has_voted,
        gvote_report         * report);

/* Makes room for a text longer than the cache. Call it before every llama_decode(). It ensures that `needed` cells (the
 * tokens of the next batch), and those that a later vote needs, are free in the stream of the sequence `seq`. If they
 * are, nothing happens, and the report has cells_after == cells_before. If not, the policy ranks the cells of the
 * sequence, and the last ones are freed until `needed` cells are free, and at least a quarter of the cells that the
 * sequence can have, so that not every batch costs a vote. There is no trial: the needs of an answer play no part.
 * The sequence can have its own cells and the free ones. With kv_unified the cells that no sequence uses are free; other
 * sequences give up none.
 *
 * `ahead` is the text still to come, including the next batch, or the end of that text: a prompt's question is there. Its
 * last `window` tokens are decoded ahead of time, and their queries vote in place of those of the newest tokens. May be
 * NULL with `n_ahead` 0, as while an answer is written. Read during the call only. `report` may be NULL; its `size` must
 * be set.
 * Errors: GVOTE_ERROR_NO_CELLS if so many cannot be freed (sinks, recent and protected tokens always stay; the policy is
 * GVOTE_POLICY_FULL; the cells for the vote itself are in use); GVOTE_ERROR_SHARED if the sequence shares cells;
 * GVOTE_ERROR_DECODE if `ahead` contains an invalid token; GVOTE_ERROR_SIZE; the others as gvote_compress() except
 * GVOTE_ERROR_COMPRESSED: it may be called any number of times. An unknown or changed sequence is noticed only when cells
 * have to be freed. */
GVOTE_API gvote_status gvote_make_room(
        gvote_t              * g,
        struct llama_context * ctx,
        int32_t                seq,
        uint32_t               needed,
        const int32_t        * ahead,
        size_t                 n_ahead,
        gvote_report         * report);

/* Brings back what votes took out of the cache of a sequence. Call it before a new question is decoded. All of it returns
 * if `needed` cells (the tokens to be decoded next) and those of a later vote stay free; else the newest rows of each
 * head return. Every key and value is bit for bit what it was, unless GVOTE_RECALL_TYPE_Q8_0 has rounded it. Writes the
 * resulting number of cells to `n_cells` (may be NULL). Does nothing with GVOTE_RECALL_OFF, or if nothing is set aside.
 * Errors: GVOTE_ERROR_SHARED if cells are shared with another sequence, GVOTE_ERROR_MEMORY, GVOTE_ERROR_FILE, and as
 * gvote_seq_cells(). */
GVOTE_API gvote_status gvote_expand(
        gvote_t * g, struct llama_context * ctx, int32_t seq, uint32_t needed, uint32_t * n_cells);

/* ---- sequences ----------------------------------------------------------------------------------------------------------- */

/* The number of cells of a sequence (of the attention cache, if a window cache exists beside it).
 * Errors: GVOTE_ERROR_NOT_ATTACHED, GVOTE_ERROR_NO_SEQUENCE, GVOTE_ERROR_NOT_SEEN, GVOTE_ERROR_CHANGED. */
GVOTE_API gvote_status gvote_seq_cells(gvote_t * g, struct llama_context * ctx, int32_t seq, uint32_t * n_cells);

/* The first position at which gvote_seq_truncate() can cut the sequence: from there on every cell holds one token, the
 * same in all heads, and a sliding window, if there is one, misses nothing. Without a window it is 0 for a sequence that
 * was never compressed, or whose dropped rows are all set aside. Errors as gvote_seq_cells(). */
GVOTE_API gvote_status gvote_seq_exact_from(gvote_t * g, struct llama_context * ctx, int32_t seq, int32_t * pos);

/* The positions of the tokens whose key and value one KV head of one layer holds: one for each cell, ascending. Writes at
 * most `n_max` of them to `positions` (may be NULL if `n_max` is 0) and their total number to `n` (may be NULL).
 * Errors as gvote_seq_cells(); GVOTE_ERROR_NO_SEQUENCE also for a layer or head that does not exist or uses a sliding
 * window. */
GVOTE_API gvote_status gvote_seq_positions(
        gvote_t              * g,
        struct llama_context * ctx,
        int32_t                seq,
        int32_t                layer,
        uint32_t               head,
        int32_t              * positions,
        uint32_t               n_max,
        uint32_t             * n);

/* Protects the tokens at positions `p0` to `p1 - 1`, such as a system message: every head keeps them at every later vote,
 * beside sinks and recent tokens. `stays` false removes the protection. A negative `p0` is 0, a negative `p1` the end of
 * the sequence; if p0 >= p1 nothing happens. Call it after the tokens were decoded and before a vote that could drop
 * them: what a head has lost before returns only with gvote_expand().
 *
 * Positions that are removed or decoded anew lose their protection. gvote_state_get() saves it. Protected tokens need
 * cells: a vote whose `max_cells` has no room for them returns GVOTE_ERROR_PARAMS. Errors as gvote_seq_cells();
 * GVOTE_ERROR_NOT_SEEN also if the sequence ends before `p1`. */
GVOTE_API gvote_status gvote_seq_protect(
        gvote_t * g, struct llama_context * ctx, int32_t seq, int32_t p0, int32_t p1, bool stays);

/* Removes the tokens at `pos` and later, as llama_memory_seq_rm(mem, seq, pos, -1) does, if that leaves no head with
 * fewer tokens than the others: at gvote_seq_exact_from() or later, or at 0 (all of it). Inside the compressed part the
 * newest keys and values before `pos` return to the cells that the sequence has; gvote_expand() brings back the others.
 * Errors: GVOTE_ERROR_COMPRESSED, GVOTE_ERROR_MEMORY, and as gvote_seq_cells(). */
GVOTE_API gvote_status gvote_seq_truncate(gvote_t * g, struct llama_context * ctx, int32_t seq, int32_t pos);

/* ---- saved sequences ----------------------------------------------------------------------------------------------------- */

/* The number of bytes that gvote_state_get() would write for a sequence now. Errors as gvote_seq_cells(). */
GVOTE_API gvote_status gvote_state_size(gvote_t * g, struct llama_context * ctx, int32_t seq, size_t * size);

/* Writes the state of a sequence, and the rows set aside for it, to a buffer of `size` bytes, and the number of bytes to
 * `written` (may be NULL). Save it beside llama_state_seq_get_data(). Errors: GVOTE_ERROR_SIZE if the buffer is too
 * small, and as gvote_seq_cells(). */
GVOTE_API gvote_status gvote_state_get(
        gvote_t * g, struct llama_context * ctx, int32_t seq, void * data, size_t size, size_t * written);

/* Restores what gvote_state_get() wrote, after llama_state_seq_set_data() has loaded the sequence that it belongs to; the
 * sequence may have another id. The bytes are checked, and refused if anything is wrong, or if they contain rows set
 * aside and the handle has GVOTE_RECALL_OFF.
 * Errors: GVOTE_ERROR_STATE; GVOTE_ERROR_SIZE if no buffer can have so many bytes; GVOTE_ERROR_NOT_ATTACHED;
 * GVOTE_ERROR_NO_SEQUENCE. */
GVOTE_API gvote_status gvote_state_set(
        gvote_t * g, struct llama_context * ctx, int32_t seq, const void * data, size_t size);

#ifdef __cplusplus
}
#endif

#endif /* GVOTE_H */
