"""Decode sessions in an object store: what a live sequence is made of outlives its worker, its daemon and its node.

::

    worker = kvstore.sessions.Worker(model, "s3://bucket/sessions")     # a transformers model; or file:///path
    for tokens in worker.generate(ids, session="chat-7", max_new_tokens=400):
        send(tokens)                                                    # they are durable by now

    for tokens in kvstore.sessions.resume(model, session="chat-7", store="s3://bucket/sessions"):
        send(tokens)                                                    # anywhere else: from the very next token on

A :class:`Worker` runs a model (kvstore/sessions/worker.py). :class:`Store` and :class:`Writer` are what it is made of, for engines of
your own: a writer has a log in the store, owns sessions, and appends to them in group commits. Whoever claims a session seals the log
of its owner, which is refused from then on (:class:`kvstore.Fenced`), however late its writes arrive. No clock decides, and no daemon
is needed. Every verb has an ``_async`` twin that is awaited. The sync form is ended by an interrupt.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence

from kvstore import Invalid, _native

from . import kinds
from .kinds import (
    Acknowledged,
    Append,
    Claimed,
    Collected,
    Head,
    Holder,
    Inspected,
    Listed,
    Piece,
    Refused,
    Sampler,
    Session,
    Shape,
    Step,
    split,
)

__all__ = [
    "Acknowledged",
    "Answer",
    "Append",
    "Claimed",
    "Collected",
    "Head",
    "Holder",
    "Inspected",
    "Listed",
    "Piece",
    "Refused",
    "Sampler",
    "Session",
    "Shape",
    "Started",
    "Step",
    "Store",
    "Worker",
    "Writer",
    "generate",
    "resume",
]

_OF_MODELS = ("Answer", "Worker", "generate", "resume")


def __getattr__(name: str):
    # They import torch and transformers, which the rest does without.
    if name in _OF_MODELS:
        from . import worker

        return getattr(worker, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _verb(verb: str, session: str, **more) -> str:
    namespace, id = split(session)
    return json.dumps({"verb": verb, "namespace": namespace, "id": id, **more})


class Store:
    """A store of sessions. ``url``: "s3://bucket/prefix", "gs://...", "az://..." or "file:///path"; by default, $KVSTORE_SESSIONS.
    ``options``: of the store's client, for example ``{"aws_endpoint": "http://127.0.0.1:9000"}``. Credentials come from the environment.

    A session's name is "namespace/id", or an id, whose namespace is "default"; both have 1 to 128 letters, digits, ".", "_" and "-".

    Raises NotFound for a session that is not there or was closed, DataLoss for bytes that are not right, Unavailable if the store does not
    answer, Busy if something else is under way, Unsupported for a store that cannot keep sessions, and Invalid for a request that is wrong.
    """

    def __init__(self, url: str | None = None, *, options: Mapping[str, str] | None = None):
        self.url = url or os.environ.get("KVSTORE_SESSIONS", "")
        if not self.url:
            raise Invalid("no store is named; give a URL such as s3://bucket/sessions, or set KVSTORE_SESSIONS")
        self._native = _native.Sessions(self.url, list((options or {}).items()))

    def __repr__(self) -> str:
        return f"kvstore.sessions.Store({self.url!r})"

    def begin(self, name: str | None = None) -> Writer:
        """Begins a writer, with a log of its own. ``name``: what others are told of who owns a session; by default, the host and the process.
        The first writer of a :class:`Store` proves what sessions rest on: a create of an object that exists must be refused, say."""
        return Writer(self._native.begin(name or _own_name()))

    async def begin_async(self, name: str | None = None) -> Writer:
        """See :meth:`begin`."""
        return Writer(await self._native.begin_async(name or _own_name()))

    def ls(self, namespace: str | None = None) -> list[Listed]:
        """Returns the sessions of a namespace, or all of them, by name, with their owners."""
        return kinds.listed(self._native.call(json.dumps({"verb": "ls", "namespace": namespace})))

    async def ls_async(self, namespace: str | None = None) -> list[Listed]:
        """See :meth:`ls`."""
        return kinds.listed(await self._native.call_async(json.dumps({"verb": "ls", "namespace": namespace})))

    def inspect(self, session: str) -> Inspected:
        """Returns what is durable of a session just now, without the bytes of its KV. Its owner is left alone, and may go on meanwhile."""
        return kinds.inspected(self._native.call(_verb("inspect", session)))

    async def inspect_async(self, session: str) -> Inspected:
        """See :meth:`inspect`."""
        return kinds.inspected(await self._native.call_async(_verb("inspect", session)))

    def gc(self, *, dry_run: bool = False) -> Collected:
        """Deletes what no session needs: sessions that were closed, and logs. ``dry_run``: only counts."""
        return kinds.collected(self._native.call(json.dumps({"verb": "gc", "dry_run": dry_run})))

    async def gc_async(self, *, dry_run: bool = False) -> Collected:
        """See :meth:`gc`."""
        return kinds.collected(await self._native.call_async(json.dumps({"verb": "gc", "dry_run": dry_run})))


def _own_name() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


class Started:
    """A verb of a writer that goes on in the background, whether or not anybody waits for it."""

    def __init__(self, native: _native.Started, convert):
        self._native, self._convert = native, convert

    def done(self) -> bool:
        """Returns whether it has ended, with an answer or an error."""
        return self._native.done()

    def wait(self):
        """Waits until it has ended, and returns its answer, which is given once. An interrupted wait can be repeated."""
        return self._convert(*self._native.wait())

    async def wait_async(self):
        """See :meth:`wait`. Cancelling it ends the waiting, and not what was started."""
        return self._convert(*await self._native.wait_async())


class Writer:
    """A writer of sessions, and its log: see :meth:`Store.begin`. Threads may share it: appends that come at the same time are one commit.

    Every verb raises Fenced once somebody sealed the log, for the sake of one of its sessions; :meth:`sessions` still names all that it had.
    It raises Unavailable once an entry could not be written, or is not known to be: nothing more is taken, and what landed is found
    by whoever claims. Begin another writer, and :meth:`claim` with ``since`` what nobody else took.
    """

    def __init__(self, native: _native.SessionWriter):
        self._native = native

    @property
    def log(self) -> str:
        """The id of its log."""
        return self._native.log

    @property
    def broken(self) -> str | None:
        """Why its log has ended; None while it has not."""
        return self._native.broken()

    @property
    def is_due(self) -> bool:
        """Whether it is time to begin another writer, and to move the sessions there: three quarters of a log's 8192 entries are written."""
        return self._native.is_due()

    def sessions(self) -> dict[str, int]:
        """Returns the sessions that it owns, and since which epoch."""
        return {f"{namespace}/{id}": epoch for namespace, id, epoch in self._native.sessions()}

    def open(self, session: str) -> int:
        """Opens a session that there has never been, and returns its epoch, 1. Its first step begins it. Raises Invalid if it exists, and NotFound
        if it was closed: an id is not used again."""
        return _epoch(*self._native.call(_verb("open", session), []))

    async def open_async(self, session: str) -> int:
        """See :meth:`open`. Cancelled, the session may be open, with nothing in it: :meth:`claim` takes it."""
        return _epoch(*await self._native.call_async(_verb("open", session), []))

    def claim(self, session: str, *, since: int | None = None) -> Claimed:
        """Takes a session from whoever owns it, whose log is sealed unless it gave the session away, and returns it with its KV.

        Raises Fenced, naming the owner, if another claimant was faster; or, with ``since``, if anybody owns it since another epoch. Raises
        DataLoss if what is stored is not what was written. If the KV is more than 32 MiB, the first step here, which may be empty, keeps the
        first pieces only; its ``valid_tokens`` says so, and the others are appended again."""
        return kinds.claimed(session, *self._native.call(_verb("claim", session, since=since), []))

    async def claim_async(self, session: str, *, since: int | None = None) -> Claimed:
        """See :meth:`claim`. Cancelled, this writer may own the session: claiming it again finds out."""
        return kinds.claimed(session, *await self._native.call_async(_verb("claim", session, since=since), []))

    def append(self, *steps: Step) -> list[Acknowledged | Refused]:
        """Makes steps of different sessions, several in one commit. Returns, in their order, what is durable now; a step that is refused is not
        made, and the others are. An error means that nothing is known of any."""
        asked, data = kinds.asked(steps)
        return _appended(*self._native.call(asked, data))

    async def append_async(self, *steps: Step) -> list[Acknowledged | Refused]:
        """See :meth:`append`. Cancelled, the steps may be made or not; :meth:`flush` waits until that is over."""
        asked, data = kinds.asked(steps)
        return _appended(*await self._native.call_async(asked, data))

    def start_open(self, session: str) -> Started:
        """Starts :meth:`open` in the background."""
        return Started(self._native.start(_verb("open", session), []), _epoch)

    def start_append(self, *steps: Step) -> Started:
        """Starts :meth:`append` in the background. The steps of a session are made in the order in which they were started if each is waited for
        before the next."""
        asked, data = kinds.asked(steps)
        return Started(self._native.start(asked, data), _appended)

    def close(self, session: str) -> Acknowledged | Refused:
        """Ends a session for good: nobody can claim it any more."""
        return self.append(Step(session, ends="closed"))[0]

    async def close_async(self, session: str) -> Acknowledged | Refused:
        """See :meth:`close`."""
        return (await self.append_async(Step(session, ends="closed")))[0]

    def flush(self) -> None:
        """Waits until nothing is under way any more."""
        self._native.call('{"verb": "flush"}', [])

    async def flush_async(self) -> None:
        """See :meth:`flush`."""
        await self._native.call_async('{"verb": "flush"}', [])

    def tidy(self) -> None:
        """Marks sessions that were closed so that it is found without reading the log. To be called now and then: a writer remembers 4096."""
        self._native.call('{"verb": "tidy"}', [])

    async def tidy_async(self) -> None:
        """See :meth:`tidy`."""
        await self._native.call_async('{"verb": "tidy"}', [])

    def end(self) -> None:
        """Ends the log. Its sessions are claimed by others. No writer needs to."""
        self._native.call('{"verb": "end"}', [])

    async def end_async(self) -> None:
        """See :meth:`end`."""
        await self._native.call_async('{"verb": "end"}', [])


def _epoch(answer: str, _data: Sequence) -> int:
    return json.loads(answer)["epoch"]


def _appended(answer: str, _data: Sequence) -> list[Acknowledged | Refused]:
    return kinds.acknowledged(answer)
