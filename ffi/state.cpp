// The state of a sequence as a stream, and what tells a model from another.

#include "shim.hpp"

#include "llama-io.h"

#include <algorithm>
#include <stdexcept>

namespace {

// Bytes of a tensor that are in host memory at once: large enough that a call costs nothing, small beside any cache.
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

    stream_reader(gvote_shim_read f, void * user_data) : f(f), user_data(user_data) {}

    void read(void * dst, size_t size) override {
        if (!f(dst, size, user_data)) {
            throw std::runtime_error("not read");
        }
        n += size;
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
                // of a state without cells llama.cpp reads nothing, and would leave what is there
                llama_memory_seq_rm(llama_get_memory(ctx), seq, -1, -1);
            }
            llama_get_memory(ctx)->state_read(io, seq, flags);
        }
        return nullptr;
    });
    if (failed != nullptr) {
        guarded([&]() -> const char * {
            if (is_whole) {
                // of two caches the first may have been read already
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
