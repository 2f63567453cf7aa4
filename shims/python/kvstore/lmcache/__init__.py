"""kvstore under LMCache: an L2 adapter for its server, and a remote connector for its library. See docs/engines.md.

Each class imports its own part of LMCache when it is first used.
"""

from __future__ import annotations

__all__ = ["KvStoreConnector", "KvStoreL2Adapter"]


def __getattr__(name: str):
    if name == "KvStoreL2Adapter":
        from .l2_adapter import KvStoreL2Adapter

        return KvStoreL2Adapter
    if name == "KvStoreConnector":
        from .remote_connector import KvStoreConnector

        return KvStoreConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
