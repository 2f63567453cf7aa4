#!/usr/bin/env bash
# Installs what is missing of the named tools, and nothing else: build, lint, nextest, deny, redis.
set -euo pipefail

have() { command -v "$1" >/dev/null 2>&1; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

debian() {
  have apt-get || { echo "$1 is missing: install it (Debian and Ubuntu: $1) and try again" >&2; exit 1; }
  echo "Installing $1 ..."
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >/dev/null
}

for tool in "$@"; do
  case $tool in
    build)
      have cargo || { echo "Rust is missing: install it with rustup, then try again" >&2; exit 1; }
      have cc || debian gcc
      [ -e /usr/include/stdlib.h ] || [ -e /usr/lib/libc.so ] || debian libc6-dev
      ;;
    lint)
      cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || rustup component add rustfmt clippy
      ;;
    nextest) have cargo-nextest || { echo "Installing cargo-nextest (once, some minutes) ..."; cargo install --locked --quiet cargo-nextest; } ;;
    deny) have cargo-deny || { echo "Installing cargo-deny (once, some minutes) ..."; cargo install --locked --quiet cargo-deny; } ;;
    redis) have redis-server || debian redis-server ;;
    *) echo "setup.sh: unknown tool $tool" >&2; exit 2 ;;
  esac
done
