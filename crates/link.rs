//! The build script of what is linked with the library `gvote`: which llama.cpp that is, and where programs find it.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=../link.rs");
    // what the library's own build script says
    let said = |what: &str| env::var(format!("DEP_GVOTE_SHIM_{what}"));
    for (name, what) in [("GVOTE_LLAMA_VERSION", "LLAMA_VERSION"), ("GVOTE_LLAMA_SOURCE", "LLAMA_SOURCE")] {
        println!("cargo:rustc-env={name}={}", said(what).expect("the library names its llama.cpp"));
    }
    if let Ok(rpath) = said("RPATH") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{rpath}");
    }
}
