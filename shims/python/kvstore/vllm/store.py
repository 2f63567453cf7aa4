"""The daemon, as both sides of the connector see it: there, or away for a while. An engine never waits for it to come back."""

from __future__ import annotations

import logging
import threading
import time

import kvstore

from .messages import RankLayout

__all__ = ["Store"]

logger = logging.getLogger("vllm.kvstore")

# A daemon that was away, or did not answer in time, is left alone so long.
AWAY_SECONDS = 1.0


class Store:
    """A connection, and the layouts that are registered over it. Threads may share it."""

    def __init__(self, address: str | None, plane: str, deadline: float):
        self._address, self._plane, self._deadline = address, plane, deadline
        self._lock = threading.Lock()
        self._client: kvstore.Client | None = None
        self._layouts: dict[tuple[RankLayout, bytes], kvstore.Layout] = {}
        self._away_until = 0.0
        self._said = False

    def layout(self, layout: RankLayout, version: bytes) -> kvstore.Layout | None:
        """The registered layout; None while the daemon is away."""
        if time.monotonic() < self._away_until:
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

    def release(self, ticket: bytes) -> None:
        """Lets go of what a look-up holds. It ends by itself, too."""
        if self._client is not None and time.monotonic() >= self._away_until:
            try:
                self._client.release_ticket(ticket)
            except kvstore.Error as error:
                self.failed(error)

    def failed(self, error: kvstore.Error) -> None:
        """A call failed: where that means that the daemon is away, it is left alone for a while. Said once."""
        if isinstance(error, (kvstore.Unavailable, kvstore.DeadlineExceeded)):
            self._away_until = time.monotonic() + AWAY_SECONDS
        if not self._said and not isinstance(error, kvstore.Busy):
            self._said = True
            logger.warning("kvstore: %s; prompts are recomputed until it answers", error)
