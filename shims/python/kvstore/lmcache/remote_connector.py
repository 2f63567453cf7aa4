"""The remote connector for LMCache's library, for engines that run LMCache in their own process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging

from lmcache.utils import CacheEngineKey
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

import kvstore
from kvstore import weights
from kvstore.options import Options
from kvstore.store import BlockLayout, Store

from .chunks import Chunks, is_kept, layout

__all__ = ["KvStoreConnector"]

logger = logging.getLogger("lmcache.kvstore")

# Calls side by side: two fill the memory of a small machine, and look-ups shall not wait for copies.
THREADS = 4


class KvStoreConnector(RemoteConnector):
    """The connector. Add it to LMCache's configuration::

        remote_storage_plugins: ["kvstore"]
        extra_config:
          remote_storage_plugin.kvstore.module_path: kvstore.lmcache
          remote_storage_plugin.kvstore.class_name: KvStoreConnector

    For further settings (``remote_storage_plugin.kvstore.address`` and so on), see :class:`kvstore.options.Options`. Set
    ``model_path`` as well if the model's name is not the name of its files. The connector stores chunks as they are: it refuses
    a serializer other than LMCache's own, and layer-wise chunks.
    """

    def __init__(self, loop, local_cpu_backend, config, plugin_name: str = "kvstore", **_more):
        super().__init__(local_cpu_backend.config, local_cpu_backend.metadata)
        prefix = f"remote_storage_plugin.{plugin_name}."
        extra = {key.removeprefix(prefix): value for key, value in (config.extra_config or {}).items() if key.startswith(prefix)}
        for of_lmcache in ("module_path", "class_name"):
            extra.pop(of_lmcache, None)
        self._model_path = extra.pop("model_path", None)
        self._options = Options.of(extra, prefix.rstrip("."))
        for name, value, valid in (
            ("remote_serde", config.remote_serde, (None, "naive")),
            ("use_layerwise", config.use_layerwise, (None, False)),
        ):
            if value not in valid:
                raise ValueError(f"{name}: {value!r} is not supported, because kvstore stores whole chunks as they are; unset it")
        self._local_cpu_backend = local_cpu_backend
        self._loop = loop
        self._store = Store(self._options.address, self._options.plane, self._options.deadline, logger)
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="kvstore")
        self._layouts: dict[tuple, BlockLayout] = {}

    def _chunks(self, key: CacheEngineKey) -> Chunks:
        name = (key.model_name, key.world_size, key.worker_id, key.dtype)
        if (known := self._layouts.get(name)) is None:
            digest = weights.name(self._model_path or key.model_name, self._options.weights_version, logger)
            shard = (key.worker_id, key.world_size) if 0 <= key.worker_id < key.world_size else (0, 1)
            told = f"{name} {[tuple(shape) for shape in self.meta_shapes]} {self.meta_dtypes} {self.meta_fmt}"
            dtype = str(key.dtype).removeprefix("torch.")
            # A prompt's last chunk is shorter.
            length = self.full_chunk_size_bytes
            known = self._layouts[name] = layout(key.model_name, digest, dtype, shard, told, length, shorter=True)
        return Chunks(self._store, known)

    async def _run(self, call):
        """``call`` in a thread. Cancelled, it is waited for: until it has ended it uses the engine's memory."""
        running = self._loop.run_in_executor(self._threads, call)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise

    # ---------------------------------------------------------------- look-ups

    async def exists(self, key: CacheEngineKey) -> bool:
        """Returns whether a chunk is stored."""
        return await self._run(lambda: self.exists_sync(key))

    def exists_sync(self, key: CacheEngineKey) -> bool:
        """See :meth:`exists`."""
        return self.batched_contains([key]) == 1

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: list[CacheEngineKey]) -> int:
        """Returns how many leading chunks are stored."""
        return self._chunks(keys[0]).leading([_hash(key) for key in keys]) if keys else 0

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """See :meth:`batched_contains`."""
        return await self._run(lambda: self.batched_contains(keys))

    # ---------------------------------------------------------------- reads

    async def get(self, key: CacheEngineKey):
        """Returns a chunk in LMCache's memory. Returns None if it is not stored, or if there is no memory for it."""
        return (await self.batched_get([key]))[0]

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: list[CacheEngineKey]) -> list:
        """Returns chunks in LMCache's memory, with None for each that is not stored or that there is no memory for."""
        if not keys:
            return []
        objects, read = [], []
        try:
            for _ in keys:
                memory = self._local_cpu_backend.allocate(self.meta_shapes, self.meta_dtypes, self.meta_fmt)
                if memory is None:
                    break
                objects.append(memory)
            read = await self._run(lambda: self._read(keys[: len(objects)], objects))
        finally:
            kept = [one if at < len(read) and read[at] else None for at, one in enumerate(objects)]
            for one, is_read in zip(objects, kept):
                if is_read is None:
                    one.ref_count_down()
        return kept + [None] * (len(keys) - len(kept))

    def support_batched_get_non_blocking(self) -> bool:
        return True

    async def batched_get_non_blocking(self, lookup_id: str, keys: list[CacheEngineKey]) -> list:
        """Returns the leading chunks that are stored."""
        objects = await self.batched_get(keys)
        count = objects.index(None) if None in objects else len(objects)
        for one in objects[count:]:
            if one is not None:
                one.ref_count_down()
        return objects[:count]

    def _read(self, keys: list[CacheEngineKey], objects: list) -> list[bool]:
        if not keys:
            return []
        chunks, hashes = self._chunks(keys[0]), [_hash(key) for key in keys]
        read = chunks.get_into(hashes, [one.byte_array for one in objects])
        for at, done in enumerate(read):
            if not done:
                # Not stored, or a prompt's last chunk, which is shorter.
                read[at] = self._read_short(chunks, hashes[at], objects[at])
        return read

    def _read_short(self, chunks: Chunks, hash_: bytes, memory) -> bool:
        found = chunks.get(hash_)
        if not found or len(found) > len(memory.byte_array) or len(found) % self.single_token_size:
            return False
        memory.byte_array.cast("B")[: len(found)] = found
        self.reshape_partial_chunk(memory, len(found))
        return True

    # ---------------------------------------------------------------- writes

    async def put(self, key: CacheEngineKey, memory_obj) -> None:
        """Stores a chunk. Raises kvstore.Busy if there is no room now, and kvstore.Unavailable while the daemon is away."""
        await self.batched_put([key], [memory_obj])

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: list[CacheEngineKey], memory_objs: list) -> None:
        """Stores chunks of one prefix. Raises as :meth:`put`."""
        if not keys:
            return
        hashes, buffers = [_hash(key) for key in keys], [one.byte_array for one in memory_objs]
        results = await self._run(lambda: self._chunks(keys[0]).put(hashes, buffers, self._options.level))
        if not results:
            raise kvstore.Unavailable("the daemon did not store the chunks; the log says why")
        if missing := sum(not is_kept(result) for result in results):
            raise kvstore.Busy(f"{missing} of {len(keys)} chunks were not stored, because there is no room now; try again later")

    def remove_sync(self, key: CacheEngineKey) -> bool:
        """Makes a chunk unreadable, and returns whether it was there."""
        return self._chunks(key).delete([_hash(key)]) == 1

    # ---------------------------------------------------------------- the rest

    async def list(self) -> list[str]:
        """Not supported: the store does not list its chunks, and LMCache does not need it."""
        raise NotImplementedError("kvstore does not list its chunks")

    async def close(self) -> None:
        """Waits for the calls under way, and ends the threads."""
        await self._loop.run_in_executor(None, self._threads.shutdown)


def _hash(key: CacheEngineKey) -> bytes:
    """A chunk's hash, with the request's tags where it has some."""
    return hashlib.blake2b(repr((key.chunk_hash_hex, key.tags)).encode(), digest_size=32).digest()
