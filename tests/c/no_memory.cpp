// An app whose memory runs out: no_memory MODEL TEXT. Calls are made again and again while the first, the second, the third ...
// allocation of C++ in them throws, and so do all that follow it. That is a real exception in the depth of llama.cpp.

#include "gvote.h"

#include "app.h"

#include <atomic>
#include <new>
#include <string>
#include <vector>

static constexpr int32_t N     = 120;
static constexpr long    NEVER = -1;

static std::atomic<long> allocations_left{NEVER};

void * operator new(std::size_t size) {
    long left = allocations_left.load();
    while (left > 0 && !allocations_left.compare_exchange_weak(left, left - 1)) {
    }
    if (left == 0) {
        throw std::bad_alloc();
    }
    void * memory = malloc(size > 0 ? size : 1);
    if (memory == nullptr) {
        throw std::bad_alloc();
    }
    return memory;
}

void operator delete(void * memory) noexcept { free(memory); }
void operator delete(void * memory, std::size_t) noexcept { free(memory); }

static std::vector<uint8_t> state_of(llama_context * ctx) {
    std::vector<uint8_t> data(llama_state_seq_get_size(ctx, 0));
    data.resize(llama_state_seq_get_data(ctx, data.data(), data.size(), 0));
    return data;
}

// What gvote knows of the sequence; nothing before there is one.
static std::vector<uint8_t> known_of(gvote_t * g, llama_context * ctx) {
    size_t size = 0;
    if (gvote_state_size(g, ctx, 0, &size) != GVOTE_OK) {
        return {};
    }
    std::vector<uint8_t> data(size);
    REQUIRE_OK(g, gvote_state_get(g, ctx, 0, data.data(), size, nullptr));
    return data;
}

// All of the first places are tried, then many of the others; fewer where each call takes a second.
#ifdef __SANITIZE_ADDRESS__
static constexpr long DENSE = 40, SPARSE = 5;
#else
static constexpr long DENSE = 1000, SPARSE = 20;
#endif
static long next(long i) { return i < DENSE ? i + 1 : i + i/SPARSE; }

// Calls until it can be served; returns how often it was refused.
template <typename F> static int survives(const char * name, gvote_t * g, llama_context * ctx, F && call) {
    const std::vector<uint8_t> before = state_of(ctx);
    const std::vector<uint8_t> known  = known_of(g, ctx);
    int n_refused = 0;
    for (long i = 0;; i = next(i)) {
        allocations_left = i;
        const gvote_status status = call();
        allocations_left = NEVER;
        if (status == GVOTE_OK) {
            // a failure of what is not needed was dealt with inside
            return n_refused;
        }
        // llama_decode() tells no more than that it failed
        const bool is_right = status == GVOTE_ERROR_MEMORY || status == GVOTE_ERROR_DECODE;
        const std::string error = gvote_last_error(g);
        if (!is_right || error.empty() || state_of(ctx) != before || known_of(g, ctx) != known) {
            fprintf(stderr, "%s, allocation %ld: %s: %s\n", name, i, gvote_status_string(status), error.c_str());
            exit(1);
        }
        n_refused++;
    }
}

int main(int argc, char ** argv) {
    REQUIRE(argc == 3);
    llama_model * model = load(argv[1]);
    llama_token * tokens = prompt(model, argv[2], 400);
    llama_context * ctx = llama_init_from_model(model, context_params());
    REQUIRE(ctx != nullptr);
    gvote_params params = gvote_params_default();
    params.max_cells = 100;
    params.draft     = 4;
    params.samples   = 4;
    gvote_t * g = gvote_new(&params, nullptr);
    REQUIRE(g != nullptr);
    REQUIRE(survives("attach", g, ctx, [&] { return gvote_attach(g, ctx); }) > 0);
    REQUIRE(llama_decode(ctx, llama_batch_get_one(tokens, N)) == 0);

    REQUIRE(survives("plan", g, ctx, [&] { return gvote_plan(g, ctx, 0, nullptr); }) > 0);
    REQUIRE(survives("compress", g, ctx, [&] { return gvote_compress(g, ctx, 0, nullptr); }) > 0);
    uint32_t cells = 0;
    REQUIRE_OK(g, gvote_seq_cells(g, ctx, 0, &cells));
    REQUIRE(cells > 0 && cells <= 100);
    llama_token token = likeliest(ctx);
    REQUIRE(llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0);

    // two parts of a longer text, until a third one has no room
    enum { N_PART = 400, N_NEXT = 100 };
    for (int i = 0; i < 2; ++i) {
        REQUIRE_OK(g, gvote_make_room(g, ctx, 0, N_PART, nullptr, 0, nullptr));
        REQUIRE(llama_decode(ctx, llama_batch_get_one(tokens, N_PART)) == 0);
    }
    uint32_t before = 0;
    REQUIRE_OK(g, gvote_seq_cells(g, ctx, 0, &before));
    REQUIRE(survives("make_room", g, ctx, [&] {
        return gvote_make_room(g, ctx, 0, N_NEXT, tokens, N_PART, nullptr);
    }) > 0);
    REQUIRE_OK(g, gvote_seq_cells(g, ctx, 0, &cells));
    REQUIRE(cells < before);
    REQUIRE(llama_decode(ctx, llama_batch_get_one(tokens, N_NEXT)) == 0);

    llama_free(ctx);
    gvote_free(g);
    free(tokens);
    llama_model_free(model);
    llama_backend_free();
    puts("all kept");
    return 0;
}
