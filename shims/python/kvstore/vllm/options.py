"""What `kv_connector_extra_config` may say."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """The connector's settings, each with its default."""

    # The daemon; that of this user by default.
    address: str | None = None
    # "auto", "local" or "grpc".
    plane: str = "auto"
    # Names the weights where their files do not: set it anew with new weights.
    weights_version: str = ""
    # Shorter hits are recomputed: fetching them costs a step, as much as computing some hundred tokens on a GPU.
    min_hit_tokens: int = 0
    # "memory", or "local": acknowledged once it is on the node's disk.
    level: str = "memory"
    # Seconds after which a load or save is given up, and its blocks recomputed or not stored.
    deadline: float = 10.0
    # Seconds that the scheduler waits for a look-up; then it recomputes, and asks again a little later.
    lookup_deadline: float = 0.2
    # Loads of what is in memory run beside the step, layer by layer. None: where the engine runs without CUDA graphs.
    layerwise: bool | None = None
    # Blocks that wait to be saved keep their place in the engine's cache: this share of it at most.
    pending_share: float = 0.25

    @classmethod
    def of(cls, extra: dict) -> Options:
        """Raises ValueError, which names what is wrong and what would be valid."""
        valid = {field.name for field in fields(cls)}
        if unknown := sorted(set(extra) - valid):
            raise ValueError(f"kv_connector_extra_config: {', '.join(unknown)}: not known; valid are {', '.join(sorted(valid))}")
        options = cls(**extra)
        for name, good in (
            ("plane", options.plane in ("auto", "local", "grpc")),
            ("level", options.level in ("memory", "local")),
            ("deadline", 0 < options.deadline <= 600),
            ("lookup_deadline", 0 < options.lookup_deadline <= 60),
            ("pending_share", 0 < options.pending_share <= 0.9),
            ("min_hit_tokens", options.min_hit_tokens >= 0),
        ):
            if not good:
                raise ValueError(f"kv_connector_extra_config: {name}: {getattr(options, name)!r} is not valid")
        return options
