"""The L2 adapter for LMCache's multi-process server. It stores the server's chunks one tier below the server's memory."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import logging
import threading
import time
from collections import defaultdict, deque

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform.event_notifier import create_event_notifier

from kvstore import weights
from kvstore.options import Options
from kvstore.store import BlockLayout, Store

from .chunks import Chunks, is_kept, layout

__all__ = ["KvStoreL2Adapter"]

logger = logging.getLogger("lmcache.kvstore")

# What a look-up found stays at least so long, until it is unlocked: the longest that a ticket can.
HOLD_SECONDS = 30.0
# Keys with locks, from which on those are forgotten that have ended.
TICKETS_KEPT_MAX = 65_536
# Copies side by side: two fill the memory of a small machine; look-ups have a thread of their own and wait for none.
STORES, LOADS = 2, 2


@dataclasses.dataclass
class _Ticket:
    ticket: bytes
    locked: int
    until: float


class _Tasks:
    """Work of one kind: done by threads, announced by an eventfd, taken once."""

    def __init__(self, name: str, threads: int):
        self.notifier = create_event_notifier()
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix=f"kvstore-{name}")
        self._lock = threading.Lock()
        self._ended: dict[int, object] = {}

    def start(self, number: int, otherwise, work) -> None:
        """``otherwise``: the outcome where ``work`` raises."""

        def run() -> None:
            try:
                outcome = work()
            except Exception:  # Whatever it was, LMCache waits for an outcome.
                logger.exception("kvstore: a store, look-up or load task failed")
                outcome = otherwise
            with self._lock:
                self._ended[number] = outcome
            self.notifier.notify()

        self._threads.submit(run)

    def later(self, work) -> None:
        """Work that nobody waits for."""
        self._threads.submit(work)

    def take(self, number: int):
        with self._lock:
            return self._ended.pop(number, None)

    def take_all(self) -> dict:
        with self._lock:
            ended, self._ended = self._ended, {}
        return ended

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self.notifier.close()


class KvStoreL2Adapter(L2AdapterInterface):
    """The adapter::

        --l2-adapter '{"type": "plugin", "module_path": "kvstore.lmcache", "class_name": "KvStoreL2Adapter", \\
          "adapter_params": {}}'

    ``adapter_params``: see :class:`kvstore.options.Options`. Set ``model_path`` as well if the model's name in LMCache's keys
    is not the name of its files. The store evicts by itself, so LMCache has no capacity to manage. Threads can share an adapter.
    """

    def __init__(self, params: dict, l1_memory_desc=None):
        super().__init__(max_capacity_bytes=0)
        params = dict(params)
        self._model_path = params.pop("model_path", None)
        self._options = Options.of(params, "adapter_params")
        self._store = Store(self._options.address, self._options.plane, self._options.deadline, logger)
        self._stores, self._lookups, self._loads = _Tasks("store", STORES), _Tasks("lookup", 1), _Tasks("load", LOADS)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._layouts: dict[tuple[str, int, int, int], BlockLayout] = {}
        # By what a key says but its hash, the lengths of chunks that were stored or read here.
        self._lengths: dict[tuple[str, int, int], set[int]] = defaultdict(set)
        self._tickets: dict[ObjectKey, deque[_Ticket]] = defaultdict(deque)

    # ---------------------------------------------------------------- what LMCache polls

    def get_store_event_fd(self) -> int:
        return self._stores.notifier.fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.notifier.fileno()

    def get_load_event_fd(self) -> int:
        return self._loads.notifier.fileno()

    # ---------------------------------------------------------------- tasks

    def submit_store_task(self, keys, objects) -> int:
        """Stores chunks. LMCache keeps its memory objects until the task has ended."""
        number = next(self._numbers)
        self._stores.start(number, L2StoreResult(False, 0), lambda: self._store_chunks(list(keys), list(objects)))
        return number

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return self._stores.take_all()

    def submit_lookup_and_lock_task(self, keys, group_layout_descs=None) -> int:
        """Finds chunks, and holds them for a while.

        A chunk has the length that the descriptions say. A chunk that LMCache stored in another form (for example, compressed)
        is found once this adapter has stored or read a chunk of its length.
        """
        number = next(self._numbers)
        lengths = {group: _length(described) for group, described in (group_layout_descs or {}).items()}
        self._lookups.start(number, Bitmap(len(keys)), lambda: self._find_chunks(list(keys), lengths))
        return number

    def query_lookup_and_lock_result(self, task_id) -> Bitmap | None:
        return self._lookups.take(task_id)

    def submit_unlock(self, keys) -> None:
        """Ends the holds on chunks. A hold that cannot be ended now ends by itself."""
        ended = []
        with self._lock:
            for key in keys:
                if tickets := self._tickets.get(key):
                    ticket = tickets.popleft()
                    ticket.locked -= 1
                    if ticket.locked == 0:
                        ended.append(ticket.ticket)
                    if not tickets:
                        del self._tickets[key]
        if ended:
            self._lookups.later(lambda: [self._store.release(ticket) for ticket in ended])

    def submit_load_task(self, keys, objects) -> int:
        """Reads chunks into LMCache's memory objects."""
        number = next(self._numbers)
        self._loads.start(number, Bitmap(len(keys)), lambda: self._load_chunks(list(keys), list(objects)))
        return number

    def query_load_result(self, task_id) -> Bitmap | None:
        return self._loads.take(task_id)

    # ---------------------------------------------------------------- what threads do

    def _store_chunks(self, keys, objects) -> L2StoreResult:
        moved, failed, stored = 0, False, []
        buffers = [one.byte_array for one in objects]
        for of, places in self._by_layout(keys, map(len, buffers)).items():
            here = [buffers[at] for at in places]
            results = Chunks(self._store, of).put([_hash(keys[at]) for at in places], here, self._options.level)
            failed |= len(results) < len(places) or not all(map(is_kept, results))
            for at, result in zip(places, results):
                if result.status == "stored":
                    moved += len(buffers[at])
                    stored.append((keys[at], len(buffers[at])))
        if stored:
            self._notify_keys_stored(*map(list, zip(*stored)))
        return L2StoreResult(not failed, 0 if failed else moved)

    def _find_chunks(self, keys, described: dict[int, int]) -> Bitmap:
        found = Bitmap(len(keys))
        self._forget_ended()
        for length, places in self._candidates(keys, described):
            for of, there in self._by_layout(keys, [length] * len(keys), places).items():
                hashes = [_hash(keys[at]) for at in there]
                for first, count, ticket in Chunks(self._store, of).hold(hashes, HOLD_SECONDS):
                    held = _Ticket(ticket, count, time.monotonic() + HOLD_SECONDS) if ticket else None
                    with self._lock:
                        for at in there[first : first + count]:
                            found.set(at)
                            if held is not None:
                                self._tickets[keys[at]].append(held)
        return found

    def _forget_ended(self) -> None:
        """Lets go of what nobody unlocked, should there be much of it."""
        with self._lock:
            if len(self._tickets) > TICKETS_KEPT_MAX:
                now = time.monotonic()
                held = {key: deque(one for one in tickets if one.until > now) for key, tickets in self._tickets.items()}
                self._tickets = defaultdict(deque, {key: tickets for key, tickets in held.items() if tickets})

    def _candidates(self, keys, described: dict[int, int]) -> list[tuple[int, list[int]]]:
        """Lengths, each with the keys whose chunks may have it."""
        places: dict[int, list[int]] = defaultdict(list)
        with self._lock:
            for at, key in enumerate(keys):
                lengths = set(self._lengths.get(_family(key), ()))
                if (length := described.get(key.object_group_id)) is not None:
                    lengths.add(length)
                for length in lengths:
                    places[length].append(at)
        return sorted(places.items())

    def _load_chunks(self, keys, objects) -> Bitmap:
        loaded, read = Bitmap(len(keys)), []
        buffers = [one.byte_array for one in objects]
        for of, places in self._by_layout(keys, map(len, buffers)).items():
            here = [buffers[at] for at in places]
            for at, done in zip(places, Chunks(self._store, of).get_into([_hash(keys[at]) for at in places], here)):
                if done:
                    loaded.set(at)
                    read.append(keys[at])
        if read:
            self._notify_keys_accessed(read)
        return loaded

    def _by_layout(self, keys, lengths, places=None) -> dict[BlockLayout, list[int]]:
        """These places of ``keys`` (all by default), by their layouts."""
        lengths, by_layout = list(lengths), defaultdict(list)
        for at in range(len(keys)) if places is None else places:
            by_layout[self._layout_of(keys[at], lengths[at])].append(at)
        return by_layout

    def _layout_of(self, key: ObjectKey, length: int) -> BlockLayout:
        with self._lock:
            if (known := self._layouts.get((*_family(key), length))) is not None:
                return known
        digest = weights.name(self._model_path or key.model_name, self._options.weights_version, logger)
        # (world size, rank, and both on the node), a byte each.
        world, rank = key.kv_rank >> 24 & 0xFF, key.kv_rank >> 16 & 0xFF
        shard = (rank, world) if rank < world else (0, 1)
        told = f"{key.model_name} rank {key.kv_rank:#x} group {key.object_group_id}"
        made = layout(key.model_name, digest, "bytes", shard, told, length)
        with self._lock:
            self._lengths[_family(key)].add(length)
            return self._layouts.setdefault((*_family(key), length), made)

    # ---------------------------------------------------------------- the rest

    def delete(self, keys) -> None:
        """Makes chunks unreadable. LMCache calls it to keep a quota by salt."""
        for length, places in self._candidates(keys, {}):
            for of, here in self._by_layout(keys, [length] * len(keys), places).items():
                chunks = Chunks(self._store, of)
                present = chunks.contains([_hash(keys[at]) for at in here])
                there = [keys[at] for at, is_there in zip(here, present) if is_there]
                if there:
                    chunks.delete([_hash(key) for key in there])
                    self._notify_keys_deleted(there, [length] * len(there))

    def report_status(self) -> dict:
        """Returns the adapter's part of LMCache's status page."""
        with self._lock:
            locked = len(self._tickets)
        return {"is_healthy": not self._store.is_away, "type": type(self).__name__, "locked_key_count": locked}

    def close(self) -> None:
        """Ends the tasks under way, and all holds."""
        with self._lock:
            keys = [key for key, tickets in self._tickets.items() for _ in tickets]
        self.submit_unlock(keys)
        for tasks in (self._stores, self._lookups, self._loads):
            tasks.close()


def _family(key: ObjectKey) -> tuple[str, int, int]:
    return key.model_name, key.kv_rank, key.object_group_id


def _length(described) -> int:
    """Bytes of a memory object, from LMCache's description of it."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(described.shapes, described.dtypes))


def _hash(key: ObjectKey) -> bytes:
    """A chunk's hash, with the salt where there is one."""
    if not key.cache_salt and 0 < len(key.chunk_hash) <= 32:
        return key.chunk_hash
    return hashlib.blake2b(key.chunk_hash, digest_size=32, key=hashlib.sha256(key.cache_salt.encode()).digest()).digest()
