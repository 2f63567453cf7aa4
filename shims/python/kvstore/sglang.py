"""kvstore under SGLang: :class:`KvStoreHiCache` is a storage backend for its hierarchical cache (HiCache). See docs/engines.md.

Each page is copied once, directly between the store and SGLang's own host memory. SGLang's keys name a page and all pages before
it, with the adapter and the salt. The layout here adds what the keys leave out: the weights, the rank and the layout of the host
pool. A page that does not match is a miss. While the daemon is away, every page is a miss, and SGLang computes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from dataclasses import dataclass, fields

import sglang
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)

import kvstore
from kvstore import weights
from kvstore.options import Options
from kvstore.sglang_loader import snapshot_of
from kvstore.store import BlockLayout, Store

__all__ = ["KvStoreHiCache"]

logger = logging.getLogger("sglang.kvstore")

# Of the backend's configuration, those that are SGLang's own.
_OF_SGLANG = ("backend_name", "module_path", "class_name", "interface_v1")


@dataclass
class _Part:
    """One block of a page: the whole page, or the heads of one shard if the page is split by heads."""

    layout: BlockLayout
    pages: kvstore.Pages


class _Pool:
    """One of SGLang's host pools, as pages of blocks."""

    def __init__(self, name: str, pool, config: HiCacheStorageConfig, weights_digest: bytes, replicated: bool):
        self._pool = pool
        self._page_tokens = pool.page_size
        # A pool that moves its pages says where they are at each call, under a lease of the caller's.
        self._moves = getattr(pool, "shared_allocation_domain", None) is not None
        splits = 1
        if config.should_split_heads and not replicated and name == PoolName.KV:
            splits = config.tp_lcm_size // config.tp_size
        regions, count = _moving_regions(pool) if self._moves else _regions(pool, splits)
        self.parts = []
        each = len(regions) // splits
        for split in range(splits):
            mine = regions[split * each : (split + 1) * each]
            shard = (0, 1) if replicated else (config.tp_rank * splits + split, config.tp_size * splits)
            layout = _describe(name, pool, config, weights_digest, shard, [size for _, _, _, size in mine], splits)
            self.parts.append(_Part(layout, kvstore.Pages(mine, count)))

    def numbers(self, host_indices: torch.Tensor, pages: int) -> list[int]:
        """Returns the numbers of the pages that these slots make up."""
        if host_indices.numel() != pages * self._page_tokens:
            raise ValueError(f"kvstore: {host_indices.numel()} slots were given for {pages} pages of {self._page_tokens} tokens")
        if self._moves:
            starts, sizes = self._pool.get_page_buffer_meta(host_indices)
            base = self._pool.kv_buffer.data_ptr()
            return [(start - base) // size for start, size in zip(starts, sizes)]
        return (host_indices[:: self._page_tokens] // self._page_tokens).tolist()


def _regions(pool, splits: int) -> tuple[list[tuple[torch.Tensor, int, int, int]], int]:
    """Returns a pool's pages as regions of :class:`kvstore.Pages`, split by split, and how many pages the pool has."""
    count = pool.size // pool.page_size
    first, second = _addresses(pool, 0, splits), _addresses(pool, min(1, count - 1), splits)
    strides = [there - here for (here, _), (there, _) in zip(first, second)]
    for number in {2, count // 2, count - 1} & set(range(count)):
        if _addresses(pool, number, splits) != [(at + number * step, size) for (at, size), step in zip(first, strides)]:
            raise ValueError(f"kvstore: host pool {type(pool).__name__} is not supported: its pages are not at equal distances")
    regions = []
    for (start, size), stride in zip(first, strides):
        buffer, offset = _buffer_of(pool, start, size)
        regions.append((buffer, offset, stride or size, size))
    return regions, count


def _moving_regions(pool) -> tuple[list[tuple[torch.Tensor, int, int, int]], int]:
    """Returns the same for a pool that moves whole pages within one buffer."""
    size = pool.item_bytes
    buffer, offset = _buffer_of(pool, pool.kv_buffer.data_ptr(), size)
    return [(buffer, offset, size, size)], pool.kv_buffer.numel() * pool.kv_buffer.element_size() // size


def _addresses(pool, page: int, splits: int) -> list[tuple[int, int]]:
    """Returns (address, bytes) of each piece of a page, in SGLang's order, and split by split if there are several splits."""
    indices = torch.arange(page * pool.page_size, (page + 1) * pool.page_size)
    if splits > 1:
        return list(zip(*pool.get_split_heads_page_buffer_meta(indices, splits)))
    return list(zip(*pool.get_page_buffer_meta(indices)))


def _buffer_of(pool, start: int, size: int) -> tuple[torch.Tensor, int]:
    """Returns the memory of the pool that holds these bytes, and where in it they begin."""
    for value in vars(pool).values():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.data_ptr() <= start and start + size <= storage.data_ptr() + storage.nbytes():
                    return torch.empty(0, dtype=torch.uint8).set_(storage), start - storage.data_ptr()
    raise ValueError(f"kvstore: host pool {type(pool).__name__} is not supported: its pages are not in a CPU tensor of the pool")


def _describe(
    name: str, pool, config: HiCacheStorageConfig, weights_digest: bytes, shard: tuple[int, int], sizes: list[int], splits: int
) -> BlockLayout:
    size = sum(sizes)
    is_state = name == PoolName.MAMBA
    tokens = 1 if is_state or size % pool.page_size else pool.page_size
    told = [
        f"sglang page 1 {sglang.__version__}",
        f"pool {name} {type(pool).__name__} {pool.layout} {pool.dtype} page {pool.page_size}",
        f"pieces {sizes}",
        *(f"{key} {getattr(pool, key, None)}" for key in ("layer_num", "start_layer", "end_layer", "head_dim", "v_head_dim")),
        # Of the block, whatever the rank has.
        f"heads {(getattr(pool, 'head_num', None) or 0) // splits}",
        f"pp {config.pp_rank}/{config.pp_size} cp {config.attn_cp_rank}/{config.attn_cp_size}",
        f"dcp {config.dcp_rank}/{config.dcp_size} {config.logical_page_size}",
    ]
    return BlockLayout(
        model=(config.model_name or "model").rstrip("/").rsplit("/", 1)[-1].encode()[-64:].decode(errors="ignore") or "model",
        weights=weights_digest,
        dtype=str(pool.dtype).removeprefix("torch."),
        block_tokens=tokens,
        groups=(
            kvstore.LayerGroup(
                layers=1,
                planes=1,
                heads=1,
                head_bytes=size // tokens,
                kind="recurrent_state" if is_state else "attention",
                order="opaque",
            ),
        ),
        shard=shard,
        extra=hashlib.blake2b("\n".join(told).encode(), digest_size=32).digest(),
    )


class KvStoreHiCache(HiCacheStorage):
    """The storage backend. Start SGLang with::

        --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config \\
          '{"backend_name": "kvstore", "module_path": "kvstore.sglang", "class_name": "KvStoreHiCache", "interface_v1": 1}'

    For further settings, see :class:`kvstore.options.Options`. Set ``model_path`` as well if the served model's name is not the
    name of its files. Raises ValueError for settings and host pools that are not supported.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict | None = None):
        extra = {key: value for key, value in (storage_config.extra_config or {}).items() if key not in _OF_SGLANG}
        model = extra.pop("model_path", None)
        self._options = Options.of(extra, "hicache-storage-backend-extra-config")
        self._config = storage_config
        self._zero_copy = bool((storage_config.extra_config or {}).get("interface_v1", 0))
        self._store = Store(self._options.address, self._options.plane, self._options.deadline, logger)
        served, revision, load_format, changes = _served_model(storage_config)
        told = dict(revision=revision, engine="sglang", load_format=load_format, says=not storage_config.tp_rank)
        digest = weights.name(model or served, self._options.weights_version, logger, **told)
        self._weights = hashlib.sha256(digest + changes).digest()
        # After clear(): what was stored before is not found any more.
        self._cleared = b""
        self._pools: dict[str, _Pool] = {}
        # The pool of keys and values has no memory of its own: the other pools have it all.
        self._is_anchor_alone = False
        self._flat: dict[int, BlockLayout] = {}
        self._lock = threading.Lock()
        self._measured: dict[str, list] = {field: [] for field in ("loads", "saves", "load_speeds", "save_speeds")}

    # ---------------------------------------------------------------- host pools

    def register_mem_pool_host(self, mem_pool_host) -> None:
        """Registers the pool of keys and values. A pool without its own memory only anchors the others."""
        super().register_mem_pool_host(mem_pool_host)
        self._pools.pop(PoolName.KV, None)
        self._is_anchor_alone = mem_pool_host.kv_buffer is None
        if self._zero_copy and not self._is_anchor_alone:
            self._add_pool(PoolName.KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool, host_pool_name) -> None:
        """Registers a further pool: a hybrid model's other layers, an indexer, or a draft model."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV and getattr(host_pool, "kv_buffer", True) is not None:
            self._add_pool(host_pool_name, host_pool)

    def _add_pool(self, name: str, pool) -> None:
        self._pools[name] = _Pool(name, pool, self._config, self._weights, self._is_replicated(name, pool))
        # Registered here, off the first request's path.
        for part in self._pools[name].parts:
            self._store.layout(part.layout, self._version())

    def _is_replicated(self, name: str, pool) -> bool:
        """Returns whether every rank of the tensor-parallel group has the same bytes. If so, only the first rank writes them."""
        if not self._config.is_mla_model or name == PoolName.MAMBA:
            return False
        from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

        # A draft model with attention of several heads is split between ranks beside a main model that is not.
        return not isinstance(pool, MHATokenToKVPoolHost)

    def _version(self) -> bytes:
        """Names the weights if they changed since the start. An update with a weight_version changes the name."""
        version = b""
        with contextlib.suppress(Exception):
            from sglang.srt.runtime_context import get_serving

            told = get_serving().weight_version
            version = b"" if told in (None, "default") else str(told).encode()
        if not version and not self._cleared:
            return b""
        return hashlib.blake2b(self._weights + self._cleared + version, digest_size=32).digest()

    # ---------------------------------------------------------------- pages of the pool of keys and values

    def batch_exists(self, keys, extra_info=None) -> int:
        """Returns how many leading pages are stored."""
        if self._is_anchor_alone:
            return len(keys)
        hits = len(keys)
        for layout in self._kv_layouts():
            hits = self._leading(layout, keys[:hits])
        return hits

    def _leading(self, layout: BlockLayout, keys) -> int:
        return self._call(layout, 0, lambda group: group.lookup(_hashes(keys))) if keys else 0

    def batch_get_v1(self, keys, host_indices, extra_info=None) -> list[bool]:
        """Reads the leading pages that are stored, directly into the host pool."""
        return self._get(PoolName.KV, keys, host_indices)

    def batch_set_v1(self, keys, host_indices, extra_info=None) -> list[bool]:
        """Stores pages directly from the host pool."""
        return self._set(PoolName.KV, keys, host_indices, extra_info)

    def _kv_layouts(self) -> list[BlockLayout]:
        if self._zero_copy:
            return [part.layout for part in self._pool(PoolName.KV).parts]
        with self._lock:
            return list(self._flat.values()) or [self._flat_layout(self._flat_bytes())]

    def _pool(self, name: str) -> _Pool:
        if name not in self._pools:
            raise ValueError(f"kvstore: the pool {name} is not registered, or has no memory")
        return self._pools[name]

    def _get(self, name: str, keys, host_indices) -> list[bool]:
        if name == PoolName.KV and self._is_anchor_alone:
            return [True] * len(keys)
        pool = self._pool(name)
        numbers, hashes, began = pool.numbers(host_indices, len(keys)), _hashes(keys), time.monotonic()
        read = len(keys)
        for part in pool.parts:
            read = self._get_part(part, hashes[:read], numbers[:read])
        self._measure("load", read, pool, began)
        return [True] * read + [False] * (len(keys) - read)

    def _set(self, name: str, keys, host_indices, extra_info) -> list[bool]:
        if name == PoolName.KV and self._is_anchor_alone:
            return [True] * len(keys)
        pool = self._pool(name)
        numbers, hashes, began = pool.numbers(host_indices, len(keys)), _hashes(keys), time.monotonic()
        before = (extra_info.prefix_keys if extra_info else None) or []
        parent = _hashes(before[-1:])[0] if before else None
        stored = [True] * len(keys)
        for part in pool.parts:
            outcome = self._set_part(part, hashes, numbers, parent)
            there = [result.status in ("stored", "present", "joined") for result in outcome]
            stored = [one and two for one, two in zip(stored, there or [False] * len(keys))]
        self._measure("save", sum(stored), pool, began)
        return stored

    def _get_part(self, part: _Part, hashes: list[bytes], numbers: list[int]) -> int:
        return self._call(part.layout, 0, lambda group: group.get_pages(hashes, part.pages, numbers)) if hashes else 0

    def _set_part(self, part: _Part, hashes: list[bytes], numbers: list[int], parent: bytes | None) -> list:
        def put(group: kvstore.Group):
            return group.put_pages(hashes, part.pages, numbers, parent=parent, level=self._options.level)

        return self._call(part.layout, [], put)

    # ---------------------------------------------------------------- hybrid models

    def batch_exists_v2(self, keys, pool_transfers=None, extra_info=None) -> PoolTransferResult:
        """Returns the longest prefix that every pool can serve."""
        kv_pages = self.batch_exists(keys, extra_info)
        hits = {PoolName.KV: kv_pages} if kv_pages else {}
        usable = set(range(1, kv_pages + 1))
        for transfer in pool_transfers or []:
            if transfer.hit_policy not in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES):
                raise ValueError(f"kvstore: hit policy {transfer.hit_policy.value} of pool {transfer.name} is not supported")
            present = self._contains(transfer.name, keys[:kv_pages])
            window = None
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(len(transfer.keys or []), 1)
            ends = _usable_ends(present, window)
            if ends:
                hits[transfer.name] = max(ends)
            usable &= ends
        return PoolTransferResult(max(usable, default=0), hits, sorted(usable))

    def batch_get_v2(self, transfers, extra_info=None) -> dict[str, list[bool]]:
        """Reads pages of several pools. See :meth:`batch_get_v1`."""
        return {transfer.name: self._get(transfer.name, transfer.keys or [], transfer.host_indices) for transfer in transfers}

    def batch_set_v2(self, transfers, extra_info=None) -> dict[str, list[bool]]:
        """Stores pages of several pools. See :meth:`batch_set_v1`."""
        return {
            transfer.name: self._set(transfer.name, transfer.keys or [], transfer.host_indices, extra_info)
            for transfer in transfers
        }

    def _contains(self, name: str, keys) -> list[bool]:
        pool = self._pool(name)
        present = [True] * len(keys)
        for part in pool.parts:
            there = self._call(part.layout, [], lambda group: group.contains(_hashes(keys))) if keys else []
            present = [one and two for one, two in zip(present, there or [False] * len(keys))]
        return present

    # ---------------------------------------------------------------- copies, where interface_v1 is not set

    def exists(self, key) -> bool:
        """Returns whether a page is stored."""
        return self.batch_exists([key]) == 1

    def get(self, key, target_location=None, target_sizes=None) -> torch.Tensor | None:
        """Reads a page into ``target_location``. Returns None if it is not stored."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(self, keys, target_locations=None, target_sizes=None) -> list[torch.Tensor | None]:
        """Reads pages into ``target_locations``. Returns None for the first page that is not stored and all after it."""
        pages = [_bytes_of(page) for page in target_locations]
        layout = self._flat_layout(len(pages[0]))
        read = self._call(layout, 0, lambda group: group.get_into(_hashes(keys), pages))
        return [page if at < read else None for at, page in enumerate(target_locations)]

    def set(self, key, value=None, target_location=None, target_sizes=None) -> bool:
        """Stores a page."""
        return self.batch_set([key], [value])

    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None) -> bool:
        """Stores pages, and returns whether all of them are stored."""
        pages = [_bytes_of(page.contiguous()) for page in values]
        layout = self._flat_layout(len(pages[0]))
        outcome = self._call(layout, [], lambda group: group.put_from(_hashes(keys), pages, level=self._options.level))
        return len(outcome) == len(keys) and all(result.status in ("stored", "present", "joined") for result in outcome)

    def _flat_bytes(self) -> int:
        return len(_bytes_of(self.mem_pool_host.get_dummy_flat_data_page()))

    def _flat_layout(self, size: int) -> BlockLayout:
        known = self._flat.get(size)
        if known is None:
            pool = self.mem_pool_host
            shard = (0, 1) if self._is_replicated(PoolName.KV, pool) else (self._config.tp_rank, self._config.tp_size)
            known = self._flat[size] = _describe("flat", pool, self._config, self._weights, shard, [size], 1)
        return known

    # ---------------------------------------------------------------- the rest

    def clear(self) -> None:
        """Makes this rank find nothing that was stored before. The old blocks leave the store as new blocks come."""
        self._cleared = os.urandom(16)
        if self._config.is_mla_model and self._config.tp_size > 1:
            logger.warning(
                "kvstore: after clear(), the ranks share no pages until the engine restarts; set weights_version for that start"
            )

    def get_stats(self):
        """Returns pages and GB/s of each transfer since the last call, for SGLang's metrics."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._lock:
            measured, self._measured = self._measured, {name: [] for name in self._measured}
        metrics = StorageMetrics()
        ours = ("loads", "saves", "load_speeds", "save_speeds")
        for field, name in zip(("prefetch_pgs", "backup_pgs", "prefetch_bandwidth", "backup_bandwidth"), ours):
            if field in {known.name for known in fields(metrics)}:
                getattr(metrics, field).extend(measured[name])
        return metrics

    def close(self) -> None:
        """Detaches the backend, and releases the engine's memory."""
        self._pools = {}

    def _measure(self, what: str, pages: int, pool: _Pool, began: float) -> None:
        if self._config.enable_storage_metrics and pages:
            moved = pages * sum(part.pages.block_bytes for part in pool.parts)
            with self._lock:
                self._measured[f"{what}s"].append(pages)
                self._measured[f"{what}_speeds"].append(moved / max(time.monotonic() - began, 1e-9) / 1e9)

    def _call(self, layout: BlockLayout, otherwise, call):
        """Calls ``call`` with the layout's group. Returns ``otherwise`` if the daemon is away or the call fails."""
        registered = self._store.layout(layout, self._version())
        if registered is None:
            return otherwise
        try:
            return call(registered.group())
        except kvstore.Error as error:
            self._store.failed(error)
            return otherwise


def _served_model(config: HiCacheStorageConfig) -> tuple[str, str | None, str, bytes]:
    """Returns the path, revision and format of the model that SGLang loaded, and the arguments that change it."""
    args = None
    with contextlib.suppress(Exception):
        from sglang.srt.runtime_context import get_server_args

        args = get_server_args()
    if not hasattr(args, "model_path"):
        return config.model_name or "model", None, "auto", b""
    changes = [(name, getattr(args, name, None)) for name in ("json_model_override_args", "quantization", "load_format")]
    load_format = getattr(args, "load_format", None) or "auto"
    load_format = str(getattr(load_format, "value", load_format))
    # The folder's own weights are not loaded then. An id means one content for ever.
    if (id := snapshot_of(load_format, getattr(args, "model_loader_extra_config", None))) is not None:
        changes.append(("snapshot", id))
    return args.model_path, getattr(args, "revision", None), load_format, repr(changes).encode()


def _hashes(keys) -> list[bytes]:
    """Turns keys into hashes. SGLang's keys are hexadecimal digests of 32 bytes; any other key is hashed."""
    hashes = []
    for key in keys:
        try:
            digest = bytes.fromhex(key)
        except ValueError:
            digest = b""
        hashes.append(digest if len(digest) == 32 else hashlib.blake2b(key.encode(), digest_size=32).digest())
    return hashes


def _bytes_of(page: torch.Tensor) -> torch.Tensor:
    return page.detach().reshape(-1).view(torch.uint8)


def _usable_ends(present: list[bool], window: int | None) -> set[int]:
    """Returns the prefix lengths that a pool can serve: those with every page, or with the last ``window`` pages."""
    if window is None:
        leading = present.index(False) if False in present else len(present)
        return set(range(1, leading + 1))
    ends, run = set(), 0
    for at, there in enumerate(present):
        run = run + 1 if there else 0
        if run >= min(window, at + 1):
            ends.add(at + 1)
    return ends
