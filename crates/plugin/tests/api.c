// Calls llama.h as programs do that know nothing of gvote, and prints what comes of it. Lines that begin with "same" hold whatever
// votes do; the others only where there are none.
//
// usage: api MODEL FOLDER unified|apart|read
//
// `read` loads the sequence that an earlier run has left in the folder.

#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_PROMPT = 600, N_ANSWER = 24, N_CTX = 2048 };

static struct llama_context * ctx;
static llama_memory_t memory;
static int n_vocab;

static void fail(const char * what) {
    fprintf(stderr, "api: %s\n", what);
    exit(1);
}

static unsigned long long hash(const void * data, size_t size) {
    unsigned long long h = 14695981039346656037ull;
    for (size_t i = 0; i < size; ++i) {
        h = (h ^ ((const unsigned char *) data)[i]) * 1099511628211ull;
    }
    return h;
}

static llama_token token_at(int pos) {
    return 100 + (llama_token) ((pos * 7919ll + 13) % (n_vocab - 200));
}

// Decodes the tokens at the positions from `from` to `to - 1`, with logits of the last one.
static void decode(llama_seq_id seq, int from, int to) {
    struct llama_batch batch = llama_batch_init(to - from, 0, 1);
    for (int pos = from; pos < to; ++pos) {
        const int i = batch.n_tokens++;
        batch.token[i] = token_at(pos);
        batch.pos[i] = pos;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i] = pos + 1 == to;
    }
    if (llama_decode(ctx, batch) != 0) {
        fail("llama_decode");
    }
    llama_batch_free(batch);
}

static void answer(llama_seq_id seq, int from) {
    for (int i = 0; i < N_ANSWER; ++i) {
        decode(seq, from + i, from + i + 1);
    }
}

static unsigned long long logits(void) {
    return hash(llama_get_logits_ith(ctx, -1), sizeof(float) * (size_t) n_vocab);
}

static void tell(const char * label, llama_seq_id seq) {
    printf("%s: positions %d to %d\n", label, llama_memory_seq_pos_min(memory, seq), llama_memory_seq_pos_max(memory, seq));
}

// The state of a sequence, or of all of them where `seq` is -1.
static unsigned char * state(llama_seq_id seq, size_t * size) {
    *size = seq < 0 ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, seq);
    unsigned char * data = malloc(*size);
    const size_t n = seq < 0 ? llama_state_get_data(ctx, data, *size) : llama_state_seq_get_data(ctx, data, *size, seq);
    if (n != *size) {
        fail("a state has another size than was said");
    }
    return data;
}

static void tell_state(const char * label, llama_seq_id seq) {
    size_t size;
    unsigned char * data = state(seq, &size);
    printf("%s: %zu bytes, %016llx\n", label, size, hash(data, size));
    free(data);
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fail("usage: api MODEL FOLDER unified|apart|read");
    }
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        fail("no model");
    }
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    struct llama_context_params params = llama_context_default_params();
    params.kv_unified = strcmp(argv[3], "apart") != 0;
    params.n_seq_max = 2;
    params.n_ctx = params.kv_unified ? N_CTX : 2 * N_CTX;
    params.n_threads = params.n_threads_batch = 1;
    ctx = llama_init_from_model(model, params);
    if (!ctx) {
        fail("no context");
    }
    memory = llama_get_memory(ctx);

    if (strcmp(argv[3], "read") == 0) {
        char name[4096];
        llama_token read[4] = { 0 };
        size_t n_read = 0;
        snprintf(name, sizeof name, "%s/sequence", argv[2]);
        printf("read: %d\n", llama_state_seq_load_file(ctx, name, 0, read, 4, &n_read) > 0);
        tell("read", 0);
        llama_free(ctx);
        return 0;
    }

    decode(0, 0, N_PROMPT);
    printf("same prompt: logits %016llx\n", logits());
    answer(0, N_PROMPT);
    printf("answer: logits %016llx\n", logits());
    tell("same answer", 0);

    // the answer goes, and the prompt is whole again
    printf("same cut: %d\n", llama_memory_seq_rm(memory, 0, N_PROMPT, -1));
    tell("same cut", 0);
    tell_state("same cut", 0);
    printf("same cut again: %d\n", llama_memory_seq_rm(memory, 0, N_PROMPT - 1, -1));
    decode(0, N_PROMPT - 1, N_PROMPT);
    printf("same last token again: logits %016llx\n", logits());

    // inside what a vote has left of it
    answer(0, N_PROMPT);
    printf("same cut inside: %d\n", llama_memory_seq_rm(memory, 0, N_PROMPT / 2, -1));
    tell("same cut inside", 0);
    decode(0, N_PROMPT / 2, N_PROMPT);
    printf("same second half again: logits %016llx\n", logits());

    // saved in the middle of an answer, and loaded elsewhere
    answer(0, N_PROMPT);
    tell_state("state of an answer", 0);
    size_t size;
    unsigned char * saved = state(0, &size);
    printf("same load: %d\n", llama_state_seq_set_data(ctx, saved, size, 1) == size);
    tell("same load", 1);
    decode(0, N_PROMPT + N_ANSWER, N_PROMPT + N_ANSWER + 1);
    const unsigned long long original = logits();
    decode(1, N_PROMPT + N_ANSWER, N_PROMPT + N_ANSWER + 1);
    printf("same load: goes on alike %d\n", logits() == original);
    free(saved);

    char path[4096];
    llama_token tokens[4] = { 1, 2, 3 };
    size_t n_tokens = 0;
    snprintf(path, sizeof path, "%s/sequence", argv[2]);
    const size_t written = llama_state_seq_save_file(ctx, path, 0, tokens, 3);
    printf("same file: %d\n", written > 0);
    const size_t counted = llama_state_seq_load_file(ctx, path, 1, NULL, 0, &n_tokens);
    printf("same file: %d tokens in %zu bytes\n", (int) n_tokens, counted);
    memset(tokens, 0, sizeof tokens);
    printf("same file: %d\n", llama_state_seq_load_file(ctx, path, 1, tokens, 4, &n_tokens) == written);
    printf("same file: tokens %d %d %d\n", tokens[0], tokens[1], tokens[2]);
    tell("same file", 1);

    // a context shift of the copy, after an answer of it
    decode(1, N_PROMPT + N_ANSWER + 1, N_PROMPT + N_ANSWER + 20);
    answer(1, N_PROMPT + N_ANSWER + 20);
    printf("same shift: %d\n", llama_memory_seq_rm(memory, 1, 100, 200));
    llama_memory_seq_add(memory, 1, 200, -1, -100);
    tell("same shift", 1);
    const int end = llama_memory_seq_pos_max(memory, 1) + 1;
    decode(1, end, end + 1);
    printf("shift: logits %016llx\n", logits());

    // everything at once
    saved = state(-1, &size);
    printf("state of all: %zu bytes, %016llx\n", size, hash(saved, size));
    llama_memory_clear(memory, true);
    tell("same clear", 0);
    printf("same load of all: %d\n", llama_state_set_data(ctx, saved, size) == size);
    tell("same load of all", 0);
    tell("same load of all", 1);
    free(saved);
    snprintf(path, sizeof path, "%s/all", argv[2]);
    printf("same file of all: %d\n", llama_state_save_file(ctx, path, tokens, 3));
    printf("same file of all: %d\n", llama_state_load_file(ctx, path, tokens, 4, &n_tokens));

    // copies
    llama_memory_seq_rm(memory, 1, -1, -1);
    if (params.kv_unified) {
        llama_memory_seq_cp(memory, 0, 1, 0, N_PROMPT / 2);
    } else {
        llama_memory_seq_cp(memory, 0, 1, -1, -1);
    }
    tell("same copy", 1);
    llama_memory_seq_keep(memory, 1);
    tell("same copy kept", 0);
    tell("same copy kept", 1);
    llama_memory_clear(memory, true);
    decode(0, 0, N_PROMPT);
    printf("same prompt after all: logits %016llx\n", logits());

    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
