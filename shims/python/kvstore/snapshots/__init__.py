"""Snapshots: folders and live models, saved once in an object store, and restored with every byte verified.

::

    store = kvstore.snapshots.Store("s3://bucket/models")    # or file:///path; by default, $KVSTORE_SNAPSHOTS
    store.save("./llama", name="llama", facts={"dtype": "bf16"})
    store.restore("llama", "./llama-here")

A save is visible once it is whole, or not at all. What is in the store already is not written again. To get tensors without a copy on
disk, see :func:`kvstore.weights.load`. Every verb has an ``_async`` twin that is awaited; cancelling it ends the verb. The sync form is
ended by an interrupt. No call but :meth:`Store.prewarm` needs a daemon.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvstore import Invalid, _native

from . import kinds, live
from .kinds import Checked, Collected, Difference, Differences, File, Progress, Snapshot, Snapshots, Tensor

__all__ = [
    "Cache",
    "Cached",
    "Checked",
    "Collected",
    "Difference",
    "Differences",
    "File",
    "Prewarmed",
    "Progress",
    "Snapshot",
    "Snapshots",
    "Store",
    "Tensor",
]

Tell = Callable[[Progress], Any]
_TELL_SECONDS = 0.1


@dataclass(frozen=True)
class Cached:
    """A snapshot in a cache. ``is_whole``: False while it is being restored, or if that broke off. ``is_used``: whether a process
    uses or restores it. ``used_at``: when it was last asked for."""

    id: str
    bytes: int
    is_whole: bool
    is_used: bool
    used_at: str


@dataclass(frozen=True)
class Prewarmed:
    """A snapshot that a daemon has. ``bytes``: of its distinct chunks; ``found_bytes``: of those that were there already;
    ``read_bytes``: what came from the store. ``pins``: what keeps it, in hexadecimal digits: ``Client.unpin(bytes.fromhex(pin))`` ends
    one."""

    id: str
    bytes: int
    found_bytes: int
    read_bytes: int
    pins: list[str]


@dataclass(frozen=True)
class Cache:
    """A node's cache of snapshots: a folder of this user's, in memory (below /dev/shm) or on a disk.

    What one process restored, others map. All snapshots in it have ``bytes`` (a number, or "16GiB") at most; what was used longest ago
    goes first, and what a process uses stays.
    """

    folder: str | os.PathLike
    bytes: int | str

    @classmethod
    def default(cls) -> Cache | None:
        """Returns the cache that $KVSTORE_SNAPSHOT_CACHE and $KVSTORE_SNAPSHOT_CACHE_BYTES name. None: they name none."""
        folder, bound = (os.environ.get(f"KVSTORE_SNAPSHOT_CACHE{end}") for end in ("", "_BYTES"))
        if not folder:
            return None
        if not bound:
            raise Invalid("KVSTORE_SNAPSHOT_CACHE is set and KVSTORE_SNAPSHOT_CACHE_BYTES is not; set it, to 16GiB say")
        return cls(folder, bound)

    def ls(self) -> list[Cached]:
        """Returns what is in it, the one that was used last first."""
        all = [Cached(**one) for one in json.loads(_native.cache_ls(os.fspath(self.folder)))]
        return sorted(all, key=lambda one: one.used_at, reverse=True)

    def rm(self, id: str) -> bool:
        """Removes a snapshot from it. Returns False if a process uses it."""
        return _native.cache_rm(os.fspath(self.folder), id)


class _Call:
    """One call, and whom it tells how far it is."""

    def __init__(self, tell: Tell | None):
        self.native = _native.Progress()
        self._tell, self._start = tell, time.monotonic()
        self.tell = self._say if tell else None

    def _say(self) -> None:
        assert self._tell is not None
        self._tell(Progress(*self.native.read(), time.monotonic() - self._start))

    def end(self, answer):
        if self.tell:
            self.tell()
        return answer

    async def wait(self, call: Awaitable) -> Any:
        if not self.tell:
            return await call
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=_TELL_SECONDS))[0]:
                self.tell()
            return self.end(task.result())
        finally:
            task.cancel()


class Store:
    """A store of snapshots. ``url``: "s3://bucket/prefix", "gs://...", "az://..." or "file:///path"; by default, $KVSTORE_SNAPSHOTS.
    ``options``: of the store's client, for example ``{"aws_endpoint": "http://127.0.0.1:9000"}``. Credentials come from the environment.
    ``daemon``: the address of this node's daemon ("unix:/path/to/socket"), whose memory and disk are asked for chunks first; by default,
    $KVSTORE_SNAPSHOT_DAEMON, or none.

    Raises NotFound for a snapshot that is not there, DataLoss for bytes that are not right, Unavailable if the store does not
    answer, Busy if a save and a collection meet, and Invalid for a request that is wrong.
    """

    def __init__(self, url: str | None = None, *, options: Mapping[str, str] | None = None, daemon: str | None = None):
        self.url = url or os.environ.get("KVSTORE_SNAPSHOTS", "")
        if not self.url:
            raise Invalid("no store is named; give a URL such as s3://bucket/models, or set KVSTORE_SNAPSHOTS")
        self.daemon = daemon or os.environ.get("KVSTORE_SNAPSHOT_DAEMON") or None
        self._options = list((options or {}).items())
        self._native = _native.Snapshots(self.url, self._options, self.daemon)

    def __repr__(self) -> str:
        return f"kvstore.snapshots.Store({self.url!r})"

    def _call(self, verb: str, tell: Tell | None = None, made: Iterable = (), **asked) -> str:
        call = _Call(tell)
        return call.end(self._native.call(json.dumps({"verb": verb, **asked}), list(made), call.native, call.tell))

    async def _call_async(self, verb: str, tell: Tell | None = None, made: Iterable = (), **asked) -> str:
        call = _Call(tell)
        return await call.wait(self._native.call_async(json.dumps({"verb": verb, **asked}), list(made), call.native))

    def save(
        self,
        source,
        *,
        name: str | None = None,
        facts: Mapping[str, str] | None = None,
        files: str | os.PathLike | Mapping[str, bytes] | None = None,
        compress: bool | None = None,
        progress: Tell | None = None,
    ) -> Snapshot:
        """Saves ``source``: a folder; or a model (a torch module) or its tensors by name, which are read where they lie, and not copied
        as a whole. Of a transformers model the configuration is saved, too.

        ``name``: what the snapshot is called from then on. ``facts``: what a restore may ask for. ``files``: files besides a live
        model, such as its tokenizer: a folder, whose weights are left out, or contents by path. ``compress``: by default, if the store is
        no folder. Nobody may write to the tensors or files meanwhile; a file that changes makes the save fail.
        """
        asked, made = live.asked(source, files)
        return kinds.saved(self._call("save", progress, made, **asked, **_named(name, facts), compress=compress))

    async def save_async(
        self,
        source,
        *,
        name: str | None = None,
        facts: Mapping[str, str] | None = None,
        files: str | os.PathLike | Mapping[str, bytes] | None = None,
        compress: bool | None = None,
        progress: Tell | None = None,
    ) -> Snapshot:
        """See :meth:`save`."""
        asked, made = live.asked(source, files)
        return kinds.saved(await self._call_async("save", progress, made, **asked, **_named(name, facts), compress=compress))

    def upload(self, snapshot: str, to: Store, *, compress: bool | None = None, progress: Tell | None = None) -> Snapshot:
        """Copies a snapshot into another store, with its id, and with its name where it is asked for by one: what was saved to this
        node's disk becomes durable. Chunks that are there already are not copied; an upload that broke off is gone on with by the same
        call. ``compress``: by default, if the other store is no folder.
        """
        asked = dict(snapshot=snapshot, url=to.url, options=to._options, compress=compress)
        return kinds.saved(self._call("upload", progress, **asked))

    async def upload_async(
        self, snapshot: str, to: Store, *, compress: bool | None = None, progress: Tell | None = None
    ) -> Snapshot:
        """See :meth:`upload`."""
        asked = dict(snapshot=snapshot, url=to.url, options=to._options, compress=compress)
        return kinds.saved(await self._call_async("upload", progress, **asked))

    def restore(
        self,
        snapshot: str,
        to: str | os.PathLike,
        *,
        facts: Mapping[str, str] | None = None,
        allow: Iterable[str] = (),
        progress: Tell | None = None,
    ) -> dict:
        """Restores a snapshot (a name, an id, or the first digits of one) into a folder that does not exist. The folder appears once it
        is whole. A restore that broke off is gone on with by the same call.

        ``facts``: what the snapshot must have. ``allow``: names of those that may differ. Returns the id, the folder and the bytes.
        """
        asked = dict(snapshot=snapshot, to=os.fspath(to), facts=dict(facts or {}), allow=list(allow))
        return json.loads(self._call("restore", progress, **asked))

    async def restore_async(
        self,
        snapshot: str,
        to: str | os.PathLike,
        *,
        facts: Mapping[str, str] | None = None,
        allow: Iterable[str] = (),
        progress: Tell | None = None,
    ) -> dict:
        """See :meth:`restore`."""
        asked = dict(snapshot=snapshot, to=os.fspath(to), facts=dict(facts or {}), allow=list(allow))
        return json.loads(await self._call_async("restore", progress, **asked))

    def prewarm(
        self,
        snapshot: str,
        *,
        tier: str = "memory",
        keep: float = 0,
        deadline: float = 600,
        progress: Tell | None = None,
    ) -> Prewarmed:
        """Has the daemon bring a snapshot into its memory ("memory") or onto its disk ("disk"), and waits until all of it is there. The
        daemon reads it from the store that its own configuration names (snapshots.url).

        ``keep``: for how many seconds it is pinned then, at most a day; 0: other blocks may push it out. ``deadline``: seconds, at most an
        hour. Callers that want the same share the work; what has begun goes on if the caller leaves.
        """
        asked = _prewarm(snapshot, tier, keep, deadline)
        return Prewarmed(**json.loads(self._call("prewarm", progress, **asked)))

    async def prewarm_async(
        self,
        snapshot: str,
        *,
        tier: str = "memory",
        keep: float = 0,
        deadline: float = 600,
        progress: Tell | None = None,
    ) -> Prewarmed:
        """See :meth:`prewarm`."""
        asked = _prewarm(snapshot, tier, keep, deadline)
        return Prewarmed(**json.loads(await self._call_async("prewarm", progress, **asked)))

    def ls(self) -> Snapshots:
        """Returns all snapshots, the newest first. Of those that cannot be read, ``unreadable`` has the ids, each with why."""
        return kinds.listed(self._call("ls"))

    async def ls_async(self) -> Snapshots:
        """See :meth:`ls`."""
        return kinds.listed(await self._call_async("ls"))

    def inspect(self, snapshot: str) -> tuple[Snapshot, list[File]]:
        """Returns a snapshot, and its files with their chunks and tensors."""
        return kinds.inspected(self._call("inspect", snapshot=snapshot, tensors=True))

    async def inspect_async(self, snapshot: str) -> tuple[Snapshot, list[File]]:
        """See :meth:`inspect`."""
        return kinds.inspected(await self._call_async("inspect", snapshot=snapshot, tensors=True))

    def verify(self, snapshot: str, *, progress: Tell | None = None) -> Checked:
        """Reads and verifies every chunk of a snapshot."""
        return kinds.checked(self._call("verify", progress, snapshot=snapshot))

    async def verify_async(self, snapshot: str, *, progress: Tell | None = None) -> Checked:
        """See :meth:`verify`."""
        return kinds.checked(await self._call_async("verify", progress, snapshot=snapshot))

    def diff(self, first: str, second: str) -> Differences:
        """Returns what the second snapshot has otherwise than the first, by file and tensor."""
        return kinds.differences(self._call("diff", first=first, second=second))

    async def diff_async(self, first: str, second: str) -> Differences:
        """See :meth:`diff`."""
        return kinds.differences(await self._call_async("diff", first=first, second=second))

    def tag(self, snapshot: str, name: str) -> None:
        """Lets a name mean a snapshot from then on."""
        self._call("tag", snapshot=snapshot, name=name)

    async def tag_async(self, snapshot: str, name: str) -> None:
        """See :meth:`tag`."""
        await self._call_async("tag", snapshot=snapshot, name=name)

    def rm(self, snapshot: str) -> None:
        """Takes a name away; or, by its id, removes a snapshot that has no name. The next :meth:`gc` frees the space."""
        self._call("rm", snapshot=snapshot)

    async def rm_async(self, snapshot: str) -> None:
        """See :meth:`rm`."""
        await self._call_async("rm", snapshot=snapshot)

    def gc(self, *, keep_last: int = 1, dry_run: bool = False) -> Collected:
        """Deletes chunks that no snapshot needs, and snapshots that names meant once: each name keeps ``keep_last`` of what it means
        and meant. Snapshots that never had a name stay. ``dry_run``: only counts."""
        return kinds.collected(self._call("gc", keep_last=keep_last, dry_run=dry_run))

    async def gc_async(self, *, keep_last: int = 1, dry_run: bool = False) -> Collected:
        """See :meth:`gc`."""
        return kinds.collected(await self._call_async("gc", keep_last=keep_last, dry_run=dry_run))

    def _hold(self, asked: dict, tell: Tell | None) -> _native.Restored:
        call = _Call(tell)
        return call.end(self._native.hold(json.dumps(asked), call.native, call.tell))

    async def _hold_async(self, asked: dict, tell: Tell | None) -> _native.Restored:
        call = _Call(tell)
        return await call.wait(self._native.hold_async(json.dumps(asked), call.native))


def _prewarm(snapshot: str, tier: str, keep: float, deadline: float) -> dict:
    if keep < 0 or deadline <= 0:
        raise Invalid(
            f"keep: {keep} and deadline: {deadline} are seconds; the first is at least 0, and the second is more than 0"
        )
    return dict(snapshot=snapshot, tier=tier, keep_ms=round(keep * 1000), deadline_ms=max(round(deadline * 1000), 1))


def _named(name: str | None, facts: Mapping[str, str] | None) -> dict:
    return {"name": name, "facts": dict(facts or {})}
