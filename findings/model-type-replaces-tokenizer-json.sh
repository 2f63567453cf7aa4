#!/usr/bin/env bash
# transformers 5.19.0 (with tokenizers 0.23.3): for model_type "qwen2", AutoTokenizer does not use what tokenizer.json says of normalizing
# and of cutting texts, whatever tokenizer_class the repository names; it makes both anew. For "qwen3" it depends on tokenizer_class.
#
# A good guess was: a repository with a tokenizer.json has the tokens of that file (tokenizers.Tokenizer.from_file), in every program that
# reads it, and tokenizer_class "PreTrainedTokenizerFast" says that nothing more is to it.
# Seen instead, with a file that cuts texts at spaces alone, of bytes and one merge of "1" and "2":
#   - no config.json: the file's tokens; "12" is one token;
#   - model_type qwen3, PreTrainedTokenizerFast: the same;
#   - model_type qwen3, Qwen2Tokenizer: "12" is two tokens (its pattern has digits one by one), and a letter with an accent beside it is
#     made one letter first (NFC);
#   - model_type qwen2, PreTrainedTokenizerFast: as Qwen2Tokenizer. Tokens beside the vocabulary are added anew, too: those of
#     tokenizer.json are lost where tokenizer_config.json has an added_tokens_decoder.
# Who counts an engine's tokens from tokenizer.json alone is wrong for such models. It fails where any of that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON'
import json
import pathlib
import tempfile

import tokenizers
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {letter: at for at, letter in enumerate(letters)} | {"12": 256}
file = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("1", "2")]))
file.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
])
file.add_special_tokens([tokenizers.AddedToken("<call>", special=True)])
TEXT = "12 e\u0301<call>"


def tokens(model_type, name, **more):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        file.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | more))
        if model_type:
            (path / "config.json").write_text(json.dumps({"model_type": model_type}))
        made = AutoTokenizer.from_pretrained(folder)
    print(f"{model_type}, {name}{', with a decoder' if more else ''}: {type(made).__name__}, {made.tokenize(TEXT)}")
    return made(TEXT)["input_ids"]


due = file.encode(TEXT).ids
print("tokenizer.json:", file.encode(TEXT).tokens)
generic = "PreTrainedTokenizerFast"
assert tokens(None, generic) == tokens("qwen3", generic) == due and due[0] == 256
anew = tokens("qwen2", generic)
assert anew == tokens("qwen3", "Qwen2Tokenizer") and anew[:2] == [vocabulary["1"], vocabulary["2"]] and anew[-1] > 256
assert len(anew) == len(due)  # One more for "12", one less for the accent.
other = {"content": "<other>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
lost = tokens("qwen2", generic, added_tokens_decoder={"300": other})
assert anew[-1] not in lost and vocabulary["<"] in lost  # "<call>" is letters now.
print("as described")
PYTHON
