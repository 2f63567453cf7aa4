"""The settings of a shim in the engine's configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """The settings of every shim, each with its default."""

    # The daemon's address. By default, the daemon of this user.
    address: str | None = None
    # "auto", "local" or "grpc".
    plane: str = "auto"
    # Names the weights if their files do not name them. Change it whenever the weights change.
    weights_version: str = ""
    # "memory", or "local": a block is acknowledged once it is on the node's disk.
    level: str = "memory"
    # Seconds after which the shim gives up a load or save. The blocks are then recomputed, or not stored.
    deadline: float = 10.0

    @classmethod
    def of(cls, extra: dict, setting: str) -> Options:
        """Reads the settings. ``setting``: the engine's setting that holds them. Raises ValueError; its message names what is
        wrong, and what would be valid."""
        valid = {field.name for field in fields(cls)}
        if unknown := sorted(set(extra) - valid):
            raise ValueError(f"{setting}: unknown keys {', '.join(unknown)}; valid keys are {', '.join(sorted(valid))}")
        options = cls(**extra)
        for name, what, good in options._rules():
            try:
                if good(getattr(options, name)):
                    continue
            except TypeError:
                pass
            raise ValueError(f"{setting}: {name}: {getattr(options, name)!r} is not valid; use {what}")
        return options

    def _rules(self):
        return [
            ("address", "the address of a daemon", lambda address: address is None or isinstance(address, str)),
            ("plane", "auto, local or grpc", ("auto", "local", "grpc").__contains__),
            ("weights_version", "a string", lambda version: isinstance(version, str)),
            ("level", "memory or local", ("memory", "local").__contains__),
            ("deadline", "more than 0 and at most 600 seconds", lambda deadline: 0 < deadline <= 600),
        ]
