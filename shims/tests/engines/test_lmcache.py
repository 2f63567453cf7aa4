"""LMCache's L2 adapter and remote connector, under LMCache's own storage manager and remote backend."""

import argparse
import asyncio
import json
import select
import threading
import time

import pytest
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.platform.event_notifier import consume_fd
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.remote_backend import RemoteBackend

from kvstore.lmcache import KvStoreL2Adapter

CHUNK = MemoryLayoutDesc([torch.Size([2, 3, 64, 32])], [torch.bfloat16])


# -------------------------------------------------------------------- the server: L2 adapter


def server(daemon, **params):
    """A storage manager as LMCache's server makes it from its command line."""
    adapter = {
        "type": "plugin",
        "module_path": "kvstore.lmcache",
        "class_name": "KvStoreL2Adapter",
        "adapter_params": {"address": daemon.address, "weights_version": "1", **params},
    }
    memory = L1MemoryManagerConfig(size_in_bytes=64 << 20, use_lazy=False, shm_name="")
    return StorageManager(
        StorageManagerConfig(
            L1ManagerConfig(memory_config=memory),
            EvictionConfig(eviction_policy="LRU"),
            parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(adapter)])),
        )
    )


def keys_of(count, first=0, rank=0x01000100, salt="", group=0):
    hashes = [b"chunk %d" % at for at in range(first, first + count)]
    return [ObjectKey(hash_, "tiny", rank, group, salt) for hash_ in hashes]


def content(key):
    generator = torch.Generator().manual_seed(hash(key) % (1 << 31))
    return torch.randn(CHUNK.shapes[0], generator=generator).to(CHUNK.dtypes[0])


def store(manager, keys):
    reserved = manager.reserve_write(keys, CHUNK)
    assert len(reserved) == len(keys)
    for key, memory in reserved.items():
        memory.tensor.copy_(content(key))
    manager.finish_write(keys)


def fetch(manager, keys):
    """What LMCache brings into its memory: how many keys, and whether all their bytes are right."""
    handle = manager.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(keys, keys[0].object_group_id, CHUNK)]))
    assert manager.wait_prefetch_status(handle, 60)
    hits = manager.query_prefetch_status(handle).hit_cells[0].get_indices_list()
    found = [keys[at] for at in hits]
    if found:
        with manager.read_prefetched_results(found) as objects:
            assert len(objects) == len(found)
            for key, memory in zip(found, objects):
                assert torch.equal(memory.tensor, content(key)), key
        manager.finish_read_prefetched(found)
    return hits


def blocks_in(daemon, keys):
    """How many of these chunks another client sees."""
    adapter = KvStoreL2Adapter({"address": daemon.address, "weights_version": "1"})
    found = look_up(adapter, keys, {key.object_group_id: CHUNK for key in keys}).popcount()
    adapter.submit_unlock(keys)
    adapter.close()
    return found


def came_true(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def wait_until(condition):
    assert came_true(condition, 60), "did not become true within 60 s"


def test_chunks_outlive_the_server(daemon):
    keys = keys_of(12)
    first = server(daemon)
    store(first, keys)
    wait_until(lambda: blocks_in(daemon, keys) == 12)
    first.close()
    second = server(daemon)
    try:
        assert fetch(second, keys + keys_of(3, 100)) == list(range(12))
        assert all(status["is_healthy"] for status in statuses(second))
    finally:
        second.close()


def statuses(manager):
    return [adapter.report_status() for _, adapter in manager.l2_adapters()]


def test_ranks_groups_salts_and_weights_do_not_mix(daemon):
    keys = keys_of(4)
    manager = server(daemon)
    try:
        store(manager, keys)
        wait_until(lambda: blocks_in(daemon, keys) == 4)
        for other in (keys_of(4, rank=0x02010201), keys_of(4, group=1), keys_of(4, salt="tenant-b")):
            assert fetch(manager, other) == []
    finally:
        manager.close()
    other_weights = server(daemon, weights_version="2")
    try:
        assert fetch(other_weights, keys) == []
    finally:
        other_weights.close()


def test_a_daemon_that_is_away_is_a_miss(daemon):
    keys = keys_of(4)
    manager = server(daemon)
    try:
        daemon.kill()
        store(manager, keys)
        assert fetch(manager, keys_of(4, 50)) == []
        wait_until(lambda: not all(status["is_healthy"] for status in statuses(manager)))
        daemon.start()
        # It is asked again after a second: what comes before that is not stored.
        for first in range(200, 320, 4):
            more = keys_of(4, first)
            store(manager, more)
            if came_true(lambda more=more: blocks_in(daemon, more) == 4, 2):
                break
        else:
            raise AssertionError("the daemon is not used again")
    finally:
        manager.close()


# -------------------------------------------------------------------- the adapter by itself


@pytest.fixture(params=["local", "grpc"])
def adapter(request, daemon):
    adapter = KvStoreL2Adapter({"address": daemon.address, "weights_version": "1", "plane": request.param})
    yield adapter
    adapter.close()


class Memory:
    """As much of a memory object as an adapter sees."""

    def __init__(self, content: bytes):
        self.content = bytearray(content)

    @property
    def byte_array(self):
        return memoryview(self.content)


def wait_for(fd):
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(60_000), "no event within 60 s"
    consume_fd(fd)


def put(adapter, keys, contents):
    number = adapter.submit_store_task(keys, [Memory(content) for content in contents])
    wait_for(adapter.get_store_event_fd())
    return adapter.pop_completed_store_tasks()[number]


def look_up(adapter, keys, described=None):
    number = adapter.submit_lookup_and_lock_task(keys, described or {})
    wait_for(adapter.get_lookup_and_lock_event_fd())
    found = None

    def is_found():
        nonlocal found
        found = adapter.query_lookup_and_lock_result(number)
        return found is not None

    wait_until(is_found)
    assert adapter.query_lookup_and_lock_result(number) is None, "an outcome is told once"
    return found


def load(adapter, keys, lengths):
    memories = [Memory(bytes(length)) for length in lengths]
    number = adapter.submit_load_task(keys, memories)
    loaded = None

    def is_loaded():
        nonlocal loaded
        loaded = adapter.query_load_result(number)
        return loaded is not None

    wait_until(is_loaded)
    return loaded, memories


def test_three_events_and_chunks_of_any_length(adapter):
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    assert len(fds) == 3
    keys = keys_of(5)
    contents = [bytes([at + 1]) * (1000 * at + 7) for at in range(5)]
    result = put(adapter, keys, contents)
    assert result.is_successful() and result.bytes_transferred() == sum(map(len, contents))
    # What is there is not moved again.
    assert put(adapter, keys, contents) == 0
    loaded, memories = load(adapter, keys, map(len, contents))
    wait_for(adapter.get_load_event_fd())
    assert loaded.popcount() == 5 and [bytes(memory.content) for memory in memories] == contents
    # A buffer of another length is not filled.
    loaded, memories = load(adapter, keys[:1], [50])
    assert loaded.popcount() == 0 and not any(memories[0].content)


def test_holes_are_told(adapter):
    keys = keys_of(8)
    there = [0, 1, 3, 4, 7]
    put(adapter, [keys[at] for at in there], [bytes([at + 1]) * 512 for at in there])
    assert look_up(adapter, keys).get_indices_list() == there
    loaded, memories = load(adapter, keys, [512] * 8)
    assert loaded.get_indices_list() == there
    assert [memory.content[0] for memory in memories] == [1, 2, 0, 4, 5, 0, 0, 8]
    adapter.submit_unlock(keys)
    assert look_up(adapter, keys_of(3, 90)).popcount() == 0


def test_what_is_locked_stays(tmp_path):
    """Chunks that were found are not evicted before they are loaded, whatever else is stored."""
    from daemon import Daemon

    daemon = Daemon(tmp_path, "nvme.paths=off", "host.bytes=16MiB")
    adapter = KvStoreL2Adapter({"address": daemon.address, "weights_version": "1"})
    try:
        locked, size = keys_of(4), 1 << 20
        put(adapter, locked, [bytes([at + 1]) * size for at in range(4)])
        assert look_up(adapter, locked).popcount() == 4
        for at in range(40):
            put(adapter, keys_of(1, 1000 + at), [bytes(size)])
        loaded, memories = load(adapter, locked, [size] * 4)
        assert loaded.popcount() == 4 and [memory.content[-1] for memory in memories] == [1, 2, 3, 4]
        assert adapter.report_status()["locked_key_count"] == 4
        adapter.submit_unlock(locked)
        adapter.submit_unlock(locked)
        assert adapter.report_status()["locked_key_count"] == 0
        for at in range(40):
            put(adapter, keys_of(1, 2000 + at), [bytes(size)])
        assert load(adapter, locked, [size] * 4)[0].popcount() < 4
    finally:
        adapter.close()
        daemon.kill()


def test_chunks_are_deleted_for_quotas(adapter):
    keys = keys_of(3, salt="tenant")
    put(adapter, keys, [b"x" * 100] * 3)
    assert adapter.get_usage().bytes_by_cache_salt == {"tenant": 300}
    adapter.delete(keys[:2] + keys_of(1, 70, salt="tenant"))
    assert look_up(adapter, keys).get_indices_list() == [2]
    assert adapter.get_usage().bytes_by_cache_salt == {"tenant": 100}


def test_settings_that_are_wrong_are_named():
    with pytest.raises(ValueError, match="adapter_params: unknown keys adress; valid keys are address"):
        KvStoreL2Adapter({"adress": "unix:/a"})


# -------------------------------------------------------------------- the library: remote connector


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def remote(daemon, loop, rank=0, ranks=1, **more):
    """LMCache's remote backend with the connector, as its engine makes it."""
    plugin = "remote_storage_plugin.kvstore."
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=64,
        local_cpu=False,
        max_local_cpu_size=0.25,
        remote_storage_plugins=["kvstore"],
        extra_config={
            f"{plugin}module_path": "kvstore.lmcache",
            f"{plugin}class_name": "KvStoreConnector",
            f"{plugin}address": daemon.address,
            f"{plugin}weights_version": "1",
            **more.pop("extra", {}),
        },
        **more,
    )
    metadata = LMCacheMetadata(
        model_name="tiny",
        world_size=ranks,
        local_world_size=ranks,
        worker_id=rank,
        local_worker_id=rank,
        kv_dtype=torch.bfloat16,
        kv_shape=(3, 2, 64, 4, 8),
        chunk_size=64,
    )
    memory = LocalCPUBackend(config, metadata, dst_device="cpu")
    return RemoteBackend(config, metadata, loop, memory, dst_device="cpu", plugin_name="kvstore"), memory


def engine_keys(count, first=0, rank=0, ranks=1, **tags):
    configs = {f"lmcache.tag.{name}": value for name, value in tags.items()}
    return [CacheEngineKey("tiny", ranks, rank, 1000 + at, torch.bfloat16, configs) for at in range(first, first + count)]


def chunk(memory, seed, tokens=64):
    made = memory.allocate(torch.Size([2, 3, tokens, 32]), torch.bfloat16, MemoryFormat.KV_2LTD)
    made.tensor.copy_(torch.randn(made.tensor.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def save(backend, memory, keys, tokens=64):
    made = [chunk(memory, key.chunk_hash, tokens) for key in keys]
    saved = [one.tensor.clone() for one in made]
    backend.batched_submit_put_task(keys, made)
    give_back(made)
    wait_until(lambda: not backend.put_tasks and backend.batched_contains(keys) == len(keys))
    return saved


def give_back(objects):
    for one in objects:
        one.ref_count_down()


def test_chunks_come_back_in_another_engine(daemon, loop):
    backend, memory = remote(daemon, loop)
    keys = engine_keys(6)
    saved = save(backend, memory, keys)
    assert backend.contains(keys[0]) and not backend.contains(engine_keys(1, 50)[0])

    other, _ = remote(daemon, loop)
    assert other.batched_contains(keys + engine_keys(2, 50)) == 6
    found = other.batched_get_blocking(keys + engine_keys(2, 50))
    assert found[6:] == [None, None]
    assert all(torch.equal(one.tensor, two) for one, two in zip(found, saved))
    give_back(found[:6])
    single = other.get_blocking(keys[3])
    assert torch.equal(single.tensor, saved[3])
    # A prompt's last chunk is shorter.
    short = engine_keys(1, 80)
    (tail,) = save(backend, memory, short, tokens=20)
    read = other.get_blocking(short[0])
    assert read.tensor.shape == tail.shape and torch.equal(read.tensor, tail)
    mixed = other.batched_get_blocking(keys[:2] + short + keys[2:3])
    assert all(torch.equal(one.tensor, two) for one, two in zip(mixed, [*saved[:2], tail, saved[2]]))
    give_back([single, read, *mixed])

    async def prefix():
        counted = await other.batched_async_contains("id", keys + engine_keys(1, 60))
        return counted, await other.batched_get_non_blocking("id", keys[:2] + engine_keys(1, 60) + keys[2:])

    counted, leading = asyncio.run_coroutine_threadsafe(prefix(), loop).result(60)
    assert counted == 6 and len(leading) == 2
    assert other.remove(keys[0]) and other.batched_contains(keys) == 0
    backend.close()
    other.close()


def test_ranks_and_tags_do_not_mix(daemon, loop):
    backend, memory = remote(daemon, loop, rank=0, ranks=2)
    save(backend, memory, engine_keys(2, rank=0, ranks=2))
    assert backend.batched_contains(engine_keys(2, rank=1, ranks=2)) == 0
    assert backend.batched_contains(engine_keys(2, rank=0, ranks=2, user="b")) == 0
    assert backend.batched_contains(engine_keys(2)) == 0
    backend.close()


def test_memory_is_given_back_whatever_happens(daemon, loop):
    """A miss and a dead daemon keep nothing of LMCache's memory."""
    backend, memory = remote(daemon, loop)
    keys = engine_keys(4)
    save(backend, memory, keys)
    used = memory.memory_allocator.pin_allocator
    wait_until(lambda: used.total_allocated_size == 0)
    assert backend.batched_get_blocking(engine_keys(4, 40)) == [None] * 4
    found = backend.batched_get_blocking(keys)
    assert used.total_allocated_size > 0
    give_back(found)
    daemon.kill()
    assert backend.batched_get_blocking(keys) == [None] * 4
    assert not backend.contains(keys[0])
    made = chunk(memory, 1)
    backend.batched_submit_put_task(keys[:1], [made])
    give_back([made])
    wait_until(lambda: used.total_allocated_size == 0)
    backend.close()


def test_what_is_not_supported_is_refused_by_name(daemon, loop):
    from kvstore.lmcache import KvStoreConnector

    _, memory = remote(daemon, loop)
    for more, problem in (
        (dict(remote_serde="cachegen"), "remote_serde: 'cachegen' is not supported"),
        (dict(use_layerwise=True), "use_layerwise: True is not supported"),
        (dict(extra_config={"remote_storage_plugin.kvstore.adress": "a"}), "kvstore: unknown keys adress"),
    ):
        config = LMCacheEngineConfig.from_defaults(**more)
        with pytest.raises(ValueError, match=problem):
            KvStoreConnector(loop=loop, local_cpu_backend=memory, config=config)
