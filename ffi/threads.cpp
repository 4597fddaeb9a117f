// Properties that decide the number of threads and how they wait.

#include "shim.hpp"

#include <atomic>
#include <dlfcn.h>
#include <unistd.h>

// ggml splits attention if flash attention reads at least 512 cells of an f16 or f32 cache. llama.cpp makes it read up to the last used
// cell, rounded up to a multiple of 256: a token after this many cells cannot need a second step.
constexpr uint32_t CELLS_OF_ONE_PART = 240;

static bool in_parts(const llama_kv_cache & kv) {
    const ggml_type type = kv.type_k();
    if (type != kv.type_v() || (type != GGML_TYPE_F16 && type != GGML_TYPE_F32)) {
        return false;
    }
    for (uint32_t s = 0; s < kv.get_n_stream(); ++s) {
        if (kv.get_cells(s).used_max_p1() > CELLS_OF_ONE_PART) {
            return true;
        }
    }
    return false;
}

bool gvote_shim_token_in_parts(llama_context * ctx) {
    if (!ctx->get_cparams().flash_attn) {
        return false;
    }
    const llama_kv_cache * base = base_cache(ctx);
    if (base == nullptr) {
        // unknown kind of cache
        return true;
    }
    const llama_kv_cache * window = window_cache(ctx);
    return in_parts(*base) || (window != nullptr && in_parts(*window));
}

bool gvote_shim_uses_devices(llama_context * ctx) {
    return ctx->get_model().n_devices() > 0;
}

bool gvote_shim_crowd(int n) {
    // looked up, not linked: the OpenMP runtime is loaded with ggml, or there is none
    using gomp_parallel = void (void (*)(void *), void *, unsigned, unsigned);
    const auto parallel = (gomp_parallel *) dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (parallel == nullptr) {
        return false;
    }
    // the calling thread is not counted
    const int wanted = (int) sysconf(_SC_NPROCESSORS_ONLN) - n + 2;
    if (wanted < 2) {
        // there are enough threads already
        return true;
    }
    std::atomic<int> there{0};
    parallel([](void * there) { ++*static_cast<std::atomic<int> *>(there); }, &there, (unsigned) wanted, 0);
    return there == wanted;
}
