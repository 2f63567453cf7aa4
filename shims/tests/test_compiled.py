"""Compile caches: what fits comes back as it was, what does not is refused by name, and no engine writes into another's."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import kvstore.compiled
from kvstore import Busy, Invalid, NotFound
from kvstore.compiled import facts, folders
from kvstore.snapshots import Cache, Store

from launchers import PATIENCE_S, is_alive, until


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A node with nothing on it, and a store."""
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("KVSTORE_SNAPSHOTS", f"file://{tmp_path}/store")
    monkeypatch.setenv("KVSTORE_COMPILE_CACHE_BASE", str(tmp_path / "node"))
    for name in (*folders.VARIABLES, "KVSTORE_COMPILE_CACHE_FOLDER", "KVSTORE_COMPILE_CACHE", "KVSTORE_SNAPSHOT_CACHE"):
        # So that what the test sets goes with it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(kvstore.compiled, "_used", None)
    yield tmp_path
    if kvstore.compiled._used:
        kvstore.compiled._used._folder.close()


def forget() -> None:
    """What a process is that has just begun."""
    kvstore.compiled._used._folder.close()
    kvstore.compiled._used = None
    for name in (*folders.VARIABLES, "KVSTORE_COMPILE_CACHE_FOLDER"):
        os.environ.pop(name, None)


def compile_something(path: pathlib.Path) -> dict[str, bytes]:
    """Writes what compilers write, and returns what is worth keeping of it."""
    kept = {
        "inductor/ab/cab.py": b"code",
        "inductor/ab/cab.so": b"\x7fELF" * 1000,
        "inductor/fxgraph/xy/entry": b"pickle",
        "triton/KEY/kernel.cubin": b"cubin",
        "vllm/torch_compile_cache/0123/rank_0_0/computation_graph.py": b"graph",
        "vllm/modelinfos/llama.json": b"{}",
        "flashinfer/.cache/flashinfer/0.6/90a/build.ninja": b"ninja",
        "deep_gemm/cache/kernel.x/kernel.cubin": b"gemm",
    }
    passing = [
        "inductor/locks/a.lock",
        "triton/tmp.pid_1/x",
        "inductor/ab/.tmp1",
        "vllm/gpu_p2p_access_cache_for_0.json",
        "vllm/assets/a",
    ]
    for file, content in {**kept, **dict.fromkeys(passing, b"not kept")}.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(content)
    (path / "inductor/ab/cab.so").chmod(0o755)
    os.utime(path / "inductor/ab/cab.py", ns=(1, 1_234_567_890_123_456_789))
    return kept


def content(path: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def saved(name: str = "c") -> tuple[dict[str, bytes], str]:
    caches = kvstore.compiled.use(name)
    kept = compile_something(caches.path)
    id = caches.save().id
    forget()
    return kept, id


def test_what_was_compiled_is_there_the_next_time(place):
    caches = kvstore.compiled.use("c")
    assert caches.id is None and "no snapshot" in caches.why and not content(caches.path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(caches.path / "inductor")
    kept = compile_something(caches.path)
    assert sorted(caches.new_files()) == sorted(kept)
    first = caches.save(facts={"model": "llama"})
    assert first.files == len(kept) + 1 and first.facts["model"] == "llama" and first.facts["kind"] == "compile caches"
    old = caches.path
    forget()
    assert not old.exists()
    again = kvstore.compiled.use("c", facts={"model": "llama"})
    assert again.id == first.id and again.path != old and again.path.stat().st_mode & 0o777 == 0o700
    assert content(again.path) == kept
    assert (again.path / "inductor/ab/cab.py").stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert os.access(again.path / "inductor/ab/cab.so", os.X_OK)
    assert again.new_files() == [] and again.save() is None
    (again.path / "triton/NEW").mkdir()
    (again.path / "triton/NEW/kernel").write_bytes(b"new")
    (again.path / "triton/KEY/kernel.cubin").write_bytes(b"other")
    assert sorted(again.new_files()) == ["triton/KEY/kernel.cubin", "triton/NEW/kernel"]
    second = again.save()
    assert second.names == ["c"] and second.id != first.id and Store().inspect("c")[0].facts["model"] == "llama"


def test_an_engine_that_writes_in_place_harms_nobody(place):
    kept, id = saved()
    caches = kvstore.compiled.use("c")
    for file in kept:
        with open(caches.path / file, "r+b") as opened:
            opened.write(b"XX")
    forget()
    caches = kvstore.compiled.use("c")
    assert content(caches.path) == kept
    (one,) = Cache(place / "node" / "restored", 0).ls()
    assert one.id == id and not one.is_used


def differing(monkeypatch, **other) -> None:
    here = facts.here()
    monkeypatch.setattr(facts, "here", lambda: {**here, **other})


@pytest.mark.parametrize(
    "name", ["machine", "gpu", "python", "torch", "cuda", "hip", "triton", "vllm", "sglang", "flashinfer", "deep_gemm"]
)
def test_each_fact_is_refused_by_name(monkeypatch, name):
    _, id = saved()
    was = facts.here()[name]
    differing(monkeypatch, **{name: "another"})
    with pytest.raises(Invalid, match=re.escape(f"its {name} is {was}, and another here; allow={name} ")):
        kvstore.compiled.use("c", strict=True)
    caches = kvstore.compiled.use("c")
    assert caches.id is None and name in caches.why and not content(caches.path)
    forget()
    assert kvstore.compiled.use("c", allow=[name], strict=True).id == id


def test_all_that_differs_is_named_at_once(monkeypatch):
    saved()
    differing(monkeypatch, torch="9", gpu="sm_00")
    with pytest.raises(Invalid, match="its gpu .*; its torch .*allow=gpu,torch "):
        kvstore.compiled.use("c", facts={}, strict=True)
    with pytest.raises(Invalid, match="its model is not known, and is llama here"):
        kvstore.compiled.use("c", facts={"model": "llama"}, strict=True)


@pytest.mark.parametrize(
    ("name", "old", "here", "why"),
    [
        ("cpu_flags", "avx avx2", "avx avx2 avx512f", None),
        ("cpu_flags", "avx avx2 avx512f", "avx avx2", "has avx512f, which this CPU lacks"),
        ("cpu_flags", "avx", "none", "has avx, which this CPU lacks"),
        ("cpu_flags", "none", "avx", "is none, and avx here"),
        ("glibc", "2.9", "2.36", None),
        ("glibc", "2.36", "2.36", None),
        ("glibc", "2.39", "2.36", "is 2.39, and 2.36 here is older"),
        ("torch", "2.13.0", "2.13.0+cpu", "is 2.13.0, and 2.13.0+cpu here"),
    ],
)
def test_rules(name, old, here, why):
    assert facts.differences({name: old}, {name: here}) == ({name: why} if why else {})
    assert facts.differences({name: old}, {name: here}, [name]) == {}


def test_facts_of_this_machine():
    here = facts.here()
    assert here["machine"] == os.uname().machine and here["python"] == sys.implementation.cache_tag
    assert here["glibc"][0] == "2" and len(here["cpu_flags"].split()) > 3
    assert all(isinstance(value, str) and len(value) < 4096 for value in here.values())
    assert "torch" not in sys.modules or here["torch"] == sys.modules["torch"].__version__


def test_another_snapshot_is_refused(place):
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{}")
    Store().save(place / "model", name="c")
    with pytest.raises(Invalid, match="holds no compile caches"):
        kvstore.compiled.use("c", strict=True)
    assert kvstore.compiled.use("c").id is None


@pytest.mark.parametrize(
    "told", ["[", "[]", '{"triton/KEY/kernel.cubin": "x"}', '{"triton/KEY/kernel.cubin": -1}', '{"../x": 1}']
)
def test_hostile_times(place, told):
    """A snapshot that somebody else made: nothing is written outside of the folder."""
    made = place / "made"
    (made / "triton/KEY").mkdir(parents=True)
    (made / "triton/KEY/kernel.cubin").write_bytes(b"cubin")
    (made / folders.TIMES).write_text(told)
    (place / "node").mkdir(mode=0o700)
    (place / "node" / "x").write_text("mine")
    Store().save(made, name="c", facts=facts.here())
    if "../x" in told:
        assert content(kvstore.compiled.use("c").path) == {}
        assert (place / "node" / "x").read_text() == "mine"
    else:
        with pytest.raises(Invalid, match="times.json"):
            kvstore.compiled.use("c")
        assert [path.name for path in (place / "node").glob("engine-*")] == []


def test_a_folder_that_is_set_already_is_not_taken_away(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    with pytest.raises(Invalid, match="TRITON_CACHE_DIR: set already"):
        kvstore.compiled.use("c")


def test_a_node_whose_folder_others_can_write_to(place):
    (place / "node").mkdir()
    (place / "node").chmod(0o770)
    with pytest.raises(Invalid, match="others may write"):
        kvstore.compiled.use("c")


def test_one_name_a_process():
    caches = kvstore.compiled.use("c")
    assert kvstore.compiled.use("c") is caches
    with pytest.raises(Invalid, match="'c' already, and 'd'"):
        kvstore.compiled.use("d")


def test_an_engine_starts_whatever_is_wrong(place, monkeypatch, caplog):
    assert kvstore.compiled.from_environment() is None
    monkeypatch.setenv("KVSTORE_COMPILE_CACHE", "c")
    monkeypatch.setenv("KVSTORE_SNAPSHOTS", f"file://{place}/nothing")
    caplog.set_level("INFO")
    caches = kvstore.compiled.from_environment()
    assert caches is None or caches.id is None
    assert "compiling anew" in caplog.text or "starting without" in caplog.text
    if caches:
        forget()
    monkeypatch.setenv("KVSTORE_SNAPSHOTS", f"file://{place}/store")
    saved()
    caplog.clear()
    assert kvstore.compiled.from_environment().id
    assert "restored from" in caplog.text


def test_damage_is_found(place):
    saved()
    for chunk in (place / "store").rglob("chunks/*/*"):
        content = bytearray(chunk.read_bytes())
        content[0] ^= 1
        chunk.write_bytes(content)
    with pytest.raises(kvstore.DataLoss):
        kvstore.compiled.use("c")


CHILD = """
import json, os, sys, time
import kvstore.compiled
caches = kvstore.compiled.use("c", strict=True)
print(json.dumps([caches.id, str(caches.path)]), flush=True)
if sys.argv[1:]:
    time.sleep(1000)
"""


def child(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)


def test_many_processes_restore_once_and_have_folders_of_their_own(place):
    kept, id = saved()
    processes = [child("stay") for _ in range(4)]
    try:
        told = [json.loads(process.stdout.readline()) for process in processes]
        assert {one for one, _ in told} == {id} and len({path for _, path in told}) == 4
        assert all(content(pathlib.Path(path)) == kept for _, path in told)
        assert len(Cache(place / "node" / "restored", 0).ls()) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait(PATIENCE_S)
    # What they left is removed by the next.
    assert kvstore.compiled.use("c").id == id
    assert len([path for path in (place / "node").glob("engine-*") if path.is_dir()]) == 1


def test_a_child_has_its_parents_folder_and_keeps_it(place):
    saved()
    caches = kvstore.compiled.use("c")
    process = child("stay")
    try:
        assert json.loads(process.stdout.readline()) == [caches.id, str(caches.path)]
        path = caches.path
        caches._folder.close()
        assert path.exists()
    finally:
        process.kill()
        process.wait(PATIENCE_S)
    kvstore.compiled._used = None
    for name in (*folders.VARIABLES, "KVSTORE_COMPILE_CACHE_FOLDER"):
        os.environ.pop(name, None)
    kvstore.compiled.use("c")
    assert not path.exists()


def test_the_folder_goes_with_the_process(place):
    saved()
    process = child()
    _, path = json.loads(process.stdout.readline())
    assert process.wait(PATIENCE_S) == 0
    assert not os.path.exists(path)


def test_a_running_engines_caches_are_saved_from_outside(place):
    process = child("stay") if saved() else None
    try:
        _, path = json.loads(process.stdout.readline())
        run = lambda *words: subprocess.run(
            [sys.executable, "-m", "kvstore.compiled", *words], capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert path in run("ls").stdout
        assert run("save", "c").stdout == "nothing new to save\n"
        pathlib.Path(path, "triton", "new").write_bytes(b"new")
        assert "files" in run("save", "c").stdout
        assert "triton/new" in [file.path for file in Store().inspect("c")[1]]
        assert run("save", "d").returncode == 1
        assert json.loads(run("facts").stdout) == facts.here()
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def test_what_is_saved_from_outside_has_the_engines_facts(place):
    """The command may run in another environment: its own facts are not those of the code in the folder."""
    caches = kvstore.compiled.use("c")
    compile_something(caches.path)
    engines = {**facts.here(), "torch": "the engine's", "gpu": "sm_00"}
    caches._folder.tell({"here": engines})
    save = [sys.executable, "-m", "kvstore.compiled", "save", "c"]
    done = subprocess.run(save, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    found = Store().inspect("c")[0].facts
    assert {name: found[name] for name in engines} == engines
    # One that an older version has made.
    for none in (None, {}, "x"):
        caches._folder.tell({"here": none})
        done = subprocess.run(save, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 1 and f"the lock file of {caches.path} does not say" in done.stderr
        with pytest.raises(Invalid, match="does not say"):
            caches.save()


def test_a_save_that_is_killed_leaves_what_was_there(place):
    _, id = saved()
    program = (
        CHILD + "\nopen(caches.path / 'triton/big', 'wb').write(os.urandom(64 << 20))\nprint('go', flush=True)\ncaches.save()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.readline()
    until(lambda: list((place / "node").glob("engine-*/.tmp-saving-*")) or not is_alive(process.pid), "the save's beginning")
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE_S)
    try:
        assert Store().verify("c").wrong == []
    except Busy:
        pass
    assert kvstore.compiled.use("c").id
    assert not list((place / "node").glob("engine-*/.tmp-saving-*"))


def test_a_save_in_the_background(place, caplog):
    caplog.set_level("INFO")
    caches = kvstore.compiled.use("c")
    compile_something(caches.path)
    caches.save_in_background().join(PATIENCE_S)
    assert "saved as" in caplog.text and Store().inspect("c")[0].files == 9
    (place / "store").rename(place / "away")
    (caches.path / "triton/more").write_bytes(b"more")
    caches.save_in_background().join(PATIENCE_S)
    (place / "away").rename(place / "store") if not (place / "store").exists() else None


def test_files_that_change_while_they_are_copied_are_left_out(tmp_path, monkeypatch):
    source, to = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    to.mkdir()
    for name in ("same", "grows", "goes"):
        (source / name).write_bytes(name.encode())
    copy = folders._copy

    def slow(one, other):
        copy(one, other)
        if one.name == "grows":
            one.write_bytes(b"more than before")
        if one.name == "goes":
            one.unlink()

    monkeypatch.setattr(folders, "_copy", slow)
    folders.copy_tree(source, to, dict.fromkeys(("same", "grows", "goes", "never"), 5))
    assert content(to) == {"same": b"same"}


def test_missing_is_said(place):
    with pytest.raises(NotFound):
        kvstore.compiled.use("c", strict=True)
    assert not list((place / "node").glob("engine-*"))
