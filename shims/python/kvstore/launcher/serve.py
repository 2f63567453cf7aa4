"""``serve``: owns the socket, and starts templates. It imports no engine. A template that says that it is stale, or that has ended, is
followed by another one; those that come meanwhile wait in the socket's queue."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass

from kvstore import Busy, Error, Invalid

from . import caps, wire

__all__ = ["serve"]


@dataclass
class _Template:
    """``is_current``: it takes requests, or will."""

    process: subprocess.Popen
    control: socket.socket
    is_current: bool = True


class Launcher:
    def __init__(self, path: str, imports: list[str], workers_max: int):
        self._path, self._imports, self._workers_max = path, imports, workers_max
        folder = wire.checked_folder(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(folder / f"{os.path.basename(path)}.lock", flags, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another launcher serves at {path}; end it, or name another path by --socket") from None
        self._listener = self._listen()
        self._templates: list[_Template] = []
        self._retry_seconds, self._start_at = caps.RETRY_SECONDS, 0.0
        self._was_ready = self._is_ending = False
        self._wakes, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._end())

    def _listen(self) -> socket.socket:
        # Whoever has the lock owns the path: what is there was left by one that was killed.
        if os.path.lexists(self._path):
            if not _is_socket(self._path):
                raise Invalid(f"{self._path} is no socket; name another path by --socket")
            os.unlink(self._path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._path)
        os.chmod(self._path, 0o600)
        listener.listen(caps.NEWCOMERS_MAX)
        return listener

    def serve(self) -> int:
        """Serves until a signal ends it. Returns the exit status."""
        try:
            while not (self._is_ending and not self._templates):
                self._start()
                calls = {self._wakes: lambda: os.read(self._wakes, 4096)}
                for one in self._templates:
                    calls[one.control.fileno()] = lambda one=one: self._hear(one)
                poll = select.poll()
                for descriptor in calls:
                    poll.register(descriptor, select.POLLIN)
                wait = None if self._has_current() or self._is_ending else max(1.0, (self._start_at - time.monotonic()) * 1000)
                for descriptor, _ in poll.poll(wait):
                    calls[descriptor]()
            return 0 if self._was_ready else 1
        finally:
            os.unlink(self._path)

    def _has_current(self) -> bool:
        return any(one.is_current for one in self._templates)

    def _start(self) -> None:
        if self._has_current() or self._is_ending or time.monotonic() < self._start_at:
            return
        ours, theirs = socket.socketpair()
        passed = (self._listener.fileno(), theirs.fileno())
        command = [sys.executable, *_flags(), "-m", "kvstore.launcher", "template"]
        command += [*map(str, passed), str(self._workers_max), ",".join(self._imports)]
        # A group of its own: what a terminal sends is for this process alone.
        process = subprocess.Popen(command, pass_fds=passed, stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        self._templates.append(_Template(process, ours))

    def _hear(self, one: _Template) -> None:
        try:
            told = one.control.recv(4096).decode(errors="replace")
        except OSError:
            told = ""
        if not told:
            return self._bury(one)
        for line in told.splitlines():
            what, _, rest = line.partition(" ")
            if what == "ready":
                self._was_ready = True
                self._retry_seconds = caps.RETRY_SECONDS
                say(f"ready at {self._path}: {rest}")
            elif what == "stale":
                one.is_current = False
                say(f"{rest} has changed: importing again")
        return None

    def _bury(self, one: _Template) -> None:
        status = one.process.wait()
        one.control.close()
        self._templates.remove(one)
        if self._is_ending or not one.is_current:
            return
        if not self._was_ready:
            say("the imports failed; see above")
            self._is_ending = True
            return
        say(f"the template ended with {status}; the next one starts in {self._retry_seconds:.0f} s")
        self._start_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, caps.RETRY_SECONDS_MAX)

    def _end(self) -> None:
        self._is_ending = True
        for one in self._templates:
            one.process.terminate()


def _flags() -> list[str]:
    """The interpreter's own options: workers have them, too."""
    return subprocess._args_from_interpreter_flags()


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)


def say(what: str) -> None:
    print(f"kvstore launcher: {what}", file=sys.stderr, flush=True)


def serve(path: str, imports: list[str], workers_max: int) -> int:
    """Returns the exit status."""
    for number in range(wire.STREAMS):
        try:
            os.fstat(number)
        except OSError:  # Closed: a socket would get its number.
            os.open(os.devnull, os.O_RDWR)
    try:
        return Launcher(path, imports, workers_max).serve()
    except (Error, OSError) as error:
        say(str(error))
        return 1
