#!/usr/bin/env bash
# Installs those of the named tools that are missing: build, lint, nextest, deny, python, engines, azurite, redis, fio.
set -euo pipefail

have() { command -v "$1" >/dev/null 2>&1; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

debian() {
  have apt-get || { echo "$1 is missing. Install it (Debian and Ubuntu: $1), then try again." >&2; exit 1; }
  echo "Installing $1 ..."
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >/dev/null
}

libclang() {
  [ -n "${LIBCLANG_PATH:-}" ] || compgen -G '/usr/lib/llvm-*/lib/libclang.so*' >/dev/null || compgen -G '/usr/lib*/libclang.so*' >/dev/null
}

# Without optimization: compiling these tools takes longer than they ever run.
cargo_tool() {
  echo "Installing $1 (once, a few minutes) ..."
  cargo install --locked --quiet --debug "$1"
}

for tool in "$@"; do
  case $tool in
    build)
      have cargo || { echo "Rust is missing. Install it with rustup, then try again." >&2; exit 1; }
      have cc || debian gcc
      have c++ || debian g++
      # RocksDB's bindings are generated with libclang and its headers.
      libclang || debian libclang-dev
      [ -e /usr/include/stdlib.h ] || [ -e /usr/lib/libc.so ] || debian libc6-dev
      ;;
    lint)
      cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || rustup component add rustfmt clippy
      ;;
    nextest) have cargo-nextest || cargo_tool cargo-nextest ;;
    deny) have cargo-deny || cargo_tool cargo-deny ;;
    python)
      have python3 || debian python3
      python3 -c 'import ensurepip, venv' 2>/dev/null || debian python3-venv
      ;;
    engines)
      # vLLM's builds for the CPU are pinned for one version of Python and one processor.
      [ "$(python3 -c 'import sys; print(*sys.version_info[:2], sep=".")') $(uname -m)" = "3.11 x86_64" ] ||
        { echo "The engines' tests need Python 3.11 on x86-64. Found: $(python3 -V), $(uname -m)." >&2; exit 1; }
      compgen -G '/usr/lib/*/libnuma.so.1*' >/dev/null || compgen -G '/lib/*/libnuma.so.1*' >/dev/null || debian libnuma1
      ;;
    azurite)
      # Microsoft's emulator of Azure Blob, for the tests of the object tier; and gRPC's JavaScript library.
      at="${AZURITE_FOLDER:-target/azurite}"
      [ -x "$at/node_modules/.bin/azurite-blob" ] && [ -d "$at/node_modules/@grpc/grpc-js" ] || {
        have npm || debian npm
        echo "Installing Azurite and grpc-js (once, 200 MB) ..."
        npm install --silent --no-fund --no-audit --prefix "$at" azurite@3.37.0 @grpc/grpc-js@1.14.7 @grpc/proto-loader@0.8.1
      }
      ;;
    redis) have redis-server || debian redis-server ;;
    fio) have fio || debian fio ;;
    *) echo "setup.sh: unknown tool $tool" >&2; exit 2 ;;
  esac
done
