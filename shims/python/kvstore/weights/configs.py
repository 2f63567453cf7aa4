"""What of a model's or an adapter's configuration files names its weights."""

from __future__ import annotations

import hashlib
import json
import pathlib

__all__ = ["digests", "of_adapter"]

_NAMES = ("config.json", "params.json", "hf_quant_config.json", "quantize_config.json")
# A configuration has some kilobytes.
_MAX = 64 << 20
# What differs between saves of one model, and does not change what is computed from its weights.
_SAYS_NOTHING = {
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "_commit_hash",
    "_attn_implementation_autoset",
    "use_cache",
}
# Of an adapter: where its base lies, and who saved it.
_SAYS_NOTHING_OF_AN_ADAPTER = {
    *_SAYS_NOTHING,
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
}
# Sets, which PEFT saves in any order.
_SETS = {"target_modules", "exclude_modules", "modules_to_save"}
# The first pattern that matches counts, so their order does.
_ORDERED = {"rank_pattern", "alpha_pattern"}


def digests(folder: pathlib.Path) -> list[tuple[str, bytes]]:
    """Returns a model's configuration files, each with a digest of what it says."""
    files = [folder / name for name in _NAMES if (folder / name).is_file()]
    return [(file.name, hashlib.sha256(_canonical(file, _SAYS_NOTHING)).digest()) for file in files]


def of_adapter(folder: pathlib.Path) -> list[tuple[str, bytes]]:
    """Returns an adapter's configuration file, with a digest of what it says."""
    file = folder / "adapter_config.json"
    return [(file.name, hashlib.sha256(_canonical(file, _SAYS_NOTHING_OF_AN_ADAPTER)).digest())] if file.is_file() else []


def _canonical(file: pathlib.Path, says_nothing: set[str]) -> bytes:
    """Returns a configuration without what says nothing, in one order and one spelling. What is not JSON counts as it is."""
    with open(file, "rb") as opened:
        content = opened.read(_MAX + 1)
    if len(content) > _MAX:
        raise OSError(f"{file}: it has more than {_MAX} bytes, so it is not a configuration")
    try:
        told = json.loads(content)
        return json.dumps(_essence(told, says_nothing), sort_keys=True).encode() if isinstance(told, dict) else content
    except (ValueError, RecursionError):
        return content


def _essence(told, says_nothing: set[str]):
    if isinstance(told, dict):
        # The newer name of the data type.
        renamed = {"dtype" if key == "torch_dtype" else key: value for key, value in told.items() if key not in says_nothing}
        return {key: _value(key, value, says_nothing) for key, value in renamed.items()}
    if isinstance(told, list):
        return [_essence(one, says_nothing) for one in told]
    return int(told) if isinstance(told, float) and told.is_integer() else told


def _value(key: str, value, says_nothing: set[str]):
    if key in _ORDERED and isinstance(value, dict):
        return [[name, number] for name, number in value.items()]
    if key in _SETS and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return sorted(value)
    return _essence(value, says_nothing)
