/*
 * gvote: an adaptive KV cache for llama.cpp.
 *
 * An app that uses llama.cpp goes on loading models, building batches and sampling as it does. It adds a handle, lets it listen
 * to a context, and asks it to compress a sequence after a prompt:
 *
 *     gvote_params p = gvote_params_default();
 *     gvote_t * g = gvote_new(&p, NULL);
 *     struct llama_context * ctx = llama_init_from_model(model, cparams);
 *     gvote_attach(g, ctx);
 *     ...                                             // llama_decode(ctx, prompt) as always
 *     gvote_report r = { .size = sizeof r };
 *     if (gvote_compress(g, ctx, 0, &r) != GVOTE_OK) {
 *         puts(gvote_last_error(g));
 *     }
 *     ...                                             // llama_decode goes on at the next position, as always
 *     llama_free(ctx);
 *     gvote_free(g);
 *
 * Conventions, for every function unless it says otherwise:
 *
 *   Errors     A function that can fail returns a gvote_status. GVOTE_OK is 0. After any other status the context, its cache,
 *              its outputs and the handle are as they were before the call, and gvote_last_error() tells more. No C++ exception
 *              and no panic crosses this interface. A NULL where none is allowed is GVOTE_ERROR_NULL, what is no handle
 *              GVOTE_ERROR_HANDLE, and every call may answer GVOTE_ERROR_INTERNAL; the functions below name the rest.
 *   Threads    Different handles are independent. One handle, and the context it is attached to, is used by one thread at a
 *              time; a second call meanwhile answers GVOTE_ERROR_BUSY and does nothing. gvote_cancel() and
 *              gvote_cancel_clear() alone may be called at any time from any thread.
 *   Ownership  The app owns its models, contexts and buffers; gvote keeps a pointer to the context that it is attached to,
 *              and uses it in calls that name it only. Strings that gvote returns belong to gvote.
 *   Units      A cell is a slot of the cache; a position is a token's logical place in its sequence (llama_pos). Numbers of
 *              bytes are bytes, times are seconds, KL divergences are nats a token.
 *   Outputs    What llama_get_logits_ith() and llama_get_embeddings_ith() answer for the last batch, and the pointers they
 *              gave before, are the same after a call as before it. So are the eval and abort callbacks of the context, its
 *              counters (llama_perf_context()) and its samplers.
 *   Growth     gvote_params and gvote_report begin with their size. A caller that was compiled against an older header, with
 *              a smaller struct, goes on working; a size that this library does not know is GVOTE_ERROR_SIZE. Enumerations
 *              may get more values.
 *
 * A vote takes time that only a long answer earns back. Called before each llama_decode() of an answer, in place of
 * gvote_compress() before it, gvote_vote_if_due() votes once that pays.
 *
 * A vote is a bet on what will be asked. So what it takes out of the cache is set aside in memory or in a file, as many bytes
 * as the freed cells held, and gvote_expand() brings it back before the next question is decoded:
 *
 *     gvote_expand(g, ctx, 0, n_tokens, NULL);        // n_tokens: of the question
 *     ...                                             // llama_decode(ctx, question)
 *     gvote_compress(g, ctx, 0, NULL);
 *
 * A vote needs free cells in the stream of the sequence: as many as the largest of samples, draft and window, and some 300
 * with GVOTE_FLAG_REPLAY. It works in the context's own buffers; no copy of the cache is made.
 *
 * Not everything can be compressed: decoder-only models with an attention cache can (with sliding-window layers beside it, of
 * which the others are compressed); recurrent, hybrid, encoder and MLA models, ALiBi, learned attention sinks, and contexts
 * that share their cache with another one are GVOTE_ERROR_UNSUPPORTED, with the reason.
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

/* A handle: settings, and what is known of the sequences of one context. Opaque. */
typedef struct gvote_handle gvote_t;

/* What came of a call. gvote_status_string() has a few words for each. */
typedef enum gvote_status {
    GVOTE_OK                    = 0,
    GVOTE_ERROR_NULL            = 1,  /* an argument is NULL that may not be */
    GVOTE_ERROR_HANDLE          = 2,  /* the handle is none: not from gvote_new(), or freed */
    GVOTE_ERROR_SIZE            = 3,  /* the size in a struct is none that this library knows, or a buffer is too small */
    GVOTE_ERROR_PARAMS          = 4,  /* a setting is out of bounds, or cannot change any more */
    GVOTE_ERROR_VERSION         = 5,  /* the llama.cpp that was met is not the one gvote was built for */
    GVOTE_ERROR_UNSUPPORTED     = 6,  /* this model or context cannot be compressed */
    GVOTE_ERROR_NOT_ATTACHED    = 7,  /* gvote_attach() was not called for this context */
    GVOTE_ERROR_NO_SEQUENCE     = 8,  /* no such sequence, layer or head */
    GVOTE_ERROR_NOT_SEEN        = 9,  /* the sequence is empty, or was not decoded while gvote was attached */
    GVOTE_ERROR_CHANGED         = 10, /* its cells were moved, removed or replaced without gvote */
    GVOTE_ERROR_SHARED          = 11, /* its cells are shared with another sequence: compress before llama_memory_seq_cp() */
    GVOTE_ERROR_COMPRESSED      = 12, /* the position, or what GVOTE_FLAG_REPLAY would read, lies inside the compressed part */
    GVOTE_ERROR_NO_CELLS        = 13, /* a vote needs more free cells than there are, or they cannot be freed */
    GVOTE_ERROR_MEMORY          = 14, /* out of memory */
    GVOTE_ERROR_CANCELLED       = 15, /* gvote_cancel(), the progress callback or the context's abort callback said so */
    GVOTE_ERROR_DECODE          = 16, /* llama.cpp could not compute what the vote asked for */
    GVOTE_ERROR_STATE           = 17, /* the saved bytes are cut off, damaged, or not those of this sequence */
    GVOTE_ERROR_BUSY            = 18, /* another call with this handle is running */
    GVOTE_ERROR_INTERNAL        = 19, /* a fault of gvote: please report it */
    GVOTE_ERROR_FILE            = 20, /* `recall_file` cannot be made, or its disk has no room for what leaves the cache */
    GVOTE_STATUS_FORCE_32_BITS  = 0x7fffffff
} gvote_status;

/* Who chooses what stays. Only the first two have a rule for how much; the others keep the share `ratio`. */
typedef enum gvote_policy {
    GVOTE_POLICY_GVOTE              = 0, /* real and synthetic queries, as many cells as a trial asks for */
    GVOTE_POLICY_GVOTE_PAPER        = 1, /* the votes and the budget of arXiv 2509.03136 */
    GVOTE_POLICY_FULL               = 2, /* everything */
    GVOTE_POLICY_STREAMING_LLM      = 3, /* first and last tokens (arXiv 2309.17453) */
    GVOTE_POLICY_SNAPKV             = 4, /* what the last queries looked at (arXiv 2404.14469) */
    GVOTE_POLICY_ADAKV              = 5, /* the same, heads share a layer's budget (arXiv 2407.11550) */
    GVOTE_POLICY_EXPECTED_ATTENTION = 6, /* Gaussian future queries (arXiv 2510.00636) */
    GVOTE_POLICY_KEYDIFF            = 7, /* keys unlike the others (arXiv 2504.15364) */
    GVOTE_POLICY_FORCE_32_BITS      = 0x7fffffff
} gvote_policy;

/* What one cell holds afterwards. */
typedef enum gvote_evict {
    GVOTE_EVICT_COMPOSITE     = 0, /* for every layer and KV head a token of that head's own choice */
    GVOTE_EVICT_CELLS         = 1, /* one token for all of them */
    GVOTE_EVICT_FORCE_32_BITS = 0x7fffffff
} gvote_evict;

/* What becomes of keys and values that a vote takes out of the cache. */
typedef enum gvote_recall {
    GVOTE_RECALL_AUTO          = 0, /* they are set aside in the memory of the process, and can come back: gvote_expand() */
    GVOTE_RECALL_OFF           = 1, /* they are lost */
    GVOTE_RECALL_FILE          = 2, /* as GVOTE_RECALL_AUTO, but in a file on disk: `recall_file` */
    GVOTE_RECALL_FORCE_32_BITS = 0x7fffffff
} gvote_recall;

/* How it is set aside. */
typedef enum gvote_recall_type {
    GVOTE_RECALL_TYPE_CACHE         = 0, /* as the cache has it: it comes back bit by bit */
    GVOTE_RECALL_TYPE_Q8_0          = 1, /* f32, f16 and bf16 as q8_0: half the bytes of f16, and it comes back rounded */
    GVOTE_RECALL_TYPE_FORCE_32_BITS = 0x7fffffff
} gvote_recall_type;

/* When gvote_vote_if_due() votes on an answer. */
typedef enum gvote_when {
    GVOTE_WHEN_AUTO          = 0, /* once the time that fewer cells would have saved so far has reached what a vote will take */
    GVOTE_WHEN_AFTER         = 1, /* after `vote_after` tokens of it */
    GVOTE_WHEN_NEVER         = 2, /* gvote_compress() alone votes, as after the prompt */
    GVOTE_WHEN_FORCE_32_BITS = 0x7fffffff
} gvote_when;

/* The rule that set the number of cells. */
typedef enum gvote_bound {
    GVOTE_BOUND_ALL           = 0, /* nothing could be dropped, or the sequence is too short to be worth it */
    GVOTE_BOUND_TRIAL         = 1, /* the fewest cells that came close enough to the full cache in a trial */
    GVOTE_BOUND_LOST_MASS     = 2, /* the fewest that give up no more attention mass than allowed */
    GVOTE_BOUND_BLIND         = 3, /* everything stays: a chat turn is still open, so the question is not known yet */
    GVOTE_BOUND_BUDGET        = 4, /* the paper's budget */
    GVOTE_BOUND_RATIO         = 5, /* `ratio` */
    GVOTE_BOUND_MAX_CELLS     = 6, /* `max_cells` */
    GVOTE_BOUND_MIN_CELLS     = 7, /* `min_cells` */
    GVOTE_BOUND_FORCED        = 8, /* sinks and recent tokens alone are more than the rule asked for */
    GVOTE_BOUND_FORCE_32_BITS = 0x7fffffff
} gvote_bound;

/* The steps of a vote, in order; not every vote has all of them, and the steps of a trial come several times. */
typedef enum gvote_stage {
    GVOTE_STAGE_REPLAY        = 0, /* parts of the context are read again */
    GVOTE_STAGE_PROBE         = 1, /* synthetic queries are made */
    GVOTE_STAGE_SCORE         = 2, /* keys are scored */
    GVOTE_STAGE_DRAFT         = 3, /* the full cache drafts a continuation */
    GVOTE_STAGE_TRY           = 4, /* a number of cells is tried */
    GVOTE_STAGE_COMPACT       = 5, /* rows are moved and cells freed */
    GVOTE_STAGE_FORCE_32_BITS = 0x7fffffff
} gvote_stage;

typedef enum gvote_log_level {
    GVOTE_LOG_INFO          = 0, /* what a vote did */
    GVOTE_LOG_WARN          = 1, /* what will make later calls fail */
    GVOTE_LOG_FORCE_32_BITS = 0x7fffffff
} gvote_log_level;

/* Flags of gvote_params. */
enum {
    GVOTE_FLAG_REPLAY        = 1, /* policy gvote: read the context twice, for questions that are not known yet */
    GVOTE_FLAG_ACCOUNT_ERROR = 2, /* account for the rounding of a quantized K cache */
    GVOTE_FLAG_PROTECT       = 4  /* keep the chat template's markers (control tokens); see also gvote_seq_protect() */
};

/* Settings. Fill it with gvote_params_default(), then change what should differ; do not zero it. */
typedef struct gvote_params {
    size_t   size;         /* of this struct, as the caller knows it */
    uint32_t policy;       /* gvote_policy */
    uint32_t evict;        /* gvote_evict */
    uint32_t flags;        /* GVOTE_FLAG_... */
    float    target_kl;    /* policy gvote: mean KL of a continuation to the full cache, nats a token, up to 10; 0.005 is safe,
                              0.02 the default, 0.1 bold; 0: no trial, `lost_mass` decides */
    float    lost_mass;    /* policy gvote: largest share of attention mass given up where no trial is made; above 0, below 1 */
    float    ratio;        /* share of the cells to keep, above 0 up to 1, instead of the policy's own rule; 0: its own rule */
    uint32_t max_cells;    /* cap on the cells of the sequence; 0: none */
    uint32_t min_cells;    /* cells that stay at least */
    uint32_t sinks;        /* first tokens that always stay */
    uint32_t recent;       /* last tokens that always stay; at least `window` */
    uint32_t window;       /* last real queries that vote; 1 to 1024 */
    uint32_t samples;      /* synthetic queries; 1 to 256 */
    uint32_t draft;        /* policy gvote: most tokens of the trial's continuation; 1 to 256 */
    uint32_t span_back;    /* policy gvote: tokens before a hit that stay with it; up to 1024 */
    uint32_t span_forward; /* policy gvote: tokens after a hit that stay with it; up to 1024 */
    uint32_t pool;         /* policy gvote: positions that observed attention is averaged over; odd, up to 63 */
    float    head_mix;     /* policy gvote: weight of all heads' mean beside each head's own score; 0 to 1000 */
    float    p_nuc;        /* policy gvote_paper: share of attention that sets the budget; above 0 up to 1 */
    uint64_t seed;         /* of the synthetic queries: with each number a vote chooses the same again */
    uint32_t recall;       /* gvote_recall; fixed while the handle is attached */
    uint32_t recall_type;  /* gvote_recall_type; fixed while the handle is attached. GVOTE_RECALL_TYPE_Q8_0 needs heads of a
                              multiple of 32 numbers, or gvote_attach() is GVOTE_ERROR_PARAMS */
    const char * recall_file; /* GVOTE_RECALL_FILE: its path, UTF-8; else not looked at. Nothing may be there yet, or an empty
                                 file. It loses its name as soon as it is open, and its space is free again when the handle is
                                 freed or the process ends. Calls that take it copy it; what gvote_get_params() gives lives
                                 until the settings change or the handle is freed */
    uint32_t when;         /* gvote_when; of answers that begin later */
    uint32_t vote_after;   /* GVOTE_WHEN_AFTER: tokens of an answer before it is voted on */
} gvote_params;

/* One attempt of a trial. */
typedef struct gvote_try {
    uint32_t cells; /* that were visible */
    float    kl;    /* mean KL to the full cache beyond that of rounding, nats a token; a lower bound where it is too much */
} gvote_try;

/* Attempts that a report has room for. */
#define GVOTE_MAX_TRIED 8

/* What a vote did, or would do. Set `size`; the call fills the rest. */
typedef struct gvote_report {
    size_t    size;            /* of this struct, as the caller knows it */
    uint32_t  policy;          /* gvote_policy */
    uint32_t  bound;           /* gvote_bound */
    uint32_t  cells_before;    /* cells of the sequence */
    uint32_t  cells_after;
    uint64_t  kv_bytes_before; /* bytes of K and V in those cells */
    uint64_t  kv_bytes_after;
    float     lost_mass;       /* share of attention mass given up, 0 to 1, by the policy's estimate; NaN: not estimated */
    float     rounding;        /* mean KL that rounding alone causes in the trial, nats a token */
    uint32_t  n_tried;         /* attempts of the trial, 0 without one */
    gvote_try tried[GVOTE_MAX_TRIED]; /* in order */
    uint32_t  rows_back;       /* of each head, that came back before the vote from those that were set aside */
    uint64_t  compute_bytes;   /* of buffers that scoring held, and gave back */
    double    replay_s;        /* seconds of each step */
    double    probe_s;
    double    score_s;
    double    select_s;
    double    trial_s;
    double    compact_s;
    double    aside_s;         /* of setting aside what left the cache */
    uint64_t  bytes_aside;     /* that the sequence has set aside now, in the memory of the process or in `recall_file` */
    double    recall_s;        /* of rows that came back, and of choosing among them where they had no room at once */
} gvote_report;

/* None of the callbacks below may throw an exception, or leave by longjmp(): they are called from inside gvote. */

/* An eval callback, as in llama_context_params.cb_eval (ggml_backend_sched_eval_callback). */
typedef bool (*gvote_eval_callback)(struct ggml_tensor * t, bool ask, void * user_data);

/* Told of a step that begins; called from inside gvote_compress(), gvote_plan(), gvote_vote_if_due() and gvote_make_room().
 * Returning false cancels. It must not call gvote with the same handle, gvote_cancel() aside. */
typedef bool (*gvote_progress_callback)(gvote_stage stage, void * user_data);

/* Gets lines of text without a newline; `text` lives for the call. */
typedef void (*gvote_log_callback)(gvote_log_level level, const char * text, void * user_data);

/* ---- versions ------------------------------------------------------------------------------------------------------------ */

/* The version of this library, such as "0.1.0". Never NULL; static. Any thread. */
GVOTE_API const char * gvote_version(void);

/* The version of llama.cpp that this library was built for: major, minor and patch. Never NULL; static. Any thread. */
GVOTE_API const char * gvote_llama_version(void);

/* A few words for a status. Never NULL, also for a number that is no status; static. Any thread. */
GVOTE_API const char * gvote_status_string(gvote_status status);

/* ---- settings ------------------------------------------------------------------------------------------------------------ */

/* Fills `params` with the defaults of the policy gvote, as far as its `size` says it reaches.
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

/* Makes a handle. `params` may be NULL: the defaults. The caller frees it with gvote_free().
 * Returns NULL on failure; `status` (may be NULL) says why, and so does gvote_last_error(NULL).
 * Errors: GVOTE_ERROR_SIZE, GVOTE_ERROR_PARAMS, GVOTE_ERROR_MEMORY; with GVOTE_RECALL_FILE, GVOTE_ERROR_NULL without a
 * `recall_file` and GVOTE_ERROR_FILE where it cannot be made; GVOTE_ERROR_VERSION where the llama.cpp in the process has
 * another version than gvote was built for. */
GVOTE_API gvote_t * gvote_new(const gvote_params * params, gvote_status * status);

/* Frees a handle; NULL is fine. It does not touch a context: free the context before, or gvote_detach() from it. Not while
 * another call with the handle runs: nothing is freed then. */
GVOTE_API void gvote_free(gvote_t * g);

/* What went wrong last with this handle, or "" after a success. Lives until the next call with the handle. With NULL: the last
 * failure of gvote_new(), or of a call with a NULL or wrong handle, in this thread. Never NULL. */
GVOTE_API const char * gvote_last_error(const gvote_t * g);

/* Changes the settings of later votes. `window`, `sinks` and those that begin with `recall` are fixed while the handle is
 * attached; the `recall_file` that the handle has already is not made again. `params` may be NULL: the defaults. Errors:
 * GVOTE_ERROR_SIZE, GVOTE_ERROR_PARAMS, and those of gvote_new() for `recall_file`. */
GVOTE_API gvote_status gvote_set_params(gvote_t * g, const gvote_params * params);

/* The settings in force, as far as the `size` that the caller sets in `params` reaches. Errors: GVOTE_ERROR_SIZE. */
GVOTE_API gvote_status gvote_get_params(gvote_t * g, gvote_params * params);

/* Who gets a line about each vote, and warnings, in the thread that votes or decodes. NULL: nobody, as in the beginning.
 * `user_data` is passed on, and belongs to the app. */
GVOTE_API gvote_status gvote_set_log_callback(gvote_t * g, gvote_log_callback callback, void * user_data);

/* Who is told of the steps of a vote, in the thread that votes. NULL: nobody, as in the beginning. `user_data` is passed on, and
 * belongs to the app. */
GVOTE_API gvote_status gvote_set_progress_callback(gvote_t * g, gvote_progress_callback callback, void * user_data);

/* Stops a running vote, and every later one until gvote_cancel_clear(): they answer GVOTE_ERROR_CANCELLED. What was decoded by
 * the app is not touched. Any thread, any time while the handle lives. */
GVOTE_API gvote_status gvote_cancel(gvote_t * g);

/* Lets votes run again. Any thread, any time while the handle lives. */
GVOTE_API gvote_status gvote_cancel_clear(gvote_t * g);

/* ---- listening ----------------------------------------------------------------------------------------------------------- */

/* Listens to a living context from now on, to all its sequences. Call it after llama_init_from_model() and before the prompt;
 * what was decoded before is not known. While answers are written, a token of each sequence at a time, and nobody else has a
 * callback in the context, gvote's gets out of the way at the end of a step and comes back with the next graph that llama.cpp
 * builds, for a prompt at the latest; the tokens meanwhile are taken from the cells. An eval callback that the context has
 * already is called beside gvote's, which stays then. Attaching to the same context again changes nothing but that the callback
 * is back at once; attaching to another one forgets the first, which is not touched and may be freed already.
 * Before anything is changed, the structures of the context are compared with those that gvote was built for.
 * Errors: GVOTE_ERROR_UNSUPPORTED, GVOTE_ERROR_VERSION, GVOTE_ERROR_MEMORY. */
GVOTE_API gvote_status gvote_attach(gvote_t * g, struct llama_context * ctx);

/* Stops listening, forgets the sequences, and gives the context back the eval callback that it had. Call it before
 * llama_free() where the handle lives on, and before gvote_free() where the context does.
 * Errors: GVOTE_ERROR_NOT_ATTACHED. */
GVOTE_API gvote_status gvote_detach(gvote_t * g, struct llama_context * ctx);

/* The eval callback that gvote_attach() installs, with the handle as `user_data`. An app may put it into
 * llama_context_params.cb_eval itself, or call it from a callback of its own, returning true if either returns true (`ask`) or
 * if both do; nodes are ignored until gvote_attach() has named the context. Called by ggml, in the thread that decodes. */
GVOTE_API bool gvote_cb_eval(struct ggml_tensor * t, bool ask, void * user_data);

/* Calls another eval callback beside gvote's, for every node that it asks for, in the thread that decodes. NULL: none.
 * `user_data` is passed on, and belongs to the app. A callback that gvote_attach() finds in the context is set like this by
 * itself. Where gvote's is out of the way, because the context writes an answer already, the other one is called from the next
 * prompt on, or at once after gvote_attach() to the same context. */
GVOTE_API gvote_status gvote_set_next_callback(gvote_t * g, gvote_eval_callback callback, void * user_data);

/* ---- votes --------------------------------------------------------------------------------------------------------------- */

/* Finds out which cells the sequence `seq` needs, keeps those and frees the others. Call it between two calls of
 * llama_decode(). Decoding goes on at the next position as if nothing had happened. It can be called again later on, for what
 * was decoded meanwhile: the choice is then made among all that was ever read. What earlier calls set aside comes back first, all
 * at once where there are cells for it, else a quarter of the cells that the sequence can have at a time, with a vote for each.
 * A call can therefore leave more cells than it found. `report` may be NULL; its `size` must be set.
 * Errors: GVOTE_ERROR_SIZE, and from GVOTE_ERROR_UNSUPPORTED on all but GVOTE_ERROR_STATE; GVOTE_ERROR_COMPRESSED where
 * GVOTE_FLAG_REPLAY is set and the sequence was compressed before. */
GVOTE_API gvote_status gvote_compress(gvote_t * g, struct llama_context * ctx, int32_t seq, gvote_report * report);

/* The same, but changes nothing: `report` says what gvote_compress() would do with the cells that the sequence has now, as if
 * nothing came back. Costs as much. `report` may be NULL.
 * Errors as gvote_compress(). */
GVOTE_API gvote_status gvote_plan(gvote_t * g, struct llama_context * ctx, int32_t seq, gvote_report * report);

/* Votes on an answer once it is time to, as the setting `when` says. Call it before every llama_decode() of the answer, in
 * place of gvote_compress() before the first. Until it votes, every token is the full cache's own; with GVOTE_WHEN_AUTO the
 * first 32 tokens always are, and an answer that ends early has paid nothing. `start` is the position of the answer's first
 * token: the tokens from there on vote and have shown how long the answer is; all of them stay, and so do the `recent` tokens
 * before it, where the question is. A negative `start` is 0.
 *
 * A call before the vote is due takes about a microsecond: it looks at counters of the context and waits for no device. The
 * time of a step is what llama_perf_context() counts, or with `no_perf` the time from call to call; what the app does between
 * two steps counts then only as far as it does it at every step. Each sequence of a batch has its own calls and its own vote.
 *
 * There is at most one vote on an answer, whether it dropped anything or not, and none after gvote_compress() has voted on it.
 * The next answer has another `start`. An answer that is written again from its start, or cut, is another one as well. What
 * earlier votes set aside stays aside, unlike with gvote_compress(), which is still the call where cells are needed at once.
 *
 * `has_voted` (may be NULL) says whether there was a vote; `report` (may be NULL; its `size` must be set) is written only where
 * there was. A vote that fails says so once: the cache is as it was, the answer goes on, and later calls do not try again.
 * Errors: GVOTE_ERROR_NOT_SEEN where the sequence is empty or ends before `start`; GVOTE_ERROR_SIZE; of a vote that is due,
 * those of gvote_compress(). */
GVOTE_API gvote_status gvote_vote_if_due(
        gvote_t              * g,
        struct llama_context * ctx,
        int32_t                seq,
        int32_t                start,
        bool                 * has_voted,
        gvote_report         * report);

/* Makes room for a text longer than the cache. Call it before every llama_decode(): it sees to it that `needed` cells (the
 * tokens of the next batch) are free in the stream of the sequence `seq`, and beside them those that a later vote needs. Where
 * they are, nothing happens, and the report has cells_after == cells_before. Where they are not, the policy ranks the cells of
 * the sequence and the last ones are freed: until `needed` of those that the sequence can have are free, and a quarter of them
 * at least, so that not every batch costs a vote. The sequence can have its own cells and the free ones; with kv_unified those
 * that no sequence uses are free, and no other sequence gives any. How many cells an answer needs plays no part: there is no
 * trial.
 *
 * `ahead` is the text that is still to come, the next batch included, or its end: a prompt's question stands there. Its last
 * `window` tokens are read as if they came now, and their queries vote in place of those of the newest tokens. It may be NULL
 * where `n_ahead` is 0: while an answer is written nothing is known of what comes. Read during the call only. `report` may be
 * NULL; its `size` must be set.
 * Errors: GVOTE_ERROR_NO_CELLS where so many cannot be freed because sinks, recent and protected tokens always stay, where the policy is
 * GVOTE_POLICY_FULL, or where the cells for the vote itself are in use already; GVOTE_ERROR_SHARED where the sequence shares
 * cells; GVOTE_ERROR_DECODE where `ahead` has what is no token; GVOTE_ERROR_SIZE; the others as gvote_compress(), but for
 * GVOTE_ERROR_COMPRESSED: it may be called again and again. A sequence that nothing is known of, or that was changed, is
 * noticed when cells have to be freed. */
GVOTE_API gvote_status gvote_make_room(
        gvote_t              * g,
        struct llama_context * ctx,
        int32_t                seq,
        uint32_t               needed,
        const int32_t        * ahead,
        size_t                 n_ahead,
        gvote_report         * report);

/* Brings back what votes took out of the cache of a sequence: all of it where `needed` cells (those of the tokens that are
 * decoded next) stay free beside it, and those that a later vote needs; else the newest of each head. Every key and value is,
 * bit by bit, what it was, unless GVOTE_RECALL_TYPE_Q8_0 has rounded it. Call it before a new question is decoded, which then
 * sees everything. The cells that the sequence has afterwards are written to `n_cells` (may be NULL). With GVOTE_RECALL_OFF,
 * and where nothing is set aside, nothing happens.
 * Errors: GVOTE_ERROR_SHARED where cells are shared with another sequence, GVOTE_ERROR_MEMORY, GVOTE_ERROR_FILE, and as
 * gvote_seq_cells(). */
GVOTE_API gvote_status gvote_expand(
        gvote_t * g, struct llama_context * ctx, int32_t seq, uint32_t needed, uint32_t * n_cells);

/* ---- sequences ----------------------------------------------------------------------------------------------------------- */

/* Cells of a sequence (in the attention cache, where a window cache lives beside it).
 * Errors: GVOTE_ERROR_NOT_ATTACHED, GVOTE_ERROR_NO_SEQUENCE, GVOTE_ERROR_NOT_SEEN, GVOTE_ERROR_CHANGED. */
GVOTE_API gvote_status gvote_seq_cells(gvote_t * g, struct llama_context * ctx, int32_t seq, uint32_t * n_cells);

/* The first position from which on every cell holds one token, the same in all heads, and a sliding window, if there is one,
 * would miss nothing: from there on gvote_seq_truncate() can cut the sequence. Without a window it is 0 for a sequence that was
 * never compressed, or of which everything that left the cache is set aside. Errors as gvote_seq_cells(). */
GVOTE_API gvote_status gvote_seq_exact_from(gvote_t * g, struct llama_context * ctx, int32_t seq, int32_t * pos);

/* The positions of the tokens whose key and value one KV head of one layer of the model holds, ascending: one for each cell,
 * in the order of cells. Writes at most `n_max` of them to `positions` (may be NULL if `n_max` is 0) and their full number to
 * `n` (may be NULL). Errors as gvote_seq_cells(); GVOTE_ERROR_NO_SEQUENCE also for a layer or head that there is not, or that
 * uses a sliding window. */
GVOTE_API gvote_status gvote_seq_positions(
        gvote_t              * g,
        struct llama_context * ctx,
        int32_t                seq,
        int32_t                layer,
        uint32_t               head,
        int32_t              * positions,
        uint32_t               n_max,
        uint32_t             * n);

/* Protects the tokens at the positions from `p0` to `p1 - 1`, such as a system message: every head keeps them, at every later
 * vote, whatever is freed, beside sinks and recent tokens. A negative `p0` is 0, a negative `p1` the end of the sequence; where
 * p0 >= p1 nothing happens. `stays` false: they are protected no longer. Call it after they were decoded, and before the vote
 * that could drop them: what a head has lost before comes back with gvote_expand() alone.
 * Positions that are removed or decoded anew are protected no longer; gvote_state_get() saves which ones are. They need cells:
 * a vote with a `max_cells` that has no room for them answers GVOTE_ERROR_PARAMS. Errors as gvote_seq_cells();
 * GVOTE_ERROR_NOT_SEEN also where the sequence ends before `p1`. */
GVOTE_API gvote_status gvote_seq_protect(
        gvote_t * g, struct llama_context * ctx, int32_t seq, int32_t p0, int32_t p1, bool stays);

/* Removes the tokens at `pos` and later from a sequence, as llama_memory_seq_rm(mem, seq, pos, -1) does, where that leaves no
 * head with less than the others: at gvote_seq_exact_from() or later, or at 0 (all of it). Inside what was compressed, the newest
 * keys and values before `pos` come back to the cells that the sequence has; gvote_expand() brings the others.
 * Errors: GVOTE_ERROR_COMPRESSED, GVOTE_ERROR_MEMORY, and as gvote_seq_cells(). */
GVOTE_API gvote_status gvote_seq_truncate(gvote_t * g, struct llama_context * ctx, int32_t seq, int32_t pos);

/* ---- saved sequences ----------------------------------------------------------------------------------------------------- */

/* Bytes that gvote_state_get() writes for a sequence now. Errors as gvote_seq_cells(). */
GVOTE_API gvote_status gvote_state_size(gvote_t * g, struct llama_context * ctx, int32_t seq, size_t * size);

/* Writes what is known of a sequence, and what is set aside of it, to a buffer of `size` bytes, and their number to `written`
 * (may be NULL). Save it beside llama_state_seq_get_data(). Errors: GVOTE_ERROR_SIZE where the buffer is too small, and as
 * gvote_seq_cells(). */
GVOTE_API gvote_status gvote_state_get(
        gvote_t * g, struct llama_context * ctx, int32_t seq, void * data, size_t size, size_t * written);

/* Takes over what gvote_state_get() wrote, after llama_state_seq_set_data() has loaded the sequence that it belongs to; the id
 * of the sequence may be another one. The bytes are checked; what is wrong is refused, and so are bytes that hold what was set
 * aside where the handle has GVOTE_RECALL_OFF.
 * Errors: GVOTE_ERROR_STATE, GVOTE_ERROR_SIZE where no buffer has so many bytes, GVOTE_ERROR_NOT_ATTACHED,
 * GVOTE_ERROR_NO_SEQUENCE. */
GVOTE_API gvote_status gvote_state_set(
        gvote_t * g, struct llama_context * ctx, int32_t seq, const void * data, size_t size);

#ifdef __cplusplus
}
#endif

#endif /* GVOTE_H */
