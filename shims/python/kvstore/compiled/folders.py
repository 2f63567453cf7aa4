"""Private folders of compile caches: one for each engine, with the variables that make torch, Triton and others use it.

A folder has a lock beside it, which the engine's processes share. Whoever makes a folder removes those that nobody holds: what a killed
engine left. Files in it are copies (reflinks, where the file system has them) and never links: compilers write in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator

from kvstore import Invalid

__all__ = ["TIMES", "VARIABLES", "Folder", "base", "copy_tree", "held", "list_files", "make"]

# Which folder, below the private one, each variable names.
VARIABLES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "DG_JIT_CACHE_DIR": "deep_gemm",
}
# Torch makes a precompiled header of 75 MB outside of its cache, and reads all that is in it again at each load: 10 to 20 s on two cores, where
# the kernels' own code takes some seconds. It is a part of their names, so it is off from the first compilation on.
_SETTINGS = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
# Of vLLM's folder, what is compiled or was found out about a model's class. The rest is downloads, and facts about one machine.
_OF_VLLM = ("torch_compile_cache", "modelinfos")
# A file with the times of all others: some build tools compare them.
TIMES = "times.json"
_OWN = "KVSTORE_COMPILE_CACHE_FOLDER"
_FICLONE = 0x40049409


class Folder:
    """A private folder. ``told``: what it is for, as its lock file says. It is there while this process or a child of it holds it."""

    def __init__(self, path: pathlib.Path, lock: int, told: dict):
        self.path, self._lock, self.told, self._process = path, lock, told, os.getpid()

    def environment(self) -> dict[str, str]:
        """Returns the variables that make compilers use it."""
        return {_OWN: str(self.path), **_SETTINGS, **{name: str(self.path / below) for name, below in VARIABLES.items()}}

    def enter(self) -> None:
        """Sets the variables in this process."""
        for below in VARIABLES.values():
            (self.path / below).mkdir(exist_ok=True)
        os.environ.update(self.environment())
        if (config := sys.modules.get("torch._inductor.config")) is not None:
            # It has read the variable already.
            config.cpp_cache_precompile_headers = False

    def tell(self, more: dict) -> None:
        """Says more of what it is for."""
        text = json.dumps({**self.told, **more}).encode()
        # As others read it.
        self.told = json.loads(text)
        if self._lock >= 0:
            os.pwrite(self._lock, text, 0)
            os.ftruncate(self._lock, len(text))

    def close(self) -> None:
        """Removes the folder, unless a child of this process holds it."""
        if self._lock < 0 or os.getpid() != self._process:
            return
        os.close(self._lock)
        self._lock = -1
        with contextlib.suppress(OSError), _locked(self.path.parent):
            _remove_unheld(_lock_of(self.path))

    @classmethod
    def entered(cls) -> Folder | None:
        """Returns the folder that this process was started with. None: it was started with none."""
        if not (told := os.environ.get(_OWN)):
            return None
        path = pathlib.Path(told)
        try:
            lock = os.open(_lock_of(path), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(lock, fcntl.LOCK_SH)
        with open(_lock_of(path)) as file:
            return cls(path, lock, json.load(file))


def base() -> pathlib.Path:
    """Makes and returns the folder of all private folders: $KVSTORE_COMPILE_CACHE_BASE, or one in this user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = pathlib.Path(os.environ.get("KVSTORE_COMPILE_CACHE_BASE") or f"{cache}/kvstore/compiled").absolute()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.stat()
    # What lies there is code that will run.
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise Invalid(f"{path}: others may write to it; chmod 700 it, or name another by KVSTORE_COMPILE_CACHE_BASE")
    return path


def make(told: dict) -> Folder:
    """Makes an empty private folder. ``told``: what it is for."""
    at = base()
    with _locked(at):
        for lock in at.glob("engine-*.lock"):
            with contextlib.suppress(OSError):
                _remove_unheld(lock)
        for left in (path for path in at.glob("engine-*") if path.is_dir() and not _lock_of(path).exists()):
            shutil.rmtree(left, ignore_errors=True)
        path = pathlib.Path(tempfile.mkdtemp(prefix="engine-", dir=at))
        lock = os.open(_lock_of(path), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.write(lock, json.dumps(told).encode())
        fcntl.flock(lock, fcntl.LOCK_SH)
    return Folder(path, lock, told)


def held() -> Iterator[tuple[pathlib.Path, dict]]:
    """Yields the folders that engines of this user hold, the newest first, and what each is for."""
    paths = [path for path in base().glob("engine-*") if path.is_dir() and _lock_of(path).exists()]
    for path in sorted(paths, key=lambda path: _lock_of(path).stat().st_mtime, reverse=True):
        with open(_lock_of(path), "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield path, json.load(lock)


def _lock_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.lock")


@contextlib.contextmanager
def _locked(at: pathlib.Path) -> Iterator[None]:
    with open(os.open(at / "all.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        # A child that was forked meanwhile has it open, too.
        fcntl.flock(lock, fcntl.LOCK_UN)


def _remove_unheld(lock: pathlib.Path) -> None:
    with open(lock, "rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink()


def list_files(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Returns the files below a private folder that are worth keeping, each with its length and time: those that are whole, and mean the
    same on another machine."""
    found = {}
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_passing(name)]
        below = pathlib.Path(at).relative_to(folder)
        if below == pathlib.Path("vllm"):
            folders[:], files = [name for name in folders if name in _OF_VLLM], []
        for name in files:
            try:
                meta = os.lstat(os.path.join(at, name))
            except FileNotFoundError:
                continue
            if stat.S_ISREG(meta.st_mode) and not _is_passing(name) and below != pathlib.Path("."):
                found[str(below / name)] = (meta.st_size, meta.st_mtime_ns)
    return found


def _is_passing(name: str) -> bool:
    """Whether a name is one of a lock, or of what is being written."""
    return (
        name.endswith((".lock", ".tmp", ".pid")) or name.startswith((".tmp", "tmp.", "tmp_")) or name in ("locks", "__pycache__")
    )


def copy_tree(source: pathlib.Path, to: pathlib.Path, times: dict[str, int]) -> None:
    """Copies the files that ``times`` names, with these times. One that goes or changes meanwhile is left out."""
    for path, time_ns in times.items():
        target = to / path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            before = os.stat(source / path)
            _copy(source / path, target)
            after = os.stat(source / path)
        except FileNotFoundError:
            target.unlink(missing_ok=True)
            continue
        if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
            target.unlink()
            continue
        os.chmod(target, 0o700 if before.st_mode & 0o100 else 0o600)
        os.utime(target, ns=(time_ns, time_ns))


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    with open(source, "rb") as one, open(target, "wb") as other:
        try:
            fcntl.ioctl(other, _FICLONE, one.fileno())
        except OSError:
            shutil.copyfileobj(one, other, 1 << 20)
