#!/usr/bin/env bash
# What a new machine pays: CPU seconds and wall time of `make demo`, of `make test` after it, and of the rest of .ci/run after both, from an
# empty target folder, an empty cargo registry and without a compiler cache. Takes about an hour on two cores.
#
# Measures the commit that is checked out. Prints figure lines; `make bench-build` records them. Debian's packages, cargo-nextest and
# cargo-deny are part of the figures only where they have to be installed. CPU seconds are user and system time of all processes that
# the commands started.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 0 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }

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
  { time make --no-print-directory -C "$folder/kvstore" "$1" >"$folder/log" 2>&1 || { tail -n 50 "$folder/log" >&3; exit 1; }; } \
    3>&2 2>"$folder/time"
  cpu=$(awk -v before="$cpu" '{ print before + $1 + $2 }' "$folder/time")
  wall=$((wall + SECONDS - started))
  echo "after make $1: $cpu CPU seconds, $wall wall seconds" >&2
}

# Until 2026-11-28, RocksDB was compiled for two profiles and file by file: 3,726 CPU seconds for the demo, 10,067 with the tests. The
# targets are 0.35 and 0.45 of that.
run demo
echo "figure build.demo_cpu_s $cpu target <= 1304"
echo "figure build.demo_wall_s $wall target none"
run test
echo "figure build.demo_then_test_cpu_s $cpu target <= 4530"
echo "figure build.demo_then_test_wall_s $wall target none"
run lint
run test-engines
echo "figure build.ci_and_demo_cpu_s $cpu target none"
echo "figure build.ci_and_demo_wall_s $wall target <= 3000"
