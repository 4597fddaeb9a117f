// An app in C++17 with the header-only wrapper: wrapper MODEL TEXT.

#include "gvote.hpp"

#include "app.h"

static constexpr int32_t N = 300;

template <typename F> static gvote_status status_of(F && f) {
    try {
        f();
    } catch (const gvote::error & e) {
        REQUIRE(e.what()[0] != '\0');
        return e.status();
    }
    return GVOTE_OK;
}

int main(int argc, char ** argv) {
    REQUIRE(argc == 3);
    llama_model * model = load(argv[1]);
    llama_token * tokens = prompt(model, argv[2], N);

    gvote_params params = gvote_params_default();
    params.samples = 0;
    REQUIRE(status_of([&] { gvote::handle refused(params); }) == GVOTE_ERROR_PARAMS);
    params = gvote_params_default();
    params.max_cells = 150;

    {
        gvote::handle made(params);
        std::string line;
        made.on_log([&](gvote_log_level, const char * text) { line = text; });
        gvote::handle g = std::move(made); // the callbacks move along
        REQUIRE(g.params().max_cells == 150);

        llama_context * ctx = llama_init_from_model(model, context_params());
        REQUIRE(ctx != nullptr);
        REQUIRE(status_of([&] { g.compress(ctx, 0); }) == GVOTE_ERROR_NOT_ATTACHED);
        g.attach(ctx);
        int nodes = 0; // an app's own callback
        g.set_next_callback([](ggml_tensor *, bool, void * data) { return ++*static_cast<int *>(data) > 0; }, &nodes);
        REQUIRE(llama_decode(ctx, llama_batch_get_one(tokens, N)) == 0);
        REQUIRE(nodes > 0);
        g.set_next_callback(nullptr, nullptr);
        const gvote_report plan = g.plan(ctx, 0);
        REQUIRE(plan.cells_before == static_cast<uint32_t>(N) && g.cells(ctx, 0) == plan.cells_before);

        g.on_progress([](gvote_stage) -> bool { throw std::runtime_error("no more"); });
        REQUIRE(status_of([&] { g.compress(ctx, 0); }) == GVOTE_ERROR_CANCELLED);
        g.on_progress(nullptr);

        const gvote_report report = g.compress(ctx, 0);
        REQUIRE(report.cells_after <= 150 && report.cells_after == g.cells(ctx, 0));
        REQUIRE(report.cells_after == plan.cells_after);
        g.cancel();
        REQUIRE(status_of([&] { g.compress(ctx, 0); }) == GVOTE_ERROR_CANCELLED);
        g.cancel_clear();
        REQUIRE(status_of([&] { g.set_params(gvote_params{}); }) == GVOTE_ERROR_SIZE);
        params.max_cells = 0;
        g.set_params(params);
        REQUIRE(g.params().max_cells == 0);
        REQUIRE(line.find("keeps") != std::string::npos);
        REQUIRE(g.make_room(ctx, 0, 1).cells_after == report.cells_after); // there is room
        REQUIRE(status_of([&] { g.make_room(ctx, 0, UINT32_MAX, tokens, N); }) == GVOTE_ERROR_NO_CELLS);
        REQUIRE(g.positions(ctx, 0, llama_model_n_layer(model) - 1, 0).size() == report.cells_after);
        REQUIRE(g.exact_from(ctx, 0) == 0);
        REQUIRE(report.bytes_aside > 0);
        REQUIRE(g.expand(ctx, 0, 0) == static_cast<uint32_t>(N));
        REQUIRE(g.compress(ctx, 0).cells_after <= static_cast<uint32_t>(N));
        REQUIRE(!g.vote_if_due(ctx, 0, N)); // no token of an answer yet
        params.when = GVOTE_WHEN_AFTER;
        g.set_params(params);
        REQUIRE(g.vote_if_due(ctx, 0, N)->cells_before <= static_cast<uint32_t>(N));
        REQUIRE(status_of([&] { g.vote_if_due(ctx, 0, N + 1); }) == GVOTE_ERROR_NOT_SEEN);
        g.protect(ctx, 0, 0, 20);
        g.protect(ctx, 0, 10, -1, false);
        REQUIRE(status_of([&] { g.protect(ctx, 0, 0, N + 1); }) == GVOTE_ERROR_NOT_SEEN);
        g.load(ctx, 0, g.save(ctx, 0));
        REQUIRE(status_of([&] { g.load(ctx, 0, {}); }) != GVOTE_OK);
        g.truncate(ctx, 0, 0);
        REQUIRE(status_of([&] { g.cells(ctx, 0); }) == GVOTE_ERROR_NOT_SEEN);
        g.detach(ctx);
        llama_free(ctx);
    }

    free(tokens);
    llama_model_free(model);
    llama_backend_free();
    puts("all kept");
    return 0;
}
