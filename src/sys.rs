//! The generated bindings to llama.h, ggml.h, ggml-backend.h and `ffi/shim.h`. Private to the crate.
#![allow(dead_code, non_camel_case_types, non_snake_case, non_upper_case_globals, unnecessary_transmutes, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
