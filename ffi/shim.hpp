// Shared code of the shim's files: the two caches of a context, and access to members that have no getters.

#pragma once

#include "shim.h"

#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <memory>
#include <new>
#include <typeinfo>
#include <utility>
#include <vector>

namespace {

// Some members that the shim saves and restores are private. C++ ignores access in explicit template instantiations, so a pointer to a
// private member can be passed out of one, as the standard permits ([temp.spec.general]/6).
template <typename Name, auto Member> struct reveal {
    friend constexpr auto member_of(Name) { return Member; }
};

#define GVOTE_REVEAL(owner, member)                     \
    struct owner##_##member {                           \
        friend constexpr auto member_of(owner##_##member); \
    };                                                  \
    template struct reveal<owner##_##member, &owner::member>

GVOTE_REVEAL(llama_kv_cache, v_heads);
GVOTE_REVEAL(llama_context, gf_res_prev_active);

// A sequence id that owns guarded cells and that no batch can have: llama.cpp numbers sequences up to LLAMA_MAX_SEQ and accepts batches for
// n_seq_max of them. A cell with two owners is never overwritten, even outside its sequence's window, and is not free after its sequence
// has lost it.
constexpr llama_seq_id GUARD = LLAMA_MAX_SEQ - 1;

int owners_beside(const llama_kv_cells & cells, uint32_t i, llama_seq_id seq) {
    auto owners = cells.seq_get_all(i);
    owners.reset(seq);
    owners.reset(GUARD);
    return owners.count();
}

// Returns the cells for writing. The cache only exposes them as const; the object itself is not const.
llama_kv_cells & cells_of(llama_kv_cache & kv, llama_seq_id seq) {
    return const_cast<llama_kv_cells &>(kv.get_cells(seq));
}

// Returns the index at which the search for free cells begins.
uint32_t & head_of(llama_kv_cache & kv, llama_seq_id seq) {
    return (kv.*member_of(llama_kv_cache_v_heads{}))[kv.get_stream(seq)];
}

// Returns the cache with full attention, or NULL. Accepts exact types only: a derived cache may hold more than K and V.
llama_kv_cache * base_cache(llama_context * ctx) {
    llama_memory_i * mem = llama_get_memory(ctx);
    if (mem == nullptr) {
        return nullptr;
    }
    if (typeid(*mem) == typeid(llama_kv_cache)) {
        return static_cast<llama_kv_cache *>(mem);
    }
    if (typeid(*mem) == typeid(llama_kv_cache_iswa)) {
        return static_cast<llama_kv_cache_iswa *>(mem)->get_base();
    }
    return nullptr;
}

// Returns the sliding-window cache beside the base cache, or NULL.
llama_kv_cache * window_cache(llama_context * ctx) {
    llama_memory_i * mem = llama_get_memory(ctx);
    const bool has_window = mem != nullptr && typeid(*mem) == typeid(llama_kv_cache_iswa);
    return has_window ? static_cast<llama_kv_cache_iswa *>(mem)->get_swa() : nullptr;
}

bool has_sequence(const llama_kv_cache & kv, llama_seq_id seq) {
    return seq >= 0 && (uint32_t) seq < kv.get_n_seq_max();
}

// Frees cells without an owner, after an exception inside llama.cpp: it gives a cell its position before its owner, and would never free
// such a cell. Allocates no memory.
void mend(llama_context * ctx) {
    for (llama_kv_cache * kv : { base_cache(ctx), window_cache(ctx) }) {
        // with streams, each sequence has its own; without, every sequence gives access to all cells
        for (uint32_t s = 0; kv != nullptr && s < kv->get_n_stream(); ++s) {
            llama_kv_cells & cells = cells_of(*kv, s);
            for (uint32_t i = 0; i < cells.size(); ++i) {
                if (!cells.is_empty(i) && cells.seq_get_all(i).none()) {
                    cells.rm(i);
                }
            }
        }
    }
}

// Returns a copy of the cells with only the entries of other sequences.
llama_kv_cells without(const llama_kv_cells & now, llama_seq_id seq) {
    llama_kv_cells next;
    next.resize(now.size());
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if (s == seq) {
            continue;
        }
        for (const auto & [pos, i] : now.seq_pos_get(s)) {
            if (next.is_empty(i)) {
                next.pos_set(i, pos);
                next.ext_set(i, now.ext_get(i));
            }
            next.seq_add(i, s);
        }
    }
    return next;
}

// Returns a view of the V storage. get_v() is the only access to it, and a view of one cell of stream 0 suffices.
ggml_tensor * v_view(const llama_kv_cache & kv, ggml_context * meta, int32_t il) {
    llama_kv_cache::slot_info slot;
    slot.s0 = 0;
    slot.s1 = 0;
    return kv.get_v(meta, il, 1, slot);
}

using meta_ptr = std::unique_ptr<ggml_context, decltype(&ggml_free)>;

meta_ptr new_meta() {
    // room for one view; tensors are only described here, not allocated
    return { ggml_init({ 4*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true }), ggml_free };
}

bool is_v_trans(const ggml_tensor * view) {
    return view->nb[1] > view->nb[2];
}

constexpr const char * OUT_OF_MEMORY = "out of memory";

template <typename F>
const char * guarded(F && f) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return OUT_OF_MEMORY;
    } catch (...) {
        return "llama.cpp raised an exception";
    }
}

// Whether `f` returns without an exception.
template <typename F>
bool is_done(F && f) {
    return nullptr == guarded([&]() -> const char * {
        f();
        return nullptr;
    });
}

// Returns the result of `f`, or `failed` after an exception.
template <typename T, typename F>
T or_else(T failed, F && f) {
    T result = failed;
    guarded([&]() -> const char * {
        result = f();
        return nullptr;
    });
    return result;
}

} // namespace
