"""The hashes that name a request's blocks.

They are vLLM's own, except for requests with an adapter. vLLM's hash holds the adapter's name and the path that it was loaded from:
nodes that keep it elsewhere would share nothing. So those requests are hashed again by vLLM's own function, with the adapter's
content in the place of its name and path.
"""

from __future__ import annotations

import types

__all__ = ["Hashes"]


class _Renamed:
    """A request as vLLM's hasher sees it, whose adapter is called by its content."""

    def __init__(self, request, adapter: bytes):
        self.request, self.adapter = request, adapter
        self.lora_request = types.SimpleNamespace(lora_name=adapter.hex(), lora_path="")
        self.block_hashes: list[bytes] = []
        # vLLM's hash of the last of these blocks.
        self.last = b""

    def __getattr__(self, name: str):
        return getattr(self.request, name)

    def is_of(self, request, adapter: bytes) -> bool:
        """Returns whether these are hashes of this request's tokens. vLLM may have cut some off and appended others."""
        known = len(self.block_hashes)
        same = self.request is request and self.adapter == adapter and known <= len(request.block_hashes)
        return same and (not known or request.block_hashes[known - 1] == self.last)


class Hashes:
    """See the head of this file."""

    def __init__(self, cache_config, hash_tokens: int):
        self._cache_config, self._hash_tokens = cache_config, hash_tokens
        self._hasher = None
        self._renamed: dict[str, _Renamed] = {}

    def of(self, request, adapter: bytes):
        """Returns the hashes of a request's blocks. ``adapter``: its adapter's content; empty without one."""
        if not adapter:
            return request.block_hashes
        renamed = self._renamed.get(request.request_id)
        if renamed is None or not renamed.is_of(request, adapter):
            renamed = self._renamed[request.request_id] = _Renamed(request, adapter)
        if len(renamed.block_hashes) < len(request.block_hashes):
            renamed.block_hashes += self._hash(renamed)
            known = min(len(renamed.block_hashes), len(request.block_hashes))
            del renamed.block_hashes[known:]
            renamed.last = request.block_hashes[known - 1]
        return renamed.block_hashes

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._renamed.pop(request_id, None)

    def _hash(self, renamed: _Renamed) -> list[bytes]:
        if self._hasher is None:
            from vllm.utils.hashing import get_hash_fn_by_name
            from vllm.v1.core.kv_cache_utils import get_request_block_hasher

            self._hasher = get_request_block_hasher(
                self._hash_tokens, get_hash_fn_by_name(self._cache_config.prefix_caching_hash_algo)
            )
        return self._hasher(renamed)
