"""Digests of what files of weights hold: of each tensor of a safetensors file, and of any other file as a whole.

A tensor's digest is made of its data type, its shape and its bytes. Where in which file it lies does not matter, nor do the file's
metadata and the order of its header. Nothing is unpickled. Each byte of a tensor is read once, and threads hash pieces of it side
by side.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
import threading
from dataclasses import dataclass

__all__ = ["InvalidWeights", "Tensor", "read", "threads"]

# Pieces that threads hash side by side: a digest is of the pieces' digests.
_PIECE = 64 << 20
# Bytes that a thread reads at a time. More does not make it faster, and each thread has a buffer of that size.
_READ = 4 << 20
# The most that the safetensors library takes.
_HEADER_MAX = 100_000_000
_THREADS_MAX = 8
# In the place of a data type: a file that is taken as a whole.
_FILE = "file"

_buffers = threading.local()


class InvalidWeights(ValueError):
    """A file that is not what its name says. The message names the file."""


@dataclass(frozen=True)
class Tensor:
    """A tensor's name, data type, shape, bytes, and a digest of the last three."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    digest: bytes

    @property
    def is_file(self) -> bool:
        """Whether this is a file that is taken as a whole."""
        return self.dtype == _FILE


@dataclass(frozen=True)
class _Place:
    """Where in a file a tensor lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class _Span:
    """A piece of a tensor, which is the file's tensor number `of`."""

    of: int
    begin: int
    end: int


def threads() -> int:
    """Returns how many threads hash."""
    return min(len(os.sched_getaffinity(0)), _THREADS_MAX)


def read(file: pathlib.Path, *, is_safetensors: bool) -> list[Tensor]:
    """Returns the tensors of a safetensors file, or any other file as one tensor.

    Raises InvalidWeights if the file is not a whole safetensors file, and OSError if it cannot be read.
    """
    with open(file, "rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        places = _header(file, opened.fileno(), size) if is_safetensors else [_Place("", _FILE, (), 0, size)]
        with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
            done = list(pool.map(lambda spans: _hash(file, opened.fileno(), spans), _jobs(places)))
    pieces: list[list[bytes]] = [[] for _ in places]
    for digests in done:
        for number, digest in digests:
            pieces[number].append(digest)
    return [_tensor(place, of) for place, of in zip(places, pieces)]


def _tensor(place: _Place, pieces: list[bytes]) -> Tensor:
    size = place.end - place.begin
    digest = hashlib.sha256(repr((place.dtype, place.shape, size)).encode(errors="surrogatepass"))
    digest.update(b"".join(pieces))
    return Tensor(place.name, place.dtype, place.shape, size, digest.digest())


def _jobs(places: list[_Place]) -> list[list[_Span]]:
    """Returns what the threads do: each job is a piece of a tensor, or some small tensors that lie together."""
    jobs: list[list[_Span]] = []
    small: list[_Span] = []
    for number, place in enumerate(places):
        if small and place.end - small[0].begin > _READ:
            jobs.append(small)
            small = []
        if place.end - place.begin <= _READ:
            small.append(_Span(number, place.begin, place.end))
        else:
            jobs += [[_Span(number, at, min(at + _PIECE, place.end))] for at in range(place.begin, place.end, _PIECE)]
    return [*jobs, small] if small else jobs


def _hash(file: pathlib.Path, descriptor: int, spans: list[_Span]) -> list[tuple[int, bytes]]:
    start = spans[0].begin
    if len(spans) > 1:
        content = _read(file, descriptor, start, spans[-1].end)
        return [(span.of, hashlib.sha256(content[span.begin - start : span.end - start]).digest()) for span in spans]
    digest = hashlib.sha256()
    for at in range(start, spans[0].end, _READ):
        digest.update(_read(file, descriptor, at, min(at + _READ, spans[0].end)))
    return [(spans[0].of, digest.digest())]


def _read(file: pathlib.Path, descriptor: int, begin: int, end: int) -> memoryview:
    """Reads at most `_READ` bytes into this thread's buffer, which they share with its next read."""
    if getattr(_buffers, "view", None) is None:
        _buffers.view = memoryview(bytearray(_READ))
    view = _buffers.view[: end - begin]
    filled = 0
    while filled < len(view):
        count = os.preadv(descriptor, [view[filled:]], begin + filled)
        if count == 0:
            raise InvalidWeights(f"{file}: it became shorter while it was read")
        filled += count
    return view


def _header(file: pathlib.Path, descriptor: int, size: int) -> list[_Place]:
    """Returns where a safetensors file has its tensors, by their places: https://github.com/huggingface/safetensors#format."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > size - 8:
        raise InvalidWeights(f"{file}: it is not a whole safetensors file: its header ends behind the file's {size} bytes")
    if length > _HEADER_MAX:
        raise InvalidWeights(f"{file}: its header has {length} bytes; at most {_HEADER_MAX} are valid")
    try:
        header = json.loads(os.pread(descriptor, length, 8).decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        places = [_place(name, told, 8 + length) for name, told in header.items() if name != "__metadata__"]
    except (ValueError, RecursionError) as error:
        raise InvalidWeights(f"{file}: its safetensors header is not valid: {error}") from None
    places.sort(key=lambda place: (place.begin, place.end))
    behind = 8 + length
    for place in places:
        # What overlaps would be hashed many times.
        if place.begin < behind:
            raise InvalidWeights(f"{file}: its tensor {place.name[:200]!r} overlaps another")
        if place.end > size:
            raise InvalidWeights(f"{file}: it is cut off: its tensor {place.name[:200]!r} ends behind the file's {size} bytes")
        behind = place.end
    return places


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    told = dict(pairs)
    if len(told) != len(pairs):
        raise ValueError("it has a name twice")
    return told


def _place(name: str, told: object, data: int) -> _Place:
    """Reads one tensor's entry. `data`: where in the file the tensors' bytes begin."""
    if isinstance(told, dict):
        dtype, shape, offsets = told.get("dtype"), told.get("shape"), told.get("data_offsets")
        if (
            isinstance(dtype, str)
            and _are_sizes(shape)
            and _are_sizes(offsets)
            and len(offsets) == 2
            and offsets[0] <= offsets[1]
        ):
            return _Place(name, dtype, tuple(shape), data + offsets[0], data + offsets[1])
    raise ValueError(f"tensor {name[:200]!r} wants a dtype, a shape and data_offsets")


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
