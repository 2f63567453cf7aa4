#!/usr/bin/env bash
# CPU seconds of a build from nothing, by crate and by C or C++ file: the table in docs/building.md.
#
#   scripts/build-costs.sh                             everything that `make test` compiles in Rust
#   scripts/build-costs.sh build --workspace --bin kvstore    the demo
#
# Builds into a temporary folder, which it removes. CPU seconds are user and system time of each compiler process; those of small
# crates add up under "the rest".
set -euo pipefail

# Called again by cargo and by build scripts: runs a compiler and notes what it took.
if [ -n "${KVSTORE_COSTS:-}" ]; then
  name=build-script
  previous=
  for word in "$@"; do
    case $previous in --crate-name) name=$word ;; esac
    case $word in
      --test) kind=" (tests)" ;;
      *.c | *.cc | *.cpp | *.S) name="C and C++: $(sed -n 's,.*/build/\([a-z0-9_-]*\)-[0-9a-f]*/.*,\1,p; t; s,.*/\([a-z0-9_-]*-sys[a-z0-9_-]*\|[a-z]*\)-[0-9][^/]*/.*,\1,p' <<<"$word" | head -1)" ;;
    esac
    previous=$word
  done
  TIMEFORMAT="%U %S $name${kind:-}"
  code=0
  { time "$@" 2>&3; } 3>&2 2>"$(mktemp -p "$KVSTORE_COSTS")" || code=$?
  exit $code
fi

here=$(realpath "$0")
cd "$(dirname "$here")/.."
[ $# -gt 0 ] || set -- test --no-run --workspace
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/costs"
for compiler in cc c++; do
  printf '#!/bin/sh\nexec "%s" %s "$@"\n' "$here" "$compiler" >"$folder/$compiler"
  chmod +x "$folder/$compiler"
done
KVSTORE_COSTS=$folder/costs RUSTC_WRAPPER=$here CC=$folder/cc CXX=$folder/c++ CARGO_TARGET_DIR=$folder/target \
  cargo "$1" --locked --quiet "${@:2}"
find "$folder/costs" -type f -exec cat {} + | awk '
  { seconds = $1 + $2; $1 = $2 = ""; sub(/^ +/, ""); of[$0] += seconds; all += seconds }
  END {
    for (name in of) if (of[name] >= 3) { printf "%8.1f  %s\n", of[name], name | "sort -rn"; shown += of[name] }
    close("sort -rn")
    printf "%8.1f  the rest\n%8.1f  in all\n", all - shown, all
  }'
