"""Whether this process may be forked: what a fork does not survive, by name; and whether it is still what a new process would be."""

from __future__ import annotations

import os
import pathlib
import socket
import sys
import threading
from collections.abc import Collection, Iterable, Mapping

__all__ = ["Sources", "differing", "unfit"]

_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/infiniband/", "/dev/accel", "/dev/davinci", "/dev/vfio/")
# Kinds of descriptors that parent and child would share, by what /proc calls them.
_SHARED = {"anon_inode:[eventpoll]": "an event loop (epoll)", "anon_inode:[io_uring]": "a ring (io_uring)"}
# Variables that Python, the C library and libraries read once, while they start or are imported. A name, or the beginning of names.
_READ_ONCE = (
    *("PYTHON", "LD_", "GLIBC_TUNABLES", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "BLIS_", "NUMEXPR_"),
    *("TORCH", "PYTORCH_", "TRITON_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "VLLM_LOGGING_", "VLLM_CONFIGURE_LOGGING"),
    *("VLLM_TARGET_DEVICE", "VLLM_USE_MODELSCOPE", "SGLANG_LOGGING_", "RAYON_"),
)
# Of those, what is read when it is needed.
_READ_LATE = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PYTHONUNBUFFERED", "PYTHON_HISTORY", "HF_TOKEN")


def unfit(own: Collection[int], workers: Collection[int]) -> list[str]:
    """Returns what a fork of this process would not survive. ``own``: descriptors that a child closes. ``workers``: its children."""
    return [*_threads(), *_processes(workers), *_descriptors(own), *_contexts()]


def _threads() -> list[str]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = []
    for task in pathlib.Path("/proc/self/task").iterdir():
        if int(task.name) != os.getpid():
            try:
                found.append(f"the thread {names.get(int(task.name)) or (task / 'comm').read_text().strip()!r}")
            except OSError:  # It has ended.
                pass
    return found


def _processes(workers: Collection[int]) -> list[str]:
    try:
        children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    except OSError:  # Some kernels do not tell.
        return []
    found = []
    for child in map(int, children):
        if child not in workers:
            try:
                found.append(f"the child process {child} ({pathlib.Path(f'/proc/{child}/comm').read_text().strip()})")
            except OSError:
                pass
    return found


def _descriptors(own: Collection[int]) -> list[str]:
    found = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # That of the listing itself.
            continue
        if descriptor in own or descriptor <= 2:
            continue
        if target.startswith(_DEVICES):
            found.append(f"the open device {target}")
        elif target in _SHARED:
            found.append(_SHARED[target])
        elif target.startswith("socket:"):
            found += _connection(descriptor)
    return found


def _connection(descriptor: int) -> list[str]:
    with socket.socket(fileno=os.dup(descriptor)) as one:
        try:
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return [f"the socket that listens at {one.getsockname()!r}"]
            return [f"the connection to {one.getpeername() or 'a socket without a name'!r}"]
        except OSError:  # Neither.
            return []


def _contexts() -> list[str]:
    found = []
    for device in ("cuda", "xpu", "npu", "hpu"):
        module = sys.modules.get(f"torch.{device}")
        is_initialized = getattr(module, "is_initialized", None)
        if is_initialized is not None and is_initialized():
            found.append(f"a context of torch.{device}")
    return found


def differing(imported: Mapping[str, str], asked: Mapping[str, str], allowed: Iterable[str]) -> list[str]:
    """Returns the variables that differ between two environments, and that are read only once."""
    allowed = {*allowed, *_READ_LATE}
    names = sorted(name for name in imported.keys() | asked.keys() if name.startswith(_READ_ONCE) and name not in allowed)
    return [name for name in names if imported.get(name) != asked.get(name)]


class Sources:
    """The files of all modules that are imported, as they are now."""

    def __init__(self) -> None:
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        self._seen = {file: _stat(file) for file in files if isinstance(file, str)}

    def changed(self) -> str | None:
        """Returns a file that is another one now. None: all are the same."""
        return next((file for file, seen in self._seen.items() if _stat(file) != seen), None)


def _stat(file: str) -> tuple | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
