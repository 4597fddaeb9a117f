// Streaming of a sequence's state, and the tensors that identify a model.

#include "shim.hpp"

#include "llama-io.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace {

// Bytes of a tensor copied to host memory at once: large enough to make call overhead negligible, small compared to any cache.
constexpr size_t PIECE = 1 << 20;

struct stream_writer : llama_io_write_i {
    gvote_shim_write f;
    void * user_data;
    size_t n = 0;
    std::vector<uint8_t> piece;

    stream_writer(gvote_shim_write f, void * user_data) : f(f), user_data(user_data) {}

    void write(const void * src, size_t size) override {
        if (!f(src, size, user_data)) {
            throw std::runtime_error("not written");
        }
        n += size;
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        for (size_t done = 0; done < size; done += PIECE) {
            piece.resize(std::min(PIECE, size - done));
            ggml_backend_tensor_get(tensor, piece.data(), offset + done, piece.size());
            write(piece.data(), piece.size());
        }
    }

    size_t n_bytes() override {
        return n;
    }
};

struct stream_reader : llama_io_read_i {
    gvote_shim_read f;
    void * user_data;
    size_t n = 0;
    std::vector<uint8_t> piece;
    bool begins_recurrent = false; // the next bytes are the start of a recurrent state

    stream_reader(gvote_shim_read f, void * user_data) : f(f), user_data(user_data) {}

    void read(void * dst, size_t size) override {
        if (!f(dst, size, user_data)) {
            throw std::runtime_error("not read");
        }
        n += size;
        if (begins_recurrent) {
            // the state has one cell or none; llama.cpp ends the process for any other number
            uint32_t n_cells = 0;
            std::memcpy(&n_cells, dst, std::min(size, sizeof(n_cells)));
            if (n_cells > 1) {
                throw std::runtime_error("a recurrent state of several cells");
            }
            begins_recurrent = false;
        }
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        for (size_t done = 0; done < size; done += PIECE) {
            piece.resize(std::min(PIECE, size - done));
            read(piece.data(), piece.size());
            ggml_backend_tensor_set(tensor, piece.data(), offset + done, piece.size());
        }
    }

    size_t n_bytes() override {
        return n;
    }
};

void read_recurrent(llama_memory_recurrent * mem, stream_reader & io, llama_seq_id seq, llama_state_seq_flags flags) {
    io.begins_recurrent = true;
    mem->state_read(io, seq, flags);
}

void read_memory(llama_memory_i * mem, stream_reader & io, llama_seq_id seq, llama_state_seq_flags flags) {
    const bool is_whole = (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0;
    if (typeid(*mem) == typeid(llama_memory_recurrent)) {
        read_recurrent(static_cast<llama_memory_recurrent *>(mem), io, seq, flags);
    } else if (typeid(*mem) == typeid(llama_memory_hybrid)) {
        auto * hybrid = static_cast<llama_memory_hybrid *>(mem);
        if (is_whole) {
            hybrid->get_mem_attn()->state_read(io, seq, flags);
        }
        read_recurrent(hybrid->get_mem_recr(), io, seq, flags);
    } else if (typeid(*mem) == typeid(llama_memory_hybrid_iswa)) {
        auto * hybrid = static_cast<llama_memory_hybrid_iswa *>(mem);
        hybrid->get_mem_attn()->state_read(io, seq, flags);
        read_recurrent(hybrid->get_mem_recr(), io, seq, flags);
    } else {
        mem->state_read(io, seq, flags);
    }
}

// Calls f(cache) for every attention cache of a memory.
template <typename F>
void each_cache(llama_memory_i * mem, F && f) {
    if (typeid(*mem) == typeid(llama_kv_cache)) {
        f(*static_cast<llama_kv_cache *>(mem));
    } else if (typeid(*mem) == typeid(llama_kv_cache_iswa)) {
        f(*static_cast<llama_kv_cache_iswa *>(mem)->get_base());
        f(*static_cast<llama_kv_cache_iswa *>(mem)->get_swa());
    } else if (typeid(*mem) == typeid(llama_memory_hybrid)) {
        f(*static_cast<llama_memory_hybrid *>(mem)->get_mem_attn());
    } else if (typeid(*mem) == typeid(llama_memory_hybrid_iswa)) {
        each_cache(static_cast<llama_memory_hybrid_iswa *>(mem)->get_mem_attn(), f);
    }
}

// Drops a sequence with invalid positions. A state may contain positions below 0, or the largest number: llama.cpp accepts them
// but does not find such cells again to free them; -1 marks a free cell. If there are any, removes the whole sequence from the
// table of cells. Returns whether there were any.
bool drop_lost(llama_memory_i * mem, llama_seq_id seq) {
    bool found = false;
    each_cache(mem, [&](llama_kv_cache & kv) {
        llama_kv_cells & cells = cells_of(kv, seq);
        const auto & by_pos = cells.seq_pos_get(seq);
        const auto is_found = [](llama_pos pos) { return pos >= 0 && pos < std::numeric_limits<llama_pos>::max(); };
        if (by_pos.begin() == by_pos.end() || (is_found(by_pos.begin()->first) && is_found(by_pos.rbegin()->first))) {
            return;
        }
        found = true;
        try {
            cells = without(cells, seq);
        } catch (const std::bad_alloc &) {
            cells.reset(); // of all sequences: nothing less can be done without memory
        }
        head_of(kv, seq) = 0;
    });
    return found;
}

} // namespace

const char * gvote_shim_state_write(
        llama_context * ctx, llama_seq_id seq, llama_state_seq_flags flags, gvote_shim_write write, void * user_data) {
    return guarded([&]() -> const char * {
        llama_synchronize(ctx);
        stream_writer io(write, user_data);
        if (llama_get_memory(ctx) != nullptr) {
            llama_get_memory(ctx)->state_write(io, seq, flags);
        }
        return nullptr;
    });
}

const char * gvote_shim_state_read(
        llama_context * ctx, llama_seq_id seq, llama_state_seq_flags flags, gvote_shim_read read, void * user_data) {
    const bool is_whole = (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0;
    const char * failed = guarded([&]() -> const char * {
        llama_synchronize(ctx);
        stream_reader io(read, user_data);
        if (llama_get_memory(ctx) != nullptr) {
            if (is_whole) {
                // for a state without cells llama.cpp reads nothing, and would leave the existing cells
                llama_memory_seq_rm(llama_get_memory(ctx), seq, -1, -1);
            }
            read_memory(llama_get_memory(ctx), io, seq, flags);
        }
        return nullptr;
    });
    // a failed read may also have added cells
    const char * lost = guarded([&]() -> const char * {
        const bool found = llama_get_memory(ctx) != nullptr && drop_lost(llama_get_memory(ctx), seq);
        return found ? "the state has positions that no cell can have" : nullptr;
    });
    failed = failed != nullptr ? failed : lost;
    if (failed != nullptr) {
        guarded([&]() -> const char * {
            if (is_whole) {
                // of two caches, the first may already have been read
                llama_memory_seq_rm(llama_get_memory(ctx), seq, -1, -1);
            }
            mend(ctx);
            return nullptr;
        });
    }
    return failed;
}

const ggml_tensor * gvote_shim_model_tensor(const llama_model * model, uint32_t i, const char ** name) {
    if (i >= model->tensors_by_name.size()) {
        return nullptr;
    }
    *name = model->tensors_by_name[i].first.c_str();
    return model->tensors_by_name[i].second;
}
