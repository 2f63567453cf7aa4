# Two commands do everything: `make demo` and `make test`.
.PHONY: demo test lint bench audit help

# Figures to measure: grpc, index, eviction, nvme, restart, or several with commas.
FIGURES ?= grpc,index,eviction,nvme,restart
TARGET := $(or $(CARGO_TARGET_DIR),$(shell cargo metadata --no-deps --format-version 1 2>/dev/null | sed 's/.*"target_directory":"\([^"]*\)".*/\1/'),target)
# A folder on the disk that nvme and restart measure; needs 20 GiB.
DISK ?= $(TARGET)

help:
	@echo "make demo    run a real trace of LLM requests, kill -9 in the middle, every byte verified"
	@echo "make test    all tests"
	@echo "make lint    formatting, clippy, licences and sources of dependencies"
	@echo "make bench   measure the figures of benches/RESULTS.md (FIGURES=grpc for one group)"
	@echo "make audit   known vulnerabilities in dependencies (needs the network)"

demo:
	@scripts/setup.sh build
	@echo "Building (a few minutes the first time) ..."
	cargo build --release --locked --quiet --package kvstore
	@echo
	@echo "A production trace of LLM requests, as an engine would send it: look up, get the hits, put the rest."
	@echo "In the middle of it the daemon is killed with -9, and starts again."
	$(TARGET)/release/kvstore replay examples/conversation_slice.jsonl --block-bytes 64KiB --host-bytes 256MiB --nvme-bytes 4GiB --crash --verify
	@echo
	@echo "The same requests on metadata alone: the eviction policy beside LRU and the optimum."
	$(TARGET)/release/kvstore replay examples/conversation_slice.jsonl --simulate --capacity-blocks 5000

test:
	@scripts/setup.sh build nextest
	cargo test --locked --package kvstore-client --doc --quiet
	cargo nextest run --locked --workspace

lint:
	@scripts/setup.sh build lint deny
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- --deny warnings
	cargo deny --log-level error check bans licenses sources

audit:
	@scripts/setup.sh build deny
	cargo deny check advisories

bench:
	@scripts/setup.sh build redis fio
	cargo build --release --locked --quiet --package kvstore --package kvstore-benches
	$(TARGET)/release/kvstore-benches --figures $(FIGURES) --daemon $(TARGET)/release/kvstore --disk $(DISK) --write benches/RESULTS.md
