"""What snapshots, their parts and answers about them are, as values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Checked", "Collected", "Difference", "Differences", "File", "Progress", "Snapshot", "Snapshots", "Tensor", "size"]

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(value: int | str) -> int:
    """Returns bytes: of a number, or of a text such as "16GiB", "16G" or "500 MiB"; units are powers of 1024."""
    if isinstance(value, int):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*", value, re.IGNORECASE)
    if not found:
        from kvstore import Invalid

        raise Invalid(f"{value!r} is not a size; use bytes, or a text such as '16GiB'")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class Progress:
    """How far a call is. ``total``: the bytes of all files. ``done``: of those, the bytes that are done. ``found``: of those, the
    bytes that were there already. ``moved``: bytes that went to the store or came from it. ``seconds``: since the call began."""

    total: int
    done: int
    found: int
    moved: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second, so far."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at this rate. None: not known yet."""
        return (self.total - self.done) / self.rate if self.done else None


@dataclass(frozen=True)
class Snapshot:
    """A snapshot. ``bytes``: of its files. ``chunk_bytes``: of its distinct chunks, as they are in files. ``names``: what means it
    now; only :meth:`Store.ls` and :meth:`Store.inspect` look all of them up. ``found_bytes`` and ``written_bytes``: of a save, what was in
    the store already, and what went there."""

    id: str
    names: list[str]
    created: str
    source: str
    writer: str
    facts: dict[str, str]
    ranks: int
    files: int
    tensors: int
    bytes: int
    chunks: int
    chunk_bytes: int
    found_bytes: int = 0
    written_bytes: int = 0


class Snapshots(list[Snapshot]):
    """Snapshots, the newest first. ``unreadable``: why others cannot be read, by their ids."""

    def __init__(self, readable: Iterable[Snapshot] = (), unreadable: Mapping[str, str] | None = None):
        super().__init__(readable)
        self.unreadable = dict(unreadable or {})


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: ``start`` and ``end`` are in bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class File:
    """A file of a snapshot. ``chunks``: bytes and digest of each, in order."""

    path: str
    bytes: int
    executable: bool
    chunks: list[tuple[int, str]] = field(repr=False)
    tensors: list[Tensor] = field(repr=False)


@dataclass(frozen=True)
class Checked:
    """What a check found. ``sound``: how many chunks are right. ``wrong``: digest and damage of those that are not."""

    id: str
    sound: int
    wrong: list[tuple[str, str]]


@dataclass(frozen=True)
class Difference:
    """What differs: a ``tensor`` of a ``file``, or, if that is None, what of the file is outside of tensors. ``change``: "added",
    "removed" or "changed"."""

    file: str
    tensor: str | None
    change: str
    bytes: int


@dataclass(frozen=True)
class Differences:
    """What the second snapshot has otherwise than the first. ``shared_bytes`` and ``new_bytes``: of the second's chunks."""

    first: str
    second: str
    differences: list[Difference]
    shared_bytes: int
    new_bytes: int


@dataclass(frozen=True)
class Collected:
    """What a collection came to. ``snapshots`` and ``chunks``: those that stay. ``failed``: objects that the store did not
    delete; the next collection takes them."""

    dry_run: bool
    snapshots: int
    gone_snapshots: int
    chunks: int
    gone_chunks: int
    gone_bytes: int
    failed: int


def listed(answer: str) -> Snapshots:
    """Of the answer to ``ls``."""
    told = json.loads(answer)
    return Snapshots((Snapshot(**one) for one in told["snapshots"]), {one["id"]: one["error"] for one in told["unreadable"]})


def saved(answer: str) -> Snapshot:
    """Of the answer to ``save``."""
    return Snapshot(**json.loads(answer))


def inspected(answer: str) -> tuple[Snapshot, list[File]]:
    """Of the answer to ``inspect``."""
    told = json.loads(answer)
    files = told.pop("files")
    told["files"] = len(files)
    return Snapshot(**told), [_file(one) for one in files]


def _file(told: dict) -> File:
    tensors = [Tensor(**{**one, "shape": tuple(one["shape"])}) for one in told.get("tensors", ())]
    chunks = [(one["bytes"], one["chunk"]) for one in told["chunks"]]
    return File(told["path"], told["bytes"], told["executable"], chunks, tensors)


def checked(answer: str) -> Checked:
    """Of the answer to ``verify``."""
    told = json.loads(answer)
    return Checked(told["id"], told["sound"], [(one["chunk"], one["error"]) for one in told["wrong"]])


def differences(answer: str) -> Differences:
    """Of the answer to ``diff``."""
    told = json.loads(answer)
    return Differences(**{**told, "differences": [Difference(**one) for one in told["differences"]]})


def collected(answer: str) -> Collected:
    """Of the answer to ``gc``."""
    return Collected(**json.loads(answer))
