"""A live model, as a save reads it: the head of a safetensors file, and its tensors, each from where it lies.

A tensor that is not contiguous, or not in CPU memory, is copied when its turn comes. Tensors that are tied are saved once; the file's
metadata names the others, as ``safetensors.torch.save_model`` does.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping

from kvstore import Invalid, _plain

# Files of weights, which a live model's take the place of.
_WEIGHTS = [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json"]
_FILE = "model.safetensors"

Made = tuple[str, bytes, list[int], Callable[[int], object]]


def asked(source, files) -> tuple[dict, list[Made]]:
    """Returns what a save of ``source`` and ``files`` asks for, and contents in memory."""
    if isinstance(source, (str, os.PathLike)):
        if files is not None:
            raise Invalid("files: only a live model is saved with files besides; put them into the folder")
        return {"folder": os.fspath(source), "without": []}, []
    folder = os.fspath(files) if isinstance(files, (str, os.PathLike)) else None
    contents = dict(files or {}) if folder is None else {}
    tensors = _tensors(source)
    for path, content in _configuration(source).items():
        in_folder = folder is not None and pathlib.Path(folder, path).exists()
        if not in_folder:
            contents.setdefault(path, content)
    made = [_whole(path, content) for path, content in contents.items()]
    return {"folder": folder, "without": _WEIGHTS if folder else []}, [*made, _safetensors(tensors)]


def _whole(path: str, content: bytes) -> Made:
    return path, bytes(content), [], lambda _: b""


def _tensors(source) -> dict:
    import torch

    state = source
    if isinstance(source, torch.nn.Module):
        state = source.state_dict()
        if hasattr(source, "save_pretrained"):
            state = _as_saved(source, state)
    if not isinstance(state, Mapping):
        raise Invalid(f"{type(source).__name__} is not a folder, a torch module, or tensors by name")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise Invalid(f"{name}: {type(tensor).__name__} is not a tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise Invalid(f"{name}: the tensor is sparse, quantized by torch, or on the meta device; a snapshot holds plain ones")
    return dict(state)


def _as_saved(model, state: dict) -> dict:
    """Names as transformers has them in files: a model may have fused or renamed some of them when it was loaded."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    state = {name: tensor for name, tensor in state.items() if name not in ignored}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # An older version, which renames nothing.
        return state
    return revert_weight_conversion(model, state)


def _configuration(source) -> dict[str, bytes]:
    """The files that a transformers model's ``save_pretrained`` writes beside its weights."""
    if not (hasattr(source, "save_pretrained") and hasattr(source, "config")):
        return {}
    config = copy.deepcopy(source.config)
    config.architectures = [type(source).__name__]
    config.dtype = source.dtype
    with tempfile.TemporaryDirectory(prefix="kvstore-") as folder:
        config.save_pretrained(folder)
        generation = getattr(source, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def _identity(tensor) -> tuple:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _safetensors(tensors: dict) -> Made:
    from kvstore.weights.mapped import DTYPES, dtypes

    names = {dtype: name for name, dtype in dtypes().items()}
    metadata, kept, seen = {"format": "pt"}, [], {}
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise Invalid(f"{name}: safetensors has no type for {tensor.dtype}")
        first = seen.setdefault(_identity(tensor), name) if tensor.numel() else name
        if first == name:
            kept.append((name, tensor))
        else:
            metadata[name] = first
    # The widest first: then each lies at a multiple of its own width.
    kept.sort(key=lambda one: (-one[1].element_size(), one[0]))
    header: dict = {"__metadata__": metadata}
    at, sizes = 0, []
    for name, tensor in kept:
        dtype = names[tensor.dtype]
        shape = list(tensor.shape)
        if DTYPES[dtype][1] == 4:
            if not shape:
                raise Invalid(f"{name}: a pair of 4-bit numbers without a dimension cannot be written down")
            # Torch counts pairs, files count numbers.
            shape[-1] *= 2
        sizes.append(tensor.numel() * tensor.element_size())
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + sizes[-1]]}
        at += sizes[-1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return (
        _FILE,
        len(text).to_bytes(8, "little") + text,
        sizes,
        lambda number: _plain(kept[number][1].detach().cpu().contiguous()),
    )
