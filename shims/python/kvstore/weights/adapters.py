"""Names the adapters that an engine's requests use by their content, and notices when one is rewritten in place.

It owns what it saw of each adapter, and reads its files only when their times change. It never waits for a download.
"""

from __future__ import annotations

import collections
import logging
import os
import pathlib
import time
from dataclasses import dataclass

from . import ERRORS, folder_of, kept, read_adapter

__all__ = ["Adapters"]

# Adapters that are remembered: more than an engine keeps loaded.
_KNOWN_MAX = 4096
_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
# An adapter that is not on this machine, or not whole, is looked for again after this time.
_RETRY_SECONDS = 5.0


@dataclass
class _Known:
    folder: pathlib.Path | None = None
    # What the files' status said when they were read, and whether it will tell of every later write.
    seen: tuple = ()
    is_settled: bool = False
    # A digest of the content. None: nothing says what the engine computes with.
    content: bytes | None = None
    # When it is looked for again, if it could not be read.
    retry: float = 0.0


class Adapters:
    """See the head of this file."""

    def __init__(self, logger: logging.Logger):
        self._logger = logger
        self._known: collections.OrderedDict[str, _Known] = collections.OrderedDict()

    def name(self, path: str) -> bytes | None:
        """Returns 32 bytes that name an adapter's content, wherever it lies.

        Returns None if nothing names what the engine computes with: the adapter cannot be read, or its files were rewritten since
        the engine used them. In the latter case the engine can have the old files' weights or the new ones', and its own cache can
        mix both, until :meth:`reset`.
        """
        known = self._known.setdefault(path, _Known())
        self._known.move_to_end(path)
        while len(self._known) > _KNOWN_MAX:
            self._known.popitem(last=False)
        if known.content is None:
            if known.seen or time.monotonic() < known.retry:
                return None
            known.folder = folder_of(os.path.expanduser(path))
        seen, is_settled = _look(known.folder)
        # Files that are gone change nothing, as the engine cannot load them.
        if known.content is not None and (not seen or (seen == known.seen and (known.is_settled or not is_settled))):
            return known.content
        content = self._read(path, known)
        if known.content is None:
            if content is None:
                known.retry = time.monotonic() + _RETRY_SECONDS
                return None
        elif content != known.content:
            self._logger.warning(
                "kvstore: the adapter in %s was rewritten after the engine used it. Its blocks are not stored or read any more. Load "
                "changed adapters from a new path.",
                path,
            )
            content = None
        known.seen, known.is_settled, known.content = seen, is_settled, content
        return content

    def reset(self) -> None:
        """The engine has loaded its weights anew, and has emptied its own cache."""
        self._known.clear()

    def _read(self, path: str, known: _Known) -> bytes | None:
        try:
            if known.folder is None:
                raise FileNotFoundError("it is not on this machine")
            found = read_adapter(known.folder)
        except ERRORS as error:
            self._logger.warning("kvstore: the blocks of the adapter %s are neither stored nor read: %s", path, error)
            return None
        found.say(path, self._logger)
        return found.digest


def _look(folder: pathlib.Path | None) -> tuple[tuple, bool]:
    """Returns what the status of an adapter's files says, and whether it will tell of every later write."""
    seen, is_settled = [], True
    for name in _FILES if folder is not None else ():
        try:
            status = os.stat(folder / name)
        except OSError:
            continue
        seen.append((name, kept.identity(status)))
        is_settled = is_settled and kept.is_settled(status)
    return tuple(seen), is_settled
