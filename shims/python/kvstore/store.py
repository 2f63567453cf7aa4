"""The daemon as the shims see it: it answers, or it is away for a while. An engine never waits for it to come back."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import kvstore

__all__ = ["BlockLayout", "Store"]

# A daemon that was away, or did not answer in time, is left alone so long.
AWAY_SECONDS = 1.0


@dataclass(frozen=True)
class BlockLayout:
    """The layout of the blocks that an engine stores: see `kvstore.Client.register_layout`."""

    model: str
    weights: bytes
    dtype: str
    block_tokens: int
    groups: tuple[kvstore.LayerGroup, ...]
    shard: tuple[int, int]
    extra: bytes

    def register(self, client: kvstore.Client, version: bytes) -> kvstore.Layout:
        """Registers the layout with the daemon. ``version`` names the weights if they changed since they were loaded."""
        return client.register_layout(
            self.model,
            dtype=self.dtype,
            block_tokens=self.block_tokens,
            groups=list(self.groups),
            weights_digest=version or self.weights,
            shard=self.shard,
            extra=self.extra,
        )


class Store:
    """A connection, and the layouts that are registered over it. Threads can share it.

    ``logger``: logs once that the daemon is away.
    """

    def __init__(self, address: str | None, plane: str, deadline: float, logger: logging.Logger):
        self._address, self._plane, self._deadline = address, plane, deadline
        self._logger = logger
        self._lock = threading.Lock()
        self._client: kvstore.Client | None = None
        self._layouts: dict[tuple[BlockLayout, bytes], kvstore.Layout] = {}
        self._away_until = 0.0
        self._said = False

    def layout(self, layout: BlockLayout, version: bytes) -> kvstore.Layout | None:
        """Returns the registered layout, or None while the daemon is away."""
        if self.is_away:
            return None
        with self._lock:
            if (known := self._layouts.get((layout, version))) is not None:
                return known
            try:
                if self._client is None:
                    self._client = kvstore.Client(self._address, plane=self._plane, deadline=self._deadline)
                registered = layout.register(self._client, version)
            except kvstore.Error as error:
                self.failed(error)
                return None
            # Only the newest weights are asked for again.
            self._layouts = {key: value for key, value in self._layouts.items() if key[1] == version}
            self._layouts[(layout, version)] = registered
            self._said = False
            return registered

    @property
    def is_away(self) -> bool:
        """Whether the daemon is away: no calls are made to it now."""
        return time.monotonic() < self._away_until

    def release(self, ticket: bytes) -> None:
        """Ends a look-up's ticket early. It also ends by itself."""
        if self._client is not None and not self.is_away:
            try:
                self._client.release_ticket(ticket)
            except kvstore.Error as error:
                self.failed(error)

    def failed(self, error: kvstore.Error) -> None:
        """Handles a failed call. If the daemon is away, no calls are made to it for a while. Logs the failure once."""
        if isinstance(error, (kvstore.Unavailable, kvstore.DeadlineExceeded)):
            self._away_until = time.monotonic() + AWAY_SECONDS
        if not self._said and not isinstance(error, kvstore.Busy):
            self._said = True
            self._logger.warning("kvstore: %s; the engine recomputes prompts until the daemon answers", error)
