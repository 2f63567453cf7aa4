"""The client of kvstore, the storage tier under LLM inference.

A :class:`Client` talks to the daemon of its node; :meth:`Client.register_layout` names what makes blocks byte-compatible;
a :class:`Group` of the layout is where blocks are put and got, by the hashes of their prefixes. On the daemon's own node
blocks are read where they lie, in shared memory, and reading what is in memory does not even wake the daemon.

A miss is a value. Every call ends by the client's deadline, releases the GIL while it waits and copies, and has an
``_async`` twin that is awaited. A child of ``os.fork()`` may go on using the client, which attaches anew; it cannot read
what its parent leased.
"""

from __future__ import annotations

import os as _os
from dataclasses import dataclass
from typing import NamedTuple

from . import _native
from ._native import Busy, DataLoss, Error, Leases, NotFound, PagesLoad, Unsupported, __version__

__all__ = [
    "Busy",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "Deleted",
    "Error",
    "Group",
    "Invalid",
    "Layout",
    "LayerGroup",
    "Leases",
    "Lookup",
    "NotFound",
    "Pages",
    "PagesLoad",
    "Pin",
    "Prefetch",
    "PrefetchProgress",
    "PutResult",
    "Unavailable",
    "Unsupported",
    "__version__",
    "default_address",
]


class Unavailable(_native.Unavailable, ConnectionError):
    """No daemon answers, or it drains: try again later."""


class DeadlineExceeded(_native.DeadlineExceeded, TimeoutError):
    """The call's time is over."""


class Invalid(_native.Invalid, ValueError):
    """The request is wrong; the message names what, and what would be valid."""


_KINDS = {"attention": 1, "sliding_window": 2, "recurrent_state": 3, "encoder_output": 4}
_ORDERS = {"opaque": 1, "layer_opaque": 2, "layer_plane_head_token": 3, "layer_plane_token_head": 4}


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose state is kept alike.

    A block of it has ``layers * planes * heads * block_tokens * head_bytes`` bytes; of the kinds ``recurrent_state`` and
    ``encoder_output``, at most ``layers * planes * heads * head_bytes``.

    ``head_bytes``: bytes of one head's vector for one token (elements times element size). ``planes``: 2 for keys and
    values, 1 for latent attention and for states. ``order``: the order of a block's dimensions, slowest first.
    """

    layers: int
    heads: int
    head_bytes: int
    planes: int = 2
    kind: str = "attention"
    window_tokens: int = 0
    order: str = "layer_opaque"

    def _fields(self) -> tuple[int, int, int, int, int, int, int]:
        for name, value, valid in (("kind", self.kind, _KINDS), ("order", self.order, _ORDERS)):
            if value not in valid:
                raise Invalid(f"{name}: {value!r} is none of {', '.join(valid)}")
        return (
            _KINDS[self.kind],
            self.window_tokens,
            self.layers,
            self.planes,
            self.heads,
            self.head_bytes,
            _ORDERS[self.order],
        )


class PutResult(NamedTuple):
    """What became of one block of a put.

    ``status``: "stored", "present" (it was there), "joined" (another writer brought it), "busy" (no room now: try again),
    or "superseded" (deleted while it was written). ``level``: "memory", "local", "durable", or None where it is not stored.
    """

    status: str
    level: str | None


class Lookup(NamedTuple):
    """How far a prefix can be used. ``blocks``: its leading blocks that can be read; ``in_memory``: the leading ones of those
    that need no disk; ``ticket``: what holds them, where that was asked and there are some; ``searching``: the object store is
    being searched for more, which a look-up a moment later may find."""

    blocks: int
    in_memory: int
    ticket: bytes | None
    searching: bool = False


class Deleted(NamedTuple):
    """Blocks that were deleted, and blocks that were pinned and stay."""

    deleted: int
    pinned: int


class PrefetchProgress(NamedTuple):
    """How a prefetch ended: "done", "cancelled" or "deadline"; its blocks, those in memory, those in no tier."""

    state: str
    blocks: int
    ready: int
    missing: int


def default_address() -> str:
    """The daemon that ``kvstore serve`` runs for this user: KVSTORE_ADDRESS, or its default socket."""
    if address := _os.environ.get("KVSTORE_ADDRESS"):
        return address
    runtime = _os.environ.get("XDG_RUNTIME_DIR")
    folder = f"{runtime}/kvstore" if runtime else f"/tmp/kvstore-{_os.getuid()}"
    return f"unix:{folder}/default.sock"


def _plain(buffer):
    """A CPU tensor of torch as what has the buffer protocol: its bytes, without a copy."""
    if type(buffer).__module__.partition(".")[0] != "torch":
        return buffer
    if buffer.device.type != "cpu":
        raise Invalid(f"buffers: a tensor on {buffer.device} is not in CPU memory: copy it there first")
    if not buffer.is_contiguous():
        raise Invalid("buffers: a tensor that is not contiguous: use its contiguous() copy")
    import torch

    # numpy has no bfloat16 and no float8: bytes are bytes.
    return buffer.detach().reshape(-1).view(torch.uint8).numpy()


def _buffers(buffers):
    if isinstance(buffers, (list, tuple)):
        return [_plain(buffer) for buffer in buffers]
    return _plain(buffers)


class Client:
    """A connection to one daemon, in one namespace: that of the socket it connects to. Threads may share it.

    ``address``: "unix:/path/to/socket" or "http://host:port"; the daemon of this user by default. ``plane``: "auto" (shared
    memory on a Unix socket of this node, gRPC for the rest), "local" or "grpc". ``deadline``: seconds after which each
    call ends.

    Raises Unavailable where no daemon answers.
    """

    def __init__(self, address: str | None = None, *, plane: str = "auto", deadline: float = 30.0):
        self._native = _native.Client(address or default_address(), plane, deadline)
        self.address = address or default_address()

    def __repr__(self) -> str:
        return f"kvstore.Client({self.address!r})"

    @property
    def is_local(self) -> bool:
        """True while blocks go through shared memory."""
        return self._native.is_local

    def register_layout(
        self,
        model: str | bytes,
        *,
        dtype: str,
        block_tokens: int,
        groups: list[LayerGroup],
        weights_digest: bytes = b"",
        shard: tuple[int, int] = (0, 1),
        extra: bytes = b"",
    ) -> Layout:
        """Makes a layout known: what makes two blocks byte-compatible. The same layout has the same digest everywhere.

        ``model``: 1 to 64 bytes. ``weights_digest``: new weights, new blocks. ``shard``: index and count of a
        tensor-parallel rank. ``extra``: whatever else must match, up to 256 bytes.
        """
        name = model.encode() if isinstance(model, str) else bytes(model)
        fields = [group._fields() for group in groups]
        digest, natives, wants_tokens = self._native.register(name, weights_digest, dtype, block_tokens, fields, shard, extra)
        return Layout(self._native, digest, [Group(self._native, native) for native in natives], wants_tokens)

    def release_ticket(self, ticket: bytes) -> bool:
        """Lets go of what a look-up holds; False where its time was over."""
        return self._native.release_ticket(ticket)


class Layout:
    """A registered layout. ``digest``: 32 bytes that name it everywhere. ``wants_tokens``: the daemon publishes events, and is to be
    told the tokens of what is put: :meth:`Group.describe`."""

    def __init__(self, client: _native.Client, digest: bytes, groups: list[Group], wants_tokens: bool = False):
        self._client = client
        self.digest = digest
        self.groups = groups
        self.wants_tokens = wants_tokens

    def lookup(
        self,
        hashes,
        *,
        groups: list[int] | None = None,
        all_shards: bool = False,
        hold: float = 0.0,
        search_wait: float = 0.0,
    ) -> Lookup:
        """How far a prefix can be used in every one of ``groups`` (all of the layout's by default).

        ``all_shards``: in every shard of the tensor-parallel group too. ``hold``: keeps what was found for so many seconds
        (30 at most), for whoever reads it next, until :meth:`Client.release_ticket`. ``search_wait``: waits so many seconds (5
        at most) for the object store to be searched for what nothing is known of; the search goes on in any case.
        """
        found = self._client.lookup(self.digest, groups or [], hashes, all_shards, hold, search_wait)
        return Lookup(*found)

    def group(self, number: int = 0) -> Group:
        """One of its layer groups."""
        return self.groups[number]


class Group:
    """A layer group of a layout: where blocks are put and got.

    Hashes are bytes, 1 to 32 each, in prefix order: a hash names a block and all before it. Buffers are whatever has the
    buffer protocol and is contiguous (bytes, bytearray, memoryview, numpy arrays), or CPU tensors of torch: a list with one
    for each hash, or one that holds all blocks, one behind the other.
    """

    def __init__(self, client: _native.Client, native: _native.Group):
        self._client = client
        self._native = native

    @property
    def block_bytes(self) -> int:
        """Bytes of a block; the most, for kinds that vary."""
        return self._native.block_bytes

    def lookup(self, hashes) -> int:
        """How many leading blocks can be read, from whatever tier."""
        return self._native.lookup(hashes)

    async def lookup_async(self, hashes) -> int:
        """See :meth:`lookup`."""
        return await self._native.lookup_async(hashes)

    def contains(self, hashes) -> list[bool]:
        """Which of these blocks can be read, from whatever tier: each by itself, holes and all."""
        return self._native.contains(hashes)

    async def contains_async(self, hashes) -> list[bool]:
        """See :meth:`contains`."""
        return await self._native.contains_async(hashes)

    def get_into(self, hashes, buffers) -> int:
        """Reads blocks into writable buffers. How many leading blocks were read; buffers after those are left alone.

        Raises Invalid where a buffer has not a block's size, DataLoss where a pinned block is lost.
        """
        return self._native.get_into(hashes, _buffers(buffers))

    async def get_into_async(self, hashes, buffers) -> int:
        """See :meth:`get_into`. Cancelled, buffers may be partly filled."""
        return await self._native.get_into_async(hashes, _buffers(buffers))

    def get(self, hashes) -> list[bytes]:
        """The leading blocks, as bytes of their own, each as long as it is. Copies: see :meth:`leases` and :meth:`get_into`
        for less."""
        return self._native.get(hashes)

    def put_from(
        self,
        hashes,
        buffers,
        *,
        parent: bytes | None = None,
        level: str = "memory",
        more_follows: bool = False,
        upload: bool = False,
    ) -> list[PutResult]:
        """Stores blocks of one prefix, each the child of the one before it; the outcome of each.

        ``parent``: the hash before the first. ``level``: "memory" (readable), "local" (on this node's disk, synced) or
        "durable". ``more_follows``: more blocks of the same request come in another call. ``upload``: the blocks go to the object
        store in the background, whatever the daemon's configuration says, as those of a session that is to outlive the node; raises
        Unsupported where the daemon has none.
        """
        stored = self._native.put_from(hashes, _buffers(buffers), parent, level, more_follows, upload)
        return [PutResult(*result) for result in stored]

    async def put_from_async(
        self,
        hashes,
        buffers,
        *,
        parent: bytes | None = None,
        level: str = "memory",
        more_follows: bool = False,
        upload: bool = False,
    ) -> list[PutResult]:
        """See :meth:`put_from`. Cancelled, what was whole by then stays."""
        stored = await self._native.put_from_async(hashes, _buffers(buffers), parent, level, more_follows, upload)
        return [PutResult(*result) for result in stored]

    def get_pages(self, hashes, pages: Pages, numbers: list[int]) -> int:
        """Reads the leading blocks into pages of an engine's memory, block ``numbers[i]`` for ``hashes[i]``. How many were
        read; pages of those after them are left alone.

        Nobody else may touch those pages meanwhile. Raises Invalid where a block has not the pages' size.
        """
        return self._native.get_pages(hashes, pages._native, numbers)

    def start_get_pages(self, hashes, pages: Pages, numbers: list[int]) -> PagesLoad:
        """The same in the background, region by region: see :class:`PagesLoad`. It goes on even where nobody waits."""
        return self._native.start_get_pages(hashes, pages._native, numbers)

    def put_pages(
        self,
        hashes,
        pages: Pages,
        numbers: list[int],
        *,
        parent: bytes | None = None,
        level: str = "memory",
        more_follows: bool = False,
        upload: bool = False,
    ) -> list[PutResult]:
        """Stores blocks from pages of an engine's memory, which must not change meanwhile: see :meth:`put_from`."""
        stored = self._native.put_pages(hashes, pages._native, numbers, parent, level, more_follows, upload)
        return [PutResult(*result) for result in stored]

    def leases(self, hashes) -> Leases:
        """The leading blocks, where they lie: read-only memoryviews, without a copy. Needs the local plane.

        A leased block stays as it is until its views and the Leases have gone; use ``with``, and let go of views in it.
        """
        return self._native.leases(hashes)

    async def leases_async(self, hashes) -> Leases:
        """See :meth:`leases`."""
        return await self._native.leases_async(hashes)

    def hint(self, hashes) -> None:
        """Says that blocks will be read soon. Costs a microsecond, promises nothing."""
        self._native.hint(hashes)

    def prefetch(self, hashes, *, deadline: float = 10.0) -> Prefetch:
        """Starts to bring blocks into memory, in order; gives up after ``deadline`` seconds."""
        return Prefetch(self._client, self._native.prefetch(hashes, deadline))

    async def prefetch_async(self, hashes, *, deadline: float = 10.0) -> Prefetch:
        """See :meth:`prefetch`."""
        return Prefetch(self._client, await self._native.prefetch_async(hashes, deadline))

    def pin(self, hashes, *, ttl: float) -> Pin:
        """Promises not to evict the leading readable blocks for ``ttl`` seconds. A context manager."""
        return Pin(self._client, *self._native.pin(hashes, ttl))

    async def pin_async(self, hashes, *, ttl: float) -> Pin:
        """See :meth:`pin`."""
        return Pin(self._client, *await self._native.pin_async(hashes, ttl))

    def describe(self, hashes, tokens, parent: bytes | None = None, adapter: str | None = None) -> bool:
        """Tells the tokens of a run of blocks that are stored, or are about to be, for the events that the daemon publishes; ``parent`` is
        the block before them. False where nobody is told."""
        return self._native.describe(hashes, tokens, parent, adapter)

    def delete(self, hashes) -> Deleted:
        """Makes blocks unreadable at once; pinned ones stay."""
        return Deleted(*self._native.delete(hashes))

    async def delete_async(self, hashes) -> Deleted:
        """See :meth:`delete`."""
        return Deleted(*await self._native.delete_async(hashes))


class Pages:
    """An engine's own memory, where a block is one page of each of several regions (a layer's cache, say).

    ``regions``: (buffer, offset, stride, bytes) each: block ``n`` has ``bytes`` bytes at ``offset + n * stride`` of the buffer,
    which is writable and contiguous, or a CPU tensor. A block in the store is those, in the order of the regions.
    ``blocks``: how many blocks there are. The buffers stay where they are, and alive, as long as this.
    """

    def __init__(self, regions, blocks: int):
        plain = [(_plain(buffer), offset, stride, length) for buffer, offset, stride, length in regions]
        self._native = _native.Pages(plain, blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self._native.block_bytes

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self._native.blocks


class Prefetch:
    """A prefetch under way."""

    def __init__(self, client: _native.Client, ticket: bytes):
        self._client = client
        self.ticket = ticket

    def wait(self) -> PrefetchProgress:
        """Waits until it has ended, or the client's deadline."""
        return PrefetchProgress(*self._client.watch_prefetch(self.ticket))

    async def wait_async(self) -> PrefetchProgress:
        """See :meth:`wait`."""
        return PrefetchProgress(*await self._client.watch_prefetch_async(self.ticket))

    def cancel(self) -> bool:
        """Ends it; False where it had ended."""
        return self._client.cancel_prefetch(self.ticket)


class Pin:
    """A promise not to evict. ``blocks``: how many leading blocks it holds."""

    def __init__(self, client: _native.Client, pin: bytes, blocks: int):
        self._client = client
        self.id = pin
        self.blocks = blocks

    def unpin(self) -> bool:
        """Ends it before its time; False where it had ended, or held nothing."""
        return bool(self.id) and self._client.unpin(self.id)

    async def unpin_async(self) -> bool:
        """See :meth:`unpin`."""
        return bool(self.id) and await self._client.unpin_async(self.id)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_exception) -> None:
        self.unpin()


def _set_future(future, value, error) -> None:
    """Called on the event loop's thread with a call's outcome; whoever gave up the call has cancelled its future."""
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
