/* Four sequences in one cache: each asks its own question about a document, each keeps the cells that this question needs,
 * and all of them are answered in common batches.
 *
 *     cc batched.c -o batched $(pkg-config --cflags --libs gvote)
 *     ./batched MODEL.gguf DOCUMENT.txt QUESTION QUESTION QUESTION QUESTION
 */

#include <gvote.h>
#include <llama.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_SEQ = 4, N_BATCH = 512, N_ANSWER = 32, N_DOCUMENT = 1 << 16, N_PIECE = 64 };

struct sequence {
    llama_token * prompt;
    int32_t       n_prompt;
    llama_token   next;     /* sampled, not decoded yet */
    llama_pos     pos;      /* where `next` goes */
    bool          is_done;
    char          answer[N_ANSWER*N_PIECE];
};

static void die(const char * what, const char * why) {
    fprintf(stderr, "error: %s%s%s\n", what, why[0] ? ": " : "", why);
    exit(1);
}

static void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    (void) (level == GGML_LOG_LEVEL_ERROR && fputs(text, stderr));
}

static void make_prompt(const struct llama_model * model, const char * document, const char * question, struct sequence * s) {
    static char message[N_DOCUMENT + 1024];
    static char text[2*sizeof(message)];
    snprintf(message, sizeof(message), "%s\n\n%s", document, question);
    const struct llama_chat_message chat = { "user", message };
    const int32_t n = llama_chat_apply_template(llama_model_chat_template(model, NULL), &chat, 1, true, text, sizeof(text));
    const bool is_made = n > 0 && (size_t) n <= sizeof(text);
    s->prompt = is_made ? malloc(((size_t) n + 8)*sizeof(llama_token)) : NULL; /* a token has a character at least */
    s->n_prompt = s->prompt == NULL ? -1 : llama_tokenize(llama_model_get_vocab(model), text, n, s->prompt, n + 8, true, true);
    if (s->n_prompt <= 0) { die("cannot make a prompt of", question); }
}

static void add(struct llama_batch * batch, llama_token token, llama_pos pos, llama_seq_id seq, bool is_output) {
    const int32_t i = batch->n_tokens++;
    batch->token[i]     = token;
    batch->pos[i]       = pos;
    batch->n_seq_id[i]  = 1;
    batch->seq_id[i][0] = seq;
    batch->logits[i]    = is_output;
}

static void decode(struct llama_context * ctx, struct llama_batch batch) {
    if (batch.n_tokens > 0 && llama_decode(ctx, batch) != 0) {
        die("llama_decode failed", "");
    }
}

/* Takes the likeliest token after output `i` of the last batch. */
static void sample(struct sequence * s, struct llama_sampler * sampler, struct llama_context * ctx, int32_t i) {
    const struct llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
    s->next = llama_sampler_sample(sampler, ctx, i);
    s->is_done = llama_vocab_is_eog(vocab, s->next);
    if (!s->is_done) {
        char piece[N_PIECE] = "";
        (void) llama_token_to_piece(vocab, s->next, piece, N_PIECE - 1, 0, false); /* a longer one is left out */
        strcat(s->answer, piece);
    }
}

int main(int argc, char ** argv) {
    static char document[N_DOCUMENT];
    static struct sequence seqs[N_SEQ];
    FILE * file = argc == 3 + N_SEQ ? fopen(argv[2], "rb") : NULL;
    if (file == NULL) {
        die("usage: batched MODEL.gguf DOCUMENT.txt QUESTION QUESTION QUESTION QUESTION", "");
    }
    document[fread(document, 1, sizeof(document) - 1, file)] = '\0';
    fclose(file);

    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == NULL) { die("cannot load", argv[1]); }
    int32_t n_cells = 256; /* a vote borrows free cells */
    for (int s = 0; s < N_SEQ; ++s) {
        make_prompt(model, document, argv[3 + s], &seqs[s]);
        n_cells += seqs[s].n_prompt + N_ANSWER;
    }

    struct llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx      = (uint32_t) n_cells;
    cparams.n_batch    = N_BATCH;
    cparams.n_seq_max  = N_SEQ;
    cparams.kv_unified = true; /* one pool of cells: what one sequence frees, another can use */
    struct llama_context * ctx = llama_init_from_model(model, cparams);
    gvote_t * g = gvote_new(NULL, NULL);
    if (ctx == NULL || g == NULL || gvote_attach(g, ctx) != GVOTE_OK) {
        die("cannot make a context", gvote_last_error(g));
    }

    struct llama_sampler * sampler = llama_sampler_init_greedy();
    struct llama_batch batch = llama_batch_init(N_BATCH, 0, 1);
    for (int s = 0; s < N_SEQ; ++s) {
        for (llama_pos i = 0; i < seqs[s].n_prompt; ++i) {
            const bool is_last = i + 1 == seqs[s].n_prompt;
            add(&batch, seqs[s].prompt[i], seqs[s].pos++, s, is_last);
            if (is_last || batch.n_tokens == N_BATCH) {
                decode(ctx, batch);
                batch.n_tokens = is_last ? batch.n_tokens : 0;
            }
        }
        sample(&seqs[s], sampler, ctx, batch.n_tokens - 1);
        batch.n_tokens = 0;

        gvote_report report = { .size = sizeof(report) };
        if (gvote_compress(g, ctx, s, &report) != GVOTE_OK) { die("gvote", gvote_last_error(g)); }
        fprintf(stderr, "sequence %d, cells: %u -> %u\n", s, report.cells_before, report.cells_after);
    }

    for (int step = 1; step < N_ANSWER; ++step) {
        batch.n_tokens = 0;
        for (int s = 0; s < N_SEQ; ++s) {
            if (!seqs[s].is_done) {
                add(&batch, seqs[s].next, seqs[s].pos++, s, true);
            }
        }
        decode(ctx, batch);
        for (int32_t i = 0; i < batch.n_tokens; ++i) {
            sample(&seqs[batch.seq_id[i][0]], sampler, ctx, i);
        }
    }
    for (int s = 0; s < N_SEQ; ++s) {
        printf("%d: %s\n", s, seqs[s].answer);
        free(seqs[s].prompt);
    }

    llama_batch_free(batch);
    llama_sampler_free(sampler);
    llama_free(ctx);
    gvote_free(g);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
