#!/usr/bin/env bash
# Builds the wheel into a folder: the Python module, and the programs kvstore and kvstore-router.
#
#   scripts/wheel.sh release FOLDER   what ships: link-time optimization, stripped
#   scripts/wheel.sh dev FOLDER       for tests: shares what `make test` and `make demo` have compiled
#
# MATURIN names maturin (default: the one on the PATH), CARGO_TARGET_DIR the target folder.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
profile=$1 out=$2
target=${CARGO_TARGET_DIR:-target}

case $profile in
  # The whole workspace is named so that features are resolved once for all; only the two programs are built.
  dev) folder=debug; cargo build --locked --quiet --workspace --bin kvstore --bin kvstore-router ;;
  release) folder=release; cargo build --locked --quiet --release --package kvstore --package kvstore-router ;;
  *) echo "wheel.sh: the profile is dev or release, not \"$profile\"" >&2; exit 2 ;;
esac

# maturin puts what lies here on the PATH of the environment that installs the wheel.
scripts=shims/kvstore.data/scripts
trap 'rm -rf shims/kvstore.data' EXIT
mkdir -p "$scripts" "$out"
for program in kvstore kvstore-router; do
  strip -o "$scripts/$program" "$target/$folder/$program"
  chmod 755 "$scripts/$program"
done

# The newest version of glibc that a program asks for is the oldest one that the wheel runs with; pip reads it from
# the wheel's name. maturin checks the module against it.
glibc=$(for file in "$scripts"/*; do objdump -T "$file"; done | grep -o 'GLIBC_2\.[0-9]*' | sort -Vu | tail -1 | cut -d. -f2)
rm -f "$out"/kvstore-*.whl
out=$(realpath "$out")
(cd shims && "${MATURIN:-maturin}" build --quiet --profile "$profile" --locked --compatibility "manylinux_2_$glibc" --out "$out")
wheel=$(ls "$out"/kvstore-*.whl)
echo "$wheel ($(du -h "$wheel" | cut -f1), glibc 2.$glibc or newer)"
