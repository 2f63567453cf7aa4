"""LMCache's chunks as blocks."""

from __future__ import annotations

import hashlib

import kvstore
from kvstore.store import BlockLayout, Store

__all__ = ["Chunks", "is_kept", "layout"]


def layout(
    model: str, weights: bytes, dtype: str, shard: tuple[int, int], told: str, length: int, *, shorter: bool = False
) -> BlockLayout:
    """Describes chunks. ``told``: what else must match. ``length``: bytes of a chunk. ``shorter``: some chunks have fewer bytes,
    but take as much room."""
    # Of an encoder's output a block has its own length.
    kind = "encoder_output" if shorter else "attention"
    group = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=length, kind=kind, order="opaque")
    return BlockLayout(
        model=model.rstrip("/").rsplit("/", 1)[-1].encode()[-64:].decode(errors="ignore") or "model",
        weights=weights,
        dtype=dtype,
        block_tokens=1,
        groups=(group,),
        shard=shard,
        extra=hashlib.blake2b(f"lmcache chunk 1\n{told}".encode(), digest_size=32).digest(),
    )


def is_kept(result: kvstore.PutResult) -> bool:
    """Returns whether a block is in the store after a put."""
    return result.status in ("stored", "present", "joined")


class Chunks:
    """The chunks of one layout. While the daemon is away, there are none."""

    def __init__(self, store: Store, of: BlockLayout):
        self._store, self._layout = store, of

    def _call(self, otherwise, call):
        registered = self._store.layout(self._layout, b"")
        if registered is None:
            return otherwise
        try:
            return call(registered)
        except kvstore.Error as error:
            self._store.failed(error)
            return otherwise

    def contains(self, hashes: list[bytes]) -> list[bool]:
        """Returns for each chunk whether it is stored."""
        return self._call([False] * len(hashes), lambda registered: registered.group().contains(hashes))

    def leading(self, hashes: list[bytes]) -> int:
        """Returns how many leading chunks are stored."""
        return self._call(0, lambda registered: registered.group().lookup(hashes))

    def hold(self, hashes: list[bytes], seconds: float) -> list[tuple[int, int, bytes | None]]:
        """Finds runs of stored chunks and holds each for ``seconds``: (first, count, ticket). The ticket is None if the daemon
        cannot hold the run."""

        def find(registered: kvstore.Layout):
            runs, at = [], 0
            while at < len(hashes):
                found = registered.look_up_and_hold(hashes[at:], seconds)
                if found.blocks:
                    runs.append((at, found.blocks, found.ticket))
                    at += found.blocks
                # On to the next that is there; never twice to the same, should it come meanwhile.
                rest = registered.group().contains(hashes[at:]) if at < len(hashes) else []
                to_next = rest.index(True) if True in rest else len(rest)
                at += max(to_next, 0 if found.blocks else 1)
            return runs

        return self._call([], find)

    def get_into(self, hashes: list[bytes], buffers: list) -> list[bool]:
        """Reads chunks into buffers, and returns for each whether it was read. A chunk that is not stored, or that has another
        length, leaves its buffer unchanged."""
        read = [False] * len(hashes)

        def get(registered: kvstore.Layout):
            group, at = registered.group(), 0
            while at < len(hashes):
                try:
                    done = group.get_into(hashes[at:], buffers[at:])
                except kvstore.Invalid:
                    # One of them has another length: which, is seen one by one.
                    done = _is_read(group, hashes[at], buffers[at])
                read[at : at + done] = [True] * done
                at += done
                if not done:
                    rest = group.contains(hashes[at + 1 :]) if at + 1 < len(hashes) else []
                    at += 1 + (rest.index(True) if True in rest else len(rest))

        self._call(None, get)
        return read

    def get(self, hash_: bytes) -> bytes | None:
        """Returns a chunk of any length."""
        return next(iter(self._call([], lambda registered: registered.group().get([hash_]))), None)

    def put(self, hashes: list[bytes], buffers: list, level: str) -> list[kvstore.PutResult]:
        """Stores chunks of one prefix, in their order. Returns an empty list if the daemon is away."""
        return self._call([], lambda registered: registered.group().put_from(hashes, buffers, level=level))

    def delete(self, hashes: list[bytes]) -> int:
        """Makes chunks unreadable, and returns how many there were."""
        deleted = self._call(kvstore.Deleted(0, 0), lambda registered: registered.group().delete(hashes))
        return deleted.deleted


def _is_read(group: kvstore.Group, hash_: bytes, buffer) -> int:
    try:
        return group.get_into([hash_], [buffer])
    except kvstore.Invalid:
        return 0
