"""The connectors' counts, through vLLM's own hooks: its log line, and its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

__all__ = ["COUNTS", "ENCODER_COUNTS", "EncoderPromMetrics", "EncoderStats", "KvStorePromMetrics", "KvStoreStats"]

COUNTS = {
    "loaded_blocks": "Blocks loaded from the store, of all layer groups and ranks",
    "loaded_bytes": "Bytes of the blocks loaded from the store",
    "load_seconds": "Total time of loads, each from its start to its end",
    "failed_loads": "Loads that brought fewer blocks than were promised; the other blocks were recomputed",
    "saved_blocks": "Blocks that were stored",
    "present_blocks": "Blocks that were already in the store, or came from another writer",
    "dropped_blocks": "Blocks that were not stored because the store was full, slow or away",
}

ENCODER_COUNTS = {
    "loaded_items": "Encoder outputs that were loaded from the store",
    "loaded_item_bytes": "Bytes of the encoder outputs loaded from the store",
    "missing_items": "Encoder outputs that were asked for but were not in the store in time",
    "saved_items": "Encoder outputs that were stored, or were already in the store",
    "dropped_items": "Encoder outputs that were not stored because the store was full, slow or away",
}


class _Counts:
    """Counts since the last report: sums over ranks and steps."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def add(self, name: str, count: float) -> None:
        self.data[name] = self.data.get(name, 0) + count

    def aggregate(self, other):
        for name, count in other.data.items():
            self.add(name, count)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(count, 3) for name, count in self.data.items()}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class KvStoreStats(_Counts, KVConnectorStats):
    """Counts of the connector of keys and values."""


class EncoderStats(_Counts, ECConnectorStats):
    """Counts of the connector of encoder outputs."""


class _Counters:
    """A Prometheus counter for each count."""

    counts: dict[str, str]

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {}
        for name, meaning in self.counts.items():
            counter = self._counter_cls(name=f"vllm:kvstore_{name}", documentation=meaning, labelnames=labelnames)
            self._counters[name] = {engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            if name in self._counters and count > 0:
                self._counters[name][engine_idx].inc(count)


class KvStorePromMetrics(_Counters, KVConnectorPromMetrics):
    """Prometheus counters of the connector of keys and values."""

    counts = COUNTS


class EncoderPromMetrics(_Counters, ECConnectorPromMetrics):
    """Prometheus counters of the connector of encoder outputs."""

    counts = ENCODER_COUNTS
