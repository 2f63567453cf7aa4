"""The settings in `kv_connector_extra_config` and `ec_connector_extra_config`."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore import options

__all__ = ["EncoderOptions", "Options"]


@dataclass(frozen=True)
class Options(options.Options):
    """The connector's settings, each with its default."""

    # Shorter hits are recomputed: a fetch costs a step, which takes as long as computing some hundred tokens on a GPU.
    min_hit_tokens: int = 0
    # Seconds that the scheduler waits for a look-up. After that it recomputes the prompt, and asks again a little later.
    lookup_deadline: float = 0.2
    # Seconds that a request waits while the object store is searched for more of its prefix. Steps do not wait.
    search_seconds: float = 0.5
    # Loads of blocks in memory run during the step, layer by layer. None: only if the engine runs on the CPU.
    layerwise: bool | None = None
    # Blocks are stored in this many parts, split by heads, and can be read at every tensor-parallel degree that divides this
    # number. None: one part for each of this engine's ranks.
    tp_shards: int | None = None
    # Blocks are copied through staging memory. None: only if the engine's cache is not in CPU memory.
    staged: bool | None = None
    # Blocks that wait to be saved keep their place in the engine's cache. They take at most this share of it.
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

    # Seconds that a request waits for an encoder's output. After that, this engine encodes the item.
    deadline: float = 2.0
