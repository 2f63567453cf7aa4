"""Digests of files that were hashed before, in ``$XDG_CACHE_HOME/kvstore/weights``.

A file is known by its device, inode, size and times. A file that was written so lately that its times may not tell the next write is
not kept. Processes that start together hash a file once: the others wait for the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import tempfile
import time

from . import tensors
from .tensors import Tensor

__all__ = ["identity", "is_settled", "tensors_of"]

_FORMAT = b"kvstore weights 3\n"
# A file that was written so lately could be written again without its times telling.
_SETTLED_SECONDS = 2.0


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Returns what changes when a file is written or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_settled(status: os.stat_result) -> bool:
    """Returns whether a file's times will tell if it is written again."""
    return time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS


def tensors_of(file: pathlib.Path) -> list[Tensor]:
    """Returns a file's tensors: see :func:`tensors.read`. A link's name tells its format, and its target has the content."""
    is_safetensors = file.suffix == ".safetensors"
    status = file.stat()
    if not is_settled(status):
        return tensors.read(file, is_safetensors=is_safetensors)
    known = repr((_FORMAT, is_safetensors, identity(status))).encode()
    kept = _cache_folder() / hashlib.sha256(known).hexdigest()
    # A file's ranks start together: one of them hashes it, the others wait for that.
    with _alone(kept):
        with contextlib.suppress(OSError, ValueError):
            return _parse(kept.read_bytes())
        found = tensors.read(file, is_safetensors=is_safetensors)
        # What was written meanwhile is hashed again. Without a place to keep digests, it is hashed again as well.
        if identity(file.stat()) == identity(status):
            with contextlib.suppress(OSError):
                _keep(kept, found)
    return found


def _keep(kept: pathlib.Path, found: list[Tensor]) -> None:
    body = json.dumps([[one.name, one.dtype, one.shape, one.bytes, one.digest.hex()] for one in found]).encode()
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as written:
        written.write(_FORMAT + hashlib.sha256(body).digest() + body)
        written.flush()
        os.replace(written.name, kept)


def _parse(content: bytes) -> list[Tensor]:
    body = content[len(_FORMAT) + 32 :]
    if content[: len(_FORMAT) + 32] != _FORMAT + hashlib.sha256(body).digest():
        raise ValueError("these are not whole digests")
    return [Tensor(name, dtype, tuple(shape), size, bytes.fromhex(hex)) for name, dtype, shape, size, hex in json.loads(body)]


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
            # Closing it would not, where a child that was forked meanwhile has it open, too.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            lock.close()


def _cache_folder() -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(cache) / "kvstore" / "weights"
