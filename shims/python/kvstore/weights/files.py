"""Which files of a folder an engine loads, by the rules of the engine's own loader.

What the engine does not load does not name its weights: optimizers, other formats of the same weights, checkpoints of a training.
"""

from __future__ import annotations

import fnmatch
import json
import pathlib
import re

from .tensors import InvalidWeights

__all__ = ["ENGINES", "adapter", "is_adapter", "loaded"]

ENGINES = ("vllm", "sglang", "any")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
# What a trainer leaves beside a model. The first five are left out by the engines as well, by these ends of names.
_OF_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_OF_TRAINERS = ("rng_state*.pth", "optimizer*.safetensors", "global_step*/*")
# Folders from which some models' loaders take more: Kimi-Audio, and Cosmos' "[tv]*er".
_SUBFOLDERS = ("whisper-large-v3/*.safetensors", "transformer/*.safetensors", "vision_encoder/*.safetensors")
_INDEX = "model.safetensors.index.json"
_MISTRAL, _MISTRAL_INDEX = "consolidated*.safetensors", "consolidated.safetensors.index.json"
# An index names each tensor's file: a model of a million tensors has some 100 MB.
_INDEX_MAX = 256 << 20
_PATTERNS = {
    "auto": ("*.safetensors", "*.bin", "*.pt"),
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    **dict.fromkeys(("safetensors", "fastsafetensors", "instanttensor"), ("*.safetensors",)),
    "mistral": (_MISTRAL,),
    "pt": ("*.pt",),
    "npcache": ("*.bin", "*.pt"),
}
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


def loaded(folder: pathlib.Path, engine: str = "vllm", load_format: str = "auto") -> list[pathlib.Path]:
    """Returns the files that an engine loads from a folder, in an order that their names alone decide. "any": all that one of the
    engines would load.

    Of a format with rules of its own, all files of weights are returned, those in subfolders as well. Raises FileNotFoundError if
    there are none or if one is missing, and InvalidWeights if the folder's index is not valid.
    """
    if engine == "any":
        found = {*_of_vllm(folder, load_format), *_of_sglang(folder, load_format)}
    else:
        found = {*(_of_sglang if engine == "sglang" else _of_vllm)(folder, load_format)}
    if found:
        found |= {file for pattern in _SUBFOLDERS for file in _match(folder, pattern)}
    else:
        found = {
            file for file in folder.rglob("*") if file.suffix in _SUFFIXES and file.is_file() and _is_of_a_model(folder, file)
        }
    if not found:
        raise FileNotFoundError(f"{folder}: there are no weights in it ({', '.join(_SUFFIXES)})")
    return sorted(found, key=_natural)


def is_adapter(folder: pathlib.Path) -> bool:
    """Returns whether a folder has an adapter."""
    return (folder / "adapter_config.json").is_file() and any((folder / name).is_file() for name in _ADAPTERS)


def adapter(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that an engine loads of an adapter. Raises FileNotFoundError if there are none."""
    for name in _ADAPTERS:
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder}: there is no adapter in it ({', '.join(_ADAPTERS)})")


def _of_vllm(folder: pathlib.Path, load_format: str) -> list[pathlib.Path]:
    index = _INDEX
    if load_format == "mistral" or (load_format == "auto" and _match(folder, _MISTRAL)):
        load_format, index = "mistral", _MISTRAL_INDEX
    found = _first(folder, _PATTERNS.get(load_format, ()))
    if found and found[0].suffix == ".safetensors":
        return _indexed(folder, index, found)
    return [file for file in found if not file.name.endswith(_OF_TRAINING)]


def _of_sglang(folder: pathlib.Path, load_format: str) -> list[pathlib.Path]:
    patterns = _PATTERNS.get(load_format, ())
    found = _first(folder, (*patterns, "*.pt") if patterns else ())
    if not found or found[0].suffix != ".safetensors":
        return [file for file in found if not file.name.endswith(_OF_TRAINING)]
    kept = _indexed(folder, _MISTRAL_INDEX if load_format == "mistral" else _INDEX, found)
    if [file.name for file in sorted(kept)] == ["consolidated.safetensors", "model.safetensors"]:
        kept = [file for file in kept if file.name == "model.safetensors"]
    # Some models' index leaves it out.
    mtp = folder / "mtp.safetensors"
    return [*kept, mtp] if mtp.is_file() else kept


def _match(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    return [file for file in folder.glob(pattern) if file.is_file() and not file.name.startswith(".")]


def _first(folder: pathlib.Path, patterns: tuple[str, ...]) -> list[pathlib.Path]:
    """Returns the files of the first pattern that matches any."""
    return next((found for pattern in patterns if (found := _match(folder, pattern))), [])


def _indexed(folder: pathlib.Path, index: str, found: list[pathlib.Path]) -> list[pathlib.Path]:
    """Returns those of the files that the index names, or all if there is no index."""
    path = folder / index
    if not path.is_file():
        return found
    if (size := path.stat().st_size) > _INDEX_MAX:
        raise InvalidWeights(f"{path}: it has {size} bytes; at most {_INDEX_MAX} are valid")
    try:
        named = {*json.loads(path.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidWeights(f"{path}: it is not an index of safetensors files: {error!r}") from None
    if missing := sorted(str(name) for name in named if not isinstance(name, str) or not (folder / name).is_file()):
        raise FileNotFoundError(f"{path}: it names files that are not there: {', '.join(missing[:10])}")
    return [file for file in found if file.name in named]


def _is_of_a_model(folder: pathlib.Path, file: pathlib.Path) -> bool:
    inside = file.relative_to(folder)
    if any(part.startswith("checkpoint-") for part in inside.parts[:-1]) or file.name.endswith(_OF_TRAINING):
        return False
    return not any(fnmatch.fnmatch(file.name, pattern) or fnmatch.fnmatch(str(inside), pattern) for pattern in _OF_TRAINERS)


def _natural(file: pathlib.Path) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers: if files have a tensor twice, the engine takes the last."""
    return [(int(part) if part.isdigit() and part.isascii() else -1, part) for part in re.split(r"([0-9]+)", str(file))]
