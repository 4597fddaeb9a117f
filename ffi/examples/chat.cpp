// A chat: each line of the input is a turn. Before it is read, everything comes back; an answer that turns out to be long is voted
// on while it is written.
//
//     find_package(gvote REQUIRED)
//     add_executable(chat chat.cpp)
//     target_link_libraries(chat PRIVATE gvote::gvote)
//
//     ./chat MODEL.gguf [DOCUMENT.txt [VOTE_AFTER]]
//
// The document goes before the first question; VOTE_AFTER: after so many tokens of each answer.

#include <gvote.hpp>
#include <llama.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

static constexpr int n_ctx    = 4096;
static constexpr int n_batch  = 512;
static constexpr int n_answer = 64;

struct deleter {
    void operator()(llama_model * model) const { llama_model_free(model); }
    void operator()(llama_context * ctx) const { llama_free(ctx); }
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};
template <typename T> using owned = std::unique_ptr<T, deleter>;

template <typename T> static owned<T> need(T * made, const std::string & what) {
    if (made == nullptr) {
        throw std::runtime_error("cannot make " + what);
    }
    return owned<T>(made);
}

static std::string read_file(const char * path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error(std::string("cannot read ") + path);
    }
    return { std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>() };
}

// One turn of the user, in the words of the model's template.
static std::string format(const llama_model * model, const std::string & text) {
    const llama_chat_message message = { "user", text.c_str() };
    std::string out(2*text.size() + 1024, '\0');
    const int n = llama_chat_apply_template(
        llama_model_chat_template(model, nullptr), &message, 1, true, &out[0], static_cast<int>(out.size()));
    if (n < 0 || n > static_cast<int>(out.size())) {
        throw std::runtime_error("the model has no chat template that llama.cpp knows");
    }
    out.resize(n);
    return out;
}

static std::vector<llama_token> tokenize(const llama_vocab * vocab, const std::string & text, bool is_first) {
    std::vector<llama_token> tokens(text.size() + 8); // a token has a character at least
    const int n = llama_tokenize(
        vocab, text.data(), static_cast<int>(text.size()), tokens.data(), static_cast<int>(tokens.size()), is_first, true);
    if (n < 0) {
        throw std::runtime_error("cannot tokenize the turn");
    }
    tokens.resize(n);
    return tokens;
}

static void decode(llama_context * ctx, std::vector<llama_token> tokens) {
    for (std::size_t i = 0; i < tokens.size(); i += n_batch) {
        const int n = static_cast<int>(std::min<std::size_t>(n_batch, tokens.size() - i));
        if (llama_decode(ctx, llama_batch_get_one(&tokens[i], n)) != 0) {
            throw std::runtime_error("llama_decode failed: the cache is full?");
        }
    }
}

static void answer(gvote::handle & g, llama_context * ctx, const llama_vocab * vocab, llama_sampler * sampler) {
    const llama_pos start = llama_memory_seq_pos_max(llama_get_memory(ctx), 0) + 1;
    for (int i = 0;; ++i) {
        const llama_token token = i < n_answer ? llama_sampler_sample(sampler, ctx, -1) : llama_vocab_eot(vocab);
        if (const auto report = g.vote_if_due(ctx, 0, start)) {
            std::cerr << "cells: " << report->cells_before << " -> " << report->cells_after << std::endl;
        }
        decode(ctx, { token }); // the end of the turn belongs into the cache as well
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        char piece[256];
        std::cout.write(piece, std::max(0, llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, false)));
    }
    std::cout << std::endl;
}

static void chat(int argc, char ** argv) {
    if (argc < 2 || argc > 4) {
        throw std::runtime_error("usage: chat MODEL.gguf [DOCUMENT.txt [VOTE_AFTER]]");
    }
    const auto model = need(llama_model_load_from_file(argv[1], llama_model_default_params()), "a model");
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    std::string document = argc > 2 ? read_file(argv[2]) + "\n\n" : "";

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx   = n_ctx;
    cparams.n_batch = n_batch;
    const auto sampler = need(llama_sampler_init_greedy(), "a sampler");
    const auto ctx = need(llama_init_from_model(model.get(), cparams), "a context");

    gvote_params params = gvote_params_default();
    params.flags |= GVOTE_FLAG_PROTECT; // the template's markers stay, however many turns there are
    if (argc == 4) {
        params.when = GVOTE_WHEN_AFTER;
        params.vote_after = static_cast<std::uint32_t>(std::stoul(argv[3]));
    }
    gvote::handle g(params);
    g.attach(ctx.get());
    bool is_first = true;
    for (std::string line; std::getline(std::cin, line); is_first = false) {
        const std::string turn = format(model.get(), document + line);
        document.clear();
        const auto tokens = tokenize(vocab, is_first ? turn : "\n" + turn, is_first);
        if (!is_first) {
            g.expand(ctx.get(), 0, static_cast<std::uint32_t>(tokens.size()) + n_answer);
        }
        decode(ctx.get(), tokens);
        answer(g, ctx.get(), vocab, sampler.get());
    }
    g.detach(ctx.get()); // it goes before the context here
}

int main(int argc, char ** argv) {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            std::fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();
    int status = 0;
    try {
        chat(argc, argv);
    } catch (const std::exception & error) {
        std::cerr << "error: " << error.what() << std::endl;
        status = 1;
    }
    llama_backend_free();
    return status;
}
