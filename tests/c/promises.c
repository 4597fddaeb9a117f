/* An app in plain C, linked with the shared libraries: promises MODEL TEXT. */

#include "gvote.h"

#include "app.h"

enum { N = 450 };

static int heard_stages;

static bool on_progress(gvote_stage stage, void * data) {
    ++*(int *) data;
    return stage <= GVOTE_STAGE_COMPACT;
}

static void on_log(gvote_log_level level, const char * text, void * data) {
    (void) level;
    snprintf((char *) data, 256, "%s", text);
}

static size_t state_of(struct llama_context * ctx, uint8_t ** data) {
    const size_t size = llama_state_seq_get_size(ctx, 0);
    *data = (uint8_t *) malloc(size);
    REQUIRE(*data != NULL);
    return llama_state_seq_get_data(ctx, *data, size, 0);
}

static void a_plan_changes_nothing(gvote_t * g, struct llama_context * ctx, gvote_report * plan) {
    uint8_t * before = NULL;
    uint8_t * after  = NULL;
    const size_t size = state_of(ctx, &before);
    plan->size = sizeof(*plan);
    REQUIRE_OK(g, gvote_plan(g, ctx, 0, plan));
    REQUIRE(plan->cells_before == N && plan->cells_after < N);
    REQUIRE(state_of(ctx, &after) == size && memcmp(before, after, size) == 0);
    free(before);
    free(after);
}

static void a_compression_frees_cells_and_keeps_outputs(gvote_t * g, struct llama_context * ctx, const gvote_report * plan) {
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    const size_t bytes = (size_t) n_vocab*sizeof(float);
    float * logits = (float *) malloc(bytes);
    REQUIRE(logits != NULL);
    memcpy(logits, llama_get_logits_ith(ctx, -1), bytes);

    gvote_report report = { .size = sizeof(report) };
    REQUIRE_OK(g, gvote_compress(g, ctx, 0, &report));
    REQUIRE(report.cells_after == plan->cells_after && report.bound == plan->bound);
    REQUIRE(memcmp(logits, llama_get_logits_ith(ctx, -1), bytes) == 0);
    free(logits);

    uint32_t cells = 0;
    REQUIRE_OK(g, gvote_seq_cells(g, ctx, 0, &cells));
    REQUIRE(cells == report.cells_after);
    int32_t positions[N];
    uint32_t n = 0;
    const struct llama_model * model = llama_get_model(ctx);
    const int32_t  layer = llama_model_n_layer(model) - 1;
    const uint32_t head  = (uint32_t) llama_model_n_head_kv(model) - 1;
    REQUIRE_OK(g, gvote_seq_positions(g, ctx, 0, layer, head, positions, N, &n));
    REQUIRE(n == cells && positions[0] == 0 && positions[n - 1] == N - 1);
    int n_protected = 0;
    for (uint32_t i = 1; i < n; ++i) {
        REQUIRE(positions[i - 1] < positions[i]);
        n_protected += positions[i] >= 100 && positions[i] < 120;
    }
    REQUIRE(n_protected == 20);
}

static void an_answer_is_voted_on_when_it_is_time(gvote_t * g, struct llama_context * ctx) {
    const llama_pos start = llama_memory_seq_pos_max(llama_get_memory(ctx), 0) + 1;
    gvote_params params = gvote_params_default();
    params.when       = GVOTE_WHEN_AFTER;
    params.vote_after = 3;
    REQUIRE_OK(g, gvote_set_params(g, &params));
    uint32_t cells = 0;
    REQUIRE_OK(g, gvote_seq_cells(g, ctx, 0, &cells));
    for (uint32_t i = 0; i < 6; ++i) {
        bool has_voted = false;
        gvote_report report = { .size = sizeof(report) };
        REQUIRE_OK(g, gvote_vote_if_due(g, ctx, 0, start, &has_voted, &report));
        REQUIRE(has_voted == (i == 3));
        REQUIRE(report.cells_before == (has_voted ? cells + 3 : 0));
        llama_token token = likeliest(ctx);
        REQUIRE(llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0);
    }
    REQUIRE(gvote_vote_if_due(g, ctx, 0, start + 7, NULL, NULL) == GVOTE_ERROR_NOT_SEEN);
    REQUIRE_OK(g, gvote_seq_truncate(g, ctx, 0, start));
}

static void decoding_goes_on(gvote_t * g, struct llama_context * ctx) {
    uint32_t before = 0;
    uint32_t after  = 0;
    REQUIRE_OK(g, gvote_seq_cells(g, ctx, 0, &before));
    for (int i = 0; i < 5; ++i) {
        llama_token token = likeliest(ctx);
        REQUIRE(llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0);
    }
    REQUIRE_OK(g, gvote_seq_cells(g, ctx, 0, &after));
    REQUIRE(after == before + 5);
    REQUIRE(llama_memory_seq_pos_max(llama_get_memory(ctx), 0) == N + 4);
}

static void a_sequence_is_truncated_anywhere(gvote_t * g, struct llama_context * ctx) {
    int32_t exact_from = -1;
    REQUIRE_OK(g, gvote_seq_exact_from(g, ctx, 0, &exact_from));
    REQUIRE(exact_from == 0);
    REQUIRE_OK(g, gvote_seq_truncate(g, ctx, 0, N));
    REQUIRE(llama_memory_seq_pos_max(llama_get_memory(ctx), 0) == N - 1);
    REQUIRE_OK(g, gvote_seq_truncate(g, ctx, 0, N - 200));
    REQUIRE(llama_memory_seq_pos_max(llama_get_memory(ctx), 0) == N - 201);
}

static void what_was_dropped_comes_back(gvote_t * g, struct llama_context * ctx) {
    uint32_t cells = 0;
    REQUIRE_OK(g, gvote_expand(g, ctx, 0, 0, &cells));
    REQUIRE(cells == N - 200);
    int32_t positions[N];
    uint32_t n = 0;
    REQUIRE_OK(g, gvote_seq_positions(g, ctx, 0, 0, 0, positions, N, &n));
    REQUIRE(n == cells);
    for (uint32_t i = 0; i < n; ++i) {
        REQUIRE(positions[i] == (int32_t) i);
    }
    REQUIRE_OK(g, gvote_expand(g, ctx, 0, 0, NULL));
}

static void what_is_known_is_saved(gvote_t * g, struct llama_context * ctx) {
    size_t size = 0;
    REQUIRE_OK(g, gvote_state_size(g, ctx, 0, &size));
    void * data = malloc(size);
    REQUIRE(data != NULL);
    REQUIRE(gvote_state_get(g, ctx, 0, data, size - 1, NULL) == GVOTE_ERROR_SIZE);
    REQUIRE_OK(g, gvote_state_get(g, ctx, 0, data, size, NULL));
    REQUIRE(gvote_state_set(g, ctx, 0, data, size - 1) == GVOTE_ERROR_STATE);
    REQUIRE_OK(g, gvote_state_set(g, ctx, 0, data, size));
    free(data);
}

int main(int argc, char ** argv) {
    REQUIRE(argc == 3);
    REQUIRE(strcmp(gvote_version(), "0.1.0") == 0);
    REQUIRE(strncmp(llama_version(), gvote_llama_version(), strlen(gvote_llama_version())) == 0);

    struct llama_model * model = load(argv[1]);
    llama_token * tokens = prompt(model, argv[2], N);
    gvote_params params = gvote_params_default();
    params.max_cells = 300;
    gvote_status status = GVOTE_ERROR_INTERNAL;
    gvote_t * g = gvote_new(&params, &status);
    REQUIRE(g != NULL && status == GVOTE_OK);
    char line[256] = "";
    REQUIRE_OK(g, gvote_set_log_callback(g, on_log, line));
    REQUIRE_OK(g, gvote_set_progress_callback(g, on_progress, &heard_stages));

    struct llama_context * ctx = llama_init_from_model(model, context_params());
    REQUIRE(ctx != NULL);
    REQUIRE(gvote_compress(g, ctx, 0, NULL) == GVOTE_ERROR_NOT_ATTACHED);
    REQUIRE_OK(g, gvote_attach(g, ctx));
    REQUIRE(gvote_compress(g, ctx, 0, NULL) == GVOTE_ERROR_NOT_SEEN);
    REQUIRE(llama_decode(ctx, llama_batch_get_one(tokens, N)) == 0);

    REQUIRE_OK(g, gvote_seq_protect(g, ctx, 0, 100, 120, true));
    gvote_report plan;
    a_plan_changes_nothing(g, ctx, &plan);
    REQUIRE(heard_stages > 3);
    a_compression_frees_cells_and_keeps_outputs(g, ctx, &plan);
    REQUIRE(strstr(line, "keeps") != NULL);
    decoding_goes_on(g, ctx);
    what_is_known_is_saved(g, ctx);
    a_sequence_is_truncated_anywhere(g, ctx);
    what_was_dropped_comes_back(g, ctx);
    what_is_known_is_saved(g, ctx);
    REQUIRE(llama_decode(ctx, llama_batch_get_one(tokens, 100)) == 0);
    an_answer_is_voted_on_when_it_is_time(g, ctx);

    REQUIRE_OK(g, gvote_cancel(g));
    REQUIRE(gvote_compress(g, ctx, 0, NULL) == GVOTE_ERROR_CANCELLED);
    REQUIRE_OK(g, gvote_cancel_clear(g));

    llama_free(ctx);
    gvote_free(g);
    free(tokens);
    llama_model_free(model);
    llama_backend_free();
    puts("all kept");
    return 0;
}
