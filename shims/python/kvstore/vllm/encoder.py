"""Encoder outputs (of images, clips, sounds) under vLLM, so that encode, prefill and decode can be three processes.

The scheduler's side fetches an item in the background before it promises the item to vLLM. Meanwhile the request waits in the
queue, and other requests run. If an item does not arrive in time, this engine encodes it. The workers get the bytes of an item
with the step, as they get pictures, so a promise can no longer fail. Items are named by vLLM's hash of their content, and by the
model's weights.

An item is two blocks: its shape, and its bytes in a size class of at most an eighth more.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import math
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata

import kvstore
from kvstore.store import BlockLayout, Store

from .layout import has_names_of_items, short_name, weights_digest
from .options import EncoderOptions
from .stats import EncoderPromMetrics, EncoderStats

__all__ = ["Items", "KvStoreEncoderConnector"]

logger = logging.getLogger("vllm.kvstore")

# Fetches side by side: enough for a disk. Further ones wait for their request's next turn.
FETCHES_MAX = 8
FETCHES_KEPT_MAX = 4 * FETCHES_MAX
# Fetched items that wait for their request's turn, and outputs that wait to be stored: each at most so many bytes.
WAITING_BYTES_MAX = 512 << 20
# What nobody came for in so long is let go.
WAITING_SECONDS = 60.0
# An item that was missing is asked for again after so long.
MISSING_SECONDS = 5.0
# Bytes of the block that says an item's shape.
SHAPE_BYTES = 256


# -------------------------------------------------------------------- items in the store


def size_class(length: int) -> int:
    """Returns the size of the block that stores ``length`` bytes. At most an eighth of it is unused."""
    step = 1 << max((length - 1).bit_length() - 4, 6)
    return -(-length // step) * step


class Items:
    """The encoder outputs of one model in the store. While the daemon is away, there are none."""

    def __init__(self, store: Store, model: str, weights: bytes, told: str):
        self._store, self._model, self._weights = store, model, weights
        self._extra = hashlib.blake2b(f"vllm encoder output 1\n{told}".encode(), digest_size=32).digest()

    def _group(self, length: int) -> kvstore.Group | None:
        kind = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=length, kind="encoder_output", order="opaque")
        layout = BlockLayout(self._model, self._weights, "bytes", 1, (kind,), (0, 1), self._extra)
        registered = self._store.layout(layout, b"")
        return registered.group() if registered is not None else None

    def has(self, identifier: str) -> bool:
        """Returns whether an item is stored."""
        return self._shape(identifier) is not None

    def get(self, identifier: str) -> torch.Tensor | None:
        """Returns an item in newly allocated CPU memory, or None if it is not stored."""
        if (described := self._shape(identifier)) is None:
            return None
        dtype, shape, length = described
        bytes_ = torch.empty(length, dtype=torch.uint8)
        try:
            group = self._group(size_class(length))
            if group is None or group.get_into([_hash(identifier)], [bytes_]) != 1:
                return None
        except kvstore.Error as error:
            self._store.failed(error)
            return None
        return bytes_.view(dtype).view(shape)

    def put(self, identifier: str, output: torch.Tensor, level: str) -> bool:
        """Stores an item, and returns whether it is stored now. ``output`` must not change during the call."""
        bytes_ = output.contiguous().view(-1).view(torch.uint8)
        described = json.dumps({"dtype": str(output.dtype).removeprefix("torch."), "shape": list(output.shape)}).encode()
        if not bytes_.numel() or len(described) > SHAPE_BYTES:
            return False
        # The shape comes last: what has one is whole.
        for length, block in ((size_class(bytes_.numel()), bytes_), (SHAPE_BYTES, described)):
            try:
                group = self._group(length)
                (result,) = group.put_from([_hash(identifier)], [block], level=level) if group is not None else [None]
            except kvstore.Error as error:
                self._store.failed(error)
                return False
            if result is None or result.status not in ("stored", "present", "joined"):
                return False
        return True

    def _shape(self, identifier: str) -> tuple[torch.dtype, list[int], int] | None:
        try:
            group = self._group(SHAPE_BYTES)
            found = group.get([_hash(identifier)]) if group is not None else []
        except kvstore.Error as error:
            self._store.failed(error)
            return None
        return _parse_shape(found[0]) if found else None


def _parse_shape(block: bytes) -> tuple[torch.dtype, list[int], int] | None:
    try:
        told = json.loads(block)
        dtype, shape = getattr(torch, told["dtype"]), told["shape"]
        length = math.prod(shape) * dtype.itemsize
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (dtype, shape, length) if length > 0 else None


def _hash(identifier: str) -> bytes:
    return hashlib.blake2b(identifier.encode(), digest_size=32).digest()


def _items(vllm_config, options: EncoderOptions) -> Items:
    model = vllm_config.model_config
    told = repr((str(model.dtype), getattr(model.multimodal_config, "mm_processor_kwargs", None)))
    store = Store(options.address, options.plane, options.deadline, logger)
    return Items(store, short_name(model), weights_digest(vllm_config, options), told)


# -------------------------------------------------------------------- what the two sides tell each other


@dataclass
class EncoderStep(ECConnectorMetadata):
    """The items that a step loads."""

    items: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class EncoderReport(ECConnectorWorkerMetadata):
    """A worker's counts."""

    counts: dict[str, float]

    def aggregate(self, other: EncoderReport) -> EncoderReport:
        stats = EncoderStats(dict(self.counts))
        stats.aggregate(EncoderStats(other.counts))
        return EncoderReport(stats.data)


# -------------------------------------------------------------------- beside the scheduler


class EncoderSchedulerSide:
    """Fetches items, and knows which ones are available. Only the scheduler's thread uses it."""

    def __init__(self, vllm_config, options: EncoderOptions, is_consumer: bool):
        self._items, self._is_consumer = _items(vllm_config, options), is_consumer
        self._threads = concurrent.futures.ThreadPoolExecutor(FETCHES_MAX, thread_name_prefix="kvstore-encoder")
        self._fetching: dict[str, tuple[concurrent.futures.Future, float]] = {}
        # Fetched, each with when; a producer knows only that they are there.
        self._ready: dict[str, tuple[torch.Tensor | None, float]] = {}
        self._ready_bytes = 0
        self._missing: dict[str, float] = {}
        # In vLLM's own cache of encoder outputs.
        self._held: set[str] = set()
        self._allocated: set[str] = set()
        self._step = EncoderStep()
        self.stats = EncoderStats()

    def ensure(self, request, num_computed_tokens: int) -> bool:
        """Returns whether the source of every item that is still needed is known: the store, or this engine's encoder."""
        known = True
        for feature in request.mm_features:
            position = feature.mm_position
            if position.offset + position.length > num_computed_tokens:
                known &= self._is_known(feature.identifier)
        return known

    def _is_known(self, identifier: str) -> bool:
        if identifier in self._held or identifier in self._ready:
            return True
        now = time.monotonic()
        if self._missing.get(identifier, 0.0) > now:
            return True
        if identifier not in self._fetching:
            if self._ready_bytes > WAITING_BYTES_MAX:
                return True
            if len(self._fetching) < FETCHES_KEPT_MAX:
                call = self._items.get if self._is_consumer else self._items.has
                self._fetching[identifier] = (self._threads.submit(call, identifier), now)
            return False
        fetching, _ = self._fetching[identifier]
        if not fetching.done():
            return False
        del self._fetching[identifier]
        if (error := fetching.exception()) is not None:
            logger.error("kvstore: an encoder output could not be fetched", exc_info=error)
        found = None if error else fetching.result()
        if found is None or found is False:
            self._missing[identifier] = now + MISSING_SECONDS
            self.stats.add("missing_items", 1)
        else:
            tensor = found if isinstance(found, torch.Tensor) else None
            self._ready[identifier] = (tensor, now)
            self._ready_bytes += _bytes(tensor)
        return True

    def has(self, identifier: str) -> bool:
        return identifier in self._ready

    def allocated(self, identifier: str) -> None:
        """vLLM's cache has room for the item in this step: the item is loaded if it is ready, and encoded otherwise."""
        self._allocated.add(identifier)
        if (ready := self._ready.pop(identifier, None)) is not None:
            tensor = ready[0]
            self._ready_bytes -= _bytes(tensor)
            if tensor is not None:
                self._step.items[identifier] = tensor
                self.stats.add("loaded_items", 1)
                self.stats.add("loaded_item_bytes", _bytes(tensor))

    def build(self, scheduler_output) -> EncoderStep:
        """Returns the items that the step loads."""
        self._held.difference_update(scheduler_output.free_encoder_mm_hashes)
        self._held |= self._allocated
        self._allocated = set()
        now = time.monotonic()
        for identifier in [name for name, (_, since) in self._ready.items() if since + WAITING_SECONDS < now]:
            self._ready_bytes -= _bytes(self._ready.pop(identifier)[0])
        self._missing = {name: until for name, until in self._missing.items() if until > now}
        # Of requests that were given up.
        self._fetching = {
            name: (fetching, since)
            for name, (fetching, since) in self._fetching.items()
            if since + WAITING_SECONDS > now or not fetching.done()
        }
        step, self._step = self._step, EncoderStep()
        return step

    def shutdown(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _bytes(tensor: torch.Tensor | None) -> int:
    return tensor.numel() * tensor.element_size() if tensor is not None else 0


# -------------------------------------------------------------------- in a worker


class EncoderWorkerSide:
    """Takes the items that a step loads, and stores the items that it encodes, in the background."""

    def __init__(self, vllm_config, options: EncoderOptions, waits: bool):
        self._options, self._waits = options, waits
        self._items = _items(vllm_config, options)
        self._saves_here = _is_first_rank()
        self._queue: queue.SimpleQueue[tuple[str, torch.Tensor, Any] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._waiting_bytes = self._waiting = 0
        self._thread: threading.Thread | None = None
        self._stats = EncoderStats()

    def load(self, step: EncoderStep, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Puts the step's items into vLLM's cache of encoder outputs."""
        for identifier, tensor in step.items.items():
            if identifier not in encoder_cache:
                encoder_cache[identifier] = tensor.to(_device(), non_blocking=True)

    def save(self, identifier: str, output: torch.Tensor) -> None:
        """Stores an item in the background. Its bytes no longer change once it is in vLLM's cache."""
        if not self._saves_here:
            return
        size = _bytes(output)
        with self._changed:
            if self._waiting_bytes + size > WAITING_BYTES_MAX:
                self._stats.add("dropped_items", 1)
                return
            self._waiting_bytes += size
            self._waiting += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvstore-encoder-save", daemon=True)
                self._thread.start()
        copied = None
        if output.device.type != "cpu":
            # Beside the step, in its stream's order.
            host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            host.copy_(output, non_blocking=True)
            copied = torch.Event(device=output.device)
            copied.record()
            output = host
        self._queue.put((identifier, output, copied))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            identifier, output, copied = item
            stored = False
            try:
                if copied is not None:
                    copied.synchronize()
                stored = self._items.put(identifier, output, self._options.level)
            except Exception:  # Whatever it was, the next ones are stored.
                logger.exception("kvstore: an encoder output was not stored")
            with self._changed:
                self._stats.add("saved_items" if stored else "dropped_items", 1)
                self._waiting_bytes -= _bytes(output)
                self._waiting -= 1
                self._changed.notify_all()

    def finish_step(self) -> None:
        """Waits until the items are stored if this process only encodes: its response means that the items are in the store."""
        if self._waits:
            self._wait()

    def _wait(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting == 0, 2 * self._options.deadline):
                logger.warning("kvstore: %d encoder outputs are still being stored", self._waiting)

    def report(self) -> EncoderReport | None:
        with self._changed:
            stats, self._stats = self._stats, EncoderStats()
        return None if stats.is_empty() else EncoderReport(stats.data)

    def shutdown(self) -> None:
        if self._thread is not None:
            self._wait()
            self._queue.put(None)
            self._thread.join(1.0)


def _is_first_rank() -> bool:
    """Returns whether this rank stores items. All tensor-parallel ranks have the same outputs; only the first stage has any."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank


def _device() -> torch.device:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return torch.device("cpu")
    return torch.device(current_platform.device_type, current_platform.current_device())


# -------------------------------------------------------------------- the connector


class KvStoreEncoderConnector(ECConnectorBase):
    """The connector of encoder outputs. Add it with ``--ec-transfer-config``::

        {"ec_connector": "KvStoreEncoderConnector", "ec_connector_module_path": "kvstore.vllm", "ec_role": "ec_both"}

    ``ec_role``: an "ec_producer" encodes and stores items, and runs no language model. An "ec_consumer" reads items, and encodes
    those that are missing. An "ec_both" does all of this. For the settings, see :class:`kvstore.vllm.options.EncoderOptions`.
    """

    def __init__(self, vllm_config, role: ECConnectorRole):
        super().__init__(vllm_config, role)
        transfer = vllm_config.ec_transfer_config
        options = EncoderOptions.of(transfer.ec_connector_extra_config or {}, "ec_connector_extra_config")
        if not has_names_of_items(vllm_config):
            raise ValueError(
                "kvstore: without prefix caching and with mm_processor_cache_gb=0, vLLM names pictures by their request and "
                "not by their content; turn one of the two caches on"
            )
        self._scheduler: EncoderSchedulerSide | None = None
        self._worker: EncoderWorkerSide | None = None
        if role == ECConnectorRole.SCHEDULER:
            self._scheduler = EncoderSchedulerSide(vllm_config, options, self.is_consumer)
            self._resolver = PlaceholderMetadataResolver(vllm_config.model_config)
        else:
            self._worker = EncoderWorkerSide(vllm_config, options, waits=not self.is_consumer)

    # A worker.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_more) -> None:
        self._worker.load(self._get_connector_metadata(), encoder_cache)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_more) -> None:
        if self.is_producer:
            self._worker.save(mm_hash, encoder_cache[mm_hash])

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self._worker.finish_step()
        return None, None

    def build_connector_worker_meta(self) -> EncoderReport | None:
        return self._worker.report()

    # The scheduler.

    def ensure_cache_available(self, request, num_computed_tokens: int) -> bool:
        return self._scheduler.ensure(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self._scheduler.has(identifier)

    def update_state_after_alloc(self, request, index: int) -> None:
        self._scheduler.allocated(request.mm_features[index].identifier)

    def build_connector_meta(self, scheduler_output) -> EncoderStep:
        return self._scheduler.build(scheduler_output)

    def update_connector_output(self, connector_output) -> None:
        if (report := connector_output.ec_connector_worker_meta) is not None:
            self._scheduler.stats.aggregate(EncoderStats(report.counts))

    def request_finished(self, request) -> tuple[bool, dict[str, Any] | None]:
        """Returns the items' shapes for a consumer, which then does not process the pictures again."""
        items = collect_ec_item_metadata(request.mm_features, self._resolver) if self.is_producer else None
        return False, items or None

    def get_ec_connector_stats(self) -> EncoderStats | None:
        if self._scheduler is None or self._scheduler.stats.is_empty():
            return None
        stats, self._scheduler.stats = self._scheduler.stats, EncoderStats()
        return stats

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> EncoderStats:
        return EncoderStats(data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> EncoderPromMetrics:
        return EncoderPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Both.

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.shutdown()
