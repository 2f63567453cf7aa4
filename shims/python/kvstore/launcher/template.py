"""The template: imports, listens, and forks a worker for each request. It has one thread and opens nothing else, so that its forks are what
new processes would be.

It is started by ``serve``, which it tells when it is ready, and when another one has to take over. It ends when ``serve`` ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass

from kvstore import Busy, Error, Invalid

from . import caps, fitness, program, wire

__all__ = ["Start", "Template", "main"]


@dataclass(frozen=True)
class Start:
    """In a child: what it is to become. ``signals``: those that are blocked then."""

    request: wire.Request
    streams: list[int]
    environment: dict[str, str]
    signals: set[int]
    launcher: int


class _Client:
    """A connection, and the worker that was forked for it: 0 before. ``until``: when it must have sent its request; or, once the client has
    gone, when its worker is killed."""

    def __init__(self, connection: socket.socket):
        self.stream = wire.Stream(connection)
        self.until: float | None = time.monotonic() + caps.REQUEST_SECONDS
        self.worker = 0
        self.is_gone = False


class Template:
    """See the head of this file. ``imported``: the environment with which everything was imported."""

    def __init__(self, listener: socket.socket, parent: socket.socket, imported: dict[str, str], workers_max: int):
        self._listener, self._parent, self._imported, self._workers_max = listener, parent, imported, workers_max
        self._clients: list[_Client] = []
        self._is_asked_to_end = self._is_ending = self._is_parent_gone = False
        self._accepts = True
        self._wakes, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._sources = fitness.Sources()
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        listener.setblocking(False)

    def _ask(self, *_) -> None:
        self._is_asked_to_end = True

    def unfit(self) -> list[str]:
        """Returns why it cannot be forked."""
        streams = [client.stream for client in self._clients]
        own = {self._listener.fileno(), self._parent.fileno(), self._wakes, self._wake}
        own |= {stream.connection.fileno() for stream in streams} | {one for stream in streams for one in stream.descriptors}
        return fitness.unfit(own, {client.worker for client in self._clients})

    def serve(self) -> Start | None:
        """Serves until it is to end. In a child, returns what that is to become."""
        while self._accepts or self._clients:
            for ready in self._poll():
                if (start := ready()) is not None:
                    return start
            if self._is_asked_to_end:
                self._end()
            self._reap()
            self._pass_time()
        return None

    def _end(self) -> None:
        """Workers are asked to end, and nobody is served any more."""
        if not self._is_ending:
            self._is_ending, self._accepts = True, False
            for client in self._clients:
                self._ask_to_end(client, signal.SIGTERM)

    def _poll(self) -> list:
        """Waits, and returns what is to be called."""
        calls = {self._wakes: lambda: os.read(self._wakes, 4096) and None}
        if not self._is_parent_gone:
            calls[self._parent.fileno()] = self._lose_parent
        if self._accepts and sum(not client.worker for client in self._clients) < caps.NEWCOMERS_MAX:
            calls[self._listener.fileno()] = self._accept
        for client in self._clients:
            if not client.is_gone:
                calls[client.stream.connection.fileno()] = lambda client=client: self._hear(client)
        poll = select.poll()
        for descriptor in calls:
            poll.register(descriptor, select.POLLIN)
        waits = [client.until for client in self._clients if client.until is not None]
        wait = max(0.0, min(waits) - time.monotonic()) * 1000 + 1 if waits else None
        return [calls[descriptor] for descriptor, _ in poll.poll(wait)]

    def _lose_parent(self) -> None:
        # It says nothing to a template: it has ended.
        self._is_parent_gone = True
        self._end()

    def _accept(self) -> None:
        if (changed := self._sources.changed()) is not None:
            self._accepts = False
            self._parent.send(f"stale {changed}\n".encode())
            return
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        client = _Client(connection)
        try:
            check_user(connection)
        except Invalid as error:
            client.stream.send({"error": str(error)})
            client.stream.close()
        else:
            self._clients.append(client)

    def _hear(self, client: _Client) -> Start | None:
        try:
            messages = client.stream.read()
            if messages is None:
                self._lose(client)
            for message in messages or ():
                if client.worker:
                    self._pass_on(client, message)
                elif (start := self._launch(client, message)) is not None:
                    return start
        except (Error, OSError) as error:
            client.stream.send({"error": str(error)})
            self._lose(client)
        return None

    def _pass_on(self, client: _Client, message: dict) -> None:
        number = message.get("signal")
        if type(number) is not int or number not in wire.PASSED_ON:
            raise Invalid(f"{message!r} is no signal that is passed on")
        self._signal(client, number, to_all=wire.PASSED_ON[signal.Signals(number)])

    def _signal(self, client: _Client, number: int, to_all: bool) -> None:
        # It has not been waited for: its number is still its own. Its group is there once it has made it.
        try:
            (os.killpg if to_all else os.kill)(client.worker, number)
        except ProcessLookupError:
            os.kill(client.worker, number)

    def _launch(self, client: _Client, message: dict) -> Start | None:
        """Forks a worker. In the child, returns what that is to become."""
        request = wire.Request.of(message)
        self._refuse(client, request)
        launcher = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        # None is lost between the fork and the child's own handlers.
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            worker = os.fork()
            streams = client.stream.take_descriptors()
            if not worker:
                self._close_all()
                return Start(request, streams, self._environment(request), signals, launcher)
            client.worker, client.until = worker, None
        finally:
            if os.getpid() == launcher:
                signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        for stream in streams:
            os.close(stream)
        client.stream.send({"pid": worker})
        return None

    def _environment(self, request: wire.Request) -> dict[str, str]:
        """The client's, and what the imports have changed, where the client has what they found."""
        made, changed = dict(request.environment), dict(os.environ)
        # This one is of the launcher itself.
        changed.pop("OPENBLAS_NUM_THREADS", None)
        if (own := self._imported.get("OPENBLAS_NUM_THREADS")) is not None:
            changed["OPENBLAS_NUM_THREADS"] = own
        for name in changed.keys() | self._imported.keys():
            found, now = self._imported.get(name), changed.get(name)
            if now != found and request.environment.get(name) == found:
                made.pop(name, None)
                made.update({name: now} if now is not None else {})
        return made

    def _refuse(self, client: _Client, request: wire.Request) -> None:
        if request.prefix != sys.prefix:
            raise Invalid(
                f"the client is the Python of {request.prefix}, and this launcher that of {sys.prefix}; start one there"
            )
        if len(client.stream.descriptors) != wire.STREAMS:
            raise Invalid(f"a request comes with {wire.STREAMS} descriptors: standard input, output and error")
        if sum(bool(client.worker) for client in self._clients) >= self._workers_max:
            raise Busy(f"{self._workers_max} workers run; wait for one to end, or start the launcher with a larger --workers")
        if names := fitness.differing(self._imported, request.environment, request.may_differ):
            raise Invalid(
                f"libraries read these variables while they are imported, and the launcher has imported with others: {', '.join(names)}; "
                "start the launcher with the worker's environment, or name those that do not matter by --may-differ"
            )
        if found := self.unfit():
            raise Invalid(f"the launcher cannot be forked: it has {', '.join(found)}")

    def _close_all(self) -> None:
        """In a child: what is the launcher's is closed."""
        signal.set_wakeup_fd(-1)
        for descriptor in (self._wakes, self._wake):
            os.close(descriptor)
        for one in (self._listener, self._parent, *(client.stream for client in self._clients)):
            one.close()
        self._clients.clear()

    def _lose(self, client: _Client) -> None:
        """A client has gone, or does not say what it should."""
        client.is_gone = True
        self._ask_to_end(client, signal.SIGHUP)

    def _ask_to_end(self, client: _Client, number: int) -> None:
        if client.worker:
            self._signal(client, number, to_all=number == signal.SIGHUP)
            client.until = time.monotonic() + caps.GRACE_SECONDS
        else:
            client.stream.close()
            self._clients = [one for one in self._clients if one is not client]

    def _reap(self) -> None:
        for client in [client for client in self._clients if client.worker]:
            worker, status = os.waitpid(client.worker, os.WNOHANG)
            if worker:
                client.worker = 0
                client.stream.send({"status": status})
                self._ask_to_end(client, 0)

    def _pass_time(self) -> None:
        now = time.monotonic()
        for client in [client for client in self._clients if client.until is not None and client.until <= now]:
            if client.worker:
                client.until = None
                self._signal(client, signal.SIGKILL, to_all=True)
            else:
                client.stream.send({"error": f"no request came within {caps.REQUEST_SECONDS:.0f} s"})
                self._lose(client)


def check_user(connection: socket.socket) -> None:
    """Raises Invalid if another user is at the other end."""
    if (user := wire.peer(connection)) != os.getuid():
        raise Invalid(f"this launcher serves user {os.getuid()}, not user {user}")


def main(listener: int, parent: int, workers_max: int, names: list[str]) -> None:
    """Imports, and serves. In a child, runs its program: the caller has nothing to do after it."""
    try:
        begun = _serve(listener, parent, workers_max, names)
    except BaseException as error:
        _say(error)
        # Not by way of the interpreter's end: it would wait for threads that the imports have started, and `serve` for this process.
        os._exit(1)
    if begun is None:
        os._exit(0)
    program.become(begun.request, begun.streams, begun.environment, begun.signals, begun.launcher)
    program.run(begun.request)


def _say(error: BaseException) -> None:
    with contextlib.suppress(Exception):
        if isinstance(error, Error):
            print(f"kvstore launcher: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()


def _serve(listener: int, parent: int, workers_max: int, names: list[str]) -> Start | None:
    """Imports, and serves until it is to end. In a child, returns what that is to become."""
    # Programs that the imports start would hold them open.
    os.set_inheritable(listener, False)
    os.set_inheritable(parent, False)
    control = socket.socket(fileno=parent)
    imported = dict(os.environ)
    # OpenBLAS would start threads while it is imported; program.py starts them in each worker.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if program.finds_in_folder():
        # The folder in which the launcher was started is not the workers'.
        sys.path.pop(0)
    start = time.perf_counter()
    for name in names:
        importlib.import_module(name)
    seconds = time.perf_counter() - start
    template = Template(socket.socket(fileno=listener), control, imported, workers_max)
    if found := template.unfit():
        raise Invalid(f"after its imports, the launcher cannot be forked: it has {', '.join(found)}; leave out what makes them")
    # Workers share these objects' memory for longer if no collection touches them.
    gc.collect()
    gc.freeze()
    control.send(f"ready {len(sys.modules)} modules in {seconds:.2f} s\n".encode())
    return template.serve()
