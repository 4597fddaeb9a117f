/* An app that meets a llama.cpp that gvote was not built for: refused MODEL TEXT. Prints who refused, and why. */

#include "gvote.h"

#include "app.h"

int main(int argc, char ** argv) {
    REQUIRE(argc == 3);
    gvote_status status = GVOTE_OK;
    gvote_t * g = gvote_new(NULL, &status);
    if (g == NULL) {
        REQUIRE(status == GVOTE_ERROR_VERSION);
        printf("gvote_new: %s\n", gvote_last_error(NULL));
        return 0;
    }
    struct llama_model * model = load(argv[1]);
    llama_token * tokens = prompt(model, argv[2], 8);
    struct llama_context * ctx = llama_init_from_model(model, context_params());
    REQUIRE(ctx != NULL);
    if (gvote_attach(g, ctx) == GVOTE_ERROR_VERSION) {
        printf("gvote_attach: %s\n", gvote_last_error(g));
        REQUIRE(gvote_compress(g, ctx, 0, NULL) == GVOTE_ERROR_NOT_ATTACHED);
    } else {
        puts("attached");
    }
    /* the context goes on in any case */
    REQUIRE(llama_decode(ctx, llama_batch_get_one(tokens, 8)) == 0);
    llama_free(ctx);
    gvote_free(g);
    free(tokens);
    llama_model_free(model);
    return 0;
}
