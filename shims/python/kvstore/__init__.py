"""The client of kvstore, the storage tier under LLM inference.

A :class:`Client` talks to the daemon of its node. :meth:`Client.register_layout` registers a layout, which names what makes
blocks byte-compatible. A :class:`Group` of the layout puts and gets blocks by the hashes of their prefixes. On the daemon's
own node, the client reads blocks in place, in shared memory. A read of a block in memory does not wake the daemon.

A miss is a value, not an error. Every call ends by the client's deadline, and releases the GIL while it waits and copies.
Calls take up to 65,536 blocks: a prompt of a million tokens in blocks of 16. Busy means that the same call can succeed later;
a request that can never succeed raises Invalid, whose message names the bound.
Most calls have an ``_async`` twin that is awaited. A child of ``os.fork()`` can keep using the client, which then attaches
again. The child cannot read the blocks that its parent leased.
"""

from __future__ import annotations

import os as _os
from collections.abc import Iterator as _Iterator
from dataclasses import dataclass
from typing import NamedTuple

from . import _native
from ._native import Busy, DataLoss, Error, Fenced, Leases, NotFound, PagesLoad, Unsupported, __version__

__all__ = [
    "Busy",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "Deleted",
    "Error",
    "Fenced",
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
    """No daemon answers, or the daemon drains. Try again later."""


class DeadlineExceeded(_native.DeadlineExceeded, TimeoutError):
    """The call did not end by its deadline."""


class Invalid(_native.Invalid, ValueError):
    """The request is wrong. The message names what is wrong, and what would be valid."""


_KINDS = {"attention": 1, "sliding_window": 2, "recurrent_state": 3, "encoder_output": 4}
_ORDERS = {"opaque": 1, "layer_opaque": 2, "layer_plane_head_token": 3, "layer_plane_token_head": 4}


@dataclass(frozen=True)
class LayerGroup:
    """A layer group: layers whose state is kept alike.

    A block of the group has ``layers * planes * heads * block_tokens * head_bytes`` bytes. A block of the kinds
    ``recurrent_state`` and ``encoder_output`` has at most ``layers * planes * heads * head_bytes`` bytes.

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
                raise Invalid(f"{name}: {value!r} is not valid; use one of {', '.join(valid)}")
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
    """The outcome of a put for one block.

    ``status``: "stored", "present" (the block was already stored), "joined" (another writer stored it meanwhile), "busy"
    (there is no room now; try again), or "superseded" (the block was deleted while it was written). ``level``: "memory",
    "local" or "durable"; None if the block is not stored.
    """

    status: str
    level: str | None


class Lookup(NamedTuple):
    """How far a prefix can be used.

    ``blocks``: how many leading blocks can be read. ``in_memory``: how many leading blocks are in memory and need no disk.
    ``ticket``: the ticket that holds the blocks, if one was asked for and there are any blocks. ``searching``: True while the
    daemon searches the object store for more blocks; a later look-up may find them.
    """

    blocks: int
    in_memory: int
    ticket: bytes | None
    searching: bool = False


class Deleted(NamedTuple):
    """How many blocks were deleted, and how many stay because they are pinned."""

    deleted: int
    pinned: int


class PrefetchProgress(NamedTuple):
    """How a prefetch ended.

    ``state``: "done", "cancelled" or "deadline". ``blocks``: how many blocks it had. ``ready``: how many of them are in memory.
    ``missing``: how many of them are in no tier.
    """

    state: str
    blocks: int
    ready: int
    missing: int


def default_address() -> str:
    """Returns the address of this user's daemon: KVSTORE_ADDRESS if it is set, or the default socket of ``kvstore serve``."""
    if address := _os.environ.get("KVSTORE_ADDRESS"):
        return address
    runtime = _os.environ.get("XDG_RUNTIME_DIR")
    folder = f"{runtime}/kvstore" if runtime else f"/tmp/kvstore-{_os.getuid()}"
    return f"unix:{folder}/default.sock"


def _plain(buffer):
    """Returns an object with the buffer protocol. A CPU tensor of torch becomes its bytes, without a copy."""
    if type(buffer).__module__.partition(".")[0] != "torch":
        return buffer
    if buffer.device.type != "cpu":
        raise Invalid(f"buffers: a tensor on {buffer.device} is not in CPU memory; copy it there first")
    if not buffer.is_contiguous():
        raise Invalid("buffers: a tensor is not contiguous; use its contiguous() copy")
    import torch

    # numpy has no bfloat16 and no float8: bytes are bytes.
    return buffer.detach().reshape(-1).view(torch.uint8).numpy()


def _buffers(buffers):
    if isinstance(buffers, (list, tuple)):
        return [_plain(buffer) for buffer in buffers]
    return _plain(buffers)


class Client:
    """A connection to one daemon, in the namespace of the socket that it connects to. Threads can share a client.

    ``address``: "unix:/path/to/socket" or "http://host:port"; by default, the address of this user's daemon. ``plane``:
    "auto" (shared memory over a Unix socket of this node, gRPC for everything else), "local" or "grpc". ``deadline``: seconds
    after which each call ends.

    Raises Unavailable if no daemon answers.
    """

    def __init__(self, address: str | None = None, *, plane: str = "auto", deadline: float = 30.0):
        self._native = _native.Client(address or default_address(), plane, deadline)
        self.address = address or default_address()

    def __repr__(self) -> str:
        return f"kvstore.Client({self.address!r})"

    @property
    def is_local(self) -> bool:
        """Whether blocks go through shared memory now."""
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
        """Registers a layout, which names what makes two blocks byte-compatible. The same layout has the same digest
        everywhere.

        ``model``: the model's name, 1 to 64 bytes. ``weights_digest``: a digest of the weights; blocks of other weights are
        never read. ``shard``: index and count of a tensor-parallel rank. ``extra``: anything else that must match, up to
        256 bytes.
        """
        name = model.encode() if isinstance(model, str) else bytes(model)
        fields = [group._fields() for group in groups]
        digest, natives, wants_tokens = self._native.register(name, weights_digest, dtype, block_tokens, fields, shard, extra)
        return Layout(self._native, digest, [Group(self._native, native) for native in natives], wants_tokens)

    def release_ticket(self, ticket: bytes) -> bool:
        """Ends a look-up's ticket early. Returns False if it had already ended."""
        return self._native.release_ticket(ticket)

    def unpin(self, pin: bytes) -> bool:
        """Ends a pin early by its id: that of a prewarm, or of another process. Returns False if it had already ended."""
        return self._native.unpin(pin)


class Layout:
    """A registered layout.

    ``digest``: 32 bytes that name the layout everywhere. ``wants_tokens``: True if the daemon publishes events and needs the
    tokens of the blocks that are put; see :meth:`Group.describe`.
    """

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
        """Returns how far a prefix can be used in every one of ``groups`` (by default, in all groups of the layout).

        ``all_shards``: the prefix must also be usable in every shard of the tensor-parallel group. ``hold``: holds the blocks
        that were found for this many seconds (at most 30), or until :meth:`Client.release_ticket`. ``search_wait``: waits up to
        this many seconds (at most 5) while the daemon searches the object store for blocks that it knows nothing of. The
        search continues after that time.
        """
        found = self._client.lookup(self.digest, groups or [], hashes, all_shards, hold, search_wait)
        return Lookup(*found)

    def look_up_and_hold(self, hashes, seconds: float, *, all_shards: bool = False) -> Lookup:
        """As :meth:`lookup` with ``hold``. If the daemon cannot hold so many blocks (tickets and pins may have half of its memory),
        the blocks are found but not held, and ``ticket`` is None."""
        return self.lookup(hashes, all_shards=all_shards, hold=seconds)

    def group(self, number: int = 0) -> Group:
        """Returns one of the layout's layer groups."""
        return self.groups[number]


class Group:
    """A layer group of a layout. Its methods put and get blocks.

    Hashes are ``bytes`` objects of 1 to 32 bytes, in prefix order. A hash names a block and all blocks before it. Buffers are
    contiguous objects with the buffer protocol (bytes, bytearray, memoryview, numpy arrays) or CPU tensors of torch. Give a
    list with one buffer for each hash, or one buffer that holds all blocks one after another.
    """

    def __init__(self, client: _native.Client, native: _native.Group):
        self._client = client
        self._native = native

    @property
    def block_bytes(self) -> int:
        """Bytes of a block. For kinds whose blocks vary in length, the most that a block has."""
        return self._native.block_bytes

    def lookup(self, hashes) -> int:
        """Returns how many leading blocks can be read, from any tier."""
        return self._native.lookup(hashes)

    async def lookup_async(self, hashes) -> int:
        """See :meth:`lookup`."""
        return await self._native.lookup_async(hashes)

    def contains(self, hashes) -> list[bool]:
        """Returns for each block whether it can be read, from any tier. The blocks before it may be missing."""
        return self._native.contains(hashes)

    async def contains_async(self, hashes) -> list[bool]:
        """See :meth:`contains`."""
        return await self._native.contains_async(hashes)

    def get_into(self, hashes, buffers) -> int:
        """Reads blocks into writable buffers, and returns how many leading blocks were read. The other buffers do not change.

        Raises Invalid if a buffer does not have the size of its block, and DataLoss if a pinned block is lost.
        """
        return self._native.get_into(hashes, _buffers(buffers))

    async def get_into_async(self, hashes, buffers) -> int:
        """See :meth:`get_into`. If the call is cancelled, buffers may be partly filled."""
        return await self._native.get_into_async(hashes, _buffers(buffers))

    def get(self, hashes) -> list[bytes]:
        """Returns copies of the leading blocks, each with its own length. :meth:`leases` and :meth:`get_into` copy less."""
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
        """Stores blocks of one prefix, each the child of the one before it, and returns the outcome of each.

        ``parent``: the hash of the block before the first one. ``level``: "memory" (readable), "local" (on this node's disk,
        synced) or "durable" (in the object store). ``more_follows``: True if another call puts more blocks of the same request.
        ``upload``: uploads the blocks to the object store in the background, whatever the daemon's configuration says; use it
        for a session that must outlive the node. Raises Unsupported if the daemon has no object store.
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
        """See :meth:`put_from`. If the call is cancelled, the blocks that were complete by then stay."""
        stored = await self._native.put_from_async(hashes, _buffers(buffers), parent, level, more_follows, upload)
        return [PutResult(*result) for result in stored]

    def get_pages(self, hashes, pages: Pages, numbers: list[int]) -> int:
        """Reads the leading blocks into pages of an engine's memory, and returns how many were read. The block named
        ``hashes[i]`` goes to block ``numbers[i]`` of ``pages``. The pages of the other blocks do not change.

        Nothing else may use those pages during the call. Raises Invalid if a block does not have the size of its pages.
        """
        return self._native.get_pages(hashes, pages._native, numbers)

    def start_get_pages(self, hashes, pages: Pages, numbers: list[int]) -> PagesLoad:
        """Starts :meth:`get_pages` in the background, region by region: see :class:`PagesLoad`. The load does not need a caller
        that waits for it."""
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
        """Stores blocks from pages of an engine's memory, which must not change during the call: see :meth:`put_from`."""
        stored = self._native.put_pages(hashes, pages._native, numbers, parent, level, more_follows, upload)
        return [PutResult(*result) for result in stored]

    def leases(self, hashes) -> Leases:
        """Returns the leading blocks as read-only memoryviews, without a copy. Needs the local plane.

        A leased block does not change until its views and the Leases have been released. Use a ``with`` block, and release the
        views inside it. A process can lease 8,192 blocks at once. Raises Invalid if ``hashes`` are more; :meth:`lease_windows`
        reads longer prefixes. Raises Busy while other leases of the process leave no room.
        """
        return self._native.leases(hashes)

    def lease_windows(self, hashes, *, window: int = 256) -> _Iterator[Leases]:
        """Yields the leading blocks of a prefix of any length, at most ``window`` blocks (1 to 4096) at a time: see :meth:`leases`.

        While you use a window, the daemon brings into memory what the next one lacks. Release a window's leases before you ask
        for the next one::

            for leases in group.lease_windows(hashes):
                with leases:
                    ...
        """
        windows = self._native.lease_windows(hashes, window)
        while (leases := windows.next()) is not None:
            yield leases
            del leases

    async def leases_async(self, hashes) -> Leases:
        """See :meth:`leases`."""
        return await self._native.leases_async(hashes)

    def hint(self, hashes) -> None:
        """Tells the daemon that blocks will be read soon. The call takes a microsecond, and the daemon may ignore it. Of a long
        prefix, only the first 2,048 blocks are told; :meth:`prefetch` brings all of it."""
        self._native.hint(hashes)

    def prefetch(self, hashes, *, deadline: float = 10.0) -> Prefetch:
        """Starts to bring blocks into memory, in order. The prefetch ends after ``deadline`` seconds at the latest."""
        return Prefetch(self._client, self._native.prefetch(hashes, deadline))

    async def prefetch_async(self, hashes, *, deadline: float = 10.0) -> Prefetch:
        """See :meth:`prefetch`."""
        return Prefetch(self._client, await self._native.prefetch_async(hashes, deadline))

    def pin(self, hashes, *, ttl: float) -> Pin:
        """Pins the leading readable blocks: they are not evicted for ``ttl`` seconds. The pin is a context manager."""
        return Pin(self._client, *self._native.pin(hashes, ttl))

    async def pin_async(self, hashes, *, ttl: float) -> Pin:
        """See :meth:`pin`."""
        return Pin(self._client, *await self._native.pin_async(hashes, ttl))

    def describe(self, hashes, tokens, parent: bytes | None = None, adapter: str | None = None) -> bool:
        """Tells the daemon the tokens of a run of blocks that are stored or are about to be. The daemon needs them for the events
        that it publishes. ``parent``: the hash of the block before the run. Returns False if the daemon did not take the
        description."""
        return self._native.describe(hashes, tokens, parent, adapter)

    def delete(self, hashes) -> Deleted:
        """Makes blocks unreadable at once. Pinned blocks stay."""
        return Deleted(*self._native.delete(hashes))

    async def delete_async(self, hashes) -> Deleted:
        """See :meth:`delete`."""
        return Deleted(*await self._native.delete_async(hashes))


class Pages:
    """An engine's own memory, in which a block is one page of each of several regions (for example, of each layer's cache).

    ``regions``: a tuple (buffer, offset, stride, bytes) for each region. Block ``n`` has ``bytes`` bytes at
    ``offset + n * stride`` of the buffer. The buffer is writable and contiguous, or a CPU tensor. In the store, a block is these
    bytes in the order of the regions. ``blocks``: how many blocks there are. The buffers stay alive and in place as long as this
    object lives.
    """

    def __init__(self, regions, blocks: int):
        plain = [(_plain(buffer), offset, stride, length) for buffer, offset, stride, length in regions]
        self._native = _native.Pages(plain, blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, over all regions."""
        return self._native.block_bytes

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self._native.blocks


class Prefetch:
    """A prefetch that is under way."""

    def __init__(self, client: _native.Client, ticket: bytes):
        self._client = client
        self.ticket = ticket

    def wait(self) -> PrefetchProgress:
        """Waits until the prefetch has ended, at most until the client's deadline."""
        return PrefetchProgress(*self._client.watch_prefetch(self.ticket))

    async def wait_async(self) -> PrefetchProgress:
        """See :meth:`wait`."""
        return PrefetchProgress(*await self._client.watch_prefetch_async(self.ticket))

    def cancel(self) -> bool:
        """Ends the prefetch. Returns False if it had already ended."""
        return self._client.cancel_prefetch(self.ticket)


class Pin:
    """A promise not to evict blocks. ``blocks``: how many leading blocks it holds."""

    def __init__(self, client: _native.Client, pin: bytes, blocks: int):
        self._client = client
        self.id = pin
        self.blocks = blocks

    def unpin(self) -> bool:
        """Ends the pin early. Returns False if it had already ended, or held no block."""
        return bool(self.id) and self._client.unpin(self.id)

    async def unpin_async(self) -> bool:
        """See :meth:`unpin`."""
        return bool(self.id) and await self._client.unpin_async(self.id)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_exception) -> None:
        self.unpin()


def _set_future(future, value, error) -> None:
    """Sets the outcome of a call, on the event loop's thread. A caller that gave up the call has cancelled its future."""
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
