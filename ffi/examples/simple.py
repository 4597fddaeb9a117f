#!/usr/bin/env python3
"""simple.c without a compiler: reads a document, compresses, answers. Only Python's own ctypes is used.

    python3 simple.py PREFIX/lib/libgvote.so MODEL.gguf DOCUMENT.txt QUESTION

The structs follow llama.h and gvote.h of the versions that this was written for, and those are compared first.
"""

import ctypes as c
import sys

N_BATCH, N_ANSWER = 512, 64
p, i32, u32, f32, flag, size_t = c.c_void_p, c.c_int32, c.c_uint32, c.c_float, c.c_bool, c.c_size_t


def struct(name, **fields):
    """Each keyword is a type, its value the fields of that type that follow one another."""
    types = {"p": p, "i": i32, "u": u32, "f": f32, "b": flag, "z": size_t, "s": c.c_char_p, "d": c.c_double, "U": c.c_uint64}
    members = [(field, types[key[0]]) for key, names in fields.items() for field in names.split()]
    return type(name, (c.Structure,), {"_fields_": members})


ModelParams = struct(
    "llama_model_params",
    p1="devices tensor_buft_overrides",
    i1="n_gpu_layers split_mode load_mode lazy_mode main_gpu",
    p2="tensor_split progress_callback progress_callback_user_data kv_overrides",
    b1="vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp",
)
ContextParams = struct(
    "llama_context_params",
    u1="n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq",
    i1="n_threads n_threads_batch ctx_type rope_scaling_type pooling_type attention_type flash_attn_type",
    f1="rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow",
    u2="yarn_orig_ctx",
    f2="defrag_thold",
    p1="cb_eval cb_eval_user_data",
    i2="type_k type_v",
    z1="moe_cache_size",
    p2="abort_callback abort_callback_data",
    b1="embeddings offload_kqv no_perf op_offload swa_full kv_unified",
    p3="samplers",
    z2="n_samplers",
    p4="ctx_other",
)
Batch = struct("llama_batch", i1="n_tokens", p1="token embd pos n_seq_id seq_id logits")
Message = struct("llama_chat_message", s1="role content")


class Report(c.Structure):
    _fields_ = [("size", size_t), ("policy", u32), ("bound", u32), ("cells_before", u32), ("cells_after", u32)]
    _fields_ += [("kv_bytes_before", c.c_uint64), ("kv_bytes_after", c.c_uint64), ("lost_mass", f32), ("rounding", f32)]
    _fields_ += [("n_tried", u32), ("tried", u32 * 16), ("reserved", u32), ("compute_bytes", c.c_uint64)]
    _fields_ += [("seconds", c.c_double * 6)]


def load(path):
    """The library; names of llama.cpp are found through it, in the shared llama.cpp that it links."""
    lib = c.CDLL(path)
    pointers = "gvote_new llama_model_load_from_file llama_init_from_model llama_model_get_vocab llama_sampler_init_greedy"
    for name in pointers.split():
        getattr(lib, name).restype = p
    for name in "gvote_version gvote_llama_version gvote_last_error llama_model_chat_template".split():
        getattr(lib, name).restype = c.c_char_p
    lib.llama_model_default_params.restype = ModelParams
    lib.llama_context_default_params.restype = ContextParams
    lib.llama_batch_get_one.restype = Batch
    lib.llama_vocab_is_eog.restype = flag
    if (lib.gvote_version(), lib.gvote_llama_version()) != (b"0.1.0", b"0.8.0"):
        sys.exit("error: the structs in this file are those of gvote 0.1.0 and llama.cpp 0.8.0")
    return lib


def make_prompt(lib, model, vocab, text):
    """Tokens of one message of a user, in the words of the model's template."""
    buffer = c.create_string_buffer(2 * len(text) + 1024)
    template = lib.llama_model_chat_template(p(model), None)
    n = lib.llama_chat_apply_template(template, c.byref(Message(b"user", text)), size_t(1), flag(True), buffer, len(buffer))
    if not 0 <= n <= len(buffer):
        sys.exit("error: the model has no chat template that llama.cpp knows")
    tokens = (i32 * (n + 8))()  # a token has a character at least
    n = lib.llama_tokenize(p(vocab), buffer, n, tokens, len(tokens), flag(True), flag(True))
    return tokens[:n]


def decode(lib, ctx, tokens):
    for i in range(0, len(tokens), N_BATCH):
        n = min(N_BATCH, len(tokens) - i)
        part = (i32 * n)(*tokens[i : i + n])  # the batch points to it
        if lib.llama_decode(p(ctx), lib.llama_batch_get_one(part, n)) != 0:
            sys.exit("error: llama_decode failed")


def main():
    if len(sys.argv) != 5:
        sys.exit("usage: simple.py PREFIX/lib/libgvote.so MODEL.gguf DOCUMENT.txt QUESTION")
    lib = load(sys.argv[1])
    # a callback lives as long as somebody may call it
    quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, p)(lambda level, text, data: None)
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(sys.argv[2].encode(), lib.llama_model_default_params())
    if not model:
        sys.exit(f"error: cannot load {sys.argv[2]}")
    vocab = lib.llama_model_get_vocab(p(model))
    with open(sys.argv[3], "rb") as file:
        prompt = make_prompt(lib, model, vocab, file.read() + b"\n\n" + sys.argv[4].encode())

    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch = len(prompt) + N_ANSWER + 256, N_BATCH  # a vote borrows free cells
    ctx = lib.llama_init_from_model(p(model), params)
    g = lib.gvote_new(None, None)
    if not ctx or not g or lib.gvote_attach(p(g), p(ctx)) != 0:
        sys.exit(f"error: cannot make a context: {lib.gvote_last_error(p(g)).decode()}")
    decode(lib, ctx, prompt)

    report = Report(size=c.sizeof(Report))
    if lib.gvote_compress(p(g), p(ctx), 0, c.byref(report)) != 0:
        sys.exit(f"error: gvote: {lib.gvote_last_error(p(g)).decode()}")
    print(f"cells: {report.cells_before} -> {report.cells_after}", file=sys.stderr)

    sampler = lib.llama_sampler_init_greedy()
    piece = c.create_string_buffer(256)
    for _ in range(N_ANSWER):
        token = lib.llama_sampler_sample(p(sampler), p(ctx), -1)
        if lib.llama_vocab_is_eog(p(vocab), token):
            break
        n = lib.llama_token_to_piece(p(vocab), token, piece, len(piece), 0, flag(False))
        sys.stdout.buffer.write(piece.raw[: max(n, 0)])
        decode(lib, ctx, [token])
    print(flush=True)

    lib.llama_sampler_free(p(sampler))
    lib.llama_free(p(ctx))
    lib.gvote_free(p(g))
    lib.llama_model_free(p(model))
    lib.llama_backend_free()


main()
