#!/usr/bin/env bash
# What a new machine pays: CPU seconds and wall time of `make demo`, and of `make test` after it, from an empty target folder and an
# empty cargo registry, without a compiler cache.
#
#   benches/build.sh           of the commit that is checked out (about half an hour on two cores)
#   benches/build.sh --ci      goes on with the rest of what .ci/run does: make lint, make test-engines
#
# Prints figure lines; `make bench-build` records them. Debian's packages, cargo-nextest and cargo-deny are installed if they are missing,
# and are not part of the figures where they are there. CPU seconds are user and system time of all processes that the commands started.
set -euo pipefail
cd "$(dirname "$0")/.."
ci=${1:-}
case $ci in "" | --ci) ;; *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet . "$folder/kvstore"
export CARGO_HOME=$folder/cargo CARGO_TARGET_DIR=$folder/target
export PATH="$CARGO_HOME/bin:$PATH"
unset CC CXX RUSTC_WRAPPER

cpu=0 wall=0
# Runs a target of make; adds what it took to cpu and wall.
run() {
  local started=$SECONDS
  TIMEFORMAT="%U %S"
  { time make --no-print-directory -C "$folder/kvstore" "$1" >"$folder/log" 2>&1 || { tail -n 50 "$folder/log" >&2; exit 1; }; } 2>"$folder/time"
  cpu=$(awk -v before="$cpu" '{ print before + $1 + $2 }' "$folder/time")
  wall=$((wall + SECONDS - started))
  echo "after make $1: $cpu CPU seconds, $wall wall seconds" >&2
}

# Before October 2026 RocksDB was compiled for two profiles and file by file: 3,726 CPU seconds for the demo, 10,067 with the tests.
run demo
echo "figure build.demo_cpu_s $cpu target <= 1304"
echo "figure build.demo_wall_s $wall target none"
run test
echo "figure build.demo_then_test_cpu_s $cpu target <= 4530"
echo "figure build.demo_then_test_wall_s $wall target none"
[ -n "$ci" ] || exit 0
run lint
run test-engines
echo "figure build.ci_and_demo_cpu_s $cpu target none"
echo "figure build.ci_and_demo_wall_s $wall target <= 3000"
