/* Answers a question about a document of more tokens than cells: long MODEL.gguf DOCUMENT.txt QUESTION */
#include <gvote.h>
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>

enum { N_CELLS = 512, N_BATCH = 64, N_ANSWER = 48, N_TEXT = 1 << 20 };

static void check(bool ok, const char * what, const gvote_t * g) {
    if (!ok) {
        fprintf(stderr, "error: %s %s\n", what, gvote_last_error(g));
        exit(1);
    }
}

/* Decodes the next `n` tokens of a text, of which `n_ahead` are still to come. */
static void decode(gvote_t * g, struct llama_context * ctx, llama_token * tokens, int32_t n, size_t n_ahead) {
    gvote_report r = { .size = sizeof(r) };
    check(gvote_make_room(g, ctx, 0, (uint32_t) n, n_ahead > 0 ? tokens : NULL, n_ahead, &r) == GVOTE_OK, "no room:", g);
    if (r.cells_after < r.cells_before) {
        fprintf(stderr, "cells: %u -> %u\n", r.cells_before, r.cells_after);
    }
    check(llama_decode(ctx, llama_batch_get_one(tokens, n)) == 0, "llama_decode", NULL);
}

int main(int argc, char ** argv) {
    FILE * file = argc == 4 ? fopen(argv[2], "rb") : NULL;
    struct llama_model * model = file ? llama_model_load_from_file(argv[1], llama_model_default_params()) : NULL;
    check(model != NULL, "usage: long MODEL.gguf DOCUMENT.txt QUESTION", NULL);
    static char text[N_TEXT];
    static llama_token tokens[N_TEXT];
    int length = snprintf(text, N_TEXT, "<|im_start|>user\n");
    length += (int) fread(text + length, 1, N_TEXT/2, file);
    length += snprintf(text + length, N_TEXT/4, "\n\n%s<|im_end|>\n<|im_start|>assistant\n", argv[3]);
    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    const int32_t n = llama_tokenize(vocab, text, length, tokens, N_TEXT, true, true);
    struct llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx = N_CELLS; /* the memory that is taken, however long the text is */
    struct llama_context * ctx = llama_init_from_model(model, cparams);
    gvote_t * g = gvote_new(NULL, NULL);
    check(n > 0 && ctx && g && gvote_attach(g, ctx) == GVOTE_OK, "cannot begin:", g);
    for (int32_t i = 0; i < n; i += N_BATCH) {
        decode(g, ctx, tokens + i, n - i < N_BATCH ? n - i : N_BATCH, (size_t) (n - i));
    }
    struct llama_sampler * greedy = llama_sampler_init_greedy();
    llama_token token = llama_sampler_sample(greedy, ctx, -1);
    for (int i = 0; i < N_ANSWER && !llama_vocab_is_eog(vocab, token); ++i) {
        char piece[256];
        const int32_t size = llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, false);
        fwrite(piece, 1, size > 0 ? (size_t) size : 0, stdout);
        decode(g, ctx, &token, 1, 0);
        token = llama_sampler_sample(greedy, ctx, -1);
    }
    putchar('\n');
    llama_sampler_free(greedy);
    llama_free(ctx);
    gvote_free(g);
    llama_model_free(model);
    return 0;
}
