"""Opens a libllama.so as Python programs do, and calls it. Lines that begin with "same" hold whatever votes do.

usage: api.py LIBRARY HEADER MODEL
"""

import ctypes
import hashlib
import re
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_int8, c_uint32, c_uint8, c_void_p

N_PROMPT, N_ANSWER = 600, 24


class ModelParams(ctypes.Structure):
    # larger than any version's
    _fields_ = [("rest", c_uint8 * 512)]


class ContextParams(ctypes.Structure):
    _fields_ = [("n_ctx", c_uint32), ("n_batch", c_uint32), ("rest", c_uint8 * 504)]


class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32))]
    _fields_ += [("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8))]


lib = ctypes.CDLL(sys.argv[1])
for name in set(re.findall(r"^ *LLAMA_API [^;]*?\b(llama_\w+)\s*\(", open(sys.argv[2]).read(), re.MULTILINE)):
    getattr(lib, name)


def function(name, result, *arguments):
    found = getattr(lib, name)
    found.restype, found.argtypes = result, arguments
    return found


load = function("llama_model_load_from_file", c_void_p, c_char_p, ModelParams)
init = function("llama_init_from_model", c_void_p, c_void_p, ContextParams)
one = function("llama_batch_get_one", Batch, POINTER(c_int32), c_int32)
decode_batch = function("llama_decode", c_int32, c_void_p, Batch)
logits_at = function("llama_get_logits_ith", POINTER(c_float), c_void_p, c_int32)
memory_of = function("llama_get_memory", c_void_p, c_void_p)
remove = function("llama_memory_seq_rm", c_bool, c_void_p, c_int32, c_int32, c_int32)
n_tokens_of = function("llama_vocab_n_tokens", c_int32, c_void_p)
vocab_of = function("llama_model_get_vocab", c_void_p, c_void_p)

function("llama_backend_init", None)()
function("llama_log_set", None, c_void_p, c_void_p)(None, None)
model = load(sys.argv[3].encode(), function("llama_model_default_params", ModelParams)())
n_vocab = n_tokens_of(vocab_of(model))
params = function("llama_context_default_params", ContextParams)()
params.n_ctx, params.n_batch = 2048, 2048
ctx = init(model, params)


def decode(first, end):
    tokens = (c_int32 * (end - first))(*(100 + (pos * 7919 + 13) % (n_vocab - 200) for pos in range(first, end)))
    assert decode_batch(ctx, one(tokens, len(tokens))) == 0


def tell(label):
    print(label, hashlib.sha256(ctypes.string_at(logits_at(ctx, -1), 4 * n_vocab)).hexdigest())


decode(0, N_PROMPT)
tell("same prompt")
for pos in range(N_PROMPT, N_PROMPT + N_ANSWER):
    decode(pos, pos + 1)
tell("answer")
print("same cut", remove(memory_of(ctx), 0, N_PROMPT // 2, -1))
decode(N_PROMPT // 2, N_PROMPT)
tell("same prompt again")
function("llama_free", None, c_void_p)(ctx)
function("llama_model_free", None, c_void_p)(model)
