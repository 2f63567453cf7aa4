"""The connector's side in a worker. It loads blocks into the engine's cache, and saves computed blocks in the background."""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

import kvstore
from kvstore.store import Store

from .layout import describe, groups_of, regions_of, shards_of, split
from .messages import UPLOAD, BlockRun, Load, RankLayout, Save, StepPlan, WorkerReport
from .options import Options
from .pages import DirectPages, StagedLoad, StagedPages, Staging
from .stats import KvStoreStats

__all__ = ["WorkerSide"]

logger = logging.getLogger("vllm.kvstore")

# A worker that ends waits so long for what it is saving.
SHUTDOWN_SECONDS = 5.0
# Loads at a time, beside those that a step waits for: enough for a disk; each has a thread of its own.
LOADS_MAX = 8
# A call's worth of saves: it must end within the deadline on a slow disk, too.
SAVE_BYTES = 64 << 20


@dataclass
class _Loading:
    """A load under way."""

    load: Load
    since: float
    # A run's loads, one for each of the rank's shards; None where one could not begin.
    runs: list[tuple[BlockRun, list[kvstore.PagesLoad | StagedLoad | None]]] = field(default_factory=list)

    def parts(self) -> list[kvstore.PagesLoad | StagedLoad]:
        return [part for _, parts in self.runs for part in parts if part is not None]

    def done(self) -> bool:
        return all(part.done() for part in self.parts())


class WorkerSide:
    """See the head of this file."""

    def __init__(self, vllm_config, kv_cache_config, options: Options, rank: int):
        self._vllm_config, self._kv_cache_config, self._options = vllm_config, kv_cache_config, options
        self._rank = rank
        self._store = Store(options.address, options.plane, options.deadline, logger)
        # By group and shard.
        self._pages: list[list[DirectPages | StagedPages]] = []
        self._staging: Staging | None = None
        # What the engine registered: it says nothing of its cache when it wakes up.
        self._kv_caches: Any = None
        # By layer: its group, and the last of its regions there.
        self._last_region: dict[str, tuple[int, int]] = {}
        self.layout: RankLayout | None = None
        self._saves_here = True
        self._plan = StepPlan()
        self._loading: list[_Loading] = []
        self._queued: collections.deque[tuple[Load, bytes]] = collections.deque()
        self._in_step: list[_Loading] = []
        self._invalid: set[int] = set()
        self._failed: set[str] = set()
        self._failures = 0
        self._failures_told = 0
        self._brought: set[str] = set()
        self._lock = threading.Lock()
        self._saved: collections.Counter[int] = collections.Counter()
        self._stats = KvStoreStats()
        self._queue: queue.SimpleQueue[tuple[Save, bytes, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------- the engine's memory

    def register_kv_caches(self, kv_caches) -> None:
        """Takes the engine's cache."""
        self._kv_caches = kv_caches
        groups, _ = groups_of(self._kv_cache_config)
        blocks = self._kv_cache_config.num_blocks
        shards = shards_of(self._vllm_config, self._kv_cache_config, self._options)
        self._last_region, tensors, by_group = {}, [], []
        for at, group in enumerate(groups):
            regions: list[list] = [[] for _ in range(shards[1])]
            for layer in group.layers:
                # A layer that shares another's cache has none of its own.
                caches = kv_caches.get(layer)
                for cache in [] if caches is None else [caches] if isinstance(caches, torch.Tensor) else caches:
                    parts = split(cache, shards[1])
                    tensors.append(parts[0])
                    for mine, part in zip(regions, parts):
                        mine += regions_of(part, blocks)
                self._last_region[layer] = (at, len(regions[0]) - 1)
            by_group.append(regions)
        if not tensors:
            logger.warning("kvstore: nothing is stored, because this engine has no cache of a kind that can be stored")
            return
        self._pages = self._make_pages(by_group, blocks, tensors[0].device)
        sizes = [pages[0].block_bytes for pages in self._pages]
        self.layout = describe(self._vllm_config, self._kv_cache_config, self._options, sizes, tensors, shards)
        replicas = getattr(self._kv_cache_config, "kv_tp_replicas", 1)
        self._saves_here = self._rank % replicas == 0
        if self.layout.refused:
            logger.warning("kvstore: this engine's blocks are not stored: %s", self.layout.refused)
        # Registered here, off the first request's path: all shards, which a look-up asks for.
        elif all(self._store.layout(self.layout.part(at), b"") is not None for at in range(self.layout.parts)):
            logger.info(
                "kvstore: the worker stores blocks of %s bytes, in %d layer groups and %d shards",
                sizes,
                len(sizes),
                self.layout.parts,
            )

    def _make_pages(self, by_group: list[list[list]], blocks: int, device: torch.device) -> list[list]:
        if device.type == "cpu" and not self._options.staged:
            return [[DirectPages(regions, blocks) for regions in shards] for shards in by_group]
        largest = max(sum(size for *_, size in regions) for shards in by_group for regions in shards)
        self._staging = Staging(device, largest)
        return [[StagedPages(regions, blocks, self._staging) for regions in shards] for shards in by_group]

    def unregister_kv_caches(self) -> None:
        """The engine gives up its cache (sleep mode). The connector must not touch it from now on."""
        self._finish_loads()
        self._drain()
        self._pages = []
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def restore_kv_caches(self) -> None:
        """The engine's cache is there again, where it was. Does nothing if it was not given up."""
        if self._kv_caches is not None and not self._pages:
            self.register_kv_caches(self._kv_caches)

    # ---------------------------------------------------------------- a step

    def bind(self, plan: StepPlan) -> None:
        """Takes the plan of the step that begins."""
        self._plan = plan

    def start_loads(self) -> None:
        """Starts the step's loads."""
        for load in self._plan.loads:
            if load.in_step:
                self._in_step.append(self._start(load, self._plan.version))
            else:
                self._queued.append((load, self._plan.version))
        self._plan.loads = []
        self._start_queued()

    def _start_queued(self) -> None:
        while self._queued and len(self._loading) < LOADS_MAX:
            self._loading.append(self._start(*self._queued.popleft()))

    def _start(self, load: Load, version: bytes) -> _Loading:
        loading = _Loading(load, time.monotonic())
        for run in load.runs:
            parts: list[kvstore.PagesLoad | StagedLoad | None] = []
            for at in range(self.layout.parts if self._pages else 0):
                layout, pages, part = self._store.layout(self.layout.part(at), version), self._pages[run.group][at], None
                if layout is not None:
                    try:
                        part = pages.load(layout.group(run.group), run.hashes, run.numbers, pages.mark())
                    except kvstore.Error as error:
                        self._store.failed(error)
                parts.append(part)
            loading.runs.append((run, parts))
        return loading

    def wait_for_layer(self, layer: str) -> None:
        """Waits until the loads that this step needs have filled a layer's blocks."""
        if not self._in_step:
            return
        group, region = self._last_region.get(layer, (0, -1))
        for loading in self._in_step:
            for run, parts in loading.runs:
                for part in parts if run.group == group and region >= 0 else ():
                    # It ends by the client's deadlines, whatever happens to the daemon.
                    while part is not None and not part.wait_region(region, 60.0):
                        pass

    def finish_step(self) -> None:
        """The step has been computed. Queues its saves."""
        for loading in self._in_step:
            self._end(loading)
            self._brought.add(loading.load.request)
        self._in_step = []
        known = self._plan.failures_known.get(self._rank, 0)
        mark = self._pages[0][0].mark() if self._plan.saves and self._pages else None
        for save in self._plan.saves:
            # After a load that failed, this step's blocks, and those of steps that were planned before the scheduler
            # knew, may have been computed from garbage.
            if not self._saves_here or not self._pages or self._failures > known:
                self._end_save(save, dropped=self._saves_here)
            else:
                self._thread = self._thread or self._start_thread()
                self._queue.put((save, self._plan.version, mark))
        self._plan.saves = []

    def transfer_results(self) -> KVConnectorTransferResults:
        """Returns the requests whose loads have ended, and those whose load failed if single blocks cannot be named."""
        ended = [loading for loading in self._loading if loading.done()]
        self._loading = [loading for loading in self._loading if loading not in ended]
        for loading in ended:
            self._end(loading)
        self._start_queued()
        failed, self._failed = self._failed, set()
        return KVConnectorTransferResults(finished_recving={loading.load.request for loading in ended}, failed_recving=failed)

    def invalid_blocks(self) -> set[int]:
        """Returns the blocks of the engine's cache that were promised but could not be loaded."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def report(self) -> WorkerReport | None:
        """Returns the report for the scheduler's side."""
        with self._lock:
            saved, self._saved = self._saved, collections.Counter()
        brought, self._brought = self._brought, set()
        if not saved and not brought and self._failures == self._failures_told:
            return None
        self._failures_told = self._failures
        return WorkerReport(dict(saved), {self._rank: self._failures}, brought)

    def stats(self) -> KvStoreStats | None:
        with self._lock:
            stats, self._stats = self._stats, KvStoreStats()
        return None if stats.is_empty() else stats

    # ---------------------------------------------------------------- loads

    def _end(self, loading: _Loading) -> None:
        """Waits until a load has ended, because it writes into the cache until then, and takes its outcome."""
        missing: list[int] = []
        for run, parts in loading.runs:
            loaded = min((self._result(part) for part in parts), default=0)
            missing += run.numbers[loaded:]
            self._count("loaded_blocks", loaded)
            self._count("loaded_bytes", loaded * sum(pages.block_bytes for pages in self._pages[run.group]) if self._pages else 0)
        self._count("load_seconds", time.monotonic() - loading.since)
        if missing:
            self._count("failed_loads", 1)
            if len(self._kv_cache_config.kv_cache_groups) == 1:
                self._invalid.update(missing)
            else:
                self._failed.add(loading.load.request)
            if loading.load.in_step:
                self._failures += 1

    def _result(self, part: kvstore.PagesLoad | StagedLoad | None) -> int:
        while part is not None:
            try:
                return part.result(60.0)
            except kvstore.DeadlineExceeded as error:
                if part.done():
                    self._store.failed(error)
                    break
            except kvstore.Error as error:
                self._store.failed(error)
                break
        return 0

    def _finish_loads(self) -> None:
        for loading in self._loading + self._in_step:
            for part in loading.parts():
                while not part.done():
                    with contextlib.suppress(kvstore.Error):
                        part.result(60.0)

    # ---------------------------------------------------------------- saves

    def _start_thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._run_saves, name="kvstore-save", daemon=True)
        thread.start()
        return thread

    def _run_saves(self) -> None:
        while (item := self._queue.get()) is not None:
            save, version, mark = item
            try:
                self._save(save, version, mark)
            except Exception:  # Whatever it was, the blocks' places in the cache are given back.
                logger.exception("kvstore: a save failed")
            self._end_save(save, dropped=False)

    def _save(self, save: Save, version: bytes, mark: Any) -> None:
        for run in save.runs:
            # A block counts once all its shards are stored.
            there, fresh = [0] * len(run.hashes), [False] * len(run.hashes)
            for at, pages in enumerate(self._pages[run.group]):
                for block, result in enumerate(self._save_part(run, at, pages, version, mark, save.upload)):
                    there[block] += result.status in ("stored", "present", "joined")
                    fresh[block] |= result.status == "stored"
            whole = sum(parts == self.layout.parts for parts in there)
            stored = sum(parts == self.layout.parts and is_new for parts, is_new in zip(there, fresh))
            self._count("saved_blocks", stored)
            self._count("present_blocks", whole - stored)
            self._count("dropped_blocks", len(there) - whole)

    def _save_part(self, run: BlockRun, at: int, pages, version: bytes, mark: Any, upload: bool) -> list[kvstore.PutResult]:
        layout, results = self._store.layout(self.layout.part(at), version), []
        each = max(SAVE_BYTES // pages.block_bytes, 1)
        if layout is not None and layout.wants_tokens and run.tokens is not None:
            self._describe(layout.group(run.group), run)
        for first in range(0, len(run.hashes), each) if layout is not None else ():
            last = first + each

            def save(upload: bool, first=first, last=last):
                return pages.save(
                    layout.group(run.group),
                    run.hashes[first:last],
                    run.numbers[first:last],
                    mark,
                    parent=run.hashes[first - 1] if first else run.parent,
                    level=self._options.level,
                    more_follows=last < len(run.hashes),
                    upload=upload,
                )

            try:
                try:
                    results += save(upload)
                except kvstore.Unsupported as error:
                    if not upload:
                        raise
                    logger.warning("kvstore: a request asks for %s, which is not possible: %s", UPLOAD, error)
                    upload = False
                    results += save(upload)
            except kvstore.Error as error:
                self._store.failed(error)
                break
        return results

    def _describe(self, group: kvstore.Group, run: BlockRun) -> None:
        """Tells the daemon the tokens of the blocks that are about to be stored, for the events that it publishes."""
        try:
            group.describe(run.hashes, run.tokens, run.parent, run.adapter)
        except kvstore.Error as error:
            logger.debug("kvstore: the tokens of blocks could not be told to the daemon: %s", error)

    def _end_save(self, save: Save, dropped: bool) -> None:
        if dropped:
            self._count("dropped_blocks", sum(len(run.hashes) for run in save.runs))
        with self._lock:
            self._saved[save.job] += 1

    def _drain(self) -> None:
        """Waits a moment for the queued saves."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(SHUTDOWN_SECONDS)
            if self._thread.is_alive():
                logger.warning("kvstore: the worker ended while blocks were being saved; those blocks are not stored")
            self._thread = None

    def shutdown(self) -> None:
        """The worker ends."""
        self._finish_loads()
        self._drain()
        if self._staging is not None:
            self._staging.close()

    def _count(self, name: str, count: float) -> None:
        with self._lock:
            self._stats.add(name, count)
