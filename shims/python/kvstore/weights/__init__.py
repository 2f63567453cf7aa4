"""Names a model's weights by a digest of all their bytes, and loads weights from snapshots (:func:`load`).

Blocks are reused between processes and nodes. A block that was computed with other weights would give wrong tokens. A model's
name does not identify its weights: a folder can be trained further, and a name can be pushed again. Samples of the bytes can miss
a few changed rows of an embedding. So every byte is hashed, at some gigabytes a second on several cores, from files that the
engine reads anyway.

The name is made of the tensors (name, data type, shape and bytes) in the files that the engine loads, and of what the configuration
says. How a save splits and orders them, and where the files lie, does not matter. Files that are not safetensors count as they
are, whatever their names. Each file is hashed once: digests are kept between starts.

``python -m kvstore.weights FOLDER`` shows what a name is made of.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import logging
import os
import pathlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

from . import configs, files, kept
from .loading import Held, hold, hold_async, load, load_async
from .tensors import InvalidWeights, Tensor, threads

__all__ = [
    "ERRORS",
    "Held",
    "InvalidWeights",
    "Weights",
    "combine",
    "fingerprint",
    "folder_of",
    "hold",
    "hold_async",
    "load",
    "load_async",
    "name",
    "read",
    "read_adapter",
]

# Why weights cannot be named by their files.
ERRORS = (OSError, InvalidWeights)
_FORMAT = b"kvstore weights 3"
# Pieces that threads hash side by side: a digest is of the pieces' digests.
_PIECE = 64 << 20
# Parts that are hashed at a time.
_WAITING = 16

_said: set[tuple[str, bytes]] = set()


@dataclass(frozen=True)
class Weights:
    """What weights are made of. ``digest`` names them. ``tensors`` are sorted by name. ``configs``: each configuration file's name and
    a digest of what it says. ``seconds``: how long reading them took."""

    digest: bytes
    tensors: list[Tensor]
    configs: list[tuple[str, bytes]]
    files: list[str]
    seconds: float

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    def say(self, model: str, logger: logging.Logger) -> None:
        """Logs the name, once in this process."""
        if (model, self.digest) not in _said:
            _said.add((model, self.digest))
            logger.info("kvstore: the weights of %s are %s: %s", model, self.digest.hex(), self.summary())

    def summary(self) -> str:
        """Returns how much there is, in words."""
        amounts = f"{len(self.tensors)} tensors, {self.bytes / 1e9:.3f} GB, {len(self.files)} files"
        return f"{amounts}, read in {self.seconds:.2f} s"


def folder_of(model: str, revision: str | None = None, cache: str | None = None) -> pathlib.Path | None:
    """Returns the folder or file of a model's weights: a path, or a repository's snapshot in the Hugging Face cache. It never
    downloads anything."""
    path = pathlib.Path(model)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return pathlib.Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception:  # Not installed, not a repository's name, or not in the cache: all mean that there is none.
        return None


def read(path: str | os.PathLike, engine: str = "vllm", load_format: str = "auto") -> Weights:
    """Returns what the weights in a folder or in one file are made of. ``engine``: "vllm", "sglang", or "any" for all that either
    would load. ``load_format``: the engine's own setting.

    Raises InvalidWeights if a file is not what its name says, FileNotFoundError if there are no weights, and OSError if they cannot
    be read.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _read([path], [])
    return _read(files.loaded(path, engine, load_format), configs.digests(path))


def read_adapter(folder: str | os.PathLike) -> Weights:
    """Returns what an adapter is made of, wherever it lies and whatever its base is called. Raises as :func:`read` does."""
    folder = pathlib.Path(folder)
    return _read(files.adapter(folder), configs.of_adapter(folder))


def fingerprint(path: str | os.PathLike, engine: str = "vllm", load_format: str = "auto") -> bytes:
    """Returns 32 bytes that name weights: see :func:`read`."""
    return read(path, engine, load_format).digest


def name(
    model: str,
    version: str,
    logger: logging.Logger,
    *,
    revision: str | None = None,
    engine: str = "any",
    load_format: str = "auto",
    says: bool = True,
) -> bytes:
    """Returns 32 bytes that name a model's weights, for an engine that tells only ``model``. They are made from the model's files
    if these are on this machine, and from its name and ``version`` otherwise. ``says``: whether the name is logged."""
    digest = hashlib.sha256(repr((version, revision)).encode())
    folder = folder_of(model, revision)
    why = "its files are not on this machine"
    try:
        if folder is not None:
            found = read(folder, engine, load_format)
            if says:
                found.say(model, logger)
            digest.update(found.digest)
    except ERRORS as error:
        folder, why = None, str(error)
    if folder is None:
        digest.update(repr(model).encode())
        if not version:
            logger.warning(
                "kvstore: the blocks of %s are named by the model's name: %s. Set weights_version if the weights can change under "
                "that name.",
                model,
                why,
            )
    return digest.digest()


def _read(paths: list[pathlib.Path], told: list[tuple[str, bytes]]) -> Weights:
    start = time.monotonic()
    found = [tensor for file in paths for tensor in kept.tensors_of(file)]
    # Of tensors of one name, the engine takes the last one: those that differ stay in the order of their files.
    named = _unique(sorted((one for one in found if not one.is_file), key=lambda tensor: tensor.name))
    whole = _unique(sorted((one for one in found if one.is_file), key=lambda file: file.digest))
    digest = hashlib.sha256(_FORMAT)
    of_tensors, of_files = ([(one.name, one.digest) for one in some] for some in (named, whole))
    for kind, parts in ((b"config", told), (b"tensor", of_tensors), (b"file", of_files)):
        digest.update(b"%s %d " % (kind, len(parts)))
        for part, content in parts:
            encoded = part.encode(errors="surrogatepass")
            digest.update(b"%d " % len(encoded) + encoded + content)
    return Weights(digest.digest(), [*named, *whole], told, [file.name for file in paths], time.monotonic() - start)


def _unique(ordered: list[Tensor]) -> list[Tensor]:
    return [one for at, one in enumerate(ordered) if not at or one != ordered[at - 1]]


def combine(parts: Iterable[tuple[bytes, bytes | memoryview]]) -> bytes:
    """Returns 32 bytes that name these parts, each a name and its bytes, in this order. Several threads hash large parts."""
    digest = hashlib.sha256(b"kvstore weights 2")
    waiting: collections.deque[tuple[bytes, int, list[concurrent.futures.Future]]] = collections.deque()

    def take_oldest() -> None:
        name, length, pieces = waiting.popleft()
        digest.update(b"%d %d " % (len(name), length) + name)
        for piece in pieces:
            digest.update(piece.result())

    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
        for name, content in parts:
            view = memoryview(content).cast("B")
            pieces = [view[at : at + _PIECE] for at in range(0, max(len(view), 1), _PIECE)]
            waiting.append((name, len(view), [pool.submit(_sha256, piece) for piece in pieces]))
            # Parts may be copies that live as long as they wait.
            while len(waiting) > _WAITING:
                take_oldest()
        while waiting:
            take_oldest()
    return digest.digest()


def _sha256(content) -> bytes:
    return hashlib.sha256(content).digest()
