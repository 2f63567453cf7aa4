# Two commands do everything: `make demo` and `make test`.
.PHONY: demo test soak test-models test-python test-engines python wheel lint bench bench-peers bench-router bench-engines engines audit help

# Figures to measure: grpc, index, eviction, nvme, restart, local, object, advise, routing, or several with commas.
FIGURES ?= grpc,index,eviction,nvme,restart,local,object,advise,routing
TARGET := $(or $(CARGO_TARGET_DIR),$(shell cargo metadata --no-deps --format-version 1 2>/dev/null | sed 's/.*"target_directory":"\([^"]*\)".*/\1/'),target)
# A folder on the disk that nvme and restart measure; needs 20 GiB.
DISK ?= $(TARGET)
# Python for the shims' tests, and for the peers that benches compare with.
VENV := $(TARGET)/python
PYTHON_SOURCES := shims/python shims/tests benches examples
PEERS := $(TARGET)/peers
# A store that speaks Azure's protocol, for tests.
AZURITE := $(TARGET)/azurite
# Real engines for the shims' tests.
ENGINES := $(TARGET)/engines
ENGINE_REQUIREMENTS := shims/tests/engines/requirements.txt shims/tests/engines/requirements-others.txt

help:
	@echo "make demo    run a real trace of LLM requests, kill -9 in the middle, every byte verified"
	@echo "make test    all tests"
	@echo "make test-engines  the engine shims on real engines (installs about 3 GB, once)"
	@echo "make soak    an outage of the object store, ten minutes long"
	@echo "make lint    formatting, clippy, licences and sources of dependencies"
	@echo "make wheel   the Python package, for Python 3.10 and newer"
	@echo "make bench   measure the figures of benches/RESULTS.md (FIGURES=grpc for one group)"
	@echo "make bench-peers  beside Mooncake Store and Redis, from Python (installs them into a scratch environment)"
	@echo "make bench-router  the prefix index beside Dynamo's (compiles its crate, once)"
	@echo "make bench-engines  vLLM on the CPU, with the store and without (installs about 3 GB, once)"
	@echo "make audit   known vulnerabilities in dependencies (needs the network)"

demo:
	@scripts/setup.sh build
	@echo "Building (a few minutes the first time) ..."
	cargo build --release --locked --quiet --package kvstore
	@echo
	@echo "A production trace of LLM requests, as an engine would send it: look up, get the hits, put the rest."
	@echo "In the middle of it the daemon is killed with -9, and starts again."
	$(TARGET)/release/kvstore replay examples/conversation_slice.jsonl --block-bytes 64KiB --host-bytes 256MiB --nvme-bytes 4GiB --crash --verify --plane local
	@echo
	@echo "The same over gRPC, as from another node, without the crash."
	$(TARGET)/release/kvstore replay examples/conversation_slice.jsonl --block-bytes 64KiB --host-bytes 256MiB --nvme-bytes 4GiB --verify --plane grpc
	@echo
	@echo "The same requests on metadata alone: the eviction policy beside LRU and the optimum."
	$(TARGET)/release/kvstore replay examples/conversation_slice.jsonl --simulate --capacity-blocks 5000

test: test-models
	@AZURITE_FOLDER=$(AZURITE) scripts/setup.sh build nextest python azurite
	cargo test --locked --package kvstore-client --doc --quiet
	KVSTORE_AZURITE=$(abspath $(AZURITE))/node_modules/.bin/azurite-blob cargo nextest run --locked --workspace
	$(MAKE) --no-print-directory test-python

# The shared-memory protocol in every order that the memory model allows (loom), and it and the prefix index in many interleavings
# (shuttle).
test-models:
	@scripts/setup.sh build
	RUSTFLAGS="--cfg loom" cargo test --locked --package kvstore-plane --release --test loom --target-dir $(TARGET)/models --quiet
	RUSTFLAGS="--cfg shuttle" cargo test --locked --package kvstore-plane --package kvstore-index --release --test shuttle --target-dir $(TARGET)/models --quiet

# What takes too long for every change: an outage of the object store of ten minutes.
soak:
	@scripts/setup.sh build nextest
	cargo nextest run --locked --package kvstore-tests --test object_outage --run-ignored only --no-capture

# The Python package against a real daemon: that of the Rust tests, or KVSTORE_BIN.
test-python: wheel
	cargo build --locked --quiet --package kvstore
	$(VENV)/bin/pip install --quiet --force-reinstall --no-deps $(TARGET)/wheels/*.whl
	cd shims && KVSTORE_BIN=$${KVSTORE_BIN:-$(abspath $(TARGET))/debug/kvstore} $(abspath $(VENV))/bin/python -m pytest -q -rs

# The engine shims on real engines: vLLM on the CPU, with tiny random models.
test-engines: engines
	cargo build --locked --quiet --package kvstore --package kvstore-router
	cd shims && KVSTORE_BIN=$${KVSTORE_BIN:-$(abspath $(TARGET))/debug/kvstore} KVSTORE_ROUTER_BIN=$${KVSTORE_ROUTER_BIN:-$(abspath $(TARGET))/debug/kvstore-router} $(abspath $(ENGINES))/bin/python -m pytest -q -rs --durations=5 tests/engines

# Real engines, in an environment of their own, with this package.
engines: wheel
	@scripts/setup.sh engines
	@[ -x $(ENGINES)/bin/python ] || python3 -m venv $(ENGINES)
	@cat $(ENGINE_REQUIREMENTS) | cmp -s - $(ENGINES)/installed.txt || { \
	  echo "Installing vLLM, SGLang, LMCache and what they need (about 3 GB to download, once) ..."; \
	  $(ENGINES)/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes $(ENGINE_REQUIREMENTS:%=--requirement %) && \
	  cat $(ENGINE_REQUIREMENTS) > $(ENGINES)/installed.txt; }
	@$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $(TARGET)/wheels/*.whl

wheel: python
	@scripts/setup.sh build
	@rm -rf $(TARGET)/wheels
	cd shims && CARGO_TARGET_DIR=$(abspath $(TARGET)) $(abspath $(VENV))/bin/maturin build --quiet --release --locked --out $(abspath $(TARGET))/wheels
	@ls $(TARGET)/wheels/*.whl

# Tools for the Python package: they are not needed to use it.
python:
	@scripts/setup.sh python
	@[ -x $(VENV)/bin/python ] || python3 -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement shims/tests/requirements.txt

lint: python
	@scripts/setup.sh build lint deny
	$(VENV)/bin/ruff format --quiet --check $(PYTHON_SOURCES)
	$(VENV)/bin/ruff check --quiet $(PYTHON_SOURCES)
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

bench-peers: wheel
	@scripts/setup.sh redis
	cargo build --release --locked --quiet --package kvstore
	@[ -x $(PEERS)/bin/python ] || python3 -m venv $(PEERS)
	@echo "Installing the peers' published packages (once, some 100 MB) ..."
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check --requirement benches/peers/requirements.txt
	$(PEERS)/bin/pip install --quiet --force-reinstall --no-deps $(TARGET)/wheels/*.whl
	$(PEERS)/bin/python benches/peers/bench.py --daemon $(TARGET)/release/kvstore --write benches/RESULTS.md

# The router's prefix index beside Dynamo's, in a workspace of its own.
bench-router:
	cargo build --release --locked --quiet --manifest-path benches/peers/router/Cargo.toml --target-dir $(TARGET)
	$(TARGET)/release/kvstore-router-peers benches/traces/conversation_trace.jsonl

bench-engines: engines
	cargo build --release --locked --quiet --package kvstore
	KVSTORE_BIN=$(TARGET)/release/kvstore $(ENGINES)/bin/python benches/engines/bench.py --write benches/RESULTS.md
