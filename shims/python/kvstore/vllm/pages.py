"""The engine's cache as pages of blocks, in CPU memory or on a device. Blocks on a device are copied through staging memory.

Both kinds order their copies among the engine's kernels by a mark in the engine's own queue of work. A load begins after the work
that was queued before its mark. A save reads the results of that work.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
from typing import Any

import torch

import kvstore

__all__ = ["DirectPages", "StagedPages", "Staging"]

logger = logging.getLogger("vllm.kvstore")

# Of each staging buffer, on the host and on the device: a copy of this size takes some milliseconds, far more than its start.
STAGE_BYTES = 32 << 20
# Loads have two, so that one comes from the store while the other goes to the device; saves have one.
LOAD_BUFFERS, SAVE_BUFFERS = 2, 1


class DirectPages:
    """Pages in CPU memory. The store copies directly from them and to them."""

    def __init__(self, regions: list[tuple[torch.Tensor, int, int, int]], blocks: int):
        self._pages = kvstore.Pages(regions, blocks)
        self.block_bytes = self._pages.block_bytes

    def mark(self) -> Any:
        return None

    def load(self, group: kvstore.Group, hashes: list[bytes], numbers: list[int], mark: Any) -> kvstore.PagesLoad:
        """Starts to load blocks into these pages."""
        return group.start_get_pages(hashes, self._pages, numbers)

    def save(self, group: kvstore.Group, hashes: list[bytes], numbers: list[int], mark: Any, **more) -> list[kvstore.PutResult]:
        """Stores blocks from these pages; see :meth:`kvstore.Group.put_pages`."""
        return group.put_pages(hashes, self._pages, numbers, **more)


class _Buffer:
    """Staging memory on the host and on the device, and the stream that copies between the two."""

    def __init__(self, device: torch.device, size: int):
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self.device = torch.empty(size, dtype=torch.uint8, device=device)
        self.stream = torch.get_device_module(device).Stream()
        self._pages: dict[int, kvstore.Pages] = {}

    def finish(self) -> None:
        """Waits for the copies in the buffer's stream. After that, its memory can be used again."""
        if self.device.device.type != "cpu":
            self.stream.synchronize()

    def pages(self, block_bytes: int) -> kvstore.Pages:
        """Returns the buffer's host memory as blocks of this size, one after another."""
        if block_bytes not in self._pages:
            slots = self.host.numel() // block_bytes
            self._pages[block_bytes] = kvstore.Pages([(self.host, 0, block_bytes, block_bytes)], slots)
        return self._pages[block_bytes]


class Staging:
    """The staging memory of a worker, for blocks of up to ``block_bytes``."""

    def __init__(self, device: torch.device, block_bytes: int):
        self.device, self.module = device, torch.get_device_module(device)
        size = max(STAGE_BYTES, block_bytes)
        self._loads: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        self._saves: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for buffers, count in ((self._loads, LOAD_BUFFERS), (self._saves, SAVE_BUFFERS)):
            for _ in range(count):
                buffers.put(_Buffer(device, size))
        self.threads = concurrent.futures.ThreadPoolExecutor(LOAD_BUFFERS, thread_name_prefix="kvstore-load")

    def buffer(self, saves: bool) -> _Lent:
        """Lends a buffer for a ``with`` block, and waits until one is free. The buffer's stream is current in the block."""
        return _Lent(self, self._saves if saves else self._loads)

    def close(self) -> None:
        self.threads.shutdown(wait=True)


class _Lent:
    def __init__(self, staging: Staging, buffers: queue.SimpleQueue[_Buffer]):
        self._staging, self._buffers = staging, buffers

    def __enter__(self) -> _Buffer:
        self._buffer = self._buffers.get()
        if self._staging.device.index is not None:
            self._staging.module.set_device(self._staging.device)
        self._context = self._staging.module.stream(self._buffer.stream)
        self._context.__enter__()
        return self._buffer

    def __exit__(self, *exception) -> None:
        self._context.__exit__(*exception)
        self._buffers.put(self._buffer)


class StagedPages:
    """Pages on a device. Blocks are gathered on the device and copied to the host as a whole, and the reverse for loads."""

    def __init__(self, regions: list[tuple[torch.Tensor, int, int, int]], blocks: int, staging: Staging):
        self._staging = staging
        self.block_bytes = sum(size for *_, size in regions)
        # Rows of eight bytes move faster than rows of one.
        unit = 8 if all(part % 8 == 0 for _, *parts in regions for part in parts) else 1
        self._dtype = torch.int64 if unit == 8 else torch.uint8
        self._rows, at = [], 0
        for storage, offset, stride, size in regions:
            whole = storage[: storage.numel() // unit * unit].view(self._dtype)
            rows = whole.as_strided((blocks, size // unit), (stride // unit, 1), offset // unit)
            self._rows.append((rows, at // unit, (at + size) // unit))
            at += size

    def mark(self) -> Any:
        """Returns a mark after the work that the engine has queued so far."""
        event = self._staging.module.Event()
        event.record(self._staging.module.current_stream())
        return event

    def _chunks(self, count: int, buffer: _Buffer):
        each = max(buffer.host.numel() // self.block_bytes, 1)
        return ((first, min(first + each, count)) for first in range(0, count, each))

    def _staged(self, buffer: torch.Tensor, blocks: int) -> torch.Tensor:
        """Returns the first blocks of a staging buffer, one row each."""
        return buffer[: blocks * self.block_bytes].view(self._dtype).view(blocks, -1)

    def load(self, group: kvstore.Group, hashes: list[bytes], numbers: list[int], mark: Any) -> StagedLoad:
        """Starts to load blocks into these pages."""
        load = StagedLoad(self._staging, len(self._rows))
        self._staging.threads.submit(self._run_load, load, group, hashes, numbers, mark)
        return load

    def _run_load(self, load: StagedLoad, group: kvstore.Group, hashes: list[bytes], numbers: list[int], mark: Any) -> None:
        loaded, error = 0, None
        try:
            with self._staging.buffer(saves=False) as buffer:
                buffer.stream.wait_event(mark)
                for first, last in self._chunks(len(hashes), buffer):
                    native = group.start_get_pages(hashes[first:last], buffer.pages(self.block_bytes), list(range(last - first)))
                    got = _result(native)
                    if got:
                        staged = self._staged(buffer.device, got)
                        staged.copy_(self._staged(buffer.host, got), non_blocking=True)
                        places = torch.tensor(numbers[first : first + got]).to(self._staging.device, non_blocking=True)
                        for region, (rows, begin, end) in enumerate(self._rows):
                            rows.index_copy_(0, places, staged[:, begin:end])
                            if last == len(hashes):
                                load.region(region, buffer.stream)
                        buffer.finish()
                    loaded += got
                    if got < last - first:
                        break
        except kvstore.Error as raised:
            error = raised
        except Exception as raised:  # Whatever it was, who waits is told; the blocks are recomputed.
            logger.exception("kvstore: a load to the device failed")
            error = kvstore.Error(str(raised))
        load.end(loaded, error)

    def save(self, group: kvstore.Group, hashes: list[bytes], numbers: list[int], mark: Any, **more) -> list[kvstore.PutResult]:
        """Stores blocks from these pages; see :meth:`kvstore.Group.put_pages`."""
        results, parent, follows = [], more.pop("parent", None), more.pop("more_follows", False)
        with self._staging.buffer(saves=True) as buffer:
            buffer.stream.wait_event(mark)
            for first, last in self._chunks(len(hashes), buffer):
                count = last - first
                staged = self._staged(buffer.device, count)
                places = torch.tensor(numbers[first:last]).to(self._staging.device, non_blocking=True)
                for rows, begin, end in self._rows:
                    staged[:, begin:end].copy_(rows.index_select(0, places))
                self._staged(buffer.host, count).copy_(staged, non_blocking=True)
                buffer.finish()
                results += group.put_pages(
                    hashes[first:last],
                    buffer.pages(self.block_bytes),
                    list(range(count)),
                    parent=hashes[first - 1] if first else parent,
                    more_follows=follows or last < len(hashes),
                    **more,
                )
        return results


def _result(native: kvstore.PagesLoad) -> int:
    """Waits until a load has ended, because it writes into the staging memory until then. The client's deadlines end it."""
    while True:
        try:
            return native.result(60.0)
        except kvstore.DeadlineExceeded:
            if native.done():
                raise


class StagedLoad:
    """A load to the device that runs in the background. It has the methods of :class:`kvstore.PagesLoad`."""

    def __init__(self, staging: Staging, regions: int):
        self._staging = staging
        self._changed = threading.Condition()
        self._regions: list[Any] = [None] * regions
        self._outcome: tuple[int, kvstore.Error | None] | None = None

    def region(self, number: int, stream) -> None:
        """Notes that the last copies of a region are in the stream."""
        event = self._staging.module.Event()
        event.record(stream)
        with self._changed:
            self._regions[number] = event
            self._changed.notify_all()

    def end(self, loaded: int, error: kvstore.Error | None) -> None:
        with self._changed:
            self._outcome = (loaded, error)
            self._changed.notify_all()

    def wait_region(self, region: int, timeout: float) -> bool:
        """Makes the engine's stream wait for a region, once its copies are under way or the load has ended."""
        region = min(region, len(self._regions) - 1)
        with self._changed:
            if not self._changed.wait_for(lambda: self._outcome is not None or self._regions[region] is not None, timeout):
                return False
            event = self._regions[region]
        if event is not None:
            self._staging.module.current_stream().wait_event(event)
        return True

    def done(self) -> bool:
        return self._outcome is not None

    def result(self, timeout: float) -> int:
        """Waits until the load has ended, and returns how many leading blocks were loaded. Raises the error that made it fail."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._outcome is not None, timeout):
                raise kvstore.DeadlineExceeded("the load has not ended yet")
            loaded, error = self._outcome
        if error is not None:
            raise error
        return loaded
