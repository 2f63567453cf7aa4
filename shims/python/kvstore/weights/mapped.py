"""Tensors of safetensors files that are mapped: no byte is copied until a model writes to it.

Each mapping is private: a write gets a page of its own, and neither the file nor another process sees it. Tensors that overlap in the file
share their storage, and those of which the file's metadata says that they are tied are one tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from typing import Any

from kvstore import DataLoss, Invalid

__all__ = ["DTYPES", "dtypes", "map_file", "tensors"]

# Names of types, as files have them, with torch's names and the bits of an element. Torch has no 6-bit numbers.
DTYPES: dict[str, tuple[str | None, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": (None, 6),
    "F6_E3M2": (None, 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
# The system takes none of its memory for a mapping that nobody writes to; Python has no name for this before 3.13.
_NORESERVE = 0x4000
# A safetensors header at most, as its library has it.
_HEADER_BYTES_MAX = 100_000_000


class _Mapping(mmap.mmap):
    """A mapping that keeps what it maps: while a tensor of it lives, the snapshot stays in the cache."""

    held: Any = None

    def region(self, first: int, end: int) -> memoryview:
        """Returns a part of it, which may be written to."""
        return memoryview(self)[first:end]


class Leased:
    """A file whose chunks this node's daemon has in its memory. Parts of it that are made of whole chunks, as tensors are, are mapped from
    there; a write gets a page of its own."""

    def __init__(self, native: Any, path: str, length: int):
        self._native, self._path, self._length = native, path, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> bytes:
        first, end, _ = part.indices(self._length)
        return self._native.read(self._path, first, max(first, end))

    def region(self, first: int, end: int) -> memoryview:
        """Returns a part of it, which may be written to. It stays, whatever becomes of the file."""
        return self._native.region(self._path, first, end)


def dtypes() -> dict[str, Any]:
    """Returns torch's types by their names in files: those that this torch has."""
    import torch

    return {name: getattr(torch, of) for name, (of, _) in DTYPES.items() if of and hasattr(torch, of)}


def map_file(descriptor: int, length: int, held: Any) -> mmap.mmap | bytes:
    """Maps a file privately. ``held`` lives as long as the mapping does. A file without a byte is not mapped."""
    if not length:
        return b""
    mapping = _Mapping(descriptor, length, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    mapping.held = held
    return mapping


def map_path(path: str | os.PathLike, held: Any) -> mmap.mmap | bytes:
    """Maps a file by its path: see :func:`map_file`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return map_file(descriptor, os.fstat(descriptor).st_size, held)
    finally:
        os.close(descriptor)


def header(path: str, mapping: mmap.mmap | bytes | Leased) -> tuple[int, dict[str, dict], dict[str, str]]:
    """Returns the first byte behind a file's header, what it says of each tensor, and its metadata."""
    length = int.from_bytes(mapping[:8], "little")
    if len(mapping) < 8 or length > _HEADER_BYTES_MAX or 8 + length > len(mapping):
        raise Invalid(f"{path}: it is no safetensors file")
    try:
        told = json.loads(mapping[8 : 8 + length])
        metadata = told.pop("__metadata__", None) or {}
    except (ValueError, AttributeError) as error:
        raise Invalid(f"{path}: its header is not that of a safetensors file: {error}") from None
    return 8 + length, told, metadata


def tensors(path: str, mapping: mmap.mmap | bytes | Leased, unknown: str = "refuse") -> dict[str, Any]:
    """Returns the tensors of a mapped file by name. ``unknown``: "refuse" types that this torch does not have, or "bytes" for
    one-dimensional tensors of their bytes."""
    start, told, metadata = header(path, mapping)
    spans = sorted((*_span(path, name, entry, start, len(mapping)), name) for name, entry in told.items())
    found: dict[str, Any] = {}
    at = 0
    while at < len(spans):
        # Those that overlap, with what they overlap: one storage.
        first, end, _ = spans[at]
        group = [spans[at]]
        at += 1
        while at < len(spans) and spans[at][0] < end:
            group.append(spans[at])
            end = max(end, spans[at][1])
            at += 1
        found.update(_group(path, mapping, told, group, first, end, unknown))
    for name, kept in metadata.items():
        if name not in found and kept in found:
            found[name] = found[kept]
    # In the order of the file's header, as the library has it.
    return {name: found[name] for name in (*told, *(name for name in found if name not in told))}


def _span(path: str, name: str, entry: Mapping, start: int, length: int) -> tuple[int, int]:
    try:
        (first, end), shape, bits = entry["data_offsets"], entry["shape"], DTYPES.get(entry["dtype"], (None, 0))[1]
        wanted = math.prod(shape) * bits
        is_right = 0 <= first <= end <= length - start and (not bits or wanted == 8 * (end - first))
    except (KeyError, TypeError, ValueError):
        raise Invalid(f"{path}: its header does not say where the tensor {name!r} lies") from None
    if not is_right:
        raise DataLoss(
            f"{path}: the tensor {name!r} of type {entry['dtype']} and shape {shape} does not have {end - first} bytes"
        )
    return start + first, start + end


def _group(path: str, mapping, told: dict, group: list, first: int, end: int, unknown: str) -> dict[str, Any]:
    import torch

    have = dtypes()
    found, same = {}, {}
    storage = None
    if end > first:
        # One storage for one tensor: it can be saved, pickled and resized as if it were alone.
        storage = torch.frombuffer(mapping.region(first, end), dtype=torch.uint8)
        if any(start % (DTYPES.get(told[name]["dtype"], (None, 8))[1] // 8 or 1) for start, _, name in group):
            # Not where such numbers lie, and some instructions refuse that. Libraries write no such files.
            storage = storage.clone()
    for start, stop, name in group:
        entry = told[name]
        dtype = have.get(entry["dtype"])
        key = (start, stop, entry["dtype"], tuple(entry["shape"]))
        if dtype is None and unknown != "bytes":
            raise Invalid(
                f"{path}: the tensor {name!r} has the type {entry['dtype']}, which torch {torch.__version__} does not have; "
                'unknown="bytes" gives such tensors as bytes'
            )
        if key not in same:
            flat = torch.empty(0, dtype=torch.uint8) if storage is None else storage[start - first : stop - first]
            same[key] = flat if dtype is None else _typed(path, name, flat, dtype, entry)
        found[name] = same[key]
    return found


def _typed(path: str, name: str, flat, dtype, entry: dict):
    import torch

    shape = list(entry["shape"])
    if DTYPES[entry["dtype"]][1] == 4:
        if not shape or shape[-1] % 2:
            raise Invalid(
                f"{path}: the tensor {name!r} has 4-bit numbers, and its last dimension {shape[-1:]} does not make pairs"
            )
        shape[-1] //= 2
    if not flat.numel():
        return torch.empty(shape, dtype=dtype)
    width = torch.empty(0, dtype=dtype).element_size()
    if flat.data_ptr() % width or flat.storage_offset() % width:
        # Such tensors lie oddly to what they overlap.
        flat = flat.clone()
    return flat.view(dtype).view(shape)
