"""The messages between the scheduler's side and the workers' sides of the connector. vLLM carries them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstore.store import BlockLayout

__all__ = ["UPLOAD", "BlockRun", "Load", "RankLayout", "Save", "StepPlan", "WorkerReport"]


# In a request's kv_transfer_params: its session is to outlive the node, and its blocks go to the object store.
UPLOAD = "kvstore_upload"


@dataclass(frozen=True)
class RankLayout(BlockLayout, KVConnectorHandshakeMetadata):
    """The layout that a worker stores. The scheduler asks for the same layout. ``shard``: the worker's first shard."""

    # Shards that this worker has: its heads, split.
    parts: int = 1
    # Why this engine's blocks cannot be stored; empty where they can.
    refused: str = ""

    def part(self, number: int) -> RankLayout:
        """Returns the layout of one of the worker's shards."""
        return self.of_shard(self.shard[0] + number)

    def of_shard(self, number: int) -> RankLayout:
        """Returns the layout of a shard, whichever rank has it."""
        return self if number == self.shard[0] else replace(self, shard=(number, self.shard[1]))


@dataclass
class BlockRun:
    """Consecutive blocks of one group, and their places in the engine's cache."""

    group: int
    hashes: list[bytes]
    numbers: list[int]
    # The hash before the first.
    parent: bytes | None = None
    # Their tokens, and the adapter's name, where the daemon publishes events.
    tokens: list[int] | None = None
    adapter: str | None = None


@dataclass
class Load:
    """Blocks to load for a request."""

    request: str
    runs: list[BlockRun]
    # The step waits for them, layer by layer; otherwise the request waits, and no step does.
    in_step: bool


@dataclass
class Save:
    """Blocks to store, once the step has computed them."""

    job: int
    runs: list[BlockRun]
    # They go to the object store, too, whatever the daemon does with others.
    upload: bool = False


@dataclass
class StepPlan(KVConnectorMetadata):
    """A step's work for every worker."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    # Of the weights, where they changed since they were loaded.
    version: bytes = b""
    # Failed loads that the scheduler knew of when it planned this, by rank: what a step computed after others is garbage.
    failures_known: dict[int, int] = field(default_factory=dict)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What workers did since their last report."""

    # How many ranks have ended a save, by job.
    saved: dict[int, int] = field(default_factory=dict)
    # Loads within a step that failed so far, by rank.
    failures: dict[int, int] = field(default_factory=dict)
    # Requests whose loads within a step have ended.
    brought: set[str] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        assert isinstance(other, WorkerReport)
        saved = dict(self.saved)
        for job, ranks in other.saved.items():
            saved[job] = saved.get(job, 0) + ranks
        return WorkerReport(saved, {**self.failures, **other.failures}, self.brought | other.brought)
