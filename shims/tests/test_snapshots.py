"""Snapshots from Python: every verb, both forms, and what goes wrong."""

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

import kvstore
import kvstore.weights
from kvstore.snapshots import Cache, Progress, Store
from kvstore.snapshots.kinds import size

from daemon import program


def noise(seed: int, length: int) -> bytes:
    import random

    return random.Random(seed).randbytes(length)


def safetensors(tensors: dict[str, bytes], note: str = "") -> bytes:
    header, at = {"__metadata__": {"note": note}}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [len(data) // 2], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write(tmp_path / "model")


def write(folder: pathlib.Path, seed: int = 1) -> pathlib.Path:
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(safetensors({"a": noise(seed, 40_000), "b": noise(2, 9 << 20)}))
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "run").write_text("#!/bin/sh")
    (folder / "deep" / "run").chmod(0o755)
    (folder / "empty").write_bytes(b"")
    return folder


def content(folder: pathlib.Path) -> dict[str, tuple[bytes, bool]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), os.access(path, os.X_OK)) for path in files}


@pytest.fixture
def store(tmp_path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(f"file://{tmp_path}/store")


def test_a_walk_through_every_verb(store, folder, tmp_path):
    told: list[Progress] = []
    first = store.save(folder, name="m", facts={"dtype": "bf16"}, progress=told.append)
    assert told[-1].done == told[-1].total == first.bytes and told[-1].seconds_left == 0
    assert first.names == ["m"] and first.facts == {"dtype": "bf16"} and first.files == 4 and first.tensors == 2
    again = store.save(folder, name="m")
    assert (again.written_bytes, again.found_bytes) == (0, first.bytes)
    write(folder, seed=7)
    changed = store.save(folder)
    assert 40_000 <= changed.written_bytes < 42_000
    assert [one.id for one in store.ls()][0] == changed.id and len(store.ls()) == 3
    assert {one.id: one.names for one in store.ls()}[again.id] == ["m"]
    snapshot, files = store.inspect("m")
    assert snapshot.id == again.id and [file.path for file in files] == ["config.json", "deep/run", "empty", "model.safetensors"]
    tensor = files[3].tensors[1]
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.end - tensor.start) == ("b", "BF16", (9 << 19,), 9 << 20)
    assert sum(length for length, _ in files[3].chunks) == files[3].bytes
    found = store.diff("m", changed.id)
    assert [(one.file, one.tensor, one.change) for one in found.differences] == [("model.safetensors", "a", "changed")]
    assert store.verify("m").wrong == [] and store.verify("m").sound == again.chunks
    store.tag(changed.id, "newest")
    answer = store.restore("newest", tmp_path / "to", facts={}, progress=told.append)
    assert content(tmp_path / "to") == content(folder) and answer["id"] == changed.id
    with pytest.raises(kvstore.Invalid, match="is called newest; remove that first"):
        store.rm(changed.id)
    store.rm("newest")
    store.rm(changed.id)
    dry = store.gc(dry_run=True)
    assert dry.dry_run and dry.gone_chunks > 0 and len(store.ls()) == 2
    assert store.gc().gone_chunks >= dry.gone_chunks
    assert [one.id for one in store.ls()] == [again.id] and store.verify("m").wrong == []


def test_what_is_on_this_node_s_disk_becomes_durable(store, folder, tmp_path):
    (tmp_path / "local").mkdir()
    local = Store(f"file://{tmp_path}/local")
    saved = local.save(folder, name="m")
    told: list[Progress] = []
    uploaded = local.upload("m", store, progress=told.append)
    assert (uploaded.id, uploaded.names, told[-1].done) == (saved.id, ["m"], saved.bytes)
    assert asyncio.run(local.upload_async(saved.id[:8], store, compress=True)).written_bytes == 0
    store.restore("m", tmp_path / "to")
    assert content(tmp_path / "to") == content(folder)
    with pytest.raises(kvstore.NotFound, match='no snapshot "other"'):
        local.upload("other", store)


def test_the_command_saves_to_the_disk_first(folder, tmp_path):
    """A save to the disk alone, a restore of it while the store is away, an upload, and a restore that reads the disk first."""
    (tmp_path / "local").mkdir()
    environment = {**os.environ, "KVSTORE_SNAPSHOTS_LOCAL": f"file://{tmp_path}/local"}
    environment.pop("KVSTORE_SNAPSHOTS", None)

    def snapshot(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [program("kvstore", "KVSTORE_BIN"), "snapshot", *arguments], capture_output=True, text=True, env=environment
        )

    refused = snapshot("save", str(folder))
    assert refused.returncode and "--store" in refused.stderr
    refused = snapshot("save", str(folder), "--to", "local", "--local", "s3://bucket")
    assert refused.returncode and "not on this node's disk" in refused.stderr
    saved = snapshot("save", str(folder), "--to", "local", "--name", "m")
    assert saved.returncode == 0 and "kvstore snapshot upload m makes it durable" in saved.stderr
    store = f"file://{tmp_path}/store"
    away = snapshot("restore", "m", str(tmp_path / "away"), "--store", store, "--json")
    assert away.returncode == 0 and "is taken from this node's disk" in away.stderr and json.loads(away.stdout)["local"]
    typed = snapshot("restore", "m", str(tmp_path / "typed"), "--store", "s4://bucket")
    assert typed.returncode and "s4://bucket" in typed.stderr, "what is wrong is not passed over"
    (tmp_path / "store").mkdir(exist_ok=True)
    uploaded = json.loads(snapshot("upload", "m", "--store", store, "--json").stdout)
    assert uploaded["id"] == saved.stdout.strip() and uploaded["names"] == ["m"] and uploaded["written_bytes"] > 0
    near = json.loads(snapshot("restore", "m", str(tmp_path / "near"), "--store", store, "--json").stdout)
    assert near["read_bytes"] == 0
    del environment["KVSTORE_SNAPSHOTS_LOCAL"]
    far = json.loads(snapshot("restore", "m", str(tmp_path / "far"), "--store", store, "--json").stdout)
    assert far["read_bytes"] > 0
    assert content(tmp_path / "away") == content(tmp_path / "near") == content(tmp_path / "far") == content(folder)


def test_every_verb_can_be_awaited(store, folder, tmp_path):
    async def walk():
        told: list[Progress] = []
        saved = await store.save_async(folder, name="m", progress=told.append)
        assert told[-1].done == saved.bytes
        assert [one.id for one in await store.ls_async()] == [saved.id]
        assert (await store.inspect_async("m"))[0].id == saved.id
        assert (await store.verify_async("m", progress=told.append)).wrong == []
        assert (await store.diff_async("m", saved.id)).differences == []
        await store.tag_async("m", "n")
        await store.restore_async("n", tmp_path / "to")
        await store.rm_async("n")
        assert (await store.gc_async()).snapshots == 1
        held = await kvstore.weights.hold_async("m", store=store)
        assert held.read("config.json") == b"{}"
        with pytest.raises(kvstore.NotFound):
            await store.inspect_async("other")

    asyncio.run(walk())
    assert content(tmp_path / "to") == content(folder)


def test_errors_say_what_is_wrong(store, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("KVSTORE_SNAPSHOTS", raising=False)
    with pytest.raises(kvstore.Invalid, match="set KVSTORE_SNAPSHOTS"):
        Store()
    with pytest.raises(kvstore.Invalid, match="ftp"):
        Store("ftp://x")
    with pytest.raises(kvstore.NotFound, match='no snapshot "other"'):
        store.restore("other", tmp_path / "to")
    with pytest.raises(kvstore.Invalid, match="cannot be a name"):
        store.save(folder, name="a/b")
    with pytest.raises(kvstore.Invalid, match="nowhere"):
        store.save(tmp_path / "nowhere")
    with pytest.raises(kvstore.Invalid, match="only a live model"):
        store.save(folder, files={})
    saved = store.save(folder, name="m", facts={"dtype": "bf16"})
    with pytest.raises(kvstore.Invalid, match=r'dtype is "bf16", and "f16" is asked for; allow=\["dtype"\]'):
        store.restore("m", tmp_path / "to", facts={"dtype": "f16"})
    store.restore("m", tmp_path / "to", facts={"dtype": "f16"}, allow=["dtype"])
    with pytest.raises(kvstore.Invalid, match="exists"):
        store.restore("m", tmp_path / "to")
    chunk = next(path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.stat().st_size > 8 << 20)
    damaged = bytearray(chunk.read_bytes())
    damaged[1000] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(kvstore.DataLoss, match=chunk.name):
        store.restore("m", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(kvstore.DataLoss, match=chunk.name):
        kvstore.weights.hold("m", store=store)
    assert [digest for digest, _ in store.verify("m").wrong] == [chunk.name]
    chunk.write_bytes(damaged[:-1000])
    with pytest.raises(kvstore.DataLoss, match=chunk.name):
        kvstore.weights.hold("m", store=store)
    # No later try brings back what the store does not have.
    chunk.unlink()
    with pytest.raises(kvstore.DataLoss, match=f"{chunk.name}.*does not exist"):
        kvstore.weights.hold("m", store=store)
    next((tmp_path / "store").rglob("rank-*")).unlink()
    with pytest.raises(kvstore.DataLoss, match="rank 0.*does not exist"):
        kvstore.weights.hold("m", store=store)
    assert saved.id in {one.id for one in store.ls()}


def test_what_tells_may_end_it(store, folder, tmp_path):
    """An error of the progress callback, and an interrupt, end a call that runs."""

    class Enough(Exception):
        pass

    for at in range(8):
        (folder / f"large-{at}").write_bytes(noise(at, 24 << 20))
    store.save(folder, name="m")

    def enough(_progress):
        raise Enough

    with pytest.raises(Enough):
        store.restore("m", tmp_path / "to", progress=enough)
    timer = threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        store.restore("m", tmp_path / "again")
        timer.cancel()
        # Its signal may be on its way, and is to come here.
        timer.join()
        time.sleep(0.2)
    except KeyboardInterrupt:
        assert not (tmp_path / "again").exists() or content(tmp_path / "again") == content(folder)
    store.restore("m", tmp_path / "to" if not (tmp_path / "to").exists() else tmp_path / "third")


def test_cancelling_ends_it(store, folder, tmp_path):
    for at in range(8):
        (folder / f"large-{at}").write_bytes(noise(at, 24 << 20))
    store.save(folder, name="m")

    async def cancelled(to: pathlib.Path) -> bool:
        try:
            await asyncio.wait_for(store.restore_async("m", to), 0.02)
        except asyncio.TimeoutError:
            return not to.exists()
        return False

    for turn in range(20):
        to = tmp_path / f"to {turn}"
        if asyncio.run(cancelled(to)):
            break
        # This thread stood still until all was restored: once more.
        assert content(to) == content(folder)
    else:
        raise AssertionError("a restore goes on whoever cancels it")
    store.restore("m", to)
    assert content(to) == content(folder)


@pytest.mark.parametrize("is_cached", [False, True])
def test_files_that_are_held(store, folder, tmp_path, is_cached):
    saved = store.save(folder, name="m")
    cache = Cache(tmp_path / "cache", "64MiB") if is_cached else False
    with kvstore.weights.hold("kvstore://m", store=store, cache=cache) as held:
        assert held.snapshot.id == saved.id and held.is_cached == is_cached
        assert held.files == ["config.json", "deep/run", "empty", "model.safetensors"]
        assert {path: held.read(path) for path in held.files} == {path: data for path, (data, _) in content(folder).items()}
        assert (held.path / "config.json").read_text() == "{}" and (held.path / "deep" / "run").read_bytes()
        with pytest.raises(kvstore.NotFound, match="no file 'other'; it has config.json"):
            held.read("other")
        if is_cached:
            assert [(one.id, one.is_used, one.is_whole) for one in cache.ls()] == [(saved.id, True, True)]
            assert not cache.rm(saved.id)
    assert is_cached == held.path.exists()
    if is_cached:
        assert cache.rm(saved.id) and cache.ls() == []


def test_what_is_mapped_stays_in_the_cache(store, folder, tmp_path):
    """Once a cached snapshot could be removed, or make room, while tensors of it lived: they then took memory that nobody counted."""
    saved = store.save(folder, name="m")
    cache = Cache(tmp_path / "cache", saved.bytes)
    held = kvstore.weights.hold("m", store=store, cache=cache)
    # What a tensor is made of.
    mapping = held._map("model.safetensors")
    held.close()
    del held
    assert [one.is_used for one in cache.ls()] == [True] and not cache.rm(saved.id)
    other = store.save(write(tmp_path / "second", seed=5), name="other")
    with pytest.raises(kvstore.Busy, match="processes use"):
        kvstore.weights.hold("other", store=store, cache=cache)
    assert mapping[:] == (folder / "model.safetensors").read_bytes()
    del mapping
    assert cache.rm(saved.id)
    assert kvstore.weights.hold("other", store=store, cache=cache).snapshot.id == other.id


@pytest.mark.parametrize("is_cached", [False, True])
def test_what_is_closed_maps_nothing(store, folder, tmp_path, is_cached):
    """A descriptor that was given back is the next file's: its bytes were once taken for the snapshot's."""
    store.save(folder, name="m")
    held = kvstore.weights.hold("m", store=store, cache=Cache(tmp_path / "cache", "64MiB") if is_cached else False)
    held.close()
    opened = [open(os.devnull) for _ in range(8)]
    for use in (lambda: held.read("config.json"), lambda: held.tensors(), lambda: held.read("other")):
        with pytest.raises(kvstore.Invalid, match="is closed"):
            use()
    held.close()
    for one in opened:
        one.close()


def test_a_child_that_was_forked_leaves_the_folder(store, folder):
    store.save(folder, name="m")
    held = kvstore.weights.hold("m", store=store, cache=False)
    child = os.fork()
    if not child:
        held.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (held.path / "config.json").read_text() == "{}"
    held.close()
    assert not held.path.exists()


def test_a_cache_is_bounded_and_told_of_by_the_environment(store, folder, tmp_path, monkeypatch):
    store.save(folder, name="m")
    with pytest.raises(kvstore.Invalid, match="raise its bound"):
        kvstore.weights.hold("m", store=store, cache=Cache(tmp_path / "cache", 1000))
    monkeypatch.setenv("KVSTORE_SNAPSHOT_CACHE", str(tmp_path / "other"))
    with pytest.raises(kvstore.Invalid, match="KVSTORE_SNAPSHOT_CACHE_BYTES"):
        kvstore.weights.hold("m", store=store)
    monkeypatch.setenv("KVSTORE_SNAPSHOT_CACHE_BYTES", "1GiB")
    monkeypatch.setenv("KVSTORE_SNAPSHOTS", store.url)
    with kvstore.weights.hold("m") as held:
        assert held.path.parent == tmp_path / "other"
    with kvstore.weights.hold("m", cache=False) as held:
        assert not held.is_cached
    with pytest.raises(kvstore.Invalid, match="no cache"):
        kvstore.weights.hold("m", cache=False, check=True)
    path = tmp_path / "other" / held.snapshot.id / "config.json"
    path.chmod(0o600)
    path.write_text("x}")
    with kvstore.weights.hold("m", check=True) as held:
        assert held.read("config.json") == b"{}"


def test_processes_at_once_restore_once(store, folder, tmp_path):
    """One of them restores, the others map what it made; each says how much came from the store."""
    store.save(folder, name="m")
    script = (
        "import kvstore.weights, kvstore.snapshots, sys\n"
        "told = []\n"
        "cache = kvstore.snapshots.Cache(sys.argv[2], '1GiB')\n"
        "held = kvstore.weights.hold('m', store=sys.argv[1], cache=cache, progress=told.append)\n"
        "print(told[-1].moved, len(held.read('model.safetensors')))\n"
    )
    command = [sys.executable, "-c", script, store.url, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate(timeout=200)[0].split() for process in processes]
    length = (folder / "model.safetensors").stat().st_size
    assert [int(answer[1]) for answer in answers] == [length] * 4
    assert sum(int(answer[0]) > 0 for answer in answers) == 1


def test_a_snapshot_that_cannot_be_read_hides_no_other(store, folder, tmp_path):
    saved = [store.save(folder, name="m"), store.save(folder)]
    assert store.ls().unreadable == {}
    (tmp_path / "store/snapshots/v1/snap" / saved[1].id / "COMMIT").write_bytes(b"cut")
    listed = store.ls()
    assert [one.id for one in listed] == [saved[0].id]
    assert list(listed.unreadable) == [saved[1].id] and saved[1].id in listed.unreadable[saved[1].id]


def test_sizes():
    assert [size(text) for text in (5, "5", "1.5GiB", "16G", "500 mib", "2kb")] == [5, 5, 3 << 29, 16 << 30, 500 << 20, 2048]
    with pytest.raises(kvstore.Invalid, match="16GiB"):
        size("much")


def test_the_program_and_the_module_see_the_same(store, folder):
    """Both speak of one store in the same words."""
    store.save(folder, name="m")
    answer = subprocess.run(
        [program("kvstore", "KVSTORE_BIN"), "snapshot", "ls", "--store", store.url, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (told,) = json.loads(answer.stdout)["snapshots"]
    (found,) = store.ls()
    assert told == {key: getattr(found, key) for key in told}
