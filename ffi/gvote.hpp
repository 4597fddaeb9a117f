// gvote for C++17: the handle as an object, statuses as exceptions. Header only; gvote.h documents the calls.
//
//     gvote::handle g;
//     g.attach(ctx);
//     ...                                  // llama_decode(ctx, prompt)
//     gvote_report r = g.compress(ctx, 0); // throws gvote::error

#ifndef GVOTE_HPP
#define GVOTE_HPP

#include "gvote.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gvote {

// A status other than GVOTE_OK. what() is gvote_last_error().
class error : public std::runtime_error {
public:
    error(gvote_status status, const std::string & text) : std::runtime_error(text), status_(status) {}

    gvote_status status() const noexcept { return status_; }

private:
    gvote_status status_;
};

// Owns a gvote_t. Movable; threads and lifetimes as in gvote.h. Captures of its callbacks must outlive it.
class handle {
public:
    // Receives each log line; its exceptions are ignored.
    using log_function = std::function<void(gvote_log_level, const char *)>;
    // Called at each step of a vote; false or an exception cancels.
    using progress_function = std::function<bool(gvote_stage)>;

    explicit handle(const gvote_params & params = gvote_params_default()) : callbacks_(std::make_unique<callbacks>()) {
        gvote_status status = GVOTE_OK;
        g_.reset(gvote_new(&params, &status));
        if (!g_) {
            throw error(status, gvote_last_error(nullptr));
        }
    }

    // The C handle; this object keeps ownership.
    gvote_t * get() const noexcept { return g_.get(); }

    void set_params(const gvote_params & params) { check(gvote_set_params(get(), &params)); }

    gvote_params params() const {
        gvote_params params = gvote_params_default();
        check(gvote_get_params(get(), &params));
        return params;
    }

    void attach(llama_context * ctx) { check(gvote_attach(get(), ctx)); }
    void detach(llama_context * ctx) { check(gvote_detach(get(), ctx)); }

    // Sets an eval callback that is called beside gvote's; nullptr: none.
    void set_next_callback(gvote_eval_callback callback, void * user_data) {
        check(gvote_set_next_callback(get(), callback, user_data));
    }

    gvote_report compress(llama_context * ctx, std::int32_t seq) { return vote(gvote_compress, ctx, seq); }
    gvote_report plan(llama_context * ctx, std::int32_t seq) { return vote(gvote_plan, ctx, seq); }

    // Votes on the answer that began at position `start` if a vote is due, and returns its report; else std::nullopt.
    std::optional<gvote_report> vote_if_due(llama_context * ctx, std::int32_t seq, std::int32_t start) {
        bool has_voted = false;
        const auto call = [&](gvote_t * g, llama_context * c, std::int32_t s, gvote_report * report) {
            return gvote_vote_if_due(g, c, s, start, &has_voted, report);
        };
        const gvote_report report = vote(call, ctx, seq);
        return has_voted ? std::make_optional(report) : std::nullopt;
    }

    // `ahead`: the text still to come, or its end.
    gvote_report make_room(
            llama_context      * ctx,
            std::int32_t         seq,
            std::uint32_t        needed,
            const std::int32_t * ahead   = nullptr,
            std::size_t          n_ahead = 0) {
        const auto call = [=](gvote_t * g, llama_context * c, std::int32_t s, gvote_report * report) {
            return gvote_make_room(g, c, s, needed, ahead, n_ahead, report);
        };
        return vote(call, ctx, seq);
    }

    // Brings back what votes took out of the cache, as far as `needed` cells stay free. Returns the number of cells.
    std::uint32_t expand(llama_context * ctx, std::int32_t seq, std::uint32_t needed) {
        std::uint32_t n = 0;
        check(gvote_expand(get(), ctx, seq, needed, &n));
        return n;
    }

    std::uint32_t cells(llama_context * ctx, std::int32_t seq) const {
        std::uint32_t n = 0;
        check(gvote_seq_cells(get(), ctx, seq, &n));
        return n;
    }

    std::int32_t exact_from(llama_context * ctx, std::int32_t seq) const {
        std::int32_t pos = 0;
        check(gvote_seq_exact_from(get(), ctx, seq, &pos));
        return pos;
    }

    std::vector<std::int32_t> positions(
            llama_context * ctx, std::int32_t seq, std::int32_t layer, std::uint32_t head) const {
        std::vector<std::int32_t> out(cells(ctx, seq));
        check(gvote_seq_positions(
            get(), ctx, seq, layer, head, out.data(), static_cast<std::uint32_t>(out.size()), nullptr));
        return out;
    }

    // Protects positions p0 to p1 - 1 at later votes, or no longer; a negative p1 is the end of the sequence.
    void protect(llama_context * ctx, std::int32_t seq, std::int32_t p0, std::int32_t p1, bool stays = true) {
        check(gvote_seq_protect(get(), ctx, seq, p0, p1, stays));
    }

    void truncate(llama_context * ctx, std::int32_t seq, std::int32_t pos) {
        check(gvote_seq_truncate(get(), ctx, seq, pos));
    }

    std::vector<std::uint8_t> save(llama_context * ctx, std::int32_t seq) const {
        std::size_t size = 0;
        check(gvote_state_size(get(), ctx, seq, &size));
        std::vector<std::uint8_t> data(size);
        check(gvote_state_get(get(), ctx, seq, data.data(), data.size(), nullptr));
        return data;
    }

    void load(llama_context * ctx, std::int32_t seq, const std::vector<std::uint8_t> & data) {
        check(gvote_state_set(get(), ctx, seq, data.data(), data.size()));
    }

    // Any thread.
    void cancel() noexcept { (void) gvote_cancel(get()); }
    void cancel_clear() noexcept { (void) gvote_cancel_clear(get()); }

    // An empty function disables logging.
    void on_log(log_function f) {
        callbacks_->log = std::move(f);
        check(gvote_set_log_callback(get(), callbacks_->log ? log : nullptr, callbacks_.get()));
    }

    void on_progress(progress_function f) {
        callbacks_->progress = std::move(f);
        check(gvote_set_progress_callback(get(), callbacks_->progress ? progress : nullptr, callbacks_.get()));
    }

private:
    struct callbacks {
        log_function      log;
        progress_function progress;
    };

    struct free_handle {
        void operator()(gvote_t * g) const noexcept { gvote_free(g); }
    };

    static void log(gvote_log_level level, const char * text, void * data) {
        try {
            static_cast<callbacks *>(data)->log(level, text);
        } catch (...) {
            // C calls us
        }
    }

    static bool progress(gvote_stage stage, void * data) {
        try {
            return static_cast<callbacks *>(data)->progress(stage);
        } catch (...) {
            return false;
        }
    }

    void check(gvote_status status) const {
        if (status != GVOTE_OK) {
            throw error(status, gvote_last_error(get()));
        }
    }

    template <typename F> gvote_report vote(F && f, llama_context * ctx, std::int32_t seq) {
        gvote_report report = {};
        report.size = sizeof(report);
        check(f(get(), ctx, seq, &report));
        return report;
    }

    // destroyed after the handle that points to it
    std::unique_ptr<callbacks>              callbacks_;
    std::unique_ptr<gvote_t, free_handle>   g_;
};

} // namespace gvote

#endif // GVOTE_HPP
