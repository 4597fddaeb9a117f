//! Empty: this package exists for its manifest, which pins llama.cpp.
