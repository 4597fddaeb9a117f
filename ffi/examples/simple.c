/* Reads a document and answers a question about it. Once the answer has shown that it is long, the cells that it does not need
 * are freed.
 *
 *     cc simple.c -o simple $(pkg-config --cflags --libs gvote)
 *     ./simple MODEL.gguf DOCUMENT.txt QUESTION [VOTE_AFTER]       after so many tokens of the answer
 */

#include <gvote.h>
#include <llama.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_BATCH = 512, N_ANSWER = 64 };

static void die(const char * what, const char * why) {
    fprintf(stderr, "error: %s%s%s\n", what, why[0] ? ": " : "", why);
    exit(1);
}

static void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static char * read_file(const char * path) {
    FILE * file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
        die("cannot read", path);
    }
    const long size = ftell(file);
    char * text = size < 0 ? NULL : calloc((size_t) size + 1, 1);
    rewind(file);
    if (text == NULL || fread(text, 1, (size_t) size, file) != (size_t) size) {
        die("cannot read", path);
    }
    fclose(file);
    return text;
}

/* Document and question as one message of a user, in the words of the model's own template. */
static char * make_prompt(const struct llama_model * model, const char * document, const char * question) {
    const size_t length = strlen(document) + strlen(question) + 8;
    const size_t room = 2*length + 1024; /* for what the template adds */
    char * message = malloc(length);
    char * prompt  = malloc(room);
    if (message == NULL || prompt == NULL) {
        die("out of memory", "");
    }
    snprintf(message, length, "%s\n\n%s", document, question);
    const struct llama_chat_message chat = { "user", message };
    const int32_t n = llama_chat_apply_template(llama_model_chat_template(model, NULL), &chat, 1, true, prompt, (int32_t) room);
    if (n < 0 || (size_t) n >= room) {
        die("the model has no chat template that llama.cpp knows", "");
    }
    prompt[n] = '\0';
    free(message);
    return prompt;
}

static void decode(struct llama_context * ctx, llama_token * tokens, int32_t n) {
    for (int32_t i = 0; i < n; i += N_BATCH) {
        if (llama_decode(ctx, llama_batch_get_one(tokens + i, n - i < N_BATCH ? n - i : N_BATCH)) != 0) {
            die("llama_decode failed", "");
        }
    }
}

/* Called before each token of an answer that began at position `start`. */
static void vote(gvote_t * g, struct llama_context * ctx, int32_t start) {
    bool has_voted = false;
    gvote_report report = { .size = sizeof(report) };
    if (gvote_vote_if_due(g, ctx, 0, start, &has_voted, &report) != GVOTE_OK) {
        fprintf(stderr, "gvote: %s; going on with the whole cache\n", gvote_last_error(g));
    } else if (has_voted) {
        fprintf(stderr, "cells: %u -> %u\n", report.cells_before, report.cells_after);
    }
}

int main(int argc, char ** argv) {
    if (argc < 4 || argc > 5) {
        die("usage: simple MODEL.gguf DOCUMENT.txt QUESTION [VOTE_AFTER]", "");
    }
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == NULL) {
        die("cannot load", argv[1]);
    }
    const struct llama_vocab * vocab = llama_model_get_vocab(model);

    char * document = read_file(argv[2]);
    char * prompt = make_prompt(model, document, argv[3]);
    const int32_t room = (int32_t) strlen(prompt) + 8; /* a token has a character at least */
    llama_token * tokens = malloc((size_t) room*sizeof(*tokens));
    const int32_t n_prompt =
        tokens == NULL ? -1 : llama_tokenize(vocab, prompt, (int32_t) strlen(prompt), tokens, room, true, true);
    if (n_prompt <= 0) {
        die("cannot tokenize the prompt", "");
    }

    struct llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx   = (uint32_t) n_prompt + N_ANSWER + 256; /* a vote borrows free cells */
    cparams.n_batch = N_BATCH;
    struct llama_context * ctx = llama_init_from_model(model, cparams);
    if (ctx == NULL) {
        die("cannot make a context", "");
    }

    gvote_params params = gvote_params_default();
    if (argc == 5) {
        params.when       = GVOTE_WHEN_AFTER;
        params.vote_after = (uint32_t) atoi(argv[4]);
    }
    gvote_t * g = gvote_new(&params, NULL);
    if (g == NULL || gvote_attach(g, ctx) != GVOTE_OK) {
        die("gvote", gvote_last_error(g));
    }
    decode(ctx, tokens, n_prompt);

    struct llama_sampler * sampler = llama_sampler_init_greedy();
    for (int i = 0; i < N_ANSWER; ++i) {
        llama_token token = llama_sampler_sample(sampler, ctx, -1);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        char piece[256];
        const int32_t n = llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, false);
        fwrite(piece, 1, n > 0 ? (size_t) n : 0, stdout);
        vote(g, ctx, n_prompt);
        decode(ctx, &token, 1);
    }
    putchar('\n');

    llama_sampler_free(sampler);
    llama_free(ctx);
    gvote_free(g);
    llama_model_free(model);
    free(tokens);
    free(prompt);
    free(document);
    llama_backend_free();
    return 0;
}
