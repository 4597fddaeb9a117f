//! Finds llama.cpp, builds it (cmake), compiles the shim (cc), generates bindings (bindgen), and links.

use std::cell::RefCell;
use std::env;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use bindgen::FieldVisibilityKind;
use bindgen::callbacks::{FieldInfo, ParseCallbacks};

/// GPU back ends: cargo feature, cmake option, static library, and the libraries that it needs.
const BACKENDS: &[(&str, &str, &str, &[&str])] = &[
    ("CUDA", "GGML_CUDA", "ggml-cuda", &["cudart", "cublas", "cublasLt", "cuda"]),
    ("VULKAN", "GGML_VULKAN", "ggml-vulkan", &["vulkan"]),
    ("METAL", "GGML_METAL", "ggml-metal", &[]),
];

fn main() {
    for file in ["build.rs", "ffi", "vendor/Cargo.toml", "vendor/Cargo.lock"] {
        println!("cargo:rerun-if-changed={file}");
    }
    for var in [
        "LLAMA_CPP_DIR",
        "LLAMA_LIB_DIR",
        "GVOTE_NATIVE",
        "GVOTE_OPENMP",
        "GVOTE_RPATH",
        "GVOTE_SANITIZE",
        "GVOTE_SHARED",
        "CUDA_PATH",
    ] {
        println!("cargo:rerun-if-env-changed={var}");
    }
    let source = find_llama();
    let [llama, ggml] = [("CMakeLists.txt", "LLAMA"), ("ggml/CMakeLists.txt", "GGML")].map(|(file, prefix)| {
        version_of(&source.join(file), prefix).unwrap_or_else(|| fail(&format!("{file} of llama.cpp names no version")))
    });
    let libraries = built_llama(&llama).unwrap_or_else(|| build_llama(&source));
    list_context_members(&source);
    compile_shim(&source, &llama);
    generate_bindings(&source);
    link(&libraries);
    println!("cargo:rustc-env=GVOTE_LLAMA_VERSION={llama}");
    println!("cargo:rustc-env=GVOTE_GGML_VERSION={ggml}");
    // used by tests that change parts of the source
    println!("cargo:rustc-env=GVOTE_LLAMA_SOURCE={}", source.display());
    // used by the build scripts of crates that link this one: crates/link.rs
    println!("cargo:llama_version={llama}");
    println!("cargo:llama_source={}", source.display());
}

/// Returns the llama.cpp source: a checkout named by the environment, or the one in vendor/, or the pinned package.
fn find_llama() -> PathBuf {
    let source = if let Some(dir) = env::var_os("LLAMA_CPP_DIR") {
        PathBuf::from(dir)
    } else if Path::new("vendor/llama.cpp").is_dir() {
        fs::canonicalize("vendor/llama.cpp").expect("the folder is there")
    } else {
        return pinned_llama();
    };
    if !source.join("include/llama.h").is_file() {
        fail(&format!("{} is not a llama.cpp checkout (no include/llama.h)", source.display()));
    }
    println!("cargo:rerun-if-changed={}", source.display());
    source
}

/// Asks cargo for the path of the pinned package. Downloads the package on the first build only.
fn pinned_llama() -> PathBuf {
    let metadata = |offline: &[&str]| {
        Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["metadata", "--manifest-path", "vendor/Cargo.toml", "--locked", "--format-version", "1"])
            .args(offline)
            .output()
            .expect("cargo runs this script, so it can be run")
    };
    let mut output = metadata(&["--offline"]);
    if !output.status.success() {
        output = metadata(&[]);
    }
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        fail(&format!("cargo cannot fetch the pinned llama.cpp (vendor/Cargo.toml): {stderr}"));
    }
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let manifest = json["packages"]
        .as_array()
        .and_then(|packages| packages.iter().find(|p| p["name"] == "llama-cpp-sys-2"))
        .and_then(|package| package["manifest_path"].as_str())
        .expect("vendor/Cargo.toml depends on the package");
    Path::new(manifest).with_file_name("llama.cpp")
}

/// Returns the folder of existing shared libraries named by the environment. They must be built from the checkout that the environment
/// names, of this version.
fn built_llama(version: &str) -> Option<PathBuf> {
    let dir = PathBuf::from(env::var_os("LLAMA_LIB_DIR")?);
    if env::var_os("LLAMA_CPP_DIR").is_none() {
        fail("LLAMA_LIB_DIR needs LLAMA_CPP_DIR beside it: the source that those libraries were built from");
    }
    let file = format!("{}llama{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    let Ok(library) = fs::canonicalize(dir.join(&file)) else {
        fail(&format!("there is no {file} in LLAMA_LIB_DIR={}", dir.display()));
    };
    // on Linux the link leads to a file with the version in its name, as in libllama.so.1.2.3; without one, gvote_new() checks the version
    let named = library.to_string_lossy().rsplit_once(".so.").map(|(_, version)| version.to_owned());
    if let Some(named) = named.filter(|named| named != version) {
        fail(&format!("{} is llama.cpp {named}, but the source in LLAMA_CPP_DIR is {version}", library.display()));
    }
    fs::canonicalize(dir).ok()
}

/// cmake settings of every build: only llama.cpp's libraries, and RPC over plain sockets.
const SETTINGS: &[(&str, &str)] = &[
    ("LLAMA_BUILD_COMMON", "OFF"),
    ("LLAMA_BUILD_TOOLS", "OFF"),
    ("LLAMA_BUILD_TESTS", "OFF"),
    ("LLAMA_BUILD_EXAMPLES", "OFF"),
    ("LLAMA_BUILD_SERVER", "OFF"),
    ("LLAMA_BUILD_APP", "OFF"),
    ("CMAKE_POSITION_INDEPENDENT_CODE", "ON"),
    ("CMAKE_INSTALL_LIBDIR", "lib"),
    ("GGML_RPC", "ON"),
    ("GGML_RPC_RDMA", "OFF"),
];

/// Extensions that ggml's cmake enables on x86 unless it builds for the build machine's own CPU.
const X86_EXTENSIONS: &[&str] = &["SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C"];

/// Returns compiler flags for the sanitizers named by the environment, such as `address,undefined`. Builds with sanitizers are not
/// optimised: optimising the checks is slow to compile, and unoptimised code leaves more to check. Assertions stay off, as in releases.
fn sanitizer_flags() -> Vec<String> {
    let Ok(kinds) = env::var("GVOTE_SANITIZE") else { return Vec::new() };
    let flags =
        ["-O0", "-g1", "-DNDEBUG", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"].map(Into::into);
    [vec![format!("-fsanitize={kinds}")], flags.to_vec()].concat()
}

/// Builds the libraries in a folder that all profiles share. Returns where they were installed.
fn build_llama(source: &Path) -> PathBuf {
    if which("cmake").is_none() {
        fail("cmake is missing; on Debian: apt-get install cmake");
    }
    let compiler = match cc::Build::new().cpp(true).try_get_compiler() {
        Ok(compiler) if which(&compiler.path().to_string_lossy()).is_some() => compiler,
        _ => fail("a C++ compiler is missing; on Debian: apt-get install g++"),
    };
    let native = is_on("GVOTE_NATIVE");
    let openmp = is_on("GVOTE_OPENMP");
    let shared = is_shared();

    // OUT_DIR is <target>/<profile>/build/gvote-<hash>/out
    let out = out_dir();
    let target = out.ancestors().nth(4).expect("OUT_DIR lies deep inside the target folder");
    // one folder per source and settings, so that another checkout or pin gets its own build
    let mut hasher = DefaultHasher::new();
    (source, SETTINGS).hash(&mut hasher);
    let mut name = format!("llama.cpp-{:08x}", hasher.finish() as u32);
    if !native {
        name += "-generic";
    }
    if !openmp {
        name += "-no-openmp";
    }
    if let Ok(kinds) = env::var("GVOTE_SANITIZE") {
        name = name + "-" + &kinds.replace(',', "-");
    }
    if shared {
        name += "-shared";
    }
    for (feature, ..) in enabled_backends() {
        name = name + "-" + &feature.to_lowercase();
    }
    let dir = target.join(name);
    fs::create_dir_all(&dir).expect("the target folder can be written");
    // two cargo processes with different profiles may build at the same time
    let lock = File::create(dir.join("lock")).expect("the target folder can be written");
    lock.lock().expect("a fresh file can be locked");

    let mut config = cmake::Config::new(source);
    config.out_dir(&dir).profile("Release").always_configure(false);
    if which("ninja").is_some() {
        config.generator("Ninja");
    }
    for flag in sanitizer_flags() {
        // the only profile whose flags do not contradict these
        config.profile("Debug").cflag(&flag).cxxflag(&flag);
    }
    for (name, value) in SETTINGS {
        config.define(name, value);
    }
    config
        .define("BUILD_SHARED_LIBS", if shared { "ON" } else { "OFF" })
        .define("GGML_NATIVE", if native { "ON" } else { "OFF" })
        .define("GGML_OPENMP", if openmp { "ON" } else { "OFF" });
    if !native {
        for extension in X86_EXTENSIONS {
            config.define(format!("GGML_{extension}"), "OFF");
        }
    }
    for (_, option, ..) in enabled_backends() {
        config.define(option, "ON");
    }
    if shared {
        // the libraries find each other wherever they are installed together
        let here = if cfg!(target_os = "macos") { "@loader_path" } else { "$ORIGIN" };
        config.define("CMAKE_INSTALL_RPATH", here);
    }
    if compiler.is_like_gnu() && gcc_major(&compiler) == Some(12) {
        // gcc 12 drops the stores before ldtilecfg in ggml-cpu/amx/mmq.cpp: SIGILL at the first batch on a CPU with AMX
        config.cxxflag("-fno-dse");
    }
    config.build().join("lib")
}

/// Whether llama.cpp is linked as shared libraries, which can be replaced by others of the same version without rebuilding gvote.
fn is_shared() -> bool {
    env::var_os("LLAMA_LIB_DIR").is_some() || env::var("GVOTE_SHARED").is_ok_and(|v| v == "1")
}

/// Whether a setting is on, which is the default; the environment turns it off with 0.
fn is_on(var: &str) -> bool {
    env::var(var).map_or(true, |v| v != "0")
}

fn enabled_backends()
-> impl Iterator<Item = &'static (&'static str, &'static str, &'static str, &'static [&'static str])> {
    BACKENDS.iter().filter(|(feature, ..)| env::var_os(format!("CARGO_FEATURE_{feature}")).is_some())
}

fn gcc_major(compiler: &cc::Tool) -> Option<u32> {
    let output = Command::new(compiler.path()).arg("-dumpversion").output().ok()?;
    String::from_utf8_lossy(&output.stdout).trim().split('.').next()?.parse().ok()
}

fn include_dirs(source: &Path) -> [PathBuf; 4] {
    ["include", "src", "ggml/include", "ggml/src"].map(|dir| source.join(dir))
}

/// Writes llama_context_members.h, the list of all members of llama_context. ffi/visit.cpp checks that it handles each of them.
fn list_context_members(source: &Path) {
    let members = Members::default();
    let mut builder = bindgen::Builder::default()
        .header_contents("llama-context.hpp", "#include \"llama-context.h\"\n")
        .clang_args(["-x", "c++", "-std=c++17"])
        .allowlist_type("llama_context")
        .allowlist_recursively(false)
        .with_codegen_config(bindgen::CodegenConfig::TYPES)
        .opaque_type("std::.*")
        .parse_callbacks(Box::new(members.clone()));
    for dir in include_dirs(source) {
        builder = builder.clang_arg(format!("-I{}", dir.display()));
    }
    generate(builder);
    let names = members.0.borrow();
    if names.is_empty() {
        fail("llama-context.h of llama.cpp declares no members of llama_context");
    }
    let list: String = names.iter().map(|name| format!(" \\\n    X({name})")).collect();
    let file = out_dir().join("llama_context_members.h");
    fs::write(file, format!("#define LLAMA_CONTEXT_MEMBERS(X){list}\n")).expect("OUT_DIR can be written");
}

/// Collects the names of llama_context's members while bindgen visits them.
#[derive(Clone, Debug, Default)]
struct Members(Rc<RefCell<Vec<String>>>);

impl ParseCallbacks for Members {
    fn field_visibility(&self, field: FieldInfo<'_>) -> Option<FieldVisibilityKind> {
        if field.type_name == "llama_context" {
            self.0.borrow_mut().push(field.field_name.to_owned());
        }
        None
    }
}

fn compile_shim(source: &Path, version: &str) {
    // version number as in ffi/versions.hpp: 10000*major + 100*minor + patch
    let number = version.split('.').fold(0, |sum, part| 100 * sum + part.parse::<u32>().expect("a number"));
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .flags(sanitizer_flags())
        .define("GVOTE_LLAMA_VERSION", number.to_string().as_str())
        .files(
            ["grammar", "park", "sampler", "shim", "state", "threads", "visit"].map(|name| format!("ffi/{name}.cpp")),
        )
        .include(out_dir())
        .includes(include_dirs(source))
        // llama.cpp's own headers cause warnings
        .warnings(false)
        .compile("gvote_shim");
}

fn generate_bindings(source: &Path) {
    let headers =
        "#include \"shim.h\"\n#include \"ggml-alloc.h\"\n#include \"ggml-backend.h\"\n#include \"ggml-cpu.h\"\n";
    let mut builder = bindgen::Builder::default()
        .header_contents("llama-ggml-shim.h", headers)
        .clang_arg("-Iffi")
        .allowlist_item("(llama|ggml|gvote_shim|LLAMA|GGML|GVOTE_SHIM)_.*")
        .prepend_enum_name(false)
        .layout_tests(false);
    for dir in include_dirs(source) {
        builder = builder.clang_arg(format!("-I{}", dir.display()));
    }
    write_bindings(builder, "bindings.rs");
    // this crate's own C interface: it uses the types of the header, see src/capi.rs
    let header = bindgen::Builder::default()
        .header("ffi/gvote.h")
        .allowlist_item("(gvote|GVOTE)_.*")
        .blocklist_type("llama_context|ggml_tensor|gvote_handle|gvote_t")
        .raw_line("use crate::capi::handle::gvote_t;")
        .raw_line("use crate::sys::{ggml_tensor, llama_context};")
        .generate_comments(false)
        .derive_default(true)
        .prepend_enum_name(false)
        .layout_tests(false);
    write_bindings(header, "gvote_h.rs");
}

fn write_bindings(builder: bindgen::Builder, name: &str) {
    generate(builder).write_to_file(out_dir().join(name)).expect("OUT_DIR can be written");
}

fn generate(builder: bindgen::Builder) -> bindgen::Bindings {
    // if libclang is missing, bindgen panics with a message that names no package
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| builder.generate()));
    match result {
        Ok(Ok(bindings)) => bindings,
        Ok(Err(error)) => fail(&format!("bindgen cannot read llama.cpp's headers: {error}")),
        Err(_) => fail("libclang is missing; on Debian: apt-get install libclang-dev"),
    }
}

fn out_dir() -> PathBuf {
    env::var_os("OUT_DIR").expect("cargo sets it").into()
}

fn link(libraries: &Path) {
    println!("cargo:rustc-link-search=native={}", libraries.display());
    let kind = if is_shared() { "dylib" } else { "static" };
    for lib in ["llama", "ggml", "ggml-cpu"] {
        println!("cargo:rustc-link-lib={kind}={lib}");
    }
    for (_, _, lib, needs) in enabled_backends() {
        println!("cargo:rustc-link-lib={kind}={lib}");
        for need in *needs {
            println!("cargo:rustc-link-lib={need}");
        }
    }
    if !is_shared() {
        // a shared libggml loads this library itself, if built with RPC
        println!("cargo:rustc-link-lib=static=ggml-rpc");
    }
    println!("cargo:rustc-link-lib={kind}=ggml-base");
    if let Ok(rpath) = env::var("GVOTE_RPATH") {
        // the libraries will be installed elsewhere
        println!("cargo:rustc-link-arg=-Wl,-rpath,{rpath}");
        println!("cargo:rpath={rpath}");
    } else if is_shared() {
        println!("cargo:rpath={}", libraries.display());
        // otherwise cargo would use the libraries in its target folder for tests
        if env::var_os("LLAMA_LIB_DIR").is_some() {
            println!("cargo:rustc-link-arg-tests=-Wl,-rpath,{}", libraries.display());
            println!("cargo:rustc-cdylib-link-arg=-Wl,-rpath,{}", libraries.display());
        }
    }
    let os = env::var("CARGO_CFG_TARGET_OS").expect("cargo sets it");
    if os == "linux" {
        // an installed library finds llama.cpp in a folder beside it, wherever both are installed
        println!("cargo:rustc-cdylib-link-arg=-Wl,-rpath,$ORIGIN/gvote");
        let major = env::var("CARGO_PKG_VERSION_MAJOR").expect("cargo sets it");
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libgvote.so.{major}");
    }
    if os == "macos" {
        println!("cargo:rustc-link-lib=c++");
        for framework in ["Accelerate", "Foundation", "Metal", "MetalKit"] {
            println!("cargo:rustc-link-lib=framework={framework}");
        }
    } else {
        println!("cargo:rustc-link-lib=stdc++");
        if is_on("GVOTE_OPENMP") {
            println!("cargo:rustc-link-lib=gomp");
        }
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let cuda = env::var("CUDA_PATH").unwrap_or_else(|_| "/usr/local/cuda".into());
        println!("cargo:rustc-link-search=native={cuda}/lib64");
        println!("cargo:rustc-link-search=native={cuda}/lib64/stubs");
    }
}

/// Returns the version in a CMakeLists.txt of llama.cpp or ggml.
fn version_of(file: &Path, prefix: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let part = |name: &str| {
        let line = text.lines().find(|l| l.contains(&format!("set({prefix}_VERSION_{name}")))?;
        Some(line.split_whitespace().nth(1)?.trim_end_matches(')').to_owned())
    };
    Some(format!("{}.{}.{}", part("MAJOR")?, part("MINOR")?, part("PATCH")?))
}

fn which(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Path::new(program).is_file().then(|| program.into());
    }
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

fn fail(message: &str) -> ! {
    println!("cargo:warning={message}");
    eprintln!("error: {message}");
    std::process::exit(1);
}
