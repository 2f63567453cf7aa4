import asyncio
import functools
import gc
import hashlib
import os
import threading

import numpy
import pytest
from conftest import register

import kvstore

from daemon import Daemon, until


def hashes(ids):
    return [hashlib.sha256(str(at).encode()).digest() for at in ids]


def block(at, size):
    return numpy.random.default_rng(at).integers(0, 256, size, dtype=numpy.uint8).tobytes()


def blocks(ids, size):
    return [block(at, size) for at in ids]


def test_blocks_come_back_as_they_went_in(group):
    size = group.block_bytes
    stored = group.put_from(hashes(range(8)), blocks(range(8), size))
    assert stored == [kvstore.PutResult("stored", "memory")] * 8
    assert group.put_from(hashes(range(8)), blocks(range(8), size))[0].status == "present"
    assert group.lookup(hashes(range(12))) == 8
    into = [bytearray(size) for _ in range(12)]
    assert group.get_into(hashes(range(12)), into) == 8
    assert [bytes(buffer) for buffer in into[:8]] == blocks(range(8), size)
    assert not any(into[8])
    assert group.get(hashes(range(12))) == blocks(range(8), size)


def test_holes_are_told(group):
    """A look-up says how far a prefix goes; what is behind a hole is told one by one."""
    size = group.block_bytes
    there = [0, 1, 4, 6]
    for at in there:
        group.put_from(hashes([at]), blocks([at], size))
    assert group.lookup(hashes(range(8))) == 2
    assert group.contains(hashes(range(8))) == [at in there for at in range(8)]
    assert group.contains(hashes(there)) == [True] * 4
    assert group.contains([]) == []
    assert asyncio.run(group.contains_async(hashes([1, 2]))) == [True, False]
    with pytest.raises(kvstore.Invalid, match="hash"):
        group.contains([b"x" * 33])


def test_blocks_of_kinds_that_vary_have_their_own_length(daemon):
    kind = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=5000, kind="encoder_output")
    contents = [bytes([at]) * (at * 1000 + 1) for at in range(5)]
    for plane in ("local", "grpc"):
        client = kvstore.Client(daemon.address, plane=plane)
        group = client.register_layout("varied", dtype="uint8", block_tokens=1, groups=[kind]).group()
        group.put_from(hashes(range(5)), contents)
        assert group.get(hashes(range(7))) == contents
        assert group.get(hashes([6])) == []
        with pytest.raises(kvstore.Invalid, match="5001"):
            group.put_from(hashes([9]), [bytes(5001)])


def test_every_kind_of_buffer(group):
    size = group.block_bytes
    names, expected = hashes(range(4)), blocks(range(4), size)
    whole = b"".join(expected)
    array = numpy.frombuffer(whole, dtype=numpy.uint8).reshape(4, size)
    for at, buffers in enumerate([expected, tuple(expected), whole, memoryview(whole), bytearray(whole), array, list(array)]):
        group.delete(names)
        assert [result.status for result in group.put_from(names, buffers)] == ["stored"] * 4, at
        out = numpy.zeros((4, size), dtype=numpy.uint8)
        assert group.get_into(names, out) == 4
        assert out.tobytes() == whole
        wide = numpy.zeros((4, size // 4), dtype=numpy.float32)
        assert group.get_into(names, list(wide)) == 4
        assert wide.tobytes() == whole


def test_tensors_of_torch(group):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    size = group.block_bytes
    tensors = [torch.randn(size // 2).to(torch.bfloat16) for _ in range(3)]
    group.put_from(hashes(range(3)), tensors)
    into = torch.zeros(3, size // 2, dtype=torch.bfloat16)
    assert group.get_into(hashes(range(3)), into) == 3
    assert torch.equal(into, torch.stack(tensors))
    with pytest.raises(kvstore.Invalid, match="contiguous"):
        group.get_into(hashes(range(1)), [torch.zeros(10, 10).t()])


def test_mistakes_are_named(group):
    names, size = hashes(range(2)), group.block_bytes
    group.put_from(names, blocks(range(2), size))
    with pytest.raises(TypeError, match="writable"):
        group.get_into(names, [bytes(size), bytes(size)])
    with pytest.raises(ValueError, match="1 buffers were given for 2 hashes"):
        group.get_into(names, [bytearray(size)])
    with pytest.raises(kvstore.Invalid, match=str(size)):
        group.get_into(names, [bytearray(10), bytearray(10)])
    with pytest.raises(ValueError, match=str(size)):
        group.put_from(hashes([9]), [bytes(7)])
    with pytest.raises(TypeError, match="a hash must be bytes, not str"):
        group.lookup(["text"])
    with pytest.raises(TypeError, match="a sequence of hashes"):
        group.lookup(b"one")
    with pytest.raises(kvstore.Invalid, match="33"):
        group.lookup([bytes(33)])
    with pytest.raises(ValueError, match="level"):
        group.put_from(names, blocks(range(2), size), level="forever")
    with pytest.raises(kvstore.Unsupported, match="object store"):
        group.put_from(hashes([9]), blocks([9], size), level="durable")
    with pytest.raises(TypeError, match="contiguous"):
        group.get_into(names, list(numpy.zeros((size, 4), dtype=numpy.uint8).T[:2]))
    assert issubclass(kvstore.Unavailable, ConnectionError) and issubclass(kvstore.DeadlineExceeded, TimeoutError)
    with pytest.raises(kvstore.Unavailable, match="kvstore serve"):
        kvstore.Client("unix:/nowhere/at/all.sock")
    with pytest.raises(kvstore.Invalid, match="not an address"):
        kvstore.Client("nowhere")
    assert group.lookup(names) == 2


def test_leases_are_views_that_keep_their_block(daemon):
    group = register(kvstore.Client(daemon.address, plane="local"), 1 << 20)
    size = group.block_bytes
    group.put_from(hashes(range(4)), blocks(range(4), size))
    leases = group.leases(hashes(range(6)))
    assert len(leases) == 4
    view = leases[3]
    assert view.readonly and view.nbytes == size and isinstance(view, memoryview)
    assert leases[-1] == view and bytes(leases[0]) == block(0, size)
    with pytest.raises(IndexError):
        leases[4]
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises(BufferError, match="views"):
        leases.release()
    del leases
    gc.collect()
    for turn in range(1, 5):
        ids = range(turn * 1000, turn * 1000 + 60)
        group.put_from(hashes(ids), blocks(ids, size))
    assert bytes(view) == block(3, size), "a view keeps its block while the memory turns over"
    array = numpy.frombuffer(view, dtype=numpy.float32)
    del view
    gc.collect()
    assert array.tobytes() == block(3, size), "an array of a view keeps it, too"
    del array
    with group.leases(hashes([4000])) as views:
        assert [view.nbytes for view in views] == [size]
        del views
    grpc = register(kvstore.Client(daemon.address, plane="grpc"), 1 << 20)
    with pytest.raises(kvstore.Unsupported, match="local plane"):
        grpc.leases(hashes([0]))


def test_pins_prefetches_and_deletes(group):
    names, size = hashes(range(5)), group.block_bytes
    group.put_from(names, blocks(range(5), size))
    with group.pin(names, ttl=60) as pin:
        assert pin.blocks == 5
        assert group.delete(names) == kvstore.Deleted(0, 5)
    ended = group.prefetch(names).wait()
    assert ended == kvstore.PrefetchProgress("done", 5, 5, 0)
    group.hint(names)
    assert group.delete(names) == kvstore.Deleted(5, 0)
    assert group.lookup(names) == 0


def test_blocks_on_disk(disk_daemon):
    group = register(kvstore.Client(disk_daemon.address), 256 * 1024)
    ids, size = range(150), group.block_bytes
    stored = group.put_from(hashes(ids), blocks(ids, size), level="local")
    assert {result.level for result in stored} == {"local"}
    out = numpy.zeros((len(ids), size), dtype=numpy.uint8)
    assert group.get_into(hashes(ids), out) == len(ids)
    assert all(out[at].tobytes() == block(at, size) for at in ids)
    disk_daemon.kill()
    disk_daemon.start()
    assert reconnected(group, ids) == len(ids), "what was local is found again by the same client"
    with group.leases(hashes(range(20))) as views:
        assert len(views) == 20 and bytes(views[19]) == block(19, size)


def reconnected(group, ids) -> int:
    """What the first look-up finds that reaches the daemon again."""
    found = []
    until("the client finds the daemon again", lambda: found.append(group.lookup(hashes(ids))) or True)
    return found[0]


def test_the_daemon_goes_and_comes_back(daemon):
    client = kvstore.Client(daemon.address)
    group = register(client, 64 * 1024)
    group.put_from(hashes(range(2)), blocks(range(2), group.block_bytes))
    view = group.leases(hashes(range(2)))[1]
    daemon.kill()
    with pytest.raises(kvstore.Unavailable):
        group.put_from(hashes([5]), blocks([5], group.block_bytes))
    assert bytes(view) == block(1, group.block_bytes), "what is leased outlives the daemon"
    daemon.start()
    assert reconnected(group, range(2)) == 0, "what is lost is a miss"
    group.put_from(hashes(range(2)), blocks(range(2), group.block_bytes))
    assert group.get(hashes(range(2))) == blocks(range(2), group.block_bytes)


def test_async_calls(group):
    size = group.block_bytes

    async def run():
        ids = [range(turn * 10, turn * 10 + 4) for turn in range(8)]
        await asyncio.gather(*(group.put_from_async(hashes(turn), blocks(turn, size)) for turn in ids))
        out = [numpy.zeros((4, size), dtype=numpy.uint8) for _ in ids]
        found = await asyncio.gather(*(group.get_into_async(hashes(turn), buffer) for turn, buffer in zip(ids, out)))
        assert found == [4] * 8
        for turn, buffer in zip(ids, out):
            assert buffer.tobytes() == b"".join(blocks(turn, size))
        assert await group.lookup_async(hashes(range(6))) == 4
        pin = await group.pin_async(hashes(range(4)), ttl=60)
        assert pin.blocks == 4 and await pin.unpin_async()
        assert (await (await group.prefetch_async(hashes(range(4)))).wait_async()).ready == 4
        with pytest.raises(kvstore.Invalid):
            await group.lookup_async([bytes(33)])
        # Where this thread stands still until all is stored, the second is cancelled before anybody can hear of its end.
        for seconds in (0.001, 0.0):
            waiting = asyncio.ensure_future(group.put_from_async(hashes(range(100, 300)), blocks(range(100, 300), size)))
            await asyncio.sleep(seconds)
            if waiting.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                break
        else:
            raise AssertionError("a call cannot be cancelled")
        assert (await group.delete_async(hashes(range(4)))).deleted == 4

    asyncio.run(run())


def test_threads_share_a_client_and_the_gil_is_free_meanwhile(group):
    size, wrong = group.block_bytes, []

    def work(thread):
        for turn in range(10):
            ids = range(thread * 1000 + turn * 4, thread * 1000 + turn * 4 + 4)
            group.put_from(hashes(ids), blocks(ids, size))
            if group.get(hashes(ids)) != blocks(ids, size):
                wrong.append(ids)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_of_a_fork_attaches_anew(daemon):
    client = kvstore.Client(daemon.address)
    group = register(client, 64 * 1024)
    group.put_from(hashes(range(3)), blocks(range(3), group.block_bytes))
    leases = group.leases(hashes(range(3)))
    child = os.fork()
    if child == 0:
        try:
            ok = group.get(hashes(range(3))) == blocks(range(3), group.block_bytes)
            ok &= group.put_from(hashes([7]), blocks([7], group.block_bytes))[0].status == "stored"
            ok &= len(group.leases(hashes([7]))) == 1
            os._exit(0 if ok else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0, "the child read something else"
    assert bytes(leases[2]) == block(2, group.block_bytes), "the parent's leases are as they were"
    del leases
    assert group.get(hashes([7])) == [block(7, group.block_bytes)], "what the child put is there"


def searched(layout: kvstore.Layout, names) -> kvstore.Lookup | None:
    """What the bucket has, once that is known."""
    found = layout.lookup(names, search_wait=5)
    return None if found.searching else found


def test_durable_blocks_are_found_by_another_daemon(tmp_path):
    """Two daemons that share nothing but a bucket. A look-up says that it is searched, or waits for it."""
    bucket = ("nvme.paths=off", f"object.url=file://{tmp_path}/bucket")
    names = hashes(range(6))
    for node in ("a", "b"):
        (tmp_path / node).mkdir()
        daemon = Daemon(tmp_path / node, *bucket)
        try:
            client = kvstore.Client(daemon.address)
            kind = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=4096)
            layout = client.register_layout("durable", dtype="uint8", block_tokens=16, groups=[kind])
            group, size = layout.group(), layout.group().block_bytes
            if node == "a":
                # Unavailable while the store is being probed.
                put = functools.partial(group.put_from, names, blocks(range(6), size), level="durable")
                assert until("the store answers", put)[0].level == "durable"
            else:
                first = layout.lookup(names)
                assert first.blocks == 6 or first.searching
                found = until("the bucket has been searched", functools.partial(searched, layout, names))
                assert (found.blocks, found.in_memory, found.searching) == (6, 0, False)
                assert group.get(names) == blocks(range(6), size)
                assert layout.lookup(names).in_memory == 6
        finally:
            daemon.kill()


def uploaded_bytes(bucket) -> int:
    """Bytes of all objects of at least a block. What is being written has a name with "#" in it, beside the object's own name for a
    moment, and goes while it is looked at."""
    sizes = []
    for path in bucket.rglob("*"):
        if "#" in path.name:
            continue
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except FileNotFoundError:
            continue
    return sum(size for size in sizes if size > 65536)


def test_a_session_is_uploaded_where_it_says_so(tmp_path):
    """Nothing of others goes to the bucket; without one, whoever asks is told so."""
    daemon = Daemon(tmp_path, "nvme.paths=off", f"object.url=file://{tmp_path}/bucket")
    try:
        client = kvstore.Client(daemon.address)
        kind = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=4096)
        group = client.register_layout("session", dtype="uint8", block_tokens=16, groups=[kind]).group()
        group.put_from(hashes(range(6)), blocks(range(6), group.block_bytes))
        stored = group.put_from(hashes(range(10, 13)), blocks(range(10, 13), group.block_bytes), upload=True)
        assert [result.level for result in stored] == ["memory"] * 3
        until("the session is in the bucket", lambda: uploaded_bytes(tmp_path / "bucket") > 3 * 65536)
        # Whatever else waited to be uploaded is there by then.
        daemon.stop()
        assert uploaded_bytes(tmp_path / "bucket") < 4 * 65536
    finally:
        daemon.kill()
    (tmp_path / "without").mkdir()
    daemon = Daemon(tmp_path / "without", "nvme.paths=off")
    try:
        client = kvstore.Client(daemon.address)
        group = client.register_layout("session", dtype="uint8", block_tokens=16, groups=[kind]).group()
        with pytest.raises(kvstore.Unsupported, match="object.url"):
            group.put_from(hashes([1]), blocks([1], group.block_bytes), upload=True)
    finally:
        daemon.kill()
