/* Contexts in threads of their own, with a handle each, and a handle that two threads use: threads MODEL TEXT. */

#include "gvote.h"

#include "app.h"

#include <pthread.h>
#include <stdatomic.h>

enum { N = 120, N_CONTEXTS = 2, N_TURNS = 3 };

struct work {
    const struct llama_model * model;
    const llama_token        * tokens;
    int32_t                    kept[N_TURNS];
};

static struct llama_context * new_context(const struct llama_model * model) {
    struct llama_context_params params = context_params();
    /* threads that wait for one another's core are slow; promises.c has contexts with more of them */
    params.n_threads = params.n_threads_batch = 1;
    struct llama_context * ctx = llama_init_from_model((struct llama_model *) model, params);
    REQUIRE(ctx != NULL);
    return ctx;
}

static gvote_t * new_handle(void) {
    gvote_params params = gvote_params_default();
    params.max_cells = 100;
    params.draft     = 8; /* a short trial: sanitizers are slow */
    params.samples   = 8;
    gvote_t * g = gvote_new(&params, NULL);
    REQUIRE(g != NULL);
    return g;
}

/* A conversation: text, vote, text, vote. */
static void * converse(void * data) {
    struct work * work = (struct work *) data;
    struct llama_context * ctx = new_context(work->model);
    gvote_t * g = new_handle();
    REQUIRE_OK(g, gvote_attach(g, ctx));
    for (int turn = 0; turn < N_TURNS; ++turn) {
        llama_token tokens[N];
        memcpy(tokens, work->tokens + turn*N, sizeof(tokens));
        REQUIRE(llama_decode(ctx, llama_batch_get_one(tokens, N)) == 0);
        gvote_report report = { .size = sizeof(report) };
        REQUIRE_OK(g, gvote_compress(g, ctx, 0, &report));
        REQUIRE(report.cells_after <= 100 && report.cells_after < report.cells_before);
        work->kept[turn] = (int32_t) report.cells_after;
    }
    /* a failure without a handle is this thread's own */
    REQUIRE(gvote_cancel(NULL) == GVOTE_ERROR_NULL && strlen(gvote_last_error(NULL)) > 0);
    REQUIRE_OK(g, gvote_detach(g, ctx));
    gvote_free(g);
    llama_free(ctx);
    return NULL;
}

static void contexts_in_threads_do_not_meet(const struct llama_model * model, const llama_token * tokens) {
    struct work alone = { model, tokens, { 0 } };
    converse(&alone);
    struct work work[N_CONTEXTS];
    pthread_t threads[N_CONTEXTS];
    for (int i = 0; i < N_CONTEXTS; ++i) {
        work[i] = (struct work) { model, tokens, { 0 } };
        REQUIRE(pthread_create(&threads[i], NULL, converse, &work[i]) == 0);
    }
    for (int i = 0; i < N_CONTEXTS; ++i) {
        REQUIRE(pthread_join(threads[i], NULL) == 0);
        REQUIRE(memcmp(work[i].kept, alone.kept, sizeof(alone.kept)) == 0);
    }
}

struct shared {
    gvote_t     * g;
    atomic_bool   over;
    atomic_int    refused;
};

static void * disturb(void * data) {
    struct shared * shared = (struct shared *) data;
    while (!atomic_load(&shared->over)) {
        gvote_params params = gvote_params_default();
        const gvote_status status = gvote_get_params(shared->g, &params);
        REQUIRE(status == GVOTE_OK || status == GVOTE_ERROR_BUSY);
        atomic_fetch_add(&shared->refused, status == GVOTE_ERROR_BUSY);
        REQUIRE(gvote_cancel(shared->g) == GVOTE_OK && gvote_cancel_clear(shared->g) == GVOTE_OK);
    }
    return NULL;
}

/* Whatever a second thread asks meanwhile, a vote comes to its end, is cancelled, or was refused as the later of two. */
static void a_handle_of_two_threads_serves_one_at_a_time(const struct llama_model * model, const llama_token * tokens) {
    struct shared shared = { new_handle(), false, 0 };
    struct llama_context * ctx = new_context(model);
    REQUIRE_OK(shared.g, gvote_attach(shared.g, ctx));
    llama_token prompt[N];
    memcpy(prompt, tokens, sizeof(prompt));
    REQUIRE(llama_decode(ctx, llama_batch_get_one(prompt, N)) == 0);
    pthread_t thread;
    REQUIRE(pthread_create(&thread, NULL, disturb, &shared) == 0);
    int heard = 0;
    while (heard < 5 || atomic_load(&shared.refused) == 0) {
        const gvote_status status = gvote_plan(shared.g, ctx, 0, NULL);
        REQUIRE(status == GVOTE_OK || status == GVOTE_ERROR_CANCELLED || status == GVOTE_ERROR_BUSY);
        heard += status != GVOTE_ERROR_BUSY;
    }
    atomic_store(&shared.over, true);
    REQUIRE(pthread_join(thread, NULL) == 0);
    REQUIRE_OK(shared.g, gvote_cancel_clear(shared.g));
    REQUIRE_OK(shared.g, gvote_compress(shared.g, ctx, 0, NULL));
    gvote_free(shared.g);
    llama_free(ctx);
}

int main(int argc, char ** argv) {
    REQUIRE(argc == 3);
    struct llama_model * model = load(argv[1]);
    llama_token * tokens = prompt(model, argv[2], N_TURNS*N);
    contexts_in_threads_do_not_meet(model, tokens);
    a_handle_of_two_threads_serves_one_at_a_time(model, tokens);
    free(tokens);
    llama_model_free(model);
    llama_backend_free();
    puts("all kept");
    return 0;
}
