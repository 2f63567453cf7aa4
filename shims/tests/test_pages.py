"""Blocks put from, and got into, pages of an engine's own memory."""

import mmap

import pytest

import kvstore

REGIONS, BLOCKS, PAGE = 3, 40, 24 * 1024


class Memory:
    """Three regions in two buffers: the first two interleaved, block by block; the third behind a gap."""

    def __init__(self, fill: int = 0):
        self.first = bytearray([fill]) * (BLOCKS * 2 * PAGE)
        self.second = mmap.mmap(-1, 4096 + BLOCKS * (PAGE + 512))
        self.second.write(bytes([fill]) * len(self.second))
        regions = [
            (self.first, 0, 2 * PAGE, PAGE),
            (self.first, PAGE, 2 * PAGE, PAGE),
            (self.second, 4096, PAGE + 512, PAGE),
        ]
        self.pages = kvstore.Pages(regions, BLOCKS)

    def page(self, region: int, number: int) -> bytes:
        if region < 2:
            at = (2 * number + region) * PAGE
            return bytes(self.first[at : at + PAGE])
        at = 4096 + number * (PAGE + 512)
        return self.second[at : at + PAGE]

    def set_page(self, region: int, number: int, content: bytes) -> None:
        if region < 2:
            at = (2 * number + region) * PAGE
            self.first[at : at + PAGE] = content
        else:
            at = 4096 + number * (PAGE + 512)
            self.second[at : at + PAGE] = content


def content(region: int, block: int) -> bytes:
    return bytes([(7 * region + block) % 251, region, block]) * (PAGE // 3)


def names(blocks) -> list[bytes]:
    return [b"page %d" % block for block in blocks]


@pytest.fixture(params=["local", "grpc"])
def group(request, daemon):
    layers = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=REGIONS * PAGE // 16, order="opaque")
    client = kvstore.Client(daemon.address, plane=request.param)
    return client.register_layout("pages", dtype="uint8", block_tokens=16, groups=[layers]).group()


def put(group, blocks, numbers) -> Memory:
    memory = Memory()
    for block, number in zip(blocks, numbers):
        for region in range(REGIONS):
            memory.set_page(region, number, content(region, block))
    stored = group.put_pages(names(blocks), memory.pages, numbers)
    assert [result.status for result in stored] == ["stored"] * len(blocks)
    return memory


def check(memory: Memory, blocks, numbers, others: int) -> None:
    for block, number in zip(blocks, numbers):
        for region in range(REGIONS):
            assert memory.page(region, number) == content(region, block), (block, region)
    for number in set(range(BLOCKS)) - set(numbers):
        for region in range(REGIONS):
            assert memory.page(region, number) == bytes([others]) * PAGE, f"page {number} was touched"


def test_pages_come_back_in_other_places(group):
    blocks = list(range(30))
    put(group, blocks, [(7 * block) % BLOCKS for block in blocks])
    # A block in the store is its pages, in the order of the regions.
    whole = group.get(names([5]))[0]
    assert whole == b"".join(content(region, 5) for region in range(REGIONS))
    memory, numbers = Memory(fill=9), [(11 * block + 3) % BLOCKS for block in blocks]
    assert group.get_pages(names(blocks), memory.pages, numbers) == 30
    check(memory, blocks, numbers, others=9)


def test_a_miss_leaves_the_rest_alone(group):
    put(group, [0, 1, 2], [0, 1, 2])
    memory = Memory(fill=9)
    assert group.get_pages(names([0, 1, 99, 2]), memory.pages, [4, 5, 6, 7]) == 2
    check(memory, [0, 1], [4, 5], others=9)


def test_regions_arrive_in_order_in_the_background(group):
    # Enough for two threads.
    blocks = list(range(BLOCKS)) * 2
    put(group, blocks[:BLOCKS], blocks[:BLOCKS])
    for _ in range(20):
        memory = Memory()
        load = group.start_get_pages(names(blocks[:BLOCKS]), memory.pages, blocks[:BLOCKS])
        for region in range(REGIONS):
            assert load.wait_region(region, 60.0)
            for block in range(BLOCKS):
                assert memory.page(region, block) == content(region, block)
        assert load.result(60.0) == BLOCKS and load.done()
        assert load.result(60.0) == BLOCKS, "it can be asked again"


def test_a_load_that_fails_says_so_to_everybody_who_waits(group, daemon):
    put(group, [0], [0])
    daemon.kill()
    memory = Memory(fill=9)
    load = group.start_get_pages(names([0]), memory.pages, [0])
    assert load.wait_region(2, 60.0), "who waits is not left waiting"
    # What is in shared memory can be read although the daemon has gone; what must be asked for cannot.
    try:
        assert load.result(60.0) in (0, 1)
    except kvstore.Unavailable:
        check(memory, [], [], others=9)


def test_mistakes_are_named(group):
    memory = Memory()
    buffer = bytearray(100)
    for regions, blocks, word in [
        ([], 1, "at least one"),
        ([(buffer, 0, 10, 10)], 11, "do not fit into 100 bytes"),
        ([(buffer, 1, 10, 10)], 10, "do not fit"),
        ([(buffer, 0, 5, 10)], 2, "5 bytes apart"),
        ([(buffer, 0, 2**63, 10)], 3, "do not fit"),
        ([(buffer, 0, 10, 0)], 1, "0 bytes"),
    ]:
        with pytest.raises(ValueError, match=word):
            kvstore.Pages(regions, blocks)
    with pytest.raises(TypeError, match="writable"):
        kvstore.Pages([(b"read only", 0, 9, 9)], 1)
    with pytest.raises(ValueError, match="block 40 does not exist; there are 40 blocks"):
        group.get_pages(names([0]), memory.pages, [BLOCKS])
    with pytest.raises(ValueError, match="2 numbers were given for 1 hashes"):
        group.put_pages(names([0]), memory.pages, [0, 1])
    with pytest.raises(kvstore.Invalid, match="bytes"):
        group.put_pages(names([0]), kvstore.Pages([(buffer, 0, 100, 100)], 1), [0])
    put(group, [0], [0])
    with pytest.raises(kvstore.Invalid, match="73728 bytes"):
        group.get_pages(names([0]), kvstore.Pages([(buffer, 0, 100, 100)], 1), [0])


def test_a_lookup_says_what_is_in_memory_and_holds_it(group, daemon):
    put(group, [0, 1, 2], [0, 1, 2])
    client = kvstore.Client(daemon.address)
    layers = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=REGIONS * PAGE // 16, order="opaque")
    layout = client.register_layout("pages", dtype="uint8", block_tokens=16, groups=[layers])
    found = layout.lookup(names([0, 1, 2, 3]))
    assert found == (3, 3, None, False)
    held = layout.lookup(names([0, 1, 2, 3]), hold=30.0)
    assert held.blocks == 3 and len(held.ticket) == 16
    assert client.release_ticket(held.ticket) and not client.release_ticket(held.ticket)
    assert layout.lookup(names([9])).blocks == 0
