/* What the test programs share: a loud assert, a model, a prompt. */

#ifndef APP_H
#define APP_H

#include "llama.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(x)                                                                    \
    do {                                                                              \
        if (!(x)) {                                                                   \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #x);           \
            exit(1);                                                                  \
        }                                                                             \
    } while (0)

#define REQUIRE_OK(g, x)                                                                                     \
    do {                                                                                                     \
        const gvote_status status_ = (x);                                                                    \
        if (status_ != GVOTE_OK) {                                                                           \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, gvote_status_string(status_), gvote_last_error(g)); \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

/* What fails here fails on purpose. */
static inline void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) level;
    (void) text;
    (void) data;
}

static inline struct llama_model * load(const char * path) {
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(path, llama_model_default_params());
    REQUIRE(model != NULL);
    return model;
}

static inline struct llama_context_params context_params(void) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx           = 1024;
    params.n_batch         = 512;
    params.n_threads       = 2;
    params.n_threads_batch = 2;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return params;
}

/* `n` tokens of a text file; a model without a vocabulary takes its bytes. */
static inline llama_token * prompt(const struct llama_model * model, const char * path, int32_t n) {
    FILE * file = fopen(path, "rb");
    REQUIRE(file != NULL);
    char text[16384];
    const size_t length = fread(text, 1, sizeof(text), file);
    fclose(file);
    llama_token * tokens = (llama_token *) malloc(sizeof(text)*sizeof(llama_token));
    REQUIRE(tokens != NULL);
    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    int32_t found = (int32_t) length;
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        for (int32_t i = 0; i < found; ++i) {
            tokens[i] = (unsigned char) text[i] % llama_vocab_n_tokens(vocab);
        }
    } else {
        found = llama_tokenize(vocab, text, (int32_t) length, tokens, (int32_t) sizeof(text), true, false);
    }
    REQUIRE(found >= n);
    return tokens;
}

static inline llama_token likeliest(struct llama_context * ctx) {
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    const float * logits = llama_get_logits_ith(ctx, -1);
    llama_token best = 0;
    for (llama_token token = 1; token < n_vocab; ++token) {
        if (logits[token] > logits[best]) {
            best = token;
        }
    }
    return best;
}

#endif
