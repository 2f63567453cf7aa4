"""A prompt of a million tokens: 65,536 blocks of 16 tokens, in one call. The blocks are small: it is their number that counts."""

import hashlib
import time
from types import SimpleNamespace

import fakes
import numpy
import pytest
from conftest import BLOCK_TOKENS, register

import kvstore

from daemon import Daemon

BLOCKS, SIZE = 65_536, 1024


@pytest.fixture
def roomy(tmp_path):
    daemon = Daemon(tmp_path, "nvme.paths=off", "host.bytes=640MiB")
    yield daemon
    daemon.kill()


@pytest.fixture(scope="module")
def names():
    return [hashlib.sha256(b"long %d" % at).digest() for at in range(BLOCKS)]


@pytest.fixture(scope="module")
def content():
    return numpy.random.default_rng(7).integers(0, 256, (BLOCKS, SIZE), dtype=numpy.uint8)


def all_stored(results) -> bool:
    return len(results) == BLOCKS and all(result == kvstore.PutResult("stored", "memory") for result in results)


@pytest.mark.parametrize("plane", ["local", "grpc"])
def test_every_verb_takes_a_long_prompt(roomy, names, content, plane):
    group = register(kvstore.Client(roomy.address, plane=plane), SIZE)
    assert all_stored(group.put_from(names, content))
    assert group.lookup(names) == BLOCKS and all(group.contains(names))
    with group.pin(names, ttl=60.0) as pin:
        assert pin.blocks == BLOCKS and group.delete(names).pinned == BLOCKS
    done = group.prefetch(names).wait()
    assert (done.state, done.ready, done.missing) == ("done", BLOCKS, 0)
    group.hint(names)
    tokens = list(range(BLOCKS * BLOCK_TOKENS))
    assert not group.describe(names, tokens), "this daemon publishes no events"
    assert group.delete(names) == (BLOCKS, 0) and group.lookup(names) == 0


@pytest.mark.parametrize("plane", ["local", "grpc"])
def test_a_long_prompt_is_read(roomy, names, content, plane):
    group = register(kvstore.Client(roomy.address, plane=plane), SIZE)
    assert all_stored(group.put_from(names, content))
    into = numpy.zeros_like(content)
    assert group.get_into(names, into) == BLOCKS and numpy.array_equal(into, content)
    assert b"".join(group.get(names)) == content.tobytes()


def test_leases_come_in_windows(roomy, names, content):
    group = register(kvstore.Client(roomy.address, plane="local"), SIZE)
    assert all_stored(group.put_from(names, content))
    with pytest.raises(kvstore.Invalid, match="8192.*lease_windows"):
        group.leases(names)
    with pytest.raises(kvstore.Invalid, match="4096"):
        next(group.lease_windows(names, window=5000))
    at = 0
    for leases in group.lease_windows([*names, b"nowhere"], window=4096):
        with leases:
            for view in leases:
                assert view == content[at].data
                view.release()
                at += 1
    assert at == BLOCKS
    held = group.leases(names[:8192])
    with pytest.raises(kvstore.Busy, match="8192"):
        group.leases(names[-1:])
    held.release()


def test_pages_are_read_while_other_leases_leave_no_room(roomy, names, content):
    """A load into pages raised Busy where other leases of the process had all places, though it can copy the blocks over gRPC."""
    group = register(kvstore.Client(roomy.address, plane="local"), SIZE)
    assert all_stored(group.put_from(names, content))
    into = numpy.zeros_like(content)
    target = kvstore.Pages([(into, 0, SIZE, SIZE)], BLOCKS)
    held = group.leases(names[:8192])
    assert group.get_pages(names[:9000], target, list(range(9000))) == 9000
    held.release()
    assert numpy.array_equal(into[:9000], content[:9000])


@pytest.mark.parametrize("plane", ["local", "grpc"])
def test_pages_of_a_long_prompt(roomy, names, content, plane):
    half = SIZE // 2
    group = register(kvstore.Client(roomy.address, plane=plane), SIZE)
    source = kvstore.Pages([(content, 0, SIZE, half), (content, half, SIZE, half)], BLOCKS)
    assert all_stored(group.put_pages(names, source, list(range(BLOCKS))))
    into = numpy.zeros_like(content)
    target = kvstore.Pages([(into, 0, SIZE, half), (into, half, SIZE, half)], BLOCKS)
    load = group.start_get_pages(names, target, list(range(BLOCKS))[::-1])
    assert load.wait_region(1, 60.0) and load.result(60.0) == BLOCKS
    assert numpy.array_equal(into, content[::-1])
    into[:] = 0
    assert group.get_pages([*names[:10_000], b"nowhere", *names], target, list(range(10_001)) + list(range(BLOCKS))) == 10_000
    assert numpy.array_equal(into[:10_000], content[:10_000])


def test_more_than_a_ticket_may_hold_is_found_all_the_same(tmp_path, names):
    """A ticket holds at most half of the memory. A look-up of a longer prompt was answered Busy, each time, and an engine that
    asked for a ticket never found the prompt."""
    daemon = Daemon(tmp_path, "nvme.paths=off", "host.bytes=320MiB")
    try:
        client = kvstore.Client(daemon.address)
        kind = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=4096 // BLOCK_TOKENS)
        layout = client.register_layout("held", dtype="uint8", block_tokens=BLOCK_TOKENS, groups=[kind])
        assert all_stored(layout.group().put_from(names, [bytes(4096)] * BLOCKS))
        found = layout.look_up_and_hold(names, 30.0)
        assert (found.blocks, found.in_memory, found.ticket) == (BLOCKS, BLOCKS, None)
        found = layout.look_up_and_hold(names[:1000], 30.0)
        assert found.blocks == 1000 and client.release_ticket(found.ticket)
    finally:
        daemon.kill()


@pytest.fixture
def faked():
    if not fakes.install():
        pytest.skip("vLLM, transformers or torch is installed: see tests/engines")
    yield
    fakes.uninstall()


@pytest.fixture
def connector(faked):
    from kvstore.vllm import messages, options, pages, scheduler, worker

    return SimpleNamespace(messages=messages, options=options, pages=pages, scheduler=scheduler, worker=worker)


class Engine:
    """Both sides of the connector, around a cache in CPU memory."""

    def __init__(self, connector, address: str, blocks: int, share: float):
        engine, cache = fakes.config(blocks, BLOCK_TOKENS)
        options = connector.options.Options(address=address, lookup_deadline=60.0, deadline=60.0, pending_share=share)
        self.memory = numpy.zeros((blocks, SIZE), dtype=numpy.uint8)
        self.pool = fakes.Pool(blocks)
        kind = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=SIZE // BLOCK_TOKENS, order="opaque")
        layout = connector.messages.RankLayout("long", b"", "uint8", BLOCK_TOKENS, (kind,), (0, 1), b"")
        self.scheduler = connector.scheduler.SchedulerSide(engine, cache, options)
        self.scheduler.bind_pool(self.pool)
        self.scheduler.set_layouts([layout])
        self.worker = connector.worker.WorkerSide(engine, cache, options, 0)
        self.worker.layout, self.worker._last_region = layout, {"layer": (0, 0)}
        self.worker._pages = [[connector.pages.DirectPages([(self.memory, 0, SIZE, SIZE)], blocks)]]

    def run(self, request, places, compute) -> int:
        """Computes a request in one step, and saves it; how many of its tokens came from the store."""
        tokens, waits = self.scheduler.matched_tokens(request, 0)
        self.scheduler.allocated(request, SimpleNamespace(get_block_ids=lambda: [places]), tokens)
        self.worker.bind(self.scheduler.plan(fakes.step(request, places, tokens)))
        self.worker.start_loads()
        self.worker.wait_for_layer("layer")
        compute(tokens // BLOCK_TOKENS)
        self.worker.finish_step()
        finished, until = set(), time.monotonic() + 60.0
        while self.scheduler.has_pending() or (waits and not finished):
            finished |= self.worker.transfer_results().finished_recving
            report = self.worker.report()
            self.scheduler.update(SimpleNamespace(finished_recving=finished, kv_connector_worker_meta=report))
            assert time.monotonic() < until, "a save or a load never ended"
            time.sleep(0.01)
        assert not self.worker.invalid_blocks() and self.pool.held == 0
        self.scheduler.finished(request)
        return tokens


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_long_prompt_runs_through_the_connector_of_vllm(tmp_path, connector, names, content, where):
    disk = [f"nvme.paths={tmp_path}/nvme", "nvme.bytes=2GiB", "host.bytes=64MiB"]
    settings = ["nvme.paths=off", "host.bytes=320MiB"] if where == "memory" else disk
    daemon = Daemon(tmp_path, *settings)
    try:
        first = Engine(connector, daemon.address, BLOCKS + 8192, share=0.9)

        def compute(computed: int) -> None:
            assert computed == 0
            first.memory[:BLOCKS] = content

        assert first.run(fakes.request("first", names, BLOCK_TOKENS), list(range(BLOCKS)), compute) == 0
        assert first.worker.stats().data["saved_blocks"] == BLOCKS
        first.worker.shutdown()
        second = Engine(connector, daemon.address, BLOCKS + 8192, share=0.9)
        places = list(range(BLOCKS))[::-1]

        def compute_the_rest(computed: int) -> None:
            # The last token is computed, whatever is stored.
            assert computed == BLOCKS - 1

        tokens = second.run(fakes.request("second", names, BLOCK_TOKENS), places, compute_the_rest)
        assert tokens == (BLOCKS - 1) * BLOCK_TOKENS
        assert numpy.array_equal(second.memory[places[: BLOCKS - 1]], content[: BLOCKS - 1])
        second.worker.shutdown()
    finally:
        daemon.kill()


def test_the_beginning_of_a_prompt_that_is_too_long_to_save_at_once_is_saved(roomy, connector, names, content):
    """A step that computed more blocks than may wait to be saved saved none of them."""
    engine = Engine(connector, roomy.address, BLOCKS, share=0.25)
    engine.memory[:] = content
    engine.run(fakes.request("long", names, BLOCK_TOKENS), list(range(BLOCKS)), lambda computed: None)
    assert engine.worker.stats().data["saved_blocks"] == BLOCKS // 4
    engine.worker.shutdown()


def test_a_session_of_a_million_tokens_is_saved(roomy, faked):
    """The tokens of a long session took more than the MiB that a saved state has for them, and `save_state` refused it."""
    from kvstore import transformers

    attached = transformers.Attached.__new__(transformers.Attached)
    client = kvstore.Client(roomy.address)

    def states(room: int) -> kvstore.Group:
        kind = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=room, kind="recurrent_state")
        return client.register_layout("states", dtype="uint8", block_tokens=16, groups=[kind]).group()

    short = states(transformers.STATE_BYTES)
    attached._groups = lambda: (short, short)
    attached._long_states = lambda: states(transformers.LONG_STATE_BYTES)
    attached._tokens, attached._layers, attached._level, attached._stored = 16, 0, "memory", set()
    attached._model = SimpleNamespace(config=None, device="cpu")
    for tokens in (list(range(1_000_000)), [1, 2, 3], list(range(2_000_000))):
        sequences = fakes.Sequences(tokens)
        attached.save_state("session", SimpleNamespace(sequences=sequences, past_key_values=fakes.DynamicCache()))
        state = attached.load_state("session")
        assert state.tokens == tokens and state.generators == {"cpu": b"generator"}
    assert attached.load_state("another") is None
    with pytest.raises(kvstore.Invalid, match="too many tokens"):
        sequences = fakes.Sequences(list(range(3_000_000)))
        attached.save_state("session", SimpleNamespace(sequences=sequences, past_key_values=fakes.DynamicCache()))


def test_an_engine_that_wakes_up_has_its_cache_again(faked, connector, monkeypatch):
    """vLLM 0.33 names its caches when it starts, and not when it wakes up from sleep mode: what it named is kept."""
    engine, cache = fakes.config(8, BLOCK_TOKENS)
    worker = connector.worker.WorkerSide(engine, cache, connector.options.Options(), 0)
    made = []
    monkeypatch.setattr(connector.worker, "groups_of", lambda config: ([SimpleNamespace(layers=["layer"])], None))
    monkeypatch.setattr(connector.worker, "shards_of", lambda *_: (0, 1))
    monkeypatch.setattr(connector.worker, "split", lambda tensor, parts: [SimpleNamespace(device="cpu")])
    monkeypatch.setattr(connector.worker, "regions_of", lambda part, blocks: [part])
    monkeypatch.setattr(connector.worker, "describe", lambda *_: SimpleNamespace(refused="a test", parts=1))
    monkeypatch.setattr(worker, "_make_pages", lambda *_: made.append(1) or [[SimpleNamespace(block_bytes=SIZE)]])
    worker.restore_kv_caches()
    assert not made, "nothing was registered yet"
    worker.register_kv_caches({"layer": [object()]})
    worker.unregister_kv_caches()
    worker.unregister_kv_caches()
    assert not worker._pages
    worker.restore_kv_caches()
    worker.restore_kv_caches()
    assert worker._pages and len(made) == 2, "once for each time"
