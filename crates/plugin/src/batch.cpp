// What is in a llama_batch_ext: its tokens have no public accessors.

#include "llama-batch.h"

extern "C" {

// As `Row` in batch.rs.
struct gvote_plugin_row {
    int32_t seq;
    int32_t pos;
    bool    output;
};

// Calls `each` for every token and every sequence that it belongs to.
void gvote_plugin_rows(const llama_batch_ext * batch, void (*each)(const gvote_plugin_row *, void *), void * data) {
    for (const auto & token : batch->tokens) {
        for (const llama_seq_id seq : token.seq_ids) {
            const gvote_plugin_row row = { seq, token.pos[0], token.output };
            each(&row, data);
        }
    }
}

}
