// Parked sequences: changed for an experiment and restored afterwards.

#include "shim.hpp"

#include <algorithm>
#include <limits>

namespace {

// An evicted cell of a window cache, with its rows of all layers.
struct evicted_cell {
    uint32_t             index;
    std::vector<uint8_t> rows;
};

// Calls f(tensor, offset, size, n, stride) for each tensor that holds rows of a cell: n pieces of `size` bytes, `stride` bytes
// apart.
template <typename F>
void each_part(llama_kv_cache & kv, uint32_t stream, uint32_t index, F && f) {
    for (const uint32_t il : kv.get_layer_ids()) {
        const auto meta = new_meta();
        if (!meta) {
            throw std::bad_alloc();
        }
        ggml_tensor * k    = kv.get_k_storage(il);
        ggml_tensor * view = v_view(kv, meta.get(), il);
        ggml_tensor * v    = view->view_src;
        f(k, stream*k->nb[2] + index*k->nb[1], k->nb[1], (size_t) 1, k->nb[1]);
        if (is_v_trans(view)) {
            const size_t size = ggml_type_size(v->type);
            f(v, stream*v->nb[2] + index*size, size, (size_t) v->ne[0], kv.get_size()*size);
        } else {
            f(v, stream*v->nb[2] + index*v->nb[1], v->nb[1], (size_t) 1, v->nb[1]);
        }
    }
}

std::vector<uint8_t> read_rows(llama_kv_cache & kv, uint32_t stream, uint32_t index) {
    std::vector<uint8_t> rows;
    each_part(kv, stream, index, [&](ggml_tensor * t, size_t offset, size_t size, size_t n, size_t stride) {
        const size_t at = rows.size();
        rows.resize(at + n*size);
        ggml_backend_tensor_get_2d(t, rows.data() + at, offset, size, n, stride, size);
    });
    return rows;
}

void write_rows(llama_kv_cache & kv, uint32_t stream, uint32_t index, const std::vector<uint8_t> & rows) {
    size_t at = 0;
    each_part(kv, stream, index, [&](ggml_tensor * t, size_t offset, size_t size, size_t n, size_t stride) {
        ggml_backend_tensor_set_2d(t, rows.data() + at, offset, size, n, stride, size);
        at += n*size;
    });
}

// One cache of the context while a sequence is parked.
//
// llama_kv_cells keeps positions in trees. On a GPU, copying or changing the trees takes longer than an experiment of a few
// tokens. Therefore cells that stay are touched as little as possible, and not at all if nothing is hidden.
struct parked_cache {
    llama_kv_cache * kv;
    uint32_t head;
    bool is_window; // all cells are guarded, since cells that left the window are overwritten
    std::vector<bool> in_use;
    std::unique_ptr<llama_kv_cells> before; // state to restore in the end, even after a partial failure; NULL if nothing was changed
    std::vector<evicted_cell> evicted;

    parked_cache(llama_kv_cache * kv, llama_seq_id seq, bool is_window) :
        kv(kv), head(head_of(*kv, seq)), is_window(is_window), in_use(kv->get_size()) {
        const llama_kv_cells & cells = kv->get_cells(seq);
        for (uint32_t i = 0; i < cells.size(); ++i) {
            in_use[i] = !cells.is_empty(i);
        }
        if (is_window) {
            before = std::make_unique<llama_kv_cells>(cells);
        }
    }

    // Guards the cells of `seq` at positions p0..p1; in a window cache, all cells in use.
    void guard(llama_seq_id seq, llama_pos p0, llama_pos p1) {
        llama_kv_cells & cells = cells_of(*kv, seq);
        if (!before) {
            before = std::make_unique<llama_kv_cells>(cells);
        }
        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (cells.is_empty(i) || cells.seq_has(i, GUARD)) {
                continue;
            }
            if (is_window || (cells.seq_has(i, seq) && cells.pos_in(i, p0, p1))) {
                cells.seq_add(i, GUARD);
            }
        }
    }

    bool came_in(const llama_kv_cells & cells, uint32_t i) const {
        return !cells.is_empty(i) && (is_window ? !cells.seq_has(i, GUARD) : !in_use[i]);
    }

    void reset(llama_seq_id seq) {
        llama_kv_cells & cells = cells_of(*kv, seq);
        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (came_in(cells, i)) {
                cells.rm(i);
            } else if (before && !cells.is_empty(i) && before->seq_has(i, seq) && !cells.seq_has(i, seq)) {
                cells.seq_add(i, seq);
            }
        }
        head_of(*kv, seq) = head;
    }

    // Evicts cells outside the window of their sequence's newest token and all later ones, oldest first, until `n` cells are
    // free.
    void make_room(const llama_hparams & hparams, llama_seq_id seq, uint32_t n) {
        llama_kv_cells & cells = cells_of(*kv, seq);
        const uint32_t free = cells.size() - cells.get_used();
        if (free >= n) {
            return;
        }
        std::vector<uint32_t> outside;
        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (cells.is_empty(i) || cells.seq_count(i) != 1) {
                continue;
            }
            const llama_pos newest = cells.seq_pos_max(cells.seq_get(i));
            if (llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, cells.pos_get(i), newest)) {
                outside.push_back(i);
            }
        }
        const size_t count = std::min<size_t>(n - free, outside.size());
        std::sort(outside.begin(), outside.end(),
            [&](uint32_t a, uint32_t b) { return cells.pos_get(a) < cells.pos_get(b); });
        outside.resize(count);
        evicted.reserve(count);
        for (const uint32_t i : outside) {
            evicted.push_back({
                i, read_rows(*kv, kv->get_stream(seq), i) });
        }
        // from here on nothing can fail
        for (const uint32_t i : outside) {
            cells.rm(i);
        }
    }

    // Restores the cells and evicted rows. Restoring the cells allocates no memory.
    void bring_back(llama_seq_id seq) {
        llama_kv_cells & cells = cells_of(*kv, seq);
        if (before) {
            cells = std::move(*before);
        }
        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (!cells.is_empty(i) && !in_use[i]) {
                cells.rm(i);
            }
        }
        head_of(*kv, seq) = head;
        for (const auto & cell : evicted) {
            write_rows(*kv, kv->get_stream(seq), cell.index, cell.rows);
        }
    }
};

} // namespace

struct gvote_shim_parked {
    llama_context * ctx;
    llama_seq_id seq;
    std::vector<parked_cache> caches; // the attention cache first

    void let_go() {
        for (auto & cache : caches) {
            cache.bring_back(seq);
        }
    }
};

const char * gvote_shim_park(llama_context * ctx, llama_seq_id seq, uint32_t n_window, gvote_shim_parked ** out) {
    return guarded([&]() -> const char * {
        if (base_cache(ctx) == nullptr || !has_sequence(*base_cache(ctx), seq)) {
            return "no such sequence in an attention cache";
        }
        llama_synchronize(ctx);
        auto parked = std::make_unique<gvote_shim_parked>();
        parked->ctx = ctx;
        parked->seq = seq;
        for (llama_kv_cache * kv : { base_cache(ctx), window_cache(ctx) }) {
            if (kv != nullptr) {
                parked->caches.emplace_back(kv, seq, !parked->caches.empty());
            }
        }
        try {
            if (parked->caches.size() > 1) {
                parked->caches[1].make_room(ctx->get_model().hparams, seq, n_window);
                parked->caches[1].guard(seq, 0, 0);
            }
        } catch (...) {
            parked->let_go();
            throw;
        }
        *out = parked.release();
        return nullptr;
    });
}

const char * gvote_shim_parked_hide(gvote_shim_parked * parked, llama_pos p0, llama_pos p1, bool window) {
    return guarded([&]() -> const char * {
        const llama_pos end = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
        parked->caches[0].guard(parked->seq, p0, end);
        for (auto & cache : parked->caches) {
            cache.kv->seq_rm(parked->seq, p0, p1);
            if (!window) {
                break;
            }
        }
        return nullptr;
    });
}

const char * gvote_shim_parked_reset(gvote_shim_parked * parked) {
    return guarded([&]() -> const char * {
        // an aborted batch may still be writing
        llama_synchronize(parked->ctx);
        for (auto & cache : parked->caches) {
            cache.reset(parked->seq);
        }
        return nullptr;
    });
}

void gvote_shim_unpark(gvote_shim_parked * parked) {
    guarded([&]() -> const char * {
        llama_synchronize(parked->ctx);
        return nullptr;
    });
    guarded([&]() -> const char * {
        parked->let_go();
        return nullptr;
    });
    delete parked;
}
