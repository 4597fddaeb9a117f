// Token sampling as in llama.cpp's own programs: the sampler chain and grammar handling of common/sampling.cpp.

#include "shim.hpp"

#include "llama-cpp.h"

#include <cmath>
#include <vector>

// Number of candidates from which Mirostat 1 estimates, as in llama.cpp's programs.
static constexpr int32_t MIROSTAT_M = 100;
// Minimum number of candidates that a filter keeps; 0 allows it to leave a single one, as in llama.cpp's programs.
static constexpr size_t MIN_KEEP = 0;

struct gvote_shim_sampler {
    llama_sampler_ptr chain;
    llama_sampler_ptr grammar; // NULL: any text
    std::vector<llama_token_data> candidates;

    void add(llama_sampler * sampler) {
        llama_sampler_chain_add(chain.get(), sampler);
    }

    llama_token_data_array all_of(const float * logits, size_t n) {
        candidates.resize(n);
        for (size_t i = 0; i < n; ++i) {
            candidates[i] = { (llama_token) i, logits[i], 0.0f };
        }
        return { candidates.data(), n, -1, false };
    }

    llama_token choose(llama_token_data_array & array) {
        llama_sampler_apply(chain.get(), &array);
        const bool is_drawn = array.selected >= 0 && (size_t) array.selected < array.size;
        return is_drawn ? array.data[array.selected].id : LLAMA_TOKEN_NULL;
    }

    bool allows(llama_token token) {
        llama_token_data one = { token, 1.0f, 0.0f };
        llama_token_data_array array = { &one, 1, -1, false };
        llama_sampler_apply(grammar.get(), &array);
        return one.logit != -INFINITY;
    }
};

static void add_biases(gvote_shim_sampler & out, const llama_vocab * vocab, const gvote_shim_sampling & params) {
    std::vector<llama_logit_bias> biases(params.logit_bias, params.logit_bias + params.n_logit_bias);
    const int32_t n_vocab = llama_vocab_n_tokens(vocab);
    if (params.ignore_eos && llama_vocab_eos(vocab) != LLAMA_TOKEN_NULL) {
        for (llama_token token = 0; token < n_vocab; ++token) {
            if (llama_vocab_is_eog(vocab, token)) {
                biases.push_back({ token, -INFINITY });
            }
        }
    }
    int32_t n_suppress = 0;
    const llama_token * suppress = llama_vocab_get_suppress_tokens(vocab, &n_suppress);
    for (int32_t i = 0; i < n_suppress; ++i) {
        biases.push_back({ suppress[i], -INFINITY });
    }
    if (!biases.empty()) {
        out.add(llama_sampler_init_logit_bias(n_vocab, biases.size(), biases.data()));
    }
}

// Adds one step of the chain. Returns true if the step itself draws the token; such a step is added at the end.
static bool add_step(
        gvote_shim_sampler & out, const llama_vocab * vocab, const gvote_shim_sampling & p, gvote_shim_sampler_kind kind) {
    switch (kind) {
        case GVOTE_SHIM_SAMPLER_PENALTIES:
            out.add(llama_sampler_init_penalties(
                llama_vocab_n_tokens(vocab), p.penalty_last_n, p.penalty_repeat, p.penalty_freq, p.penalty_present));
            break;
        case GVOTE_SHIM_SAMPLER_DRY:
            out.add(llama_sampler_init_dry(
                vocab, p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_penalty_last_n,
                const_cast<const char **>(p.dry_sequence_breakers), p.n_dry_sequence_breakers));
            break;
        case GVOTE_SHIM_SAMPLER_TOP_N_SIGMA:
            out.add(llama_sampler_init_top_n_sigma(p.top_n_sigma));
            break;
        case GVOTE_SHIM_SAMPLER_TOP_K:
            out.add(llama_sampler_init_top_k(p.top_k));
            break;
        case GVOTE_SHIM_SAMPLER_TYPICAL_P:
            out.add(llama_sampler_init_typical(p.typical_p, MIN_KEEP));
            break;
        case GVOTE_SHIM_SAMPLER_TOP_P:
            out.add(llama_sampler_init_top_p(p.top_p, MIN_KEEP));
            break;
        case GVOTE_SHIM_SAMPLER_MIN_P:
            out.add(llama_sampler_init_min_p(p.min_p, MIN_KEEP));
            break;
        case GVOTE_SHIM_SAMPLER_XTC:
            out.add(llama_sampler_init_xtc(p.xtc_probability, p.xtc_threshold, MIN_KEEP, p.seed));
            break;
        case GVOTE_SHIM_SAMPLER_TEMPERATURE:
            out.add(llama_sampler_init_temp_ext(p.temp, p.dynatemp_range, p.dynatemp_exponent));
            break;
        case GVOTE_SHIM_SAMPLER_ADAPTIVE_P:
            return true;
    }
    return false;
}

const char * gvote_shim_sampler_new(
        const llama_vocab * vocab, const gvote_shim_sampling * params, gvote_shim_sampler ** out) {
    return guarded([&]() -> const char * {
        const gvote_shim_sampling & p = *params;
        if ((p.grammar != nullptr || p.dry_multiplier != 0.0f) && llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
            return "the model has no tokenizer, which a grammar and DRY need";
        }
        auto sampler = std::make_unique<gvote_shim_sampler>();
        sampler->chain.reset(llama_sampler_chain_init(llama_sampler_chain_default_params()));
        if (p.grammar != nullptr) {
            sampler->grammar.reset(llama_sampler_init_grammar(vocab, p.grammar, "root"));
            if (sampler->grammar == nullptr) {
                return "llama.cpp cannot work with the grammar";
            }
        }
        add_biases(*sampler, vocab, p);
        if (p.mirostat == 0) {
            bool is_adaptive = false;
            for (size_t i = 0; i < p.n_samplers; ++i) {
                is_adaptive |= add_step(*sampler, vocab, p, p.samplers[i]);
            }
            sampler->add(is_adaptive ? llama_sampler_init_adaptive_p(p.adaptive_target, p.adaptive_decay, p.seed)
                                     : llama_sampler_init_dist(p.seed));
        } else {
            sampler->add(llama_sampler_init_temp(p.temp));
            sampler->add(p.mirostat == 1
                ? llama_sampler_init_mirostat(
                    llama_vocab_n_tokens(vocab), p.seed, p.mirostat_tau, p.mirostat_eta, MIROSTAT_M)
                : llama_sampler_init_mirostat_v2(p.seed, p.mirostat_tau, p.mirostat_eta));
        }
        *out = sampler.release();
        return nullptr;
    });
}

void gvote_shim_sampler_free(gvote_shim_sampler * sampler) {
    delete sampler;
}

const char * gvote_shim_sampler_sample(gvote_shim_sampler * sampler, const float * logits, size_t n, llama_token * out) {
    return guarded([&]() -> const char * {
        llama_token_data_array array = sampler->all_of(logits, n);
        llama_token token = sampler->choose(array);
        if (token != LLAMA_TOKEN_NULL && sampler->grammar != nullptr && !sampler->allows(token)) {
            array = sampler->all_of(logits, n);
            llama_sampler_apply(sampler->grammar.get(), &array);
            token = sampler->choose(array);
            // llama.cpp aborts if it accepts an end token that the grammar does not allow
            if (token != LLAMA_TOKEN_NULL && !sampler->allows(token)) {
                return "the grammar allows no token here that the model has and the other settings leave";
            }
        }
        if (token == LLAMA_TOKEN_NULL) {
            return "the settings leave no token to draw";
        }
        if (sampler->grammar != nullptr) {
            llama_sampler_accept(sampler->grammar.get(), token);
        }
        llama_sampler_accept(sampler->chain.get(), token);
        *out = token;
        return nullptr;
    });
}

const char * gvote_shim_sampler_accept(gvote_shim_sampler * sampler, const llama_token * tokens, size_t n) {
    return guarded([&]() -> const char * {
        for (size_t i = 0; i < n; ++i) {
            llama_sampler_accept(sampler->chain.get(), tokens[i]);
        }
        return nullptr;
    });
}
