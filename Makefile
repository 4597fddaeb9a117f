MODELS   ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/gvote/models
MODEL    ?= $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
# A document that every Debian machine has: about 5,000 tokens
DOC      ?= /usr/share/common-licenses/GFDL-1.3
QUESTION ?= Answer in one sentence: what is the purpose of this License?
# The demo: the smallest model that answers rightly, and a document of 2,800 tokens that every Debian machine has
DEMO_MODEL    ?= $(MODELS)/Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf
DEMO_DOC      ?= /usr/share/common-licenses/GPL-1
DEMO_QUESTION ?= For how long must a written offer to provide the source code be valid?
DEMO_ANSWER   ?= three years
# The requests of the gallery
EASY     ?= What must you do to convey a modified version?
HARD     ?= Summarise it in three points.
PREFIX   ?= /usr/local
PROFILE  ?= release
# Seconds of each fuzz target
FUZZ_S   ?= 600
# The llama.cpp of test-llama
LLAMA    ?= oldest
# A tree that can be copied anywhere
STAGE    ?= target/stage

.PHONY: help run test test-llama check-memory fuzz bench bench-cost bench-peers bench-busy bench-memory soak completion bench-completion \
        results gallery server test-server server-tests plugin cuda-kit doc stage install uninstall setup fmt lint clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: ## install what is needed, build, and compare an answer about a real document with the full cache's
	@scripts/install-prerequisites build
	@scripts/fetch-model qwen-0.5b --dir "$(MODELS)" >/dev/null & fetching=$$!; \
	    cargo build --release --locked || { kill $$fetching; exit 1; }; \
	    wait $$fetching
	@scripts/demo -m "$(DEMO_MODEL)" -f "$(DEMO_DOC)" -p "$(DEMO_QUESTION)" --expect "$(DEMO_ANSWER)"

test: setup ## run the whole test suite
	cargo test

test-llama: setup ## run the library's tests with another llama.cpp: LLAMA=VERSION names one of vendor/sources.json
	LLAMA_CPP_DIR="$$(scripts/fetch-llama $(LLAMA))" cargo test --lib

check-memory: setup ## run the C and C++ test programs under sanitizers and valgrind; TOOLS="address thread valgrind" picks some
	scripts/check-memory $(TOOLS)

fuzz: ## fuzz the readers of model files, settings, saved states and sessions, 10 minutes each (needs Rust nightly and cargo-fuzz)
	mkdir -p fuzz/target
	rustc --edition 2024 -o fuzz/target/seeds fuzz/seeds.rs
	fuzz/target/seeds fuzz/corpus/gguf
	cargo +nightly fuzz run gguf -- -max_total_time=$(FUZZ_S) -rss_limit_mb=1024
	cargo +nightly fuzz run capi -- -max_total_time=$(FUZZ_S) -rss_limit_mb=1024
	cargo +nightly fuzz run session -- -max_total_time=$(FUZZ_S) -rss_limit_mb=1024

bench: setup ## measure what a vote costs (long); for what it keeps see gvote eval
	cargo bench --bench cost

results: ## make docs/results.md from the run files in docs/results
	cargo build --release
	target/release/gvote eval report $(wildcard docs/results/*.jsonl) --baseline half --title "What was measured" \
	    --notes docs/results/notes.md -o docs/results.md

bench-cost: setup ## compare whole requests, short and long, with the full cache and with a vote at once (about an hour)
	cargo build --release
	scripts/bench-requests -m "$(MODEL)"

bench-peers: setup ## compare with llama.cpp's own llama-bench, in turns
	cargo build --release
	scripts/build-peers
	scripts/bench-peers -m "$(MODEL)" -f "$(DOC)"

bench-busy: setup ## measure what another busy process takes, beside llama.cpp's own llama-bench (long)
	cargo build --release
	scripts/build-peers
	scripts/bench-busy -m "$(MODEL)" -f "$(DOC)"

bench-memory: setup ## compare a cache smaller than the prompt with one that holds it all (about 40 minutes)
	cargo build --release
	scripts/bench-memory -m "$(MODEL)"

soak: setup ## generate 100,000 tokens in 2,048 cells: memory and speed must stay (about an hour)
	cargo bench --bench soak -- -m "$(MODEL)"

completion: setup stage ## build llama.cpp's own llama-completion, as it is and with GVote, in target/completion
	scripts/build-completion "$(STAGE)"

bench-completion: completion ## compare both: cells and speed, in turns
	scripts/bench-completion -m "$(MODEL)" -f "$(DOC)" -p "$(QUESTION)"

server: setup ## build llama.cpp's own llama-server, as it is, in target/server
	scripts/build-server

test-server: server ## run the tests of the plugin in llama-server, too
	cargo test -p gvote-plugin --test server -- --include-ignored

server-tests: server plugin ## run llama-server's own tests without the plugin, with it, and with votes, and compare (about an hour)
	scripts/server-tests

plugin: setup ## build what `gvote with` puts before a program's llama.cpp, in target/plugin; LLAMA=DIR: for the llama.cpp in DIR
	$(if $(filter command environment,$(firstword $(origin LLAMA))),LLAMA_CPP_DIR="$(LLAMA)") \
	    scripts/build-plugin --profile "$(PROFILE)"

gallery: setup ## draw the pictures of docs/gallery from two real votes
	cargo run --release --example gallery -- "$(MODEL)" docs/gallery \
	    /usr/share/common-licenses/GPL-3 "$(EASY)" /usr/share/common-licenses/Artistic "$(HARD)"

cuda-kit: setup ## pack what a bare CUDA machine needs to build, check and measure: benches/gpu/README.md
	scripts/cuda-kit

doc: ## build the documentation of the library
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

stage: ## build what install copies, in target/stage; llama-server too, where `make server` was run
	scripts/stage "$(STAGE)" --profile "$(PROFILE)"

install: stage ## install program, manual pages, completions, libraries and headers under PREFIX; SUDO=sudo copies as root, and builds as you
	@$(MAKE) --no-print-directory uninstall
	$(SUDO) install -d "$(DESTDIR)$(PREFIX)"
	$(SUDO) cp -dR --preserve=mode,timestamps "$(STAGE)/." "$(DESTDIR)$(PREFIX)/"

uninstall: ## remove what install has put under PREFIX
	@if cd "$(DESTDIR)$(PREFIX)/share/doc/gvote" 2>/dev/null && cd ../../..; then \
	    $(SUDO) xargs -d '\n' rm -f <share/doc/gvote/files; \
	    for dir in lib/gvote/server lib/gvote/python lib/gvote include/gvote lib/cmake/gvote share/doc/gvote; do \
	        [ ! -d "$$dir" ] || $(SUDO) rmdir "$$dir"; \
	    done; \
	fi

setup: ## install prerequisites, fetch sources and the default model
	@scripts/install-prerequisites
	@cargo fetch --locked --quiet
	@cargo fetch --locked --quiet --manifest-path vendor/Cargo.toml
	@scripts/fetch-model smollm2 --dir "$(MODELS)" >/dev/null

fmt: ## format the code
	cargo fmt --all

lint: ## formatting and clippy, warnings as errors
	cargo fmt --all --check
	cargo clippy --all-targets -- -D warnings

clean: ## remove everything that was built
	cargo clean
