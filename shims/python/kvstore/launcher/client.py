"""``run``: asks the launcher for a worker, passes signals on to it, and ends as it ends."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time

from kvstore import Invalid, Unavailable

from . import wire

__all__ = ["ERROR_STATUS", "run"]

# The exit status where no worker was started, or where the launcher ended before it could say how the worker did.
ERROR_STATUS = 125


def request(kind: str, what: str, arguments: list[str], may_differ: list[str]) -> wire.Request:
    """Returns what this process asks for: its own environment, folder and so on."""
    mask = os.umask(0o077)
    os.umask(mask)
    ignored = [int(number) for number in wire.PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    return wire.Request(kind, what, arguments, dict(os.environ), os.getcwd(), mask, sys.prefix, may_differ, ignored)


class _Worker:
    """``messages``: those that came behind the one that it has begun."""

    def __init__(self, stream: wire.Stream, pid: int, messages: list[dict]):
        self._stream, self.pid, self._messages = stream, pid, messages

    def _ended(self, messages: list[dict]) -> int | None:
        for message in messages:
            if "error" in message:
                raise Unavailable(f"the worker {self.pid} is ended: {message['error']}")
            if "status" in message:
                return message["status"]
        return None

    def wait(self) -> int:
        """Passes signals on until the worker has ended. Returns how, as ``waitpid`` has it."""
        wakes, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        for number in wire.PASSED_ON:
            # Who is started with nohup ignores it.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        poll = select.poll()
        poll.register(wakes, select.POLLIN)
        poll.register(self._stream.connection, select.POLLIN)
        status = self._ended(self._messages)
        while status is None:
            for descriptor, _ in poll.poll():
                if descriptor == wakes:
                    for number in os.read(wakes, 4096):
                        self._stream.send({"signal": number})
                    continue
                if (messages := self._stream.read()) is None:
                    raise Unavailable(f"the launcher ended, and with it its worker {self.pid}")
                status = self._ended(messages)
        return status


def _start(path: str, asked: wire.Request, seconds: float) -> _Worker:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(seconds)
    try:
        connection.connect(path)
    except OSError as error:
        raise Unavailable(f"no launcher answers at {path} ({error}): start one with python -m kvstore.launcher serve") from None
    if (user := wire.peer(connection)) not in (os.getuid(), 0):
        raise Invalid(f"the launcher at {path} belongs to user {user}")
    message = wire.encoded(asked.message())
    try:
        sent = socket.send_fds(connection, [message], _streams())
        connection.sendall(message[sent:])
    except OSError:
        # It says why it does not take all of it.
        pass
    stream = wire.Stream(connection)
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if not poll.poll(left * 1000):
            break
        messages = stream.read()
        if messages is None:
            raise Unavailable(f"the launcher at {path} closed the connection")
        for at, answer in enumerate(messages):
            if "error" in answer:
                raise Invalid(answer["error"])
            if "pid" in answer:
                return _Worker(stream, answer["pid"], messages[at + 1 :])
    raise Unavailable(f"the launcher did not start a worker within {seconds:.0f} s")


def _streams() -> list[int]:
    """Standard input, output and error; nothing in the place of one that is closed."""
    streams = []
    for number in range(wire.STREAMS):
        try:
            os.fstat(number)
        except OSError:
            number = os.open(os.devnull, os.O_RDWR)
        streams.append(number)
    return streams


def _end_as(status: int) -> None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        # Its memory is of no use to anybody.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        os._exit(128 + number)
    os._exit(os.waitstatus_to_exitcode(status))


def run(path: str, asked: wire.Request, seconds: float, cold: list[str] | None) -> int:
    """Runs a worker, and ends as it ends. Returns the exit status if there was none. ``cold``: what is run instead, then."""
    try:
        worker = _start(path, asked, seconds)
    except (Invalid, Unavailable) as error:
        say = f"kvstore launcher: {error}"
        if cold is None:
            print(say, file=sys.stderr, flush=True)
            return ERROR_STATUS
        print(f"{say}; starting without it", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *cold])
    try:
        _end_as(worker.wait())
    except Unavailable as error:
        print(f"kvstore launcher: {error}", file=sys.stderr, flush=True)
    return ERROR_STATUS
