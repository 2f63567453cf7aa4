"""What `kv_connector_extra_config` and `ec_connector_extra_config` may say."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore import options

__all__ = ["EncoderOptions", "Options"]


@dataclass(frozen=True)
class Options(options.Options):
    """The connector's settings, each with its default."""

    # Shorter hits are recomputed: fetching them costs a step, as much as computing some hundred tokens on a GPU.
    min_hit_tokens: int = 0
    # Seconds that the scheduler waits for a look-up; then it recomputes, and asks again a little later.
    lookup_deadline: float = 0.2
    # Seconds that a request waits, and no step, while the object store is searched for more of its prefix.
    search_seconds: float = 0.5
    # Loads of what is in memory run beside the step, layer by layer. None: where the engine runs without CUDA graphs.
    layerwise: bool | None = None
    # Blocks are stored as so many parts of their heads, and are read at every tensor-parallel degree that divides it. None: as
    # this engine's ranks have them, in one piece each.
    tp_shards: int | None = None
    # Blocks go by way of staging memory. None: where the engine's cache is not in CPU memory.
    staged: bool | None = None
    # Blocks that wait to be saved keep their place in the engine's cache: this share of it at most.
    pending_share: float = 0.25

    def _rules(self):
        return [
            *super()._rules(),
            ("min_hit_tokens", "a count of tokens", lambda tokens: tokens >= 0),
            ("lookup_deadline", "more than 0 and at most 60 seconds", lambda deadline: 0 < deadline <= 60),
            ("search_seconds", "0 to 60 seconds", lambda seconds: 0 <= seconds <= 60),
            ("layerwise", "true, false or null", (None, True, False).__contains__),
            ("tp_shards", "null or a count of parts", lambda parts: parts is None or 1 <= parts <= 1024),
            ("staged", "true or null", (None, True).__contains__),
            ("pending_share", "more than 0 and at most 0.9", lambda share: 0 < share <= 0.9),
        ]


@dataclass(frozen=True)
class EncoderOptions(options.Options):
    """The encoder connector's settings."""

    # Seconds that a request waits for an encoder's output; then it is encoded here.
    deadline: float = 2.0
