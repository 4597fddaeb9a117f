#!/usr/bin/env python3
"""simple.c without a compiler: reads a document, compresses, answers. Only Python's own ctypes is used.

    python3 simple.py PREFIX/lib/libgvote.so MODEL.gguf DOCUMENT.txt QUESTION

llama.cpp's structs are read from the llama.h that is installed beside the library: they differ between versions of llama.cpp.
"""

import ctypes as c
import re
import sys
from pathlib import Path

N_BATCH, N_ANSWER = 512, 64
p, i32, u32, f32, flag, size_t = c.c_void_p, c.c_int32, c.c_uint32, c.c_float, c.c_bool, c.c_size_t
TYPES = {"bool": flag, "float": f32, "int32_t": i32, "uint32_t": u32, "size_t": size_t, "enum": i32}


def struct(header, name):
    """A struct of a C header whose members are numbers, enums and pointers."""
    text = re.sub(r"//.*|/\*.*?\*/", "", header)
    body = re.search(rf"struct {name} \{{(.*?)\}}", text, re.DOTALL)[1]
    members = [re.search(r"(\w+).*?(\w+)$", line.strip(), re.DOTALL) for line in body.split(";")[:-1]]
    # what is no number and no enum is a pointer
    fields = [(m[2], p if "*" in m[0] else TYPES.get(m[1], p)) for m in members]
    return type(name, (c.Structure,), {"_fields_": fields})


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
    header = (Path(path).parent.parent / "include/gvote/llama.h").read_text()
    lib.llama_model_default_params.restype = struct(header, "llama_model_params")
    lib.llama_context_default_params.restype = struct(header, "llama_context_params")
    lib.llama_batch_get_one.restype = struct(header, "llama_batch")
    lib.llama_vocab_is_eog.restype = flag
    if lib.gvote_version() != b"0.1.0":
        sys.exit("error: the struct Report in this file is that of gvote 0.1.0")
    return lib


class Message(c.Structure):
    _fields_ = [("role", c.c_char_p), ("content", c.c_char_p)]


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
