"""The connector's side in vLLM's scheduler. It looks up prompts in the store, and plans which blocks are loaded and saved.

A save holds a reference to its blocks' places in the engine's cache, as a request does, until every rank has stored the blocks.
The request can end, be preempted or be cancelled meanwhile. Only whole blocks of known tokens are saved, in the step that
computes their last token.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.utils import yield_req_data

import kvstore
from kvstore.store import Store
from kvstore.weights.adapters import Adapters

from .hashes import Hashes
from .layout import groups_of, has_names_of_items
from .messages import UPLOAD, BlockRun, Load, RankLayout, Save, StepPlan, WorkerReport
from .options import Options

__all__ = ["HANDED_OVER", "SchedulerSide"]

logger = logging.getLogger("vllm.kvstore")

# What a look-up found is held so long for the workers.
HOLD_SECONDS = 30.0
# A look-up is not made again for a request that waits for room.
LOOKUP_KEPT_SECONDS = 5.0
# How long a decode worker waits for blocks that a prefill worker is saving.
HAND_OVER_SECONDS = 5.0
# In a request's kv_transfer_params: blocks that a prefill worker stores.
HANDED_OVER = "kvstore_blocks"


@dataclass
class _Hit:
    """Blocks that a request can load from the store, from block `start` on."""

    start: int
    blocks: int
    in_memory: int
    tickets: list[bytes]
    since: float
    # The object store is being searched for more.
    searching: bool = False
    names: list[bytes] = field(default_factory=list)


@dataclass
class _Tracked:
    """A running request: the places of its blocks, by group, and how many of them are saved or were stored before."""

    request: object
    numbers: list[list[int]]
    saved: int = -1
    # It was computed, in part, with weights that have changed since.
    outdated: bool = False


@dataclass
class _Job:
    numbers: list[int] = field(default_factory=list)
    ranks: int = 0


class SchedulerSide:
    """See the head of this file."""

    def __init__(self, vllm_config, kv_cache_config, options: Options):
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        self._options = options
        self._groups, self._refused = groups_of(kv_cache_config)
        self._has_names_of_items = has_names_of_items(vllm_config)
        self._store = Store(options.address, options.plane, options.lookup_deadline, logger)
        self._layouts: list[RankLayout] = []
        self._ranks = parallel.world_size
        # A producer reads, too: its prompts share prefixes.
        self._saves = transfer.is_kv_producer
        self._waits_for_hand_over = transfer.is_kv_consumer
        is_cpu = vllm_config.device_config.device_type == "cpu"
        in_step = is_cpu if options.layerwise is None else options.layerwise
        # vLLM maps failed blocks of a step's own loads back to requests for models of one group alone.
        self._in_step = in_step and len(kv_cache_config.kv_cache_groups) == 1
        self._hash_tokens = kv_cache_config.hash_block_size or vllm_config.cache_config.block_size
        self._pending_max = int(kv_cache_config.num_blocks * options.pending_share)
        self._pool = None
        self._hits: dict[str, _Hit] = {}
        self._waiting_since: dict[str, float] = {}
        self._attempts: dict[str, int] = {}
        self._loads: dict[str, Load] = {}
        self._held: dict[str, list[bytes]] = {}
        self._tracked: dict[str, _Tracked] = {}
        self._jobs: dict[int, _Job] = {}
        self._next_job = 0
        self._pending = 0
        self._failures: dict[int, int] = {}
        self._version = b""
        self._adapters = Adapters(logger)
        self._hashes = Hashes(vllm_config.cache_config, self._hash_tokens)

    @property
    def _block_tokens(self) -> int:
        return self._groups[0].block_tokens

    def bind_pool(self, pool) -> None:
        """Takes the pool of the engine's blocks."""
        self._pool = pool

    def set_layouts(self, layouts: list[RankLayout]) -> None:
        """Takes the layouts that the workers store."""
        refused = next((layout.refused for layout in layouts if layout.refused), "")
        self._refused = self._refused or refused
        # A look-up asks for every shard of a layout: one layout for each pipeline stage.
        stages = {(layout.weights, layout.groups, layout.extra): layout for layout in layouts}
        self._layouts = list(stages.values())
        for layout in self._layouts:
            if not self._refused:
                self._store.layout(layout, b"")

    # ---------------------------------------------------------------- names

    def _known(self, request) -> int:
        """Returns how many whole blocks of a request have known tokens, and names that cover everything they depend on."""
        if request.mm_features and not self._has_names_of_items:
            return 0
        if self._adapter(request) is None:
            return 0
        known = getattr(request, "num_publishable_block_hashes", None)
        hashes = len(request.block_hashes)
        return (hashes if known is None else min(known, hashes)) // (self._block_tokens // self._hash_tokens)

    def _names(self, request, first: int, end: int) -> list[bytes]:
        """Returns the store's names of a request's blocks from `first` to `end`. Their tokens are known."""
        each = self._block_tokens // self._hash_tokens
        if first >= end:
            return []
        adapter = self._adapter(request)
        # If it has lost its name since they were counted, they get names that nobody finds.
        adapter = os.urandom(32) if adapter is None else adapter
        hashes = self._hashes.of(request, adapter)
        names = (bytes(hashes[(at + 1) * each - 1]) for at in range(first, end))
        return [name if not adapter and len(name) <= 32 else _digest(name, adapter) for name in names]

    def _adapter(self, request) -> bytes | None:
        """Returns a name of a request's adapter: empty without one, None if nothing names it."""
        lora = request.lora_request
        if lora is None:
            return b""
        return self._adapters.name(lora.lora_path)

    # ---------------------------------------------------------------- look-ups

    def matched_tokens(self, request, computed: int) -> tuple[int | None, bool]:
        """Returns how many tokens the store has beyond those that the engine has, and whether the request waits. If the number is
        None, vLLM asks again."""
        if self._refused or not self._layouts or request.skip_reading_prefix_cache or computed % self._block_tokens:
            return 0, False
        if self._attempts.get(request.request_id, 0) > request.num_preemptions + 1:
            # Promised twice and not brought: whatever the reason is, it would come again.
            return 0, False
        start = computed // self._block_tokens
        # The last token is computed, whatever is stored: its output is the next one.
        most = (request.num_tokens - 1) // self._block_tokens
        hit = self._hits.get(request.request_id)
        if hit is None or hit.start != start or time.monotonic() - hit.since > LOOKUP_KEPT_SECONDS:
            self._forget(request.request_id)
            hit = self._look_up(request, start, most)
        expected = self._handed_over(request, most)
        patience = HAND_OVER_SECONDS if expected > start + hit.blocks else self._options.search_seconds if hit.searching else 0
        if patience:
            since = self._waiting_since.setdefault(request.request_id, time.monotonic())
            if time.monotonic() - since < patience:
                self._release(hit.tickets)
                return None, False
        self._waiting_since.pop(request.request_id, None)
        tokens = min(hit.blocks, most - start) * self._block_tokens
        if tokens <= 0 or tokens < self._options.min_hit_tokens:
            self._release(hit.tickets)
            return 0, False
        self._hits[request.request_id] = hit
        return tokens, not self._is_in_step(hit)

    def _is_in_step(self, hit: _Hit) -> bool:
        return self._in_step and hit.in_memory >= hit.blocks

    def _look_up(self, request, start: int, most: int) -> _Hit:
        hit = _Hit(start, 0, 0, [], time.monotonic())
        names = self._names(request, start, min(most, self._known(request)))
        if not names:
            return hit
        hit.names = names
        hit.blocks = hit.in_memory = len(names)
        for rank_layout in self._layouts:
            found = self._look_up_in(rank_layout, names)
            hit.searching |= found is not None and found.searching
            if found is None or not found.blocks:
                self._release(hit.tickets)
                return _Hit(start, 0, 0, [], hit.since, hit.searching)
            hit.blocks, hit.in_memory = min(hit.blocks, found.blocks), min(hit.in_memory, found.in_memory)
            hit.tickets += [found.ticket] if found.ticket else []
        return hit

    def _look_up_in(self, rank_layout: RankLayout, names: list[bytes]) -> kvstore.Lookup | None:
        layout = self._store.layout(rank_layout, self._version)
        try:
            return layout.look_up_and_hold(names, HOLD_SECONDS, all_shards=True) if layout else None
        except kvstore.Error as error:
            self._store.failed(error)
            return None

    def _handed_over(self, request, most: int) -> int:
        """Returns how many blocks of this prompt a prefill worker said that it stores."""
        params = request.kv_transfer_params or {}
        blocks = params.get(HANDED_OVER, 0) if self._waits_for_hand_over else 0
        return min(blocks, most) if isinstance(blocks, int) else 0

    def _release(self, tickets: list[bytes]) -> None:
        for ticket in tickets:
            self._store.release(ticket)
        tickets.clear()

    def _forget(self, request_id: str) -> None:
        if (hit := self._hits.pop(request_id, None)) is not None:
            self._release(hit.tickets)

    def allocated(self, request, blocks, external_tokens: int) -> None:
        """The engine has allocated places for a request's blocks. Plans the loads into these places."""
        request_id = request.request_id
        self._tracked.setdefault(request_id, _Tracked(request, [[] for _ in self._groups]))
        if external_tokens <= 0:
            self._forget(request_id)
            return
        hit = self._hits.pop(request_id, None)
        if hit is None:
            # vLLM asks before it allocates; without an answer of ours there is nothing to bring, and it must be told so.
            raise RuntimeError(f"kvstore: vLLM expects {external_tokens} tokens of {request_id}, but no look-up found them")
        count = external_tokens // self._block_tokens
        self._attempts[request_id] = self._attempts.get(request_id, 0) + 1
        numbers = blocks.get_block_ids()
        runs = []
        for at, group in enumerate(self._groups):
            first = hit.start
            if group.window:
                # Blocks that no later token looks back to are not read.
                end = (hit.start + count) * group.block_tokens
                first = max(first, (end - group.window + 1) // group.block_tokens)
            names = hit.names[first - hit.start : count]
            runs.append(BlockRun(at, names, numbers[group.number][first : hit.start + count]))
        self._loads[request_id] = Load(request_id, runs, self._is_in_step(hit))
        self._held[request_id] = hit.tickets

    # ---------------------------------------------------------------- a step

    def plan(self, output) -> StepPlan:
        """Returns what the workers load and save in a step."""
        plan = StepPlan(list(self._loads.values()), [], self._version, dict(self._failures))
        self._loads = {}
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens))
        started_anew = set(cached.resumed_req_ids) | {new.req_id for new in output.scheduled_new_reqs}
        for request_id, numbers, _ in yield_req_data(output):
            if (tracked := self._tracked.get(request_id)) is None:
                continue
            if request_id in started_anew:
                tracked.numbers, tracked.saved = [[] for _ in self._groups], -1
                tracked.outdated = False
            for places, group in zip(tracked.numbers, self._groups):
                places += numbers[group.number] if numbers else []
            before = computed[request_id]
            after = before + output.num_scheduled_tokens.get(request_id, 0)
            if tracked.saved < 0:
                # What the engine or the store had before this step is stored, or was.
                tracked.saved = before // self._block_tokens
            # A load that failed made the engine compute blocks again: those were not saved.
            tracked.saved = min(tracked.saved, before // self._block_tokens)
            if self._saves and not tracked.outdated and not self._refused and self._layouts:
                self._save(plan, tracked, after // self._block_tokens)
        return plan

    def _save(self, plan: StepPlan, tracked: _Tracked, ready: int) -> None:
        start = tracked.saved
        if ready <= start or self._pool is None:
            return
        ready = min(ready, self._known(tracked.request), *(len(places) for places in tracked.numbers))
        if ready <= start:
            return
        tracked.saved = ready
        # The store is slower than the engine: what does not fit is recomputed some day. Of a long prompt that a step computes
        # as a whole, the beginning may fit.
        ready = min(ready, start + (self._pending_max - self._pending) // len(self._groups))
        if ready <= start:
            return
        runs, kept = [], []
        for at in range(len(self._groups)):
            runs += self._runs(at, tracked, start, ready)
        for run in runs:
            kept += run.numbers
        if not kept:
            return
        self._pool.touch([self._pool.blocks[number] for number in kept])
        self._jobs[self._next_job] = _Job(kept)
        self._pending += len(kept)
        upload = (tracked.request.kv_transfer_params or {}).get(UPLOAD) is True
        plan.saves.append(Save(self._next_job, runs, upload))
        self._next_job += 1

    def _runs(self, group: int, tracked: _Tracked, start: int, end: int) -> list[BlockRun]:
        """Returns the blocks from `start` to `end`, without those that a sliding window has already passed."""
        first = max(start - 1, 0)
        names = self._names(tracked.request, first, end)
        runs: list[BlockRun] = []
        follows = False
        layout = self._store.layout(self._layouts[0], self._version) if self._layouts else None
        describes = layout is not None and layout.wants_tokens
        for at in range(start, end):
            place = tracked.numbers[group][at]
            if self._pool.blocks[place].is_null:
                follows = False
                continue
            if not follows:
                runs.append(BlockRun(group, [], [], names[at - 1 - first] if at else None))
            runs[-1].hashes.append(names[at - first])
            runs[-1].numbers.append(place)
            follows = True
            if describes:
                tokens = tracked.request.all_token_ids[at * self._block_tokens : (at + 1) * self._block_tokens]
                runs[-1].tokens = (runs[-1].tokens or []) + list(tokens)
                runs[-1].adapter = getattr(tracked.request.lora_request, "lora_name", None)
        return runs

    def update(self, output) -> None:
        """Takes the workers' reports."""
        for request_id in output.finished_recving or ():
            self._release(self._held.pop(request_id, []))
        report = output.kv_connector_worker_meta
        if not isinstance(report, WorkerReport):
            return
        self._failures.update(report.failures)
        for request_id in report.brought:
            self._release(self._held.pop(request_id, []))
        for number, ranks in report.saved.items():
            job = self._jobs.get(number)
            if job is None:
                continue
            job.ranks += ranks
            if job.ranks >= self._ranks:
                del self._jobs[number]
                self._pending -= len(job.numbers)
                self._pool.free_blocks([self._pool.blocks[place] for place in job.numbers])

    def finished(self, request) -> dict | None:
        """A request has ended. On a prefill worker, returns the parameters for the decode worker."""
        request_id = request.request_id
        self._forget(request_id)
        self._hashes.forget(request_id)
        self._waiting_since.pop(request_id, None)
        self._attempts.pop(request_id, None)
        self._loads.pop(request_id, None)
        self._release(self._held.pop(request_id, []))
        tracked = self._tracked.pop(request_id, None)
        if self._saves and not self._waits_for_hand_over and tracked is not None and tracked.saved > 0:
            return {HANDED_OVER: min(tracked.saved, request.num_prompt_tokens // self._block_tokens)}
        return None

    def has_pending(self) -> bool:
        """Returns whether saves are under way. They keep the engine's loop running, so that their blocks' places are freed."""
        return bool(self._jobs)

    def reset(self) -> bool:
        """The weights have changed. Blocks that are stored from now on belong to another layout than the blocks before."""
        self._version = os.urandom(32)
        self._adapters.reset()
        for request_id in list(self._hits):
            self._forget(request_id)
        for tracked in self._tracked.values():
            tracked.outdated = True
        return True


def _digest(name: bytes, adapter: bytes) -> bytes:
    return hashlib.blake2b(adapter + name, digest_size=32, person=b"kvstore adapter").digest()
