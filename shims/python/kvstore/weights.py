"""Names a model's weights by a fingerprint of all their bytes.

Blocks are reused between processes and nodes. A block that was computed with other weights would give wrong tokens. A model's
name does not identify its weights: a folder can be trained further, and a name can be pushed again. Samples of the bytes can miss
a few changed rows of an embedding. So every byte is hashed, at some gigabytes a second on several cores, from files that the
engine reads anyway. Each file is hashed once: digests are kept in ``$XDG_CACHE_HOME/kvstore/weights``, by the file's device,
inode, size and times. A file in the Hugging Face cache is named by its digest.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterable

__all__ = ["combine", "fingerprint", "folder_of", "name"]

# Pieces that threads hash side by side: a digest is of the pieces' digests.
_PIECE = 64 << 20
# Parts that are hashed at a time.
_WAITING = 16
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_CONFIGS = ("config.json", "adapter_config.json", "hf_quant_config.json", "quantize_config.json")
# A file that was written so lately could be written again without its times telling.
_SETTLED_SECONDS = 2.0


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


def fingerprint(path: str | os.PathLike) -> bytes:
    """Returns 32 bytes that name the weights in a folder or in one file.

    Raises FileNotFoundError if there are no weights, and OSError if they cannot be read.
    """
    path = pathlib.Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _WEIGHTS)
    if not files:
        raise FileNotFoundError(f"{path}: there are no weights in it ({', '.join(_WEIGHTS)})")
    configs = [] if path.is_file() else [path / name for name in _CONFIGS if (path / name).is_file()]
    parts = [(file.name.encode(), file.read_bytes()) for file in configs]
    return combine([*parts, *((b"", _content(file)) for file in files)])


def name(model: str, version: str, logger: logging.Logger, *, revision: str | None = None) -> bytes:
    """Returns 32 bytes that name a model's weights, for an engine that tells only ``model``. They are made from the bytes of the
    model's files if these are on this machine, and from its name and ``version`` otherwise."""
    digest = hashlib.sha256(repr((version, revision)).encode())
    folder = folder_of(model, revision)
    try:
        digest.update(fingerprint(folder) if folder else repr(model).encode())
    except OSError:
        folder = None
        digest.update(repr(model).encode())
    if folder is None and not version:
        logger.warning(
            "kvstore: the files of %s are not on this machine, so its blocks are named by the model's name. Set "
            "weights_version if the weights can change under that name.",
            model,
        )
    return digest.digest()


def combine(parts: Iterable[tuple[bytes, bytes | memoryview]]) -> bytes:
    """Returns 32 bytes that name these parts, each a name and its bytes, in this order. Several threads hash large parts."""
    digest = hashlib.sha256(b"kvstore weights 2")
    waiting: collections.deque[tuple[bytes, int, list[concurrent.futures.Future]]] = collections.deque()

    def take_oldest() -> None:
        name, length, pieces = waiting.popleft()
        digest.update(b"%d %d " % (len(name), length) + name)
        for piece in pieces:
            digest.update(piece.result())

    with concurrent.futures.ThreadPoolExecutor(_threads()) as threads:
        for name, content in parts:
            view = memoryview(content).cast("B")
            pieces = [view[at : at + _PIECE] for at in range(0, max(len(view), 1), _PIECE)]
            waiting.append((name, len(view), [threads.submit(_sha256, piece) for piece in pieces]))
            # Parts may be copies that live as long as they wait.
            while len(waiting) > _WAITING:
                take_oldest()
        while waiting:
            take_oldest()
    return digest.digest()


def _sha256(content) -> bytes:
    return hashlib.sha256(content).digest()


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), 8)


def _content(file: pathlib.Path) -> bytes:
    """Returns 32 bytes that name a file's content."""
    real = file.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return bytes.fromhex(real.name)
    status = real.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    kept = _cache_folder() / hashlib.sha256(repr(identity).encode()).hexdigest()
    if time.time() - max(status.st_mtime, status.st_ctime) <= _SETTLED_SECONDS:
        return _hash_file(real, status.st_size)
    # A file's ranks start together: one of them hashes it, the others wait for that.
    with _alone(kept):
        with contextlib.suppress(OSError):
            if len(digest := kept.read_bytes()) == 32:
                return digest
        digest = _hash_file(real, status.st_size)
        # Without a place to keep it, it is hashed again.
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as written:
            written.write(digest)
            written.flush()
            os.replace(written.name, kept)
    return digest


def _hash_file(file: pathlib.Path, size: int) -> bytes:
    with open(file, "rb", buffering=0) as opened:
        offsets = range(0, max(size, 1), _PIECE)
        with concurrent.futures.ThreadPoolExecutor(_threads()) as threads:
            pieces = list(threads.map(lambda at: _sha256(os.pread(opened.fileno(), _PIECE, at)), offsets))
    return _sha256(b"%d " % size + b"".join(pieces))


@contextlib.contextmanager
def _alone(kept: pathlib.Path):
    """Admits one process at a time of those that look for this digest. If no lock file can be made, it admits all at once."""
    lock = None
    with contextlib.suppress(OSError):
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(kept.parent / f"{kept.name}.lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _cache_folder() -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(cache) / "kvstore" / "weights"
