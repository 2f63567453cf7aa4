"""Pages on a device. Without one, CPU memory stands in: the same copies, in streams that do nothing."""

import pytest
import torch

import kvstore

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from kvstore.vllm import pages  # noqa: E402

BLOCKS, BYTES = 50, 24 * 1024


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device(request.param)


@pytest.fixture(params=["local", "grpc"])
def group(request, daemon):
    kind = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=3 * BYTES // 16, order="opaque")
    client = kvstore.Client(daemon.address, plane=request.param)
    return client.register_layout("staged", dtype="uint8", block_tokens=16, groups=[kind]).group()


class Memory:
    """Three regions in two buffers, two of them interleaved."""

    def __init__(self, device, staging, odd=0):
        self.first = torch.randint(0, 255, (BLOCKS * 2 * BYTES + odd,), dtype=torch.uint8, device=device)
        self.second = torch.randint(0, 255, (BLOCKS * BYTES,), dtype=torch.uint8, device=device)
        self.regions = [
            (self.first, odd, 2 * BYTES, BYTES),
            (self.first, odd + BYTES, 2 * BYTES, BYTES),
            (self.second, 0, BYTES, BYTES),
        ]
        self.pages = pages.StagedPages(self.regions, BLOCKS, staging)

    def block(self, number):
        parts = [buffer[at + number * stride : at + number * stride + size] for buffer, at, stride, size in self.regions]
        return torch.cat(parts).cpu()


def names(count, first=0):
    return [b"staged %d" % at for at in range(first, first + count)]


# A region that does not begin at a multiple of eight bytes; staging memory of a few blocks, so that it takes turns.
@pytest.mark.parametrize("odd", [0, 5])
@pytest.mark.parametrize("slots", [1, 7, 100])
def test_blocks_come_back(device, group, monkeypatch, odd, slots):
    monkeypatch.setattr(pages, "STAGE_BYTES", slots * 3 * BYTES)
    staging = pages.Staging(device, 3 * BYTES)
    try:
        here, there = Memory(device, staging, odd), Memory(device, staging, odd)
        numbers, places = list(range(3, 33)), list(range(49, 19, -1))
        wanted = [here.block(number) for number in numbers]
        kept = [there.block(number) for number in range(20)]
        mark = here.pages.mark()
        stored = here.pages.save(group, names(30), numbers, mark, parent=None, level="memory", more_follows=False)
        assert [result.status for result in stored] == ["stored"] * 30
        load = there.pages.load(group, names(40), [*places, *range(10)], there.pages.mark())
        assert load.wait_region(0, 30.0) and load.result(30.0) == 30 and load.done()
        assert all(torch.equal(there.block(place), block) for place, block in zip(places, wanted))
        assert all(torch.equal(there.block(number), block) for number, block in enumerate(kept))
        whole = there.pages.load(group, names(30), numbers, there.pages.mark())
        assert whole.wait_region(2, 30.0)
        assert whole.result(30.0) == 30 and torch.equal(there.block(32), wanted[-1])
    finally:
        staging.close()


def test_several_loads_share_the_staging_memory(device, group, monkeypatch):
    monkeypatch.setattr(pages, "STAGE_BYTES", 4 * 3 * BYTES)
    staging = pages.Staging(device, 3 * BYTES)
    try:
        here = Memory(device, staging)
        here.pages.save(group, names(50), list(range(50)), here.pages.mark())
        others = [Memory(device, staging) for _ in range(8)]
        loads = [other.pages.load(group, names(50), list(range(50)), other.pages.mark()) for other in others]
        assert [load.result(60.0) for load in loads] == [50] * 8
        for other in others:
            assert torch.equal(other.first, here.first) and torch.equal(other.second, here.second)
    finally:
        staging.close()


def test_a_load_that_fails_says_so(device, group, daemon):
    staging = pages.Staging(device, 3 * BYTES)
    try:
        memory = Memory(device, staging)
        before = memory.first.clone()
        daemon.kill()
        load = memory.pages.load(group, names(3), [1, 2, 3], memory.pages.mark())
        assert load.wait_region(2, 60.0)
        with pytest.raises(kvstore.Error):
            load.result(60.0)
        with pytest.raises(kvstore.Error):
            memory.pages.save(group, names(3), [1, 2, 3], memory.pages.mark())
        assert torch.equal(memory.first, before)
    finally:
        staging.close()
