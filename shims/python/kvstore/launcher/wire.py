"""What client and launcher say to each other: JSON behind its length, over a Unix socket of one user; with the first bytes of a request come
the client's three standard streams.

A request: :class:`Request`. Answers: ``{"pid": ...}`` and later ``{"status": ...}`` (as ``waitpid`` has it), or ``{"error": ...}``. Behind
its request, a client sends ``{"signal": ...}``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import stat
import struct
from dataclasses import dataclass

from kvstore import Invalid

from . import caps

__all__ = ["PASSED_ON", "STREAMS", "Request", "Stream", "checked_folder", "default_path", "peer"]

FORMAT = 1
# Signals that a client passes on. What a terminal sends goes to its whole group, as it does from a terminal.
PASSED_ON = {
    getattr(signal, name): to_all
    for name, to_all in [
        *((name, True) for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGWINCH")),
        *((name, False) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGALRM")),
    ]
}
_KINDS = ("script", "module", "command")
_LENGTH = struct.Struct("<I")
# What is read at a time.
_READ_BYTES = 1 << 16
STREAMS = 3


@dataclass(frozen=True)
class Request:
    """What is to run. ``what``: a script's path, a module's name or a command, by ``kind``. ``prefix``: of the client's Python.
    ``may_differ``: variables that may differ from those with which the launcher imported. ``ignored``: signals."""

    kind: str
    what: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    umask: int
    prefix: str
    may_differ: list[str]
    ignored: list[int]

    def message(self) -> dict:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def of(cls, message: dict) -> Request:
        """Raises Invalid, naming what is wrong."""
        message = dict(message)
        if (spoken := message.pop("format", None)) != FORMAT:
            raise Invalid(
                f"the request's format is {spoken!r}, and this launcher's is {FORMAT}; use the client of its own version"
            )
        names = {one.name for one in dataclasses.fields(cls)}
        if odd := sorted(names ^ message.keys()):
            raise Invalid(f"the request lacks these, or should not have them: {', '.join(odd)}")
        texts = lambda value: isinstance(value, list) and all(map(_is_text, value))
        rules = {
            "kind": lambda value: value in _KINDS,
            "arguments": texts,
            "may_differ": texts,
            "ignored": lambda value: isinstance(value, list) and all(type(one) is int and one in PASSED_ON for one in value),
            "umask": lambda value: type(value) is int and 0 <= value <= 0o777,
            "environment": lambda value: (
                isinstance(value, dict) and all(_is_text(one) and "=" not in one for one in value) and texts([*value.values()])
            ),
        }
        for name in sorted(names):
            if not rules.get(name, _is_text)(message[name]):
                raise Invalid(f"the request's {name} is not valid")
        return cls(**message)


def _is_text(value) -> bool:
    return isinstance(value, str) and "\0" not in value


class Stream:
    """A connection that does not block. It keeps what has come of a message, and the descriptors that came with it, until it is whole."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self.connection = connection
        self._came = bytearray()
        self.descriptors: list[int] = []

    def read(self) -> list[dict] | None:
        """Returns the messages that are whole now; more may wait in the socket. None: the other side has closed. Raises Invalid for what is
        no message."""
        while True:
            try:
                some, descriptors, flags, _ = socket.recv_fds(self.connection, _READ_BYTES, STREAMS)
            except BlockingIOError:
                return []
            except OSError:
                some, descriptors, flags = b"", [], 0
            self.descriptors += descriptors
            if flags & socket.MSG_CTRUNC or len(self.descriptors) > STREAMS:
                raise Invalid(f"more than {STREAMS} descriptors came")
            self._came += some
            # Nothing is read behind whole messages: one that sends for ever is kept waiting, and what is kept stays below a message and a read.
            if messages := self._whole():
                return messages
            if not some:
                return None

    def _whole(self) -> list[dict]:
        messages, start = [], 0
        while len(self._came) - start >= _LENGTH.size:
            length = _LENGTH.unpack_from(self._came, start)[0]
            # What is too long is refused before more of it is kept.
            if length > caps.MESSAGE_BYTES_MAX:
                raise Invalid(f"what came is no message of at most {caps.MESSAGE_BYTES_MAX} bytes")
            begin, end = start + _LENGTH.size, start + _LENGTH.size + length
            if len(self._came) < end:
                break
            try:
                message = json.loads(bytes(self._came[begin:end]))
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                raise Invalid("what came is no JSON object")
            messages.append(message)
            start = end
        del self._came[:start]
        return messages

    def send(self, message: dict) -> None:
        """Answers are short: a client that does not take them is not waited for."""
        try:
            self.connection.send(encoded(message))
        except OSError:
            pass

    def take_descriptors(self) -> list[int]:
        taken, self.descriptors = self.descriptors, []
        return taken

    def close(self) -> None:
        for descriptor in self.take_descriptors():
            os.close(descriptor)
        self.connection.close()


def encoded(message: dict) -> bytes:
    text = json.dumps(message).encode()
    if len(text) > caps.MESSAGE_BYTES_MAX:
        raise Invalid(f"the request has {len(text)} bytes; the most are {caps.MESSAGE_BYTES_MAX}")
    return _LENGTH.pack(len(text)) + text


def peer(connection: socket.socket) -> int:
    """Returns the user at the other end, as the kernel says."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", told)[1]


def _own_folder() -> pathlib.Path:
    """This user's folder of sockets: in its runtime folder, or in /tmp, where others could have made it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return pathlib.Path(f"{runtime}/kvstore" if runtime else f"/tmp/kvstore-{os.getuid()}")


def default_path() -> str:
    """Returns $KVSTORE_LAUNCHER, or a path of this user's."""
    return os.environ.get("KVSTORE_LAUNCHER") or f"{_own_folder()}/launcher/launcher.sock"


def checked_folder(path: str) -> pathlib.Path:
    """Makes the folder of a socket, and those above it, where there are none. Raises Invalid if one that it makes, this user's own, or that of
    the socket is another user's, is open to others, or is a link."""
    if len(os.fsencode(path)) > caps.PATH_BYTES_MAX:
        raise Invalid(f"{path}: a socket's path has at most {caps.PATH_BYTES_MAX} bytes; use --socket")
    folder = pathlib.Path(os.path.abspath(path)).parent
    own = _own_folder()
    # From the top: whoever owns a folder may put another one in the place of what is in it.
    for one in reversed((folder, *folder.parents)):
        is_ours = one in (folder, own) or own in one.parents
        if not os.path.lexists(one):
            is_ours = True
            # Another process may make it at the same time.
            with contextlib.suppress(FileExistsError):
                one.mkdir(mode=0o700)
        if is_ours:
            _check_private(one)
    return folder


def _check_private(folder: pathlib.Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise Invalid(f"{folder} is no folder, or a link to one; name a socket in a folder of your own by --socket")
    if found.st_uid != os.getuid():
        raise Invalid(f"{folder} belongs to user {found.st_uid}; name a socket in a folder of your own by --socket")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise Invalid(f"{folder} is open to others (mode {stat.S_IMODE(found.st_mode):o}): chmod 700 {folder}, or use --socket")
