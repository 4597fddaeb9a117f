// The llama.cpp versions that gvote supports, and the differences between them. Apart from vendor/, this is the only place that names a
// version. vendor/README.md explains how to add one.

#pragma once

#include "ggml-impl.h"
#include "llama-context.h"
#include "llama-kv-cache.h"

namespace {

// Sizes in bytes of the structures whose private members the shim writes, with 64-bit pointers and GNU's C++ library.
struct known_version {
    int    version; // 10000*major + 100*minor + patch
    size_t context;
    size_t cparams;
    size_t kv_cache;
    size_t kv_cells;
    size_t cgraph;
};

constexpr known_version KNOWN_VERSIONS[] = {
    { 500, 1040, 176, 352, 12440, 96 },
    { 600, 1040, 176, 360, 12440, 96 },
    { 800, 1136, 184, 392, 12440, 96 },
};

constexpr known_version known(int version) {
    for (const known_version & one : KNOWN_VERSIONS) {
        if (one.version == version) {
            return one;
        }
    }
    return {};
}

constexpr known_version BUILT_FOR = known(GVOTE_LLAMA_VERSION);

static_assert(BUILT_FOR.version != 0, "gvote does not know this version of llama.cpp: see vendor/README.md");

#if defined(__GLIBCXX__) && defined(__LP64__)
static_assert(sizeof(llama_context)  == BUILT_FOR.context,  "llama_context has changed: see vendor/README.md");
static_assert(sizeof(llama_cparams)  == BUILT_FOR.cparams,  "llama_cparams has changed: see vendor/README.md");
static_assert(sizeof(llama_kv_cache) == BUILT_FOR.kv_cache, "llama_kv_cache has changed: see vendor/README.md");
static_assert(sizeof(llama_kv_cells) == BUILT_FOR.kv_cells, "llama_kv_cells has changed: see vendor/README.md");
static_assert(sizeof(ggml_cgraph)    == BUILT_FOR.cgraph,   "ggml_cgraph has changed: see vendor/README.md");
#endif

} // namespace
