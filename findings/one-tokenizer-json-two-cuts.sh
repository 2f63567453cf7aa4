#!/usr/bin/env bash
# tokenizers 0.22.2: the crate with its feature `fancy-regex` cuts texts elsewhere than the Python package of the same version, for the
# same tokenizer.json.
#
# A good guess was: one version of one library makes the same tokens of the same file, whichever of its two features for patterns it is
# built with (`onig`, as in the wheels, or `fancy-regex`, for builds without C).
# Seen instead, for patterns that tokenizer.json files have: `\w` and `\b` disagree about superscript digits, zero-width joiners and
# letters of newer versions of Unicode, and `$` and `^` about the borders of lines. The patterns of GPT-2, Llama 3, Qwen and DeepSeek, which
# are made of `\p{L}`, `\p{N}` and `\s`, gave the same cuts in 200 texts of odd characters.
# A router that is built with the one, in front of engines that have the other, looks for prompts under names that nobody uses.
# It fails where any of that changes. It needs cargo.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.22.2
mkdir -p "$folder/crate/src"
cat >"$folder/crate/Cargo.toml" <<'TOML'
[package]
name = "cuts"
version = "0.1.0"
edition = "2021"

[dependencies]
serde_json = "=1.0.145"
tokenizers = { version = "=0.22.2", default-features = false, features = ["fancy-regex"] }
TOML
cat >"$folder/crate/src/main.rs" <<'RUST'
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

fn main() {
    let cases: Vec<(String, String)> = serde_json::from_reader(std::io::stdin()).unwrap();
    for (pattern, text) in cases {
        let split = serde_json::json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let cutter: PreTokenizerWrapper = serde_json::from_value(split).unwrap();
        let mut cut = PreTokenizedString::from(text.as_str());
        cutter.pre_tokenize(&mut cut).unwrap();
        let splits = cut.get_splits(OffsetReferential::Original, OffsetType::Char);
        let ends: Vec<usize> = splits.into_iter().map(|(_, (_, end), _)| end).collect();
        println!("{ends:?}");
    }
}
RUST
CARGO_TARGET_DIR="$folder/target" cargo build --quiet --manifest-path "$folder/crate/Cargo.toml"
"$folder/venv/bin/python" - "$folder/target/debug/cuts" <<'PYTHON'
import json
import subprocess
import sys

import tokenizers
from tokenizers import Regex, pre_tokenizers

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASES = [
    (r"\w+|[^\w\s]+", "x² y"),
    (r"\w+|[^\w\s]+", "a\u200db"),
    (r"\s+$|^\s+|\n\n+", "a \nb"),
    (QWEN, "x² y\u200db \nit'ſ"),
]
crate = subprocess.run([sys.argv[1]], input=json.dumps(CASES), capture_output=True, text=True, check=True).stdout.splitlines()
print("tokenizers", tokenizers.__version__)
for (pattern, text), line in zip(CASES, crate):
    cutter = pre_tokenizers.Split(Regex(pattern), "isolated")
    wheel = [end for _, (_, end) in cutter.pre_tokenize_str(text)]
    print(f"{pattern[:24]!r:28} {text!r:24} wheel {wheel} crate {json.loads(line)}")
    alike = wheel == json.loads(line)
    assert alike == (pattern == QWEN), "this has changed"
PYTHON
