"""What an engine's configuration may say to its shim."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """The settings of every shim, each with its default."""

    # The daemon; that of this user by default.
    address: str | None = None
    # "auto", "local" or "grpc".
    plane: str = "auto"
    # Names the weights where their files do not: set it anew with new weights.
    weights_version: str = ""
    # "memory", or "local": acknowledged once it is on the node's disk.
    level: str = "memory"
    # Seconds after which a load or save is given up, and its blocks recomputed or not stored.
    deadline: float = 10.0

    @classmethod
    def of(cls, extra: dict, setting: str) -> Options:
        """``setting``: where the engine's configuration has them. Raises ValueError, which names what is wrong and what would
        be valid."""
        valid = {field.name for field in fields(cls)}
        if unknown := sorted(set(extra) - valid):
            raise ValueError(f"{setting}: {', '.join(unknown)}: not known; valid are {', '.join(sorted(valid))}")
        options = cls(**extra)
        for name, what, good in options._rules():
            try:
                if good(getattr(options, name)):
                    continue
            except TypeError:
                pass
            raise ValueError(f"{setting}: {name}: {getattr(options, name)!r} is not {what}")
        return options

    def _rules(self):
        return [
            ("address", "the address of a daemon", lambda address: address is None or isinstance(address, str)),
            ("plane", "auto, local or grpc", ("auto", "local", "grpc").__contains__),
            ("weights_version", "a text", lambda version: isinstance(version, str)),
            ("level", "memory or local", ("memory", "local").__contains__),
            ("deadline", "more than 0 and at most 600 seconds", lambda deadline: 0 < deadline <= 600),
        ]
