"""The connector that vLLM loads: one object beside the scheduler, one in each worker."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from .messages import RankLayout, StepPlan, WorkerReport
from .options import Options
from .scheduler import SchedulerSide
from .stats import KvStorePromMetrics, KvStoreStats
from .worker import WorkerSide

__all__ = ["KvStoreConnector"]

logger = logging.getLogger("vllm.kvstore")


class KvStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps KV blocks in the node's kvstore daemon, and loads them from there.

    After a miss or a failure, or while the daemon is away, vLLM computes the prompt, as without the connector. For the settings,
    see :class:`kvstore.vllm.options.Options`.
    """

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        options = Options.of(transfer.kv_connector_extra_config or {}, "kv_connector_extra_config")
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, options)
            if transfer.kv_load_failure_policy != "recompute":
                logger.warning(
                    'kvstore: kv_load_failure_policy is %r: a block that was evicted or lost fails its request. Use "recompute".',
                    transfer.kv_load_failure_policy,
                )
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config, options, vllm_config.parallel_config.rank)

    @property
    def requires_kv_delivery(self) -> bool:
        """Returns False: a block that is not stored is computed again."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Loads within a step wait in each layer, and a captured CUDA graph would leave these waits out."""
        return bool(extra_config.get("layerwise"))

    # ---------------------------------------------------------------- in a worker

    def register_kv_caches(self, kv_caches) -> None:
        self._worker.register_kv_caches(kv_caches)

    def unregister_kv_caches(self) -> None:
        self._worker.unregister_kv_caches()

    def restore_kv_caches(self) -> None:
        self._worker.restore_kv_caches()

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config) -> bool:
        """Returns True: vLLM maps its cache at the same addresses again. Asked of the class, before there is a connector."""
        return True

    def get_handshake_metadata(self) -> RankLayout | None:
        return self._worker.layout if self._worker else None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepPlan)
        self._worker.bind(connector_metadata)

    def start_load_kv(self, forward_context, **_kwargs: Any) -> None:
        self._worker.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **_kwargs: Any) -> None:
        """Does nothing here. Whole blocks are saved once the step has computed them: see :meth:`wait_for_save`."""

    def wait_for_save(self) -> None:
        self._worker.finish_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self._worker.transfer_results()
        return None, results.finished_recving or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._worker.transfer_results()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.invalid_blocks()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self._worker.report()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()

    # ---------------------------------------------------------------- beside the scheduler

    def bind_gpu_block_pool(self, gpu_block_pool) -> None:
        self._scheduler.bind_pool(gpu_block_pool)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], RankLayout]) -> None:
        self._scheduler.set_layouts([metadata[rank] for rank in sorted(metadata)])

    def set_xfer_handshake_metadata(self, metadata: dict[int, RankLayout]) -> None:
        self._scheduler.set_layouts([metadata[rank] for rank in sorted(metadata)])

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output) -> StepPlan:
        return self._scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output) -> None:
        self._scheduler.update(connector_output)

    def request_finished(self, request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finished(request)

    def request_finished_all_groups(self, request, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finished(request)

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_pending()

    def reset_cache(self) -> bool:
        return self._scheduler.reset()

    def take_events(self) -> Iterable[Any]:
        return ()

    # ---------------------------------------------------------------- statistics

    def get_kv_connector_stats(self) -> KvStoreStats | None:
        return self._worker.stats() if self._worker else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvStoreStats:
        return KvStoreStats(data=data) if data else KvStoreStats()

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> KvStorePromMetrics:
        return KvStorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
