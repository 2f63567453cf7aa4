"""Snapshots in a daemon's memory and on its disk: prewarmed, restored from there, and mapped from there."""

import asyncio
import os
import pathlib
import shutil
import signal

import pytest
from test_snapshots import content, noise, safetensors

import kvstore
import kvstore.weights
from kvstore.snapshots import Store

from daemon import Daemon

CHUNK = 8 << 20


@pytest.fixture
def daemon(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "daemon").mkdir()
    settings = (f"snapshots.url=file://{tmp_path}/store", f"nvme.paths={tmp_path}/disk", "nvme.bytes=2200MiB")
    daemon = Daemon(tmp_path / "daemon", *settings)
    yield daemon
    daemon.kill()


@pytest.fixture
def store(tmp_path, daemon) -> Store:
    return Store(f"file://{tmp_path}/store", daemon=daemon.address)


TENSORS = {"small": noise(1, 3_000), "large": noise(2, 2 * CHUNK + 40_000), "another": noise(3, 700_000)}


def save(store: Store, folder: pathlib.Path) -> kvstore.snapshots.Snapshot:
    folder.mkdir()
    # Equal tensors have the same chunks.
    (folder / "model.safetensors").write_bytes(safetensors({**TENSORS, "equal": TENSORS["large"]}))
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "empty").write_bytes(b"")
    return store.save(folder, name="m")


def lose_chunks(store: Store) -> None:
    """Nothing can come from the store any more."""
    shutil.rmtree(pathlib.Path(store.url.removeprefix("file://")) / "snapshots/v1/chunks")


def chunks_mapped() -> int:
    """Private, writable mappings of the daemon's memory in this process, in bytes."""
    with open("/proc/self/maps") as maps:
        mine = [line.split() for line in maps if "memfd:kvstore" in line and " rw-p " in line]
    return sum(int(end, 16) - int(start, 16) for start, end in (line[0].split("-") for line in mine))


def test_a_restore_takes_what_the_daemon_has(store, tmp_path):
    saved = save(store, tmp_path / "model")
    told = []
    warm = store.prewarm("m", progress=told.append)
    assert (warm.id, warm.bytes, warm.found_bytes, warm.pins) == (saved.id, saved.chunk_bytes, 0, [])
    assert told[-1].done == warm.bytes
    assert asyncio.run(store.prewarm_async("m", tier="disk")).bytes == warm.bytes
    assert store.prewarm("m").read_bytes == 0
    lose_chunks(store)
    assert store.restore("m", tmp_path / "restored")["read_bytes"] == 0
    assert content(tmp_path / "restored") == content(tmp_path / "model")
    with pytest.raises(kvstore.DataLoss):
        Store(store.url).restore("m", tmp_path / "alone")


def test_tensors_are_mapped_from_the_daemon(store, tmp_path, daemon):
    save(store, tmp_path / "model")
    store.prewarm("m", keep=600)
    # What is small comes from the store, or the daemon; none of the tensors does.
    with kvstore.weights.hold("m", store=store, as_tensors=True) as held:
        assert held.files == ["config.json", "empty", "model.safetensors"]
        assert held.read("config.json") == b'{"a": 1}'
        assert held.read("model.safetensors") == (tmp_path / "model" / "model.safetensors").read_bytes()
        file = held._map("model.safetensors")
        start, told, _ = kvstore.weights.mapped.header("model.safetensors", file)
        regions = {
            name: file.region(*(start + at for at in entry["data_offsets"])) for name, entry in told.items() if name != "equal"
        }
        again = file.region(*(start + at for at in told["equal"]["data_offsets"]))
        mapped = chunks_mapped()
        assert mapped >= 2 * len(TENSORS["large"]) + len(TENSORS["another"])
        assert {name: bytes(region) for name, region in regions.items()} == TENSORS
    # The daemon's memory is not given to others while it is mapped, and a write stays here.
    client = kvstore.Client(daemon.address)
    kind = kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=1 << 20)
    group = client.register_layout("pressure", dtype="uint8", block_tokens=1, groups=[kind]).group()
    for at in range(300):
        group.put_from([at.to_bytes(8, "big")], [bytes([at % 256]) * group.block_bytes])
    regions["large"][5] = (TENSORS["large"][5] + 1) % 256
    assert bytes(regions["large"]) == TENSORS["large"][:5] + bytes([regions["large"][5]]) + TENSORS["large"][6:]
    assert bytes(again) == TENSORS["large"], "another mapping of the same chunks"
    daemon.process.send_signal(signal.SIGKILL)
    assert bytes(regions["another"]) == TENSORS["another"], "the memory outlives its daemon"
    del regions, again, file
    assert chunks_mapped() == 0


def test_a_child_does_not_have_the_mapping(store, tmp_path):
    save(store, tmp_path / "model")
    store.prewarm("m")
    with kvstore.weights.hold("m", store=store, as_tensors=True) as held:
        region = held._map("model.safetensors").region(*_span(held, "large"))
        assert chunks_mapped() > 0
        child = os.fork()
        if not child:
            os._exit(0 if chunks_mapped() == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert bytes(region) == TENSORS["large"]


def _span(held, name: str) -> tuple[int, int]:
    start, told, _ = kvstore.weights.mapped.header("model.safetensors", held._map("model.safetensors"))
    first, end = told[name]["data_offsets"]
    return start + first, start + end


def test_what_the_daemon_lacks_comes_from_the_store(store, tmp_path, daemon):
    save(store, tmp_path / "model")
    # Not prewarmed: as without a daemon.
    with kvstore.weights.hold("m", store=store, as_tensors=True) as held:
        assert held.read("model.safetensors") == (tmp_path / "model" / "model.safetensors").read_bytes()
        assert chunks_mapped() == 0
    store.prewarm("m")
    with kvstore.weights.hold("m", store=store, as_tensors=True, check=True) as held:
        assert held._map("model.safetensors").region(*_span(held, "large")) == TENSORS["large"]
    daemon.kill()
    store.restore("m", tmp_path / "restored")
    assert content(tmp_path / "restored") == content(tmp_path / "model")
    fresh = Store(store.url, daemon=daemon.address)
    fresh.restore("m", tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "model")


def test_a_pin_is_ended(store, tmp_path, daemon):
    save(store, tmp_path / "model")
    warm = store.prewarm("m", keep=600)
    client = kvstore.Client(daemon.address)
    assert warm.pins and all(client.unpin(bytes.fromhex(pin)) for pin in warm.pins)
    assert not client.unpin(bytes.fromhex(warm.pins[0]))


def test_wrong_requests_are_named(store, tmp_path):
    save(store, tmp_path / "model")
    for wrong, asked in (
        ("tier", dict(tier="tape")),
        ("keep", dict(keep=-1)),
        ("keep_ms", dict(keep=1e9)),
        ("deadline_ms", dict(deadline=1e9)),
    ):
        with pytest.raises(kvstore.Invalid, match=wrong):
            store.prewarm("m", **asked)
    with pytest.raises(kvstore.NotFound, match="none"):
        store.prewarm("none")
    with pytest.raises(kvstore.Invalid, match="daemon"):
        Store(store.url).prewarm("m")
    with pytest.raises(kvstore.Unavailable):
        Store(store.url, daemon=f"unix:{tmp_path}/nobody.sock").prewarm("m")
    with pytest.raises(kvstore.Invalid, match="check"):
        kvstore.weights.hold("m", store=store.url, check=True)


def test_the_environment_names_the_daemon(store, tmp_path, daemon, monkeypatch):
    save(store, tmp_path / "model")
    monkeypatch.setenv("KVSTORE_SNAPSHOT_DAEMON", daemon.address)
    # On the disk, too, before the daemon ends: a prewarm into memory alone is written there when there is time.
    assert Store(store.url).prewarm("m", tier="disk").bytes > 0
    daemon.stop()
    daemon.start()
    warm = Store(store.url).prewarm("m")
    assert warm.bytes > 0 and warm.read_bytes == 0, "from the disk, not from the store"
